"""The maps that all edges share, weighed for every edge, and their gradients (`pools.h`).

Shapes: B images, C channels, H x W pixels, k edges, M maps of which P are pools.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dartsl.native import build

IDENTITY, MAXIMUM, AVERAGE = range(3)  # the maps, in the order of their weights

FORWARD = "dartsl::weighted_pools"
torch.library.define(
    FORWARD,
    "(Tensor x, Tensor weights, int[] maps, int stride, float eps, Tensor[] running)"
    " -> (Tensor, Tensor, Tensor)",
)
BACKWARD = "dartsl::weighted_pools_backward"
torch.library.define(
    BACKWARD,
    "(Tensor gradient, Tensor x, Tensor weights, Tensor y, Tensor statistics, int[] maps,"
    " int stride, bool[] wanted) -> Tensor[]",
)


@torch.library.impl(FORWARD, "CPU")
def forward(
    x: Tensor,
    weights: Tensor,
    maps: Sequence[int],
    stride: int,
    eps: float,
    running: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """`dartsl.pools.WeightedPools`, and what its gradient needs.

    Args:
        x: [B, C, H, W].
        weights: [k, M].
        maps: 1 where it is one of the maps and 0 where not: x, its maximum, its average.
        stride: of the pools, 1 or 2; 1 where x is one of the maps.
        eps: of the BatchNorms.
        running: means of the pools' norms, of all edges, and then their variances, in place of the
            batch's, [k C]; none for those. On a GPU alone.

    Returns:
        The output, [B, k C, H', W'], and the pools, [B, P C, H', W'], both in channels_last; mean,
        1 / sqrt(var + eps) and variance without bias of the latter, [3, P C].
    """
    assert not running
    output, y, statistics = found = _results(x, weights, maps, stride)
    sizes = _sizes(x, weights, maps, stride)
    given = x.contiguous(memory_format=torch.channels_last), weights.contiguous()
    build.call("pools", x.dtype, sizes, eps, *given, y, output, statistics)
    return found


@torch.library.impl(BACKWARD, "CPU")
def backward(
    gradient: Tensor,
    x: Tensor,
    weights: Tensor,
    y: Tensor,
    statistics: Tensor,
    maps: Sequence[int],
    stride: int,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x and of the weights where they are `wanted`, empty where not.

    Args:
        gradient: of the output, [B, k C, H', W'].
        x: as it was given to `forward`, and so are weights, maps and stride.
        weights: see there.
        y: what `forward` returned second.
        statistics: what it returned third.
        maps: see there.
        stride: see there.
        wanted: of the two.
    """
    found = _gradients(x, weights, wanted)
    sizes = _sizes(x, weights, maps, stride)
    gradient, x, y = (
        tensor.contiguous(memory_format=torch.channels_last) for tensor in (gradient, x, y)
    )
    given = gradient, x, weights.contiguous(), y, statistics
    results = [tensor if tensor.numel() else None for tensor in found]
    build.call("pools_backward", x.dtype, sizes, *given, *results)
    return found


@torch.library.register_fake(FORWARD)
def _fake_forward(
    x: Tensor,
    weights: Tensor,
    maps: Sequence[int],
    stride: int,
    eps: float,
    running: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(x, weights, maps, stride)


@torch.library.register_fake(BACKWARD)
def _fake_backward(
    gradient: Tensor,
    x: Tensor,
    weights: Tensor,
    y: Tensor,
    statistics: Tensor,
    maps: Sequence[int],
    stride: int,
    wanted: Sequence[bool],
) -> list[Tensor]:
    return _gradients(x, weights, wanted)


def _results(
    x: Tensor, weights: Tensor, maps: Sequence[int], stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    images, channels, height, width = x.shape
    _, *pools = maps
    size = -(-height // stride), -(-width // stride)
    output, y = (
        torch.empty(
            (images, number * channels, *size),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        for number in (len(weights), sum(pools))
    )
    return output, y, weights.new_empty(3, sum(pools) * channels)


def _gradients(x: Tensor, weights: Tensor, wanted: Sequence[bool]) -> list[Tensor]:
    of_x, of_weights = wanted
    return [
        torch.empty_like(x, memory_format=torch.channels_last) if of_x else x.new_empty(0),
        weights.new_empty(weights.shape if of_weights else 0),
    ]


def _sizes(x: Tensor, weights: Tensor, maps: Sequence[int], stride: int) -> tuple[int, ...]:
    return *x.shape, stride, len(weights), *maps
