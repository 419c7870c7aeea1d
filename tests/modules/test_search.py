"""The search as a Lightning run, against the literal search of tests/literal_darts.py."""

import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from dartsl.errors import UserError
from dartsl.genotype import Genotype
from dartsl.hypergradient import BilevelProblem, FirstOrder, Unrolled
from dartsl.interop import load_official_supernet, official_state_dict
from dartsl.modules import SearchModule
from dartsl.modules.search import edge_entropies
from dartsl.networks import Supernet
from dartsl.search_space import DARTS_PRIMITIVES, SearchSpace, discretize
from tests.literal_darts import Architect, Network, concat, search_step
from tests.modules.test_resume import MemoryLogger

CONF = Path(__file__).parents[2] / "conf"
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml") if path.stem != "default")

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=3e-4)
ADAM = partial(torch.optim.Adam, lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
SHORT = ("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3")

Batches = list[dict[str, tuple[Tensor, Tensor]]]


def case(**changes: Any) -> SimpleNamespace:
    """A search to be done by both: the network, the data, and the schedule."""
    default = {
        "channels": 2, "cells": 3, "classes": 3, "in_channels": 3, "size": (8, 8), "nodes": 2,
        "primitives": SHORT, "stem_multiplier": 3, "train": [4, 4], "val": [4, 4],
        "rates": [0.1], "clip": 5.0, "gain": 1.0,
    }  # fmt: skip
    assert changes.keys() <= default.keys()
    return SimpleNamespace(**(default | changes))


CASES = {
    "the paper's space": case(nodes=4, primitives=DARTS_PRIMITIVES, train=[4, 3]),
    "five cells, five channels of images": case(cells=5, in_channels=5, classes=7),
    "one channel of images, a wide stem": case(in_channels=1, channels=4, stem_multiplier=4),
    "images that are not square": case(size=(8, 12), classes=2, train=[5], val=[3]),
    "a short last batch": case(train=[6, 6, 2], val=[5, 5, 5]),
    "two epochs of different rates": case(rates=[0.1, 0.02], train=[4, 3], val=[3, 4]),
    "clipping active": case(clip=0.05, rates=[0.2, 0.1]),
    "clipping not active": case(clip=1e6, rates=[0.2, 0.1]),
    "three nodes of two operations": case(nodes=3, primitives=("avg_pool_3x3", "sep_conv_5x5")),
}


def random_batches(c: SimpleNamespace, seed: int = 5) -> Batches:
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, c.in_channels, *c.size, generator=generator, dtype=torch.float64)
        return x, torch.randint(c.classes, (count,), generator=generator)

    return [{"train": draw(t), "val": draw(v)} for t, v in zip(c.train, c.val, strict=True)]


def literal_network(c: SimpleNamespace, seed: int = 1) -> Network:
    torch.manual_seed(seed)
    network = Network(
        c.channels, c.classes, c.cells, c.in_channels, c.nodes, c.nodes, c.stem_multiplier,
        c.primitives,
    ).double()  # fmt: skip
    for alpha in network.arch_parameters():
        alpha.data.normal_(std=0.5)
    return network


def same_supernet(c: SimpleNamespace, network: Network) -> Supernet:
    space = SearchSpace(c.primitives, c.nodes)
    supernet = Supernet(
        space, c.channels, c.cells, c.classes, c.in_channels, c.stem_multiplier
    ).double()
    load_official_supernet(supernet, network.state_dict(), network.arch_parameters())
    return supernet


