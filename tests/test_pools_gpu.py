"""The weighed pools in Triton are PyTorch's."""

import pytest
import torch
from torch import Tensor, nn

from dartsl import pools
from dartsl.fused import Precision
from dartsl.networks import merged
from dartsl.networks.merged import NormalizedPool, Source, can_share, shared_sum
from dartsl.pools import AvgPool2d, _formula
from tests.triton_kernels import DEVICE, TOLERANCE, TYPES, difference, load

gpu, triton_sums = load("pools_gpu"), load("triton_sums")

# identity, maximum, average; stride, edges, channels, image
CASES = [
    ((1, 1, 1), 1, 3, 16, (6, 6)),
    ((0, 1, 1), 2, 2, 16, (7, 9)),
    ((0, 1, 1), 2, 2, 8, (8, 6)),
    ((1, 1, 0), 1, 4, 5, (5, 4)),
    ((1, 0, 1), 1, 1, 33, (5, 5)),
    ((0, 1, 0), 1, 2, 16, (4, 4)),
    ((0, 0, 1), 2, 2, 16, (6, 7)),
    ((1, 1, 1), 1, 2, 3, (1, 7)),
    ((1, 1, 1), 1, 2, 8, (8, 8)),  # pixels are a whole tile
]


def assert_equal(case: tuple, dtype: torch.dtype, *, rounded: bool = False) -> None:
    maps, stride, edges, channels, image = case
    torch.manual_seed(0)
    x = torch.randn(2, channels, *image)
    if rounded:  # many pixels of a window are its highest
        x = x.round()
    x, weights = x.to(dtype), torch.rand(edges, sum(maps))
    ends = [x.double().requires_grad_(), weights.double().requires_grad_()]
    expected = _formula(*ends, maps, stride, 1e-5)
    gradient = torch.randn_like(expected).to(dtype)
    of_inputs = torch.autograd.grad(expected, ends, gradient.double())
    x, weights, gradient = x.to(DEVICE), weights.to(DEVICE), gradient.to(DEVICE)
    output, y, statistics = gpu.forward(x, weights, maps, stride, 1e-5)
    assert output.dtype == y.dtype == dtype
    assert difference(output.cpu(), expected.detach()) < TOLERANCE[dtype]
    var, mean = torch.var_mean(y.double().cpu(), (0, 2, 3))
    exact = dtype == torch.float32  # in half precision y is rounded after they are taken
    assert torch.allclose(statistics[0].cpu().double(), mean, atol=1e-5 if exact else 1e-4)
    assert torch.allclose(statistics[2].cpu().double(), var, rtol=1e-4 if exact else 1e-3)
    for wanted in ((True, True), (True, False), (False, True)):
        found = gpu.backward(gradient, x, weights, y, statistics, maps, stride, wanted)
        for tensor, want, of_input in zip(found, wanted, of_inputs, strict=True):
            assert tensor.numel() == want * of_input.numel()
            assert not want or difference(tensor.cpu(), of_input) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_statistics_and_gradients(case) -> None:
    assert_equal(case, torch.float32)


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_half_precision_with_weights_in_single(dtype) -> None:
    assert_equal(CASES[0], dtype)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_of_equal_pixels_the_first_has_the_gradient(case) -> None:
    assert_equal(case, torch.float32, rounded=True)


@pytest.mark.parametrize("multiprocessors", [1, 5])
def test_few_programs_take_many_blocks_of_pixels(multiprocessors, monkeypatch) -> None:
    monkeypatch.setattr(triton_sums, "MULTIPROCESSORS", multiprocessors)
    assert_equal(((1, 1, 1), 1, 2, 16, (17, 13)), torch.float32)


def test_the_last_program_adds_in_several_rounds(monkeypatch) -> None:
    """Of seven programs' parts, two at once."""
    monkeypatch.setattr(triton_sums, "PARTS", 32)
    assert_equal(((1, 1, 1), 1, 2, 16, (17, 13)), torch.float32)


