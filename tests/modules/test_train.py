"""The training of a final network as a Lightning run, against a plain PyTorch loop."""

import copy
import math
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from dartsl.errors import UserError
from dartsl.genotype import published
from dartsl.modules import TrainModule
from dartsl.networks import FinalNetwork
from tests.modules.test_resume import MemoryLogger

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=3e-4)
RATES = (0.1, 0.02, 0.05)

Batches = list[tuple[Tensor, Tensor]]


def network(**changes: Any) -> FinalNetwork:
    torch.manual_seed(1)
    arguments = {"channels": 4, "num_cells": 3, "num_classes": 3}
    return FinalNetwork(published("darts_v2"), **(arguments | changes)).double()


def batches(*sizes: int, seed: int = 5, scale: float = 1.0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            scale * torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator),
        )
        for size in sizes
    ]


def trainer_of(**options: Any) -> pl.Trainer:
    defaults = {
        "max_epochs": 1, "accelerator": "cpu", "precision": "64-true", "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return pl.Trainer(**(defaults | options))


def fit(
    module: TrainModule, train: Batches, val: Batches | None = None, **options: Any
) -> pl.Trainer:
    trainer = trainer_of(**options)
    parts = [DataLoader(part, batch_size=None) for part in (train, val) if part is not None]
    trainer.fit(module, *parts)
    return trainer


def cross_entropy(logits: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over images of -sum_k q_k log p_k, q = (1 - smoothing) * one-hot + smoothing / K."""
    classes = logits.shape[1]
    target = (1 - smoothing) * F.one_hot(y, classes).double() + smoothing / classes
    return -(target * logits.log_softmax(1)).sum(1).mean()


def total_loss(net: FinalNetwork, x: Tensor, y: Tensor, smoothing=0.0, weight=0.4) -> Tensor:
    logits, auxiliary_logits = net(x)
    loss = cross_entropy(logits, y, smoothing)
    if auxiliary_logits is None:
        return loss
    return loss + weight * cross_entropy(auxiliary_logits, y, smoothing)


class Recorder(pl.Callback):
    """What held in each step: its loss, learning rate, drop path and clipped gradient norm."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.drop_paths: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))
        gradients = [p.grad.flatten() for p in pl_module.network.parameters()]
        self.norms.append(torch.cat(gradients).norm().item())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.drop_paths.append(pl_module.network.drop_path_prob)


# The loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [0.4, 0.0, 1.5])
def test_the_loss_is_cross_entropy_plus_the_weighted_auxiliary_one(weight, smoothing) -> None:
    net, data, recorder = network(), batches(5), Recorder()
    expected = total_loss(copy.deepcopy(net), *data[0], smoothing, weight)
    module = TrainModule(
        net, SGD, auxiliary_weight=weight, label_smoothing=smoothing, drop_path_prob=0.0
    )
    fit(module, data, callbacks=[recorder])
    assert recorder.losses[0] == pytest.approx(expected.item(), abs=1e-12)


def test_the_auxiliary_weight_of_the_paper_is_the_default() -> None:
    net, data, recorder = network(), batches(5), Recorder()
    expected = total_loss(copy.deepcopy(net), *data[0], weight=0.4)
    fit(TrainModule(net, SGD), data, callbacks=[recorder])
    assert recorder.losses[0] == pytest.approx(expected.item(), abs=1e-12)


def test_a_network_without_an_auxiliary_head_has_one_term() -> None:
    net, data, recorder = network(auxiliary=False), batches(5), Recorder()
    expected = cross_entropy(copy.deepcopy(net)(data[0][0])[0], data[0][1])
    fit(TrainModule(net, SGD), data, callbacks=[recorder])
    assert recorder.losses[0] == pytest.approx(expected.item(), abs=1e-12)


# The step


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_two_epochs_are_those_of_a_plain_loop(smoothing) -> None:
    net, data, recorder = network(), batches(6, 6, 2), Recorder()
    plain = copy.deepcopy(net)
    module = TrainModule(net, SGD, RATES.__getitem__, label_smoothing=smoothing, drop_path_prob=0.0)
    fit(module, data, max_epochs=2, callbacks=[recorder])

    optimizer = SGD(plain.parameters())
    losses = []
    for rate in RATES[:2]:
        optimizer.param_groups[0]["lr"] = rate
        for x, y in data:
            optimizer.zero_grad()
            loss = total_loss(plain, x, y, smoothing)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 5.0)
            optimizer.step()
            losses.append(loss.item())
    assert recorder.losses == pytest.approx(losses, abs=1e-10)
    found = net.state_dict()
    for key, value in plain.state_dict().items():
        assert (found[key] - value).abs().max() < 1e-10, key


def test_gradients_are_clipped_to_a_norm_of_5() -> None:
    """By the factor 5 / (norm + 1e-6), where the norm is larger; otherwise left alone."""
    net, data, recorder = network(), batches(6, 6), Recorder()
    net.classifier.weight.data *= 100  # steep
    plain = copy.deepcopy(net)
    total_loss(plain, *data[0]).backward()
    gradients = torch.cat([p.grad.flatten() for p in plain.parameters()])
    assert gradients.norm() > 10
    fit(TrainModule(net, SGD, drop_path_prob=0.0), data, callbacks=[recorder])
    norm = gradients.norm().item()
    assert recorder.norms[0] == pytest.approx(norm * 5 / (norm + 1e-6), rel=1e-9)


@pytest.mark.parametrize(("clip", "clipped"), [(0.01, True), (1e6, False)])
def test_the_norm_of_clipping_is_an_argument(clip, clipped) -> None:
    net, data, recorder = network(), batches(6), Recorder()
    plain = copy.deepcopy(net)
    total_loss(plain, *data[0]).backward()
    norm = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm().item()
    module = TrainModule(net, SGD, drop_path_prob=0.0, gradient_clip=clip)
    fit(module, data, callbacks=[recorder])
    assert recorder.norms[0] == pytest.approx(clip if clipped else norm, rel=1e-3)


def test_the_optimizer_holds_every_parameter_and_steps_once_a_batch() -> None:
    net = network()
    trainer = fit(TrainModule(net, SGD), batches(3, 3, 3), max_epochs=2)
    (group,) = trainer.optimizers[0].param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in net.parameters()]
    assert trainer.global_step == 6


