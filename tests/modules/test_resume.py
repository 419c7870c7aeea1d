"""A run stopped at any point and resumed ends bit for bit like the run that was never stopped."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment

from dartsl.data import Digits
from dartsl.errors import UserError
from dartsl.genotype import Genotype, published
from dartsl.hypergradient import FirstOrder, Unrolled
from dartsl.modules import SearchModule, TrainModule
from dartsl.modules.schedule import cosine
from dartsl.networks import FinalNetwork, Supernet
from dartsl.search_space import SearchSpace

EPOCHS = 3
SPACE = SearchSpace(("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"), 2)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=3e-4)
SCHEDULE = partial(cosine, initial=0.1, final=0.001, num_epochs=EPOCHS)


def search_module(hypergradient: Any = None, space: SearchSpace = SPACE) -> SearchModule:
    torch.manual_seed(1)
    supernet = Supernet(space, channels=4, num_cells=3, in_channels=1)
    adam = partial(torch.optim.Adam, lr=0.1, betas=(0.5, 0.999))
    return SearchModule(supernet, hypergradient or FirstOrder(), SGD, adam, SCHEDULE)


def train_module(genotype: Genotype | None = None) -> TrainModule:
    torch.manual_seed(1)
    genotype = genotype or published("darts_v2")
    network = FinalNetwork(genotype, channels=4, num_cells=3, in_channels=1)
    return TrainModule(network, SGD, SCHEDULE, drop_path_prob=0.5)


class MemoryLogger(Logger):
    """Keeps what is logged."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    @rank_zero_experiment
    def experiment(self) -> None:
        return None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))


class SaveEverywhere(pl.callbacks.Checkpoint):
    """Saves after every batch, after every validation, and at the end of every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step:02}-batch.ckpt")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step:02}-validation.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step:02}-epoch.ckpt")


Rows = list[tuple[int | None, dict[str, float]]]


def run(
    module: pl.LightningModule, ckpt_path: Path | None = None, folder: Path | None = None, **options
) -> tuple[pl.LightningModule, dict[str, Any], Rows]:
    """The module after its fit, the checkpoint that it would save, and all that was logged."""
    task = "search" if isinstance(module, SearchModule) else "train"
    fraction = 0.5 if task == "search" else 0.6
    data = Digits(
        num_classes=10, in_channels=1, image_size=8, mean=[0.3], std=[0.4], task=task,
        batch_size=20, train_fraction=fraction, max_images=60,
    )  # fmt: skip
    pl.seed_everything(7 if ckpt_path is None else 8, verbose=False)  # a resume must not need it
    logger = MemoryLogger()
    trainer = pl.Trainer(
        **{"max_epochs": EPOCHS, "log_every_n_steps": 1}
        | options
        | {"accelerator": "cpu", "logger": logger, "enable_model_summary": False}
        | {"num_sanity_val_steps": 0, "enable_progress_bar": False}
        | {
            "callbacks": [SaveEverywhere(folder)] if folder else [],
            "enable_checkpointing": folder is not None,
        }
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module, trainer._checkpoint_connector.dump_checkpoint(), logger.rows


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    """Equal bit for bit, containers and tensors."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{path}[{index}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), path
    else:
        assert found == expected, path


def assert_same_end(resumed: Any, whole: Any) -> None:
    module, checkpoint, rows = resumed
    module_whole, checkpoint_whole, rows_whole = whole
    for part in ("state_dict", "optimizer_states", "epoch", "global_step", "step_seed"):
        assert_same(checkpoint[part], checkpoint_whole[part], part)
    assert rows  # and what was logged after the stop is the end of what the whole run logged
    assert_same(rows, rows_whole[-len(rows) :], "logged")
    if isinstance(module, SearchModule):
        assert module.genotype() == module_whole.genotype()


VALIDATIONS = {
    "validation": ({}, 3),
    "no_validation": ({"limit_val_batches": 0}, 0),
    "validation_of_every_second_epoch": ({"check_val_every_n_epoch": 2}, 1),
    "validation_within_epochs": ({"val_check_interval": 2}, 3),
}


@pytest.mark.parametrize(("options", "validations"), VALIDATIONS.values(), ids=VALIDATIONS)
@pytest.mark.parametrize("make", [search_module, train_module])
def test_resume_from_every_point(
    tmp_path: Path, make: Callable[[], pl.LightningModule], options: Any, validations: int
) -> None:
    whole = run(make(), folder=tmp_path, **options)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == EPOCHS * (3 + 1) + validations
    for path in checkpoints:
        if path.stem == "09-epoch":  # nothing is left to do
            continue
        resumed = run(make(), ckpt_path=path, **options)
        assert_same_end(resumed, whole)
        check_logged_once(path, whole[2], resumed[2])


def check_logged_once(path: Path, whole: Rows, resumed: Rows) -> None:
    """A checkpoint of a batch or a validation logs every later step and the epoch's end again."""
    step = int(path.stem.split("-")[0])
    if "epoch" in path.stem:  # saved just before Lightning writes the epoch's row
        return
    ends = [row for row in whole if any(name.endswith("learning_rate") for name in row[1])]
    ends_resumed = [row for row in resumed if any(k.endswith("learning_rate") for k in row[1])]
    expected = EPOCHS - (step - 1) // 3
    assert len(ends) == EPOCHS
    assert len(ends_resumed) == expected, path.stem
    if "batch" in path.stem:  # a validation that is due there has not begun
        later = [row for row in validations(whole) if row[0] is not None and row[0] >= step - 1]
        assert validations(resumed) == later, path.stem


