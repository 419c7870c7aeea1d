"""The supernet: every edge computes all its primitives at once, weighted by alpha.

Shapes: B images, C channels, H x W pixels, E edges of a cell (14), P primitives (8).
"""

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.batch_norm import following_together
from dartsl.errors import UserError
from dartsl.genotype import Genotype
from dartsl.networks.layout import check_sizes, preprocess_previous_previous, reduction_cells
from dartsl.networks.merged import (
    MergedBatchNorm,
    NormalizedPool,
    Source,
    can_share,
    merged_operation,
    normalized_pools,
    shared_sum,
    summed_chains,
)
from dartsl.networks.regions import recomputed
from dartsl.networks.relaxation import Softmax
from dartsl.operations import ReLUConvBN, Zero
from dartsl.pools import weigh_maps
from dartsl.search_space import CELL_KINDS, SearchSpace, discretize

MixedOperationFactory = Callable[[int, int, Sequence[str], int], nn.Module]

ALPHA_INIT_STD = 1e-3  # official code: 1e-3 * randn


class MixedOperation(nn.Module):
    """The mixed operations on all edges that leave one node (Eq. 2 of arXiv:1806.09055).

    On every edge, o(x) = sum over the primitives of weight * operation(x). The edges share x and
    are computed together, see `dartsl.networks.merged`; the sum over the primitives is taken
    before the edges part. As in the official code, pooling is followed by a BatchNorm, and no
    BatchNorm has affine parameters, which would rescale what alpha weighs.

    Args:
        channels: C.
        stride: 1 or 2.
        primitives: of the search space.
        num_edges: k, the edges that leave the node.
    """

    def __init__(
        self, channels: int, stride: int, primitives: Sequence[str], num_edges: int
    ) -> None:
        super().__init__()
        self.num_edges = num_edges
        self.operations = nn.ModuleList(
            merged_operation(primitive, channels, stride, num_edges) for primitive in primitives
        )

    def forward(self, x: Tensor, weights: Tensor) -> Sequence[Tensor]:
        """The mixed operation of every edge.

        Args:
            x: the node, [B, C, H, W].
            weights: of the edges, [k, P].

        Returns:
            k outputs [B, C, ceil(H / stride), ceil(W / stride)].
        """
        weights_of = dict(zip(self.operations, weights.unbind(1), strict=True))
        skips: list[Any] = [op for op in weights_of if isinstance(op, nn.Identity)]
        pools = [op for op in weights_of if isinstance(op, NormalizedPool)]
        shares = can_share(skips + pools, x, [weights_of[op] for op in skips + pools])
        if not (shares or all(norm.training for _, norm in pools)):
            pools = []  # in evaluation, whose running statistics are each edge's own
        shared = skips + pools
        columns = [weights_of[op] for op in shared]
        # 'none' adds exactly 0, its weight has gradient 0: it acts through Eq. 2 alone.
        others = [op for op in weights_of if not isinstance(op, Zero) and op not in shared]
        # Of every edge: from the maps that all edges share, and from operations of its own.
        terms: list[Sequence[Tensor]] = []
        merged: Tensor | None = None
        if shares:
            merged = shared_sum(shared, x, columns)
        elif shared:
            maps = [x] * len(skips) + normalized_pools(pools, x)
            terms.append(weigh_maps(maps, torch.stack(columns, dim=1)))
        if others:
            merged = self._merged_sum(x, others, [weights_of[op] for op in others], merged)
        if merged is not None:
            # Parts of what lies beside each other: their gradients come back in channels_last, as
            # the next operation wants them, even from a compiler.
            parts = merged.movedim(1, -1).chunk(self.num_edges, dim=-1)
            terms.append([part.movedim(-1, 1) for part in parts])
        return [_sum(of_edge) for of_edge in zip(*terms, strict=True)]

    def _merged_sum(
        self,
        x: Tensor,
        operations: Sequence[nn.Module],
        columns: Sequence[Tensor],
        total: Tensor | None,
    ) -> Tensor:
        """Sum [B, k C, H', W'] of total and of operations on x [B, C, H, W], with weights [k]."""
        source = Source(x, self.num_edges)
        # Each edge's weight once for every channel. Not an expanded view: the gradients of a
        # BatchNorm are NaN where its weight has stride 0.
        rows = torch.stack(list(columns)).repeat_interleave(x.shape[1], dim=1).unbind()
        terms = list(zip(operations, rows, strict=True))
        total, terms = summed_chains(terms, x, total)
        for operation, row in terms:
            total = operation(source, row, total)
        return cast(Tensor, total)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    first, *rest = terms
    if not rest:
        return first
    total = first + rest[0]
    for term in rest[1:]:
        total += term  # in place: nobody else has seen the partial sum
    return total