def fit(
    module: SearchModule, batches: Batches, val: list | None = None, **options: Any
) -> pl.Trainer:
    defaults = {
        "max_epochs": 1, "accelerator": "cpu", "precision": "64-true", "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    trainer = pl.Trainer(**(defaults | options))
    loaders = [DataLoader(part, batch_size=None) for part in (batches, val) if part is not None]
    trainer.fit(module, *loaders)
    return trainer


def values(parameters) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def furthest(ours, theirs) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


class Recorder(pl.Callback):
    """Alphas, loss, learning rate and global_step after each batch."""

    def __init__(self) -> None:
        self.alphas: list[list[Tensor]] = []
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.alphas.append(values(pl_module.supernet.arch_parameters()))
        self.losses.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.steps.append(trainer.global_step)


# Against the oracle


@pytest.mark.parametrize("unrolled", [False, True], ids=["first order", "unrolled"])
@pytest.mark.parametrize("name", CASES)
def test_the_search_is_the_literal_search(name, unrolled) -> None:
    c = CASES[name]
    network, batches = literal_network(c), random_batches(c)
    supernet = same_supernet(c, network)
    hypergradient = Unrolled() if unrolled else FirstOrder()
    module = SearchModule(supernet, hypergradient, SGD, ADAM, c.rates.__getitem__, c.clip)
    recorder = Recorder()
    fit(module, batches, max_epochs=len(c.rates), callbacks=[recorder])

    architect, optimizer = Architect(network), SGD(network.parameters())
    for step in range(len(c.rates) * len(batches)):
        epoch, index = divmod(step, len(batches))
        pair, rate = batches[index], c.rates[epoch]
        loss, _ = search_step(
            network, architect, optimizer, pair["train"], pair["val"], rate, unrolled, c.clip
        )
        assert abs(recorder.losses[step] - loss.item()) < 1e-10, f"loss of step {step}"
        assert furthest(recorder.alphas[step], network.arch_parameters()) < 1e-10, step
        assert recorder.rates[step] == rate
        norm = concat(w.grad for w in network.parameters()).norm()
        assert norm < 0.99 * c.clip or norm == pytest.approx(c.clip, rel=1e-3)
        if name.startswith("clipping"):
            assert (norm < 0.99 * c.clip) == ("not" in name)

    state, expected = official_state_dict(supernet), network.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        if key.endswith("num_batches_tracked"):
            assert state[key] == value == (4 if unrolled else 2) * len(recorder.steps)
        else:
            assert (state[key] - value).abs().max() < 1e-9, key


def one_step(hypergradient: Any, c: SimpleNamespace, **options: Any) -> list[Tensor]:
    """By how much the first step moves alpha, at a learning rate of 1: minus its gradient."""
    supernet = same_supernet(c, literal_network(c))
    before = values(supernet.arch_parameters())
    arch_optimizer = partial(torch.optim.SGD, lr=1.0)
    module = SearchModule(supernet, hypergradient, SGD, arch_optimizer, **options)
    fit(module, random_batches(c)[:1])
    return [a - b for a, b in zip(values(supernet.arch_parameters()), before, strict=True)]


def test_the_unrolled_flag_is_not_ignored() -> None:
    first, unrolled, exact = (
        one_step(hypergradient, case())
        for hypergradient in (FirstOrder(), Unrolled(), Unrolled("exact"))
    )
    size = max(gradient.abs().max().item() for gradient in first)
    assert furthest(first, unrolled) > 1e-2 * size
    assert furthest(first, exact) > 1e-2 * size


def test_the_second_order_term_has_its_full_size() -> None:
    """(p - n) / 2 * eps in place of / (2 * eps), or two lists that alias, leave nothing of it."""
    c = case()
    network, (pair, *_) = literal_network(c), random_batches(c)
    architect = Architect(network)
    virtual = architect.virtual_network(pair["train"], 0.1, SGD(network.parameters()))
    virtual.loss(*pair["val"]).backward()
    vector = [w.grad for w in virtual.parameters()]
    products = architect.finite_difference(vector, pair["train"])
    ours = one_step(Unrolled(), c)
    for move, alpha, product in zip(ours, virtual.arch_parameters(), products, strict=True):
        second_order = -alpha.grad - move
        assert torch.allclose(second_order, -0.1 * product, rtol=1e-6, atol=1e-10)
        assert product.abs().max() > 1e-3


def test_xi_is_the_learning_rate_at_the_beginning_of_the_step() -> None:
    """Whoever sets it: here a callback, after the schedule."""

    class SetRate(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            trainer.optimizers[0].param_groups[0]["lr"] = 0.3

    c = case(train=[4], val=[4])
    network, batches = literal_network(c), random_batches(c)
    supernet = same_supernet(c, network)
    module = SearchModule(supernet, Unrolled(), SGD, ADAM)
    fit(module, batches, callbacks=[SetRate()])
    optimizer = SGD(network.parameters())
    search_step(
        network, Architect(network), optimizer, batches[0]["train"], batches[0]["val"], 0.3, True
    )
    assert furthest(supernet.arch_parameters(), network.arch_parameters()) < 1e-12


# What every method shares; the list is that of conf/method


def slots(name: str) -> SimpleNamespace:
    """The seven slots as `conf/method/<name>.yaml` fills them, for a space of two nodes."""
    overrides = [
        "experiment=search_digits", f"method={name}", "search_space.num_intermediate_nodes=2",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        method = compose("config", overrides).method
        return SimpleNamespace(**{slot: instantiate(method[slot]) for slot in method})


class Watched(SearchModule):
    """Keeps what the two halves of a step have changed."""

    def alpha_step(self, train, val) -> None:
        weights = values(self.supernet.weight_parameters())
        alphas = values(self.supernet.arch_parameters())
        super().alpha_step(train, val)
        self.weights_kept = all(map(torch.equal, weights, self.supernet.weight_parameters()))
        self.alpha_moves = furthest(self.supernet.arch_parameters(), alphas)
        self.alpha_gradients = values(alpha.grad for alpha in self.supernet.arch_parameters())

    def weight_step(self, train):
        weights = values(self.supernet.weight_parameters())
        alphas = values(self.supernet.arch_parameters())
        loss = super().weight_step(train)
        arch = self.supernet.arch_parameters()
        self.weight_moves = [
            (w.detach() - old).abs().max().item()
            for w, old in zip(self.supernet.weight_parameters(), weights, strict=True)
        ]
        self.alphas_kept = all(map(torch.equal, alphas, arch))
        if hasattr(self, "alpha_gradients"):
            grads = [alpha.grad for alpha in arch]
            self.alpha_gradients_kept = all(map(torch.equal, self.alpha_gradients, grads))
        return loss


def method_module(name: str, **changes: Any) -> tuple[Watched, Batches]:
    c, method = case(channels=4), slots(name)
    torch.manual_seed(1)
    supernet = Supernet(
        SearchSpace(c.primitives, c.nodes), c.channels, c.cells, c.classes,
        relaxation=method.relaxation, mixed_operation=method.mixed_operation,
    ).double()  # fmt: skip
    arguments = {
        "weight_optimizer": SGD, "arch_optimizer": method.arch_optimizer,
        "penalty": method.penalty, "selection": method.selection, "stages": None,
    }  # fmt: skip
    module = Watched(supernet, method.hypergradient, **(arguments | changes))
    return module, random_batches(c)


@pytest.mark.parametrize("name", METHODS)
def test_one_batch_is_one_global_step_and_each_half_of_a_step_moves_its_own(name) -> None:
    module, batches = method_module(name)
    recorder = Recorder()
    fit(module, batches, max_epochs=2, callbacks=[recorder])
    assert recorder.steps == [1, 2, 3, 4]
    assert module.weights_kept
    assert module.alpha_moves > 1e-6
    assert module.alphas_kept
    assert module.alpha_gradients_kept
    # What a loss does not depend on moves by its decay alone, so that every weight moves.
    assert min(module.weight_moves) > 0


@pytest.mark.parametrize("name", METHODS)
def test_each_optimizer_holds_its_own_parameters(name) -> None:
    module, batches = method_module(name)
    trainer = fit(module, batches[:1])
    held = [
        [id(p) for group in optimizer.param_groups for p in group["params"]]
        for optimizer in trainer.optimizers
    ]
    supernet = module.supernet
    assert held[0] == [id(p) for p in supernet.weight_parameters()]
    assert held[1] == [id(p) for p in supernet.arch_parameters()]
    assert not set(held[0]) & set(held[1])
    assert sorted(held[0] + held[1]) == sorted(id(p) for p in supernet.parameters())
    wrapped = [optimizer.optimizer for optimizer in module.optimizers()]
    assert wrapped == trainer.optimizers


@pytest.mark.parametrize("name", METHODS)
def test_the_gradients_of_alpha_are_not_clipped_and_those_of_the_weights_are(name) -> None:
    moves = []
    for clip in (1e-9, 1e9):
        module, batches = method_module(
            name,
            weight_optimizer=partial(torch.optim.SGD, lr=0.1),
            arch_optimizer=partial(torch.optim.SGD, lr=1.0),
            gradient_clip=clip,
        )
        before = values(module.supernet.arch_parameters())
        weights = concat(values(module.supernet.weight_parameters()))
        fit(module, batches[:1])
        moves.append(concat(values(module.supernet.arch_parameters())) - concat(before))
        distance = (concat(values(module.supernet.weight_parameters())) - weights).norm()
        assert (distance < 1.01e-10) == (clip < 1)
    assert torch.equal(*moves)
    assert moves[0].norm() > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_every_shipped_method_searches_a_genotype_of_its_space(name) -> None:
    module, batches = method_module(name)
    fit(module, batches)
    genotype = module.genotype()
    for edges in (genotype.normal, genotype.reduce):
        assert len(edges) == 4
        assert {primitive for primitive, _ in edges} <= set(SHORT) - {"none"}


def test_the_weight_step_goes_through_manual_backward() -> None:
    """`loss.backward()` knows no loss scaling and no DDP."""
    module, batches = method_module("darts_first_order")
    scalars = []
    backward = module.manual_backward

    def spy(loss: Tensor, *args: Any) -> None:
        scalars.append(loss.detach().clone())
        backward(loss, *args)

    module.manual_backward = spy
    recorder = Recorder()
    fit(module, batches, callbacks=[recorder])
    assert [scalar.item() for scalar in scalars] == recorder.losses


def test_clipping_is_blind_to_loss_scaling() -> None:
    """Gradients that are clipped before they are unscaled move the weights 65536 times less."""
    moves = []
    for plugins in ([], [scaled_precision()]):
        c = case()
        supernet = same_supernet(c, literal_network(c)).float()
        before = concat(values(supernet.weight_parameters()))
        plain_sgd = partial(torch.optim.SGD, lr=0.1)
        module = SearchModule(supernet, FirstOrder(), plain_sgd, ADAM, gradient_clip=0.5)
        batches = [
            {half: (x.float(), y) for half, (x, y) in pair.items()} for pair in random_batches(c)
        ]
        options = {"plugins": plugins, "precision": None if plugins else "32-true"}
        fit(module, batches[:1], **options)
        moves.append(concat(values(supernet.weight_parameters())) - before)
    assert moves[0].norm() == pytest.approx(0.05, rel=1e-3)  # the clipping is active
    assert moves[1].norm() == pytest.approx(0.05, rel=1e-2)


def scaled_precision() -> MixedPrecision:
    """What precision=16-mixed does on a GPU, its autocast in bfloat16, which a CPU is fast in."""
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=65536.0))
    precision.autocast_context_manager = lambda: torch.autocast("cpu", torch.bfloat16)
    return precision


@pytest.mark.parametrize("hypergradient", [FirstOrder(), Unrolled(), Unrolled("exact")])
def test_alpha_moves_as_far_with_loss_scaling_as_without(hypergradient) -> None:
    ends = []
    for scaled in (False, True):
        c = case()
        supernet = same_supernet(c, literal_network(c)).float()
        precision = scaled_precision()
        precision.autocast_context_manager = nullcontext
        pairs = [{h: (x.float(), y) for h, (x, y) in pair.items()} for pair in random_batches(c)]
        plugins = [precision] if scaled else []
        options = {"plugins": plugins, "precision": None if scaled else "32-true"}
        fit(SearchModule(supernet, hypergradient, SGD, ADAM), pairs, **options)
        ends.append(concat(values(supernet.arch_parameters())))
    assert furthest(ends[:1], ends[1:]) < 1e-6


def test_an_alpha_step_that_overflows_is_left_out() -> None:
    c = case()
    supernet = same_supernet(c, literal_network(c)).float()
    before = values(supernet.arch_parameters())
    precision = scaled_precision()
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
    pairs = [{h: (x.float(), y) for h, (x, y) in pair.items()} for pair in random_batches(c)]
    module = SearchModule(supernet, FirstOrder(), SGD, ADAM)
    fit(module, pairs[:1], plugins=[precision], precision=None)
    assert furthest(values(supernet.arch_parameters()), before) == 0
    assert not module.trainer.optimizers[1].state


def test_the_finite_difference_is_in_full_precision_under_autocast() -> None:
    """In bfloat16 the difference of the two passes is noise, as large as the term itself."""
    c = case()
    supernet = same_supernet(c, literal_network(c)).float()
    dtypes = []
    supernet.register_forward_hook(lambda module, x, logits: dtypes.append(logits.dtype))
    pairs = [{half: (x.float(), y) for half, (x, y) in pair.items()} for pair in random_batches(c)]
    fit(SearchModule(supernet, Unrolled(), SGD, ADAM), pairs[:1], precision="bf16-mixed")
    assert len(dtypes) == 5  # w, w', w + epsilon v, w - epsilon v, and the weight step
    assert dtypes[2:4] == [torch.float32, torch.float32]
    assert dtypes[4] == torch.bfloat16


# The other slots


def test_the_penalty_is_a_term_of_the_loss_that_alpha_descends() -> None:
    c = case()
    plain = one_step(FirstOrder(), c)
    penalised = one_step(
        FirstOrder(), c, penalty=lambda s: sum(3 * (a**2).sum() for a in s.arch_parameters())
    )
    alphas = literal_network(c).arch_parameters()
    expected = [move - 6 * alpha for move, alpha in zip(plain, alphas, strict=True)]
    assert furthest(penalised, expected) < 1e-12


def weight_norm(supernet: Supernet) -> Tensor:
    return sum((w**2).sum() for w in supernet.weight_parameters())


def test_the_penalty_is_no_term_of_the_loss_of_the_weights() -> None:
    ends = []
    for penalty in (None, weight_norm):
        c = case()
        supernet = same_supernet(c, literal_network(c))
        recorder = Recorder()
        module = SearchModule(supernet, FirstOrder(), SGD, ADAM, penalty=penalty)
        fit(module, random_batches(c), callbacks=[recorder])
        ends.append((values(supernet.parameters()), recorder.losses))
    assert ends[0][1] == ends[1][1]
    assert all(map(torch.equal, ends[0][0], ends[1][0]))


def test_the_unrolled_penalty_acts_through_the_virtual_weights() -> None:
    plain, penalised = (
        one_step(Unrolled(), case()),
        one_step(Unrolled(), case(), penalty=weight_norm),
    )
    assert furthest(plain, penalised) > 1e-3


FIXED = Genotype(
    (("skip_connect", 0), ("skip_connect", 1), ("skip_connect", 1), ("sep_conv_3x3", 2)), (2, 3),
    (("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 0), ("max_pool_3x3", 1)), (2, 3),
)  # fmt: skip


def test_the_selection_reads_the_genotype() -> None:
    asked = []

    def selection(supernet: Supernet) -> Genotype:
        asked.append(supernet)
        return FIXED

    module, batches = method_module("darts_first_order", selection=selection)
    trainer = fit(module, batches)
    assert module.genotype() is FIXED
    assert all(supernet is module.supernet for supernet in asked)
    assert trainer.callback_metrics["alpha/normal_skip_connections"] == 3
    assert trainer.callback_metrics["alpha/reduce_skip_connections"] == 1


class Stages:
    """Without alpha steps in epoch 0; halves the learning rate of epoch 1."""

    def __init__(self) -> None:
        self.entered: list[tuple[int, int]] = []

    def enter(self, module: SearchModule, epoch: int) -> None:
        self.entered.append((epoch, module.global_step))
        module.updates_alpha = epoch >= 1
        if epoch == 1:
            module.schedule = lambda epoch: 0.05


@pytest.mark.parametrize("hypergradient", [FirstOrder(), Unrolled()])
def test_the_stages_are_entered_before_every_batch(hypergradient) -> None:
    stages, recorder = Stages(), Recorder()
    module, batches = method_module("darts_first_order", stages=stages, schedule=lambda epoch: 0.1)
    before = values(module.supernet.arch_parameters())
    module.hypergradient = hypergradient
    fit(module, batches, max_epochs=2, callbacks=[recorder])
    assert stages.entered == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert recorder.rates == [0.1, 0.1, 0.05, 0.05]
    assert all(map(torch.equal, recorder.alphas[1], before))
    assert furthest(recorder.alphas[2], before) > 1e-6


def test_without_a_schedule_the_learning_rate_is_left_alone() -> None:
    module, batches = method_module("darts_first_order")
    recorder = Recorder()
    fit(module, batches, callbacks=[recorder])
    assert recorder.rates == [0.1, 0.1]


@pytest.mark.parametrize(
    "optimizer", [partial(torch.optim.Adam, lr=0.1), partial(SGD, nesterov=True)]
)
def test_an_unrolled_search_needs_the_step_of_plain_sgd(optimizer) -> None:
    module, batches = method_module("darts_unrolled", weight_optimizer=optimizer)
    forwards = []
    module.supernet.register_forward_hook(lambda *args: forwards.append(args))
    with pytest.raises(UserError, match=r"plain SGD .* method=darts_first_order"):
        fit(module, batches)
    assert not forwards  # refused before anything is computed


def test_a_first_order_search_takes_any_optimizer() -> None:
    adam = partial(torch.optim.Adam, lr=0.01)
    module, batches = method_module("darts_first_order", weight_optimizer=adam)
    fit(module, batches)
    assert min(module.weight_moves) > 0


# What is logged


def entropy(alpha: Tensor) -> float:
    p = torch.softmax(alpha.detach(), dim=1)
    return -(p * p.log()).sum(1).mean().item()


def mean_over_examples(results: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Loss and accuracy of (logits, labels) of all batches together."""
    logits, labels = (torch.cat(parts) for parts in zip(*results, strict=True))
    hits = (logits.argmax(1) == labels).double().mean()
    return F.cross_entropy(logits, labels).item(), hits.item()


def test_what_is_logged_after_each_epoch() -> None:
    c = case(train=[6, 6, 2], val=[5, 5, 5], rates=[0.1, 0.02], classes=2)
    network, batches = literal_network(c), random_batches(c)
    network.alphas_normal.data[:, 2] += 2  # skip connections win most edges of the normal cell
    network.alphas_reduce.data[0, 2] += 3
    evaluation = [
        pair["train"] for pair in random_batches(case(train=[7, 2], val=[1, 1], classes=2), 9)
    ]
    supernet = same_supernet(c, network)
    module = SearchModule(supernet, FirstOrder(), SGD, ADAM, c.rates.__getitem__)
    logger = MemoryLogger()
    fit(module, batches, evaluation, max_epochs=2, logger=logger, log_every_n_steps=1)
    logged: dict[str, list[float]] = {}
    for _, row in logger.rows:
        for name, value in row.items():
            logged.setdefault(name, []).append(value)

    architect, optimizer = Architect(network), SGD(network.parameters())
    expected: dict[str, list[float]] = {name: [] for name in logged}
    for epoch, rate in enumerate(c.rates):
        trained = []
        for pair in batches:
            loss, logits = search_step(
                network, architect, optimizer, pair["train"], pair["val"], rate, unrolled=False
            )
            trained.append((logits, pair["train"][1]))
            expected["search/train_loss_step"].append(loss.item())
        network.eval()
        with torch.no_grad():
            evaluated = [(network(x), y) for x, y in evaluation]
        network.train()
        for half, results in (("train", trained), ("val", evaluated)):
            loss, accuracy = mean_over_examples(results)
            expected[f"search/{half}_loss"].append(loss)
            expected[f"search/{half}_accuracy"].append(accuracy)
        expected["search/learning_rate"].append(rate)
        for what in ("weight", "alpha"):
            expected[f"search/skipped_{what}_steps"].append(0)
        expected["epoch"] += len(batches) * [epoch] + [epoch] * (len(logged["epoch"]) // 2 - 3)
        found = dict(zip(("normal", "reduce"), network.arch_parameters(), strict=True))
        strengths = {kind: torch.softmax(alpha, 1) for kind, alpha in found.items()}
        genotype = discretize(strengths, SearchSpace(c.primitives, c.nodes))
        for kind, alpha in found.items():
            expected[f"alpha/{kind}_entropy"].append(entropy(alpha))
            skips = [name for name, _ in getattr(genotype, kind)].count("skip_connect")
            expected[f"alpha/{kind}_skip_connections"].append(skips)

    assert expected["alpha/normal_skip_connections"] > [1, 1]
    for name, numbers in expected.items():
        assert logged[name] == pytest.approx(numbers, rel=1e-6), name


def test_validation_is_in_evaluation_mode_and_leaves_the_supernet_alone() -> None:
    module, batches = method_module("darts_first_order")
    seen: dict[str, Any] = {"modes": set(), "states": []}

    class Watch(pl.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_) -> None:
            seen["modes"].add(any(part.training for part in pl_module.supernet.modules()))
            seen["states"].append(values(pl_module.supernet.state_dict().values()))

        def on_validation_batch_end(self, trainer, pl_module, *_) -> None:
            seen["states"].append(values(pl_module.supernet.state_dict().values()))

        def on_train_batch_start(self, trainer, pl_module, *_) -> None:
            assert all(part.training for part in pl_module.supernet.modules())

    evaluation = [pair["val"] for pair in batches]
    fit(module, batches, evaluation, max_epochs=2, callbacks=[Watch()])
    assert seen["modes"] == {False}
    for first in range(0, len(seen["states"]), 4):  # an epoch's two batches
        for state in seen["states"][first + 1 : first + 4]:
            assert all(map(torch.equal, state, seen["states"][first]))


def test_the_checkpoint_holds_the_alphas_and_loads_with_weights_only(tmp_path) -> None:
    module, batches = method_module("pc_darts")
    trainer = fit(module, batches)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    kept = [value for value in state.values() if value.is_floating_point()]
    for alpha in module.supernet.arch_parameters():
        assert any(v.shape == alpha.shape and torch.equal(v, alpha) for v in kept)


# What a user of Lightning alone may do


@pytest.mark.parametrize(
    "hypergradient", [FirstOrder(), Unrolled(), Unrolled("exact")], ids=["first", "eq8", "eq7"]
)
def test_what_is_frozen_stays_and_the_others_move(hypergradient) -> None:
    c = case()
    supernet = same_supernet(c, literal_network(c))
    frozen = [*supernet.stem.parameters(), supernet.alphas["reduce"]]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before, others = values(frozen), values(supernet.cells.parameters())
    normal = values([supernet.alphas["normal"]])
    fit(SearchModule(supernet, hypergradient, SGD, ADAM), random_batches(c)[:1])
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))
    assert furthest([supernet.alphas["normal"]], normal) > 0
    assert furthest(supernet.cells.parameters(), others) > 0


class Freezing:
    """Alpha of the normal cells moves in the first epoch alone."""

    def enter(self, module: SearchModule, epoch: int) -> None:
        module.supernet.alphas["normal"].requires_grad_(epoch < 1)


@pytest.mark.parametrize("hypergradient", [FirstOrder(), Unrolled()])
def test_what_a_stage_freezes_stays(hypergradient) -> None:
    """Neither weight decay nor what Adam remembers moves it."""
    c, recorder = case(), Recorder()
    supernet = same_supernet(c, literal_network(c))
    module = SearchModule(supernet, hypergradient, SGD, ADAM, stages=Freezing())
    fit(module, random_batches(c), max_epochs=2, callbacks=[recorder])
    begun, *_, ended = recorder.alphas[1:]
    assert torch.equal(begun[0], ended[0])
    assert furthest(begun[1:], ended[1:]) > 1e-6
    assert furthest(recorder.alphas[0], begun) > 1e-6


@pytest.mark.parametrize(
    "wrong",
    [
        lambda gradients: gradients[:1],
        lambda gradients: [None, gradients[1]],
        lambda gradients: [gradient[:1] for gradient in gradients],  # copy_ would spread it
    ],
    ids=["one", "none", "a row"],
)
def test_a_hypergradient_gives_a_gradient_for_every_alpha(wrong) -> None:
    c = case()
    supernet = same_supernet(c, literal_network(c))
    module = SearchModule(supernet, lambda problem: wrong(FirstOrder()(problem)), SGD, ADAM)
    with pytest.raises(UserError, match=r"one for each alpha, \[5, 5\], \[5, 5\]"):
        fit(module, random_batches(c))


def test_a_hypergradient_may_leave_gradients_where_it_computes_them() -> None:
    """As the official architect does, by `backward`."""

    def official(problem: BilevelProblem) -> list[Tensor]:
        problem.val_loss().backward()
        return [alpha.grad.clone() for alpha in problem.alphas]

    c, ends = case(train=[4, 4, 4], val=[4, 4, 4]), []
    for hypergradient in (official, FirstOrder()):
        supernet = same_supernet(c, literal_network(c))
        fit(SearchModule(supernet, hypergradient, SGD, ADAM), random_batches(c))
        ends.append(values(supernet.parameters()))
    assert furthest(*ends) < 1e-10


def test_batches_of_one_half_are_refused() -> None:
    c = case()
    module = SearchModule(same_supernet(c, literal_network(c)), FirstOrder(), SGD, ADAM)
    with pytest.raises(UserError, match=r'A search takes batches {"train": '):
        fit(module, [batch["train"] for batch in random_batches(c)])


def test_batches_without_the_other_half_are_refused() -> None:
    c = case()
    module = SearchModule(same_supernet(c, literal_network(c)), FirstOrder(), SGD, ADAM)
    with pytest.raises(UserError, match=r'A search takes batches {"train": '):
        fit(module, [{"train": batch["train"]} for batch in random_batches(c)])


def test_entropies_of_any_strengths_are_numbers() -> None:
    strengths = torch.tensor([[0.5, 0.5], [0.0, 0.0], [-1.0, 2.0]])
    assert torch.allclose(edge_entropies(strengths), torch.tensor([math.log(2), 0.0, 0.0]))
