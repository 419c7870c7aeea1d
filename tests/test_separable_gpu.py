"""The separable convolution with its BatchNorm in Triton is PyTorch's."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dartsl import separable
from dartsl.depthwise import DepthwiseConv2d
from dartsl.fused import Precision
from dartsl.networks import merged
from dartsl.networks.merged import MergedBatchNorm
from dartsl.separable import (
    Unit,
    _formula,
    _formula_of_sum,
    can_sum,
    fused,
    fused_sum,
    units_of,
)
from tests.triton_kernels import DEVICE, TOLERANCE, TYPES, difference, load

gpu, triton_sums = load("separable_gpu"), load("triton_sums")

# groups, inputs, outputs, kernel, stride, dilation, whether all groups read the same, image
CASES = [
    (2, 16, 16, 3, 1, 1, False, (6, 6)),
    (3, 16, 16, 5, 1, 1, True, (6, 6)),
    (2, 16, 16, 3, 1, 2, True, (7, 5)),
    (2, 16, 16, 5, 2, 1, True, (8, 8)),
    (2, 16, 16, 3, 2, 2, True, (7, 9)),
    (2, 4, 4, 5, 2, 2, False, (7, 8)),
    (1, 36, 36, 3, 1, 1, False, (5, 5)),
    (1, 20, 40, 5, 1, 2, False, (5, 6)),
    (2, 3, 5, 7, 1, 1, True, (4, 1)),
]


def inputs(case: tuple, dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    """x, depthwise, pointwise, scale, bias."""
    groups, ins, outs, kernel, _, _, shared, image = case
    torch.manual_seed(0)
    tensors = [
        torch.randn(batch, ins if shared else groups * ins, *image).to(dtype),
        torch.randn(groups * ins, 1, kernel, kernel) / kernel,
        torch.randn(groups * outs, ins, 1, 1) / ins**0.5,
        torch.rand(groups * outs) + 0.5,
        torch.randn(groups * outs),
    ]
    return [tensor.to(DEVICE) for tensor in tensors]


def expected_of(given: list[Tensor | None], stride: int, dilation: int) -> tuple:
    """The output in 64 bits on the CPU, its gradient, and those of the inputs."""
    ends = [None if t is None else t.detach().cpu().double().requires_grad_() for t in given]
    output = _formula(*ends, stride, dilation, 1e-5)  # type: ignore[arg-type]
    torch.manual_seed(1)
    gradient = torch.randn_like(output).to(given[0].dtype)
    found = torch.autograd.grad(output, [e for e in ends if e is not None], gradient.double())
    return output.detach(), gradient.to(DEVICE), list(found)


def assert_equal(case: tuple, given: list[Tensor | None], addend: bool = False) -> None:
    dtype, (stride, dilation) = given[0].dtype, case[4:6]
    output, gradient, of_inputs = expected_of(given, stride, dilation)
    added = torch.ones_like(output).to(gradient) if addend else None
    actual, y, statistics = gpu.forward(*given, added, stride, dilation, 1e-5)
    assert actual.dtype == y.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert difference(actual.cpu(), output + int(addend)) < TOLERANCE[dtype]
    y = y.double().cpu()
    var, mean = torch.var_mean(y, (0, 2, 3))
    assert torch.allclose(statistics[0].cpu().double(), mean, atol=1e-5)
    assert torch.allclose(statistics[2].cpu().double(), var, rtol=1e-4)
    wanted = [tensor is not None for tensor in given]
    found = gpu.backward(gradient, *given, y.to(actual), statistics, stride, dilation, wanted)
    found = [tensor.cpu() for tensor, want in zip(found, wanted, strict=True) if want]
    for tensor, expected in zip(found, of_inputs, strict=True):
        assert difference(tensor, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_statistics_and_all_gradients(case) -> None:
    assert_equal(case, inputs(case, torch.float32))


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_half_precision_with_weights_in_single(dtype) -> None:
    for case in (CASES[1], CASES[6]):
        assert_equal(case, inputs(case, dtype), addend=True)


def test_without_scale_and_bias() -> None:
    given = inputs(CASES[0], torch.float32)
    assert_equal(CASES[0], [*given[:3], None, None], addend=True)


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_few_programs_take_many_blocks_of_pixels(blocks, monkeypatch) -> None:
    monkeypatch.setattr(triton_sums, "MAX_BLOCKS", blocks)
    case = (1, 16, 16, 3, 1, 1, False, (17, 19))
    assert_equal(case, inputs(case, torch.float32))


def test_gradients_that_nobody_wants_are_not_computed() -> None:
    given = inputs(CASES[1], torch.float32)
    _, gradient, of_inputs = expected_of(given, 1, 1)
    _, y, statistics = gpu.forward(*given, None, 1, 1, 1e-5)
    for wanted in ([True, False, False, True, False], [False, True, True, False, False]):
        found = gpu.backward(gradient, *given, y, statistics, 1, 1, wanted)
        for tensor, want, expected in zip(found[:3], wanted, of_inputs, strict=False):
            assert tensor.numel() == want * expected.numel()
            assert not want or difference(tensor.cpu(), expected) < 2e-5


def test_a_second_time_gives_the_same_bits(monkeypatch) -> None:
    monkeypatch.setattr(triton_sums, "MAX_BLOCKS", 4)
    case = (2, 16, 16, 5, 1, 1, True, (9, 9))
    given = inputs(case, torch.float32)
    _, gradient, _ = expected_of(given, 1, 1)

    def everything() -> list[Tensor]:
        output, y, statistics = gpu.forward(*given, None, 1, 1, 1e-5)
        found = gpu.backward(gradient, *given, y, statistics, 1, 1, [True] * 5)
        return [output, y, statistics, *found]

    for first, second in zip(everything(), everything(), strict=True):
        assert torch.equal(first, second)


def test_other_layouts_give_the_same_bits() -> None:
    given = inputs(CASES[0], torch.float32)
    wide = torch.cat([given[0], given[0]], dim=3)
    outputs = [
        gpu.forward(x, *given[1:], None, 1, 1, 1e-5)[0]
        for x in (given[0], wide[..., : given[0].shape[3]],
                  given[0].contiguous(memory_format=torch.channels_last))
    ]  # fmt: skip
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_nan_is_not_rectified_away() -> None:
    given = inputs(CASES[0], torch.float32)
    given[0][0, 0, 2, 2] = torch.nan
    output, _, _ = gpu.forward(*given, None, 1, 1, 1e-5)
    assert output[:, :16].isnan().all()  # of the first group, through its statistics
    assert not output[:, 16:].isnan().any()


# kernels of the chains, dilations, how many have a second unit, edges, channels, stride, image
SUMS = [
    ((3, 5, 3, 5), (1, 1, 2, 2), 2, 3, 16, 1, (6, 6)),
    ((3, 5, 3, 5), (1, 1, 2, 2), 2, 2, 16, 2, (7, 8)),
    ((3, 5), (1, 2), 0, 2, 4, 1, (5, 6)),
    ((5, 3, 7), (1, 1, 1), 3, 1, 8, 1, (6, 5)),
    ((3, 3), (1, 2), 1, 2, 20, 1, (5, 5)),
]


def sum_inputs(case: tuple, dtype: torch.dtype) -> tuple:
    """x, scales, weights, options, addend."""
    kernels, dilations, deep, edges, channels, stride, image = case
    torch.manual_seed(0)
    total = edges * channels
    kernels, dilations = kernels + kernels[:deep], dilations + (1,) * deep
    x = torch.randn(2, channels, *image).to(dtype)
    weights = [torch.randn(total, 1, k, k) / k for k in kernels]
    weights += [torch.randn(total, channels, 1, 1) / channels**0.5 for _ in kernels]
    scales = torch.rand(len(case[0]), total) + 0.5
    addend = torch.randn(2, total, *(-(-length // stride) for length in image)).to(dtype)
    return x, scales, weights, (dilations, deep, stride, 1e-5), addend


def assert_sum(case: tuple, dtype: torch.dtype, wanted=(True, True)) -> None:
    x, scales, weights, options, addend = sum_inputs(case, dtype)
    ends = [tensor.double().requires_grad_() for tensor in (x, scales, *weights)]
    expected = _formula_of_sum(*ends, options=options)
    gradient = torch.randn_like(expected).to(dtype)
    of_inputs = torch.autograd.grad(expected, ends, gradient.double())
    x, scales, addend, gradient = (t.to(DEVICE) for t in (x, scales, addend, gradient))
    weights = [weight.to(DEVICE) for weight in weights]
    half = len(weights) // 2
    both = weights[:half], weights[half:]
    output, *kept = gpu.forward_sum(x, scales, addend, *both, *options)
    assert difference(output.cpu() - addend.cpu(), expected.detach()) < 2 * TOLERANCE[dtype]
    found = gpu.backward_sum(gradient, x, scales, *both, kept, *options[:3], wanted)
    assert len(found) == 2 + wanted[1] * len(weights)
    assert found[0].numel() == wanted[0] * x.numel()
    for tensor, of_input in list(zip(found, of_inputs, strict=False))[not wanted[0] :]:
        assert difference(tensor.cpu(), of_input) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("case", SUMS, ids=str)
def test_a_sum_of_chains(case) -> None:
    assert_sum(case, torch.float32)


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_a_sum_of_chains_in_half_precision(dtype) -> None:
    assert_sum(SUMS[0], dtype)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_a_sum_of_chains_whose_gradients_are_not_all_wanted(wanted) -> None:
    assert_sum(SUMS[0], torch.float32, wanted)


def chain(kernels: tuple[int, ...], dilation: int, edges: int, channels: int) -> list[Unit]:
    """A merged chain's units."""
    total = edges * channels
    layers: list[nn.Module] = []
    for kernel in kernels:
        layers += [
            nn.ReLU(),
            DepthwiseConv2d(total, kernel, 1, dilation),
            nn.Conv2d(total, total, 1, groups=edges, bias=False),
            MergedBatchNorm(total, edges),
        ]
    return units_of(nn.ModuleList(layers).to(DEVICE))


