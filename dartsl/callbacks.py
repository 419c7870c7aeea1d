"""What a run shows and leaves behind: genotypes, pictures, one line an epoch."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar

from dartsl.distributed import is_first_process
from dartsl.genotype import Genotype
from dartsl.modules import SearchModule
from dartsl.modules.resumable import ResumableModule
from dartsl.visualize import draw_genotype, draw_strengths, save_figure

log = logging.getLogger(__name__)

GENOTYPE_FILE = "genotype.yaml"
BEST_GENOTYPE_FILE = "genotype_best.yaml"


class GenotypeWriter(pl.Callback):
    """Writes the genotype after every epoch, so that a killed search leaves one.

    `genotype.yaml` is the last epoch's, which DARTS ends with; `genotype_best.yaml` that of the
    epoch with the best accuracy on the alpha half. Pictures of the cells and of the edge weights
    are drawn at the end.

    Args:
        dirpath: folder of the files.
        draw: whether to draw pictures at the end of the search.
    """

    def __init__(self, dirpath: str | Path, draw: bool = True) -> None:
        self.dirpath = Path(dirpath)
        self.draw = draw
        self.best_accuracy: float | None = None
        self.best_genotype: Genotype | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the epoch's genotype."""
        assert isinstance(pl_module, SearchModule)
        if not trainer.is_global_zero or not pl_module.epoch_is_complete():
            return
        genotype = pl_module.genotype()
        genotype.save(self.dirpath / GENOTYPE_FILE)
        accuracy = trainer.callback_metrics.get("search/val_accuracy")
        value = 0.0 if accuracy is None else accuracy.item()
        if self.best_accuracy is None or value > self.best_accuracy:
            self.best_accuracy, self.best_genotype = value, genotype
            genotype.save(self.dirpath / BEST_GENOTYPE_FILE)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the found cells and the edge weights that they were read from."""
        assert isinstance(pl_module, SearchModule)
        if self.draw and trainer.is_global_zero:
            supernet = pl_module.supernet
            save_figure(draw_genotype(pl_module.genotype()), self.dirpath / "cells")
            figure = draw_strengths(supernet.strengths(), supernet.space)
            save_figure(figure, self.dirpath / "strengths")

    def state_dict(self) -> dict[str, Any]:
        """The best epoch so far, as plain data."""
        best = None if self.best_genotype is None else repr(self.best_genotype)
        return {"best_accuracy": self.best_accuracy, "best_genotype": best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best epoch so far; its file is written again, here if the run moved."""
        self.best_accuracy = state_dict["best_accuracy"]
        if state_dict["best_genotype"] is not None:
            self.best_genotype = Genotype.parse(state_dict["best_genotype"])
            if is_first_process():
                self.best_genotype.save(self.dirpath / BEST_GENOTYPE_FILE)


class CollapseWarning(pl.Callback):
    """Warns when skip connections take over the normal cell, the known failure of long searches.

    Args:
        max_skip_connections: of the normal cell; DARTS+ (arXiv:1909.06035) stops a search that
            has two or more of them, PC-DARTS and the paper's own cells have up to three.
    """

    def __init__(self, max_skip_connections: int = 3) -> None:
        self.max_skip_connections = max_skip_connections

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the skip connections of the normal cell."""
        assert isinstance(pl_module, SearchModule)
        if not pl_module.epoch_is_complete():
            return
        edges = pl_module.genotype().normal
        skips = sum(primitive == "skip_connect" for primitive, _ in edges)
        if skips > self.max_skip_connections and trainer.is_global_zero:
            log.warning(
                "Epoch %d: %d of the normal cell's %d edges are skip connections: the search may "
                "be collapsing. An earlier epoch's genotype may be the better one.",
                trainer.current_epoch,
                skips,
                len(edges),
            )


class EpochLines(pl.Callback):
    """Prints one plain line an epoch: loss and accuracy of both halves, and the learning rate."""

    def __init__(self) -> None:
        self.epoch: int | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the epoch: its last metrics are logged after the callbacks' turn."""
        assert isinstance(pl_module, ResumableModule)
        if pl_module.epoch_is_complete():
            self.epoch = trainer.current_epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the epoch before."""
        self.print_line(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the last epoch."""
        self.print_line(trainer)

    def print_line(self, trainer: pl.Trainer) -> None:
        """Print what was logged of the epoch that ended, once."""
        if self.epoch is None or not trainer.is_global_zero:
            return
        metrics = {
            name.split("/")[1]: v for name, v in trainer.callback_metrics.items() if "/" in name
        }
        parts = [f"epoch {self.epoch + 1:>3}/{trainer.max_epochs}"]
        for half in ("train", "val"):
            if f"{half}_loss" in metrics:
                loss, accuracy = metrics[f"{half}_loss"], metrics[f"{half}_accuracy"]
                parts.append(f"{half}: loss {loss:.3f}, accuracy {100 * accuracy:.2f} %")
        if "learning_rate" in metrics:
            parts.append(f"learning rate {metrics['learning_rate']:.4g}")
        print("   ".join(parts), flush=True)
        self.epoch = None


class Progress(RichProgressBar):
    """The batches of an epoch as a bar with the time left; nothing where output is no terminal."""

    def __init__(self) -> None:
        super().__init__(leave=False)
        if not sys.stdout.isatty():
            self.disable()

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """No metrics: `EpochLines` prints them."""
        return {}
