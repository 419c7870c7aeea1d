"""The operations of all edges that leave one node, computed together.

Shapes: B images, k edges that leave the node, C channels, H x W pixels. A merged tensor has k C
channels, the C of the first edge before those of the second.

Every edge that leaves a node reads the same x [B, C, H, W] (`Source`) with weights of its own.
Convolution in groups and BatchNorm act on every channel or group of channels alone, so k copies of
a chain of them are one chain over k C channels (`MergedChain`). An operation without parameters
gives the same map on all edges, so it is computed once (`NormalizedPool`, the identity). Parameters
and buffers are those of the copies, one after the other along their first dimension.
"""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.batch_norm import batch_norm, follow, running_statistics
from dartsl.depthwise import DepthwiseConv2d
from dartsl.fused import has_hooks, precision
from dartsl.native.pools import IDENTITY
from dartsl.operations import (
    OPERATIONS,
    DilatedConv,
    FactorizedReduce,
    SeparableConv,
    Zero,
    even_and_odd_pixels,
)
from dartsl.pools import (
    AvgPool2d,
    WeightedPools,
    evaluated_pools,
    evaluates_pools,
    kind_of,
    weighs_pools,
)
from dartsl.separable import (
    MAX_CHAINS,
    Unit,
    can_fuse,
    can_sum,
    fused,
    fused_sum,
    sums_chains,
    units_of,
)

Pool = nn.MaxPool2d | nn.AvgPool2d
POOLS = (nn.MaxPool2d, nn.AvgPool2d, AvgPool2d)
CHAIN_LAYERS = (nn.ReLU, nn.Conv2d, DepthwiseConv2d, nn.BatchNorm2d)


def add(term: Tensor, addend: Tensor | None) -> Tensor:
    """The sum of both, or `term` where nothing is to be added."""
    return term if addend is None else term + addend


class Source:
    """A node that edges leave, as their operations read it; each form is computed once.

    Args:
        x: the node, [B, C, H, W].
        num_edges: k.
    """

    def __init__(self, x: Tensor, num_edges: int) -> None:
        self.x = x
        self.num_edges = num_edges
        self._rectified: Tensor | None = None
        self._copies: Tensor | None = None

    @property
    def rectified(self) -> Tensor:
        """ReLU(x), [B, C, H, W]."""
        if self._rectified is None:
            self._rectified = F.relu(self.x)
        return self._rectified

    @property
    def copies(self) -> Tensor:
        """ReLU(x) once for every edge, [B, k C, H, W]."""
        if self._copies is None:
            self._copies = torch.cat([self.rectified] * self.num_edges, dim=1)
        return self._copies


class MergedBatchNorm(nn.Module):
    """k BatchNorms without affine parameters, over k C channels.

    Attributes:
        num_batches_tracked: int64 [k]; `Supernet` counts for all of them at once, since hundreds of
            tiny additions would take longer.
        synchronized: whether the statistics are those of all processes' batches.
    """

    eps = 1e-5
    momentum = 0.1
    weight = bias = None  # no affine parameters
    synchronized = False

    def __init__(self, num_features: int, num_edges: int) -> None:
        super().__init__()
        self.register_buffer("num_batches_tracked", torch.zeros(num_edges, dtype=torch.long))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor

    def forward(
        self, x: Tensor, weight: Tensor | None = None, addend: Tensor | None = None
    ) -> Tensor:
        """`weight * normalized(x) + addend` of x [B, k C, H, W] and weight [k C].

        Without affine parameters the place of BatchNorm's weight is free: an edge's architecture
        weight costs nothing there.
        """
        normalized = batch_norm(
            x,
            self.running_mean,
            self.running_var,
            weight,
            None,
            self.training,
            self.momentum,
            self.eps,
            self.synchronized,
        )
        return add(normalized, addend)


