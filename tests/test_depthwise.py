"""The fast gradients of depthwise convolutions are the gradients, and can be taken again."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dartsl.depthwise import DepthwiseConv2d, DepthwiseConvolution, depthwise_conv2d

CASES = [
    (*case, size)
    for case in itertools.product((3, 5, 7), (1, 2), (1, 2))
    for size in ((6, 6), (7, 4))
    if case[1:] != (2, 2)  # on even pixels it is stride 1, dilation 1
]


def reference(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups=len(weight))


def inputs(kernel_size: int, size: tuple[int, int], dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 2, *size), (2, 1, kernel_size, kernel_size)
    x, weight = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize(("kernel_size", "stride", "dilation", "size"), CASES)
def test_values_and_gradients_are_pytorchs(kernel_size, stride, dilation, size) -> None:
    x, weight = inputs(kernel_size, size)
    ours, theirs = (f(x, weight, stride, dilation) for f in (depthwise_conv2d, reference))
    assert torch.equal(ours, theirs)
    direction = torch.randn_like(ours)
    for actual, expected in zip(
        torch.autograd.grad(ours, (x, weight), direction),
        torch.autograd.grad(theirs, (x, weight), direction),
        strict=True,
    ):
        assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel_size", "stride", "dilation", "size"), CASES)
def test_gradients_and_their_gradients_are_those_of_finite_differences(
    kernel_size, stride, dilation, size
) -> None:
    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return DepthwiseConvolution.apply(x, weight, stride, dilation)

    tensors = inputs(kernel_size, size)
    assert torch.autograd.gradcheck(convolve, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(convolve, tensors, fast_mode=True)


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_stride_2_with_dilation_2_reads_even_pixels_only(kernel_size, size) -> None:
    x, weight = inputs(kernel_size, size)
    assert torch.allclose(depthwise_conv2d(x, weight, 2, 2), reference(x, weight, 2, 2))


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone(wanted) -> None:
    tensors = inputs(5, (6, 6))
    expected = torch.autograd.grad(reference(*tensors, 1, 1).sum(), tensors)[wanted]
    tensors[1 - wanted].requires_grad_(False)
    (actual,) = torch.autograd.grad(depthwise_conv2d(*tensors).sum(), tensors[wanted])
    assert torch.allclose(actual, expected)


def test_under_autocast_the_gradients_have_the_dtypes_of_the_inputs() -> None:
    x, weight = inputs(5, (6, 6), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = depthwise_conv2d(x, weight)
    assert output.dtype == torch.bfloat16
    gradients = torch.autograd.grad(output.float().sum(), (x, weight))
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 2


def test_the_module_is_an_nn_conv2d() -> None:
    module = DepthwiseConv2d(4, 3, stride=2)
    x = torch.randn(1, 4, 7, 7)
    assert list(module.state_dict()) == ["weight"]
    assert torch.allclose(module(x), super(DepthwiseConv2d, module).forward(x))
