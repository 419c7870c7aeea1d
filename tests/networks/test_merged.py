"""Operations of all edges that leave a node, computed together, are those of every edge alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.native import build
from dartsl.networks.merged import PerEdge, Source, merged_operation
from dartsl.networks.supernet import MixedOperation, Supernet
from dartsl.operations import OPERATIONS, Factory, SeparableConv
from dartsl.search_space import SearchSpace

CHANNELS, EDGES = 3, 2


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def copies_of(merged: nn.Module, primitive: str, stride: int) -> nn.ModuleList:
    """The operation of every edge, with the edge's part of the merged one's state."""
    copies = nn.ModuleList(OPERATIONS[primitive](CHANNELS, stride, False) for _ in range(EDGES))
    parts = {name: tensor.chunk(EDGES) for name, tensor in merged.state_dict().items()}
    for edge, single in enumerate(copies.double()):
        state = single.state_dict()
        single.load_state_dict({name: parts[name][edge].view_as(state[name]) for name in state})
    return copies


def with_gradients(output: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    return [output, *torch.autograd.grad(output, wanted, random(*output.shape))]


@pytest.mark.usefixtures("each_code")
@pytest.mark.parametrize("size", [(6, 8), (7, 5), (1, 3)])
@pytest.mark.parametrize(
    ("primitive", "stride"),
    [
        ("skip_connect", 2),
        *((name, stride) for name in ("sep_conv_3x3", "dil_conv_5x5") for stride in (1, 2)),
        ("conv_7x1_1x7", 2),
    ],
)
def test_a_merged_operation_is_that_of_every_edge(primitive, stride, size) -> None:
    merged = merged_operation(primitive, CHANNELS, stride, EDGES).double()
    copies = copies_of(merged, primitive, stride)
    x, scale = random(2, CHANNELS, *size), random(EDGES * CHANNELS)
    addend = random(2, EDGES * CHANNELS, *(-(-length // stride) for length in size))
    given = [tensor.requires_grad_() for tensor in (x, scale, addend)]

    found = with_gradients(merged(Source(x, EDGES), scale, addend), [*given, *merged.parameters()])
    by_edge = torch.cat([single(x) for single in copies], dim=1)
    output, *gradients = with_gradients(
        by_edge * scale[:, None, None] + addend, [*given, *copies.parameters()]
    )
    own, number = gradients[3:], len(list(merged.parameters()))
    expected = [output, *gradients[:3], *(torch.cat(own[n::number]) for n in range(number))]
    for actual, other in zip(found, expected, strict=True):
        assert torch.allclose(actual, other, rtol=1e-10, atol=1e-10)
    for name, buffer in merged.named_buffers():
        if buffer.is_floating_point():
            parts = [dict(single.named_buffers())[name] for single in copies]
            assert torch.allclose(buffer, torch.cat(parts), rtol=1e-12)


class Tripled(SeparableConv):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Halved(nn.Identity):
    def forward(self, input: Tensor) -> Tensor:
        return input / 2


def dense(*, bias: bool = False, **options: Any) -> Factory:
    """ReLU, a dense convolution and BatchNorm, as a user would register them."""
    return lambda channels, stride, affine: nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, stride, 1, bias=bias),
        nn.BatchNorm2d(channels, **{"affine": affine} | options),
    )


CUSTOM: dict[str, Factory] = {
    "plain": dense(),
    "eps": dense(eps=0.1),
    "momentum": dense(momentum=0.5),
    "cumulative": dense(momentum=None),
    "untracked": dense(track_running_stats=False),
    "affine": dense(affine=True),
    "bias": dense(bias=True),
    "separable": lambda channels, stride, affine: Tripled(channels, 3, stride, affine),
    "identity": lambda channels, stride, affine: Halved(),
    "nothing": lambda channels, stride, affine: nn.Sequential(),
}


@pytest.mark.usefixtures("each_code")
@pytest.mark.parametrize("name", CUSTOM)
def test_a_registered_operation_is_computed_as_it_was_written(name, monkeypatch) -> None:
    monkeypatch.setitem(OPERATIONS, name, CUSTOM[name])
    torch.manual_seed(0)
    mixed = MixedOperation(CHANNELS, 1, (name,), EDGES).double()
    torch.manual_seed(0)  # and so the same weights
    copies = [OPERATIONS[name](CHANNELS, 1, False).double() for _ in range(EDGES)]
    weights = torch.tensor([[0.3], [0.7]], dtype=torch.float64)
    for training in (True, True, False):
        mixed.train(training)
        x = random(4, CHANNELS, 6, 5)
        for output, single, weight in zip(mixed(x, weights), copies, weights, strict=True):
            assert torch.allclose(output, weight * single.train(training)(x), rtol=1e-10)


def with_frozen_filter(channels: int, stride: int, affine: bool) -> nn.Module:
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    conv.weight.requires_grad_(False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(channels, affine=affine))


class ScaledPool(nn.MaxPool2d):
    def __init__(self, stride: int) -> None:
        super().__init__(3, stride, 1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * super().forward(input)


def normed(norm: Callable[[nn.Module], nn.Module]) -> Factory:
    """A dense primitive whose convolution has a norm of the old style, by hooks."""

    def factory(channels: int, stride: int, affine: bool) -> nn.Module:
        operation = dense()(channels, stride, affine)
        norm(operation[1])
        return operation

    return factory


def supernet_of(primitive: str) -> Supernet:
    return Supernet(SearchSpace((primitive, "none"), 2), channels=2, num_cells=3, num_classes=3)


def test_a_frozen_filter_stays_frozen(monkeypatch) -> None:
    monkeypatch.setitem(OPERATIONS, "frozen", with_frozen_filter)
    supernet = supernet_of("frozen")
    filters = [m for m in supernet.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert filters
    supernet(torch.randn(2, 3, 8, 8)).sum().backward()
    for conv in filters:
        assert not conv.weight.requires_grad
        assert conv.weight.grad is None


def test_a_pool_with_a_parameter_has_one_for_each_edge(monkeypatch) -> None:
    name, factory = "scaled_pool", lambda channels, stride, affine: ScaledPool(stride)
    monkeypatch.setitem(OPERATIONS, name, factory)
    merged = merged_operation(name, CHANNELS, 1, EDGES)
    assert isinstance(merged, PerEdge)
    assert len(list(merged.parameters())) == EDGES
    merged[1].scale.data.fill_(5.0)
    x = torch.randn(2, CHANNELS, 6, 6)
    first, second = merged(Source(x, EDGES), torch.ones(EDGES * CHANNELS)).chunk(EDGES, dim=1)
    assert torch.allclose(first, F.max_pool2d(x, 3, 1, 1))
    assert torch.allclose(second, 5 * first)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_convolution_with_a_norm_by_hooks_is_run_for_each_edge(norm, monkeypatch) -> None:
    monkeypatch.setitem(OPERATIONS, "normed", normed(norm))
    assert isinstance(merged_operation("normed", CHANNELS, 1, EDGES), PerEdge)
    logits = supernet_of("normed")(torch.randn(2, 3, 8, 8))
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()


def test_norms_that_are_kept_in_evaluation_use_their_running_statistics() -> None:
    """Frozen, as by a search that goes on from trained weights."""
    torch.manual_seed(0)
    mixed = MixedOperation(CHANNELS, 1, ("max_pool_3x3", "avg_pool_3x3", "sep_conv_3x3"), EDGES)
    mixed.double()
    weights = random(EDGES, 3)
    mixed(random(4, CHANNELS, 6, 6), weights)
    norms = [module for module in mixed.modules() if hasattr(module, "running_mean")]
    for norm in norms:
        norm.eval()
    before = [norm.running_mean.clone() for norm in norms]
    x = random(4, CHANNELS, 5, 5)
    found = mixed(x, weights)
    for output, expected in zip(found, mixed.eval()(x, weights), strict=True):
        assert torch.allclose(output, expected)
    after = [norm.running_mean for norm in norms]
    assert all(map(torch.equal, after, before))


def test_each_form_of_a_source_is_computed_once() -> None:
    x = random(2, 3, 4, 5)
    source = Source(x, 3)
    assert torch.equal(source.rectified, F.relu(x))
    assert torch.equal(source.copies, F.relu(torch.cat([x] * 3, dim=1)))
    assert source.rectified is source.rectified
    assert source.copies is source.copies


@pytest.mark.skipif(not build.is_built(), reason="no C compiler on this machine")
def test_the_c_code_needs_no_copies(monkeypatch) -> None:
    monkeypatch.setattr(Source, "rectified", None)
    monkeypatch.setattr(Source, "copies", None)
    merged = merged_operation("sep_conv_3x3", 4, 2, 3)
    assert merged(Source(torch.randn(2, 4, 5, 5), 3), torch.ones(12)).shape == (2, 12, 3, 3)
