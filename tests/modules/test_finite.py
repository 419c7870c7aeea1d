"""A step whose gradients are not finite leaves everything as it was, and is counted."""

import math
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from dartsl.checkpoints import AtomicCheckpoint
from dartsl.errors import UserError
from dartsl.genotype import published
from dartsl.hypergradient import FirstOrder, Unrolled
from dartsl.modules import SearchModule, TrainModule, finite
from dartsl.modules.finite import FiniteSteps, mend_statistics
from dartsl.modules.resumable import make_optimizer
from dartsl.networks import FinalNetwork, Supernet
from dartsl.search_space import SearchSpace
from tests.modules.test_resume import assert_same

SPACE = SearchSpace(("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"), 2)
BAD = {"train": float("nan"), "val": float("inf")}


def batches(*bad: str) -> list[dict[str, Any]]:
    """One pair of batches for each word: "fine", or the half whose images are not finite."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for which in bad:
        pair = {
            half: (
                torch.randn(4, 1, 8, 8, generator=generator),
                torch.randint(10, (4,), generator=generator),
            )
            for half in ("train", "val")
        }
        if which in pair:
            pair[which][0][0, 0, 0, 0] = BAD[which]
        pairs.append(pair)
    return pairs


def search_module(kind: str, **options: Any) -> SearchModule:
    torch.manual_seed(1)
    supernet = Supernet(SPACE, channels=2, num_cells=3, in_channels=1)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=3e-4, **options)
    adam = partial(torch.optim.Adam, lr=0.1, betas=(0.5, 0.999), **options)
    return SearchModule(supernet, Unrolled() if kind == "unrolled" else FirstOrder(), sgd, adam)


def train_module(**options: Any) -> TrainModule:
    torch.manual_seed(1)
    network = FinalNetwork(published("darts_v2"), channels=4, num_cells=3, in_channels=1)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=3e-4, **options)
    return TrainModule(network, sgd, drop_path_prob=0.0)


class States(pl.Callback):
    """The parameters and the optimizers' states after every batch."""

    def __init__(self) -> None:
        self.after: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        optimizers = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
        parts = [list(pl_module.parameters()), optimizers]
        if isinstance(pl_module, SearchModule):
            supernet = pl_module.supernet
            weights, alphas = supernet.weight_parameters(), supernet.arch_parameters()
            parts = [list(pair) for pair in zip((weights, alphas), optimizers, strict=True)]
        self.after.append(torch.utils._pytree.tree_map_only(torch.Tensor, copy, parts))


def copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def fit(module: pl.LightningModule, data: list[Any], *callbacks: pl.Callback, **options) -> Any:
    trainer = pl.Trainer(
        **{"max_epochs": 1, "accelerator": "cpu"} | options,
        logger=False, callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None))
    return trainer


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["host", "fused"])
@pytest.mark.parametrize("kind", ["first_order", "unrolled"])
def test_a_bad_step_of_the_search_changes_nothing(kind: str, options: dict[str, Any]) -> None:
    """First in its run, and with momentum and moments to lose; each half has its own step."""
    words = ("train", "fine", "train", "val", "fine")
    states = States()
    module = search_module(kind, **options)
    start = [copy(weight) for weight in module.supernet.weight_parameters()]
    fit(module, batches(*words), states)
    weights, alphas = zip(*states.after, strict=True)
    assert_same(weights[0][0], start)
    assert_same(weights[2], weights[1])
    assert_same(alphas[3], alphas[2])
    unchanged = kind == "unrolled"  # there alpha looks through the training batch as well
    assert all(map(torch.equal, alphas[2][0], alphas[1][0])) == unchanged
    assert not any(map(torch.equal, alphas[4][0], alphas[3][0]))
    for before, after in ((1, 3), (3, 4)):
        assert not all(map(torch.equal, weights[after][0], weights[before][0]))
    by_weights, by_alpha = module.finite_steps
    assert by_weights.state_dict() == {"skipped": 2, "in_a_row": 0}
    assert by_alpha.state_dict() == {"skipped": 1 + 2 * unchanged, "in_a_row": 0}
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["host", "fused"])
def test_a_bad_step_of_a_training_changes_nothing(options: dict[str, Any]) -> None:
    states, module = States(), train_module(**options)
    data = [pair["train"] for pair in batches("fine", "train", "fine")]
    trainer = fit(module, data, states)
    assert_same(states.after[1], states.after[0])
    assert not all(map(torch.equal, states.after[2][0], states.after[1][0]))
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    assert trainer.callback_metrics["train/train_loss"].isfinite()


