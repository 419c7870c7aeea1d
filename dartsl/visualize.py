"""Pictures: genotypes as wiring diagrams, and the edge weights of a search as heat maps.

Where things lie, `dartsl.layout` says. Lengths are inches, with y upwards; shapes: E edges, P
primitives.
"""

import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve
from PIL import Image
from torch import Tensor

from dartsl.errors import UserError
from dartsl.files import whole_file
from dartsl.genotype import Genotype
from dartsl.layout import (
    FONT_SIZE,
    LABEL_PADDING,
    MARGIN,
    Box,
    CellLayout,
    Wire,
    cell_layouts,
    label_width_of,
)  # fmt: skip
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

_BEND = 0.1  # radius
_GUTTER = 0.4  # between genotypes side by side
_LEGEND_PITCH, _SWATCH = 0.24, 0.18
_TITLE_SIZE = 12
_FRAME_DPI = 100  # of an animation: about 1,200 pixels wide

_CENTERED: dict[str, Any] = {"ha": "center", "va": "center"}
# Not parsed as mathematics: a name may hold a dollar sign.
_LABEL_FONT: dict[str, Any] = {
    "size": FONT_SIZE, "family": "DejaVu Sans Mono", "parse_math": False,
}  # fmt: skip

Color = str | tuple[float, ...]


def color_of(primitive: str) -> str:
    """The colour of a primitive in every picture."""
    return COLORS.get(primitive, OTHER_COLOR)


def in_order(primitives: Iterable[str]) -> list[str]:
    """Different primitives in the order of every legend."""
    order = {name: rank for rank, name in enumerate(COLORS)}
    return sorted(set(primitives), key=lambda name: (order.get(name, len(order)), name))


def draw_genotype(genotype: Genotype, title: str | None = None) -> Figure:
    """Both cells of a genotype, the normal cell above the reduction cell.

    Nodes have the numbers of the genotype: 0 and 1 are the outputs of the two cells before, c_{k-2}
    and c_{k-1} in the paper's figures, 2 is the first intermediate node; c_{k} is the output.

    Args:
        genotype: may hold any names of primitives.
        title: stands above the cells.
    """
    return draw_genotypes([(title or "", genotype)])


def draw_genotypes(genotypes: Sequence[tuple[str, Genotype]]) -> Figure:
    """Several genotypes side by side, on one grid and with one legend.

    Up to three stand in one row; more stand in about as many rows as columns.

    Args:
        genotypes: (title, genotype) of at least one.
    """
    characters = max(len(name) for _, genotype in genotypes for name in genotype.primitives)
    blocks = [(title, cell_layouts(genotype, characters)) for title, genotype in genotypes]
    columns = len(blocks) if len(blocks) <= 3 else math.ceil(math.sqrt(len(blocks)))
    width = max(cell.width for _, cells in blocks for cell in cells.values())
    titles = max(_title_height(title, width) for title, _ in blocks)
    height = titles + max(sum(cell.height for cell in cells.values()) for _, cells in blocks)
    total = columns * width + (columns - 1) * _GUTTER
    legend = _legend_rows((n for _, genotype in genotypes for n in genotype.primitives), total)
    bottom = len(legend) * _LEGEND_PITCH + MARGIN
    rows = math.ceil(len(blocks) / columns)
    with _style():
        figure = Figure(figsize=(total, bottom + rows * height + (rows - 1) * _GUTTER))
        for index, (title, cells) in enumerate(blocks):
            row, column = divmod(index, columns)
            x = column * (width + _GUTTER)
            y = bottom + (rows - row) * height + (rows - 1 - row) * _GUTTER
            _write_title(figure, title, x, y, width)
            _draw_cells(figure, cells, x, y - titles)
        _draw_legend(figure, legend)
    return figure


def _draw_cells(figure: Figure, cells: Mapping[str, CellLayout], left: float, top: float) -> None:
    """The cells of one genotype below each other."""
    for kind, cell in cells.items():
        top -= cell.height
        axes = _add_axes(figure, Box(left, top, left + cell.width, top + cell.height))
        axes.set(xlim=(0, cell.width), ylim=(0, cell.height))
        axes.axis("off")
        _draw_cell(axes, kind, cell)


def _legend_rows(primitives: Iterable[str], width: float) -> list[list[tuple[float, str]]]:
    """Rows of (x, primitive) from left to right; the order is the same in every picture."""
    rows: list[list[tuple[float, str]]] = [[]]
    x = MARGIN
    for name in in_order(primitives):
        entry = _SWATCH + label_width_of(len(name))
        if rows[-1] and x + entry > width - MARGIN:
            rows.append([])
            x = MARGIN
        rows[-1].append((x, name))
        x += entry + MARGIN
    return rows


