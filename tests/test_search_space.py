"""The search space, and from edge weights to a genotype (section 2.4 of arXiv:1806.09055)."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dartsl.errors import UserError
from dartsl.genotype import Genotype
from dartsl.operations import OPERATIONS
from dartsl.search_space import DARTS_PRIMITIVES, SearchSpace, discretize, random_genotype

NONE, MAX, AVG, SKIP, SEP3, SEP5, DIL3, DIL5 = range(8)


def weak(space: SearchSpace) -> torch.Tensor:
    """Edge weights [E, P] in which everything is equally weak."""
    return torch.full((len(space.edges), len(space.primitives)), 0.01, dtype=torch.float64)


def normal(strengths: torch.Tensor, space: SearchSpace) -> tuple:
    """The edges that `discretize` gives these strengths."""
    return discretize({"normal": strengths, "reduce": weak(space)}, space).normal


# The space


def test_the_paper_space() -> None:
    space = SearchSpace()
    assert space.primitives == DARTS_PRIMITIVES
    assert DARTS_PRIMITIVES == (
        "none",
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    )
    assert space.num_intermediate_nodes == 4


def test_edges_stand_in_the_official_row_order() -> None:
    sources = {2: [0, 1], 3: [0, 1, 2], 4: [0, 1, 2, 3], 5: [0, 1, 2, 3, 4]}
    expected = tuple((node, source) for node in sources for source in sources[node])
    assert SearchSpace().edges == expected
    assert len(expected) == 14


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 7])
def test_a_node_has_one_edge_from_every_node_before_it(nodes) -> None:
    edges = SearchSpace(num_intermediate_nodes=nodes).edges
    assert len(edges) == sum(range(2, nodes + 2))
    assert set(edges) == {(node, source) for node in range(2, nodes + 2) for source in range(node)}


def test_a_space_is_frozen_and_hashable() -> None:
    space = SearchSpace(["skip_connect"], 2)  # type: ignore[arg-type]
    assert space == SearchSpace(("skip_connect",), 2)
    assert hash(space) == hash(SearchSpace(("skip_connect",), 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        space.num_intermediate_nodes = 3  # type: ignore[misc]


def test_a_misspelt_primitive_names_the_value_and_the_choices() -> None:
    with pytest.raises(UserError) as caught:
        SearchSpace(("none", "sep_conv_3x4"))
    message = str(caught.value)
    assert "'sep_conv_3x4'" in message
    assert "Did you mean 'sep_conv_3x3'?" in message
    assert all(primitive in message for primitive in OPERATIONS)


def test_a_primitive_stands_once() -> None:
    with pytest.raises(UserError, match="twice"):
        SearchSpace(("none", "skip_connect", "skip_connect"))


@pytest.mark.parametrize("primitives", [(), ("none",)])
def test_something_other_than_none_is_left_to_choose(primitives) -> None:
    with pytest.raises(UserError, match="other than 'none'"):
        SearchSpace(primitives)


def test_primitives_may_be_names_of_numpy() -> None:
    space = SearchSpace(np.array(["none", "skip_connect"]), 2)  # type: ignore[arg-type]
    assert space == SearchSpace(("none", "skip_connect"), 2)
    assert {type(primitive) for primitive in space.primitives} == {str}


@pytest.mark.parametrize("nodes", [0, -1, 2.5, 2.0, True, "4"])
def test_the_nodes_of_a_cell_are_a_whole_number_from_1_on(nodes) -> None:
    with pytest.raises(UserError, match=f"num_intermediate_nodes is {nodes!r}; it is a whole"):
        SearchSpace(num_intermediate_nodes=nodes)


# Discretisation


def test_each_node_keeps_its_two_strongest_edges_strongest_first() -> None:
    space = SearchSpace()
    strengths = weak(space)
    for node, source, primitive, strength in [
        (2, 0, SEP3, 0.2),
        (2, 1, SKIP, 0.5),  # stronger: comes first
        (3, 2, DIL5, 0.4),
        (3, 0, MAX, 0.3),
        (3, 1, SEP5, 0.2),  # the third of its node: dropped
        (4, 1, AVG, 0.3),
        (4, 3, DIL3, 0.2),
        (5, 3, SEP3, 0.3),
        (5, 4, SEP3, 0.6),
    ]:
        strengths[space.edges.index((node, source)), primitive] = strength
    assert normal(strengths, space) == (
        ("skip_connect", 1),
        ("sep_conv_3x3", 0),
        ("dil_conv_5x5", 2),
        ("max_pool_3x3", 0),
        ("avg_pool_3x3", 1),
        ("dil_conv_3x3", 3),
        ("sep_conv_3x3", 4),
        ("sep_conv_3x3", 3),
    )


def test_the_two_kinds_of_cell_are_read_apart() -> None:
    space = SearchSpace(num_intermediate_nodes=1)
    strengths = {"normal": weak(space), "reduce": weak(space)}
    strengths["normal"][:, SEP3] = 0.5
    strengths["reduce"][:, MAX] = 0.5
    genotype = discretize(strengths, space)
    assert genotype.normal == (("sep_conv_3x3", 0), ("sep_conv_3x3", 1))
    assert genotype.reduce == (("max_pool_3x3", 0), ("max_pool_3x3", 1))


def test_none_is_never_chosen() -> None:
    space = SearchSpace()
    strengths = weak(space)
    strengths[:, NONE] = 0.9
    strengths[:, DIL3] = 0.02
    assert {primitive for primitive, _ in normal(strengths, space)} == {"dil_conv_3x3"}


def test_none_does_not_make_an_edge_strong() -> None:
    space = SearchSpace(num_intermediate_nodes=2)
    strengths = weak(space)
    strengths[space.edges.index((3, 0)), NONE] = 0.9
    strengths[space.edges.index((3, 1)), SEP3] = 0.2
    strengths[space.edges.index((3, 2)), SEP5] = 0.3
    assert normal(strengths, space)[2:] == (("sep_conv_5x5", 2), ("sep_conv_3x3", 1))


@pytest.mark.parametrize("position", [1, 3])
def test_none_is_excluded_wherever_it_stands(position) -> None:
    primitives = ["skip_connect", "max_pool_3x3", "sep_conv_3x3"]
    primitives.insert(position, "none")
    space = SearchSpace(tuple(primitives), 1)
    strengths = weak(space)
    strengths[:, position] = 0.9
    assert normal(strengths, space) == (("skip_connect", 0), ("skip_connect", 1))


def test_a_space_without_none() -> None:
    space = SearchSpace(("skip_connect", "sep_conv_3x3"), 1)
    strengths = torch.tensor([[0.4, 0.6], [0.3, 0.7]])
    genotype = discretize({"normal": strengths, "reduce": 1 - strengths}, space)
    assert genotype.normal == (("sep_conv_3x3", 1), ("sep_conv_3x3", 0))
    assert genotype.reduce == (("skip_connect", 1), ("skip_connect", 0))


def test_ties_go_to_the_lowest_edge_and_the_lowest_primitive() -> None:
    space = SearchSpace()
    assert normal(weak(space), space) == (("max_pool_3x3", 0), ("max_pool_3x3", 1)) * 4


def test_a_tie_for_the_second_place_goes_to_the_lower_edge() -> None:
    space = SearchSpace()
    strengths = weak(space)
    for source, strength in ((0, 0.2), (1, 0.3), (2, 0.2), (3, 0.3)):
        strengths[space.edges.index((4, source)), SEP5] = strength
    assert normal(strengths, space)[4:6] == (("sep_conv_5x5", 1), ("sep_conv_5x5", 3))
    strengths[space.edges.index((4, 1)), SEP5] = 0.0
    assert normal(strengths, space)[4:6] == (("sep_conv_5x5", 3), ("sep_conv_5x5", 0))


def test_ranking_raw_alphas_gives_another_answer() -> None:
    """The softmax sees how decided an edge is, the raw alpha does not."""
    space = SearchSpace(num_intermediate_nodes=2)
    alpha = torch.full((5, 8), -10.0, dtype=torch.float64)
    undecided, decided, other = (space.edges.index((3, source)) for source in range(3))
    alpha[undecided] = 3.0  # the highest alphas, but eight equal ones: 1/8 each
    alpha[decided, SEP3] = 2.0
    alpha[other, SEP5] = 1.0
    strengths = torch.softmax(alpha, dim=-1)
    assert normal(strengths, space)[2:] == (("sep_conv_3x3", 1), ("sep_conv_5x5", 2))
    assert normal(alpha, space)[2:] == (("max_pool_3x3", 0), ("sep_conv_3x3", 1))


def test_the_softmax_is_over_none_too() -> None:
    """An edge that would rather be nothing is weak."""
    space = SearchSpace(num_intermediate_nodes=2)
    alpha = torch.zeros(5, 8, dtype=torch.float64)
    for source, none, sep in ((0, 5.0, 2.0), (1, 0.0, 1.0), (2, 0.0, 0.5)):
        alpha[space.edges.index((3, source)), [NONE, SEP3]] = torch.tensor([none, sep]).double()
    assert normal(torch.softmax(alpha, dim=-1), space)[2:] == (
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 2),
    )
    without_none = torch.softmax(alpha[:, 1:], dim=-1)
    with_zeros = torch.cat([torch.zeros(5, 1).double(), without_none], dim=1)
    assert normal(with_zeros, space)[2] == ("sep_conv_3x3", 0)


@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_the_concat_is_all_intermediate_nodes(nodes) -> None:
    space = SearchSpace(num_intermediate_nodes=nodes)
    genotype = discretize({"normal": weak(space), "reduce": weak(space)}, space)
    assert genotype.normal_concat == genotype.reduce_concat == tuple(range(2, nodes + 2))
    assert len(genotype.normal) == len(genotype.reduce) == 2 * nodes


@pytest.mark.parametrize("shape", [(13, 8), (15, 8), (14, 7), (14, 9), (8, 14), (14,), (14, 8, 1)])
@pytest.mark.parametrize("kind", ["normal", "reduce"])
def test_strengths_of_another_shape_are_refused(kind, shape) -> None:
    space = SearchSpace()
    strengths = {"normal": weak(space), "reduce": weak(space)} | {kind: torch.ones(shape)}
    with pytest.raises(UserError, match=rf"{kind} cell.*another shape than \(14, 8\)"):
        discretize(strengths, space)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_diverged_search_has_no_genotype(value) -> None:
    space = SearchSpace()
    strengths = {"normal": weak(space), "reduce": weak(space)}
    strengths["reduce"][13, 0] = value
    with pytest.raises(UserError, match="reduce cell's strengths are not finite"):
        discretize(strengths, space)


def test_strengths_are_left_as_they_were() -> None:
    space = SearchSpace()
    strengths = torch.rand(14, 8)
    before = strengths.clone()
    discretize({"normal": strengths, "reduce": strengths}, space)
    assert torch.equal(strengths, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_strengths_of_any_floating_type(dtype) -> None:
    space = SearchSpace()
    strengths = weak(space)
    strengths[:, SEP3] = torch.arange(14) / 16 + 0.0625  # exact in every type
    chosen = normal(strengths.to(dtype), space)
    assert chosen == tuple(("sep_conv_3x3", s) for s in (1, 0, 2, 1, 3, 2, 4, 3))


def brute_force(rows: list[list[float]], primitives: list[str], nodes: int) -> list:
    """Section 2.4, by trying every pair of (edge, operation) for every place."""
    chosen = []
    start = 0
    for node in range(2, nodes + 2):
        # Ascending in (edge, primitive), so that the first of the largest is the lowest.
        candidates = [
            (rows[start + source][column], source, primitives[column])
            for source in range(node)
            for column in range(len(primitives))
            if primitives[column] != "none"
        ]
        start += node
        for _ in range(2):
            strongest = max(candidate[0] for candidate in candidates)
            _, source, primitive = next(c for c in candidates if c[0] == strongest)
            chosen.append((primitive, source))
            candidates = [c for c in candidates if c[1] != source]
    return chosen


@st.composite
def spaces_and_strengths(draw):
    names = draw(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, unique=True))
    if names == ["none"]:
        names = ["none", "skip_connect"]
    nodes = draw(st.integers(1, 5))
    numbers = sum(range(2, nodes + 2)) * len(names)

    def cell() -> list[list[int]]:
        # Of bytes, which are drawn at once. Few distinct values: ties are common.
        values = [byte % 5 for byte in draw(st.binary(min_size=numbers, max_size=numbers))]
        return [values[i : i + len(names)] for i in range(0, numbers, len(names))]

    return names, nodes, cell(), cell()


@settings(database=None, derandomize=True, deadline=None)
@given(spaces_and_strengths())
def test_against_brute_force(case) -> None:
    names, nodes, normal_rows, reduce_rows = case
    space = SearchSpace(tuple(names), nodes)
    strengths = {"normal": torch.tensor(normal_rows), "reduce": torch.tensor(reduce_rows)}
    concat = range(2, nodes + 2)
    assert discretize(strengths, space) == Genotype(
        brute_force(normal_rows, names, nodes),
        concat,
        brute_force(reduce_rows, names, nodes),
        concat,
    )


# Random genotypes


@pytest.mark.parametrize("nodes", [1, 4])
def test_a_random_genotype_is_one_of_the_space(nodes) -> None:
    space = SearchSpace(num_intermediate_nodes=nodes)
    drawn = [random_genotype(space, seed) for seed in range(300)]
    for genotype in drawn:
        assert genotype.normal_concat == genotype.reduce_concat == tuple(range(2, nodes + 2))
        for edges in (genotype.normal, genotype.reduce):
            assert len(edges) == 2 * nodes
            for node in range(nodes):
                assert edges[2 * node][1] < edges[2 * node + 1][1] < node + 2
    used = {primitive for genotype in drawn for primitive in genotype.primitives}
    assert used == set(DARTS_PRIMITIVES) - {"none"}
    pairs = [edges[-2][1] * 10 + edges[-1][1] for edges in (g.normal for g in drawn)]
    sources = (nodes + 1) * nodes // 2  # pairs of the last node's sources, all equally likely
    assert len(set(pairs)) == sources
    assert max(pairs.count(pair) for pair in set(pairs)) < 300 / sources * 2 + 1


def test_a_seed_gives_one_genotype() -> None:
    space = SearchSpace()
    assert random_genotype(space, 3) == random_genotype(space, 3)
    assert len({repr(random_genotype(space, seed)) for seed in range(20)}) == 20


def test_primitives_may_come_one_by_one() -> None:
    names = ("none", "skip_connect")
    assert SearchSpace(iter(names)).primitives == names  # type: ignore[arg-type]


def test_strengths_of_one_cell_are_refused() -> None:
    space = SearchSpace()
    with pytest.raises(UserError, match=r"reduce cell.*another shape than \(14, 8\)"):
        discretize({"normal": weak(space)}, space)


def test_a_single_name_is_no_list_of_primitives() -> None:
    with pytest.raises(UserError, match="a list of names, not 'none'"):
        SearchSpace("none")  # type: ignore[arg-type]
