"""The derived network: its counts, its structure, auxiliary head and drop path (section 3.1.2)."""

import pytest
import torch
from torch import Tensor, nn

import dartsl.networks.final
from dartsl.errors import UserError
from dartsl.genotype import Genotype, published
from dartsl.networks import Cell, FinalNetwork
from dartsl.operations import OPERATIONS, FactorizedReduce, ReLUConvBN
from tests.networks.test_supernet import count, multiply_adds
from tests.test_genotype import PUBLISHED


def on_meta(name: str, *sizes: int, **options) -> FinalNetwork:
    with torch.device("meta"):
        return FinalNetwork(published(name), *sizes, **options)


def small(genotype: str | Genotype = "darts_v2", **changes) -> FinalNetwork:
    torch.manual_seed(0)
    if isinstance(genotype, str):
        genotype = published(genotype)
    return FinalNetwork(genotype, **({"channels": 4, "num_cells": 3, "num_classes": 5} | changes))


def images(size: int = 16, batch: int = 4, channels: int = 3, **kwargs) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, size, size, generator=generator, **kwargs)


# Counts


@pytest.mark.parametrize(
    ("name", "parameters", "without_head", "cost"),
    [
        ("nasnet", 4_288_944, 3_830_950, 603_452_448),
        ("amoebanet", 3_603_072, 3_145_078, 488_931_552),
        ("darts_v1", 3_645_840, 3_169_414, 500_987_520),
        ("darts_v2", 3_825_768, 3_349_342, 528_359_040),
    ],
)
def test_counts_on_cifar(name, parameters, without_head, cost) -> None:
    network = on_meta(name)
    assert count(network.parameters()) == parameters
    assert count(network.auxiliary_head.parameters()) == parameters - without_head
    assert multiply_adds(network, 3, 32, 32) == cost
    assert count(on_meta(name, auxiliary=False).parameters()) == without_head


@pytest.mark.parametrize(
    ("name", "parameters", "without_head", "cost"),
    [
        ("darts_v2", 5_979_528, 4_718_752, 529_911_552),
        ("darts_v1", 5_771_208, 4_510_432, 505_864_704),
        ("nasnet", 6_800_520, 5_564_320, 604_031_616),
        ("amoebanet", 5_863_560, 4_627_360, 526_746_624),
    ],
)
def test_counts_on_imagenet(name, parameters, without_head, cost) -> None:
    network = on_meta(name, 48, 14, 1000, stem="imagenet")
    assert count(network.parameters()) == parameters
    assert count(network.auxiliary_head.parameters()) == parameters - without_head
    assert multiply_adds(network, 3, 224, 224) == cost


