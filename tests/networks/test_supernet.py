"""The supernet: its counts, its structure and its alphas (section 2.2, 3.1.1 of the paper)."""

import math

import pytest
import torch
from torch import Tensor, nn

from dartsl import depthwise
from dartsl.errors import UserError
from dartsl.hypergradient import (
    BilevelProblem,
    FirstOrder,
    Unrolled,
    finite_difference_product,
)
from dartsl.interop import official_state_dict
from dartsl.native import build
from dartsl.networks import MixedOperation, SearchCell, Softmax, Supernet
from dartsl.networks.layout import reduction_cells
from dartsl.operations import OPERATIONS, FactorizedReduce, ReLUConvBN
from dartsl.search_space import DARTS_PRIMITIVES, SearchSpace, discretize

FRESH_BN = 1 / math.sqrt(1 + 1e-5)  # what a BatchNorm in evaluation, never trained, multiplies by
SMALL_SPACE = SearchSpace(("none", "skip_connect", "avg_pool_3x3", "sep_conv_3x3"), 2)


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def multiply_adds(network: nn.Module, *shape: int) -> int:
    """Of convolution and linear layers, in evaluation mode, for one image of this shape."""
    total = 0

    def hook(module: nn.Conv2d | nn.Linear, _: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel()  # one weight row per output value

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(hook)
    with torch.no_grad():
        network.eval()(torch.empty(1, *shape, device=next(network.parameters()).device))
    return total


def small(**changes) -> Supernet:
    torch.manual_seed(0)
    arguments = {"channels": 4, "num_cells": 3, "num_classes": 5}
    return Supernet(changes.pop("space", SMALL_SPACE), **(arguments | changes))


# Counts


@pytest.mark.parametrize(
    ("channels", "num_cells", "parameters"),
    [
        (16, 8, 1_930_618),
        (4, 4, 118_742),
        (4, 5, 136_182),
        (8, 5, 394_210),
        (36, 8, 8_477_398),
    ],
)
def test_parameter_counts(channels, num_cells, parameters) -> None:
    with torch.device("meta"):
        supernet = Supernet(SearchSpace(), channels, num_cells)
    assert count(supernet.weight_parameters()) == parameters
    assert count(supernet.parameters()) == parameters + 2 * 14 * 8


def test_multiply_adds_of_the_paper_search() -> None:
    with torch.device("meta"):
        supernet = Supernet(SearchSpace())
    assert multiply_adds(supernet, 3, 32, 32) == 300_255_744


# Alphas


def test_there_is_one_alpha_of_edges_by_primitives_for_each_kind_of_cell() -> None:
    supernet = small(space=SearchSpace())
    assert [alpha.shape for alpha in supernet.arch_parameters()] == [(14, 8), (14, 8)]
    assert [alpha.shape for alpha in small().arch_parameters()] == [(5, 4), (5, 4)]


def test_arch_parameters_are_the_normal_then_the_reduction_cell() -> None:
    supernet = small()
    normal, reduce = supernet.arch_parameters()
    with torch.no_grad():
        normal.fill_(1.0)
        reduce[:, 1] = 5.0
    strengths = supernet.strengths()
    assert torch.allclose(strengths["normal"], torch.full((5, 4), 0.25))
    assert (strengths["reduce"][:, 1] > 0.9).all()


def test_alphas_are_no_weights_and_nothing_is_left_out() -> None:
    supernet = small()
    alphas = {id(parameter) for parameter in supernet.arch_parameters()}
    weights = {id(parameter) for parameter in supernet.weight_parameters()}
    assert not alphas & weights
    assert alphas | weights == {id(parameter) for parameter in supernet.parameters()}
    assert len(weights) == len(supernet.weight_parameters())


def test_a_checkpoint_keeps_the_alphas() -> None:
    supernet, other = small(), small()
    with torch.no_grad():
        for alpha in supernet.arch_parameters():
            alpha.normal_()
    other.load_state_dict(supernet.state_dict())
    for ours, loaded in zip(supernet.arch_parameters(), other.arch_parameters(), strict=True):
        assert torch.equal(ours, loaded)


def test_alphas_begin_as_small_normal_numbers() -> None:
    """1e-3 * randn, as in the official code: all choices are open."""
    torch.manual_seed(0)
    alphas = torch.cat(
        [
            alpha.detach().flatten()
            for _ in range(5)
            for alpha in Supernet(SearchSpace(), 2, 1).arch_parameters()
        ]
    )
    assert alphas.std().item() == pytest.approx(1e-3, rel=0.1)  # 1,120 numbers
    assert abs(alphas.mean().item()) < 1e-4
    assert 2e-3 < alphas.abs().max().item() < 5e-3


def test_normal_and_reduction_alphas_begin_apart() -> None:
    normal, reduce = small().arch_parameters()
    assert not torch.equal(normal, reduce)


def test_strengths_are_the_softmax_over_all_primitives() -> None:
    supernet = small(space=SearchSpace())
    for alpha, strengths in zip(
        supernet.arch_parameters(), supernet.strengths().values(), strict=True
    ):
        exponentials = alpha.detach().exp()
        expected = exponentials / exponentials.sum(dim=1, keepdim=True)
        assert torch.allclose(strengths, expected)
        assert not strengths.requires_grad


def test_the_genotype_is_that_of_the_strengths() -> None:
    supernet = small(space=SearchSpace())
    with torch.no_grad():
        for alpha in supernet.arch_parameters():
            alpha.normal_()
    assert supernet.genotype() == discretize(supernet.strengths(), SearchSpace())
    normal, reduce = supernet.arch_parameters()
    with torch.no_grad():
        reduce.copy_(normal)
    assert supernet.genotype().normal == supernet.genotype().reduce


def test_every_alpha_has_a_gradient_that_sums_to_0_over_an_edge() -> None:
    """The softmax does not see a constant; 'none' acts through it alone (Eq. 2)."""
    supernet = small().double()
    loss = supernet(torch.randn(2, 3, 8, 8, dtype=torch.float64)).square().sum()
    for gradient in torch.autograd.grad(loss, supernet.arch_parameters()):
        assert (gradient[:, 0] != 0).all()
        assert torch.allclose(gradient.sum(dim=1), torch.zeros(5).double(), atol=1e-10)


# Structure


@pytest.mark.parametrize(
    ("num_cells", "cells"), [(8, {2, 5}), (20, {6, 13}), (14, {4, 9}), (4, {1, 2}), (5, {1, 3})]
)
def test_cells_reduce_at_a_third_and_two_thirds(num_cells, cells) -> None:
    assert reduction_cells(num_cells) == cells


def test_reduction_cells_halve_the_size_and_double_the_channels() -> None:
    supernet = small(space=SearchSpace(("skip_connect",), 3), num_cells=8, in_channels=1)
    shapes = []
    for cell in supernet.cells:
        cell.register_forward_hook(lambda *arguments: shapes.append(tuple(arguments[2].shape[1:])))
    supernet(torch.randn(2, 1, 16, 16))
    nodes = 3
    assert shapes == [
        *[(nodes * 4, 16, 16)] * 2,
        *[(nodes * 8, 8, 8)] * 3,
        *[(nodes * 16, 4, 4)] * 3,
    ]


def test_stride_2_stands_on_the_edges_from_a_reduction_cells_inputs_only() -> None:
    supernet = small(space=SearchSpace(("max_pool_3x3",), 4))
    for index, cell in enumerate(supernet.cells):
        strides = [source.operations[0][0].stride for source in cell.sources]
        assert strides == ([2, 2, 1, 1, 1] if index in {1, 2} else [1] * 5)


def test_the_edges_that_leave_one_node_are_computed_together() -> None:
    """Rows of alpha are ordered by target: (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)."""
    cell = small().cells[0]
    assert cell.rows == [[0, 2], [1, 3], [4]]
    assert [source.num_edges for source in cell.sources] == [2, 2, 1]


def test_the_first_input_is_reduced_after_a_reduction_cell() -> None:
    supernet = small(num_cells=8)
    after_reduction = [3, 6]  # cells 2 and 5 reduce
    for index, cell in enumerate(supernet.cells):
        expected = FactorizedReduce if index in after_reduction else ReLUConvBN
        assert type(cell.preprocess0) is expected
        assert type(cell.preprocess1) is ReLUConvBN


def test_the_alphas_of_a_kind_of_cell_act_in_its_cells_only() -> None:
    supernet = small(num_cells=8)
    assert [cell.kind for cell in supernet.cells] == [
        "reduce" if index in {2, 5} else "normal" for index in range(8)
    ]
    outputs: list[Tensor] = []
    supernet.cells[1].register_forward_hook(lambda *arguments: outputs.append(arguments[2]))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = supernet(x)
        supernet.alphas["reduce"].normal_()
        after = supernet(x)
    assert torch.equal(outputs[0], outputs[1])  # before the first reduction cell
    assert not torch.equal(before, after)


@pytest.mark.parametrize("stem_multiplier", [1, 3, 4])
def test_the_stem_has_a_multiple_of_the_channels_and_no_relu(stem_multiplier) -> None:
    stem = small(stem_multiplier=stem_multiplier).stem
    assert [type(module) for module in stem] == [nn.Conv2d, nn.BatchNorm2d]
    assert stem[0].weight.shape == (stem_multiplier * 4, 3, 3, 3)


def test_only_the_stems_batchnorm_is_affine() -> None:
    supernet = small(space=SearchSpace(tuple(OPERATIONS)))
    affine = [
        name
        for name, module in supernet.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.affine
    ]
    assert affine == ["stem.1"]


# The mixed operation (Eq. 2)


@pytest.mark.parametrize("num_edges", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_mixed_operation_is_the_weighted_sum_of_all_primitives_on_each_edge(
    stride, num_edges
) -> None:
    torch.manual_seed(0)
    mixed = MixedOperation(4, stride, DARTS_PRIMITIVES, num_edges).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    weights = torch.rand(num_edges, 8, dtype=torch.float64)
    outputs = mixed(x, weights)
    one_by_one = [
        mixed(x, torch.zeros_like(weights).index_fill(1, torch.tensor(primitive), 1.0))
        for primitive in range(8)
    ]
    for edge, output in enumerate(outputs):
        expected = sum(weights[edge, p] * one_by_one[p][edge] for p in range(8))
        assert torch.allclose(output, expected)


def test_what_none_weighs_is_lost() -> None:
    mixed = MixedOperation(2, 1, ("none", "skip_connect"), 2)
    x = torch.randn(1, 2, 3, 3)
    first, second = mixed(x, torch.tensor([[0.7, 0.3], [0.9, 0.1]]))
    assert torch.allclose(first, 0.3 * x)
    assert torch.allclose(second, 0.1 * x)


@pytest.mark.parametrize("pool", ["max_pool_3x3", "avg_pool_3x3"])
def test_pooling_is_normalised_without_affine_parameters(pool) -> None:
    mixed = MixedOperation(3, 1, (pool,), 1).double()
    x = 5 + 3 * torch.randn(4, 3, 6, 6, dtype=torch.float64)
    pooled = OPERATIONS[pool](3, 1, False)(x)
    mean = pooled.mean((0, 2, 3), keepdim=True)
    variance = pooled.var((0, 2, 3), unbiased=False, keepdim=True)
    expected = (pooled - mean) / torch.sqrt(variance + 1e-5)
    assert torch.allclose(mixed(x, torch.ones(1, 1).double())[0], expected)
    assert count(mixed.parameters()) == 0


@pytest.mark.parametrize("stride", [1, 2])
def test_an_operation_without_a_merged_form_runs_once_an_edge(stride, monkeypatch) -> None:
    def factory(channels: int, stride: int, affine: bool) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, channels, 3, stride, 1), nn.Tanh())

    monkeypatch.setitem(OPERATIONS, "user", factory)
    mixed = MixedOperation(2, stride, ("user", "max_pool_3x3"), 3).eval()
    x = torch.randn(1, 2, 5, 5)
    weights = torch.rand(3, 2)
    own, pool = mixed.operations
    for edge, output in enumerate(mixed(x, weights)):
        expected = weights[edge, 0] * own[edge](x) + weights[edge, 1] * FRESH_BN * pool[0](x)
        assert torch.allclose(output, expected)


