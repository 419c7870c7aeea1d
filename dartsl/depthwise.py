"""Depthwise convolution whose gradients are fast on a CPU.

Shapes: B images, C channels, H x W pixels, K x K kernel (K odd), o outputs.

oneDNN's gradients of depthwise convolutions are 5 to 20 times slower than its forward pass, unless
the kernel is at most 3 wide and not dilated. Both gradients can be written in terms of those that
are fast, and nothing is approximated. The formulas are made of differentiable functions, so that
the gradients can be differentiated again (the exact product of `dartsl.hypergradient`).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAST_WIDTH = 3  # of a kernel, for oneDNN's weight gradient


def depthwise_conv2d(x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """Convolve every channel with a kernel of its own, padded to [ceil(H / s), ceil(W / s)].

    Args:
        x: [B, C, H, W].
        weight: [C, 1, K, K].
        stride: s, 1 or 2.
        dilation: 1 or 2.

    Returns:
        [B, C, ceil(H / s), ceil(W / s)].
    """
    if stride == dilation == 2:
        # All taps of an output lie on even pixels: 2 o + 2 j - 2 (K // 2).
        return depthwise_conv2d(x[:, :, ::2, ::2], weight)
    # Autocast would leave the backward formulas with tensors of two precisions.
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return _convolve(x, weight, stride, dilation)
    return DepthwiseConvolution.apply(x, weight, stride, dilation)


class DepthwiseConv2d(nn.Conv2d):
    """An `nn.Conv2d` that is depthwise, without bias, and keeps the size at stride 1."""

    def __init__(self, channels: int, kernel_size: int, stride: int = 1, dilation: int = 1) -> None:
        padding = dilation * (kernel_size // 2)
        super().__init__(
            channels, channels, kernel_size, stride, padding, dilation, groups=channels, bias=False
        )

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, ceil(H / stride), ceil(W / stride)]."""
        return depthwise_conv2d(input, self.weight, self.stride[0], self.dilation[0])


class DepthwiseConvolution(torch.autograd.Function):
    """y = x * w, with the gradients of `input_gradient` and `weight_gradient`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
        """`depthwise_conv2d` of x [B, C, H, W] and weight [C, 1, K, K]."""
        # An alpha step takes no gradients of the weights, for which alone x is kept.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.shape, ctx.stride, ctx.dilation = x.shape, stride, dilation
        return _convolve(x, weight, stride, dilation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and weight, as far as they are wanted."""
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        steps = ctx.stride, ctx.dilation
        x_wanted, weight_wanted, *_ = ctx.needs_input_grad
        return (
            input_gradient(gradient, ctx.shape, weight, *steps) if x_wanted else None,
            weight_gradient(gradient, x, weight, *steps) if weight_wanted else None,
            None,
            None,
        )


def input_gradient(
    gradient: Tensor, shape: Sequence[int], weight: Tensor, stride: int, dilation: int
) -> Tensor:
    """Gradient of the input, of shape [B, C, H, W], from the gradient of the output.

    At stride 1 it is the convolution of `gradient` with the kernel flipped in both axes:
    y[o] = sum_j w[j] x[o + j] gives dL/dx[i] = sum_j w[j] g[i - j].
    """
    if stride == 1:
        convolve = DepthwiseConvolution.apply if torch.is_grad_enabled() else _convolve
        return convolve(gradient, weight.flip(2, 3), 1, dilation)
    x = gradient.new_zeros(1).expand(shape)  # its values do not matter
    return _native_gradients(gradient, x, weight, stride, dilation, wanted=(True, False))[0]


def weight_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int
) -> Tensor:
    """Gradient of `weight`, [C, 1, K, K]: dL/dw[j] = sum_o g[o] x[s o + d j - d (K // 2)].

    Dilation 2 reads pixels of the same parity as the output only: the parity phases of x and
    `gradient`, stacked along the batch, have the same gradient at dilation 1. A kernel wider than
    3 has its columns taken three at a time: each three are the gradient of a K x 3 kernel on x
    shifted along the width.
    """
    if dilation == 2:
        gradient, x = _parity_phases(gradient), _parity_phases(x)
    size = weight.shape[-1]
    if size <= FAST_WIDTH:
        return _native_gradients(gradient, x, weight, stride, 1, wanted=(False, True))[1]
    padded = F.pad(x, (size // 2, size // 2))
    reach = (gradient.shape[-1] - 1) * stride + FAST_WIDTH  # columns that three taps read
    columns = []
    for first in range(0, size, FAST_WIDTH):
        start = min(first, size - FAST_WIDTH)  # the last three may overlap the three before
        part = padded[:, :, :, start : start + reach]
        kernel = weight[:, :, :, start : start + FAST_WIDTH]
        found = _native_gradients(gradient, part, kernel, stride, 1, (False, True), width_padding=0)
        columns.append(found[1][:, :, :, first - start :])
    return torch.cat(columns, dim=3)


def _parity_phases(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [4 B, C, ceil(H / 2), ceil(W / 2)]; an odd size is padded with a zero."""
    height, width = x.shape[2:]
    if height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2))
    return torch.cat([x[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)])


def _convolve(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups=weight.shape[0])


def _native_gradients(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    dilation: int,
    wanted: tuple[bool, bool],
    width_padding: int | None = None,
) -> tuple[Tensor, Tensor]:
    """PyTorch's own gradients of input and weight; what is not wanted is undefined."""
    padding = [dilation * (size // 2) for size in weight.shape[2:]]
    if width_padding is not None:
        padding[1] = width_padding
    found = torch.ops.aten.convolution_backward(
        gradient,
        x,
        weight,
        None,
        [stride, stride],
        padding,
        [dilation, dilation],
        False,
        [0, 0],
        weight.shape[0],
        [*wanted, False],
    )
    return found[0], found[1]
