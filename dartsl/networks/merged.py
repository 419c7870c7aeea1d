"""The operations of all edges that leave one node, computed together.

Shapes: B images, k edges that leave the node, C channels, H x W pixels. A merged tensor has k C
channels, the C of the first edge before those of the second.

Every edge that leaves a node reads the same x [B, C, H, W] with weights of its own. Convolution in
groups and BatchNorm act on every channel or group of channels alone, so k copies of a chain of
them are one chain over k C channels (`MergedChain`). An operation without parameters gives the same
map on all edges, so it is computed once (`NormalizedPool`, the identity). Parameters and buffers
are those of the copies, one after the other along their first dimension.
"""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.batch_norm import batch_norm
from dartsl.depthwise import DepthwiseConv2d
from dartsl.native import copies as native
from dartsl.operations import (
    OPERATIONS,
    DilatedConv,
    FactorizedReduce,
    SeparableConv,
    Zero,
    shifted,
)
from dartsl.pointwise import can_normalize, is_pointwise, normalized_pointwise

Pool = nn.MaxPool2d | nn.AvgPool2d
CHAIN_LAYERS = (nn.ReLU, nn.Conv2d, DepthwiseConv2d, nn.BatchNorm2d)


def add(term: Tensor, addend: Tensor | None) -> Tensor:
    """The sum of both, or `term` where nothing is to be added."""
    return term if addend is None else term + addend


def rectified_copies(x: Tensor, num_edges: int, readers: int) -> Sequence[Tensor]:
    """ReLU of x [B, C, H, W], once for each edge, [B, k C, H, W]; the same for every reader."""
    if native.can_copy(x) and not torch.is_autocast_enabled("cpu"):
        return RectifiedCopies.apply(x, num_edges, readers)
    return [F.relu(torch.cat([x] * num_edges, dim=1))] * readers