def test_a_skipped_first_step_is_as_if_it_had_not_been() -> None:
    """With a fused optimizer, which would allocate its momentum and not fill it."""
    skipped, never = train_module(fused=True), train_module(fused=True)
    fine = [pair["train"] for pair in batches("fine", "fine")]
    fit(skipped, [*[pair["train"] for pair in batches("train")], *fine])
    fit(never, fine)
    assert_same(list(skipped.parameters()), list(never.parameters()))


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_half_precision_counts_the_steps_that_its_scale_costs(accelerator: str) -> None:
    """The scale is far too high to begin with, and halves with every step that is skipped."""
    if accelerator == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    scaler = torch.amp.GradScaler(accelerator, init_scale=2.0**24)
    plugin = MixedPrecision("16-mixed", accelerator, scaler)
    module = search_module("first_order")
    fit(module, batches(*["fine"] * 24), plugins=[plugin], accelerator=accelerator)
    by_weights, by_alpha = module.finite_steps
    halvings = 24 - math.log2(scaler.get_scale())
    assert 1 <= max(by_weights.skipped, by_alpha.skipped) <= halvings < 24
    assert halvings <= by_weights.skipped + by_alpha.skipped
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("half", ["val", "train"])
def test_a_gradient_that_overflows_lowers_the_scale(half: str) -> None:
    """Be it that of alpha alone, or that of the weights."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module = search_module("first_order")
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    fit(module, batches("fine", half, "fine"), plugins=plugins)
    by_weights, by_alpha = module.finite_steps
    assert (int(by_weights.skipped), int(by_alpha.skipped)) == (
        (1, 0) if half == "train" else (0, 1)
    )
    assert scaler.get_scale() == 512


def test_the_counts_and_the_statistics_survive(tmp_path) -> None:
    module = search_module("first_order")
    trainer = fit(module, batches("fine", "train"))
    trainer.save_checkpoint(tmp_path / "bad.ckpt")
    resumed = search_module("first_order")
    other = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                       enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    other.fit(resumed, DataLoader(batches("fine", "train"), batch_size=None),
              ckpt_path=tmp_path / "bad.ckpt", weights_only=True)  # fmt: skip
    assert resumed.finite_steps[0].state_dict() == {"skipped": 1, "in_a_row": 1}
    assert not all(buffer.isfinite().all() for buffer in resumed.buffers())
    mend_statistics(resumed)
    assert all(buffer.isfinite().all() for buffer in resumed.buffers())


def test_only_what_is_not_finite_begins_anew() -> None:
    norm = nn.BatchNorm2d(3)
    norm.running_mean.copy_(torch.tensor([1.0, float("nan"), float("inf")]))
    norm.running_var.copy_(torch.tensor([float("-inf"), 2.0, float("nan")]))
    mend_statistics(norm)
    assert norm.running_mean.tolist() == [1, 0, 0]
    assert norm.running_var.tolist() == [1, 2, 1]


def test_too_many_in_a_row_end_the_run_and_its_checkpoint_stays(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(finite, "MAX_SKIPPED_IN_A_ROW", 5)
    words = ["fine", "fine", *["train"] * 5]
    module = search_module("first_order")
    with pytest.raises(UserError, match="gradients of the weights were not finite in the last 5 "):
        fit(module, batches(*words), AtomicCheckpoint(tmp_path, every_n_steps=4))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    one_fewer = search_module("first_order")
    fit(one_fewer, batches(*words[:-1], "fine"))
    assert one_fewer.finite_steps[0].state_dict() == {"skipped": 4, "in_a_row": 0}


def test_weights_that_are_not_finite_are_not_saved(tmp_path) -> None:
    class Ruin(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 1:
                next(pl_module.parameters()).data.fill_(float("inf"))

    with pytest.raises(UserError, match="weights are no longer finite"):
        fit(search_module("first_order"), batches(*["fine"] * 3), Ruin(),
            AtomicCheckpoint(tmp_path, every_n_steps=1))  # fmt: skip
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


def test_nothing_is_read_from_the_device_by_a_fused_optimizer() -> None:
    """Its decision can be made where nothing can be read at all."""
    weight = nn.Parameter(torch.zeros(2))
    steps = FiniteSteps(torch.optim.SGD([weight], lr=1.0, fused=True))
    steps.skipped, steps.in_a_row = steps.skipped.to("meta"), steps.in_a_row.to("meta")
    steps.admit(torch.empty((), device="meta"))
    assert steps.optimizer.found_inf.is_meta


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_optimizers_are_fused_unless_told_otherwise() -> None:
    weights = [nn.Parameter(torch.ones(2, device="cuda"))]
    for factory in (torch.optim.SGD, torch.optim.Adam):
        assert make_optimizer(partial(factory, lr=1.0), weights, "it").param_groups[0]["fused"]
        other = make_optimizer(partial(factory, lr=1.0, foreach=True), weights, "it")
        assert not other.param_groups[0]["fused"]


def test_on_a_cpu_optimizers_are_left_alone() -> None:
    weights = [nn.Parameter(torch.ones(2))]
    assert make_optimizer(partial(torch.optim.SGD, lr=1.0), weights, "it").defaults["fused"] is None
