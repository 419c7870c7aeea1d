"""The primitives: sizes, counts and values (section 3.1.1 of arXiv:1806.09055)."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.operations import (
    OPERATIONS,
    DilatedConv,
    FactorizedReduce,
    ReLUConvBN,
    SeparableConv,
    Zero,
    drop_path,
)

# (without, with) affine BatchNorm parameters, of stride 1, at 16 channels.
PARAMETERS = {
    "none": (0, 0),
    "max_pool_3x3": (0, 0),
    "avg_pool_3x3": (0, 0),
    "skip_connect": (0, 0),
    "sep_conv_3x3": (800, 864),
    "sep_conv_5x5": (1312, 1376),
    "sep_conv_7x7": (2080, 2144),
    "dil_conv_3x3": (400, 432),
    "dil_conv_5x5": (656, 688),
    "conv_7x1_1x7": (3584, 3616),
}
FRESH_BN = 1 / math.sqrt(1 + 1e-5)  # what a BatchNorm in evaluation, never trained, multiplies by


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def weights(module: nn.Module) -> list[Tensor]:
    return [m.weight for m in module.modules() if isinstance(m, nn.Conv2d)]


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_the_ten_primitives() -> None:
    assert set(OPERATIONS) == set(PARAMETERS)


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (15, 15), (8, 5), (3, 3)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("primitive", OPERATIONS)
def test_output_size_is_the_ceiling_of_size_by_stride(primitive, stride, size) -> None:
    output = OPERATIONS[primitive](4, stride, True)(torch.randn(2, 4, *size))
    assert output.shape == (2, 4, math.ceil(size[0] / stride), math.ceil(size[1] / stride))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("primitive", OPERATIONS)
def test_parameter_counts(primitive, stride) -> None:
    # Only the skip connection has others at stride 2: a FactorizedReduce.
    expected = PARAMETERS[primitive]
    if primitive == "skip_connect" and stride == 2:
        expected = (256, 288)
    counted = tuple(count(OPERATIONS[primitive](16, stride, affine)) for affine in (False, True))
    assert counted == expected


@pytest.mark.parametrize(
    ("primitive", "kinds"),
    [
        ("sep_conv_3x3", ["ReLU", "DepthwiseConv2d", "Conv2d", "BatchNorm2d"] * 2),
        ("dil_conv_3x3", ["ReLU", "DepthwiseConv2d", "Conv2d", "BatchNorm2d"]),
        ("conv_7x1_1x7", ["ReLU", "Conv2d", "Conv2d", "BatchNorm2d"]),
    ],
)
def test_the_order_is_relu_convolution_batchnorm(primitive, kinds) -> None:
    operation = OPERATIONS[primitive](4, 2, True)
    leaves = [type(m).__name__ for m in operation.modules() if not list(m.children())]
    assert leaves == kinds


@pytest.mark.parametrize("primitive", OPERATIONS)
def test_convolutions_have_no_bias_and_batchnorm_the_default_settings(primitive) -> None:
    for stride in (1, 2):
        for module in OPERATIONS[primitive](4, stride, True).modules():
            if isinstance(module, nn.Conv2d):
                assert module.bias is None
            if isinstance(module, nn.BatchNorm2d):
                assert (module.eps, module.momentum) == (1e-5, 0.1)
                assert module.affine


@pytest.mark.parametrize("stride", [1, 2])
def test_none_is_zeros(stride) -> None:
    output = Zero(stride)(randn(2, 3, 7, 8))
    assert torch.equal(output, torch.zeros(2, 3, math.ceil(7 / stride), 8 // stride).double())


def test_none_has_gradient_zero() -> None:
    x = randn(1, 2, 4, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(OPERATIONS["none"](2, 2, True)(x).sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))


def test_a_skip_of_stride_1_is_the_identity() -> None:
    skip = OPERATIONS["skip_connect"](3, 1, True)
    x = randn(2, 3, 4, 4)
    assert isinstance(skip, nn.Identity)
    assert torch.equal(skip(x), x)


@pytest.mark.parametrize("stride", [1, 2])
def test_average_pool_does_not_count_the_padding(stride) -> None:
    pool = OPERATIONS["avg_pool_3x3"](1, stride, True)
    ones = torch.ones(1, 1, 6, 6)
    assert torch.allclose(pool(ones), torch.ones_like(pool(ones)))
    x = randn(1, 1, 6, 6)
    assert torch.allclose(pool(x)[0, 0, 0, 0], x[0, 0, :2, :2].mean())


@pytest.mark.parametrize("stride", [1, 2])
def test_max_pool_has_a_window_of_3(stride) -> None:
    x = randn(1, 1, 6, 6) - 10  # below 0: a padding of zeros would win
    padded = F.pad(x, (1, 1, 1, 1), value=-math.inf)
    expected = padded.unfold(2, 3, stride).unfold(3, 3, stride).amax((-1, -2))
    assert torch.equal(OPERATIONS["max_pool_3x3"](1, stride, True)(x), expected)


def test_relu_conv_bn_in_closed_form() -> None:
    module = ReLUConvBN(3, 2).double().eval()
    x = randn(2, 3, 4, 4)
    expected = torch.einsum("oi,bihw->bohw", module.op[1].weight[:, :, 0, 0], x.relu()) * FRESH_BN
    assert torch.allclose(module(x), expected)


def separable(x: Tensor, depthwise: Tensor, pointwise: Tensor, stride: int, dilation: int):
    """ReLU, depthwise, pointwise, fresh BatchNorm; padding keeps the size at stride 1."""
    padding = dilation * (depthwise.shape[-1] // 2)
    x = F.conv2d(x.relu(), depthwise, None, stride, padding, dilation, groups=x.shape[1])
    return F.conv2d(x, pointwise) * FRESH_BN


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_separable_convolution_is_applied_twice_with_the_stride_first(kernel_size, stride) -> None:
    module = SeparableConv(3, kernel_size, stride, affine=True).double().eval()
    x = randn(2, 3, 8, 8)
    first, second, third, fourth = weights(module)
    assert first.shape == third.shape == (3, 1, kernel_size, kernel_size)
    expected = separable(separable(x, first, second, stride, 1), third, fourth, 1, 1)
    assert torch.allclose(module(x), expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_dilated_convolution_is_applied_once_with_dilation_2(kernel_size, stride) -> None:
    module = DilatedConv(3, kernel_size, stride, affine=True).double().eval()
    x = randn(2, 3, 8, 8)
    depthwise, pointwise = weights(module)
    assert module.op[1].padding == {3: (2, 2), 5: (4, 4)}[kernel_size]
    assert torch.allclose(module(x), separable(x, depthwise, pointwise, stride, dilation=2))


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_7x1_1x7_splits_the_stride_over_its_axes(stride) -> None:
    module = OPERATIONS["conv_7x1_1x7"](3, stride, True).double().eval()
    x = randn(2, 3, 8, 10)
    row, column = weights(module)
    assert row.shape == (3, 3, 1, 7)
    assert column.shape == (3, 3, 7, 1)
    expected = F.conv2d(x.relu(), row, stride=(1, stride), padding=(0, 3))
    expected = F.conv2d(expected, column, stride=(stride, 1), padding=(3, 0)) * FRESH_BN
    assert torch.allclose(module(x), expected)


def test_factorized_reduce_is_the_official_formula_on_even_sizes() -> None:
    module = FactorizedReduce(3, 4).double().eval()
    x = randn(2, 3, 6, 8)
    first, second = (weight[:, :, 0, 0] for weight in weights(module))
    relu = x.relu()
    branches = [
        torch.einsum("oi,bihw->bohw", first, relu[:, :, 0::2, 0::2]),
        torch.einsum("oi,bihw->bohw", second, relu[:, :, 1::2, 1::2]),
    ]
    assert torch.allclose(module(x), torch.cat(branches, dim=1) * FRESH_BN)


@pytest.mark.parametrize("size", [(7, 7), (15, 8), (8, 15), (1, 1)])
def test_factorized_reduce_sees_zeros_past_an_odd_border(size) -> None:
    module = FactorizedReduce(3, 4).double().eval()
    x = randn(2, 3, *size)
    even = F.pad(x, (0, size[1] % 2, 0, size[0] % 2))
    assert torch.allclose(module(x), module(even))


def test_factorized_reduce_splits_odd_channels() -> None:
    assert FactorizedReduce(3, 5)(torch.randn(2, 3, 4, 4)).shape == (2, 5, 2, 2)


def test_drop_path_drops_whole_samples_and_scales_the_others() -> None:
    torch.manual_seed(0)
    x = randn(64, 3, 2, 2)
    output = drop_path(x, 0.25)
    kept = output.flatten(1).abs().sum(1) > 0
    assert 0 < kept.sum() < 64
    assert torch.allclose(output[kept], x[kept] / 0.75)
    assert torch.equal(output[~kept], torch.zeros_like(x[~kept]))


@pytest.mark.parametrize("drop_prob", [0.1, 0.2, 0.5])
def test_drop_path_keeps_the_expectation(drop_prob) -> None:
    torch.manual_seed(1)
    mean = drop_path(torch.ones(20_000, 1, 1, 1), drop_prob).mean().item()
    deviation = math.sqrt(drop_prob / (1 - drop_prob) / 20_000)  # of the mean of 20,000
    assert abs(mean - 1) < 4 * deviation


def test_drop_path_of_probability_0_is_the_identity() -> None:
    x = randn(4, 2, 3, 3)
    assert torch.equal(drop_path(x, 0.0), x)


def test_drop_path_gradient_has_the_mask_of_the_forward_pass() -> None:
    torch.manual_seed(0)
    x = torch.ones(16, 1, 2, 2, requires_grad=True)
    output = drop_path(x, 0.5)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(gradient, output.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_drop_path_keeps_the_dtype(dtype) -> None:
    assert drop_path(torch.ones(2, 1, 1, 1, dtype=dtype), 0.2).dtype == dtype


def test_drop_path_takes_its_probability_from_a_tensor() -> None:
    torch.manual_seed(0)
    output = drop_path(torch.ones(5_000, 1, 1, 1), torch.tensor(0.25))
    assert torch.allclose(output.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert output.mean().item() == pytest.approx(1, abs=0.03)
