"""The supernet: every edge computes all its primitives at once, weighted by alpha.

Shapes: B images, C channels, H x W pixels, E edges of a cell (14), P primitives (8).
"""

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.genotype import Genotype
from dartsl.networks.layout import check_sizes, preprocess_previous_previous, reduction_cells
from dartsl.networks.relaxation import Softmax
from dartsl.operations import OPERATIONS, ReLUConvBN, Zero
from dartsl.search_space import CELL_KINDS, SearchSpace, discretize

ALPHA_INIT_STD = 1e-3  # official code: 1e-3 * randn


class MixedOperation(nn.Module):
    """The weighted sum of all operations on one edge (Eq. 2 of arXiv:1806.09055).

    As in the official code, pooling is followed by a BatchNorm, and no BatchNorm has affine
    parameters, which would rescale what alpha weighs.
    """

    def __init__(self, channels: int, stride: int, primitives: Sequence[str]) -> None:
        super().__init__()
        self.operations = nn.ModuleList(
            _search_operation(primitive, channels, stride) for primitive in primitives
        )

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Sum of weight * operation(x) over the primitives.

        Args:
            x: [B, C, H, W].
            weights: of this edge, [P].

        Returns:
            [B, C, ceil(H / stride), ceil(W / stride)].
        """
        return _sum(
            weight * operation(x)
            for weight, operation in zip(weights.unbind(), self.operations, strict=True)
            # 'none' adds exactly 0 and its weight has gradient 0: it acts through Eq. 2 alone.
            if not isinstance(operation, Zero)
        )


def _search_operation(primitive: str, channels: int, stride: int) -> nn.Module:
    operation = OPERATIONS[primitive](channels, stride, False)
    if isinstance(operation, nn.MaxPool2d | nn.AvgPool2d):
        return nn.Sequential(operation, nn.BatchNorm2d(channels, affine=False))
    return operation


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


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
        mixed_operation: Callable[[int, int, Sequence[str]], nn.Module] = MixedOperation,
    ) -> None:
        super().__init__()
        self.kind = "reduce" if reduction else "normal"
        self.topology = space.edges
        self.preprocess0 = preprocess_previous_previous(
            channels_prev_prev, channels, reduction_prev, affine=False
        )
        self.preprocess1 = ReLUConvBN(channels_prev, channels, affine=False)
        self.edges = nn.ModuleList(
            mixed_operation(channels, 2 if reduction and source < 2 else 1, space.primitives)
            for _, source in space.edges
        )

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        """The concatenation of the intermediate nodes.

        Args:
            s0: output of the cell before the last, [B, channels_prev_prev, H, W].
            s1: output of the last cell, [B, channels_prev, H, W].
            weights: of this kind of cell, [E, P].

        Returns:
            [B, num_intermediate_nodes * channels, H, W], halved in a reduction cell.
        """
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        terms: list[Tensor] = []
        for (_, source), edge, row in zip(self.topology, self.edges, weights.unbind(), strict=True):
            terms.append(edge(states[source], row))
            if len(terms) == len(states):  # a node has one edge from every state before it
                states.append(_sum(terms))
                terms = []
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
        relaxation: alpha -> edge weights; each kind of cell gets a copy of its own.
        mixed_operation: factory(channels, stride, primitives) of what an edge computes.

    Raises:
        UserError: for a size below 1.
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
        mixed_operation: Callable[[int, int, Sequence[str]], nn.Module] = MixedOperation,
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
        shape = (len(space.edges), len(space.primitives))
        self.alphas = nn.ParameterDict(
            {kind: nn.Parameter(ALPHA_INIT_STD * torch.randn(shape)) for kind in CELL_KINDS}
        )
        self.relaxations = nn.ModuleDict(
            {kind: _fresh_copy(relaxation or Softmax()) for kind in CELL_KINDS}
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

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, in_channels, H, W]."""
        weights = {kind: self.relaxations[kind](alpha) for kind, alpha in self.alphas.items()}
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, weights[cast(SearchCell, cell).kind])
        return self.classifier(F.adaptive_avg_pool2d(s1, 1).flatten(1))

    def arch_parameters(self) -> list[nn.Parameter]:
        """Raw alpha [E, P] of the normal and the reduction cell, then the relaxation's own."""
        return [*self.alphas.values(), *self.relaxations.parameters()]

    def weight_parameters(self) -> list[nn.Parameter]:
        """Every parameter that is not an architecture parameter."""
        arch = {id(parameter) for parameter in self.arch_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in arch]

    @torch.no_grad()
    def strengths(self) -> dict[str, Tensor]:
        """Edge weights [E, P] of both kinds of cell, the relaxation in evaluation mode."""
        training = self.relaxations.training
        self.relaxations.eval()
        try:
            return {kind: self.relaxations[kind](alpha) for kind, alpha in self.alphas.items()}
        finally:
            self.relaxations.train(training)

    def genotype(self) -> Genotype:
        """The genotype of the strongest operations at the present alpha."""
        return discretize(self.strengths(), self.space)


def _fresh_copy(relaxation: nn.Module) -> nn.Module:
    """A copy whose own parameters are drawn anew, so that the two kinds of cell start apart."""
    fresh = copy.deepcopy(relaxation)
    for module in fresh.modules():
        reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    return fresh
