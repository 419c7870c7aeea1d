"""A Lightning run that is stopped at any step and resumed sees the batches of the whole run."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from dartsl.data import Digits

EPOCHS = 3


def digest(batch: Any) -> str:
    if isinstance(batch, dict):
        return digest(batch["train"]) + digest(batch["val"])
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in batch)).hexdigest()[:12]


class Recorder(pl.LightningModule):
    """Writes down every training batch, and each epoch's validation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(digest(batch))
        self.optimizers().step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(pl.Callback):
    """Saves after every batch and after every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, module: Recorder, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"batch{len(module.seen)}.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Recorder) -> None:
        trainer.save_checkpoint(self.folder / f"epoch{len(module.seen)}.ckpt")

    def on_validation_end(self, trainer: pl.Trainer, module: Recorder) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"validation{len(module.seen)}.ckpt")


def fit(
    ckpt_path: Path | None = None, folder: Path | None = None, limit: Any = None, **options: Any
) -> list[str]:
    data = Digits(
        **{"num_classes": 10, "in_channels": 1, "image_size": 8, "mean": [0.3], "std": [0.4]}
        | {"batch_size": 160, "train_fraction": 0.5}
        | options
    )
    module = Recorder()
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=limit,
        callbacks=[SaveEverywhere(folder)] if folder else [],
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module.seen


@pytest.mark.parametrize(
    "options",
    [
        {"task": "search"},
        {"task": "train"},
        {"task": "search", "limit": 3},
        {"task": "search", "limit": 0.5},
        {"task": "search", "in_memory_limit": 0, "max_images": 50, "batch_size": 10},
    ],
    ids=["search", "train", "limit_batches", "limit_fraction", "worker_path"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_resume_at_every_step_is_exact(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = fit(folder=tmp_path, **options)
    per_epoch = {3: 3, 0.5: 2}.get(options.get("limit"), 5)
    assert len(set(whole)) == len(whole) == EPOCHS * per_epoch
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == len(whole) + 2 * EPOCHS
    for path in checkpoints:
        step = int("".join(filter(str.isdigit, path.stem)))
        assert fit(ckpt_path=path, **options) == whole[step:], path.stem


def test_a_second_fit_without_a_checkpoint_starts_anew() -> None:
    data = Digits(num_classes=10, in_channels=1, image_size=8, mean=[0.3], std=[0.4])
    runs = []
    for _ in range(2):
        module = Recorder()
        pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, data)
        runs.append(module.seen)
    assert runs[0] == runs[1]
