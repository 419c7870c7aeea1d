"""What a run measured, epoch by epoch, in a file that outlives the run: reports are made of it."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml

from dartsl.distributed import is_first_process
from dartsl.files import whole_file
from dartsl.modules import SearchModule
from dartsl.modules.resumable import ResumableModule

HISTORY_FILE = "history.jsonl"
TEST_FILE = "test.yaml"
_DIGITS = 6  # of the edge weights, behind the point


class History(pl.callbacks.Checkpoint):
    """Writes `history.jsonl`, one line an epoch, and after a test `test.yaml`.

    A line holds the epoch (from 0), its seconds, its metrics (null where one is no finite number),
    and for a search the genotype, the primitives and the edge weights [E, P]. All lines are part
    of the checkpoint, so that a resumed run has those up to there and no others, whatever was
    written after it and wherever it goes on.

    It is a `Checkpoint` callback for its turn: Lightning calls these once the module has logged the
    epoch. It has to stand before the one that saves.

    Args:
        dirpath: folder of the files.
    """

    def __init__(self, dirpath: str | Path) -> None:
        self.dirpath = Path(dirpath)
        self.lines: list[dict[str, Any]] = []
        self.began = time.monotonic()  # the epoch, on a clock that leaves out interruptions

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch's line."""
        assert isinstance(pl_module, ResumableModule)
        if not pl_module.epoch_is_complete():
            return
        now = time.monotonic()
        line: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "seconds": round(now - self.began, 3),
            "metrics": {
                name: value
                for name, value in epoch_metrics(trainer).items()
                if pl_module.is_of_epoch(name, trainer.current_epoch)
            },
        }
        if isinstance(pl_module, SearchModule):
            line |= search_state(pl_module)
        self.began = now
        self.lines.append(line)
        self.write()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what the test measured."""
        if is_first_process():
            measured = {
                name.removeprefix("test/"): value
                for name, value in epoch_metrics(trainer).items()
                if name.startswith("test/")
            }
            with whole_file(self.dirpath / TEST_FILE) as part:
                part.write_text(yaml.safe_dump(measured), encoding="utf-8")

    def write(self) -> None:
        """Write all lines: a run killed meanwhile leaves those of the epoch before."""
        if is_first_process():
            text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.lines)
            with whole_file(self.dirpath / HISTORY_FILE) as part:
                part.write_text(text, encoding="utf-8")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of a run that was not resumed."""
        if trainer.global_step == 0:
            self.began = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The lines so far, and the seconds of the epoch that has begun."""
        return {"lines": self.lines, "seconds": time.monotonic() - self.began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from these lines; the file is written again, here if the run moved."""
        self.lines = state_dict["lines"]
        self.began = time.monotonic() - state_dict["seconds"]
        self.write()


def epoch_metrics(trainer: pl.Trainer) -> dict[str, float | None]:
    """What was logged of the epoch, without what was logged of its steps and of the machine."""
    values = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return {
        name: value if math.isfinite(value) else None
        for name, value in values.items()
        if not name.endswith("_step") and not name.startswith("system/")
    }


def search_state(module: SearchModule) -> dict[str, Any]:
    """Genotype and edge weights of a search, as plain data."""
    return {
        "genotype": module.genotype().notation(),
        "primitives": list(module.supernet.space.primitives),
        "strengths": {
            kind: [[round(value, _DIGITS) for value in row] for row in weights.tolist()]
            for kind, weights in module.supernet.strengths().items()
        },
    }


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's history; none where there is no file."""
    path = Path(folder) / HISTORY_FILE
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
