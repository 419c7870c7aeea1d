"""A scaled sum of chains of separable convolutions, and its gradients, for a GPU.

Shapes: B images, H x W pixels, T chains of G groups of C inputs and C outputs. The first `deep`
chains have a second convolution, whose weights stand behind those of the T first ones.

`running` is empty, or what maps are normalized by in place of the batch's statistics: means of the
norms of the T first convolutions and then their variances, and those of the second ones.

`affine` is empty, or it is what is added to the sum, [G C], and if there are deep chains what the
maps between their convolutions are scaled by and shifted by, both [deep, G C].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dartsl.native.separable import Shape, flops

MAX_CHAINS = 4
MAX_GROUPS = 128  # as far as the kernels' divisions go
FORWARD = "dartsl::separable_sum"
torch.library.define(
    FORWARD,
    "(Tensor x, Tensor scales, Tensor? addend, Tensor[] affine, Tensor[] depthwise,"
    " Tensor[] pointwise, int[] dilations, int deep, int stride, float eps, Tensor[] running)"
    " -> Tensor[]",
)
BACKWARD = "dartsl::separable_sum_backward"
torch.library.define(
    BACKWARD,
    "(Tensor gradient, Tensor x, Tensor scales, Tensor[] affine, Tensor[] depthwise,"
    " Tensor[] pointwise, Tensor[] kept, int[] dilations, int deep, int stride, bool[] wanted)"
    " -> Tensor[]",
)


@torch.library.register_fake(FORWARD)
def _fake_forward(
    x: Tensor,
    scales: Tensor,
    addend: Tensor | None,
    affine: Sequence[Tensor],
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    dilations: Sequence[int],
    deep: int,
    stride: int,
    eps: float,
    running: Sequence[Tensor],
) -> list[Tensor]:
    chains, channels = scales.shape
    size = -(-x.shape[2] // stride), -(-x.shape[3] // stride)

    def new_map(channels: int) -> Tensor:
        shape = len(x), channels, *size
        return x.new_empty(shape).contiguous(memory_format=torch.channels_last)

    def matrices(depthwise: Sequence[Tensor]) -> Tensor:
        taps = sum(weight.shape[-1] ** 2 for weight in depthwise)
        return x.new_empty(taps * x.shape[1], channels)

    return [
        new_map(channels),
        new_map(chains * channels),
        scales.new_empty(3, chains * channels),
        new_map(deep * channels),
        new_map(deep * channels),
        scales.new_empty(3, deep * channels),
        torch.empty_like(x, memory_format=torch.channels_last),
        matrices(depthwise[:chains]),
        matrices(depthwise[chains:]),
    ]


@torch.library.register_fake(BACKWARD)
def _fake_backward(
    gradient: Tensor,
    x: Tensor,
    scales: Tensor,
    affine: Sequence[Tensor],
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    kept: Sequence[Tensor],
    dilations: Sequence[int],
    deep: int,
    stride: int,
    wanted: Sequence[bool],
) -> list[Tensor]:
    of_x, of_weights = wanted
    of_input = torch.empty_like(x, memory_format=torch.channels_last) if of_x else x.new_empty(0)
    weights = [torch.empty_like(weight) for weight in (*affine, *depthwise, *pointwise)]
    return [of_input, torch.empty_like(scales), *(weights if of_weights else [])]


@register_flop_formula(torch.ops.dartsl.separable_sum)
def _flops(
    x: Shape,
    scales: Shape,
    addend: Shape | None,
    affine: Sequence[Shape],
    depthwise: Sequence[Shape],
    pointwise: Sequence[Shape],
    *rest: Any,
    out_shape: Any,
) -> int:
    return sum(flops(out_shape[0], *pair) for pair in zip(depthwise, pointwise, strict=True))


@register_flop_formula(torch.ops.dartsl.separable_sum_backward)
def _backward_flops(
    gradient: Shape,
    x: Shape,
    scales: Shape,
    affine: Sequence[Shape],
    depthwise: Sequence[Shape],
    pointwise: Sequence[Shape],
    *rest: Any,
    out_shape: Any,
) -> int:
    once = sum(flops(gradient, *pair) for pair in zip(depthwise, pointwise, strict=True))
    return once * sum(rest[-1])  # for x and for the weights; what is computed again is not counted
