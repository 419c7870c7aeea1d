"""What a run leaves behind, epoch by epoch."""

import itertools
import logging
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from dartsl import callbacks
from dartsl.callbacks import (
    ArchitectureLogger,
    CollapseWarning,
    EpochLines,
    GenotypeWriter,
    SystemLogger,
)
from dartsl.data import Digits
from dartsl.errors import UserError
from dartsl.genotype import Genotype
from dartsl.hypergradient import FirstOrder
from dartsl.modules import SearchModule
from dartsl.networks import Supernet
from dartsl.search_space import SearchSpace, random_genotype

SPACE = SearchSpace(("none", "skip_connect", "avg_pool_3x3"), 2)


def search(
    *used: pl.Callback, alpha_rate: float = 0.3, ckpt_path: Path | None = None, **options: Any
) -> SearchModule:
    """Two epochs of three steps on digits, with these callbacks."""
    torch.manual_seed(0)
    module = SearchModule(
        Supernet(SPACE, channels=2, num_cells=2, in_channels=1),
        FirstOrder(),
        partial(torch.optim.SGD, lr=0.1),
        partial(torch.optim.Adam, lr=alpha_rate),
    )
    data = Digits(num_classes=10, in_channels=1, image_size=8, mean=[0.3], std=[0.4],
                  batch_size=20, max_images=60)  # fmt: skip
    ckpt_path = options.pop("ckpt_path", None)
    bars = any(isinstance(c, pl.callbacks.ProgressBar) for c in used)
    trainer = pl.Trainer(
        **{"max_epochs": 2, "log_every_n_steps": 1, "logger": False} | options,
        callbacks=list(used), accelerator="cpu", enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in used),
        num_sanity_val_steps=0, enable_progress_bar=bars,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module


