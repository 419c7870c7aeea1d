"""Pictures: the geometry of a cell's layout, what is drawn of it, heat maps, and files."""

import itertools
import random
import re
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dartsl.errors import UserError
from dartsl.genotype import Genotype, published
from dartsl.layout import Box, CellLayout, Wire, cell_layouts, layout_cell
from dartsl.search_space import SearchSpace, discretize
from dartsl.visualize import (
    COLORS,
    draw_epochs,
    draw_genotype,
    draw_genotypes,
    draw_strengths,
    save_animation,
    save_figure,
)

CELLS = sorted(
    {path.stem for path in (Path(__file__).parents[1] / "conf/genotype").glob("*.yaml")}
    - {"from_file", "from_wandb", "random"}
)
NAMES = (*COLORS, "none", "x", "a_$new$_primitive_of_considerable_length")


def random_cell(rng: random.Random, num_nodes: int):
    edges = tuple((rng.choice(NAMES), rng.randrange(i // 2 + 2)) for i in range(2 * num_nodes))
    nodes = list(range(2, num_nodes + 2))
    return edges, tuple(rng.sample(nodes, rng.randint(1, num_nodes)))


def random_genotype(seed: int) -> Genotype:
    rng = random.Random(seed)
    normal, reduce = random_cell(rng, rng.randint(1, 8)), random_cell(rng, rng.randint(1, 8))
    return Genotype(*normal, *reduce)


def overlap(a: Box, b: Box) -> bool:
    return a.left < b.right and b.left < a.right and a.bottom < b.top and b.bottom < a.top


def segments(wire: Wire) -> list[Box]:
    """The straight pieces of a wire, as thick as it is drawn (its rounded corner lies within)."""
    half = 0.012
    return [
        Box(min(x, u) - half, min(y, v) - half, max(x, u) + half, max(y, v) + half)
        for (x, y), (u, v) in itertools.pairwise(wire.points)
    ]


def check_layout(cell: CellLayout, edges, concat) -> None:
    check_ends(cell, edges, concat)
    check_boxes(cell)
    check_wires(cell)


def check_ends(cell: CellLayout, edges, concat) -> None:
    """Every edge and every concatenated node has one wire, from its source to its target."""
    expected = [(primitive, source, i // 2 + 2) for i, (primitive, source) in enumerate(edges)]
    assert [(wire.primitive, wire.source, wire.target) for wire in cell.edges] == expected
    assert [wire.source for wire in cell.concat] == list(concat)
    assert {wire.target for wire in cell.concat} == {len(edges) // 2 + 2}
    for wire in cell.edges + cell.concat:
        source, target = cell.nodes[wire.source], cell.nodes[wire.target]
        (x, y), (u, v) = wire.points[0], wire.points[-1]
        side = y == source.bottom and source.left < x < source.right
        assert side or (x == source.right and source.bottom < y < source.top)
        assert u == target.left
        assert target.bottom < v < target.top
    assert all(node.left > cell.nodes[1].right for node in cell.nodes[2:])
    assert all(node.right < cell.nodes[-1].left for node in cell.nodes[:-1])


def check_boxes(cell: CellLayout) -> None:
    """Labels and nodes lie within the picture, and none over another."""
    labels = [wire.label for wire in cell.edges]
    for box in (*labels, *cell.nodes):
        assert box.left >= 0
        assert box.bottom >= 0
        assert box.right <= cell.width
        assert box.top <= cell.height
    for a, b in itertools.combinations((*labels, *cell.nodes), 2):
        assert not overlap(a, b)


def check_wires(cell: CellLayout) -> None:
    """No wire meets a label or node that is not its own; none runs along another's row."""
    for wire in cell.edges + cell.concat:
        foreign = [other.label for other in cell.edges if other is not wire]
        foreign += [
            box for node, box in enumerate(cell.nodes) if node not in (wire.source, wire.target)
        ]
        assert not any(overlap(piece, box) for piece in segments(wire) for box in foreign)
    for a, b in itertools.combinations(cell.edges + cell.concat, 2):
        rows_overlap = overlap(segments(a)[-1], segments(b)[-1])
        assert not rows_overlap
        if a.source != b.source and len(a.points) == len(b.points) == 3:
            assert a.points[0][0] != b.points[0][0]
            assert not overlap(segments(a)[0], segments(b)[0])


def check_genotype(genotype: Genotype) -> None:
    for edges, concat in (
        (genotype.normal, genotype.normal_concat),
        (genotype.reduce, genotype.reduce_concat),
    ):
        check_layout(layout_cell(edges, concat), edges, concat)


@pytest.mark.parametrize("name", CELLS)
def test_published_cells_are_laid_out_without_a_collision(name):
    check_genotype(published(name))


def test_random_cells_are_laid_out_without_a_collision():
    for seed in range(150):
        check_genotype(random_genotype(seed))


def test_the_published_cells_are_found():
    assert len(CELLS) >= 12


def test_other_edges_move_no_node():
    rng = random.Random(0)
    concat = (2, 3, 4, 5)
    usual = [
        tuple((rng.choice(tuple(COLORS)), rng.randrange(i // 2 + 2)) for i in range(8))
        for _ in range(20)
    ]
    layouts = [layout_cell(edges, concat) for edges in usual]
    assert len({layout.nodes for layout in layouts}) == 1
    rows = {tuple(sorted(wire.label.center for wire in layout.edges)) for layout in layouts}
    assert len(rows) == 1


def test_the_order_of_a_nodes_edges_does_not_show():
    a, b = ("sep_conv_3x3", 0), ("skip_connect", 1)
    one, other = layout_cell((a, b), (2,)), layout_cell((b, a), (2,))
    assert set(one.edges) == set(other.edges)


def texts_and_extents(figure: Figure):
    """(text, box in inches) of everything written in the axes."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    for text in itertools.chain(*(axes.texts for axes in figure.axes), figure.texts):
        extent = text.get_window_extent(renderer)
        yield text, Box(*(float(value) / figure.dpi for value in extent.extents))


@pytest.mark.parametrize("genotype", [published("nasnet"), random_genotype(3), random_genotype(4)])
def test_written_labels_fit_into_their_boxes(genotype):
    figure = draw_genotype(genotype, "A title of a picture that is wrapped in a narrow one " * 2)
    characters = max(12, *map(len, genotype.primitives))
    cells = [
        layout_cell(genotype.normal, genotype.normal_concat, characters),
        layout_cell(genotype.reduce, genotype.reduce_concat, characters),
    ]
    total = figure.get_size_inches()[1]
    legend = figure.axes[-1].get_position().height * total
    offsets = [cells[1].height + legend, legend]
    room = [
        (name, box.left, box.bottom + offset, box.right, box.top + offset)
        for cell, offset in zip(cells, offsets, strict=True)
        for name, box in [(wire.primitive, wire.label) for wire in cell.edges]
    ]
    written = list(texts_and_extents(figure))
    for _, box in written:
        assert box.left >= 0
        assert box.bottom >= 0
        assert box.right <= figure.get_size_inches()[0]
        assert box.top <= total
    inside = [
        name
        for name, left, bottom, right, top in room
        if any(
            text.get_text() == name
            and left < box.left
            and box.right < right
            and bottom < box.bottom
            and box.top < top
            for text, box in written
        )
    ]
    assert inside == [name for name, _ in genotype.normal + genotype.reduce]
    for (_, a), (_, b) in itertools.combinations(written, 2):
        assert not overlap(a, b)


def test_genotypes_side_by_side_have_one_grid_and_one_legend():
    names = ["darts_v1", "nasnet", "darts_v2", "snas", "amoebanet"]
    figure = draw_genotypes([(name, published(name)) for name in names])
    written = [(text.get_text(), box) for text, box in texts_and_extents(figure)]
    for (_, a), (_, b) in itertools.combinations(written, 2):
        assert not overlap(a, b)
    titles = {text: box for text, box in written if text in names}
    assert list(titles) == names
    rows = [{titles[name].top for name in row} for row in (names[:3], names[3:])]
    assert [len(tops) for tops in rows] == [1, 1]
    legend = [text.get_text() for text in figure.axes[-1].texts]
    used = {primitive for name in names for primitive in published(name).primitives}
    assert legend == [primitive for primitive in COLORS if primitive in used]
    for line, primitive in zip(figure.axes[-1].lines, legend, strict=True):
        assert line.get_color() == COLORS[primitive]


@pytest.mark.parametrize("name", ["darts_v2", "amoebanet"])
def test_the_picture_holds_one_arrow_per_edge_and_concatenated_node(name, tmp_path):
    genotype = published(name)
    svg = save_figure(draw_genotype(genotype), tmp_path / "cells")[1].read_text()
    for kind in ("normal", "reduce"):
        edges, concat = getattr(genotype, kind), getattr(genotype, f"{kind}_concat")
        drawn = re.findall(rf'id="{kind}-edge-(\d+)"', svg)
        assert drawn == [str(i) for i in range(len(edges))]
        assert re.findall(rf'id="{kind}-concat-(\d+)"', svg) == [str(node) for node in concat]


def test_nodes_have_the_numbers_of_the_genotype():
    genotype = published("darts_v2")
    names = ("0: $c_{k-2}$", "1: $c_{k-1}$", "2", "3", "4", "5", "$c_{k}$")
    figure = draw_genotype(genotype)
    extents = [(text.get_text(), box) for text, box in texts_and_extents(figure)]
    for name, node in zip(names, cell_layouts(genotype)["normal"].nodes, strict=True):
        found = [box for text, box in extents if text == name]
        assert len(found) == 2  # the normal cell's and the reduction cell's
        assert all(box.right - box.left < node.right - node.left - 0.05 for box in found)


STRENGTHS = {
    "normal": torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]], requires_grad=True),
    "reduce": torch.tensor([[1.0, 0.0, 0.0], [0.33, 0.33, 0.34]], dtype=torch.bfloat16),
}
SPACE = SearchSpace(("none", "skip_connect", "sep_conv_3x3"), num_intermediate_nodes=1)


def test_heat_maps_hold_names_and_values():
    figure = draw_strengths(STRENGTHS, SPACE, "alpha")
    assert [axes.get_title() for axes in figure.axes[:2]] == ["Normal cell", "Reduction cell"]
    # The maps stand side by side and share the names of their rows.
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows == ["node 2 <- node 0", "node 2 <- node 1"]
    for axes in figure.axes[:2]:
        columns = [label.get_text() for label in axes.get_xticklabels()]
        assert columns == ["none", "skip_connect", "sep_conv_3x3"]
    written = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert written == {
        (0, 0): "0.25", (1, 0): "0.50", (2, 0): "0.25",
        (0, 1): "0.10", (1, 1): "0.20", (2, 1): "0.70",
    }  # fmt: skip
    image = figure.axes[1].images[0]
    assert image.get_array().tolist()[0] == [1.0, 0.0, 0.0]


def test_both_heat_maps_have_one_colour_scale():
    figure = draw_strengths(STRENGTHS, SPACE)
    assert [axes.images[0].get_clim() for axes in figure.axes[:2]] == [(0.0, 1.0)] * 2


def test_values_stand_out_from_their_field():
    space = SearchSpace()
    steps = torch.linspace(0, 1, 14 * 8).reshape(14, 8)
    figure = draw_strengths({"normal": steps, "reduce": steps}, space)
    axes = figure.axes[0]
    fields = axes.images[0].to_rgba(steps.numpy())

    def luminance(color) -> float:  # of WCAG 2
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for text in axes.texts:
        column, row = text.get_position()
        pair = luminance(fields[row, column]), luminance(matplotlib.colors.to_rgb(text.get_color()))
        assert (max(pair) + 0.05) / (min(pair) + 0.05) > 4.4  # AA asks for 4.5


@pytest.mark.parametrize("num_nodes", [1, 4, 7])
def test_heat_maps_stay_within_the_picture(num_nodes):
    space = SearchSpace(num_intermediate_nodes=num_nodes)
    weights = torch.full((len(space.edges), len(space.primitives)), 0.125)
    figure = draw_strengths({"normal": weights, "reduce": weights}, space, "Edge weights")
    tight = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
    width, height = figure.get_size_inches()
    assert tight.x0 >= 0
    assert tight.y0 >= 0
    assert tight.x1 <= width
    assert tight.y1 <= height


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_degenerate_weights_are_drawn_without_a_warning(value, tmp_path):
    weights = torch.full((2, 3), value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_strengths({"normal": weights, "reduce": weights}, SPACE)
        save_figure(figure, tmp_path / "strengths")
    assert {text.get_text() for text in figure.axes[0].texts} == {f"{value:.2f}"}


def found(seed: int) -> tuple[Genotype, dict[str, torch.Tensor]]:
    """What an epoch of a search finds."""
    generator, space = torch.Generator().manual_seed(seed), SearchSpace()
    shape = len(space.edges), len(space.primitives)
    strengths = {
        kind: torch.randn(shape, generator=generator).softmax(1) for kind in ("normal", "reduce")
    }
    return discretize(strengths, space), strengths


def test_only_what_changes_moves_in_an_animation(tmp_path):
    genotypes, strengths = zip(*map(found, range(3)), strict=True)
    space = SearchSpace()
    figures = list(draw_epochs(genotypes, strengths, space))
    boxes = [[axes.get_position().bounds for axes in figure.axes] for figure in figures]
    assert boxes[0] == boxes[1] == boxes[2]
    legends = {tuple(text.get_text() for text in figure.axes[2].texts) for figure in figures}
    assert len(legends) == 1
    scales = {axes.images[0].get_clim() for figure in figures for axes in figure.axes[3:]}
    assert len(scales) == 1
    assert [figure.texts[0].get_text() for figure in figures] == [
        f"Epoch {number} of 3" for number in (1, 2, 3)
    ]
    for figure in figures:
        written = list(texts_and_extents(figure))
        for (_, a), (_, b) in itertools.combinations(written, 2):
            assert not overlap(a, b)

    fewer = draw_epochs(genotypes, strengths, space, max_pictures=2)
    assert [figure.texts[0].get_text() for figure in fewer] == ["Epoch 1 of 3", "Epoch 3 of 3"]

    path = save_animation(figures, tmp_path / "new" / "search.gif", seconds=0.2)
    with Image.open(path) as animation:
        assert animation.n_frames == 3
        assert animation.info["loop"] == 0
        durations, frames = [], []
        for index in range(3):
            animation.seek(index)
            durations.append(animation.info["duration"])
            frames.append(np.asarray(animation.convert("RGB")).copy())
    assert durations == [200, 200, 3000]
    assert all((frame[0, 0] == 255).all() for frame in frames)
    # A node stands where it stood, pixel for pixel.
    node = cell_layouts(genotypes[0])["normal"].nodes[3]
    height, dpi = figures[0].get_size_inches()[1], 100
    lower = figures[0].axes[0].get_position().y0 * height
    rows = slice(int((height - lower - node.top) * dpi), int((height - lower - node.bottom) * dpi))
    columns = slice(int((node.left + 0.1) * dpi), int((node.right - 0.1) * dpi))
    parts = [frame[rows, columns] for frame in frames]
    assert (parts[0] < 100).any()  # its number
    assert all((part == parts[0]).all() for part in parts)


def test_weights_of_another_space_are_refused():
    with pytest.raises(UserError, match=r"reduce cell's strengths have the shape \(2, 2\)"):
        draw_strengths(STRENGTHS | {"reduce": torch.zeros(2, 2)}, SPACE)


def test_files_are_named_after_the_whole_path(tmp_path):
    figure = draw_strengths(STRENGTHS, SPACE)
    folder = tmp_path / "run_1.5"
    paths = save_figure(figure, str(folder / "cells_0.5"))
    assert paths == [folder / "cells_0.5.png", folder / "cells_0.5.svg"]
    assert sorted(folder.iterdir()) == paths
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in paths[1].read_text()


def test_the_same_picture_gives_the_same_bytes_whatever_the_matplotlibrc(tmp_path):
    first = save_figure(draw_genotype(published("darts_v1"), "DARTS"), tmp_path / "a")
    figure = draw_genotype(published("darts_v1"), "DARTS")
    with matplotlib.rc_context(
        {"font.size": 20, "savefig.facecolor": "red", "svg.fonttype": "none", "axes.grid": True}
    ):
        second = save_figure(figure, tmp_path / "b")
        third = save_figure(draw_genotype(published("darts_v1"), "DARTS"), tmp_path / "c")
    for one, *others in zip(first, second, third, strict=True):
        assert all(one.read_bytes() == other.read_bytes() for other in others)


def test_drawing_leaves_the_settings_alone(tmp_path):
    with matplotlib.rc_context({"font.size": 17, "svg.hashsalt": "mine"}):
        save_figure(draw_genotype(published("darts_v1")), tmp_path / "cells")
        assert matplotlib.rcParams["font.size"] == 17
        assert matplotlib.rcParams["svg.hashsalt"] == "mine"


def test_a_failed_write_leaves_the_old_picture_and_no_other_file(tmp_path):
    figure = draw_strengths(STRENGTHS, SPACE)
    paths = save_figure(figure, tmp_path / "picture")
    before = [path.read_bytes() for path in paths]

    def fail(target, **_):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    figure.savefig = fail
    with pytest.raises(UserError, match="disk full"):
        save_figure(figure, tmp_path / "picture")
    assert [path.read_bytes() for path in paths] == before
    assert sorted(tmp_path.iterdir()) == paths
