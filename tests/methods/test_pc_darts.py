"""PC-DARTS against a literal transcription of the equations of arXiv:1907.05737, float64.

    Eq. 2    f(x) = sum_o softmax(alpha)_o * o(S * x) + (1 - S) * x,   S: the first C / K channels
    Eq. 3    x_j = sum_(i < j) softmax_i(beta_ij) * f_ij(x_i)

The channels are shuffled after each edge; what passes by is max-pooled at stride 2.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dartsl.errors import UserError
from dartsl.hypergradient import FirstOrder, Unrolled
from dartsl.interop import load_official_supernet, official_gradients, official_state_dict
from dartsl.methods.pc_darts import AlphaWarmup, EdgeNormalizedSoftmax, PartialMixedOperation
from dartsl.modules import SearchModule
from dartsl.networks import Supernet
from dartsl.search_space import DARTS_PRIMITIVES, SearchSpace
from tests.literal_darts import OPS, Architect, Cell, Network, search_step

SHORT = ("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3")
CASES = {  # channels, K, nodes, primitives
    "two nodes": (8, 4, 2, SHORT),
    "half of the channels": (4, 2, 2, SHORT),
    "the paper's space": (8, 4, 4, DARTS_PRIMITIVES),
}
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=3e-4)
ADAM = partial(torch.optim.Adam, lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3)


class PartialMixedOp(nn.Module):
    """Eq. 2."""

    def __init__(self, channels: int, k: int, stride: int, primitives: tuple[str, ...]) -> None:
        super().__init__()
        self.k, self.stride, self.part = k, stride, channels // k
        self._ops = nn.ModuleList(OPS[primitive](self.part, stride) for primitive in primitives)

    def forward(self, x: Tensor, alpha: Tensor) -> Tensor:
        weights = torch.softmax(alpha, dim=0)
        mixed = sum(w * op(x[:, : self.part]) for w, op in zip(weights, self._ops, strict=True))
        passed = x[:, self.part :]
        if self.k == 1:  # nothing passes by
            return mixed
        if self.stride == 2:
            passed = F.max_pool2d(passed, 2, 2)
        joined = torch.cat([mixed, passed], dim=1)
        # Channel g * C / K + c, the c-th of group g, goes to c * K + g.
        order = [g * self.part + c for c in range(self.part) for g in range(self.k)]
        return joined[:, order]


class PcNetwork(Network):
    """The literal supernet with partial edges, and betas [edges] beside the alphas."""

    def __init__(self, channels: int, k: int, nodes: int, primitives: tuple[str, ...]) -> None:
        super().__init__(channels, 3, 3, 3, nodes, nodes, primitives=primitives)
        edges = len(self.alphas_normal)
        self.beta_normal = torch.randn(edges).requires_grad_()
        self.beta_reduce = torch.randn(edges).requires_grad_()
        for cell in self.cells:
            channels *= 2 if cell.reduction else 1
            cell._ops = nn.ModuleList(
                PartialMixedOp(channels, k, 2 if cell.reduction and j < 2 else 1, primitives)
                for i in range(nodes)
                for j in range(2 + i)
            )

    def arch_parameters(self) -> list[Tensor]:
        betas = [self.beta_normal, self.beta_reduce] if hasattr(self, "beta_reduce") else []
        return super().arch_parameters() + betas

    def forward(self, x: Tensor) -> Tensor:
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            alpha = self.alphas_reduce if cell.reduction else self.alphas_normal
            beta = self.beta_reduce if cell.reduction else self.beta_normal
            s0, s1 = s1, pc_cell(cell, s0, s1, alpha, beta)
        return self.classifier(F.adaptive_avg_pool2d(s1, 1).flatten(1))


def pc_cell(cell: Cell, s0: Tensor, s1: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Eq. 3 at every node."""
    states, edge = [cell.preprocess0(s0), cell.preprocess1(s1)], 0
    for _ in range(cell.steps):
        shares = torch.softmax(beta[edge : edge + len(states)], dim=0)
        node = 0
        for share, x in zip(shares, list(states), strict=True):
            node = node + share * cell._ops[edge](x, alpha[edge])
            edge += 1
        states.append(node)
    return torch.cat(states[2:], dim=1)


def pair_of(name: str = "two nodes") -> tuple[PcNetwork, Supernet]:
    """The literal network, and dartsl's with the same weights, alphas and betas."""
    torch.manual_seed(1)
    channels, k, nodes, primitives = CASES[name]
    network = PcNetwork(channels, k, nodes, primitives).double()
    for parameter in network.arch_parameters():
        parameter.data.normal_()
    supernet = pc_supernet(channels, k, nodes, primitives)
    arch = network.arch_parameters()
    load_official_supernet(supernet, network.state_dict(), arch[:2])
    with torch.no_grad():
        for ours, theirs in zip(supernet.arch_parameters(), arch, strict=True):
            ours.copy_(theirs)
    return network, supernet


