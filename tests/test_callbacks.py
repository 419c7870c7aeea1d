"""What a run leaves behind, epoch by epoch."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from dartsl import callbacks
from dartsl.callbacks import AtomicCheckpoint, CollapseWarning, EpochLines, GenotypeWriter
from dartsl.data import Digits
from dartsl.genotype import Genotype
from dartsl.hypergradient import FirstOrder
from dartsl.modules import SearchModule
from dartsl.networks import Supernet
from dartsl.search_space import SearchSpace

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
    trainer = pl.Trainer(
        **{"max_epochs": 2, "log_every_n_steps": 1} | options,
        callbacks=list(used), accelerator="cpu", logger=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in used),
        num_sanity_val_steps=0, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
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


def test_checkpoints_come_every_n_steps_and_after_every_epoch(tmp_path: Path, monkeypatch) -> None:
    steps = []
    save = AtomicCheckpoint.save
    monkeypatch.setattr(
        AtomicCheckpoint,
        "save",
        lambda self, trainer: (steps.append(trainer.global_step), save(self, trainer)),
    )
    search(AtomicCheckpoint(tmp_path, every_n_steps=2))
    assert steps == [2, 3, 4, 6, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_checkpoint_before_stays_until_the_next_is_whole(tmp_path: Path, monkeypatch) -> None:
    search(AtomicCheckpoint(tmp_path), max_epochs=1)
    before = (tmp_path / "last.ckpt").read_bytes()

    def half(self: pl.Trainer, path: Path) -> None:
        Path(path).write_bytes(before[: len(before) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", half)
    with pytest.raises(OSError, match="No space left"):
        search(AtomicCheckpoint(tmp_path), max_epochs=1)
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_one_line_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    search(EpochLines())
    lines = capsys.readouterr().out.splitlines()
    lines = [line for line in lines if line.startswith("epoch")]
    assert [line.split("   train:")[0] for line in lines] == ["epoch   1/2", "epoch   2/2"]
    for line in lines:
        assert "val: loss" in line
        assert "learning rate 0.1" in line
