"""Checkpoints are whole or not there, and a run that is told to stop ends with one."""

import io
import logging
import os
import signal
import zipfile
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from dartsl import checkpoints
from dartsl.checkpoints import AtomicCheckpoint, find_fault, find_whole
from dartsl.errors import UserError
from tests.modules.test_resume import assert_same
from tests.test_callbacks import search

PARTS = ("state_dict", "optimizer_states", "epoch", "global_step", "metrics")


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


# Writing


def test_checkpoints_come_every_n_steps_and_at_every_epochs_end(
    tmp_path: Path, monkeypatch
) -> None:
    steps = []
    save = AtomicCheckpoint.save
    monkeypatch.setattr(
        AtomicCheckpoint,
        "save",
        lambda self, trainer: (steps.append(trainer.global_step), save(self, trainer)),
    )
    search(AtomicCheckpoint(tmp_path, every_n_steps=2))
    assert steps == [2, 3, 4, 6, 6]
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "previous.ckpt"}


@pytest.mark.parametrize(("minutes", "steps"), [(1e-9, [1, 2, 3, 4, 5, 6, 6]), (9, [3, 6, 6])])
def test_checkpoints_come_every_m_minutes(
    minutes: float, steps: list[int], tmp_path: Path, monkeypatch
) -> None:
    saved = []
    monkeypatch.setattr(
        pl.Trainer,
        "save_checkpoint",
        lambda self, path: (saved.append(self.global_step), Path(path).touch()),
    )
    search(AtomicCheckpoint(tmp_path, every_n_minutes=minutes))
    assert saved == steps


@pytest.mark.parametrize("option", ["every_n_steps", "every_n_minutes"])
def test_a_checkpoint_needs_a_positive_interval(option: str) -> None:
    with pytest.raises(UserError, match=f"{option}=0 must be positive"):
        AtomicCheckpoint("unused", **{option: 0})