def _draw_legend(figure: Figure, rows: Sequence[Sequence[tuple[float, str]]]) -> None:
    """What the colours mean, at the foot of the picture."""
    width = figure.get_size_inches()[0]
    height = len(rows) * _LEGEND_PITCH + MARGIN
    axes = _add_axes(figure, Box(0, 0, width, height))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    for index, row in enumerate(rows):
        y = height - (index + 0.5) * _LEGEND_PITCH
        for x, name in row:
            axes.plot((x, x + _SWATCH), (y, y), color=color_of(name), lw=3, solid_capstyle="butt")
            axes.text(x + _SWATCH + LABEL_PADDING, y, name, va="center", **_LABEL_FONT)


def _draw_cell(axes: Axes, kind: str, cell: CellLayout) -> None:
    for index, wire in enumerate(cell.edges):
        _draw_edge(axes, wire, f"{kind}-edge-{index}")
    for wire in cell.concat:
        _draw_arrow(axes, Curve(wire.points), _INK, f"{kind}-concat-{wire.source}")
    for name, box in zip(cell.names, cell.nodes, strict=True):
        number = name.isdecimal()  # of an intermediate node
        text = name if number else re.sub(r"c_\{.*\}", r"$\g<0>$", name)
        _draw_box(axes, box, text, "#FFFFFF" if number else "#E8E8E8", _INK, size=11)
    x, y = cell.nodes[1].right + 2 * MARGIN, cell.nodes[1].center[1]
    axes.text(x, y, _CAPTIONS[kind], size=11, weight="bold", va="center")


def _draw_edge(axes: Axes, wire: Wire, name: str) -> None:
    """The drop in ink, since edges of one source share it; the row in the primitive's colour."""
    assert wire.primitive is not None
    assert wire.label is not None
    color = color_of(wire.primitive)
    start, (x, y), end = wire.points
    turn, after = (x, y + _BEND), (x + _BEND, y)
    axes.plot(*zip(start, turn, strict=True), color=_INK, lw=1.4, zorder=1)
    # Drops are interrupted where a row passes over them: a crossing is not a junction.
    axes.plot(*zip(after, end, strict=True), color="white", lw=5, zorder=2, solid_capstyle="butt")
    codes = [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3, Curve.LINETO]
    _draw_arrow(axes, Curve([turn, (x, y), after, end], codes), color, name)
    tint = tuple(0.85 + 0.15 * part for part in to_rgb(color))
    _draw_box(axes, wire.label, wire.primitive, tint, color, **_LABEL_FONT)


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
    bottom = MARGIN + 0.1 + 0.047 * max(map(len, space.primitives))
    bar = left + 2 * map_width + 2 * between
    with _style():
        width, height = bar + 0.8, bottom + map_height + 0.35
        top = height + _title_height(title or "", width)
        figure = Figure(figsize=(width, top))
        _write_title(figure, title or "", 0, top, width)
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
    low, high = min([0.0, *finite]), max([0.0, *finite])
    return Normalize(low, high if high > low else low + 1)


def _draw_heat_map(axes: Axes, values: np.ndarray, space: SearchSpace, scale: Normalize) -> None:
    """One cell's weights [E, P], each written into its field."""
    image = _draw_fields(axes, values, space, scale)
    luminance = image.to_rgba(np.ma.masked_invalid(values))[..., :3] @ (0.2126, 0.7152, 0.0722)
    for (row, column), value in np.ndenumerate(values):
        ink = "black" if luminance[row, column] > 0.46 else "white"  # where both read equally well
        axes.text(column, row, f"{value:.2f}", size=7.5, color=ink, **_CENTERED)


def _draw_fields(axes: Axes, values: np.ndarray, space: SearchSpace, scale: Normalize) -> AxesImage:
    """One cell's weights [E, P] as colours, with the names of rows and columns."""
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
    return image


