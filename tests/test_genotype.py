"""Genotypes as data: what is read, what is written, what is refused, and the published cells."""

import contextlib
import dataclasses
import os

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dartsl.errors import UserError
from dartsl.genotype import Genotype, published
from dartsl.networks import FinalNetwork
from dartsl.operations import OPERATIONS

# As the official code lists them (quark0/darts, cnn/genotypes.py).
DARTS_V1 = (
    "Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0), "
    "('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), "
    "('skip_connect', 2)], normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), "
    "('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 0), ('max_pool_3x3', 0), "
    "('skip_connect', 2), ('skip_connect', 2), ('avg_pool_3x3', 0)], reduce_concat=[2, 3, 4, 5])"
)
DARTS_V2 = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), "
    "('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), "
    "('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), "
    "('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), "
    "('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])"
)

# All shipped cells in shorthand: two edges a node, "sep3:0" is sep_conv_3x3 from node 0; the
# concatenated nodes follow the bar. Typed by hand, so that a slip in conf/genotype shows.
SHORT = {
    "max": "max_pool_3x3",
    "avg": "avg_pool_3x3",
    "skip": "skip_connect",
    "sep3": "sep_conv_3x3",
    "sep5": "sep_conv_5x5",
    "sep7": "sep_conv_7x7",
    "dil3": "dil_conv_3x3",
    "dil5": "dil_conv_5x5",
    "c71": "conv_7x1_1x7",
}
PUBLISHED = {
    "nasnet": (
        "sep5:1 sep3:0 sep5:0 sep3:0 avg:1 skip:0 avg:0 avg:0 sep3:1 skip:1 | 2 3 4 5 6",
        "sep5:1 sep7:0 max:1 sep7:0 avg:1 sep5:0 skip:3 avg:2 sep3:2 max:1 | 4 5 6",
    ),
    "amoebanet": (
        "avg:0 max:1 sep3:0 sep5:2 sep3:0 avg:3 sep3:1 skip:1 skip:0 avg:1 | 4 5 6",
        "avg:0 sep3:1 max:0 sep7:2 sep7:0 avg:1 max:0 max:1 c71:0 sep3:5 | 3 4 6",
    ),
    "darts_v1": (
        "sep3:1 sep3:0 skip:0 sep3:1 skip:0 sep3:1 sep3:0 skip:2 | 2 3 4 5",
        "max:0 max:1 skip:2 max:0 max:0 skip:2 skip:2 avg:0 | 2 3 4 5",
    ),
    "darts_v2": (
        "sep3:0 sep3:1 sep3:0 sep3:1 sep3:1 skip:0 skip:0 dil3:2 | 2 3 4 5",
        "max:0 max:1 skip:2 max:1 max:0 skip:2 skip:2 max:1 | 2 3 4 5",
    ),
    "pc_darts_cifar": (
        "sep3:1 skip:0 sep3:0 dil3:1 sep5:0 sep3:1 avg:0 dil3:1 | 2 3 4 5",
        "sep5:1 max:0 sep5:1 sep5:2 sep3:0 sep3:3 sep3:1 sep3:2 | 2 3 4 5",
    ),
    "pc_darts_imagenet": (
        "skip:1 sep3:0 sep3:0 skip:1 sep3:1 sep3:3 sep3:1 dil5:4 | 2 3 4 5",
        "sep3:0 skip:1 dil5:2 max:1 sep3:2 sep3:1 sep5:0 sep3:3 | 2 3 4 5",
    ),
    "p_darts": (
        "skip:0 dil3:1 skip:0 sep3:1 sep3:1 sep3:3 sep3:0 dil5:4 | 2 3 4 5",
        "avg:0 sep5:1 sep3:0 dil5:2 max:0 dil3:1 dil3:1 dil5:3 | 2 3 4 5",
    ),
    "snas": (
        "sep3:0 sep3:1 skip:0 dil3:1 skip:1 skip:0 skip:0 sep3:1 | 2 3 4 5",
        "max:0 max:1 max:1 skip:2 skip:2 max:1 max:0 dil5:2 | 2 3 4 5",
    ),
    "drnas_cifar10": (
        "sep3:0 sep5:1 sep3:1 sep3:2 skip:0 sep3:1 sep3:2 dil5:3 | 2 3 4 5",
        "max:0 sep5:1 dil5:2 sep5:1 sep5:1 dil5:3 skip:4 sep5:1 | 2 3 4 5",
    ),
    "drnas_imagenet": (
        "sep3:1 sep3:0 sep3:0 sep3:1 sep3:0 dil3:3 skip:0 sep3:1 | 2 3 4 5",
        "max:0 sep3:1 sep3:0 skip:2 sep3:0 sep3:2 sep3:3 sep3:1 | 2 3 4 5",
    ),
    "shapley_nas_cifar10": (
        "sep3:0 sep3:1 sep3:1 dil3:0 dil3:2 skip:3 sep3:1 dil5:3 | 2 3 4 5",
        "sep3:1 max:0 dil5:2 sep3:0 sep3:2 max:0 dil3:3 skip:2 | 2 3 4 5",
    ),
    "shapley_nas_imagenet": (
        "sep3:1 sep5:0 dil5:2 skip:1 sep3:2 sep5:0 sep3:1 skip:2 | 2 3 4 5",
        "sep3:1 dil3:0 avg:2 sep5:1 sep3:3 skip:1 sep3:2 sep3:4 | 2 3 4 5",
    ),
}

