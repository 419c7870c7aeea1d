"""Where everything in the picture of a cell lies: plain numbers, of which pictures are drawn.

Nodes descend from the upper left to the lower right like a staircase. What a node hands on runs
down from it and turns off to the right, one row for every edge; what the cell concatenates runs to
the bar at the right. So rows never meet, a row and a drop cross at right angles, and every label
has a row and a column that it shares with nothing but its own edge. Which edges a genotype holds
moves no node: only their number and the longest name do, so that pictures of consecutive epochs
lie on top of each other.

Lengths are inches, with y upwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dartsl.genotype import Edge, Genotype

FONT_SIZE = 8.5  # points, of labels
_CHARACTER = 0.602 * FONT_SIZE / 72  # DejaVu Sans Mono: every glyph is 0.602 em wide
_MIN_CHARACTERS = 12  # "sep_conv_3x3": the usual names all lead to one and the same grid
LABEL_PADDING, _LABEL_HEIGHT = 0.06, 0.21
MARGIN = 0.12
_INPUT_WIDTH, _INPUT_HEIGHT, _INPUT_PITCH = 0.72, 0.34, 0.82
_NODE_WIDTH, _NODE_HEIGHT = 0.34, 0.48
_NODE_PITCH = 0.64  # vertical, between two nodes
_ROW_OFFSET = 0.14  # of a node's two rows from its middle
_TURN, _ARROW = 0.22, 0.25  # left and right of a label
_CONCAT_ARROW, _OUTPUT_WIDTH = 0.4, 0.42

Point = tuple[float, float]


class Box(NamedTuple):
    """An upright rectangle."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, x: float, y: float, width: float, height: float) -> "Box":
        """The box of this size whose centre is (x, y)."""
        return cls(x - width / 2, y - height / 2, x + width / 2, y + height / 2)

    @property
    def center(self) -> Point:
        """Its middle."""
        return (self.left + self.right) / 2, (self.bottom + self.top) / 2


@dataclass(frozen=True)
class Wire:
    """An edge, or the way of a concatenated node to the output.

    Attributes:
        source: node that it leaves.
        target: node that it enters; for the output, the number after the last node's.
        points: start, corner (edges alone) and end.
        primitive: of an edge; None on the way to the output.
        label: box of the primitive's name; None on the way to the output.
    """

    source: int
    target: int
    points: tuple[Point, ...]
    primitive: str | None = None
    label: Box | None = None


@dataclass(frozen=True)
class CellLayout:
    """Where everything in the picture of one cell lies.

    Attributes:
        width: of the picture.
        height: of the picture.
        nodes: a box per node: the two inputs, the intermediate nodes, last the output.
        names: of the nodes; in c_{...} the braces hold a subscript.
        edges: in the order of the genotype.
        concat: in the order of the genotype.
    """

    width: float
    height: float
    nodes: tuple[Box, ...]
    names: tuple[str, ...]
    edges: tuple[Wire, ...]
    concat: tuple[Wire, ...]


def layout_cell(
    edges: Sequence[Edge], concat: Sequence[int], min_characters: int = _MIN_CHARACTERS
) -> CellLayout:
    """Lay out one cell.

    Args:
        edges: (primitive, source) pairs, two per intermediate node.
        concat: the nodes that the output concatenates.
        min_characters: room that every label has at least; cells that are to have the same grid
            are given the length of the longest name of them all.
    """
    characters = max(min_characters, *(len(primitive) for primitive, _ in edges))
    label_width = label_width_of(characters)
    nodes = _place_nodes(len(edges) // 2, label_width)
    output = nodes[-1]
    to_output = []
    for node in concat:
        y = nodes[node].center[1]
        to_output.append(Wire(node, len(nodes) - 1, ((nodes[node].right, y), (output.left, y))))
    return CellLayout(
        width=output.right + MARGIN,
        height=nodes[0].top + MARGIN,
        nodes=nodes,
        names=_name_nodes(len(nodes)),
        edges=_route_edges(edges, nodes, label_width),
        concat=tuple(to_output),
    )


def _name_nodes(num_nodes: int) -> tuple[str, ...]:
    """Their numbers in the genotype; inputs and output also as in the paper's figures."""
    intermediate = map(str, range(2, num_nodes - 1))
    return "0: c_{k-2}", "1: c_{k-1}", *intermediate, "c_{k}"


def label_width_of(characters: int) -> float:
    """The width of the label of a name with so many characters."""
    return characters * _CHARACTER + 2 * LABEL_PADDING


def _place_nodes(num_intermediate_nodes: int, label_width: float) -> tuple[Box, ...]:
    """Boxes of inputs, intermediate nodes and output; which edges there are plays no part."""
    pitch = _TURN + label_width + _ARROW + _NODE_WIDTH / 2
    bottom = MARGIN + _NODE_HEIGHT / 2
    x = MARGIN + _INPUT_WIDTH / 2
    top = bottom + num_intermediate_nodes * _NODE_PITCH
    boxes = [Box.around(x + i * _INPUT_PITCH, top, _INPUT_WIDTH, _INPUT_HEIGHT) for i in (0, 1)]
    x += _INPUT_PITCH
    for i in range(1, num_intermediate_nodes + 1):
        boxes.append(Box.around(x + i * pitch, top - i * _NODE_PITCH, _NODE_WIDTH, _NODE_HEIGHT))
    left = boxes[-1].right + _CONCAT_ARROW
    # A bar beside all nodes: each reaches it in a straight line that nothing crosses.
    boxes.append(Box(left, MARGIN, left + _OUTPUT_WIDTH, boxes[2].top))
    return tuple(boxes)


def _route_edges(
    edges: Sequence[Edge], nodes: Sequence[Box], label_width: float
) -> tuple[Wire, ...]:
    """One row for every edge: down from the source, then right to the target."""
    wires = []
    for index, (primitive, source) in enumerate(edges):
        target, other = index // 2 + 2, edges[index ^ 1][1]  # index ^ 1: the node's other edge
        # The later source above: so its drop ends before it would cross the other edge's row.
        above = source > other or (source == other and index % 2 == 0)
        y = nodes[target].center[1] + (_ROW_OFFSET if above else -_ROW_OFFSET)
        x, end = nodes[source].center[0], nodes[target].left
        points = ((x, nodes[source].bottom), (x, y), (end, y))
        middle = end - _ARROW - label_width / 2
        label = Box.around(middle, y, label_width_of(len(primitive)), _LABEL_HEIGHT)
        wires.append(Wire(source, target, points, primitive, label))
    return tuple(wires)


def cell_layouts(genotype: Genotype, min_characters: int = 0) -> dict[str, CellLayout]:
    """Both cells' layouts, "normal" and "reduce", on one grid.

    Args:
        genotype: may hold any names of primitives.
        min_characters: of the longest name in all pictures that are to have this grid.
    """
    characters = max(min_characters, _MIN_CHARACTERS, *map(len, genotype.primitives))
    return {
        "normal": layout_cell(genotype.normal, genotype.normal_concat, characters),
        "reduce": layout_cell(genotype.reduce, genotype.reduce_concat, characters),
    }