def draw_epochs(
    genotypes: Sequence[Genotype],
    strengths: Sequence[Mapping[str, Tensor]],
    space: SearchSpace,
    max_pictures: int = 100,
) -> Iterator[Figure]:
    """A picture of every epoch of a search, the cells with the edge weights beside them.

    Nothing but what changes moves from one to the next: all have one grid, one colour scale and
    one legend.

    Args:
        genotypes: of every epoch.
        strengths: of every epoch, as in `draw_strengths`.
        space: names the rows and columns.
        max_pictures: of a longer search that many epochs, evenly spaced from first to last.

    Raises:
        UserError: for weights of another shape than the space's.
    """
    values = [
        {kind: _checked_values(kind, epoch[kind], space) for kind in CELL_KINDS}
        for epoch in strengths
    ]
    finite = np.concatenate([w[np.isfinite(w)] for epoch in values for w in epoch.values()])
    # Not from 0, or nobody would see that weights that began as one drift apart.
    scale = Normalize(min(finite, default=0), max(finite, default=1))
    primitives = {name for genotype in genotypes for name in genotype.primitives}
    last = len(genotypes) - 1
    shown = np.linspace(0, last, min(len(genotypes), max_pictures)).round().astype(int)
    for epoch in shown:
        title = f"Epoch {epoch + 1} of {len(genotypes)}"
        with _style():
            figure = _draw_epoch(genotypes[epoch], values[epoch], space, scale, primitives, title)
        yield figure


def _draw_epoch(
    genotype: Genotype,
    values: Mapping[str, np.ndarray],
    space: SearchSpace,
    scale: Normalize,
    primitives: Iterable[str],
    title: str,
) -> Figure:
    cells = cell_layouts(genotype, max(map(len, primitives)))
    left = max(cell.width for cell in cells.values()) + _GUTTER
    names = 0.2 + 0.06 * max(map(len, _row_names(space)))
    map_width = max(0.3 * len(space.primitives), 1.3)
    width = left + names + map_width + 2 * MARGIN
    legend = _legend_rows(primitives, left)
    # Column names at 45 degrees, below the lower map.
    foot = max(len(legend) * _LEGEND_PITCH, 0.047 * max(map(len, space.primitives))) + 2 * MARGIN
    height = foot + sum(cell.height for cell in cells.values())
    figure = Figure(figsize=(width, height + _title_height(title, width)))
    _write_title(figure, title, 0, figure.get_size_inches()[1], width)
    _draw_cells(figure, cells, 0, height)
    _draw_legend(figure, legend)
    for kind, cell in cells.items():
        height -= cell.height
        box = Box(left + names, height + MARGIN, width - 2 * MARGIN, height + cell.height - 0.3)
        axes = _add_axes(figure, box)
        _draw_fields(axes, values[kind], space, scale)
        axes.set_title("edge weights", size=9)
        axes.tick_params(labelbottom=kind == CELL_KINDS[-1])
    return figure


def save_animation(figures: Iterable[Figure], path: str | Path, seconds: float = 0.4) -> Path:
    """Write pictures of one size as an animated GIF that begins anew after its end.

    Args:
        figures: one a frame; of a generator one is kept at a time.
        path: of the file; its folder is created.
        seconds: that a frame is shown; the last one stands still for three.
    """
    frames = [Image.fromarray(rasterize(figure, _FRAME_DPI)) for figure in figures]
    # One palette for all, or colours would flicker. This way of choosing it keeps white white.
    palette = frames[-1].quantize(256, Image.Quantize.MAXCOVERAGE)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [int(1000 * seconds)] * (len(frames) - 1) + [3000]
    with whole_file(path) as part:
        frames[0].save(
            part, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
        )
    return Path(path)


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


def _title_lines(title: str, width: float) -> list[str]:
    return textwrap.wrap(title, max(1, int(width * 72 / (0.68 * _TITLE_SIZE))))


def _title_height(title: str, width: float) -> float:
    lines = _title_lines(title, width)
    return MARGIN + 0.22 * len(lines) if lines else 0


def _write_title(figure: Figure, title: str, left: float, top: float, width: float) -> None:
    """Over the middle of what is `width` wide, wrapped to it, downwards from `top`."""
    text = "\n".join(_title_lines(title, width))
    total_width, total_height = figure.get_size_inches()
    x, y = (left + width / 2) / total_width, (top - MARGIN) / total_height
    style: dict[str, Any] = {"size": _TITLE_SIZE, "weight": "bold", "ha": "center", "va": "top"}
    figure.text(x, y, text, **style, parse_math=False)


def _add_axes(figure: Figure, box: Box) -> Axes:
    """Axes at a place given in inches."""
    width, height = figure.get_size_inches()
    left, bottom, right, top = box
    return figure.add_axes(
        (left / width, bottom / height, (right - left) / width, (top - bottom) / height)
    )