# A cell of one node: the smallest text to spoil.
SMALL = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1)], normal_concat=[2], "
    "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1)], reduce_concat=[2])"
)


def small(**changes) -> Genotype:
    edges = [("sep_conv_3x3", 0), ("skip_connect", 1)]
    fields = {"normal": edges, "normal_concat": [2], "reduce": edges, "reduce_concat": [2]}
    return Genotype(**(fields | changes))


def from_shorthand(normal: str, reduce: str) -> Genotype:
    fields = []
    for cell in (normal, reduce):
        edges, concat = cell.split("|")
        pairs = [edge.split(":") for edge in edges.split()]
        fields.append(tuple((SHORT[short], int(source)) for short, source in pairs))
        fields.append(tuple(map(int, concat.split())))
    return Genotype(*fields)


# The object


def test_a_genotype_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        published("darts_v2").normal = ()  # type: ignore[misc]


def test_equal_genotypes_have_equal_hashes() -> None:
    lists = small(normal=[["sep_conv_3x3", 0], ["skip_connect", 1]])
    assert lists == small()
    assert len({lists, small(), published("darts_v1")}) == 2


def test_fields_are_tuples_whatever_they_were_given_as() -> None:
    genotype = small(normal=[["sep_conv_3x3", 0], ["skip_connect", 1]], normal_concat=range(2, 3))
    assert genotype.normal == (("sep_conv_3x3", 0), ("skip_connect", 1))
    assert genotype.normal_concat == (2,)


def test_primitives_are_those_of_both_cells() -> None:
    assert Genotype.parse(SMALL).primitives == {"sep_conv_3x3", "skip_connect", "max_pool_3x3"}


# The official notation


@pytest.mark.parametrize(("text", "name"), [(DARTS_V1, "darts_v1"), (DARTS_V2, "darts_v2")])
def test_the_official_notation(text, name) -> None:
    assert Genotype.parse(text) == published(name)


@pytest.mark.parametrize(
    "text",
    [
        f"DARTS_V2 = {DARTS_V2}",
        f"DARTS = DARTS_V2 = {DARTS_V2}",
        f"11/05 03:11:35 PM genotype = {DARTS_V2}",
        f"  \n\t{DARTS_V2}  \n",
        f"{DARTS_V2}\n11/05 03:11:36 PM train 000 2.3e+00 (what follows is not read",
        DARTS_V2.replace("[2, 3, 4, 5]", "range(2, 6)"),
        DARTS_V2.replace("[2, 3, 4, 5]", "list(range(2, 6))"),
        DARTS_V2.replace("[2, 3, 4, 5]", "(2, 3, 4, 5)"),
        DARTS_V2.replace(" ", "\n    "),
        DARTS_V2.replace(" ", ""),
        DARTS_V2.replace("'", '"'),
        DARTS_V2.replace("normal=", "").replace("normal_concat=", ""),
        DARTS_V2.replace("[2, 3, 4, 5]", "tuple(range(2, 6))"),
        DARTS_V2.replace("Genotype(", "genotype = Genotype ("),
    ],
    ids=[
        "assignment",
        "two names",
        "log line",
        "surrounded",
        "followed",
        "range",
        "list of range",
        "tuple",
        "lines",
        "no spaces",
        "double quotes",
        "positional",
        "tuple of range",
        "space before the bracket",
    ],
)
def test_the_official_notation_as_it_is_met(text) -> None:
    assert Genotype.parse(text) == published("darts_v2")