def test_a_node_is_the_sum_of_its_edges() -> None:
    """Eq. 1: with skips alone, node 2 is w00 s0 + w01 s1 and node 3 takes node 2 as well."""
    cell = SearchCell(SearchSpace(("skip_connect",), 2), 4, 4, 2, False, False).double().eval()
    inputs = torch.randn(2, 2, 4, 5, 5, dtype=torch.float64)
    weights = torch.tensor([[0.1], [0.2], [0.3], [0.4], [0.5]], dtype=torch.float64)
    s0, s1 = cell.preprocess0(inputs[0]), cell.preprocess1(inputs[1])
    node2 = 0.1 * s0 + 0.2 * s1
    node3 = 0.3 * s0 + 0.4 * s1 + 0.5 * node2
    assert torch.allclose(cell(inputs[0], inputs[1], weights), torch.cat([node2, node3], dim=1))


def test_a_forward_pass_updates_every_running_statistic_once() -> None:
    supernet = small(space=SearchSpace())
    supernet(torch.randn(2, 3, 8, 8))
    state = official_state_dict(supernet)
    counters = {key: value for key, value in state.items() if "num_batches_tracked" in key}
    assert len(counters) == sum("running_var" in key for key in state)
    assert all(value == 1 for value in counters.values())


# Other sizes