# Structure


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_shipped_cell_trains(name) -> None:
    network = small(name)
    logits, auxiliary = network(images())
    assert logits.shape == auxiliary.shape == (4, 5)
    (logits.sum() + auxiliary.sum()).backward()
    assert torch.isfinite(logits).all()
    # What the concatenation leaves out (AmoebaNet, NASNet) may still feed another node.
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(("num_cells", "reductions"), [(20, {6, 13}), (14, {4, 9}), (8, {2, 5})])
def test_reduction_cells_halve_the_size_and_double_the_channels(num_cells, reductions) -> None:
    network = on_meta("darts_v2", 4, num_cells)
    shapes: list[tuple[int, ...]] = []
    for cell in network.cells:
        cell.register_forward_hook(lambda *arguments: shapes.append(tuple(arguments[2].shape[1:])))
    network(torch.empty(2, 3, 32, 32, device="meta"))
    for index, shape in enumerate(shapes):
        depth = sum(reduction <= index for reduction in reductions)
        assert shape == (4 * 4 * 2**depth, 32 // 2**depth, 32 // 2**depth)


def test_the_first_input_is_reduced_after_a_reduction_cell() -> None:
    for stem, after_reduction in (("cifar", {3, 6}), ("imagenet", {0, 3, 6})):
        network = on_meta("darts_v2", 4, 8, stem=stem)
        for index, cell in enumerate(network.cells):
            reduced = index in after_reduction
            assert type(cell.preprocess0) is (FactorizedReduce if reduced else ReLUConvBN)
            assert type(cell.preprocess1) is ReLUConvBN


def test_stride_2_stands_on_the_edges_from_a_reduction_cells_inputs_only() -> None:
    network = small("snas")
    for cell, reduces in zip(network.cells, (False, True, True), strict=True):
        states = [torch.randn(2, cell.preprocess1.op[1].out_channels, 8, 8)] * 2
        for source, operation in zip(cell.sources, cell.operations, strict=True):
            output = operation(states[0])
            assert output.shape[-1] == (4 if reduces and source < 2 else 8)


def test_a_node_sums_two_operations_and_the_cell_concatenates_what_it_lists() -> None:
    edges = [("avg_pool_3x3", 0), ("skip_connect", 1), ("max_pool_3x3", 2), ("skip_connect", 0)]
    cell = Cell(edges, (3, 2), 6, 6, 2, reduction=False, reduction_prev=False).double().eval()
    inputs = torch.randn(2, 2, 6, 5, 5, dtype=torch.float64)
    s0, s1 = cell.preprocess0(inputs[0]), cell.preprocess1(inputs[1])
    node2 = nn.functional.avg_pool2d(s0, 3, 1, 1, count_include_pad=False) + s1
    node3 = nn.functional.max_pool2d(node2, 3, 1, 1) + s0
    assert torch.allclose(cell(*inputs, 0.0), torch.cat([node3, node2], dim=1))


def test_a_node_may_take_one_source_twice() -> None:
    """NASNet's normal cell: node 5 sums two average pools of node 0."""
    edges = [("avg_pool_3x3", 0), ("avg_pool_3x3", 0)]
    cell = Cell(edges, (2,), 6, 6, 2, reduction=False, reduction_prev=False).double().eval()
    inputs = torch.randn(2, 2, 6, 5, 5, dtype=torch.float64)
    pooled = nn.functional.avg_pool2d(cell.preprocess0(inputs[0]), 3, 1, 1, count_include_pad=False)
    assert torch.allclose(cell(*inputs, 0.0), 2 * pooled)


def test_the_cells_of_a_genotype_may_concatenate_different_nodes() -> None:
    """NASNet: five nodes out of a normal cell, three out of a reduction cell."""
    network = small("nasnet", num_cells=8)
    widths = []
    for cell in network.cells:
        cell.register_forward_hook(lambda *arguments: widths.append(arguments[2].shape[1]))
    network.eval()(images())
    assert widths == [5 * 4, 5 * 4, 3 * 8, 5 * 8, 5 * 8, 3 * 16, 5 * 16, 5 * 16]


@pytest.mark.parametrize("name", ["nasnet", "amoebanet"])
def test_five_nodes_have_ten_operations(name) -> None:
    assert all(len(cell.operations) == 10 for cell in small(name).cells)


def test_a_genotype_of_one_node() -> None:
    edges = (("skip_connect", 0), ("sep_conv_3x3", 1))
    network = small(Genotype(edges, (2,), edges, (2,)))
    assert network(images())[0].shape == (4, 5)


def test_pools_have_no_batchnorm_and_every_batchnorm_is_affine() -> None:
    network = small("darts_v1")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.affine
        if isinstance(module, nn.Sequential):
            assert not isinstance(module[0], nn.MaxPool2d | nn.AvgPool2d)


@pytest.mark.parametrize("name", ["darts_v2", "nasnet", "amoebanet"])
@pytest.mark.parametrize("size", [7, 15, 30, 31])
def test_images_of_any_size(size, name) -> None:
    logits, auxiliary = small(name, num_cells=4)(images(size, batch=2))
    assert logits.shape == auxiliary.shape == (2, 5)


def test_images_that_are_not_square() -> None:
    logits, auxiliary = small()(torch.randn(2, 3, 9, 20))
    assert logits.shape == auxiliary.shape == (2, 5)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("in_channels", [1, 4])
def test_images_of_any_number_of_channels(in_channels, stem) -> None:
    network = small(in_channels=in_channels, stem=stem)
    assert network(images(32, channels=in_channels))[0].shape == (4, 5)


def test_a_misspelt_stem_names_the_choices() -> None:
    with pytest.raises(UserError, match=r"stem 'imagenett'.*'imagenet'\? Choices: cifar, imagenet"):
        small(stem="imagenett")


@pytest.mark.parametrize("num_cells", [0, -3])
def test_a_network_has_a_cell(num_cells) -> None:
    with pytest.raises(UserError, match=f"num_cells is {num_cells}"):
        small(num_cells=num_cells)


def test_channels_are_a_whole_number() -> None:
    with pytest.raises(UserError, match=r"channels is 2\.5; it is a whole number"):
        small(channels=2.5)


# Stems


def test_the_cifar_stem_keeps_the_size_and_feeds_both_inputs() -> None:
    network = small()
    assert [type(module) for module in network.stem] == [nn.Conv2d, nn.BatchNorm2d]
    assert network.stem[0].weight.shape == (12, 3, 3, 3)
    inputs: list[tuple] = []
    network.cells[0].register_forward_hook(lambda *arguments: inputs.append(arguments[1]))
    network(images())
    assert inputs[0][0] is inputs[0][1]
    assert inputs[0][0].shape == (4, 12, 16, 16)


def test_the_imagenet_stem_divides_the_size_by_4_and_8() -> None:
    network = on_meta("darts_v2", 48, 14, 1000, stem="imagenet")
    inputs: list[tuple] = []
    network.cells[0].register_forward_hook(lambda *arguments: inputs.append(arguments[1]))
    network.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    assert inputs[0][0].shape == (1, 48, 56, 56)
    assert inputs[0][1].shape == (1, 48, 28, 28)


def test_the_imagenet_stems_layers() -> None:
    network = small(stem="imagenet")
    conv, bn, relu = nn.Conv2d, nn.BatchNorm2d, nn.ReLU
    assert [type(module) for module in network.stem0] == [conv, bn, relu, conv, bn]
    assert [type(module) for module in network.stem1] == [relu, conv, bn]
    assert network.stem0[0].weight.shape == (2, 3, 3, 3)  # half of the channels
    assert all(network.stem0[i].stride == (2, 2) for i in (0, 3))


def test_the_second_stem_does_not_change_the_first_ones_output() -> None:
    """Cell 0 takes stem0's output before the ReLU of stem1."""
    network = small(stem="imagenet").eval()
    inputs: list[tuple] = []
    network.cells[0].register_forward_hook(lambda *arguments: inputs.append(arguments[1]))
    x = images(32)
    network(x)
    assert torch.equal(inputs[0][0], network.stem0(x))
    assert (inputs[0][0] < 0).any()


# The auxiliary head


def test_the_auxiliary_head_speaks_in_training_only() -> None:
    network = small()
    assert network.train()(images())[1].shape == (4, 5)
    assert network.eval()(images())[1] is None


def test_a_network_without_an_auxiliary_head() -> None:
    network = small(auxiliary=False)
    assert network.train()(images())[1] is None
    assert not any(name.startswith("auxiliary") for name, _ in network.named_parameters())


def test_the_auxiliary_head_does_not_change_the_logits() -> None:
    network, without = small(), small(auxiliary=False)
    without.load_state_dict(network.state_dict(), strict=False)
    assert torch.equal(network.train()(images())[0], without.train()(images())[0])


@pytest.mark.parametrize(("num_cells", "position"), [(20, 13), (14, 9), (8, 5), (5, 3), (3, 2)])
def test_the_auxiliary_head_stands_after_the_second_reduction_cell(num_cells, position) -> None:
    network = on_meta("darts_v2", 4, num_cells)
    outputs, taken = [], []
    cell, head = network.cells[position], network.auxiliary_head
    cell.register_forward_hook(lambda *arguments: outputs.append(arguments[2]))
    head.register_forward_hook(lambda *arguments: taken.append(arguments[1][0]))
    network(torch.empty(2, 3, 32, 32, device="meta"))
    assert taken[0] is outputs[0]


@pytest.mark.parametrize(
    ("stem", "maps", "stride", "second_bn"), [("cifar", 8, 3, True), ("imagenet", 7, 2, False)]
)
def test_the_auxiliary_heads_layers(stem, maps, stride, second_bn) -> None:
    """ReLU, pool, conv1x1 to 128, BN, ReLU, conv2x2 to 768, BN (not on ImageNet), ReLU, linear."""
    head = small(stem=stem).auxiliary_head.double().eval()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in head.features) == (2 if second_bn else 1)
    x = torch.randn(2, 64, maps, maps, dtype=torch.float64)
    expected = nn.functional.avg_pool2d(x.relu(), 5, stride, count_include_pad=False)
    convolutions = [m for m in head.features if isinstance(m, nn.Conv2d)]
    assert [c.weight.shape[0] for c in convolutions] == [128, 768]
    assert [c.weight.shape[-1] for c in convolutions] == [1, 2]
    fresh_bn = (1 + 1e-5) ** -0.5
    expected = (nn.functional.conv2d(expected, convolutions[0].weight) * fresh_bn).relu()
    expected = nn.functional.conv2d(expected, convolutions[1].weight)
    expected = (expected * (fresh_bn if second_bn else 1)).relu().flatten(1)
    expected = expected @ head.classifier.weight.T + head.classifier.bias
    assert torch.allclose(head(x), expected)