def pc_supernet(channels=8, k=4, nodes=2, primitives=SHORT) -> Supernet:
    return Supernet(
        SearchSpace(primitives, nodes),
        channels,
        num_cells=3,
        num_classes=3,
        relaxation=EdgeNormalizedSoftmax(nodes),
        mixed_operation=partial(PartialMixedOperation, proportion=k),
    ).double()


def images(count: int = 4, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def values(tensors) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def furthest(ours, theirs) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_equations(name) -> None:
    network, supernet = pair_of(name)
    x, y = images()
    outputs = network(x), supernet(x)
    assert torch.allclose(*outputs, rtol=1e-11, atol=1e-12)
    for logits in outputs:
        F.cross_entropy(logits, y).backward()
    for ours, theirs in zip(supernet.arch_parameters(), network.arch_parameters(), strict=True):
        assert theirs.grad.abs().max() > 1e-5
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    gradients = official_gradients(supernet)
    for key, weight in network.named_parameters():
        assert torch.allclose(gradients[key], weight.grad, rtol=1e-9, atol=1e-12), key
    state = official_state_dict(supernet)
    assert state.keys() == network.state_dict().keys()
    for key, value in network.state_dict().items():
        assert torch.allclose(state[key], value, rtol=1e-11, atol=1e-13), key


def test_evaluation_computes_what_the_equations_do() -> None:
    network, supernet = pair_of()
    x, _ = images()
    network(x), supernet(x)
    assert torch.allclose(network.eval()(x), supernet.eval()(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_operations_see_one_of_k_parts_of_the_channels(k) -> None:
    """Two kernels on C / K channels: the operations' weights shrink with K."""
    state = official_state_dict(pc_supernet(channels=8, k=k))
    assert state["cells.0._ops.0._ops.3.op.1.weight"].shape == (8 // k, 1, 3, 3)
    assert state["cells.0._ops.0._ops.3.op.2.weight"].shape == (8 // k, 8 // k, 1, 1)


def test_channels_that_cannot_be_parted_are_refused() -> None:
    with pytest.raises(UserError, match=r"parts the channels in 4: 6 is not a multiple"):
        pc_supernet(channels=6)


def test_images_of_odd_size() -> None:
    """The official code fails; here what passes by is as large as the operations' output."""
    supernet = pc_supernet()
    logits = supernet(images(size=9)[0])
    assert logits.isfinite().all()
    assert logits.shape == (4, 3)


# Edge normalisation


def test_the_strengths_are_the_product_of_both_softmaxes() -> None:
    _, supernet = pair_of()
    normal, reduce, beta_normal, beta_reduce = supernet.arch_parameters()
    for kind, alpha, beta in (("normal", normal, beta_normal), ("reduce", reduce, beta_reduce)):
        for edges in (slice(0, 2), slice(2, 5)):  # node 0 has two edges, node 1 three
            share = beta[edges].exp() / beta[edges].exp().sum()
            softmax = alpha[edges].exp() / alpha[edges].exp().sum(1, keepdim=True)
            found = supernet.strengths()[kind][edges]
            assert torch.allclose(found, share[:, None] * softmax, rtol=1e-12)
            assert found.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("favourite", [0, 1, 2])
def test_the_genotype_is_read_with_edge_normalisation(favourite) -> None:
    """Beta alone decides here: node 1 keeps the edge that beta favours, first."""
    _, supernet = pair_of()
    alphas, betas = supernet.arch_parameters()[:2], supernet.arch_parameters()[2:]
    with torch.no_grad():
        for alpha, beta in zip(alphas, betas, strict=True):
            alpha.zero_()
            alpha[:, 3] = torch.tensor([1.0, 1.1, 1.0, 1.1, 1.2])  # sep_conv_3x3, by edge
            alpha[:, 0] = 5.0  # 'none' is no operation
            beta.zero_()
            beta[2 + favourite] = 2.0
    other = max({0, 1, 2} - {favourite})  # of the other two, the larger alpha
    expected = (("sep_conv_3x3", 1), ("sep_conv_3x3", 0))
    expected += (("sep_conv_3x3", favourite), ("sep_conv_3x3", other))
    assert supernet.genotype().normal == expected
    assert supernet.genotype().reduce == expected


def test_alpha_decides_where_beta_does_not() -> None:
    _, supernet = pair_of()
    with torch.no_grad():
        for beta in supernet.arch_parameters()[2:]:
            beta.fill_(0.7)
        for alpha in supernet.arch_parameters()[:2]:
            alpha.zero_()
            alpha[:, 1] = torch.tensor([1.0, 1.1, 1.2, 1.0, 1.1])
    expected = tuple(("max_pool_3x3", source) for source in (1, 0, 0, 2))
    assert supernet.genotype().normal == expected


def test_alphas_and_betas_are_searched_and_begin_small_and_apart() -> None:
    torch.manual_seed(0)
    supernet = pc_supernet(nodes=4)
    normal, reduce, beta_normal, beta_reduce = supernet.arch_parameters()
    assert normal.shape == reduce.shape == (14, 4)
    assert beta_normal.shape == beta_reduce.shape == (14,)
    assert not torch.equal(beta_normal, beta_reduce)
    assert 3e-4 < torch.cat([beta_normal, beta_reduce]).std() < 2e-3
    arch = {id(parameter) for parameter in supernet.arch_parameters()}
    assert not arch & {id(parameter) for parameter in supernet.weight_parameters()}


# The search


class Recorder(pl.Callback):
    def __init__(self) -> None:
        self.arch: list[list[Tensor]] = []
        self.weights: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.arch.append(values(pl_module.supernet.arch_parameters()))
        self.weights.append(values(pl_module.supernet.weight_parameters()))


def search(
    supernet: Supernet, batches: list, hypergradient, stages, epochs: int = -1, max_steps: int = -1
) -> Recorder:
    recorder = Recorder()
    module = SearchModule(supernet, hypergradient, SGD, ADAM, stages=stages)
    trainer = pl.Trainer(
        max_epochs=epochs,
        max_steps=max_steps,
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder],
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return recorder


@pytest.mark.parametrize("unrolled", [False, True], ids=["first order", "unrolled"])
def test_the_search_is_the_literal_search_with_a_warm_up(unrolled) -> None:
    network, supernet = pair_of()
    batches = [{"train": images(seed=i), "val": images(seed=10 + i)} for i in range(2)]
    hypergradient = Unrolled() if unrolled else FirstOrder()
    recorder = search(supernet, batches, hypergradient, AlphaWarmup(1), epochs=2)

    architect, optimizer = Architect(network), SGD(network.parameters())
    warm_up = SimpleNamespace(step=lambda *args: None)
    for step in range(4):
        pair, part = batches[step % 2], warm_up if step < 2 else architect
        search_step(network, part, optimizer, pair["train"], pair["val"], 0.1, unrolled)
        assert furthest(recorder.arch[step], network.arch_parameters()) < 1e-10, step
    state = official_state_dict(supernet)
    for key, value in network.state_dict().items():
        assert (state[key] - value).abs().max() < 1e-9, key


def test_edge_normalisation_of_another_number_of_nodes_is_refused() -> None:
    with pytest.raises(UserError, match="num_intermediate_nodes=4 has 14 edges, but alpha has 9"):
        EdgeNormalizedSoftmax(4)(torch.zeros(9, 8))


@pytest.mark.parametrize("num_epochs", [0, 1, 2])
def test_alpha_is_left_alone_in_the_warm_up_and_the_weights_are_not(num_epochs) -> None:
    _, supernet = pair_of()
    arch, weights = values(supernet.arch_parameters()), values(supernet.weight_parameters())
    batches = [{"train": images(), "val": images(seed=1)}]
    recorder = search(supernet, batches, FirstOrder(), AlphaWarmup(num_epochs), epochs=3)
    for epoch in range(3):
        moved = [not torch.equal(a, b) for a, b in zip(recorder.arch[epoch], arch, strict=True)]
        assert moved == [epoch >= num_epochs] * 4
        arch = recorder.arch[epoch]
        assert furthest(recorder.weights[epoch], weights) > 1e-4
        weights = recorder.weights[epoch]


def test_the_warm_up_of_the_paper_has_15_epochs() -> None:
    module = SimpleNamespace(num_epochs=lambda: 50)
    states = []
    for epoch in range(50):
        AlphaWarmup().enter(module, epoch)
        states.append(module.updates_alpha)
    assert states == [False] * 15 + [True] * 35


@pytest.mark.parametrize(
    ("length", "warnings"), [({"epochs": 2}, 1), ({"epochs": 3}, 0), ({"max_steps": 2}, 1)]
)
def test_a_search_that_ends_in_its_warm_up_says_so(length, warnings, caplog) -> None:
    _, supernet = pair_of()
    batches = [{"train": images(), "val": images(seed=1)}]
    search(supernet, batches, FirstOrder(), AlphaWarmup(2), **length)
    said = [line for line in caplog.messages if "method.stages.num_epochs" in line]
    assert len(said) == warnings


@pytest.mark.parametrize("k", [0, 1])
def test_there_are_parts(k) -> None:
    with pytest.raises(UserError, match=f"proportion is {k}"):
        pc_supernet(k=k)