class MergedChain(nn.Sequential):
    """k copies of a chain (see `is_chain`) as one chain over k C channels."""

    def __init__(self, copies: Sequence[nn.Sequential]) -> None:
        super().__init__(*(_merge_layers(layers) for layers in zip(*copies, strict=True)))

    def forward(  # type: ignore[override]
        self, source: Source, weights: Tensor, addend: Tensor | None = None
    ) -> Tensor:
        """Weighted outputs [B, k C, H', W']; weights [k C]."""
        units = units_of(self)
        if can_fuse(units, source.x, weights, addend):
            return fused(units, source.x, weights, addend)
        _, *layers, norm = self  # the ReLU that the chain begins with is done
        x = source.copies
        for layer in layers:
            x = grouped_product(layer, x) if is_grouped_product(layer, x) else layer(x)
        return norm(x, weights, addend)


class MergedConv(nn.Module):
    """k copies of a separable or dilated convolution over k C channels."""

    def __init__(self, copies: Sequence[SeparableConv | DilatedConv]) -> None:
        super().__init__()
        self.op = MergedChain([single.op for single in copies])

    def forward(self, source: Source, weights: Tensor, addend: Tensor | None = None) -> Tensor:
        """Weighted outputs [B, k C, H', W']; weights [k C]."""
        return self.op(source, weights, addend)


def summed_chains(
    terms: Sequence[tuple[nn.Module, Tensor]], x: Tensor, total: Tensor | None
) -> tuple[Tensor | None, list[tuple[nn.Module, Tensor]]]:
    """Add to the total what can be summed at once where x is; returns that, and what remains.

    Args:
        terms: operations and their weights [k C].
        x: the node, [B, C, H, W].
        total: [B, k C, H', W'].
    """
    if not sums_chains(x):
        return total, list(terms)
    waiting, rest = [], []
    for operation, row in terms:
        units = units_in(operation)
        if can_sum([units], x, [row], total):
            waiting.append((units, row))
        else:
            rest.append((operation, row))
    while waiting:
        some, waiting = waiting[:MAX_CHAINS], waiting[MAX_CHAINS:]
        chains, rows = zip(*some, strict=True)
        if can_sum(chains, x, rows, total):
            total = fused_sum(chains, x, rows, total)
        else:  # of different sizes
            for units, row in some:
                total = fused_sum([units], x, [row], total)
    return total, rest


def is_grouped_product(layer: nn.Module, x: Tensor) -> bool:
    """Whether it is a pointwise convolution in groups, of which cuDNN computes one at a time."""
    return (
        x.is_cuda
        and type(layer) is nn.Conv2d
        and layer.groups > 1
        and layer.weight.shape[1] > 1
        and layer.kernel_size == layer.stride == (1, 1)
        and layer.padding == (0, 0)
        and layer.bias is None
        and not has_hooks(layer)
    )


def grouped_product(layer: nn.Module, x: Tensor) -> Tensor:
    """The convolution of x [B, k I, H, W] as a product of matrices for all groups at once."""
    conv = cast(nn.Conv2d, layer)
    weight = conv.weight.view(conv.groups, -1, conv.weight.shape[1])
    pixels = x.movedim(1, -1).unflatten(-1, (conv.groups, -1))
    return torch.einsum("bhwgi,goi->bhwgo", pixels, weight).flatten(-2).movedim(-1, 1)


def units_in(operation: nn.Module) -> list[Unit]:
    """The units that a merged operation is a chain of; none if it is anything else."""
    chain = operation.op if isinstance(operation, MergedConv) else operation
    if not isinstance(chain, MergedChain) or has_hooks(operation) or has_hooks(chain):
        return []
    return units_of(chain)


class MergedReduce(nn.Module):
    """k copies of `FactorizedReduce` over k C channels."""

    def __init__(self, copies: Sequence[FactorizedReduce]) -> None:
        super().__init__()
        self.num_edges = len(copies)
        self.conv_1 = _merge_outputs([single.conv_1 for single in copies])
        self.conv_2 = _merge_outputs([single.conv_2 for single in copies])
        self.bn = _merge_batch_norms([single.bn for single in copies])

    def forward(self, source: Source, weights: Tensor, addend: Tensor | None = None) -> Tensor:
        """Weighted outputs [B, k C, H', W']; weights [k C]."""
        even, odd = even_and_odd_pixels(source.rectified)
        # Each edge's channels are together: the first edge's two halves come first.
        halves = [
            half.movedim(1, -1).unflatten(-1, (self.num_edges, -1))
            for half in (self.conv_1(even), self.conv_2(odd))
        ]
        return self.bn(torch.cat(halves, dim=-1).flatten(-2).movedim(-1, 1), weights, addend)