def test_moments_of_maps_far_from_zero_whose_first_pixels_are_there(monkeypatch) -> None:
    """They are joined around the mean of the first program's pixels."""
    monkeypatch.setattr(triton_sums, "MULTIPROCESSORS", 1)
    torch.manual_seed(0)
    x = 100 + torch.randn(16, 8, 8, 8)
    x[:1, :4] = 0
    _, y, statistics = gpu.forward(x.to(DEVICE), torch.ones(1, 1, device=DEVICE), (0, 1, 0), 1, 0.0)
    var, mean = torch.var_mean(y.double().cpu(), dim=(0, 2, 3))
    biased = var * (x[:, 0].numel() - 1) / x[:, 0].numel()
    for found, expected in zip(statistics.cpu(), (mean, 1 / biased.sqrt(), var), strict=True):
        assert torch.allclose(found.double(), expected, rtol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_in_evaluation_pools_are_normalized_by_running_statistics(stride, monkeypatch) -> None:
    """Those of every edge are its own."""
    if DEVICE == "cpu":
        types = Precision(torch.float32, torch.float32)
        monkeypatch.setattr(merged, "precision", lambda x: types)
        monkeypatch.setattr(merged, "weighs_pools", lambda x: True)
        monkeypatch.setattr(merged, "evaluates_pools", lambda x: not torch.is_grad_enabled())
        monkeypatch.setattr(torch.ops.dartsl, "weighted_pools", gpu.forward)
    torch.manual_seed(0)
    edges, channels = 3, 6
    operations: list[nn.Module] = [
        NormalizedPool(pool, channels, edges).to(DEVICE).eval()
        for pool in (
            nn.MaxPool2d(3, stride, padding=1),
            AvgPool2d(3, stride, padding=1, count_include_pad=False),
        )
    ]
    for norm in (norm for _, norm in operations):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    operations = [nn.Identity()] * (stride == 1) + operations[::-1]
    x, rows = torch.randn(2, channels, 7, 6), torch.rand(len(operations), edges)
    x, columns = x.to(DEVICE), list(rows.to(DEVICE))
    assert not can_share(operations, x, columns)  # it would give no gradients
    with torch.no_grad():
        assert can_share(operations, x, columns)
        found = shared_sum(operations, x, columns)
        expected = torch.zeros_like(found)
        for operation, column in zip(operations, columns, strict=True):
            row = column.repeat_interleave(channels)
            if isinstance(operation, nn.Identity):
                expected += torch.cat([x] * edges, dim=1) * row[:, None, None]
            else:
                expected += operation(Source(x, edges), row)
        operations[-1].train()
        assert not can_share(operations, x, columns)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("which", [None, "sum", "gradient", "evaluation"])
def test_kernels_are_tried_before_they_are_used(which, monkeypatch, caplog) -> None:
    """They are not, where they find something else."""
    monkeypatch.setattr(torch.ops.dartsl, "weighted_pools", gpu.forward)
    monkeypatch.setattr(torch.ops.dartsl, "weighted_pools_backward", gpu.backward)
    monkeypatch.setattr(pools, "TRIAL", (2, 4, 4, 5))
    name = "weighted_pools_backward" if which == "gradient" else "weighted_pools"
    right = getattr(torch.ops.dartsl, name)

    def wrong(*inputs):
        found = right(*inputs)
        if which == "gradient" or bool(inputs[-1]) == (which == "evaluation"):
            found[0].mul_(1.01)
        return found

    if which:
        monkeypatch.setattr(torch.ops.dartsl, name, wrong)
    assert pools._weighs_well.__wrapped__(torch.device(DEVICE), torch.float32) == (not which)
    assert len(caplog.messages) == bool(which)


def test_nan_is_the_highest() -> None:
    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, 1, 1] = torch.nan
    _, y, _ = gpu.forward(x.to(DEVICE), torch.ones(1, 1, device=DEVICE), (0, 1, 0), 1, 1e-5)
    expected = torch.nn.functional.max_pool2d(x, 3, 1, 1)
    assert torch.equal(y.isnan().cpu(), expected.isnan())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_average_pools_gradient_in_channels_last(device, stride) -> None:
    """On GPUs PyTorch's is another's."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    pool = AvgPool2d(3, stride, padding=1, count_include_pad=False)

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        output = pool(x)
        weights = torch.arange(output.numel(), dtype=torch.float64).view(output.shape)
        (output * weights.to(output.device)).sum().backward()
        return x.grad.cpu()

    actual = gradient(x.to(device).contiguous(memory_format=torch.channels_last))
    windows = torch.nn.functional.avg_pool2d(torch.ones_like(x), 3, stride, 1) * 9

    def literal(x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, 3, stride, 1) * 9 / windows

    x.requires_grad_()
    output = literal(x)
    (output * torch.arange(output.numel(), dtype=torch.float64).view(output.shape)).sum().backward()
    assert torch.allclose(actual, x.grad, rtol=1e-12)