@pytest.mark.parametrize("line", ["11/05 03:11:35 PM genotype = {}", "genotype = {}", "{}"])
def test_of_the_log_of_a_search_the_last_one_counts(line) -> None:
    between = "\n11/05 03:11:36 PM train_acc 40.1 (what else a log says\n"
    assert Genotype.parse(between.join(map(line.format, [DARTS_V1, DARTS_V1, DARTS_V2]))) == (
        published("darts_v2")
    )


def test_numbers_of_numpy_are_numbers(tmp_path) -> None:
    genotype = published("darts_v2")
    edges, concat = (tuple((name, np.int64(n)) for name, n in genotype.normal), np.arange(2, 6))
    same = dataclasses.replace(genotype, normal=edges, normal_concat=concat)
    same.save(tmp_path / "x.yaml")
    assert same == Genotype.load(tmp_path / "x.yaml") == genotype


def test_names_of_numpy_are_names(tmp_path) -> None:
    genotype = published("darts_v2")
    edges = [(np.str_(name), n) for name, n in genotype.normal]
    same = dataclasses.replace(genotype, normal=edges)
    same.save(tmp_path / "x.yaml")
    assert same == Genotype.load(tmp_path / "x.yaml") == genotype
    assert Genotype.parse(same.notation()) == genotype


def test_the_log_of_a_whole_search() -> None:
    """Of 50 epochs, with 8 steps and both alphas of each."""
    row = "        [0.1250, 0.1251, 0.1249, 0.1250, 0.1250, 0.1250, 0.1250, 0.1250],\n"
    step = "11/05 03:11:36 PM train 050 2.302585e+00 10.000000 50.000000\n"
    epoch = f"11/05 03:11:35 PM genotype = {{}}\ntensor([{28 * row}])\n{8 * step}"
    log = 49 * epoch.format(DARTS_V1) + epoch.format(DARTS_V2)
    assert len(log) > 150_000
    assert Genotype.parse(log) == published("darts_v2")


def test_the_last_one_of_a_log_is_whole() -> None:
    with pytest.raises(UserError, match="No genotype in"):
        Genotype.parse(f"genotype = {DARTS_V1}\ngenotype = {DARTS_V2[:99]}")


def test_of_several_names_none_is_chosen(tmp_path) -> None:
    """As in the official genotypes.py."""
    path = tmp_path / "genotypes.py"
    nasnet = published("nasnet").notation().replace(", normal_concat", ",\n  normal_concat")
    names = {"NASNet": nasnet, "DARTS_V1": DARTS_V1, "DARTS = DARTS_V2": DARTS_V2}
    path.write_text("\n\n".join(f"{name} = {text}" for name, text in names.items()))
    with pytest.raises(UserError, match=r"3 different .*NASNet, DARTS_V1, DARTS_V2") as caught:
        Genotype.load(path)
    assert str(path) in str(caught.value)
    same = f"DARTS_V2 = {DARTS_V2}\nOURS = {DARTS_V2.replace('[2, 3, 4, 5]', 'range(2, 6)')}"
    assert Genotype.parse(same) == published("darts_v2")


V2_YAML = published("darts_v2").yaml()


