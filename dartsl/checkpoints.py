"""Checkpoints that are whole or not there, and runs that end with one when told to stop."""

import io
import logging
import signal
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from dartsl.distributed import is_first_process, largest
from dartsl.errors import UserError
from dartsl.files import flush, whole_file
from dartsl.modules.resumable import ResumableModule

log = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
PARTS = ("state_dict", "optimizer_states", "loops", "epoch", "global_step")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# ---- reading -------------------------------------------------------------------------------------


def find_whole(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that can be gone on from; None where there is no file.

    Raises:
        UserError: where there are files, but none is whole.
    """
    faults: list[str] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        fault = find_fault(path)
        if fault is None:
            if faults:
                log.warning("%s; going on from the one before it, %s.", faults[0], path.name)
            return path
        faults.append(f"The checkpoint {path} is not whole: {fault}")
    if faults:
        raise UserError(
            f"{'. '.join(faults)}. Nothing is left to go on from: delete {folder} to start anew, "
            "or choose another folder by hydra.run.dir=FOLDER."
        )
    return None


def find_fault(path: Path) -> str | None:
    """What keeps a file from being the checkpoint of a run, in words; None where it is one."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load passes checksums by
        if damaged is not None:
            return f"{damaged} in it is damaged"
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for files that are no checkpoints
        return f"it cannot be read ({type(error).__name__})"
    missing = [part for part in PARTS if not isinstance(content, dict) or part not in content]
    return f"it lacks {', '.join(missing)}" if missing else None


# ---- writing -------------------------------------------------------------------------------------


class WholeCheckpoints(TorchCheckpointIO):
    """Writes every checkpoint of a Trainer, Slurm's too, whole or not at all."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write to a file beside it, then take its place."""
        content = io.BytesIO()
        torch.save(checkpoint, content)  # to memory: of a full disk torch gives no plain error
        with whole_file(path) as part:
            part.write_bytes(content.getbuffer())


class AtomicCheckpoint(pl.callbacks.Checkpoint):
    """Keeps `last.ckpt`, and the one before it as `previous.ckpt`.

    Saved every N steps, every M minutes, on the last batch of every epoch (so that nothing is lost
    of a run killed while it validates), and at the end. On SIGTERM, SIGUSR1 and Ctrl-C the step in
    hand is finished and saved, and the process ends with status 128 + the signal's number. A second
    Ctrl-C stops at once. What handled SIGUSR1 before (Lightning under Slurm, submitit) is called
    after the step instead: it requeues the job.

    Args:
        dirpath: folder of the checkpoints.
        every_n_steps: steps (batches) between two checkpoints within an epoch.
        every_n_minutes: minutes between two checkpoints; null leaves the clock alone.

    Raises:
        UserError: for numbers that are not positive.
    """

    def __init__(
        self, dirpath: str | Path, every_n_steps: int = 200, every_n_minutes: float | None = None
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_n_minutes", every_n_minutes)):
            if value is not None and not value > 0:
                raise UserError(f"callbacks.checkpoint.{name}={value} must be positive.")
        self.folder = Path(dirpath)
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.saved_at = time.monotonic()
        self.signals = Signals()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over writing, and the signals from Lightning, which would stop within a step."""
        trainer.strategy.checkpoint_io = WholeCheckpoints()
        if trainer.is_global_zero:
            for part in self.folder.glob("*.part"):  # of runs that were killed as they wrote
                part.unlink(missing_ok=True)
        self.signals.watch()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Save where it is time to, and stop where somebody asked for it."""
        assert isinstance(pl_module, ResumableModule)
        # Every process has its own clock, and a signal may have reached one of them alone.
        overdue, received = largest(
            [self.is_overdue(), self.signals.received], trainer.strategy.root_device
        )
        on_step = trainer.global_step % self.every_n_steps == 0 or pl_module.epoch_is_complete()
        if on_step or overdue or received:
            self.save(trainer)
        if received:
            self.signals.answer(received)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop within a long validation: the epoch's last batch has been saved."""
        self.stop_evaluation(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the finished run; stop where somebody asked for it since the last batch."""
        self.save(trainer)
        (received,) = largest([self.signals.received], trainer.strategy.root_device)
        if received:
            self.signals.answer(received)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals: Lightning has put its own back after training."""
        self.signals.watch()

    def on_test_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop within a long test: the run has been saved."""
        self.stop_evaluation(trainer)

    def stop_evaluation(self, trainer: pl.Trainer) -> None:
        """Stop between two batches, of which not every process has as many as another."""
        received = self.signals.received
        if trainer.is_global_zero and received and not self.signals.requeues(received):
            self.signals.answer(received)  # the other processes end with this one

    def is_overdue(self) -> bool:
        """Whether the last checkpoint is too many minutes old."""
        minutes = (time.monotonic() - self.saved_at) / 60
        return self.every_n_minutes is not None and minutes >= self.every_n_minutes

    def save(self, trainer: pl.Trainer) -> None:
        """Write the next checkpoint beside the last; once it is whole, all move up by one."""
        self.saved_at = time.monotonic()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(trainer.lightning_module, ResumableModule)
        trainer.lightning_module.check_finite()
        following, last = self.folder / "next.ckpt", self.folder / LAST
        trainer.save_checkpoint(following)
        if trainer.is_global_zero:
            if last.exists():
                last.replace(self.folder / PREVIOUS)
            following.replace(last)
            flush(self.folder)


# ---- signals -------------------------------------------------------------------------------------


class Signals:
    """Notes signals that ask for an end; they are answered between two steps.

    Attributes:
        received: the number of the first one, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self.before: Callable[[int, FrameType | None], Any] | None = None

    def watch(self) -> None:
        """Note signals from here on. Lightning puts back what it found at the end of a fit."""
        if threading.current_thread() is not threading.main_thread():
            return  # where Python sets no handlers
        requeue = signal.getsignal(signal.SIGUSR1)
        self.before = requeue if callable(requeue) and requeue != self.note else None
        for number in SIGNALS:
            signal.signal(number, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if self.received and number == signal.SIGINT:
            raise SystemExit(128 + number)  # of a KeyboardInterrupt Lightning makes status 1
        self.received = self.received or number

    def requeues(self, number: int) -> bool:
        """Whether a scheduler's handler was there for a signal; it saves and asks for more time."""
        return number == signal.SIGUSR1 and self.before is not None

    def answer(self, number: int) -> None:
        """Requeue the job where a scheduler's handler was there for it, else end.

        Raises:
            SystemExit: with 128 + the signal's number.
        """
        if self.requeues(number):
            assert self.before is not None
            self.received = 0
            self.before(number, None)
            return
        if is_first_process():
            name = signal.Signals(number).name
            log.warning("%s: stopped after a whole step; resume=auto goes on from there.", name)
        raise SystemExit(128 + number)
