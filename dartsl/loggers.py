"""What Lightning's loggers do not share: pictures, artifacts, and Weights & Biases runs that go on.

The rest of the package logs numbers as Lightning has it (`log`, `log_hyperparams`), and calls
`log_picture` and `publish` for whatever loggers there are. Only here is wandb known, and it is
imported only where it is asked for.
"""

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment

from dartsl.errors import UserError
from dartsl.files import whole_file
from dartsl.genotype import GENOTYPE_FILE, Genotype

log = logging.getLogger(__name__)

EPOCH_GROUPS = ("search", "train", "test", "alpha", "system")
"""What stands before the slash in the names of numbers that come once an epoch."""

PICTURE_GROUP = "cells"
"""The same of pictures."""

STEP_METRICS = ("search/train_loss_step", "train/loss_step")
"""Those that come every `trainer.log_every_n_steps` batches."""

RUN_ID_FILE = "wandb/run_id.txt"

# ---- pictures and artifacts ----------------------------------------------------------------------


def takes_pictures(logger: Logger) -> bool:
    """Whether the logger has a place for pictures."""
    return isinstance(logger, WandbLogger | TensorBoardLogger)


def log_picture(logger: Logger, name: str, pixels: np.ndarray, step: int, epoch: int) -> None:
    """Log a picture where the logger has a place for it.

    Args:
        logger: any.
        name: `<group>/<name>`, as of a metric.
        pixels: [H, W, 3] bytes.
        step: on the axis of the epoch's metrics.
        epoch: counts from 0.
    """
    if isinstance(logger, WandbLogger):
        import wandb

        image: Any = {name: wandb.Image(pixels), "epoch": epoch}
        logger.log_metrics(image, step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, pixels, step, dataformats="HWC")


def publish(
    loggers: Iterable[Logger], kind: str, files: Iterable[Path], about: Mapping[str, Any]
) -> str | None:
    """Publish files as an artifact of the run that made them, where a logger keeps artifacts.

    Args:
        loggers: of the run.
        kind: the artifact's type and the first part of its name, `<kind>-<run id>`.
        files: keep their names; those that do not exist are left out.
        about: plain values that are kept with it.

    Returns:
        The artifact's name, `PROJECT/NAME:latest` and before it the ENTITY of a run that is
        online, or None where nothing was published.
    """
    found = [path for path in files if path.is_file()]
    runs = [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]
    if not found or not runs or runs[0].disabled:
        return None
    import wandb

    run = runs[0]
    artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind, metadata=dict(about))
    for path in found:
        artifact.add_file(str(path), name=path.name)
    run.log_artifact(artifact)
    return "/".join(filter(None, (run.entity, run.project, f"{artifact.name}:latest")))


def genotype_artifact(artifact: str) -> Genotype:
    """The genotype that a search published to Weights & Biases.

    Args:
        artifact: its name, ENTITY/PROJECT/NAME:VERSION.

    Raises:
        UserError: where it cannot be had, or holds no genotype.
    """
    import wandb

    with TemporaryDirectory() as folder:
        try:
            path = Path(wandb.Api().artifact(artifact).download(root=folder)) / GENOTYPE_FILE
        except (wandb.Error, ValueError, OSError) as error:
            raise UserError(
                f"Cannot get the artifact {artifact!r}: {_reason(error)}. Its name is "
                "ENTITY/PROJECT/NAME:VERSION, as its search printed it; `wandb login` keeps a key."
            ) from error
        if not path.is_file():
            raise UserError(f"The artifact {artifact!r} holds no {GENOTYPE_FILE}.")
        return Genotype.load(path)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


# ---- TensorBoard ---------------------------------------------------------------------------------


class TensorBoard(TensorBoardLogger):
    """Lightning's logger without its curve `hp_metric`, which is -1 in every run.

    Not by `default_hp_metric=False`: it leaves out the run's settings, too.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers but that one."""
        super().log_metrics({k: v for k, v in metrics.items() if k != "hp_metric"}, step)


# ---- Weights & Biases ----------------------------------------------------------------------------


def wandb_logger(
    save_dir: str,
    job_type: str,
    checkpoint: str | None = None,
    artifact: str | None = None,
    mode: Literal["online", "offline", "disabled"] | None = None,
    **options: Any,
) -> "Wandb":
    """A Weights & Biases logger that is offline where this machine has no key, and never asks.

    `WANDB_MODE` decides where it is set; `wandb sync` sends an offline run later.

    Args:
        save_dir: folder of the run.
        job_type: the task.
        checkpoint: that the run goes on from, under the id of the run that saved it; an
            evaluation of a checkpoint is a run of its own.
        artifact: that the run has its genotype from; they will be linked.
        mode: None finds out.
        **options: of Lightning's `WandbLogger` and of `wandb.init`.
    """
    import wandb

    # Given as the run's own mode: Lightning's `offline` sets WANDB_MODE for the whole process, and
    # wandb has read that already.
    if mode is None and "WANDB_MODE" not in os.environ:
        mode = None if wandb.login(prompt=False, verify=False) else "offline"
    if checkpoint is not None and job_type != "evaluate":
        kept = Path(checkpoint).parent.parent / RUN_ID_FILE
        options["id"] = kept.read_text(encoding="utf-8").strip() if kept.is_file() else None
    # No summary at the end: ours stands there.
    options.setdefault("settings", wandb.Settings(quiet=True))
    return Wandb(artifact, save_dir=save_dir, job_type=job_type, mode=mode, **options)


class Wandb(WandbLogger):
    """Lightning's logger with the axes and summaries of our metrics, and a run that goes on.

    Args:
        artifact: that the run is to be linked with, or None.
        **options: of Lightning's `WandbLogger`.
    """

    def __init__(self, artifact: str | None, **options: Any) -> None:
        super().__init__(**options)
        self._artifact = artifact
        self._wandb_init.pop("anonymous", None)  # wandb warns of Lightning's default for it

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, which begins when it is first asked for.

        Raises:
            UserError: where it cannot begin.
        """
        if self._experiment is None:
            import wandb

            try:
                self._experiment = wandb.init(**self._wandb_init)
                self._begin(self._experiment)
            except wandb.Error as error:
                raise UserError(
                    f"Weights & Biases cannot begin the run: {_reason(error)}. "
                    "logger.wandb.mode=offline keeps it on this machine."
                ) from error
        return self._experiment

    def _begin(self, run: Any) -> None:
        """Keep the run's id, tell it what its metrics are, and link it with where it comes from."""
        kept = Path(self._wandb_init["dir"]) / RUN_ID_FILE
        with whole_file(kept) as part:
            part.write_text(run.id + "\n", encoding="utf-8")
        for name in STEP_METRICS:
            run.define_metric(name, step_metric="trainer/global_step", summary="min,last")
        for group in EPOCH_GROUPS:
            run.define_metric(f"{group}/*", step_metric="epoch", summary="min,max,last")
        run.define_metric(f"{PICTURE_GROUP}/*", step_metric="epoch")  # a picture has no minimum
        if self._artifact is not None and run.offline:
            log.warning("An offline run cannot be linked with %s.", self._artifact)
        elif self._artifact is not None:
            run.use_artifact(self._artifact)


@contextmanager
def finished_runs() -> Iterator[None]:
    """Afterwards all runs that began within have ended, failed where an exception ended them.

    Else the next job of a sweep would log into this one's run.
    """
    status = 1
    try:
        yield
        status = 0
    finally:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish(exit_code=status)
