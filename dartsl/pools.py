"""Pools with their BatchNorm, weighed and summed for many edges, as one operation.

Shapes: B images, C channels, H x W pixels, k edges, M maps of which P are pools.

The identity and the pools have no parameters: all edges that leave a node share their maps, and an
edge's part is a weighted sum of them. `dartsl.native` passes over the node twice for all of it, and
keeps the pools alone.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.fused import (
    differentiable_gradients,
    found_once,
    has_hooks,
    precision,
    works,
)
from dartsl.native.pools import AVERAGE, IDENTITY, MAXIMUM

TRIAL = 32, 16, 32, 32  # images, channels, height, width


class AvgPool2d(nn.AvgPool2d):
    """An `nn.AvgPool2d` with the right gradient on a GPU as well.

    In channels_last and with padding PyTorch takes that of other windows there, and says nothing
    (its issue 188344 of June 2026).
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H', W']."""
        if not input.is_cuda:
            return super().forward(input)
        output = super().forward(input.contiguous())
        return output.contiguous(memory_format=torch.channels_last)


def weigh_maps(maps: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, ...]:
    """Weighted sums of maps that all edges share, as one matrix product.

    Args:
        maps: M times [B, C, H, W].
        weights: [k, M].

    Returns:
        k sums [B, C, H, W], in channels_last.
    """
    stacked = torch.stack([single.movedim(1, -1) for single in maps])
    sums = weights @ stacked.flatten(1)
    return sums.view(-1, *stacked.shape[1:]).movedim(-1, 2).unbind()


def kind_of(operation: nn.Module) -> int | None:
    """Which map the operation gives; None if it is none of those that are weighed, or has hooks."""
    if has_hooks(operation):
        return None
    # These types and no others made of them, which may compute something else.
    if type(operation) is nn.Identity:
        return IDENTITY
    if type(operation) is nn.MaxPool2d:
        plain = (operation.dilation, operation.return_indices) == (1, False)
        return MAXIMUM if plain and _is_3x3(operation) else None
    if isinstance(operation, nn.AvgPool2d) and type(operation) in (nn.AvgPool2d, AvgPool2d):
        plain = (operation.count_include_pad, operation.divisor_override) == (False, None)
        return AVERAGE if plain and _is_3x3(operation) else None
    return None


def _is_3x3(pool: nn.MaxPool2d | nn.AvgPool2d) -> bool:
    shape = pool.kernel_size, pool.padding, pool.ceil_mode
    return shape == (3, 1, False) and pool.stride in (1, 2)


def weighs_pools(x: Tensor) -> bool:
    """Whether `WeightedPools` computes where x is."""
    types = precision(x)
    return types is not None and (not x.is_cuda or _weighs_well(x.device, types.maps))


def evaluates_pools(x: Tensor) -> bool:
    """Whether, where `weighs_pools`, `evaluated_pools` does so, too: on a GPU."""
    return x.is_cuda and not torch.is_grad_enabled()


@found_once
def _weighs_well(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it has done so on this GPU, in the shapes of the paper's first cells."""
    kinds, edges, stride, eps = (IDENTITY, MAXIMUM, AVERAGE), 2, 1, 1e-5

    def by_kernels(running: Sequence[Tensor], x: Tensor, weights: Tensor) -> Tensor:
        if running:
            return evaluated_pools(x, weights, kinds, stride, eps, running)
        return cast(Tensor, WeightedPools.apply(x, weights, kinds, stride, eps)[0])

    def by_formula(running: Sequence[Tensor], x: Tensor, weights: Tensor) -> Tensor:
        def of_edge(edge: int) -> Tensor:
            statistics = [statistic.chunk(edges)[edge] for statistic in running]
            return _formula(x, weights[edge, None], _flags(kinds), stride, eps, statistics)

        return torch.cat([of_edge(edge) for edge in range(edges)], dim=1)

    shapes, running = [TRIAL, (edges, len(kinds))], [(edges * TRIAL[1],)] * 4
    return works("pools", by_kernels, by_formula, shapes, running, dtype, device)


class WeightedPools(torch.autograd.Function):
    """Sums of x and its pools, which BatchNorm normalizes, weighted for every edge."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, kinds: Sequence[int], stride: int, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The sums, and statistics of the pools' batch.

        Args:
            ctx: of the function.
            x: [B, C, H, W].
            weights: [k, M].
            kinds: of the maps, each once and in order; one at least is a pool.
            stride: of the pools, 1 or 2; 1 if the identity is one of the maps.
            eps: is added to the variances.

        Returns:
            [B, k C, ceil(H / stride), ceil(W / stride)] and [3, P C]: the pools' mean,
            1 / sqrt(var + eps) and variance without bias.
        """
        maps = _flags(kinds)
        output, y, statistics = torch.ops.dartsl.weighted_pools(x, weights, maps, stride, eps, [])
        ctx.save_for_backward(x, weights, y, statistics)
        ctx.options = maps, stride, eps
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return output, statistics

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the weights, as far as they are wanted."""
        gradient, _ = gradients
        wanted = ctx.needs_input_grad[:2]
        if gradient is None or not any(wanted):
            return (None,) * 5
        x, weights, y, statistics = ctx.saved_tensors
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled():
            found = differentiable_gradients(
                lambda *given: _formula(*given, *ctx.options), (x, weights), gradient, wanted
            )
        else:
            found = torch.ops.dartsl.weighted_pools_backward(
                gradient, x, weights, y, statistics, *ctx.options[:2], wanted
            )
        of_inputs = (single if want else None for single, want in zip(found, wanted, strict=True))
        return *of_inputs, None, None, None


def evaluated_pools(
    x: Tensor,
    weights: Tensor,
    kinds: Sequence[int],
    stride: int,
    eps: float,
    running: Sequence[Tensor],
) -> Tensor:
    """In evaluation: every edge has statistics of its own, and nothing has gradients.

    Args:
        x: [B, C, H, W].
        weights: [k, M].
        kinds: see `WeightedPools`.
        stride: see there.
        eps: see there.
        running: means of the pools, [k C] each, then their variances.

    Returns:
        [B, k C, ceil(H / stride), ceil(W / stride)].
    """
    found = torch.ops.dartsl.weighted_pools(x, weights, _flags(kinds), stride, eps, running)
    return cast(tuple[Tensor, ...], found)[0]


def _flags(kinds: Sequence[int]) -> list[int]:
    return [int(kind in kinds) for kind in (IDENTITY, MAXIMUM, AVERAGE)]


def _formula(
    x: Tensor,
    weights: Tensor,
    maps: Sequence[int],
    stride: int,
    eps: float,
    running: Sequence[Tensor] = (),
) -> Tensor:
    """The sums, by PyTorch's functions.

    Means and variances are those of the batch, or `running`, the same on all edges.
    """
    identity, maximum, average = maps
    found = [x] * identity
    pools = [F.max_pool2d(x, 3, stride, 1)] * maximum
    pools += [AvgPool2d(3, stride, 1, count_include_pad=False)(x)] * average
    for index, pool in enumerate(pools):
        mean, var = running[index :: len(pools)] or (None, None)
        found.append(F.batch_norm(pool, mean, var, training=not running, eps=eps))
    return torch.cat(weigh_maps(found, weights.to(x.dtype)), dim=1)