class SearchCell(nn.Module):
    """A cell whose every node sums mixed operations of all nodes before it (Eq. 1)."""

    def __init__(
        self,
        space: SearchSpace,
        channels_prev_prev: int,
        channels_prev: int,
        channels: int,
        reduction: bool,
        reduction_prev: bool,
        mixed_operation: MixedOperationFactory = MixedOperation,
    ) -> None:
        super().__init__()
        self.kind = "reduce" if reduction else "normal"
        self.preprocess0 = preprocess_previous_previous(
            channels_prev_prev, channels, reduction_prev, affine=False, rectified=True
        )
        self.preprocess1 = ReLUConvBN(channels_prev, channels, affine=False, rectified=True)
        self.num_nodes = space.num_intermediate_nodes
        # For every node that edges leave, their rows of alpha.
        self.rows = [
            [row for row, (_, source) in enumerate(space.edges) if source == node]
            for node in range(self.num_nodes + 1)
        ]
        order = torch.tensor([row for rows in self.rows for row in rows])
        self.register_buffer("row_order", order, persistent=False)
        self.row_order: Tensor
        self.sources = nn.ModuleList(
            mixed_operation(
                channels, 2 if reduction and source < 2 else 1, space.primitives, len(rows)
            )
            for source, rows in enumerate(self.rows)
        )

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        """The concatenation of the intermediate nodes.

        Args:
            s0: ReLU of the output of the cell before the last, [B, channels_prev_prev, H, W].
            s1: ReLU of the output of the last cell, [B, channels_prev, H, W].
            weights: of this kind of cell, [E, P].

        Returns:
            [B, num_intermediate_nodes * channels, H, W], halved in a reduction cell.
        """
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        arriving: list[list[Tensor]] = [[] for _ in range(self.num_nodes)]
        by_source = weights.index_select(0, self.row_order).split([len(rows) for rows in self.rows])
        for source, (mixed_operation, rows) in enumerate(zip(self.sources, by_source, strict=True)):
            if source >= 2:  # all edges into this node have come from the sources before it
                states.append(_sum(arriving[source - 2]))
            targets = arriving[-len(rows) :]
            for terms, output in zip(targets, mixed_operation(states[source], rows), strict=True):
                terms.append(output)
        states.append(_sum(arriving[-1]))
        return torch.cat(states[2:], dim=1)