# The schedules


def test_the_learning_rate_is_a_function_of_the_epoch() -> None:
    recorder = Recorder()
    module = TrainModule(network(), SGD, RATES.__getitem__)
    fit(module, batches(3, 3), max_epochs=3, callbacks=[recorder])
    assert recorder.rates == [rate for rate in RATES for _ in range(2)]


def test_without_a_schedule_the_learning_rate_is_left_alone() -> None:
    recorder = Recorder()
    fit(TrainModule(network(), SGD), batches(3), max_epochs=2, callbacks=[recorder])
    assert recorder.rates == [0.1, 0.1]


@pytest.mark.parametrize("options", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 8}])
def test_drop_path_grows_linearly_with_the_epoch(options) -> None:
    """0.2 * epoch / epochs, set before each batch; epochs from max_steps where that ends a run."""
    recorder = Recorder()
    module = TrainModule(network(), SGD)
    fit(module, batches(3, 3), callbacks=[recorder], **options)
    expected = [0.2 * epoch / 4 for epoch in range(4) for _ in range(2)]
    assert recorder.drop_paths == pytest.approx(expected, abs=1e-15)


def test_drop_path_acts_in_training() -> None:
    """The second epoch's losses differ from those without; the first one's do not."""
    losses = []
    for drop_path_prob in (0.0, 0.9):
        recorder = Recorder()
        module = TrainModule(network(), SGD, drop_path_prob=drop_path_prob)
        fit(module, batches(6), max_epochs=2, callbacks=[recorder])
        losses.append(recorder.losses)
    assert losses[0][0] == losses[1][0]
    assert abs(losses[0][1] - losses[1][1]) > 1e-3


# Evaluation and what is logged


class Modes(pl.Callback):
    """Whether the auxiliary head spoke, in training and in validation."""

    def __init__(self, net: FinalNetwork) -> None:
        self.spoke: list[tuple[bool, bool]] = []
        net.register_forward_hook(
            lambda module, x, output: self.spoke.append((module.training, output[1] is not None))
        )


