"""Checkpoints of the official code, both ways, under the key names of spec.md."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.errors import UserError
from dartsl.genotype import Genotype, published
from dartsl.interop import (
    load_official_network,
    load_official_supernet,
    official_gradients,
    official_state_dict,
)
from dartsl.networks import FinalNetwork, Supernet
from dartsl.search_space import DARTS_PRIMITIVES, SearchSpace
from tests.literal_darts import Network

SHORT = ("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3")
SIZES = {  # channels, cells, classes, channels of images, nodes, stem multiplier, primitives
    "the paper's space": (2, 4, 5, 3, 4, 3, DARTS_PRIMITIVES),
    "three cells": (2, 3, 3, 1, 2, 3, SHORT),
    "six cells, a wide stem": (4, 6, 7, 2, 2, 5, ("skip_connect", "dil_conv_5x5")),
    "three nodes": (2, 5, 2, 3, 3, 1, ("avg_pool_3x3", "none", "sep_conv_5x5")),
    "what NASNet and AmoebaNet use": (2, 3, 3, 3, 2, 3, ("sep_conv_7x7", "conv_7x1_1x7", "none")),
}


def literal_network(size: str = "three cells", seed: int = 1) -> Network:
    torch.manual_seed(seed)
    channels, cells, classes, in_channels, nodes, stem, primitives = SIZES[size]
    network = Network(channels, classes, cells, in_channels, nodes, nodes, stem, primitives)
    for alpha in network.arch_parameters():
        alpha.data.normal_()
    return randomise_statistics(network.double())


def supernet_of(size: str = "three cells", seed: int = 2) -> Supernet:
    torch.manual_seed(seed)
    channels, cells, classes, in_channels, nodes, stem, primitives = SIZES[size]
    space = SearchSpace(primitives, nodes)
    return Supernet(space, channels, cells, classes, in_channels, stem).double()


def final_network(
    name: str = "darts_v2", stem: str = "cifar", seed: int = 1, **changes
) -> FinalNetwork:
    torch.manual_seed(seed)
    arguments = {"channels": 4, "num_cells": 3, "num_classes": 3, "stem": stem} | changes
    return randomise_statistics(FinalNetwork(published(name), **arguments).double())


def randomise_statistics(network):
    """BatchNorms as after a training: nothing stands at its default."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(int(torch.randint(1, 100, ())))
            if module.affine:
                module.weight.data.uniform_(0.5, 2)
                module.bias.data.normal_()
    return network


def images(in_channels: int = 3, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, in_channels, size, size, generator=generator, dtype=torch.float64)


def without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


# The supernet


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_those_of_the_literal_supernet(size) -> None:
    found = official_state_dict(supernet_of(size))
    expected = literal_network(size).state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].shape, found[key].dtype) == (value.shape, value.dtype), key


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("size", SIZES)
def test_a_loaded_supernet_computes_what_the_literal_one_does(size, training) -> None:
    network, supernet = literal_network(size), supernet_of(size)
    load_official_supernet(supernet, network.state_dict(), network.arch_parameters())
    for ours, theirs in zip(supernet.arch_parameters(), network.arch_parameters(), strict=True):
        assert torch.equal(ours, theirs)
    x = images(SIZES[size][3])
    ours, theirs = supernet.train(training)(x), network.train(training)(x)
    assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_a_supernet_comes_back_bit_for_bit(size) -> None:
    network, supernet = literal_network(size), supernet_of(size)
    load_official_supernet(supernet, network.state_dict(), network.arch_parameters())
    assert_same(official_state_dict(supernet), network.state_dict())
    network_again = literal_network(size, seed=7)
    network_again.load_state_dict(official_state_dict(supernet), strict=True)
    other = supernet_of(size, seed=3)
    load_official_supernet(other, official_state_dict(supernet), supernet.arch_parameters())
    x = images(SIZES[size][3])
    assert torch.equal(other(x), supernet(x))


