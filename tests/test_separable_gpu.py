"""The separable convolution with its BatchNorm in Triton is PyTorch's."""

import pytest
import torch
from torch import Tensor

from dartsl.separable import _formula
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
