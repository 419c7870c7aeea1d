"""Copies of a rectified map, and their gradient (`copies.h`).

Shapes: B images, C channels, H x W pixels, k copies.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dartsl.native import build

FORWARD = "dartsl::rectified_copies"
torch.library.define(FORWARD, "(Tensor x, int copies) -> Tensor")
BACKWARD = "dartsl::rectified_copies_backward"
torch.library.define(BACKWARD, "(Tensor[] gradients, Tensor x, int copies) -> Tensor")


def can_copy(x: Tensor) -> bool:
    """Whether `rectified_copies` takes x [B, C, H, W] on this machine."""
    return x.device.type == "cpu" and x.dtype in build.SUFFIXES and build.is_built()


def rectified_copies(x: Tensor, copies: int) -> Tensor:
    """ReLU of x [B, C, H, W], k times along the channels: [B, k C, H, W], in channels_last."""
    return torch.ops.dartsl.rectified_copies(x, copies)


def rectified_copies_backward(gradients: Sequence[Tensor], x: Tensor, copies: int) -> Tensor:
    """Gradient of x, [B, C, H, W].

    Args:
        gradients: of the output, [B, k C, H, W], of everything that reads it.
        x: what was copied.
        copies: k.
    """
    return torch.ops.dartsl.rectified_copies_backward(gradients, x, copies)


@torch.library.impl(FORWARD, "CPU")
def _forward(x: Tensor, copies: int) -> Tensor:
    found = _fake_forward(x, copies)
    x = x.contiguous(memory_format=torch.channels_last)
    build.call("copies", x.dtype, _sizes(x, copies), x, found)
    return found


@torch.library.register_fake(FORWARD)
def _fake_forward(x: Tensor, copies: int) -> Tensor:
    return _map(x, copies * x.shape[1])


@torch.library.impl(BACKWARD, "CPU")
def _backward(gradients: Sequence[Tensor], x: Tensor, copies: int) -> Tensor:
    found = _fake_backward(gradients, x, copies)
    x = x.contiguous(memory_format=torch.channels_last)
    dense = [tensor.contiguous(memory_format=torch.channels_last) for tensor in gradients]
    sizes = _sizes(found, copies, len(dense))
    build.call("copies_backward", found.dtype, sizes, x, found, dense)
    return found


@torch.library.register_fake(BACKWARD)
def _fake_backward(gradients: Sequence[Tensor], x: Tensor, copies: int) -> Tensor:
    return _map(x, x.shape[1])


def _map(like: Tensor, channels: int) -> Tensor:
    shape = like.shape[0], channels, *like.shape[2:]
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _sizes(x: Tensor, copies: int, readers: int = 0) -> tuple[int, ...]:
    return x.numel() // x.shape[1], x.shape[1], copies, readers
