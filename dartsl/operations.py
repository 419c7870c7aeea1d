"""The primitives as modules: the alphabet of the cells (section 3.1.1 of arXiv:1806.09055).

Shapes: B images, C channels, H x W pixels. Every operation maps [B, C, H, W] to
[B, C, ceil(H / stride), ceil(W / stride)], in the official order ReLU, convolution, BatchNorm.
Submodules sit under `op`, as in the official code, so that checkpoints translate one to one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.depthwise import DepthwiseConv2d
from dartsl.pools import AvgPool2d
from dartsl.separable import can_fuse, can_sum, fused, fused_sum, sums_chains, units_of


class Zero(nn.Module):
    """No connection: zeros of the operation's output shape."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Zeros, with gradient 0."""
        return x[:, :, :: self.stride, :: self.stride] * 0.0


class ReLUConvBN(nn.Module):
    """ReLU, convolution, BatchNorm; keeps the size.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: odd.
        affine: whether the BatchNorm has affine parameters.
        rectified: whether the input has passed the ReLU already.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        affine: bool = True,
        rectified: bool = False,
    ) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.Identity() if rectified else nn.ReLU(),
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H, W]."""
        return self.op(x)


class FactorizedReduce(nn.Module):
    """Halves the size with two 1x1 convolutions, each of which sees a quarter of the pixels.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        affine: whether the BatchNorm has affine parameters.
        rectified: whether the input has passed the ReLU already.

    Note:
        The official code's convolutions have stride 2, and the second begins at pixel (1, 1): the
        same pixels, but the gradient of a stride is slow. It fails on odd sizes. Here the second
        branch of an odd size sees one row (column) of zeros past the border, so that any size gives
        ceil(size / 2), the output size of every other operation of stride 2.
    """

    def __init__(
        self, in_channels: int, out_channels: int, affine: bool = True, rectified: bool = False
    ) -> None:
        super().__init__()
        self.rectified = rectified
        # An odd number of channels gives the surplus one to the first branch.
        second = out_channels // 2
        self.conv_1 = nn.Conv2d(in_channels, out_channels - second, 1, bias=False)
        self.conv_2 = nn.Conv2d(in_channels, second, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, ceil(H / 2), ceil(W / 2)]."""
        x = x if self.rectified else F.relu(x)
        even, odd = even_and_odd_pixels(x)
        return self.bn(torch.cat([self.conv_1(even), self.conv_2(odd)], dim=1))


def even_and_odd_pixels(x: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels of [B, C, H, W] in even rows and columns, and those in odd rows and columns.

    Both are [B, C, ceil(H / 2), ceil(W / 2)]; an odd size has zeros past the border.
    """
    height, width = x.shape[2:]
    if height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2))
    return EvenAndOddPixels.apply(x)


class EvenAndOddPixels(torch.autograd.Function):
    """Of an even number of rows and columns.

    PyTorch's gradient of a slice is a map of zeros, with the slice; this is one map for both, and
    in channels_last.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] -> [B, C, H / 2, W / 2], two of them."""
        ctx.shape = x.shape
        return x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The gradient of x."""
        even, odd = gradients
        images, channels, height, width = ctx.shape
        gradient = even.new_zeros(images, height, width, channels).movedim(-1, 1)
        gradient[:, :, ::2, ::2] = even
        gradient[:, :, 1::2, 1::2] = odd
        return gradient


class SeparableChain(nn.Sequential):
    """ReLU, depthwise, pointwise, BatchNorm, once or several times: one layer after the other.

    The layers are one operation where that can be (`dartsl.separable`).
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, ceil(H / stride), ceil(W / stride)]."""
        units = units_of(self)
        if can_fuse(units, input):
            return fused(units, input)
        if can_sum([units], input) and sums_chains(input):
            return fused_sum([units], input)
        return super().forward(input)


class SeparableConv(nn.Module):
    """ReLU, depthwise, pointwise, BatchNorm, applied twice; the stride is in the first."""

    def __init__(self, channels: int, kernel_size: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.op = SeparableChain(
            *_separable(channels, kernel_size, stride, dilation=1, affine=affine),
            *_separable(channels, kernel_size, 1, dilation=1, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, ceil(H / stride), ceil(W / stride)]."""
        return self.op(x)


class DilatedConv(nn.Module):
    """ReLU, depthwise of dilation 2, pointwise, BatchNorm, applied once."""

    def __init__(self, channels: int, kernel_size: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.op = SeparableChain(
            *_separable(channels, kernel_size, stride, dilation=2, affine=affine)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, ceil(H / stride), ceil(W / stride)]."""
        return self.op(x)


def _separable(
    channels: int, kernel_size: int, stride: int, dilation: int, affine: bool
) -> list[nn.Module]:
    return [
        nn.ReLU(),
        DepthwiseConv2d(channels, kernel_size, stride, dilation),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]


def _conv_7x1_1x7(channels: int, stride: int, affine: bool) -> nn.Module:
    """Dense 1x7 then 7x1 convolution (AmoebaNet), the stride split over the two axes."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels, channels, (1, 7), (1, stride), (0, 3), bias=False),
        nn.Conv2d(channels, channels, (7, 1), (stride, 1), (3, 0), bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    )


def _skip_connect(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)


Factory = Callable[[int, int, bool], nn.Module]

OPERATIONS: dict[str, Factory] = {
    "none": lambda channels, stride, affine: Zero(stride),
    "max_pool_3x3": lambda channels, stride, affine: nn.MaxPool2d(3, stride, padding=1),
    "avg_pool_3x3": lambda channels, stride, affine: AvgPool2d(
        3, stride, padding=1, count_include_pad=False
    ),
    "skip_connect": _skip_connect,
    "sep_conv_3x3": lambda channels, stride, affine: SeparableConv(channels, 3, stride, affine),
    "sep_conv_5x5": lambda channels, stride, affine: SeparableConv(channels, 5, stride, affine),
    "sep_conv_7x7": lambda channels, stride, affine: SeparableConv(channels, 7, stride, affine),
    "dil_conv_3x3": lambda channels, stride, affine: DilatedConv(channels, 3, stride, affine),
    "dil_conv_5x5": lambda channels, stride, affine: DilatedConv(channels, 5, stride, affine),
    "conv_7x1_1x7": _conv_7x1_1x7,
}
"""The one look-up table: name of a primitive -> factory(channels, stride, affine)."""


def drop_path(x: Tensor, drop_prob: float | Tensor) -> Tensor:
    """Zero whole samples with probability `drop_prob` and scale the others by 1 / (1 - drop_prob).

    Args:
        x: an operation's output, [B, C, H, W].
        drop_prob: in [0, 1), a number or a tensor [] on the device of `x`.

    Returns:
        [B, C, H, W], with the expectation of `x`.
    """
    keep = 1.0 - drop_prob
    mask = torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(keep)
    return x * (mask / keep)