def test_a_full_disk_leaves_both_checkpoints(tmp_path: Path, monkeypatch) -> None:
    search(AtomicCheckpoint(tmp_path), max_epochs=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"last.ckpt", "previous.ckpt"}
    write = Path.write_bytes

    def half(self: Path, content: bytes) -> None:
        write(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(UserError, match=r"Cannot write .*next.ckpt': No space left on device"):
        search(AtomicCheckpoint(tmp_path), max_epochs=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_finished_run_goes_on_with_more_epochs(tmp_path: Path) -> None:
    """And one that has nothing left to do still knows its result."""
    for folder, epochs in (("whole", 3), ("short", 2)):
        search(AtomicCheckpoint(tmp_path / folder), max_epochs=epochs)
    last = tmp_path / "short" / "last.ckpt"
    again = search(ckpt_path=last)
    metrics = load(last)["metrics"]
    assert "search/val_accuracy" in metrics
    assert_same(dict(sorted(again.trainer.callback_metrics.items())), metrics)
    search(AtomicCheckpoint(tmp_path / "short"), max_epochs=3, ckpt_path=last)
    whole, longer = (load(tmp_path / folder / "last.ckpt") for folder in ("whole", "short"))
    for part in PARTS:
        assert_same(longer[part], whole[part], part)


# Reading


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    search(AtomicCheckpoint(folder), max_epochs=1)
    return (folder / "last.ckpt").read_bytes()


def flipped(content: bytes) -> bytes:
    """One bit of the largest tensor is another; torch.load alone would not notice."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        place = content.index(archive.read(largest)) + largest.file_size // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES = {
    "truncated": lambda content: content[: len(content) - 100],
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "garbage": lambda content: b"\x80\x02" + content[::-1],
    "flipped": flipped,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage: str, whole: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_whole(tmp_path) is None
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    last.write_bytes(DAMAGES[damage](whole))
    with pytest.raises(UserError, match=r"last.ckpt is not whole.*Nothing is left to go on from"):
        find_whole(tmp_path)
    previous.write_bytes(whole)
    with caplog.at_level(logging.WARNING, logger=checkpoints.__name__):
        assert find_whole(tmp_path) == previous
    assert "going on from the one before it, previous.ckpt" in caplog.text
    last.write_bytes(whole)
    assert find_whole(tmp_path) == last


def test_a_run_killed_between_two_names_is_found(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "previous.ckpt").write_bytes(whole)
    assert find_whole(tmp_path) == tmp_path / "previous.ckpt"


def test_weights_alone_are_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "epoch": 1}, tmp_path / "other.ckpt")
    fault = find_fault(tmp_path / "other.ckpt")
    assert fault == "it lacks optimizer_states, loops, global_step"


# Signals


class SignalWithin(pl.Callback):
    """Sends this process a signal before a batch is trained on or validated, or at the end."""

    def __init__(self, number: int, where: str, step: int) -> None:
        self.number, self.where, self.step = number, where, step

    def send(self, trainer: pl.Trainer, where: str) -> None:
        if (where, trainer.global_step) == (self.where, self.step):
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.send(trainer, "train")

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.send(trainer, "validation")

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.send(trainer, "end")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize(
    ("where", "step"), [("train", 0), ("train", 1), ("validation", 3), ("end", 3)]
)
def test_a_signal_ends_a_run_after_a_whole_step(
    number: signal.Signals, where: str, step: int, whole: bytes, tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        search(SignalWithin(number, where, step), AtomicCheckpoint(tmp_path), max_epochs=1)
    assert end.value.code == 128 + number
    assert signal.getsignal(number) == before or number == signal.SIGINT
    signal.signal(number, before)
    last = tmp_path / "last.ckpt"
    assert load(last)["global_step"] == (step + 1 if where == "train" else step)

    search(AtomicCheckpoint(tmp_path), max_epochs=1, ckpt_path=last)
    (tmp_path / "whole.ckpt").write_bytes(whole)
    for part in PARTS:
        assert_same(load(last)[part], load(tmp_path / "whole.ckpt")[part], part)


def test_a_schedulers_handler_is_called_after_the_step(tmp_path: Path) -> None:
    """Which requeues the job; until the scheduler ends it the run goes on."""
    seen = []

    def requeue(number: int, frame: Any) -> None:
        seen.append((number, load(tmp_path / "last.ckpt")["global_step"]))

    before = signal.signal(signal.SIGUSR1, requeue)
    try:
        search(SignalWithin(signal.SIGUSR1, "train", 1), AtomicCheckpoint(tmp_path), max_epochs=1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [(signal.SIGUSR1, 2)]
    assert load(tmp_path / "last.ckpt")["global_step"] == 3


def test_slurms_requeue_goes_on_working(tmp_path: Path, monkeypatch) -> None:
    """Lightning's, asked between two steps: its own checkpoint, then `scontrol requeue`."""
    slurm = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "search", "SLURM_JOB_ID": "7",
             "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
             "SLURM_NODEID": "0", "SLURM_NODELIST": "here"}  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    called = []
    connector = "pytorch_lightning.trainer.connectors.signal_connector"
    monkeypatch.setattr(f"{connector}.call", lambda command: called.append(command) or 0)
    search(
        SignalWithin(signal.SIGUSR1, "train", 1), AtomicCheckpoint(tmp_path / "own"),
        max_epochs=1, default_root_dir=tmp_path,
    )  # fmt: skip
    assert called == [["scontrol", "requeue", "7"]]
    assert load(tmp_path / "hpc_ckpt_1.ckpt")["global_step"] == 2


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    class Impatient(SignalWithin):
        def send(self, trainer: pl.Trainer, where: str) -> None:
            super().send(trainer, where)
            super().send(trainer, where)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        search(Impatient(signal.SIGINT, "train", 1), AtomicCheckpoint(tmp_path), max_epochs=1)
    signal.signal(signal.SIGINT, before)
    assert end.value.code == 128 + signal.SIGINT
    assert not (tmp_path / "last.ckpt").exists()


def test_what_killed_runs_left_of_a_checkpoint_is_removed(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"next.ckpt.{number}.part").write_bytes(b"half of one")
    search(AtomicCheckpoint(tmp_path), max_epochs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]