class NormalizedPool(nn.Sequential):
    """A pool and its BatchNorm, whose running statistics are those of k edges, [k C]."""

    def __init__(self, pool: Pool, channels: int, num_edges: int) -> None:
        super().__init__(pool, MergedBatchNorm(channels * num_edges, num_edges))

    def forward(  # type: ignore[override]
        self, source: Source, weights: Tensor, addend: Tensor | None = None
    ) -> Tensor:
        """In evaluation, by each edge's running statistics: [B, k C, H', W']; weights [k C]."""
        pool, norm = self
        return norm(pool(source.x).repeat(1, source.num_edges, 1, 1), weights, addend)


def normalized_pools(pools: Sequence[NormalizedPool], x: Tensor) -> list[Tensor]:
    """In training, each pool's map of x [B, C, H, W] that is the same on all edges: [B, C, H', W'].

    So are its batch statistics, which each edge's running ones follow. The pools are normalized in
    one go, as BatchNorm acts on every channel alone.
    """
    if not pools:
        return []
    norms = _norms(pools)
    maps = torch.cat([pool(x) for pool, _ in pools], dim=1)
    mean, var = maps.new_zeros(2, maps.shape[1], dtype=norms[0].running_mean.dtype).unbind()
    normalized = batch_norm(
        maps, mean, var, momentum=1.0, eps=norms[0].eps, synchronized=norms[0].synchronized
    )
    _follow(norms, mean, var)
    return list(normalized.chunk(len(pools), dim=1))