@pytest.mark.parametrize(
    "text",
    [
        f"# {DARTS_V1}\n{V2_YAML}",
        f"# OLD = {DARTS_V1}\n{V2_YAML}  # {DARTS_V1}",
        f"# {DARTS_V1}\nDARTS_V2 = {DARTS_V2}",
        f"DARTS_V2 = {DARTS_V2}  # was {DARTS_V1}",
        DARTS_V2.replace("reduce=", "# the other ones :)\nreduce="),
        DARTS_V2.replace("reduce=", "# (see 'below'\nreduce="),
        DARTS_V2.replace("),", "),# (it\n", 1),
        f"epoch #3 genotype = {DARTS_V2}",
        f"a normal run\nepoch # 3 genotype = {DARTS_V2}",
        f"# {DARTS_V2}",
        f"# OURS = {DARTS_V2}\n",
    ],
    ids=[
        "above a yaml",
        "around a yaml",
        "above a call",
        "behind a call",
        "closing within a call",
        "opening within a call",
        "behind a comma",
        "number",
        "number apart",
        "nothing else",
        "nothing else with a name",
    ],
)
def test_comments_do_not_count_unless_there_is_nothing_else(text, tmp_path) -> None:
    (tmp_path / "genotype.txt").write_text(text)
    assert Genotype.load(tmp_path / "genotype.txt") == published("darts_v2")


def test_repr_is_read_back() -> None:
    for name in PUBLISHED:
        assert Genotype.parse(repr(published(name))) == published(name)


# Nothing is ever evaluated


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').mkdir(MARK)",
        "().__class__.__base__.__subclasses__()",
        "[__import__('os').mkdir(MARK) for _ in range(1)]",
        "(lambda: __import__('os').mkdir(MARK))()",
        "[*map(__import__('os').mkdir, [MARK])]",
        "f'{__import__(\"os\").mkdir(MARK)}'",
        "range(__import__('os').mkdir(MARK))",
        "list(__import__('os').mkdir(MARK))",
        "eval('__import__(\"os\").mkdir(MARK)')",
        "open(MARK, 'w')",
        "(x := __import__('os').mkdir(MARK))",
        "9 ** 9 ** 9",
        "'a' * 10 ** 10",
        "range(2, 10 ** 10)",
        "range(2, 99999999999)",
        "range(2, 3, 0)",
        "range(*[2, 6])",
        "os.environ",
        "SOMETHING",
    ],
)
def test_nothing_in_a_text_is_evaluated(expression, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    expression = expression.replace("MARK", "'mark'")
    for text in (
        expression,
        f"Genotype({expression})",
        SMALL.replace("normal_concat=[2]", f"normal_concat={expression}"),
        SMALL.replace("('sep_conv_3x3', 0)", expression),
        SMALL.replace("'sep_conv_3x3'", expression),
        SMALL.replace("[2])", f"[2], **{expression})"),
    ):
        with pytest.raises(UserError):
            Genotype.parse(text)
    assert os.listdir(tmp_path) == []  # noqa: PTH208


@pytest.mark.parametrize("tag", ["!!timestamp x", "!!bool x", "!!int ''", "!!float x", "!!set 3"])
def test_yaml_tags_of_other_content_are_refused(tag) -> None:
    with pytest.raises(UserError, match="No genotype in"):
        Genotype.parse(f"normal: {tag}")


def test_yaml_tags_construct_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="No genotype in"):
        Genotype.parse("normal: !!python/object/apply:os.mkdir ['mark']")
    assert os.listdir(tmp_path) == []  # noqa: PTH208


def test_another_target_is_refused() -> None:
    with pytest.raises(UserError, match="fields"):
        Genotype.parse("_target_: os.system\n" + yaml.safe_dump(dataclasses.asdict(small())))


@pytest.mark.parametrize(
    "text",
    [
        "Genotype(" * 5_000,
        "Genotype(" + "(" * 30_000 + ")" * 30_001,
        "[" * 50_000,
        "a" * 100_001,
        "".join(f"a{i} = Genotype(\n" for i in range(100_000)),
        "Genotype(" + " " * 2_000_000,
    ],
    ids=["calls", "parentheses", "brackets", "too long", "names", "never closed"],
)
def test_texts_made_to_exhaust_the_reader_are_refused(text) -> None:
    with pytest.raises(UserError) as caught:
        Genotype.parse(text)
    assert len(str(caught.value)) < 500


