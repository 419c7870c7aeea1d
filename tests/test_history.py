"""The history of a run: what was measured of every epoch, once, whatever stopped the run."""

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from dartsl.callbacks import EpochLines
from dartsl.checkpoints import AtomicCheckpoint
from dartsl.environment import commit, environment
from dartsl.genotype import Genotype
from dartsl.history import History, read_history
from dartsl.modules import SearchModule
from dartsl.search_space import discretize
from tests.test_callbacks import SPACE, search


class Watch(pl.Callback):
    """What an epoch measured, looked up once everything of it has been logged."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.strengths: list[torch.Tensor] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SearchModule)
        self.strengths.append(pl_module.supernet.strengths()["reduce"].detach().clone())

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch > 0:
            self.look(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(trainer)

    def look(self, trainer: pl.Trainer) -> None:
        self.metrics.append({k: v.item() for k, v in trainer.callback_metrics.items()})


def without_seconds(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_line_holds_what_the_epoch_measured(tmp_path: Path) -> None:
    watch = Watch()
    search(watch, History(tmp_path), AtomicCheckpoint(tmp_path), max_epochs=3)
    lines = read_history(tmp_path)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert all(line["seconds"] > 0 for line in lines)
    for line, metrics, reduce in zip(lines, watch.metrics, watch.strengths, strict=True):
        assert line["metrics"] == {k: v for k, v in metrics.items() if not k.endswith("_step")}
        assert {"search/train_loss", "search/val_accuracy"} <= set(line["metrics"])
        strengths = {kind: torch.tensor(rows) for kind, rows in line["strengths"].items()}
        torch.testing.assert_close(strengths["reduce"], reduce, atol=1e-6, rtol=0)
        assert line["primitives"] == list(SPACE.primitives)
        assert Genotype.parse(line["genotype"]) == discretize(strengths, SPACE)
    assert len({line["metrics"]["search/train_loss"] for line in lines}) == 3


def test_of_an_epoch_without_a_validation_there_are_no_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning still has those of the epoch before."""
    search(History(tmp_path), EpochLines(), max_epochs=3, check_val_every_n_epoch=2)
    validated = ["search/val_loss" in line["metrics"] for line in read_history(tmp_path)]
    assert validated == [False, True, False]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["val: loss" in line for line in lines] == validated


def test_a_resumed_run_has_the_history_of_one_that_was_never_stopped(tmp_path: Path) -> None:
    whole, stopped, moved = (tmp_path / name for name in ("whole", "stopped", "moved"))
    search(History(whole), AtomicCheckpoint(whole), max_epochs=3)
    # Stopped in the second epoch; afterwards the file says more than the checkpoint.
    search(History(stopped), AtomicCheckpoint(stopped, every_n_steps=1), max_epochs=3, max_steps=4)
    later = {"epoch": 1, "seconds": 1.0, "metrics": {}}
    with (stopped / "history.jsonl").open("a") as file:
        file.write(json.dumps(later) + "\n")
    checkpoint = stopped / "last.ckpt"
    search(History(moved), AtomicCheckpoint(moved), max_epochs=3, ckpt_path=checkpoint)
    assert without_seconds(read_history(moved)) == without_seconds(read_history(whole))
    assert len(read_history(whole)) == 3

    search(History(stopped), AtomicCheckpoint(stopped), max_epochs=3, ckpt_path=checkpoint)
    assert without_seconds(read_history(stopped)) == without_seconds(read_history(whole))


def test_seconds_leave_out_the_time_between_two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    first = History("unused")
    now = 107.0
    state = first.state_dict()
    now = 5000.0  # of another machine's clock
    monkeypatch.setattr(History, "write", lambda self: None)
    second = History("unused")
    second.load_state_dict(state)
    now = 5002.0
    assert second.state_dict()["seconds"] == 9.0


def test_a_number_that_is_none_is_null(tmp_path: Path) -> None:
    class Diverge(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            self.log("search/bad", float("nan"), on_step=False, on_epoch=True)

    search(Diverge(), History(tmp_path), AtomicCheckpoint(tmp_path), max_epochs=1)
    assert read_history(tmp_path)[0]["metrics"]["search/bad"] is None
    assert "NaN" not in (tmp_path / "history.jsonl").read_text()


def test_no_file_is_an_empty_history(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []


def test_the_environment_names_versions_and_the_commit_of_this_checkout(tmp_path: Path) -> None:
    found = environment()
    assert torch.__version__.startswith(found["torch"].partition("+")[0])
    assert found["cores"] >= 1
    assert found["cpu"]
    stray = tmp_path / "module.py"  # in no repository
    stray.touch()
    assert commit(stray) is None