class Watch(pl.Callback):
    """Looks at a folder after every epoch, once the callbacks before it are done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[tuple[Genotype, Genotype, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        accuracy = trainer.callback_metrics["search/val_accuracy"].item()
        assert isinstance(pl_module, SearchModule)
        self.seen.append(
            (Genotype.load(self.folder / "genotype.yaml"), pl_module.genotype(), accuracy)
        )


def test_the_genotype_is_written_after_every_epoch(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    search(GenotypeWriter(tmp_path, draw=False), watch, max_epochs=4)
    assert len(watch.seen) == 4
    assert all(written == found for written, found, _ in watch.seen)
    assert len({repr(found) for _, found, _ in watch.seen}) > 1  # or the test would see nothing
    best = max(watch.seen, key=lambda row: row[2])  # the first of equals
    assert Genotype.load(tmp_path / "genotype_best.yaml") == best[1]


def test_a_search_that_ends_within_an_epoch_leaves_its_genotype(tmp_path: Path) -> None:
    module = search(GenotypeWriter(tmp_path, draw=False), max_steps=2)
    assert Genotype.load(tmp_path / "genotype.yaml") == module.genotype()
    assert not (tmp_path / "genotype_best.yaml").exists()


def test_without_validation_no_genotype_is_the_best(tmp_path: Path) -> None:
    search(GenotypeWriter(tmp_path, draw=False), limit_val_batches=0)
    assert [path.name for path in tmp_path.iterdir()] == ["genotype.yaml"]


def test_pictures_are_drawn_at_the_end(tmp_path: Path) -> None:
    search(GenotypeWriter(tmp_path))
    names = {f"{name}.{suffix}" for name in ("cells", "strengths") for suffix in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == {
        *names, "genotype.yaml", "genotype_best.yaml",
    }  # fmt: skip


def test_the_best_epoch_survives_a_resume() -> None:
    writer, other = GenotypeWriter("unused"), GenotypeWriter("unused")
    assert writer.state_dict() == {"best_accuracy": None, "best_genotype": None}
    other.load_state_dict(writer.state_dict())
    assert other.best_genotype is None


def test_a_resumed_search_writes_its_best_genotype_into_its_own_folder(tmp_path: Path) -> None:
    writer = GenotypeWriter(tmp_path / "first", draw=False)
    search(writer)
    moved = GenotypeWriter(tmp_path / "second", draw=False)
    moved.load_state_dict(writer.state_dict())
    files = [tmp_path / folder / "genotype_best.yaml" for folder in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert moved.best_accuracy == writer.best_accuracy


@pytest.mark.parametrize(("limit", "warnings"), [(3, 2), (4, 0)])
def test_skip_connections_that_take_over_are_warned_of(
    limit: int, warnings: int, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    monkeypatch.setattr(SearchModule, "genotype", lambda self: Genotype(
        (("skip_connect", 0), ("skip_connect", 1)) * 2, (2, 3),
        (("avg_pool_3x3", 0), ("avg_pool_3x3", 1)) * 2, (2, 3),
    ))  # fmt: skip
    with caplog.at_level(logging.WARNING, logger=callbacks.__name__):
        search(CollapseWarning(limit))
    assert len(caplog.records) == warnings
    if warnings:
        assert "4 of the normal cell's 4 edges are skip connections" in caplog.text


def logged_by(*used: pl.Callback, **options: Any) -> tuple[SearchModule, list[dict[str, float]]]:
    """A search, and what was known of it after every epoch."""
    seen: list[dict[str, float]] = []

    class Metrics(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append({k: v.item() for k, v in trainer.callback_metrics.items()})

        on_train_end = on_train_epoch_start

    return search(*used, Metrics(), **options), seen[1:]


def test_edges_and_distances_are_logged_every_epoch() -> None:
    module, seen = logged_by(ArchitectureLogger(), max_epochs=3)
    assert ["alpha/genotype_distance" in row for row in seen] == [False, True, True]
    strengths = module.supernet.strengths()["reduce"]
    for row, (node, source) in zip(strengths.tolist(), SPACE.edges, strict=True):
        name = f"node_{node}_from_{source}"
        assert seen[-1][f"alpha/reduce_edge_strength/{name}"] == pytest.approx(max(row[1:]))
        entropy = -sum(p * math.log(p) for p in row)
        assert seen[-1][f"alpha/reduce_edge_entropy/{name}"] == pytest.approx(entropy, rel=1e-5)


def test_the_distance_is_that_to_the_epoch_before(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [random_genotype(SPACE, seed) for seed in range(4)]
    monkeypatch.setattr(SearchModule, "genotype", lambda self: found[self.current_epoch])
    _, seen = logged_by(ArchitectureLogger(), max_epochs=4)
    expected = [later.distance(before) for before, later in itertools.pairwise(found)]
    assert [row["alpha/genotype_distance"] for row in seen[1:]] == expected
    assert any(expected)


def test_watching_changes_nothing() -> None:
    watched = search(ArchitectureLogger(), SystemLogger()).state_dict()
    alone = search().state_dict()
    assert all(torch.equal(watched[name], alone[name]) for name in alone)


def test_the_last_genotype_is_plain_data() -> None:
    logger, other = ArchitectureLogger(), ArchitectureLogger()
    other.load_state_dict(logger.state_dict())
    assert other.last is None
    search(logger)
    other.load_state_dict(logger.state_dict())
    assert other.last == logger.last
    assert isinstance(logger.state_dict()["last"], str)


class Pictures(TensorBoardLogger):
    """A logger that takes pictures, and only counts their epochs."""

    def __init__(self) -> None:
        super().__init__("unused")
        self.taken: list[tuple[str, int]] = []

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(
            add_image=lambda name, pixels, step, dataformats: self.taken.append((name, step)),
            add_scalar=lambda *_: None,
            flush=lambda: None,
            close=lambda: None,
        )

    def save(self) -> None:
        pass


@pytest.mark.parametrize(("every", "epochs"), [(1, [0, 1, 2]), (2, [1, 2]), (0, [])])
def test_pictures_come_every_n_epochs_and_at_the_end(every: int, epochs: list[int]) -> None:
    logger = Pictures()
    search(ArchitectureLogger(every), max_epochs=3, logger=logger)
    names = ("cells/genotype", "cells/edge_weights")
    assert logger.taken == [(name, 3 * epoch + 2) for epoch in epochs for name in names]


def test_pictures_are_drawn_for_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(callbacks, "draw_genotype", None)
    search(ArchitectureLogger(), logger=CSVLogger(tmp_path))


def test_a_negative_number_of_epochs_between_pictures() -> None:
    with pytest.raises(UserError, match="pictures_every_n_epochs=-1 must be at least 0"):
        ArchitectureLogger(-1)


def test_the_seconds_of_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10.0, 13.0, 20.0, 27.0])
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    _, seen = logged_by(SystemLogger())
    assert [row["system/epoch_seconds"] for row in seen] == [3.0, 7.0]


def test_one_line_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    search(EpochLines())
    lines = capsys.readouterr().out.splitlines()
    lines = [line for line in lines if line.startswith("epoch")]
    assert [line.split("   train:")[0] for line in lines] == ["epoch   1/2", "epoch   2/2"]
    for line in lines:
        assert "val: loss" in line
        assert "learning rate 0.1" in line