def test_the_auxiliary_head_is_absent_in_evaluation() -> None:
    net = network()
    modes = Modes(net)
    fit(TrainModule(net, SGD), batches(3, 3), batches(3, seed=6), max_epochs=2)
    epoch = [(True, True)] * 2 + [(False, False)]
    assert modes.spoke == 2 * epoch


def examples(net: FinalNetwork, data: Batches, smoothing: float = 0.0) -> tuple[float, float]:
    """Loss of the main head and accuracy over the examples of all batches together."""
    with torch.no_grad():
        logits = torch.cat([net(x)[0] for x, _ in data])
    labels = torch.cat([y for _, y in data])
    hits = (logits.argmax(1) == labels).double().mean().item()
    return cross_entropy(logits, labels, smoothing).item(), hits


def test_what_is_logged_after_each_epoch() -> None:
    net, data, val = network(), batches(6, 6, 2), batches(7, 2, seed=6)
    plain = copy.deepcopy(net)
    frozen = partial(torch.optim.SGD, lr=0.0)  # so that every batch meets the same weights
    module = TrainModule(net, frozen, label_smoothing=0.1, drop_path_prob=0.2)
    logger = MemoryLogger()
    fit(module, data, val, max_epochs=1, logger=logger, log_every_n_steps=1)
    logged: dict[str, list[float]] = {}
    for _, row in logger.rows:
        for name, value in row.items():
            logged.setdefault(name, []).append(value)

    train_loss, train_accuracy = examples(plain, data, 0.1)  # moves the running statistics, too
    val_loss, val_accuracy = examples(plain.eval(), val)
    expected = {
        "train/train_loss": [train_loss],
        "train/train_accuracy": [train_accuracy],
        "train/val_loss": [val_loss],
        "train/val_accuracy": [val_accuracy],
        "train/learning_rate": [0.0],
        "train/drop_path_prob": [0.0],
        "train/skipped_steps": [0],
        "train/loss_step": [total_loss(plain.train(), x, y, 0.1).item() for x, y in data],
    }
    assert logged.keys() - {"epoch"} == expected.keys()
    for name, numbers in expected.items():
        assert logged[name] == pytest.approx(numbers, rel=1e-6), name


def test_the_schedules_are_logged() -> None:
    logger = MemoryLogger()
    module = TrainModule(network(), SGD, RATES.__getitem__)
    fit(module, batches(3, 3), max_epochs=3, logger=logger)
    rows = [row for _, row in logger.rows if "train/learning_rate" in row]
    assert [row["train/learning_rate"] for row in rows] == pytest.approx(RATES)
    drop_paths = [row["train/drop_path_prob"] for row in rows]
    assert drop_paths == pytest.approx([0.2 * epoch / 3 for epoch in range(3)])


def test_metrics_of_an_epoch_begin_anew() -> None:
    """Those of the second epoch are its own, not the mean of both."""
    net, data, recorder, logger = (
        network(auxiliary=False),
        batches(6, 2),
        Recorder(),
        MemoryLogger(),
    )
    fit(TrainModule(net, SGD), data, max_epochs=2, logger=logger, callbacks=[recorder])
    logged = [row["train/train_loss"] for _, row in logger.rows if "train/train_loss" in row]
    means = [(6 * a + 2 * b) / 8 for a, b in (recorder.losses[:2], recorder.losses[2:])]
    assert logged == pytest.approx(means, rel=1e-6)
    assert abs(means[0] - means[1]) > 1e-2


def test_the_test_is_in_evaluation_mode_and_over_examples() -> None:
    net, data = network(), batches(7, 2)
    net.drop_path_prob = 0.5
    module = TrainModule(net, SGD, label_smoothing=0.1)
    loss, accuracy = examples(copy.deepcopy(net).eval(), data)
    trainer = trainer_of()
    (result,) = trainer.test(module, DataLoader(data, batch_size=None), verbose=False)
    assert result["test/loss"] == pytest.approx(loss, rel=1e-6)  # smoothing is for training only
    assert result["test/accuracy"] == pytest.approx(accuracy, rel=1e-6)