class Supernet(nn.Module):
    """The network of the search (section 3.1.1), with its architecture parameters alpha.

    Args:
        space: primitives and nodes.
        channels: of the first cell's nodes; the paper's search has 16.
        num_cells: 8 in the paper; reduction cells at a third and two thirds.
        num_classes: size of the logits.
        in_channels: of the images.
        stem_multiplier: the stem has `stem_multiplier * channels` channels.
        relaxation: alpha -> edge weights; each kind of cell gets a copy of its own, which a method
            `reset_parameters` of it draws anew.
        mixed_operation: factory(channels, stride, primitives, num_edges) of what the edges that
            leave a node compute.
        recompute: whether the backward pass computes cells again, to save memory.

    Raises:
        UserError: for a size below 1, and a relaxation that is no module.
    """

    def __init__(
        self,
        space: SearchSpace,
        channels: int = 16,
        num_cells: int = 8,
        num_classes: int = 10,
        in_channels: int = 3,
        stem_multiplier: int = 3,
        relaxation: nn.Module | None = None,
        *,
        mixed_operation: MixedOperationFactory = MixedOperation,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(
            channels=channels,
            num_cells=num_cells,
            num_classes=num_classes,
            in_channels=in_channels,
            stem_multiplier=stem_multiplier,
        )
        self.space = space
        self.recompute = recompute
        shape = (len(space.edges), len(space.primitives))
        self.alphas = nn.ParameterDict(
            {kind: nn.Parameter(ALPHA_INIT_STD * torch.randn(shape)) for kind in CELL_KINDS}
        )
        self.relaxations = nn.ModuleDict(
            {
                kind: _fresh_copy(Softmax() if relaxation is None else relaxation)
                for kind in CELL_KINDS
            }
        )
        width = stem_multiplier * channels
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )
        self.cells = nn.ModuleList()
        channels_prev_prev = channels_prev = width
        reductions = reduction_cells(num_cells)
        for index in range(num_cells):
            channels *= 2 if index in reductions else 1
            self.cells.append(
                SearchCell(
                    space,
                    channels_prev_prev,
                    channels_prev,
                    channels,
                    reduction=index in reductions,
                    reduction_prev=index - 1 in reductions,
                    mixed_operation=mixed_operation,
                )
            )
            channels_prev_prev = channels_prev
            channels_prev = space.num_intermediate_nodes * channels
        self.classifier = nn.Linear(channels_prev, num_classes)
        self.merged_norms = [m for m in self.cells.modules() if isinstance(m, MergedBatchNorm)]
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, in_channels, H, W]."""
        counters = [norm.num_batches_tracked for norm in self.merged_norms if norm.training]
        if counters:
            torch._foreach_add_(counters, 1)
        weights = self.edge_weights()
        output = self.stem(x.contiguous(memory_format=torch.channels_last))
        # Two cells read every output, both through a ReLU: it is taken once.
        s0 = s1 = F.relu(output)
        with following_together():
            for cell in self.cells:
                inputs = s0, s1, weights[cast(SearchCell, cell).kind]
                output = recomputed(cell, *inputs) if self.recompute else cell(*inputs)
                s0, s1 = s1, F.relu(output)
        return self.classifier(F.adaptive_avg_pool2d(output, 1).flatten(1))

    def regions(self) -> list[nn.Module]:
        """What `compile_regions` compiles: the mixed operations."""
        return [mixed for cell in self.cells for mixed in cast(SearchCell, cell).sources]

    def variant(self) -> Hashable:
        """What a pass depends on beside tensors: numbers that relaxations keep, as they anneal."""
        return tuple(
            (name, value)
            for module in self.relaxations.modules()
            for name, value in vars(module).items()
            if isinstance(value, int | float)
        )

    def arch_parameters(self) -> list[nn.Parameter]:
        """Raw alpha [E, P] of the normal and the reduction cell, then the relaxation's own."""
        return [*self.alphas.values(), *self.relaxations.parameters()]

    def weight_parameters(self) -> list[nn.Parameter]:
        """Every parameter that is not an architecture parameter."""
        arch = {id(parameter) for parameter in self.arch_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in arch]

    def edge_weights(self) -> dict[str, Tensor]:
        """Edge weights [E, P] of both kinds of cell, as a pass computes with them; differentiable.

        Raises:
            UserError: where a relaxation gives something else.
        """
        weights = {kind: self.relaxations[kind](alpha) for kind, alpha in self.alphas.items()}
        for kind, alpha in self.alphas.items():
            _check_weights(weights[kind], alpha)
        return weights

    @torch.no_grad()
    def strengths(self) -> dict[str, Tensor]:
        """Edge weights [E, P] of both kinds of cell, the relaxation in evaluation mode."""
        training = self.relaxations.training
        self.relaxations.eval()
        try:
            return self.edge_weights()
        finally:
            self.relaxations.train(training)

    def genotype(self) -> Genotype:
        """The genotype of the strongest operations at the present alpha."""
        return discretize(self.strengths(), self.space)


def _check_weights(weights: Any, alpha: Tensor) -> None:
    """Raise a UserError where a relaxation's answer is not as many real numbers as alpha."""
    if not isinstance(weights, Tensor):
        found = f"a {type(weights).__name__}"
    elif weights.shape != alpha.shape or not weights.is_floating_point():
        found = f"{list(weights.shape)} of {weights.dtype}"
    else:
        return
    raise UserError(
        f"The relaxation gives {found}, not edge weights {list(alpha.shape)} of {alpha.dtype}."
    )


def _fresh_copy(relaxation: nn.Module) -> nn.Module:
    """A copy whose parameters are drawn anew, so that the two kinds of cell start apart.

    Only by a method of its own: layers within it would undo what it has made of them.
    """
    if not isinstance(relaxation, nn.Module):
        raise UserError(
            f"The relaxation is {relaxation!r}; it is an nn.Module, alpha -> edge weights."
        )
    fresh = copy.deepcopy(relaxation)
    reset: Callable[[], None] | None = getattr(fresh, "reset_parameters", None)
    if reset is not None:
        reset()
    return fresh
