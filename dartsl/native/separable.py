"""A separable convolution with its BatchNorm, and their gradients (`separable.h`).

Shapes: B images, H x W pixels, G groups of I inputs and O outputs, S sources (G, or 1 for all).
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dartsl.native import build

KERNELS = (3, 5, 7)

Shape = Sequence[int]

FORWARD = "dartsl::normalized_separable"
torch.library.define(
    FORWARD,
    "(Tensor x, Tensor depthwise, Tensor pointwise, Tensor? scale, Tensor? bias, Tensor? addend,"
    " int stride, int dilation, float eps) -> (Tensor, Tensor, Tensor)",
)
BACKWARD = "dartsl::normalized_separable_backward"
torch.library.define(
    BACKWARD,
    "(Tensor gradient, Tensor x, Tensor depthwise, Tensor pointwise, Tensor? scale, Tensor? bias,"
    " Tensor y, Tensor statistics, int stride, int dilation, bool[] wanted) -> Tensor[]",
)


@torch.library.impl(FORWARD, "CPU")
def forward(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    addend: Tensor | None,
    stride: int,
    dilation: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dartsl.separable.normalized_separable`, and what its gradient needs.

    Args:
        x: [B, S I, H, W].
        depthwise: [G I, 1, K, K], K of KERNELS.
        pointwise: [G O, I, 1, 1].
        scale: [G O]; None for 1.
        bias: [G O]; None for 0.
        addend: [B, G O, H', W']; None for 0.
        stride: 1 or 2.
        dilation: 1 or 2.
        eps: of the BatchNorm.

    Returns:
        The output and what was normalized, [B, G O, H', W'] in channels_last; mean,
        1 / sqrt(var + eps) and variance without bias of the latter, [3, G O].
    """
    output, y, statistics = found = _results(x, pointwise, stride)
    sizes = _sizes(x, depthwise, pointwise, stride, dilation)
    given = [_dense(tensor) for tensor in (x, depthwise, pointwise, scale, bias, addend)]
    build.call("separable", x.dtype, sizes, eps, *given, y, output, statistics)
    return found


@torch.library.impl(BACKWARD, "CPU")
def backward(
    gradient: Tensor,
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    statistics: Tensor,
    stride: int,
    dilation: int,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, both weights, scale and bias where they are `wanted`, empty where not.

    Args:
        gradient: of the output, [B, G O, H', W'].
        x: as it was given to `forward`, and so is all that is not named here.
        depthwise: see there.
        pointwise: see there.
        scale: see there.
        bias: see there.
        y: what `forward` returned second.
        statistics: what it returned third.
        stride: see there.
        dilation: see there.
        wanted: of the five; the weights' gradients are computed together.
    """
    found = _gradients(x, depthwise, pointwise, wanted)
    sizes = _sizes(x, depthwise, pointwise, stride, dilation)
    given = gradient, x, depthwise, pointwise, scale, bias, y, statistics
    results = [tensor if tensor.numel() else None for tensor in found]
    build.call("separable_backward", x.dtype, sizes, *map(_dense, given), *results)
    return found


@torch.library.register_fake(FORWARD)
def _fake_forward(
    x: Tensor, depthwise: Tensor, pointwise: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    *_, stride, _, _ = rest
    return _results(x, pointwise, cast(int, stride))


@torch.library.register_fake(BACKWARD)
def _fake_backward(
    gradient: Tensor, x: Tensor, depthwise: Tensor, pointwise: Tensor, *rest: object
) -> list[Tensor]:
    return _gradients(x, depthwise, pointwise, cast(Sequence[bool], rest[-1]))


@register_flop_formula(torch.ops.dartsl.normalized_separable)
def _flops(x: Shape, depthwise: Shape, pointwise: Shape, *rest: Any, out_shape: Any) -> int:
    return flops(out_shape[0], depthwise, pointwise)


@register_flop_formula(torch.ops.dartsl.normalized_separable_backward)
def _backward_flops(
    gradient: Shape, x: Shape, depthwise: Shape, pointwise: Shape, *rest: Any, out_shape: Any
) -> int:
    of_x, of_depthwise, of_pointwise, *_ = rest[-1]
    # As many for each gradient of a convolution; what is computed again is not counted.
    return flops(gradient, depthwise, pointwise) * (of_x + (of_depthwise or of_pointwise))


def flops(output: Shape, depthwise: Shape, pointwise: Shape) -> int:
    """Operations of the convolutions that give the output, a multiplication and an addition two."""
    images, _, height, width = output
    return 2 * images * height * width * (math.prod(depthwise) + math.prod(pointwise))


def _results(x: Tensor, pointwise: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    images, _, height, width = x.shape
    channels = len(pointwise)
    shape = images, channels, -(-height // stride), -(-width // stride)
    output, y = (
        torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for _ in range(2)
    )
    return output, y, pointwise.new_empty(3, channels)


def _gradients(
    x: Tensor, depthwise: Tensor, pointwise: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    of_x, of_depthwise, of_pointwise, of_scale, of_bias = wanted
    of_weights = of_depthwise or of_pointwise
    return [
        torch.empty_like(x, memory_format=torch.channels_last) if of_x else x.new_empty(0),
        depthwise.new_empty(depthwise.shape if of_weights else 0),
        pointwise.new_empty(pointwise.shape if of_weights else 0),
        pointwise.new_empty(len(pointwise) if of_scale else 0),
        pointwise.new_empty(len(pointwise) if of_bias else 0),
    ]


def _sizes(
    x: Tensor, depthwise: Tensor, pointwise: Tensor, stride: int, dilation: int
) -> tuple[int, ...]:
    images, channels, height, width = x.shape
    inputs, kernel = pointwise.shape[1], depthwise.shape[-1]
    groups = len(depthwise) // inputs
    sizes = images, channels // inputs, groups, inputs, len(pointwise) // groups, height, width
    return *sizes, kernel, stride, dilation


def _dense(tensor: Tensor | None) -> Tensor | None:
    """In channels_last, if it has pixels; the kernels' channels come first in both layouts."""
    if tensor is None:
        return None
    maps = tensor.dim() == 4
    return tensor.contiguous(memory_format=torch.channels_last if maps else torch.contiguous_format)