@settings(database=None, derandomize=True, deadline=None)
@given(st.text())
def test_any_text_is_a_genotype_or_a_user_error(text) -> None:
    with pytest.raises(UserError):
        Genotype.parse(text)


@settings(database=None, derandomize=True, deadline=None)
@given(st.text(alphabet="Genotyp([])=,'0123 normal_concat:\n-{}&*!", max_size=80))
def test_any_text_like_a_genotype_is_one_or_a_user_error(text) -> None:
    with contextlib.suppress(UserError):
        Genotype.parse("Genotype(" + text)


# Files


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_saved_is_loaded(name, tmp_path) -> None:
    path = tmp_path / "folder" / "genotype.yaml"
    published(name).save(path)
    assert Genotype.load(path) == published(name)
    assert Genotype.load(str(path)) == published(name)
    assert os.listdir(path.parent) == ["genotype.yaml"]  # noqa: PTH208


def test_a_saved_genotype_is_a_hydra_config_of_plain_data(tmp_path) -> None:
    small().save(tmp_path / "genotype.yaml")
    assert yaml.safe_load((tmp_path / "genotype.yaml").read_text()) == {
        "_target_": "dartsl.genotype.Genotype",
        "normal": [["sep_conv_3x3", 0], ["skip_connect", 1]],
        "normal_concat": [2],
        "reduce": [["sep_conv_3x3", 0], ["skip_connect", 1]],
        "reduce_concat": [2],
    }


def test_saving_overwrites(tmp_path) -> None:
    published("nasnet").save(tmp_path / "genotype.yaml")
    small().save(tmp_path / "genotype.yaml")
    assert Genotype.load(tmp_path / "genotype.yaml") == small()


def test_a_file_may_hold_the_official_notation(tmp_path) -> None:
    (tmp_path / "genotype.txt").write_text(f"genotype = {DARTS_V1}\n")
    assert Genotype.load(tmp_path / "genotype.txt") == published("darts_v1")


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"Cannot read .*nowhere\.yaml.*No such file"):
        Genotype.load(tmp_path / "nowhere.yaml")


def test_a_folder_is_no_genotype_file(tmp_path) -> None:
    with pytest.raises(UserError, match=r"Cannot read .*directory"):
        Genotype.load(tmp_path)


def test_a_binary_file_is_no_genotype_file(tmp_path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"\x80\x02\xff\xfe")
    with pytest.raises(UserError, match=r"weights\.pt.*not a text file"):
        Genotype.load(tmp_path / "weights.pt")


@pytest.mark.parametrize("content", ["", "null", "3", "[1, 2]", "a: [", "normal: [\x00]", "hello"])
def test_a_file_without_a_genotype_is_named(content, tmp_path) -> None:
    (tmp_path / "other.yaml").write_text(content)
    with pytest.raises(UserError, match=r"other\.yaml"):
        Genotype.load(tmp_path / "other.yaml")


# Refused contents


@pytest.mark.parametrize("cell", ["normal", "reduce"])
@pytest.mark.parametrize("source", [-1, 2, 3])
def test_a_source_stands_before_its_node(source, cell) -> None:
    with pytest.raises(UserError, match=f"{cell} cell, node 2 .* from node {source};.* 0 to 1"):
        small(**{cell: [("sep_conv_3x3", 0), ("skip_connect", source)]})


def test_a_later_node_may_take_from_the_nodes_before_it() -> None:
    edges = [("sep_conv_3x3", 0), ("skip_connect", 1), ("sep_conv_3x3", 2), ("skip_connect", 2)]
    assert small(normal=edges, normal_concat=[3]).normal == tuple(edges)
    edges[2] = ("sep_conv_3x3", 3)
    with pytest.raises(UserError, match="node 3 takes 'sep_conv_3x3' from node 3"):
        small(normal=edges, normal_concat=[3])


@pytest.mark.parametrize("number", [0, 1, 3])
def test_every_node_has_two_edges(number) -> None:
    with pytest.raises(UserError, match=f"reduce cell has {number} edges; each node takes .* two"):
        small(reduce=[("skip_connect", 0)] * number)


