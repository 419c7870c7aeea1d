"""The search space as checked data, and the way back from edge weights to a genotype.

Shapes: E edges of a cell (14 for four nodes), P primitives (8 in DARTS).
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dartsl.errors import UserError, unknown
from dartsl.genotype import Edge, Genotype, is_whole_number
from dartsl.operations import OPERATIONS

DARTS_PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""The eight primitives of section 3.1.1, in the column order of the official alpha."""

CELL_KINDS = ("normal", "reduce")


@dataclass(frozen=True)
class SearchSpace:
    """Which operations an edge may choose from, and how many nodes a cell has.

    Attributes:
        primitives: the columns of alpha.
        num_intermediate_nodes: 4 in the paper; each is connected to every node before it.

    Raises:
        UserError: for an unknown or repeated primitive, and where nothing is left to choose.
    """

    primitives: tuple[str, ...] = DARTS_PRIMITIVES
    num_intermediate_nodes: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.primitives, str):
            raise UserError(f"The primitives are a list of names, not {self.primitives!r}.")
        primitives = tuple(self.primitives)
        for primitive in primitives:
            if primitive not in OPERATIONS:
                raise unknown("primitive", primitive, OPERATIONS)
        object.__setattr__(self, "primitives", tuple(map(str, primitives)))  # of numpy, too
        if len(set(self.primitives)) != len(self.primitives):
            raise UserError(f"A primitive stands twice in {list(self.primitives)}.")
        if not set(self.primitives) - {"none"}:
            raise UserError("A search space needs at least one primitive other than 'none'.")
        nodes = self.num_intermediate_nodes
        if not is_whole_number(nodes) or nodes < 1:
            raise UserError(f"num_intermediate_nodes is {nodes!r}; it is a whole number from 1 on.")

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """(node, source) of each edge, in the row order of alpha; nodes count from 2."""
        nodes = range(2, self.num_intermediate_nodes + 2)
        return tuple((node, source) for node in nodes for source in range(node))


def discretize(strengths: Mapping[str, Any], space: SearchSpace) -> Genotype:
    """The genotype of the strongest operations (section 2.4).

    An edge is as strong as its strongest operation other than 'none'. Each node keeps its two
    strongest edges, strongest first as in the official code; ties go to the lower edge and the
    lower primitive. The cell's output concatenates all intermediate nodes.

    Args:
        strengths: for "normal" and "reduce" the edge weights [E, P] after the relaxation (for
            DARTS the softmax over all primitives, 'none' included: ranking raw alphas would
            choose other edges).
        space: names the rows and columns.

    Raises:
        UserError: for weights of another shape than the space's, or which are not finite.
    """
    concat = tuple(range(2, space.num_intermediate_nodes + 2))
    normal, reduce = (_strongest(kind, strengths.get(kind), space) for kind in CELL_KINDS)
    return Genotype(normal, concat, reduce, concat)


def random_genotype(space: SearchSpace, seed: int) -> Genotype:
    """A genotype drawn at random, the baseline of section 3.2 of arXiv:1806.09055.

    Every node takes two different sources and any primitive other than 'none' from each, all
    equally likely; the concatenation is as in `discretize`.
    """
    rng = random.Random(seed)
    primitives = [primitive for primitive in space.primitives if primitive != "none"]
    concat = tuple(range(2, space.num_intermediate_nodes + 2))
    normal, reduce = (
        tuple(
            (rng.choice(primitives), source)
            for node in concat
            for source in sorted(rng.sample(range(node), 2))
        )
        for _ in CELL_KINDS
    )
    return Genotype(normal, concat, reduce, concat)


def _strongest(kind: str, strengths: Any, space: SearchSpace) -> tuple[Edge, ...]:
    """The two strongest edges of every node, with their strongest operation."""
    shape = (len(space.edges), len(space.primitives))
    if strengths is None or tuple(strengths.shape) != shape:
        raise UserError(f"The {kind} cell's strengths have another shape than {shape}.")
    rows: list[list[float]] = strengths.tolist()
    if not all(math.isfinite(value) for row in rows for value in row):
        raise UserError(f"The {kind} cell's strengths are not finite: the search has diverged.")

    columns = [i for i, primitive in enumerate(space.primitives) if primitive != "none"]
    best = [max(columns, key=row.__getitem__) for row in rows]  # the first of equals
    chosen: list[Edge] = []
    for node in range(2, space.num_intermediate_nodes + 2):
        edges = [(e, source) for e, (target, source) in enumerate(space.edges) if target == node]
        # sorted is stable: the lower edge wins a tie.
        ranked = sorted(edges, key=lambda edge: -rows[edge[0]][best[edge[0]]])
        chosen += [(space.primitives[best[e]], source) for e, source in ranked[:2]]
    return tuple(chosen)