def validations(rows: Rows) -> Rows:
    return [row for row in rows if any(name.endswith("val_loss") for name in row[1])]


@pytest.mark.parametrize("make", [search_module, train_module])
def test_resume_in_float64(tmp_path: Path, make: Callable[[], pl.LightningModule]) -> None:
    """Of networks that are built in float32."""
    whole = run(make(), folder=tmp_path, precision="64-true")
    assert next(whole[0].parameters()).dtype == torch.float64
    for name in ("02-batch", "03-batch", "06-epoch"):
        resumed = run(make(), ckpt_path=tmp_path / f"{name}.ckpt", precision="64-true")
        assert_same_end(resumed, whole)


@pytest.mark.parametrize("product", ["finite_difference", "exact"])
def test_resume_of_the_unrolled_search(tmp_path: Path, product: Any) -> None:
    whole = run(search_module(Unrolled(product)), folder=tmp_path)
    for name in ("02-batch", "03-batch", "06-epoch"):
        resumed = run(search_module(Unrolled(product)), ckpt_path=tmp_path / f"{name}.ckpt")
        assert_same_end(resumed, whole)


def test_resume_at_an_epochs_end_enters_its_stage(tmp_path: Path) -> None:
    """There is no batch left in front of which it would be entered."""

    class Recorder:
        def __init__(self) -> None:
            self.entered: list[int] = []

        def enter(self, module: SearchModule, epoch: int) -> None:
            self.entered.append(epoch)

    run(search_module(), folder=tmp_path, max_epochs=2)
    for name in ("06-batch", "04-batch"):
        module, stages = search_module(), Recorder()
        module.stages = stages
        run(module, ckpt_path=tmp_path / f"{name}.ckpt", max_epochs=2)
        assert stages.entered == {"06-batch": [1], "04-batch": [1, 1]}[name]


@pytest.mark.parametrize("max_steps", [2, 3, 5])
@pytest.mark.parametrize("make", [search_module, train_module])
def test_resume_after_max_steps(
    tmp_path: Path, make: Callable[[], pl.LightningModule], max_steps: int
) -> None:
    whole = run(make())
    module = make()
    stopped = run(module, max_steps=max_steps)
    assert stopped[1]["global_step"] == max_steps
    path = tmp_path / "stopped.ckpt"
    module.trainer.save_checkpoint(path)
    assert_same_end(run(make(), ckpt_path=path), whole)


def test_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    run(search_module(), folder=tmp_path, max_epochs=1)
    supernet = Supernet(SPACE, channels=8, num_cells=3, in_channels=1)
    other = SearchModule(supernet, FirstOrder(), SGD, torch.optim.Adam, SCHEDULE)
    with pytest.raises(UserError, match=r"another network .* of another shape"):
        run(other, ckpt_path=tmp_path / "03-epoch.ckpt")


def other_source(genotype: Genotype) -> Genotype:
    """A genotype whose last normal edge comes from another node: all tensors are as they were."""
    *edges, (primitive, source) = genotype.normal
    return replace(genotype, normal=(*edges, (primitive, (source + 1) % 5)))


def test_checkpoint_of_other_operations_is_refused_though_its_tensors_fit(tmp_path: Path) -> None:
    searched, trained = tmp_path / "search", tmp_path / "train"
    run(search_module(), folder=searched, max_epochs=1)
    run(train_module(), folder=trained, max_epochs=1)
    averages = replace(SPACE, primitives=("none", "avg_pool_3x3", "skip_connect", "sep_conv_3x3"))
    sentence = r"it has the primitives none, max_pool_3x3, skip_connect, sep_conv_3x3\. Give the"
    with pytest.raises(UserError, match=sentence):
        run(search_module(space=averages), ckpt_path=searched / "03-epoch.ckpt")
    sentence = rf"it has {re.escape(published('darts_v2').notation())}\. Give the same genotype"
    other = train_module(other_source(published("darts_v2")))
    with pytest.raises(UserError, match=sentence):
        run(other, ckpt_path=trained / "03-epoch.ckpt")

    # Of before checkpoints kept it.
    for path, make in ((searched, search_module), (trained, train_module)):
        checkpoint = torch.load(path / "03-epoch.ckpt", weights_only=True)
        del checkpoint["operations"]
        torch.save(checkpoint, path / "old.ckpt")
        run(make(), ckpt_path=path / "old.ckpt", max_epochs=2)


@pytest.mark.parametrize("make", [search_module, train_module])
def test_epochs_of_another_length_are_refused(
    tmp_path: Path, make: Callable[[], pl.LightningModule]
) -> None:
    """Whose end the step of the checkpoint would miss."""
    run(make(), folder=tmp_path, max_epochs=1)
    for name in ("02-batch", "03-epoch"):
        with pytest.raises(UserError, match="epochs of 3 batches, these are of 2: the images"):
            run(make(), ckpt_path=tmp_path / f"{name}.ckpt", limit_train_batches=2)


def test_checkpoints_are_plain(tmp_path: Path) -> None:
    """`weights_only=True` reads them: nothing in them is ever executed."""
    run(search_module(), folder=tmp_path, max_epochs=1)
    torch.load(tmp_path / "01-batch.ckpt", weights_only=True)
