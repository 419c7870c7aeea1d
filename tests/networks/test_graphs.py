"""Replayed passes are the passes that were captured, with the numbers of the moment."""

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.genotype import published
from dartsl.hypergradient import BilevelProblem, FirstOrder, Unrolled, held_constant
from dartsl.networks import FinalNetwork, Supernet
from dartsl.networks.graphs import MAX_PASSES, Replay, replay_passes
from dartsl.search_space import SearchSpace

PRIMITIVES = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3")
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(test: Callable) -> Callable:
    for mark in GPU:
        test = mark(test)
    return test


def supernet() -> Supernet:
    torch.manual_seed(0)
    return Supernet(SearchSpace(PRIMITIVES, 2), 4, 3, 5)


def final() -> FinalNetwork:
    torch.manual_seed(0)
    return FinalNetwork(published("darts_v2"), 4, 3, 5)


def pair(build: Callable[[], nn.Module], replayed: bool = True) -> tuple[nn.Module, nn.Module]:
    """A network that computes every pass, and one that replays them."""
    plain, graphed = build().cuda().double(), build().cuda().double()
    assert replay_passes(graphed, "cuda")
    return plain, graphed


def batch(seed: int, size: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(size, 3, 32, 32, device="cuda", dtype=torch.float64)
    return x, torch.arange(size, device="cuda") % 5


def loss(network: nn.Module, seed: int, size: int = 4) -> Tensor:
    x, y = batch(seed, size)
    output = network(x)
    outputs = output if isinstance(output, tuple) else (output,)
    return sum(F.cross_entropy(logits, y) for logits in outputs if logits is not None)


def step(network: nn.Module, seed: int, size: int = 4) -> dict[str, Tensor]:
    """The loss, gradients and buffers of a pass; then the parameters move."""
    network.zero_grad()
    value = loss(network, seed, size)
    value.backward()
    found = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    found |= {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    return found | {"loss": value.detach()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-9, atol=1e-11), name


def passes_of(network: nn.Module) -> dict:
    assert isinstance(network.forward, Replay)
    return network.forward.passes


@on_gpu
@pytest.mark.parametrize("build", [supernet, final])
def test_steps_are_those_of_a_network_that_computes_them(build) -> None:
    plain, graphed = pair(build)
    for seed in range(4):
        assert_same(step(graphed, seed), step(plain, seed))
    assert len(passes_of(graphed)) == 1


@on_gpu
def test_drop_path_drops_the_same_samples_with_the_probability_of_the_moment() -> None:
    plain, graphed = pair(final)
    for seed, probability in enumerate((0.0, 0.3, 0.3, 0.6, 0.0)):
        plain.drop_path_prob = graphed.drop_path_prob = probability
        assert_same(step(graphed, seed), step(plain, seed))
    assert len(passes_of(graphed)) == 2  # with drop path and without
    graphed.drop_path_prob = 0.5
    assert not torch.equal(step(graphed, 0)["loss"], step(graphed, 1)["loss"])


@on_gpu
@pytest.mark.parametrize("hypergradient", [FirstOrder(), Unrolled()])
def test_hypergradients(hypergradient) -> None:
    plain, graphed = pair(supernet)
    found: list[list[Tensor]] = []
    for network in (plain, graphed):
        for seed in range(3):
            problem = BilevelProblem(
                train_loss=lambda n=network, s=seed: loss(n, 10 + s),
                val_loss=lambda n=network, s=seed: loss(n, 20 + s),
                weights=network.weight_parameters(),
                alphas=network.arch_parameters(),
                xi=0.1,
                buffers=list(network.buffers()).copy,
            )
            gradients = hypergradient(problem)
            with held_constant(network.arch_parameters()):
                step(network, seed)
        found.append([*gradients, *network.buffers(), *network.parameters()])
    for actual, expected in zip(found[1], found[0], strict=True):
        assert torch.allclose(actual, expected, rtol=1e-7, atol=1e-10)


@on_gpu
def test_evaluation_and_a_smaller_batch_are_passes_of_their_own() -> None:
    plain, graphed = pair(supernet)
    for network in (plain, graphed):
        step(network, 0)
        step(network, 1, size=3)
        network.eval()
    with torch.inference_mode():
        for seed in (2, 3):
            assert torch.allclose(loss(graphed, seed), loss(plain, seed), rtol=1e-9)
    with torch.no_grad():
        assert torch.allclose(loss(graphed, 4), loss(plain, 4), rtol=1e-9)
    assert len(passes_of(graphed)) == 3
    for network in (plain, graphed):
        network.train()
    assert_same(step(graphed, 5), step(plain, 5))


@on_gpu
def test_mixed_precision() -> None:
    plain, graphed = pair(supernet)
    plain.float(), graphed.float()

    def logits(network: nn.Module, seed: int, dtype: torch.dtype | None) -> Tensor:
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            return network(batch(seed)[0].float())

    for seed, dtype in enumerate((torch.bfloat16, torch.float16, None, torch.bfloat16)):
        actual, expected = logits(graphed, seed, dtype), logits(plain, seed, dtype)
        assert actual.dtype == expected.dtype
        assert torch.allclose(actual.float(), expected.float(), rtol=1e-2, atol=1e-2)
    assert len(passes_of(graphed)) == 3


@on_gpu
def test_what_a_pass_returned_stays() -> None:
    _, graphed = pair(supernet)
    first, second = loss(graphed, 0), None
    kept = first.detach().clone()
    (gradient,) = torch.autograd.grad(first, graphed.arch_parameters()[:1])
    copy = gradient.clone()
    second = loss(graphed, 1)
    second.backward()
    assert torch.equal(first, kept)
    assert torch.equal(gradient, copy)


@on_gpu
def test_two_passes_at_once_are_refused() -> None:
    _, graphed = pair(supernet)
    first = loss(graphed, 0)
    loss(graphed, 1)
    with pytest.raises(RuntimeError, match="cuda_graphs=false"):
        first.backward()


@on_gpu
def test_a_network_that_waits_for_the_gpu_runs_without(caplog) -> None:
    plain, graphed = pair(supernet)
    original = graphed.stem.forward
    graphed.stem.forward = lambda x: original(x) * float(x.sum() < 1e9)
    with caplog.at_level(logging.WARNING):
        assert_same(step(graphed, 0), step(plain, 0))
        assert_same(step(graphed, 1), step(plain, 1))
    (record,) = caplog.records
    assert "runs without" in record.getMessage()
    assert "\n" not in record.getMessage()


@on_gpu
@pytest.mark.parametrize("build", [supernet, final])
def test_a_network_that_was_moved_is_captured_anew(build) -> None:
    """As Lightning moves it between a fit and a test: the weights lie elsewhere then."""
    plain, graphed = pair(build)
    for round in range(3):
        with torch.inference_mode():
            found, expected = (value.eval()(batch(round)[0]) for value in (graphed, plain))
        found, expected = (value[0] if isinstance(value, tuple) else value
                           for value in (found, expected))  # fmt: skip
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)
        assert passes_of(graphed)
        for network in (graphed, plain):
            network.cpu()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.mul_(1.1)
        assert not passes_of(graphed)
        torch.cuda.empty_cache()
        elsewhere = torch.randn(10**6, device="cuda")
        for network in (graphed, plain):
            network.cuda()
    assert elsewhere.isfinite().all()


@on_gpu
def test_gradients_of_images_are_computed() -> None:
    plain, graphed = pair(supernet)
    found = []
    for network in (graphed, plain):
        step(network, 0)
        x, y = batch(1)
        F.cross_entropy(network(x.requires_grad_()), y).backward()
        found.append(x.grad)
    assert torch.allclose(*found, rtol=1e-9, atol=1e-11)
    assert found[0].abs().max() > 0


@on_gpu
def test_a_limited_number_of_kinds_is_kept() -> None:
    plain, graphed = pair(supernet)
    with torch.no_grad():
        for size in range(2, MAX_PASSES + 4):
            assert torch.allclose(loss(graphed, 0, size), loss(plain, 0, size), rtol=1e-9)
    assert len(passes_of(graphed)) == MAX_PASSES


def test_no_gpu_is_one_line(caplog) -> None:
    network = supernet()
    with caplog.at_level(logging.WARNING):
        assert not replay_passes(network, "cpu")
    (record,) = caplog.records
    assert "need a GPU" in record.getMessage()
    assert not isinstance(network.forward, Replay)