@pytest.fixture
def here(monkeypatch) -> None:
    """What is for a GPU, on whatever device the tests run."""
    if DEVICE == "cuda":
        return
    for module in (separable, merged):
        types = Precision(torch.float32, torch.float32)
        monkeypatch.setattr(module, "precision", lambda x: types)
    for name, function in {
        "normalized_separable": gpu.forward,
        "normalized_separable_backward": gpu.backward,
        "separable_sum": gpu.forward_sum,
        "separable_sum_backward": gpu.backward_sum,
    }.items():
        monkeypatch.setattr(torch.ops.dartsl, name, function)


def test_summed_chains_are_the_chains_one_after_the_other(here) -> None:
    """The output, all gradients, second derivatives and running statistics."""
    torch.manual_seed(0)
    chains = [chain((3,), 2, 2, 4), chain((3, 3), 1, 2, 4), chain((5, 5), 1, 2, 4)]
    copies = copy.deepcopy(chains)
    x, addend = torch.randn(2, 4, 5, 5, device=DEVICE), torch.randn(2, 8, 5, 5, device=DEVICE)
    scales = list(torch.rand(3, 8, device=DEVICE) + 0.5)

    def results(together: bool, chains: list[list[Unit]]) -> list[Tensor]:
        weights = [w for units in chains for u in units for w in (u.depthwise.weight, u.pointwise.weight)]
        inputs = [t.detach().clone().requires_grad_() for t in (x, addend, *scales)]
        given, total, *rows = inputs
        if together:
            assert can_sum(chains, given, rows, total)
            total = fused_sum(chains, given, rows, total)
        else:
            for units, row in zip(chains, rows, strict=True):
                total = fused(units, given, row, total)
        inputs += weights
        value = total.square().sum()
        first = torch.autograd.grad(value, inputs, retain_graph=True)
        again = torch.autograd.grad(value, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), inputs)
        running = [b for units in chains for u in units for b in u.norm.buffers()]
        return [total.detach(), *first, *again, *second, *running]

    pairs = zip(results(True, chains), results(False, copies), strict=True)
    for actual, expected in pairs:
        assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_which_chains_are_summed(here) -> None:
    x = torch.randn(2, 4, 5, 5, device=DEVICE)
    rows = list(torch.ones(5, 8, device=DEVICE))
    single, double = chain((3,), 2, 2, 4), chain((5, 5), 1, 2, 4)
    assert can_sum([single, double], x, rows[:2])
    assert not can_sum([single], x, rows[:1])
    assert not can_sum([single] * 5, x, rows)
    assert not can_sum([single, chain((3, 3, 3), 1, 2, 4)], x, rows[:2])
    assert not can_sum([single, chain((3,), 1, 2, 8)], x, rows[:2])
    assert not can_sum([single, double], x, [row.double() for row in rows[:2]])
    assert not can_sum([single, double], torch.randn(2, 8, 5, 5, device=DEVICE), rows[:2])
    single[0].norm.eval()
    assert not can_sum([single, double], x, rows[:2])
