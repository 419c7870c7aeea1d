"""The weight gradient of a depthwise convolution (`depthwise.h`).

Shapes: B images, C channels, H x W pixels, K x K kernel.
"""

import torch
from torch import Tensor

from dartsl.native import build

KERNELS = (3, 5, 7)

NAME = "dartsl::depthwise_weight_gradient"
torch.library.define(
    NAME, "(Tensor gradient, Tensor x, Tensor weight, int stride, int dilation) -> Tensor"
)


def can_weigh(x: Tensor, weight: Tensor) -> bool:
    """Whether `weight_gradient` takes x [B, C, H, W] and weight [C, 1, K, K] on this machine."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in build.SUFFIXES
        and weight.shape[-1] in KERNELS
        and build.is_built()
    )


def weight_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int
) -> Tensor:
    """Gradient [C, 1, K, K] of the weight of a depthwise convolution that keeps the size.

    Args:
        gradient: of the output, [B, C, ceil(H / stride), ceil(W / stride)].
        x: [B, C, H, W].
        weight: [C, 1, K, K]; its values do not matter.
        stride: 1 or 2.
        dilation: 1 or 2.
    """
    return torch.ops.dartsl.depthwise_weight_gradient(gradient, x, weight, stride, dilation)


@torch.library.impl(NAME, "CPU")
def _call(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    gradient, x = (t.contiguous(memory_format=torch.channels_last) for t in (gradient, x))
    found = torch.empty(weight.shape, dtype=weight.dtype)
    sizes = *x.shape, weight.shape[-1], stride, dilation
    build.call("weight_gradient", x.dtype, sizes, x, gradient, found)
    return found


@torch.library.register_fake(NAME)
def _fake(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
