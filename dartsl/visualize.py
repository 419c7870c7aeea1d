"""Pictures: a genotype as two wiring diagrams, and the edge weights of a search as heat maps.

A cell is laid out first (`layout_cell`, plain numbers) and drawn then. Nodes descend from the upper
left to the lower right like a staircase. What a node hands on runs down from it and turns off to
the right, one row for every edge; what the cell concatenates runs to the bar at the right. So rows
never meet, a row and a drop cross at right angles, and every label has a row and a column that it
shares with nothing but its own edge. Which edges a genotype holds moves no node: only their number
and the longest name do, so that pictures of consecutive epochs lie on top of each other.

Lengths are inches, with y upwards; shapes: E edges, P primitives.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve
from torch import Tensor

from dartsl.errors import UserError
from dartsl.files import whole_file
from dartsl.genotype import Edge, Genotype
from dartsl.search_space import CELL_KINDS, SearchSpace

# Okabe and Ito's colours, which colour-blind readers can tell apart; the two primitives of the
# older spaces take indigo and wine of Paul Tol's. A primitive of any other name is grey.
COLORS = {
    "sep_conv_3x3": "#0072B2",
    "sep_conv_5x5": "#56B4E9",
    "sep_conv_7x7": "#332288",
    "dil_conv_3x3": "#D55E00",
    "dil_conv_5x5": "#E69F00",
    "max_pool_3x3": "#009E73",
    "avg_pool_3x3": "#CC79A7",
    "skip_connect": "#000000",
    "conv_7x1_1x7": "#882255",
}
OTHER_COLOR = "#7A7A7A"

_CAPTIONS = {"normal": "Normal cell", "reduce": "Reduction cell"}
_INK = "#555555"
# Perceptually uniform, for colour-blind readers too; a weight that is no number is white.
_COLOR_MAP = matplotlib.colormaps["cividis"].with_extremes(bad="white")

_FONT_SIZE = 8.5  # points, of labels
_CHARACTER = 0.602 * _FONT_SIZE / 72  # DejaVu Sans Mono: every glyph is 0.602 em wide
_MIN_CHARACTERS = 12  # "sep_conv_3x3": the usual names all lead to one and the same grid
_LABEL_PADDING, _LABEL_HEIGHT = 0.06, 0.21
_MARGIN = 0.12
_INPUT_WIDTH, _INPUT_HEIGHT, _INPUT_PITCH = 0.56, 0.34, 0.66
_NODE_WIDTH, _NODE_HEIGHT = 0.34, 0.48
_NODE_PITCH = 0.64  # vertical, between two nodes
_ROW_OFFSET = 0.14  # of a node's two rows from its middle
_TURN, _ARROW = 0.22, 0.25  # left and right of a label
_BEND = 0.1  # radius
_CONCAT_ARROW, _OUTPUT_WIDTH = 0.4, 0.42

_CENTERED: dict[str, Any] = {"ha": "center", "va": "center"}

Point = tuple[float, float]
Color = str | tuple[float, ...]


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
        edges: in the order of the genotype.
        concat: in the order of the genotype.
    """

    width: float
    height: float
    nodes: tuple[Box, ...]
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
    label_width = _label_width(characters)
    nodes = _place_nodes(len(edges) // 2, label_width)
    output = nodes[-1]
    to_output = []
    for node in concat:
        y = nodes[node].center[1]
        to_output.append(Wire(node, len(nodes) - 1, ((nodes[node].right, y), (output.left, y))))
    return CellLayout(
        width=output.right + _MARGIN,
        height=nodes[0].top + _MARGIN,
        nodes=nodes,
        edges=_route_edges(edges, nodes, label_width),
        concat=tuple(to_output),
    )


def _label_width(characters: int) -> float:
    return characters * _CHARACTER + 2 * _LABEL_PADDING


def _place_nodes(num_intermediate_nodes: int, label_width: float) -> tuple[Box, ...]:
    """Boxes of inputs, intermediate nodes and output; which edges there are plays no part."""
    pitch = _TURN + label_width + _ARROW + _NODE_WIDTH / 2
    bottom = _MARGIN + _NODE_HEIGHT / 2
    x = _MARGIN + _INPUT_WIDTH / 2
    top = bottom + num_intermediate_nodes * _NODE_PITCH
    boxes = [Box.around(x + i * _INPUT_PITCH, top, _INPUT_WIDTH, _INPUT_HEIGHT) for i in (0, 1)]
    x += _INPUT_PITCH
    for i in range(1, num_intermediate_nodes + 1):
        boxes.append(Box.around(x + i * pitch, top - i * _NODE_PITCH, _NODE_WIDTH, _NODE_HEIGHT))
    left = boxes[-1].right + _CONCAT_ARROW
    # A bar beside all nodes: each reaches it in a straight line that nothing crosses.
    boxes.append(Box(left, _MARGIN, left + _OUTPUT_WIDTH, boxes[2].top))
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
        label = Box.around(middle, y, _label_width(len(primitive)), _LABEL_HEIGHT)
        wires.append(Wire(source, target, points, primitive, label))
    return tuple(wires)


def draw_genotype(genotype: Genotype, title: str | None = None) -> Figure:
    """Both cells of a genotype, the normal cell above the reduction cell.

    Nodes are named as in the paper's figures: c_{k-2} and c_{k-1} are the outputs of the two cells
    before, 0 is the first intermediate node, c_{k} the cell's output.

    Args:
        genotype: may hold any names of primitives.
        title: stands above the cells.
    """
    characters = max(_MIN_CHARACTERS, *map(len, genotype.primitives))
    cells = {
        "normal": layout_cell(genotype.normal, genotype.normal_concat, characters),
        "reduce": layout_cell(genotype.reduce, genotype.reduce_concat, characters),
    }
    width = max(cell.width for cell in cells.values())
    height = sum(cell.height for cell in cells.values())
    with _style():
        figure, top = _new_figure(width, height, title), height
        for kind, cell in cells.items():
            top -= cell.height
            axes = _add_axes(figure, Box(0, top, cell.width, top + cell.height))
            axes.set(xlim=(0, cell.width), ylim=(0, cell.height))
            axes.axis("off")
            _draw_cell(axes, kind, cell)
    return figure


def _draw_cell(axes: Axes, kind: str, cell: CellLayout) -> None:
    for index, wire in enumerate(cell.edges):
        _draw_edge(axes, wire, f"{kind}-edge-{index}")
    for wire in cell.concat:
        _draw_arrow(axes, Curve(wire.points), _INK, f"{kind}-concat-{wire.source}")
    last = len(cell.nodes) - 1
    for node, box in enumerate(cell.nodes):
        names = {0: "$c_{k-2}$", 1: "$c_{k-1}$", last: "$c_{k}$"}
        face = "#E8E8E8" if node in names else "#FFFFFF"
        _draw_box(axes, box, names.get(node, str(node - 2)), face, _INK, size=11)
    x, y = cell.nodes[1].right + 2 * _MARGIN, cell.nodes[1].center[1]
    axes.text(x, y, _CAPTIONS[kind], size=11, weight="bold", va="center")


def _draw_edge(axes: Axes, wire: Wire, name: str) -> None:
    """The drop in ink, since edges of one source share it; the row in the primitive's colour."""
    assert wire.primitive is not None
    assert wire.label is not None
    color = COLORS.get(wire.primitive, OTHER_COLOR)
    start, (x, y), end = wire.points
    turn, after = (x, y + _BEND), (x + _BEND, y)
    axes.plot(*zip(start, turn, strict=True), color=_INK, lw=1.4, zorder=1)
    # Drops are interrupted where a row passes over them: a crossing is not a junction.
    axes.plot(*zip(after, end, strict=True), color="white", lw=5, zorder=2, solid_capstyle="butt")
    codes = [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3, Curve.LINETO]
    _draw_arrow(axes, Curve([turn, (x, y), after, end], codes), color, name)
    tint = tuple(0.85 + 0.15 * part for part in to_rgb(color))
    # Not parsed as mathematics: a name may hold a dollar sign.
    font = {"size": _FONT_SIZE, "family": "DejaVu Sans Mono", "parse_math": False}
    _draw_box(axes, wire.label, wire.primitive, tint, color, **font)


def _draw_arrow(axes: Axes, path: Curve, color: str, name: str) -> None:
    """An arrow along a path; `name` is its id in the SVG."""
    head = "-|>,head_length=0.5,head_width=0.25"
    arrow = FancyArrowPatch(
        path=path, arrowstyle=head, mutation_scale=12, shrinkA=0, shrinkB=0, color=color, lw=1.4
    )
    arrow.set(capstyle="butt", joinstyle="miter", zorder=3, gid=name)
    axes.add_patch(arrow)


def _draw_box(axes: Axes, box: Box, text: str, face: Color, edge: Color, **font: Any) -> None:
    """A box above all lines, with a text in its middle."""
    style = "round,pad=0,rounding_size=0.06"
    size = (box.right - box.left, box.top - box.bottom)
    axes.add_patch(FancyBboxPatch(box[:2], *size, style, fc=face, ec=edge, lw=1, zorder=4))
    x, y = box.center
    axes.text(x, y, text, **_CENTERED, zorder=5, **font)


def draw_strengths(
    strengths: Mapping[str, Tensor], space: SearchSpace, title: str | None = None
) -> Figure:
    """The edge weights of both kinds of cell as heat maps with one colour scale.

    Nodes count as in the search space: 0 and 1 are the cell's inputs, 2 the first intermediate
    node.

    Args:
        strengths: for "normal" and "reduce" the edge weights [E, P] after the relaxation.
        space: names the rows and columns.
        title: stands above the heat maps.

    Raises:
        UserError: for weights of another shape than the space's.
    """
    values = {kind: _checked_values(kind, strengths[kind], space) for kind in CELL_KINDS}
    num_edges, num_primitives = len(space.edges), len(space.primitives)
    map_width = max(0.44 * num_primitives, 1.3)  # the caption above is as wide
    map_height = 0.26 * num_edges
    left, between = 0.2 + 0.06 * max(map(len, _row_names(space))), 0.25
    # Column names stand at 45 degrees.
    bottom = _MARGIN + 0.1 + 0.047 * max(map(len, space.primitives))
    bar = left + 2 * map_width + 2 * between
    with _style():
        figure = _new_figure(bar + 0.8, bottom + map_height + 0.35, title)
        scale = _color_scale(list(values.values()))
        for index, kind in enumerate(CELL_KINDS):
            x = left + index * (map_width + between)
            axes = _add_axes(figure, Box(x, bottom, x + map_width, bottom + map_height))
            axes.set_title(_CAPTIONS[kind], size=11, weight="bold")
            _draw_heat_map(axes, values[kind], space, scale)
            axes.tick_params(labelleft=index == 0)  # the rows of both maps are the same
        axes = _add_axes(figure, Box(bar, bottom, bar + 0.16, bottom + map_height))
        figure.colorbar(ScalarMappable(scale, _COLOR_MAP), cax=axes, label="edge weight")
        axes.tick_params(labelsize=8)
    return figure


def _row_names(space: SearchSpace) -> list[str]:
    return [f"node {node} <- node {source}" for node, source in space.edges]


def _checked_values(kind: str, values: Tensor, space: SearchSpace) -> np.ndarray:
    """The weights [E, P] as an array, from any device and precision."""
    shape = (len(space.edges), len(space.primitives))
    if tuple(values.shape) != shape:
        raise UserError(
            f"The {kind} cell's strengths have the shape {tuple(values.shape)}, not {shape}."
        )
    return values.detach().cpu().double().numpy()


def _color_scale(values: Sequence[np.ndarray]) -> Normalize:
    """From 0 to the largest weight: lengths of colour are weights, in both cells alike."""
    finite = np.concatenate([part[np.isfinite(part)] for part in values])
    low, high = min(0.0, *finite, 0.0), max(0.0, *finite, 0.0)
    return Normalize(low, high if high > low else low + 1)


def _draw_heat_map(axes: Axes, values: np.ndarray, space: SearchSpace, scale: Normalize) -> None:
    """One cell's weights [E, P], each written into its field."""
    shown = np.ma.masked_invalid(values)
    image = axes.imshow(shown, cmap=_COLOR_MAP, norm=scale, aspect="auto")
    axes.set_yticks(range(len(values)), _row_names(space), size=8)
    axes.set_xticks(range(len(space.primitives)), space.primitives, size=8)
    axes.tick_params(length=0)
    for label in axes.get_xticklabels():
        label.set(rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    for row, (node, source) in enumerate(space.edges):
        if source == 0 and node > 2:  # a node's first edge
            axes.axhline(row - 0.5, color="white", lw=2)
    luminance = image.to_rgba(shown)[..., :3] @ (0.2126, 0.7152, 0.0722)
    for (row, column), value in np.ndenumerate(values):
        ink = "black" if luminance[row, column] > 0.46 else "white"  # where both read equally well
        axes.text(column, row, f"{value:.2f}", size=7.5, color=ink, **_CENTERED)


def save_figure(figure: Figure, path: str | Path) -> list[Path]:
    """Write a picture as PNG and as SVG; the same picture gives the same bytes.

    Args:
        figure: the picture.
        path: without a suffix; its folder is created.

    Returns:
        The paths of the PNG and of the SVG.
    """
    # Not with_suffix, which would eat the ".5" of a name such as "alpha_0.5".
    targets = [Path(f"{Path(path)}.{suffix}") for suffix in ("png", "svg")]
    for target in targets:
        suffix = target.suffix[1:]
        # Dates and versions would make two equal pictures differ.
        metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[suffix]
        with whole_file(target) as part, _style():
            figure.savefig(part, format=suffix, dpi=200, metadata=metadata)
    return targets


def rasterize(figure: Figure, dpi: int = 150) -> np.ndarray:
    """A picture's pixels, [H, W, 3] bytes; what a logger takes."""
    with _style():
        figure.set_dpi(dpi)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@contextmanager
def _style() -> Iterator[None]:
    """Matplotlib's defaults and ours, whatever the user's own matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rc("font", family="DejaVu Sans")  # comes with matplotlib
        # Letters as outlines, and ids that are no random numbers.
        matplotlib.rc("svg", fonttype="path", hashsalt="dartsl")
        yield


def _new_figure(width: float, height: float, title: str | None) -> Figure:
    """A figure of this size and, above, as much more as the lines of the title take."""
    size = 12
    lines = textwrap.wrap(title or "", max(1, int(width * 72 / (0.68 * size))))
    total = height + (0.12 + 0.22 * len(lines) if lines else 0)
    figure = Figure(figsize=(width, total))
    style: dict[str, Any] = {"size": size, "weight": "bold", "ha": "center", "va": "top"}
    figure.text(0.5, 1 - _MARGIN / total, "\n".join(lines), **style, parse_math=False)
    return figure


def _add_axes(figure: Figure, box: Box) -> Axes:
    """Axes at a place given in inches."""
    width, height = figure.get_size_inches()
    left, bottom, right, top = box
    return figure.add_axes(
        (left / width, bottom / height, (right - left) / width, (top - bottom) / height)
    )
