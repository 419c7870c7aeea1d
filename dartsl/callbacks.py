"""What a run shows and leaves behind: genotypes, pictures, one line an epoch."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import rich
import rich.progress
import torch
from rich.console import Console
from torch import Tensor

from dartsl.distributed import is_first_process
from dartsl.errors import UserError
from dartsl.genotype import GENOTYPE_FILE, Genotype, count_skips
from dartsl.loggers import PICTURE_GROUP, log_picture, takes_pictures
from dartsl.modules import SearchModule
from dartsl.modules.resumable import ResumableModule
from dartsl.modules.search import edge_entropies
from dartsl.networks import Supernet
from dartsl.search_space import SearchSpace
from dartsl.terminal import bars, is_terminal, print_epoch
from dartsl.visualize import draw_genotype, draw_strengths, rasterize, save_figure

log = logging.getLogger(__name__)

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
        # In all processes: to read metrics is to exchange whatever was logged since.
        accuracy = trainer.callback_metrics.get("search/val_accuracy")
        if not trainer.is_global_zero or not pl_module.epoch_is_complete():
            return
        genotype = pl_module.genotype()
        genotype.save(self.dirpath / GENOTYPE_FILE)
        if accuracy is None:  # without validation no epoch is the best
            return
        if self.best_accuracy is None or accuracy.item() > self.best_accuracy:
            self.best_accuracy, self.best_genotype = accuracy.item(), genotype
            genotype.save(self.dirpath / BEST_GENOTYPE_FILE)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the last genotype, and draw its cells and the edge weights it was read from."""
        assert isinstance(pl_module, SearchModule)
        if not trainer.is_global_zero:
            return
        genotype = pl_module.genotype()
        genotype.save(self.dirpath / GENOTYPE_FILE)  # of the last step, also within an epoch
        if self.draw:
            supernet = pl_module.supernet
            save_figure(draw_genotype(genotype), self.dirpath / "cells")
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
        skips = count_skips(edges)
        if skips > self.max_skip_connections and trainer.is_global_zero:
            log.warning(
                "Epoch %d: %d of the normal cell's %d edges are skip connections: the search may "
                "be collapsing. An earlier epoch's genotype may be the better one.",
                trainer.current_epoch,
                skips,
                len(edges),
            )


