"""Compiled operations and cells computed twice give the same numbers."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.errors import UserError
from dartsl.genotype import published
from dartsl.hypergradient import exact_product, held_constant
from dartsl.networks import FinalNetwork, Supernet
from dartsl.networks.regions import compile_regions
from dartsl.operations import OPERATIONS
from dartsl.search_space import SearchSpace

PRIMITIVES = ("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_5x5")


def supernet(nodes: int = 2, **changes) -> Supernet:
    torch.manual_seed(0)
    return Supernet(SearchSpace(PRIMITIVES, nodes), 4, 3, 5, **changes).double()


def final(**changes) -> FinalNetwork:
    torch.manual_seed(0)
    return FinalNetwork(published("darts_v2"), 4, 3, 5, auxiliary=False, **changes).double()


def loss(network: nn.Module, batch: int = 4) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(batch, 3, 16, 16, dtype=torch.float64)
    output = network(x)
    logits = output[0] if isinstance(output, tuple) else output
    return F.cross_entropy(logits, torch.arange(batch) % 5)


def step(network: nn.Module) -> dict[str, Tensor]:
    """Gradients and buffers after a forward and backward pass."""
    network.zero_grad()
    loss(network).backward()
    gradients = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    return gradients | {name: buffer.clone() for name, buffer in network.named_buffers()}


def kept_for_the_backward_pass(network: nn.Module) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(network)
    del value
    return sum(kept.values())


@pytest.mark.parametrize("build", [supernet, final])
def test_cells_computed_twice_give_the_same_bits(build) -> None:
    plain, again = build(), build(recompute=True)
    if build is final:
        plain.drop_path_prob = again.drop_path_prob = 0.3
    expected, actual = step(plain), step(again)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


class FollowingMean(nn.Module):
    """A primitive whose output reads a buffer that it changes, as spectral_norm's weight does."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, 1)
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean((0, 2, 3)), 0.5)
        return torch.tanh(self.conv(x) - self.mean.clone().view(-1, 1, 1))


def test_cells_computed_twice_read_the_buffers_of_the_first_time(monkeypatch) -> None:
    name = "following"
    monkeypatch.setitem(OPERATIONS, name, lambda c, stride, affine: FollowingMean(c, stride))
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        space = SearchSpace((name, "skip_connect"), 2)
        network = Supernet(space, 4, 3, 5, recompute=recompute).double()
        found.append([step(network), step(network)])
    for once, twice in zip(*found, strict=True):
        assert all(torch.equal(tensor, twice[key]) for key, tensor in once.items())


@pytest.mark.parametrize("build", [supernet, final])
def test_cells_computed_twice_keep_less(build) -> None:
    less, more = (kept_for_the_backward_pass(build(recompute=again)) for again in (True, False))
    assert less < 0.6 * more


def test_cells_computed_twice_can_be_differentiated_twice() -> None:
    def product(network: Supernet) -> list[Tensor]:
        weights = network.weight_parameters()
        vector = [weight.detach() for weight in weights]
        return exact_product(lambda: loss(network), weights, network.arch_parameters(), vector)

    for actual, expected in zip(
        product(supernet(recompute=True)), product(supernet()), strict=True
    ):
        assert torch.allclose(actual, expected, rtol=1e-12, atol=0)


def test_evaluation_computes_cells_once() -> None:
    with torch.no_grad():
        assert torch.equal(loss(supernet(recompute=True).eval()), loss(supernet().eval()))


@pytest.mark.parametrize("build", [supernet, final])
def test_compiled_operations_give_the_same_numbers(build) -> None:
    """Traced and differentiated as torch.compile does it, but without its code generation."""
    plain, compiled = build(), build()  # of every stride and number of edges
    assert compile_regions(compiled.regions(), backend="aot_eager")
    expected, actual = step(plain), step(compiled)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("build", [supernet, final])
def test_an_operation_is_one_graph(build) -> None:
    """What breaks a graph in two costs a look-up in each pass for every part."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network = build()
    assert compile_regions(network.regions(), backend="aot_eager")
    step(network)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= len(network.regions())


def test_no_schedule_compiles_anything_again() -> None:
    """Other weights, alphas, learning rates and drop path probabilities run the same graphs."""
    search, train = supernet(nodes=1), final()
    compile_regions([*search.regions(), *train.regions()], backend="aot_eager")

    def epoch(drop_path_prob: float) -> None:
        train.drop_path_prob = drop_path_prob
        step(train)
        for held in (search.arch_parameters(), search.weight_parameters()):
            with held_constant(held), torch.no_grad():
                torch._foreach_mul_([*search.parameters(), *train.parameters()], 0.99)
            with held_constant(held):
                step(search)

    for probability in (0.0, 0.1):
        epoch(probability)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for probability in (0.15, 0.2):
            epoch(probability)


@pytest.mark.slow
def test_the_code_that_torch_compile_generates() -> None:
    torch.manual_seed(0)
    network = Supernet(SearchSpace(("skip_connect", "sep_conv_5x5"), 1), 2, 1, 3)
    other = Supernet(SearchSpace(("skip_connect", "sep_conv_5x5"), 1), 2, 1, 3)
    other.load_state_dict(network.state_dict())
    if not compile_regions(other.regions()):
        pytest.skip("torch.compile finds no C++ compiler here")
    x = torch.randn(4, 3, 8, 8)
    assert torch.allclose(other(x), network(x), atol=1e-5)


def test_a_machine_that_cannot_compile_says_so_in_one_line(caplog) -> None:
    network = supernet()
    with caplog.at_level(logging.WARNING):
        assert not compile_regions(network.regions(), backend="nobody's")
    (record,) = caplog.records
    assert "runs uncompiled" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert not any(region._compiled_call_impl for region in network.regions())


def test_an_unknown_mode() -> None:
    with pytest.raises(UserError, match="reduce-overhead"):
        compile_regions([], mode="fast")  # type: ignore[arg-type]
