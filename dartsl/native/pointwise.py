"""A pointwise convolution with the BatchNorm after it, and their gradients (`pointwise.h`).

Shapes: B images, H x W pixels, G groups of I inputs and O outputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dartsl.native import build

FORWARD = "dartsl::normalized_pointwise"
torch.library.define(
    FORWARD,
    "(Tensor x, Tensor weight, Tensor? scale, Tensor? addend, float eps, bool rectify)"
    " -> (Tensor, Tensor, Tensor)",
)
BACKWARD = "dartsl::normalized_pointwise_backward"
torch.library.define(
    BACKWARD,
    "(Tensor gradient, Tensor? x, Tensor weight, Tensor? scale, Tensor y, Tensor statistics,"
    " int groups, bool rectify, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)


def can_normalize(x: Tensor, weight: Tensor, scale: Tensor | None, addend: Tensor | None) -> bool:
    """Whether `normalized_pointwise` takes them here.

    It takes nothing that does not fit together; PyTorch's functions do, or say what is wrong.
    """
    given = [tensor for tensor in (x, weight, scale, addend) if tensor is not None]
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == x.dtype for tensor in given)
        and x.dtype in build.SUFFIXES
        and x.numel() > x.shape[1]  # one pixel cannot be normalized
        and x.shape[1] % weight.shape[1] == 0
        and weight.shape[0] % (x.shape[1] // weight.shape[1]) == 0
        and (scale is None or scale.shape == weight.shape[:1])
        and (addend is None or addend.shape == (x.shape[0], weight.shape[0], *x.shape[2:]))
        and build.is_built()
    )


def normalized_pointwise(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    addend: Tensor | None,
    eps: float,
    rectify: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the convolution, and the statistics of the convolution.

    Args:
        x: [B, G I, H, W].
        weight: of the convolution, [G O, I, 1, 1].
        scale: of the BatchNorm, [G O]; None for 1.
        addend: is added to the output, [B, G O, H, W]; None for 0.
        eps: of the BatchNorm.
        rectify: whether a ReLU comes after the BatchNorm.

    Returns:
        [B, G O, H, W] twice, in channels_last; mean, 1 / sqrt(var + eps) and variance without
        bias, [3, G O].
    """
    return torch.ops.dartsl.normalized_pointwise(x, weight, scale, addend, eps, rectify)


def normalized_pointwise_backward(
    gradient: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    y: Tensor,
    statistics: Tensor,
    groups: int,
    rectify: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and scale, as far as they are `wanted`; the others are empty.

    Args:
        gradient: of the output, [B, G O, H, W].
        x: as it was given to `normalized_pointwise`, and so are weight, scale and rectify; None
            where the gradient of weight is not wanted.
        weight: of the convolution.
        scale: of the BatchNorm.
        y: what `normalized_pointwise` returned, and so are the statistics.
        statistics: of y.
        groups: G.
        rectify: whether there was a ReLU.
        wanted: whether the gradient is, for x, weight and scale.
    """
    return torch.ops.dartsl.normalized_pointwise_backward(
        gradient, x, weight, scale, y, statistics, groups, rectify, wanted
    )


@torch.library.impl(FORWARD, "CPU")
def _forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    addend: Tensor | None,
    eps: float,
    rectify: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    output, y, statistics = found = _results(x, weight)
    given = (_dense(tensor) for tensor in (x, weight, scale, addend))
    sizes = _sizes(y, weight, x.shape[1] // weight.shape[1], rectify)
    build.call("pointwise", x.dtype, sizes, eps, *given, y, output, statistics)
    return found


@torch.library.register_fake(FORWARD)
def _results(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    channels = weight.shape[0]
    shape = x.shape[0], channels, *x.shape[2:]
    y, output = (
        torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for _ in range(2)
    )
    return output, y, torch.empty(3, channels, dtype=x.dtype, device=x.device)


@torch.library.impl(BACKWARD, "CPU")
def _backward(
    gradient: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    y: Tensor,
    statistics: Tensor,
    groups: int,
    rectify: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    given = gradient, x, weight, scale, y, statistics
    found = _gradients(y, weight, groups, wanted)
    build.call(
        "pointwise_backward",
        y.dtype,
        _sizes(y, weight, groups, rectify),
        *(_dense(tensor) for tensor in given),
        *(tensor if want else None for tensor, want in zip(found, wanted, strict=True)),
    )
    return found


@torch.library.register_fake(BACKWARD)
def _fake_backward(*given: Any) -> tuple[Tensor, ...]:
    _, _, weight, _, y, _, groups, _, wanted = given
    return _gradients(y, weight, groups, wanted)


def _gradients(
    y: Tensor, weight: Tensor, groups: int, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    of_x = y.shape[0], groups * weight.shape[1], *y.shape[2:]
    dense, plain = torch.channels_last, torch.contiguous_format
    shapes = (of_x, dense), (weight.shape, plain), (weight.shape[:1], plain)
    return tuple(
        torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=layout)
        if want
        else y.new_empty(0)
        for (shape, layout), want in zip(shapes, wanted, strict=True)
    )


def _sizes(y: Tensor, weight: Tensor, groups: int, rectify: bool) -> tuple[int, ...]:
    channels, inputs = weight.shape[:2]
    return y.numel() // channels, groups, inputs, channels // groups, int(rectify)


def _dense(tensor: Tensor | None) -> Tensor | None:
    """In channels_last, if it has pixels."""
    if tensor is None or tensor.dim() < 4:
        return tensor if tensor is None else tensor.contiguous()
    return tensor.contiguous(memory_format=torch.channels_last)