class ArchitectureLogger(pl.Callback):
    """Logs every epoch what alpha is about to choose, as numbers and as pictures.

    Numbers go to all loggers: strength and entropy of every edge, and how many edges of the
    genotype the epoch before did not have. Pictures of the cells and of the edge weights go to
    those that take pictures.

    Args:
        pictures_every_n_epochs: and after the last one; 0 draws none. A set takes 0.4 s.
    """

    def __init__(self, pictures_every_n_epochs: int = 1) -> None:
        if pictures_every_n_epochs < 0:
            raise UserError(
                f"pictures_every_n_epochs={pictures_every_n_epochs} must be at least 0 (none)."
            )
        self.pictures_every_n_epochs = pictures_every_n_epochs
        self.last: Genotype | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the epoch's edges, genotype and pictures."""
        assert isinstance(pl_module, SearchModule)
        if not pl_module.epoch_is_complete():
            return
        supernet, genotype = pl_module.supernet, pl_module.genotype()
        for kind, weights in supernet.strengths().items():
            strengths, entropies = edge_strengths(weights, supernet.space), edge_entropies(weights)
            pl_module.log_epoch(f"alpha/{kind}_edge_strength/", by_edge(strengths, supernet.space))
            pl_module.log_epoch(f"alpha/{kind}_edge_entropy/", by_edge(entropies, supernet.space))
        if self.last is not None:
            pl_module.log_epoch(
                "alpha/", {"genotype_distance": float(genotype.distance(self.last))}
            )
        self.last = genotype
        if self.draws(trainer, pl_module):
            self.log_pictures(trainer, genotype, supernet)

    def draws(self, trainer: pl.Trainer, module: SearchModule) -> bool:
        """Whether pictures of this epoch are wanted, and somebody takes them."""
        done, every = trainer.current_epoch + 1, self.pictures_every_n_epochs
        wanted = every > 0 and (done % every == 0 or done == module.num_epochs())
        return wanted and trainer.is_global_zero and any(map(takes_pictures, trainer.loggers))

    def log_pictures(self, trainer: pl.Trainer, genotype: Genotype, supernet: Supernet) -> None:
        """Log the cells and the edge weights."""
        title = f"Epoch {trainer.current_epoch + 1}"
        figures = {
            f"{PICTURE_GROUP}/genotype": draw_genotype(genotype, title),
            f"{PICTURE_GROUP}/edge_weights": draw_strengths(
                supernet.strengths(), supernet.space, title
            ),
        }
        step = trainer.global_step - 1  # as Lightning counts when it logs an epoch's metrics
        for name, figure in figures.items():
            pixels = rasterize(figure)
            for logger in trainer.loggers:
                log_picture(logger, name, pixels, step, trainer.current_epoch)

    def state_dict(self) -> dict[str, Any]:
        """The last epoch's genotype, as plain data."""
        return {"last": None if self.last is None else repr(self.last)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the last epoch's genotype."""
        last = state_dict["last"]
        self.last = None if last is None else Genotype.parse(last)


def edge_strengths(weights: Tensor, space: SearchSpace) -> Tensor:
    """How strong each edge is, [E]: its largest weight of [E, P] but that of 'none' (section 2.4).

    Args:
        weights: after the relaxation.
        space: names the columns.
    """
    columns = [i for i, primitive in enumerate(space.primitives) if primitive != "none"]
    return weights[:, columns].amax(dim=1)


def by_edge(values: Tensor, space: SearchSpace) -> dict[str, Tensor]:
    """Values [E] by the names of their edges, in letters that every logger takes."""
    names = (f"node_{node}_from_{source}" for node, source in space.edges)
    return dict(zip(names, values, strict=True))


class SystemLogger(pl.Callback):
    """Logs every epoch what it took: seconds, validation included, and a GPU's peak memory."""

    def __init__(self) -> None:
        self.begun: float | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.begun = time.monotonic()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the epoch, unless a resume began within it."""
        assert isinstance(pl_module, ResumableModule)
        if self.begun is None or not pl_module.epoch_is_complete():
            return
        used = {"epoch_seconds": time.monotonic() - self.begun}
        if pl_module.device.type == "cuda":
            used["peak_memory_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        pl_module.log_epoch("system/", used)


class EpochLines(pl.Callback):
    """Prints every epoch: loss and accuracy of both halves, the learning rate, the genotype.

    Args:
        console: where to; the standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self.epoch: int | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the epoch: its last metrics are logged after the callbacks' turn."""
        assert isinstance(pl_module, ResumableModule)
        if pl_module.epoch_is_complete():
            self.epoch = trainer.current_epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the epoch before."""
        self.print_line(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the last epoch."""
        self.print_line(trainer, pl_module)

    def print_line(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print what was logged of the epoch that ended, once."""
        if self.epoch is None or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, ResumableModule)
        metrics = {
            name.split("/")[1]: value.item()
            for name, value in trainer.callback_metrics.items()
            if name.startswith(("search/", "train/")) and pl_module.is_of_epoch(name, self.epoch)
        }
        genotype = pl_module.genotype() if isinstance(pl_module, SearchModule) else None
        console = self.console or rich.get_console()
        print_epoch(console, self.epoch + 1, pl_module.num_epochs(), metrics, genotype)
        self.epoch = None


class Progress(pl.callbacks.ProgressBar):
    """In a terminal, the epochs of a run and the steps of the present one, with the time left.

    Args:
        console: where to; the standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or rich.get_console()
        self.enabled = is_terminal(self.console)
        self.bars: rich.progress.Progress | None = None
        self.epochs: rich.progress.TaskID | None = None
        self.steps: rich.progress.TaskID | None = None
        self.counted: str | None = None

    def disable(self) -> None:
        """Show nothing; Lightning's word to all processes but the first."""
        self.enabled = False

    def enable(self) -> None:
        """Show the bars."""
        self.enabled = True

    def start(self) -> None:
        """Show the bars, if they are not shown yet."""
        if self.enabled and self.bars is None:
            self.bars = bars(self.console)
            self.bars.start()

    def stop(self) -> None:
        """Take the bars away."""
        if self.bars is not None:
            self.bars.stop()
        self.bars = self.epochs = self.steps = self.counted = None

    def count(self, what: str, done: int, total: float) -> None:
        """Show how many steps of a pass are done."""
        if self.bars is None:
            return
        whole = int(total) if math.isfinite(total) else None
        if self.steps is None:
            self.steps = self.bars.add_task(what, total=whole)
        if what != self.counted:  # time it anew
            self.bars.reset(self.steps, description=what, total=whole)
            self.counted = what
        self.bars.update(self.steps, completed=done)

    def count_epochs(self, trainer: pl.Trainer, trained: int, validated: int = 0) -> None:
        """Show how many epochs are done, and the present one's share."""
        if self.bars is None:
            return
        if self.epochs is None:
            module = trainer.lightning_module
            assert isinstance(module, ResumableModule)
            whole = module.num_epochs()
            self.epochs = self.bars.add_task("Epochs", total=whole, completed=trainer.current_epoch)
        steps = trainer.num_training_batches + sum(trainer.num_val_batches)
        share = (trained + validated) / steps if math.isfinite(steps) else 0.0
        self.bars.update(self.epochs, completed=trainer.current_epoch + share)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bars."""
        self.start()
        self.count_epochs(trainer, 0)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Count a training batch."""
        done = args[-1] + 1
        self.count_epochs(trainer, done)
        self.count(f"Epoch {trainer.current_epoch + 1}", done, trainer.num_training_batches)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Count a validation batch."""
        done = trainer.fit_loop.epoch_loop.val_loop.batch_progress.current.ready
        self.count_epochs(trainer, int(trainer.num_training_batches), done)
        self.count("Validation", done, sum(trainer.num_val_batches))

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar of a test."""
        self.start()

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Count a test batch."""
        self.count(
            "Test", trainer.test_loop.batch_progress.current.ready, sum(trainer.num_test_batches)
        )

    def on_exception(self, *_: Any) -> None:
        """Leave the terminal as it was."""
        self.stop()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Leave the terminal as it was."""
        self.stop()