def test_images_whose_logits_are_not_finite_are_wrong() -> None:
    net, (x, _) = network(), batches(4)[0]
    right = copy.deepcopy(net).eval()(x)[0].argmax(1)
    nan = torch.full_like(x, float("nan"))
    data = [(x, right), (nan, torch.zeros(4, dtype=torch.long))]
    loader = DataLoader(data, batch_size=None)
    (result,) = trainer_of().test(TrainModule(net, SGD), loader, verbose=False)
    assert result["test/accuracy"] == 0.5
    assert not math.isfinite(result["test/loss"])


# What a user of Lightning alone may do


def test_drop_path_without_a_last_epoch_is_a_mistake() -> None:
    """Its probability would grow for ever, and pass 1."""
    for drop_path_prob in (0.2, 0.0):
        module = TrainModule(network(), SGD, drop_path_prob=drop_path_prob)
        module.trainer = trainer_of(max_epochs=-1, max_time="00:00:01:00")
        module.trainer.fit_loop.max_batches = 3
        if drop_path_prob:
            with pytest.raises(UserError, match=r"set trainer\.max_epochs"):
                module.epoch_drop_path_prob()
        else:
            assert module.epoch_drop_path_prob() == 0


def test_gradients_of_several_batches_are_refused() -> None:
    """Drop path would drop the same images of each, and no checkpoint holds half a step."""
    with pytest.raises(UserError, match=r"trainer\.accumulate_grad_batches"):
        fit(TrainModule(network(), SGD), batches(3, 3), accumulate_grad_batches=2)


def test_batches_of_a_search_are_refused() -> None:
    (batch,) = batches(3)
    with pytest.raises(UserError, match=r"A training takes batches \(x, y\), not {'train', 'val'}"):
        fit(TrainModule(network(), SGD), [{"train": batch, "val": batch}])  # type: ignore[list-item]


def test_a_validation_that_was_broken_off_is_not_counted() -> None:
    class Stop(pl.Callback):
        def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("stop")

    module, data = TrainModule(network(), SGD), DataLoader(batches(3, 5), batch_size=None)
    whole = trainer_of().validate(module, data, verbose=False)
    with pytest.raises(RuntimeError, match="stop"):
        trainer_of(callbacks=[Stop()]).validate(module, data, verbose=False)
    assert trainer_of().validate(module, data, verbose=False) == whole


def test_a_fit_leaves_nothing_to_the_next() -> None:
    """Neither metrics of an epoch that it has not ended, nor what it took from a checkpoint."""
    data = batches(3, 3, 3, 3)
    module = TrainModule(network(), SGD, drop_path_prob=0.0)
    fit(module, data, max_steps=3)
    fresh = copy.deepcopy(module)
    fresh.train_metrics.reset()
    first, second = (fit(each, data).callback_metrics for each in (module, fresh))
    assert first["train/train_loss"] == second["train/train_loss"]
    assert first["train/train_accuracy"] == second["train/train_accuracy"]


def test_what_a_checkpoint_holds_beside_weights_is_for_the_fit_that_goes_on(tmp_path) -> None:
    module, data = TrainModule(network(), SGD, drop_path_prob=0.0), batches(3, 3)
    fit(module, data)
    assert module.trainer.callback_metrics
    path = tmp_path / "x.ckpt"
    module.trainer.save_checkpoint(path)

    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append(dict(trainer.callback_metrics))

    seen: list[dict[str, Any]] = []
    fit(module, data, callbacks=[Watch()])
    loaded = TrainModule.load_from_checkpoint(
        path, network=network(), optimizer=SGD, weights_only=True
    )
    fit(loaded, data, callbacks=[Watch()])
    trainer = trainer_of(max_epochs=2, callbacks=[Watch()])
    loader = DataLoader(data, batch_size=None)
    trainer.fit(module, loader, ckpt_path=path, weights_only=True)
    fit(module, data, callbacks=[Watch()])
    assert [bool(metrics) for metrics in seen] == [False, False, True, False]


def test_predictions_are_the_logits_in_evaluation() -> None:
    module, data = TrainModule(network(), SGD), batches(3, 2)
    expected = [module.network.eval()(x)[0] for x, _ in data]
    for given in (data, [x for x, _ in data]):
        found = trainer_of().predict(module, DataLoader(given, batch_size=None))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(module.eval()(data[0][0]), expected[0])