def can_share(operations: Sequence[nn.Module], x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether `shared_sum` takes these in this place; it gives no gradients in evaluation."""
    pools = [operation for operation in operations if isinstance(operation, NormalizedPool)]
    kinds = [_kind_of(operation) for operation in operations]
    types = precision(x)
    return (
        bool(pools)
        and types is not None
        and weighs_pools(x)
        and None not in kinds
        and len(set(kinds)) == len(kinds)
        and len({_stride(operation) for operation in operations}) == 1
        and all(weight.dtype == types.weights for weight in weights)
        and all(_fits(norm, types.weights) for norm in _norms(pools))
        and len({norm.training for norm in _norms(pools)}) == 1
        and (pools[0][1].training or evaluates_pools(x))
        # A channel's only pixel cannot be normalized.
        and x.numel() // x.shape[1] > cast(int, pools[0][0].stride) ** 2
    )


def shared_sum(operations: Sequence[nn.Module], x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The weighted sum of the identity and pools with their BatchNorm, as one operation.

    Args:
        operations: M, see `can_share`.
        x: [B, C, H, W].
        weights: of the operations, M times [k].

    Returns:
        [B, k C, H', W'].
    """
    kinds = [cast(int, _kind_of(operation)) for operation in operations]
    order = sorted(range(len(kinds)), key=kinds.__getitem__)
    pools = [cast(NormalizedPool, operations[i]) for i in order if kinds[i] != IDENTITY]
    norms = _norms(pools)
    types = precision(x)
    assert types is not None
    given = (
        x.to(types.maps),
        torch.stack([weights[i] for i in order], dim=1),
        sorted(kinds),
        cast(int, pools[0][0].stride),
        norms[0].eps,
    )
    if not norms[0].training:
        return evaluated_pools(*given, running_statistics(norms))
    output, statistics = WeightedPools.apply(*given)
    mean, _, var = statistics.unbind()
    _follow(norms, mean, var)
    return output


def _kind_of(operation: nn.Module) -> int | None:
    if not isinstance(operation, NormalizedPool):
        return kind_of(operation)
    pool, norm = operation
    return None if has_hooks(operation) or has_hooks(norm) else kind_of(pool)


def _stride(operation: nn.Module) -> int:
    """Of a pool or the identity."""
    return cast(int, operation[0].stride) if isinstance(operation, NormalizedPool) else 1


def _norms(pools: Sequence[NormalizedPool]) -> list[MergedBatchNorm]:
    return [cast(MergedBatchNorm, norm) for _, norm in pools]


def _fits(norm: MergedBatchNorm, dtype: torch.dtype) -> bool:
    return not norm.synchronized and norm.running_var.dtype == dtype


def _follow(norms: Sequence[MergedBatchNorm], mean: Tensor, var: Tensor) -> None:
    """Every edge's running statistics follow the batch's, [P C] of P norms."""
    channels = len(mean) // len(norms)
    by_edge = [statistic.view(-1, channels) for statistic in running_statistics(norms)]
    with torch.no_grad():
        batch = [*mean.split(channels), *var.split(channels)]
        ends = [statistic.expand_as(by_edge[0]) for statistic in batch]
        follow(by_edge, ends, norms[0].momentum)


class PerEdge(nn.ModuleList):
    """k copies of an operation for which there is no merged form, one after the other."""

    def forward(self, source: Source, weights: Tensor, addend: Tensor | None = None) -> Tensor:
        """Weighted outputs [B, k C, H', W']; weights [k C]."""
        outputs = torch.cat([operation(source.x) for operation in self], dim=1)
        return add(outputs * weights[:, None, None], addend)


def merged_operation(primitive: str, channels: int, stride: int, num_edges: int) -> nn.Module:
    """The merged form of `num_edges` operations without affine parameters.

    Of the types below and no others made of them, which may compute something else.
    """
    copies: list[Any] = [OPERATIONS[primitive](channels, stride, False) for _ in range(num_edges)]
    first = copies[0]
    if type(first) in (Zero, nn.Identity):
        return first
    if type(first) in POOLS:
        return NormalizedPool(first, channels, num_edges)
    if type(first) is FactorizedReduce:
        return MergedReduce(copies)
    if type(first) in (SeparableConv, DilatedConv) and all(map(_is_merged, first.op)):
        return MergedConv(copies)
    return MergedChain(copies) if is_chain(first) else PerEdge(copies)


def is_chain(operation: nn.Module) -> bool:
    """Whether it is ReLU, then convolutions, BatchNorms and ReLUs, then a BatchNorm."""
    return (
        type(operation) is nn.Sequential
        and all(type(layer) in CHAIN_LAYERS and _is_merged(layer) for layer in operation)
        and len(operation) > 0  # an empty one changes nothing
        and isinstance(operation[0], nn.ReLU)
        and isinstance(operation[-1], nn.BatchNorm2d)
    )


def _is_merged(layer: nn.Module) -> bool:
    """Whether `_merge_layers` has all that a layer computes."""
    if isinstance(layer, nn.BatchNorm2d):
        settings = layer.eps, layer.momentum, layer.affine, layer.track_running_stats
        return settings == (MergedBatchNorm.eps, MergedBatchNorm.momentum, False, True)
    # Hooks are those of weight_norm and its like, too.
    return getattr(layer, "bias", None) is None and not has_hooks(layer)


def _merge_layers(layers: Sequence[nn.Module]) -> nn.Module:
    first = layers[0]
    if isinstance(first, nn.Conv2d):
        return _merge_convolutions(cast(Sequence[nn.Conv2d], layers))
    if isinstance(first, nn.BatchNorm2d):
        return _merge_batch_norms(cast(Sequence[nn.BatchNorm2d], layers))
    return first


def _merge_batch_norms(copies: Sequence[nn.BatchNorm2d]) -> MergedBatchNorm:
    return MergedBatchNorm(sum(single.num_features for single in copies), len(copies))


def _merge_convolutions(copies: Sequence[nn.Conv2d]) -> nn.Conv2d:
    """One convolution in k times as many groups: each edge's channels see their own alone."""
    merged = _merge_outputs(copies)
    merged.in_channels *= len(copies)
    merged.groups *= len(copies)
    return merged


def _merge_outputs(copies: Sequence[nn.Conv2d]) -> nn.Conv2d:
    """One convolution with k times as many outputs, of what all copies read."""
    merged = copy.deepcopy(copies[0])
    merged.out_channels *= len(copies)
    weight = torch.cat([single.weight.detach() for single in copies])
    merged.weight = nn.Parameter(weight, requires_grad=copies[0].weight.requires_grad)
    return merged