@pytest.mark.parametrize("concat", [[0], [1, 2], [3], [2, 3], [-1], [], ["2"], [2.0], [True]])
def test_a_concat_lists_intermediate_nodes(concat) -> None:
    with pytest.raises(UserError, match=r"reduce_concat is .*lists intermediate nodes, 2 to 2"):
        small(reduce_concat=concat)


def test_a_concat_names_a_node_once() -> None:
    with pytest.raises(UserError, match=r"normal_concat names a node twice: \[2, 2\]"):
        small(normal_concat=[2, 2])


@pytest.mark.parametrize(
    "entry",
    ["sep_conv_3x3", ("sep_conv_3x3",), (0, "sep_conv_3x3"), ("a", 0, 1), ("a", "0"), ("a", True)],
)
def test_an_edge_is_a_primitive_and_a_source(entry) -> None:
    with pytest.raises(UserError, match=r"where a \[primitive, source\] belongs"):
        small(normal=[entry, ("skip_connect", 1)])


@pytest.mark.parametrize("value", [None, 3, "sep_conv_3x3", b"x", {"sep_conv_3x3": 0}])
@pytest.mark.parametrize("field", ["normal", "normal_concat", "reduce", "reduce_concat"])
def test_every_field_is_a_list(field, value) -> None:
    with pytest.raises(UserError, match="is a list"):
        small(**{field: value})


def test_a_missing_field_is_an_error() -> None:
    with pytest.raises(UserError, match="has the fields normal, normal_concat, reduce"):
        Genotype.parse("normal: [[skip_connect, 0], [skip_connect, 1]]")


def test_a_surplus_field_is_an_error() -> None:
    fields = yaml.safe_dump(dataclasses.asdict(small()) | {"attention": []})
    with pytest.raises(UserError, match="attention"):
        Genotype.parse(fields.replace("!!python/tuple", ""))


def test_a_misspelt_primitive_names_the_value_and_the_choices() -> None:
    # A genotype is plain data; the network knows the primitives.
    genotype = small(normal=[("sep_conv3x3", 0), ("skip_connect", 1)])
    with pytest.raises(UserError) as caught:
        FinalNetwork(genotype, channels=4, num_cells=2)
    message = str(caught.value)
    assert "'sep_conv3x3'. Did you mean 'sep_conv_3x3'?" in message
    assert all(primitive in message for primitive in OPERATIONS)


# The published cells


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_cell_is_as_it_was_published(name) -> None:
    assert published(name) == from_shorthand(*PUBLISHED[name])


def test_a_misspelt_name_gives_all_choices() -> None:
    with pytest.raises(UserError) as caught:
        published("dart_v2")
    message = str(caught.value)
    assert "'dart_v2'. Did you mean 'darts_v2'?" in message
    assert message.split("Choices: ")[1].rstrip(".").split(", ") == sorted(PUBLISHED)


@pytest.mark.parametrize("name", ["", "from_file", "darts_v2.yaml", "../data/cifar10"])
def test_what_is_no_cell_is_not_published(name) -> None:
    with pytest.raises(UserError, match="Unknown genotype"):
        published(name)


def test_the_distance_counts_the_edges_that_the_other_has_not() -> None:
    edges = (("sep_conv_3x3", 0), ("skip_connect", 1), ("sep_conv_3x3", 0), ("skip_connect", 1))
    genotype = Genotype(edges, (2, 3), edges, (2, 3))

    def distance(**changes: object) -> int:
        other = dataclasses.replace(genotype, **changes)
        assert genotype.distance(other) == other.distance(genotype)
        return genotype.distance(other)

    assert distance() == 0
    assert distance(normal=(edges[1], edges[0], *edges[2:])) == 0  # a node's two have no order
    assert distance(normal=(*edges[:2], ("skip_connect", 2), edges[3])) == 1
    assert distance(normal=(*edges[:2], ("sep_conv_3x3", 0), ("sep_conv_3x3", 0))) == 1
    assert distance(normal=(("skip_connect", 0), ("sep_conv_3x3", 1), *edges[2:])) == 2
    assert distance(reduce=(("max_pool_3x3", 0),) * 4) == 4
    assert published("darts_v1").distance(published("darts_v2")) == 5