@pytest.mark.parametrize("size", [(7, 7), (15, 15), (31, 30), (8, 11)])
def test_images_of_any_size(size) -> None:
    supernet = small(space=SearchSpace(), num_cells=4)
    assert supernet(torch.randn(2, 3, *size)).shape == (2, 5)


@pytest.mark.parametrize("in_channels", [1, 4])
def test_images_of_any_number_of_channels(in_channels) -> None:
    assert small(in_channels=in_channels)(torch.randn(2, in_channels, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize("nodes", [1, 3, 5])
@pytest.mark.parametrize(
    "primitives", [("skip_connect",), ("none", "sep_conv_7x7", "max_pool_3x3")]
)
def test_spaces_of_any_size(primitives, nodes) -> None:
    supernet = small(space=SearchSpace(primitives, nodes))
    assert supernet(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    assert len(supernet.genotype().normal) == 2 * nodes


@pytest.mark.parametrize("num_cells", [1, 2, 3])
def test_networks_of_few_cells(num_cells) -> None:
    assert small(num_cells=num_cells)(torch.randn(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize("num_cells", [0, -1])
def test_a_network_has_a_cell(num_cells) -> None:
    with pytest.raises(UserError, match=f"num_cells is {num_cells}"):
        small(num_cells=num_cells)


def test_channels_are_a_whole_number() -> None:
    with pytest.raises(UserError, match=r"channels is 2\.5; it is a whole number"):
        small(channels=2.5)


def test_evaluation_does_not_depend_on_the_other_images() -> None:
    supernet = small().eval()
    x = torch.randn(3, 3, 8, 8)
    assert torch.allclose(supernet(x)[:1], supernet(x[:1]), atol=1e-6)


# The slots of a search method


class Scaled(nn.Module):
    """A relaxation with a parameter of its own, that samples in training."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, alpha: Tensor) -> Tensor:
        if self.training:
            return torch.zeros_like(alpha)
        return torch.softmax(self.scale * alpha, dim=-1)


def test_a_relaxations_parameters_are_searched_and_each_kind_has_its_own() -> None:
    supernet = small(relaxation=Scaled())
    normal, reduce, first, second = supernet.arch_parameters()
    assert normal.shape == reduce.shape == (5, 4)
    assert first.shape == second.shape == ()
    assert first is not second
    assert not {id(first), id(second)} & {id(weight) for weight in supernet.weight_parameters()}


class Mixing(nn.Module):
    """A relaxation that mixes the primitives by a layer, and begins with none mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        nn.init.eye_(self.layer.weight)

    def forward(self, alpha: Tensor) -> Tensor:
        return torch.softmax(self.layer(alpha), dim=-1)


class Drawn(Mixing):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.layer.weight, std=1e-3)


class OneHot(nn.Module):
    def forward(self, alpha: Tensor) -> Tensor:
        return nn.functional.one_hot(alpha.argmax(dim=-1), alpha.shape[1])


class Nothing(nn.Module):
    def forward(self, alpha: Tensor) -> None:
        return None


def test_a_relaxation_begins_as_it_says() -> None:
    """Its own `reset_parameters` draws it anew, those of layers that it has set up do not."""
    kept = small(relaxation=Mixing()).relaxations
    assert all(torch.equal(each.layer.weight, torch.eye(4)) for each in kept.values())
    first, second = (each.layer.weight for each in small(relaxation=Drawn()).relaxations.values())
    assert max(first.abs().max(), second.abs().max()) < 1e-2
    assert not torch.equal(first, second)


def test_an_empty_relaxation_is_none_of_the_defaults() -> None:
    supernet = small(relaxation=nn.Sequential())
    assert torch.equal(supernet.strengths()["normal"], supernet.alphas["normal"])


@pytest.mark.parametrize("relaxation", [torch.sigmoid, Softmax])
def test_a_relaxation_is_a_module(relaxation) -> None:
    with pytest.raises(UserError, match=r"The relaxation is .*; it is an nn\.Module"):
        small(relaxation=relaxation)


@pytest.mark.parametrize(
    ("relaxation", "found"),
    [
        (nn.Linear(4, 3), r"\[5, 3\] of torch\.float32"),
        (OneHot(), r"\[5, 4\] of torch\.int64"),
        (Nothing(), "a NoneType"),
    ],
)
def test_a_relaxation_gives_weights_of_alphas_shape(relaxation, found) -> None:
    supernet, message = small(relaxation=relaxation), f"gives {found}, not edge weights"
    with pytest.raises(UserError, match=message):
        supernet(torch.randn(2, 3, 8, 8))
    with pytest.raises(UserError, match=message):
        supernet.genotype()


def test_edge_weights_are_those_of_a_pass() -> None:
    """And have gradients, for penalties."""
    supernet = small(relaxation=Scaled())
    assert not supernet.edge_weights()["normal"].any()
    weights = supernet.eval().edge_weights()
    assert torch.equal(weights["reduce"], supernet.strengths()["reduce"])
    assert weights["reduce"].requires_grad


def test_strengths_are_read_in_evaluation_mode() -> None:
    supernet = small(relaxation=Scaled()).train()
    normal = supernet.arch_parameters()[0].detach()
    assert torch.allclose(supernet.strengths()["normal"], torch.softmax(2 * normal, dim=-1))
    assert all(relaxation.training for relaxation in supernet.relaxations.values())


def test_the_relaxation_weighs_the_operations() -> None:
    """A relaxation that gives 0 leaves nothing but the classifier's bias."""
    supernet = small(relaxation=Scaled()).train()
    logits = supernet(torch.randn(2, 3, 8, 8))
    assert torch.allclose(logits, supernet.classifier.bias.expand(2, 5))


def test_the_default_relaxation_is_the_softmax() -> None:
    assert all(isinstance(r, Softmax) for r in small().relaxations.values())
    rows = Softmax()(torch.tensor([[0.0, math.log(3.0)]]))
    assert torch.allclose(rows, torch.tensor([[0.25, 0.75]]))


def test_a_mixed_operation_of_another_kind_fills_every_edge() -> None:
    seen = []

    class Recorded(MixedOperation):
        def __init__(self, channels, stride, primitives, num_edges) -> None:
            super().__init__(channels, stride, primitives, num_edges)
            seen.append((channels, stride, primitives, num_edges))

    supernet = small(mixed_operation=Recorded)
    sources = [source for cell in supernet.cells for source in cell.sources]
    assert all(isinstance(source, Recorded) for source in sources)
    primitives = SMALL_SPACE.primitives
    assert seen[:3] == [(4, 1, primitives, 2), (4, 1, primitives, 2), (4, 1, primitives, 1)]
    assert seen[3:6] == [(8, 2, primitives, 2), (8, 2, primitives, 2), (8, 1, primitives, 1)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_of_any_layout(memory_format) -> None:
    supernet = small().eval()
    x = torch.randn(2, 3, 8, 8)
    again = x.contiguous(memory_format=memory_format)
    assert torch.allclose(supernet(again), supernet(x.flip(3).flip(3)), atol=1e-6)


@pytest.fixture
def taken(monkeypatch) -> list:
    """Grows with every gradient of a depthwise weight, in C or not."""
    call, found = build.call, []

    def in_c(name: str, *arguments) -> None:
        _, of_depthwise, *_ = arguments[-5:]
        if name == "separable_backward" and of_depthwise is not None:
            found.append(of_depthwise)
        call(name, *arguments)

    by_formula = depthwise.weight_gradient
    monkeypatch.setattr(build, "call", in_c)
    monkeypatch.setattr(
        depthwise, "weight_gradient", lambda *a: found.append(by_formula(*a)) or found[-1]
    )
    return found


@pytest.mark.usefixtures("each_code")
def test_an_alpha_step_takes_no_gradients_of_the_weights(taken) -> None:
    supernet, x = small(), torch.randn(2, 3, 8, 8)
    problem = BilevelProblem(
        train_loss=lambda: supernet(x).square().sum(),
        val_loss=lambda: supernet(x).square().sum(),
        weights=supernet.weight_parameters(),
        alphas=supernet.arch_parameters(),
    )
    FirstOrder()(problem)
    assert not taken
    vector = [torch.ones_like(weight) for weight in problem.weights]
    finite_difference_product(problem.train_loss, problem.weights, problem.alphas, vector)
    assert not taken
    Unrolled()(problem)  # the virtual step and v take them
    assert taken