def test_a_float32_checkpoint_loads_into_a_float64_supernet() -> None:
    network, supernet = literal_network().float(), supernet_of()
    load_official_supernet(supernet, network.state_dict(), network.arch_parameters())
    for key, value in without_counters(official_state_dict(supernet)).items():
        assert value.dtype == torch.float64
        assert torch.equal(value, network.state_dict()[key].double()), key


@pytest.mark.parametrize("size", SIZES)
def test_the_gradients_have_the_official_names(size) -> None:
    network, supernet = literal_network(size), supernet_of(size)
    load_official_supernet(supernet, network.state_dict(), network.arch_parameters())
    x, y = images(SIZES[size][3]), torch.arange(4) % 2
    for model in (network, supernet):
        F.cross_entropy(model(x), y).backward()
    found = official_gradients(supernet)
    expected = {name: weight.grad for name, weight in network.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("make", [supernet_of, final_network], ids=["supernet", "final network"])
def test_without_a_backward_there_are_no_gradients(make) -> None:
    assert official_gradients(make()) == {}


@pytest.mark.parametrize("make", [supernet_of, final_network], ids=["supernet", "final network"])
def test_the_state_dict_is_a_copy(make) -> None:
    model = make()
    state = official_state_dict(model)
    kept = {key: value.clone() for key, value in state.items()}
    assert not any(value.requires_grad for value in state.values())
    model(images(1 if make is supernet_of else 3))  # moves the running statistics
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert_same(state, kept)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("shape", [(5, 3), (4, 4), (5, 5), (14, 8)])
def test_alphas_of_another_space_are_refused(index, shape) -> None:
    network, supernet = literal_network(), supernet_of()
    alphas = [alpha.detach() for alpha in network.arch_parameters()]
    alphas[index] = torch.zeros(shape)
    before = official_state_dict(supernet)
    with pytest.raises(UserError, match=re.escape(str(list(shape)))):
        load_official_supernet(supernet, network.state_dict(), alphas)
    assert_same(official_state_dict(supernet), before)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_another_number_of_alphas_is_refused(number) -> None:
    network = literal_network()
    alphas = [network.arch_parameters()[0].detach()] * number
    with pytest.raises(UserError, match=f"alphas of normal, reduce, not {number}"):
        load_official_supernet(supernet_of(), network.state_dict(), alphas)


# What is refused, and what may be missing: the same for both


class Supernets:
    """A supernet and an official file of the same size."""

    def __init__(self) -> None:
        network = literal_network()
        self.model, self.state = supernet_of(), dict(network.state_dict())
        self.alphas = [alpha.detach() for alpha in network.arch_parameters()]
        self.x = images(1)

    def load(self, state: dict[str, Tensor]) -> None:
        load_official_supernet(self.model, state, self.alphas)


class FinalNetworks:
    """A final network and an official file of the same genotype and size."""

    def __init__(self) -> None:
        self.model, self.x = final_network(seed=2), images()
        self.state = official_state_dict(final_network(seed=1))

    def load(self, state: dict[str, Tensor]) -> None:
        load_official_network(self.model, state)


BOTH = pytest.mark.parametrize("make", [Supernets, FinalNetworks])


@BOTH
@pytest.mark.parametrize("key", ["stem.0.weight", "classifier.bias", "stem.1.running_var"])
def test_a_missing_key_is_named(make, key) -> None:
    pair = make()
    del pair.state[key]
    with pytest.raises(UserError, match=re.escape(key)):
        pair.load(pair.state)


@BOTH
def test_every_single_key_is_needed(make) -> None:
    pair = make()
    for key in without_counters(pair.state):
        with pytest.raises(UserError, match=re.escape(key)):
            pair.load({other: v for other, v in pair.state.items() if other != key})


@BOTH
@pytest.mark.parametrize(
    "key", ["cells.9.preprocess0.op.1.weight", "extra", "stem.num_batches_tracked"]
)
def test_a_surplus_key_is_named(make, key) -> None:
    pair = make()
    pair.state[key] = torch.zeros(())
    with pytest.raises(UserError, match=re.escape(key)):
        pair.load(pair.state)


@BOTH
@pytest.mark.parametrize("key", ["stem.0.weight", "classifier.bias", "stem.1.running_var"])
def test_a_wrong_shape_is_named(make, key) -> None:
    pair = make()
    wrong = torch.zeros(*pair.state[key].shape, 2)
    with pytest.raises(UserError, match=re.escape(key)) as error:
        pair.load(pair.state | {key: wrong})
    assert str(list(wrong.shape)) in str(error.value)


@BOTH
def test_a_shape_that_would_broadcast_is_refused(make) -> None:
    pair = make()
    with pytest.raises(UserError, match=r"classifier\.weight"):
        pair.load(pair.state | {"classifier.weight": pair.state["classifier.weight"][:1]})


@BOTH
def test_a_refused_file_leaves_the_model_alone(make) -> None:
    pair = make()
    before = {key: value.clone() for key, value in pair.model.state_dict().items()}
    with pytest.raises(UserError):
        pair.load(pair.state | {"extra": torch.zeros(())})
    assert_same(dict(pair.model.state_dict()), before)


@BOTH
def test_the_counters_of_batches_may_be_missing(make) -> None:
    """As in the published files; the model's own then stay."""
    pair = make()
    before = official_state_dict(pair.model)
    pair.load(without_counters(pair.state))
    after = official_state_dict(pair.model)
    for key, value in after.items():
        source = before if key.endswith("num_batches_tracked") else pair.state
        assert torch.equal(value, source[key]), key


@BOTH
def test_the_counters_of_batches_are_loaded_where_they_are_there(make) -> None:
    pair = make()
    pair.load(pair.state)
    assert_same(official_state_dict(pair.model), pair.state)
    assert len({int(v) for k, v in pair.state.items() if k.endswith("num_batches_tracked")}) > 5


@BOTH
def test_parameters_stay_the_same_objects(make) -> None:
    """So that an optimizer made before still holds them."""
    pair = make()
    before = [(parameter, parameter.data_ptr()) for parameter in pair.model.parameters()]
    pair.load(pair.state)
    for parameter, (old, pointer) in zip(pair.model.parameters(), before, strict=True):
        assert parameter is old
        assert parameter.data_ptr() == pointer
        assert parameter.requires_grad


# Final networks


def bn(prefix: str) -> list[str]:
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [f"{prefix}.{name}" for name in names]


def conv_bn(prefix: str, *convs: int | str, norm: int | str) -> list[str]:
    return [f"{prefix}.{conv}.weight" for conv in convs] + bn(f"{prefix}.{norm}")


def factorized(prefix: str) -> list[str]:
    return conv_bn(prefix, "conv_1", "conv_2", norm="bn")


def operation_keys(prefix: str, primitive: str, stride: int) -> list[str]:
    """Names of one operation's tensors, from spec.md."""
    if primitive.startswith("sep_conv"):
        return conv_bn(f"{prefix}.op", 1, 2, norm=3) + conv_bn(f"{prefix}.op", 5, 6, norm=7)
    if primitive.startswith("dil_conv"):
        return conv_bn(f"{prefix}.op", 1, 2, norm=3)
    if primitive == "conv_7x1_1x7":
        return conv_bn(prefix, 1, 2, norm=3)
    if primitive == "skip_connect" and stride == 2:
        return factorized(prefix)
    return []  # pools and the identity have none


def expected_keys(genotype: Genotype, num_cells: int, stem: str) -> list[str]:
    keys = conv_bn("stem", 0, norm=1)
    if stem == "imagenet":
        keys = conv_bn("stem0", 0, norm=1) + conv_bn("stem0", 3, norm=4)
        keys += conv_bn("stem1", 1, norm=2)
    reductions = {num_cells // 3, 2 * num_cells // 3}
    for i in range(num_cells):
        after_reduction = i - 1 in reductions or (i == 0 and stem == "imagenet")
        preprocess0 = f"cells.{i}.preprocess0"
        keys += (
            factorized(preprocess0) if after_reduction else conv_bn(f"{preprocess0}.op", 1, norm=2)
        )
        keys += conv_bn(f"cells.{i}.preprocess1.op", 1, norm=2)
        edges = genotype.reduce if i in reductions else genotype.normal
        for j, (primitive, source) in enumerate(edges):
            stride = 2 if i in reductions and source < 2 else 1
            keys += operation_keys(f"cells.{i}._ops.{j}", primitive, stride)
    keys += conv_bn("auxiliary_head.features", 2, norm=3)
    keys.append("auxiliary_head.features.5.weight")
    keys += bn("auxiliary_head.features.6") if stem == "cifar" else []
    keys += ["auxiliary_head.classifier.weight", "auxiliary_head.classifier.bias"]
    return [*keys, "classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("num_cells", [3, 5, 8])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", ["darts_v1", "darts_v2", "nasnet", "amoebanet"])
def test_the_names_of_a_final_network_are_the_official_ones(name, stem, num_cells) -> None:
    network = final_network(name, stem, num_cells=num_cells)
    assert list(official_state_dict(network)) == expected_keys(published(name), num_cells, stem)


def test_nasnet_has_ten_operations_a_cell() -> None:
    keys = official_state_dict(final_network("nasnet", num_cells=3))
    normal = {re.match(r"cells\.0\._ops\.(\d+)", key)[1] for key in keys if "cells.0._ops" in key}
    assert normal == {"0", "1", "2", "3", "8"}  # the others pool or skip
    assert keys["cells.1._ops.1.op.1.weight"].shape == (8, 1, 7, 7)


def test_a_network_without_an_auxiliary_head_has_no_names_of_one() -> None:
    whole, bare = (
        official_state_dict(final_network()),
        official_state_dict(final_network(auxiliary=False)),
    )
    assert list(bare) == [key for key in whole if not key.startswith("auxiliary_head.")]
    with pytest.raises(UserError, match=r"auxiliary_head\."):
        load_official_network(final_network(auxiliary=False), whole)


@pytest.mark.parametrize(
    ("name", "stem"),
    [("darts_v2", "cifar"), ("darts_v1", "imagenet"), ("nasnet", "cifar"), ("amoebanet", "cifar")],
)
def test_a_final_network_comes_back_bit_for_bit(name, stem) -> None:
    one, other = final_network(name, stem, seed=1), final_network(name, stem, seed=2)
    x = images(size=32 if stem == "imagenet" else 8)
    assert not torch.equal(one.eval()(x)[0], other.eval()(x)[0])
    load_official_network(other, official_state_dict(one))
    assert_same(official_state_dict(other), official_state_dict(one))
    assert torch.equal(one.eval()(x)[0], other.eval()(x)[0])
    for ours, theirs in zip(one.train()(x), other.train()(x), strict=True):
        assert torch.equal(ours, theirs)


def test_a_network_of_another_genotype_is_refused() -> None:
    with pytest.raises(UserError, match=r"_ops\."):
        load_official_network(final_network("darts_v1"), official_state_dict(final_network()))


def test_the_gradients_of_a_final_network() -> None:
    network = final_network()
    logits, auxiliary_logits = network(images())
    (logits.sum() + auxiliary_logits.sum()).backward()
    gradients = official_gradients(network)
    kept = [parameter.grad for parameter in network.parameters()]
    weights = [k for k in official_state_dict(network) if not re.search(r"running_|num_b", k)]
    assert list(gradients) == weights
    norms = [torch.stack([g.norm() for g in gs]).norm() for gs in (gradients.values(), kept)]
    assert norms[0] == pytest.approx(norms[1].item())
    # d sum(logits) / d bias of the classifier = images.
    assert torch.allclose(gradients["classifier.bias"], torch.full((3,), 4.0).double())


def test_what_is_no_tensor_is_refused() -> None:
    state = official_state_dict(final_network())
    with pytest.raises(UserError, match="tensors"):
        load_official_network(final_network(), state | {"stem.0.weight": "text"})