# Drop path

SKIPS = (("skip_connect", 0), ("skip_connect", 1))
POOLS = (("max_pool_3x3", 0), ("avg_pool_3x3", 1))


def record_drop_path(network: FinalNetwork, monkeypatch) -> list[float]:
    """The probabilities with which drop path is called."""
    calls: list[float] = []

    def recorded(x: Tensor, drop_prob: float) -> Tensor:
        calls.append(drop_prob)
        return x

    monkeypatch.setattr(dartsl.networks.final, "drop_path", recorded)
    network(images(8))
    return calls


def test_drop_path_is_off_at_first() -> None:
    assert small().drop_path_prob == 0.0


@pytest.mark.parametrize("value", [1.0, -0.5, float("nan")])
def test_a_drop_path_that_is_no_probability_below_1_is_refused(value) -> None:
    network = small()
    with pytest.raises(UserError, match=f"drop_path_prob={value} must be at least 0 and below 1"):
        network.drop_path_prob = value
    assert network.drop_path_prob == 0.0


@pytest.mark.parametrize("name", ["darts_v1", "darts_v2", "nasnet", "amoebanet"])
def test_drop_path_acts_on_every_operation_but_the_identity(name, monkeypatch) -> None:
    network = small(name, num_cells=4)
    network.drop_path_prob = 0.2
    genotype = published(name)
    expected = 0
    for index in range(4):
        reduces = index in (1, 2)
        for primitive, source in genotype.reduce if reduces else genotype.normal:
            stride = 2 if reduces and source < 2 else 1
            expected += not (primitive == "skip_connect" and stride == 1)
    assert record_drop_path(network, monkeypatch) == [0.2] * expected


