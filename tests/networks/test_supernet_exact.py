"""The merged supernet is the literal one, number for number: every regrouping is exact."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dartsl.hypergradient import exact_product
from dartsl.interop import load_official_supernet, official_gradients, official_state_dict
from dartsl.networks import Supernet
from dartsl.search_space import SearchSpace
from tests import literal_darts
from tests.golden_files import relative_error
from tests.literal_darts import PRIMITIVES

pytestmark = pytest.mark.usefixtures("each_code")

TOLERANCE = 1e-12
CONVOLUTIONS = ("sep_conv_7x7", "conv_7x1_1x7", "dil_conv_3x3")
# channels, cells, in_channels, nodes, primitives, image size
CASES = {
    "the paper's space": (4, 3, 3, 4, PRIMITIVES, (8, 8)),
    "other sizes": (4, 4, 1, 3, PRIMITIVES, (16, 12)),
    "one node": (2, 3, 3, 1, PRIMITIVES, (8, 8)),
    "five nodes": (2, 3, 3, 5, ("skip_connect", "sep_conv_5x5", "max_pool_3x3"), (8, 8)),
    "odd channels": (3, 3, 3, 2, ("none", "avg_pool_3x3", "dil_conv_5x5"), (8, 8)),
    "no pools": (2, 3, 3, 2, ("none", "skip_connect", *CONVOLUTIONS), (8, 8)),
    "no skips and no none": (2, 3, 3, 2, CONVOLUTIONS, (8, 8)),
    "nothing but maps": (2, 4, 3, 3, ("max_pool_3x3", "skip_connect"), (8, 8)),
    "odd maps": (3, 3, 2, 2, ("none", "sep_conv_3x3", "dil_conv_3x3", "max_pool_3x3"), (10, 14)),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys(), name="pair")
def pair_of_networks(request) -> tuple[literal_darts.Network, Supernet, Tensor, Tensor]:
    """Both networks with the same weights, alphas and running statistics; images and labels."""
    channels, cells, in_channels, nodes, primitives, size = request.param
    torch.manual_seed(0)
    arguments = {"steps": nodes, "multiplier": nodes, "primitives": primitives}
    literal = literal_darts.Network(channels, 5, cells, in_channels, **arguments).double()
    with torch.no_grad():
        for alpha in literal.arch_parameters():
            alpha.normal_()
        for buffer in literal.buffers():  # on every edge others, as no training gives them
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    space = SearchSpace(primitives, nodes)
    supernet = Supernet(space, channels, cells, 5, in_channels).double()
    alphas = [alpha.detach() for alpha in literal.arch_parameters()]
    load_official_supernet(supernet, literal.state_dict(), alphas)
    x = torch.randn(4, in_channels, *size, dtype=torch.float64)
    return literal, supernet, x, torch.randint(5, (4,))


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(actual[name].double(), tensor.double()) < TOLERANCE, name


def test_an_official_state_dict_comes_back_bit_for_bit(pair) -> None:
    literal, supernet, _, _ = pair
    state = official_state_dict(supernet)
    assert state.keys() == literal.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in literal.state_dict().items())


def test_outputs_gradients_and_running_statistics(pair) -> None:
    literal, supernet, x, y = pair
    outputs = supernet(x), literal(x)
    assert relative_error(*outputs) < TOLERANCE
    for output in outputs:
        F.cross_entropy(output, y).backward()
    for ours, theirs in zip(supernet.arch_parameters(), literal.arch_parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < TOLERANCE
    gradients = {name: weight.grad for name, weight in literal.named_parameters()}
    assert_equal(official_gradients(supernet), gradients)
    assert_equal(official_state_dict(supernet), literal.state_dict())


def test_evaluation_before_and_after_a_training_pass(pair) -> None:
    literal, supernet, x, _ = pair
    assert relative_error(supernet.eval()(x), literal.eval()(x)) < TOLERANCE
    supernet.train()(x)
    literal.train()(x)
    assert relative_error(supernet.eval()(x), literal.eval()(x)) < TOLERANCE


def test_the_gradient_of_a_gradient(pair) -> None:
    """The product of Eq. 7, with v the weights themselves."""
    literal, supernet, x, y = pair

    def product(network: literal_darts.Network | Supernet, weights: list) -> list[Tensor]:
        def loss() -> Tensor:
            return F.cross_entropy(network(x), y)

        vector = [weight.detach() for weight in weights]
        return exact_product(loss, weights, network.arch_parameters(), vector)

    ours = product(supernet, supernet.weight_parameters())
    theirs = product(literal, list(literal.parameters()))
    for actual, expected in zip(ours, theirs, strict=True):
        assert relative_error(actual, expected) < TOLERANCE