class RectifiedCopies(torch.autograd.Function):
    """`rectified_copies` in C. It knows its readers, so as to sum their gradients in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: int, readers: int) -> tuple[Tensor, ...]:
        """[B, C, H, W] -> `readers` times the same [B, copies * C, H, W]."""
        output = native.rectified_copies(x, copies)
        ctx.copies = copies
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return tuple(output.view_as(output) for _ in range(readers))

    @staticmethod
    def backward(ctx: Any, *of_readers: Tensor | None) -> tuple[Tensor | None, None, None]:
        """The sum of the gradients of all copies and readers, where x is positive."""
        (x,) = ctx.saved_tensors
        gradients = [gradient for gradient in of_readers if gradient is not None]
        if not gradients:
            return None, None, None
        if not torch.is_grad_enabled():
            found = native.rectified_copies_backward(gradients, x, ctx.copies)
            return found, None, None
        parts = [part for gradient in gradients for part in gradient.chunk(ctx.copies, dim=1)]
        return torch.stack(parts).sum(dim=0).masked_fill(x <= 0, 0), None, None


class MergedBatchNorm(nn.Module):
    """k BatchNorms without affine parameters, over k C channels.

    Attributes:
        num_batches_tracked: int64 [k]; `Supernet` counts for all of them at once, since hundreds of
            tiny additions would take longer.
        synchronized: whether the statistics are those of all processes' batches.
    """

    eps = 1e-5
    momentum = 0.1
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

    def after(
        self,
        pointwise: nn.Conv2d,
        x: Tensor,
        weight: Tensor | None = None,
        addend: Tensor | None = None,
        rectify: bool = False,
    ) -> Tensor:
        """`self(pointwise(x), weight, addend)`, with a ReLU before the sum if `rectify`."""
        if (
            not self.training
            or self.synchronized
            or not can_normalize(x, pointwise.weight, weight, addend)
        ):
            normalized = self(pointwise(x), weight)
            return add(F.relu(normalized) if rectify else normalized, addend)
        return normalized_pointwise(
            x,
            pointwise.weight,
            self.running_mean,
            self.running_var,
            weight,
            addend,
            self.momentum,
            self.eps,
            rectify,
        )


class MergedChain(nn.Sequential):
    """k copies of a chain (see `is_chain`) as one chain over k C channels."""

    def __init__(self, copies: Sequence[nn.Sequential]) -> None:
        super().__init__(*(_merge_layers(layers) for layers in zip(*copies, strict=True)))

    def forward(  # type: ignore[override]
        self, input: Tensor, weights: Tensor, addend: Tensor | None = None
    ) -> Tensor:
        """From k times ReLU(x), [B, k C, H, W], and weights [k C] -> [B, k C, H', W']."""
        _, *layers = self  # the ReLU that the chain begins with is done
        while layers:
            layer, *layers = layers
            norm = layers[0] if layers else None
            if is_pointwise(layer) and isinstance(norm, MergedBatchNorm):
                rectify = len(layers) > 1 and isinstance(layers[1], nn.ReLU)
                layers = layers[1 + rectify :]
                scale, more = (None, None) if layers else (weights, addend)
                input = norm.after(layer, input, scale, more, rectify)
            else:
                input = layer(input) if layers else layer(input, weights, addend)
        return input


class MergedConv(nn.Module):
    """k copies of a separable or dilated convolution over k C channels."""

    def __init__(self, copies: Sequence[SeparableConv | DilatedConv]) -> None:
        super().__init__()
        self.op = MergedChain([single.op for single in copies])

    def forward(self, x: Tensor, weights: Tensor, addend: Tensor | None = None) -> Tensor:
        """From k times ReLU(x), [B, k C, H, W], and weights [k C] -> [B, k C, H', W']."""
        return self.op(x, weights, addend)


class MergedReduce(nn.Module):
    """k copies of `FactorizedReduce` over k C channels."""

    def __init__(self, copies: Sequence[FactorizedReduce]) -> None:
        super().__init__()
        self.num_edges = len(copies)
        self.conv_1 = _merge_convolutions([single.conv_1 for single in copies])
        self.conv_2 = _merge_convolutions([single.conv_2 for single in copies])
        self.bn = _merge_batch_norms([single.bn for single in copies])

    def forward(self, x: Tensor, weights: Tensor, addend: Tensor | None = None) -> Tensor:
        """[B, k C, H, W], k times ReLU(x), and weights [k C] -> [B, k C, H', W']."""
        branches = [self.conv_1(x), self.conv_2(shifted(x))]
        # Each edge's channels are together: the first edge's two halves come first.
        halves = zip(*(branch.chunk(self.num_edges, dim=1) for branch in branches), strict=True)
        return self.bn(
            torch.cat([half for pair in halves for half in pair], dim=1), weights, addend
        )


class ReadsSource:
    """Marks a merged operation that reads x itself and not k times ReLU(x)."""


class NormalizedPool(ReadsSource, nn.Sequential):
    """A pool and its BatchNorm, whose running statistics are those of k edges, [k C]."""

    def __init__(self, pool: Pool, channels: int, num_edges: int) -> None:
        super().__init__(pool, MergedBatchNorm(channels * num_edges, num_edges))

    def forward(  # type: ignore[override]
        self, x: Tensor, weights: Tensor, addend: Tensor | None = None
    ) -> Tensor:
        """In evaluation, by each edge's running statistics: [B, k C, H', W']; weights [k C]."""
        pool, norm = self
        return norm(pool(x).repeat(1, len(weights) // x.shape[1], 1, 1), weights, addend)


def normalized_pools(pools: Sequence[NormalizedPool], x: Tensor) -> list[Tensor]:
    """In training, each pool's map of x [B, C, H, W] that is the same on all edges: [B, C, H', W'].

    So are its batch statistics, which each edge's running ones follow. The pools are normalized in
    one go, as BatchNorm acts on every channel alone.
    """
    if not pools:
        return []
    norms = [cast(MergedBatchNorm, norm) for _, norm in pools]
    maps = torch.cat([pool(x) for pool, _ in pools], dim=1)
    mean, var = maps.new_zeros(2, maps.shape[1], dtype=norms[0].running_mean.dtype).unbind()
    normalized = batch_norm(
        maps, mean, var, momentum=1.0, eps=norms[0].eps, synchronized=norms[0].synchronized
    )
    running = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
    by_edge = [statistic.view(-1, x.shape[1]) for statistic in running]
    batch = [*mean.split(x.shape[1]), *var.split(x.shape[1])]
    with torch.no_grad():
        ends = [statistic.expand_as(by_edge[0]) for statistic in batch]
        torch._foreach_lerp_(by_edge, ends, norms[0].momentum)
    return list(normalized.chunk(len(pools), dim=1))


class PerEdge(ReadsSource, nn.ModuleList):
    """k copies of an operation for which there is no merged form, one after the other."""

    def forward(self, x: Tensor, weights: Tensor, addend: Tensor | None = None) -> Tensor:
        """Weighted outputs [B, k C, H', W'] of x [B, C, H, W]; weights [k C]."""
        outputs = torch.cat([operation(x) for operation in self], dim=1)
        return add(outputs * weights[:, None, None], addend)


def merged_operation(primitive: str, channels: int, stride: int, num_edges: int) -> nn.Module:
    """The merged form of `num_edges` operations without affine parameters."""
    copies: list[Any] = [OPERATIONS[primitive](channels, stride, False) for _ in range(num_edges)]
    first = copies[0]
    if isinstance(first, Zero | nn.Identity):
        return first
    if isinstance(first, Pool):
        return NormalizedPool(first, channels, num_edges)
    if isinstance(first, FactorizedReduce):
        return MergedReduce(copies)
    if isinstance(first, SeparableConv | DilatedConv):
        return MergedConv(copies)
    return MergedChain(copies) if is_chain(first) else PerEdge(copies)


def is_chain(operation: nn.Module) -> bool:
    """Whether it is ReLU, then convolutions, BatchNorms and ReLUs, then a BatchNorm."""
    return (
        type(operation) is nn.Sequential
        and all(type(layer) in CHAIN_LAYERS for layer in operation)
        and isinstance(operation[0], nn.ReLU)
        and isinstance(operation[-1], nn.BatchNorm2d)
    )


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
    merged = copy.deepcopy(copies[0])
    merged.in_channels *= len(copies)
    merged.out_channels *= len(copies)
    merged.groups *= len(copies)
    merged.weight = nn.Parameter(torch.cat([single.weight.detach() for single in copies]))
    return merged