def test_drop_path_is_for_training_only(monkeypatch) -> None:
    network = small().eval()
    network.drop_path_prob = 0.2
    assert record_drop_path(network, monkeypatch) == []


def test_evaluation_does_not_depend_on_drop_path() -> None:
    network = small().eval()
    before = network(images())[0]
    network.drop_path_prob = 0.5
    assert torch.equal(network(images())[0], before)


def test_drop_path_drops_an_operation_for_a_whole_image() -> None:
    cell = Cell(POOLS, (2,), 4, 4, 4, reduction=False, reduction_prev=False).eval()
    torch.manual_seed(0)
    x = images(4, batch=400, channels=4)
    s0, s1 = cell.preprocess0(x), cell.preprocess1(x)
    first, second = (op(s) for op, s in zip(cell.operations, (s0, s1), strict=True))
    with torch.no_grad():
        output = cell(x, x, 0.5)
    found = []
    for keep_first in (0, 2):
        for keep_second in (0, 2):  # scaled by 1 / (1 - 0.5)
            expected = keep_first * first + keep_second * second
            match = torch.isclose(output, expected, atol=1e-6).flatten(1).all(dim=1)
            found.append(match.sum().item())
    assert sum(found) == 400  # each image is one of the four cases, drawn independently
    assert all(60 < number < 140 for number in found)


def test_drop_path_never_acts_on_the_identity() -> None:
    cell = Cell(SKIPS, (2,), 4, 4, 4, reduction=False, reduction_prev=False).eval()
    x = images(4, channels=4)
    assert torch.equal(cell(x, x, 0.9), cell(x, x, 0.0))


def test_drop_path_acts_on_a_skip_of_stride_2() -> None:
    torch.manual_seed(0)
    cell = Cell(SKIPS, (2,), 4, 4, 4, reduction=True, reduction_prev=False).eval()
    x = images(4, batch=64, channels=4)
    dropped = cell(x, x, 0.5).flatten(1).abs().sum(dim=1) == 0
    assert 4 < dropped.sum().item() < 32  # both branches: a quarter


def test_none_contributes_nothing() -> None:
    assert "none" in OPERATIONS
    edges = (("none", 0), ("skip_connect", 1))
    cell = Cell(edges, (2,), 4, 4, 4, reduction=False, reduction_prev=False).eval()
    x = images(4, channels=4)
    assert torch.equal(cell(x, x, 0.0), cell.preprocess1(x))
