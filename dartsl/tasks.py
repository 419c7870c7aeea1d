"""What `run.py` can do: search, train, evaluate, draw, and the quick start.

A task takes the composed config and returns the number that a sweeper maximises.
"""

import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from dartsl.callbacks import BEST_GENOTYPE_FILE
from dartsl.config import (
    build,
    check_missing,
    check_types,
    command,
    compose_experiment,
    given_overrides,
    print_tree,
    quote,
    relative,
    resolved,
)
from dartsl.distributed import is_first_process
from dartsl.errors import UserError, unknown
from dartsl.genotype import GENOTYPE_FILE, Genotype
from dartsl.interop import load_official_network
from dartsl.loggers import finished_runs, publish
from dartsl.modules.resumable import check_same_tensors
from dartsl.processes import processes
from dartsl.terminal import print_command, print_summary
from dartsl.visualize import draw_genotype, save_figure

log = logging.getLogger(__name__)


def search(cfg: DictConfig) -> float | None:
    """Search for a genotype; returns the accuracy on the alpha half after the last epoch."""
    prepare(cfg)
    supernet = build(cfg.supernet)()
    module = build(cfg.module)(supernet=supernet)
    cfg.ckpt_path = find_checkpoint(cfg)
    with running(cfg) as (trainer, data):
        trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
        if is_first_process():
            report_genotype(cfg, trainer, publish_search(cfg, trainer))
    return metric(trainer, "search/val_accuracy")


def train(cfg: DictConfig) -> float | None:
    """Train a genotype's network, then test it; returns the validation accuracy.

    With data.train_fraction=1 the validation set is the test set, as in the official code; without
    any validation it is the test accuracy that is returned. Nothing may be selected by either.
    """
    prepare(cfg)
    network = build(cfg.network)(genotype=find_genotype(cfg))
    module = build(cfg.module)(network=network)
    cfg.ckpt_path = find_checkpoint(cfg)
    with running(cfg) as (trainer, data):
        trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
        validation = metric(trainer, "train/val_accuracy")
        trained = scores(trainer, "train")
        trainer.test(module, datamodule=data, verbose=False)
    test = report_test(cfg, trainer, trained)
    return test if validation is None else validation


def evaluate(cfg: DictConfig) -> float:
    """Test accuracy of a checkpoint: dartsl's own, or a `.pt` file of the official code."""
    prepare(cfg)
    if cfg.ckpt_path is None:
        raise UserError("Nothing to evaluate: give ckpt_path=FILE, the checkpoint of a training.")
    state_dict, official = read_checkpoint(cfg.ckpt_path)
    auxiliary = any(name.startswith("auxiliary_head.") for name in state_dict)
    network = build(cfg.network)(genotype=find_genotype(cfg), auxiliary=auxiliary)
    if official:
        load_official_network(network, state_dict)
    else:
        check_same_tensors(network.state_dict(), state_dict, "this run's network")
        network.load_state_dict(state_dict)
    module = build(cfg.module)(network=network)
    with running(cfg) as (trainer, data):
        trainer.test(module, datamodule=data, verbose=False)
    return report_test(cfg, trainer, {})


def draw(cfg: DictConfig) -> None:
    """A picture of a genotype's cells, as PNG and SVG."""
    check_missing(cfg)
    genotype = find_genotype(cfg)
    for path in save_figure(draw_genotype(genotype, cfg.title), Path(cfg.output_dir) / "cells"):
        print(relative(path))


def quick_start(cfg: DictConfig) -> float | None:
    """Search, then train what was found: two experiments, given the overrides of this run."""
    if cfg.ckpt_path is not None:
        raise UserError(
            "The quick start does not resume: it takes two minutes. Leave out ckpt_path."
        )
    folder = Path(cfg.output_dir)
    steps = [f"output_dir={quote(folder / name)}" for name in ("search", "train")]
    genotype = f"genotype.path={quote(folder / 'search' / GENOTYPE_FILE)}"
    searched = compose_experiment(cfg.experiments[0], steps[0], "next_experiment=null")
    trained = compose_experiment(cfg.experiments[1], steps[1], "genotype=from_file", genotype)
    search(searched)
    accuracy = train(trained)
    print_command(command(f"experiment={cfg.next_experiment}"))
    return accuracy


# ---- parts ---------------------------------------------------------------------------------------


def prepare(cfg: DictConfig) -> None:
    """Check the config and seed everything.

    Raises:
        UserError: for a missing value or one of another type, and where the output folder holds
            another run.
    """
    check_missing(cfg)
    check_types(cfg)
    if not 0 <= cfg.seed < 2**32:
        raise UserError(f"seed={cfg.seed} must be a whole number from 0 to 2^32 - 1.")
    if cfg.threads is not None and not (isinstance(cfg.threads, int) and cfg.threads >= 1):
        raise UserError(f"threads={cfg.threads} must be a whole number of at least 1, or null.")
    output_dir = Path(cfg.output_dir)
    if is_first_process() and (output_dir / "checkpoints").exists() and cfg.ckpt_path is None:
        raise UserError(
            f"{output_dir} holds a run already: go on with it by ckpt_path=last, or choose another "
            "folder by hydra.run.dir=FOLDER."
        )
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    pl.seed_everything(cfg.seed, verbose=False)


def announce(cfg: DictConfig, loggers: Iterable[Logger]) -> None:
    """Show, keep and log the config of a run that is about to start."""
    if not is_first_process():
        return
    plain = resolved(cfg)
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(plain, output_dir / "config.yaml")
    if cfg.print_config:
        print_tree(plain)
    values = cast(dict[str, Any], OmegaConf.to_container(plain))
    for logger in loggers:
        logger.log_hyperparams(values)


def build_trainer(cfg: DictConfig) -> pl.Trainer:
    """The Lightning Trainer with the config's callbacks and loggers.

    Raises:
        UserError: where this machine is not what `hardware` says.
    """
    callbacks = [instantiate(node) for node in (cfg.get("callbacks") or {}).values()]
    loggers = [instantiate(node) for node in (cfg.get("logger") or {}).values()]
    try:
        return build(cfg.trainer)(callbacks=callbacks, logger=loggers)
    except MisconfigurationException as error:
        raise UserError(
            f"This machine cannot run with these settings: {error} "
            "hardware=auto takes what there is."
        ) from error


@contextmanager
def running(cfg: DictConfig) -> Iterator[tuple[pl.Trainer, pl.LightningDataModule]]:
    """The trainer and the data of a run; within, the trainer's other processes run it too."""
    trainer = build_trainer(cfg)
    data = instantiate(cfg.data)
    announce(cfg, trainer.loggers)
    with processes(trainer, run_as_other, OmegaConf.to_container(cfg, resolve=True)):
        yield trainer, data


def run_as_other(plain: dict[str, Any]) -> None:
    """Run the task of a composed config, in another process than the one that composed it."""
    for name in ("pytorch_lightning", "lightning_fabric"):  # as conf/config.yaml has it
        logging.getLogger(name).setLevel(logging.WARNING)
    run(OmegaConf.create(plain))


def find_genotype(cfg: DictConfig) -> Genotype:
    """The genotype that the config names.

    Raises:
        UserError: where it names none.
    """
    if cfg.get("genotype") is None:
        raise UserError(
            "No genotype: give a published one (genotype=darts_v2) or one that a search found "
            "(genotype=from_file genotype.path=FILE)."
        )
    return instantiate(cfg.genotype)


def find_checkpoint(cfg: DictConfig) -> str | None:
    """The path to go on from; `last` is this folder's, or else that of the experiment's last run.

    Raises:
        UserError: where there is none.
    """
    if cfg.ckpt_path is None:
        return None
    path = Path(cfg.ckpt_path)
    if cfg.ckpt_path == "last":
        output_dir = Path(cfg.output_dir)
        path = output_dir / "checkpoints" / "last.ckpt"
        # The folders beside a sweep's job are other jobs, not earlier runs of it.
        if not path.exists() and HydraConfig.get().mode == RunMode.RUN:
            earlier = output_dir.parent.glob("*/checkpoints/last.ckpt")
            path = max(earlier, key=lambda found: found.stat().st_mtime, default=path)
    if not path.is_file():
        raise UserError(f"No checkpoint at {str(path)!r}: give ckpt_path=FILE, or leave it out.")
    print(f"Going on from {relative(path)}")
    return str(path)


def read_checkpoint(path: str) -> tuple[dict[str, torch.Tensor], bool]:
    """A final network's tensors, and whether the file is one of the official code.

    Raises:
        UserError: where the file is missing or holds something else.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for files that are no checkpoints
        reason = "it is no checkpoint" if Path(path).is_file() else "there is no such file"
        raise UserError(f"Cannot read the checkpoint {path!r}: {reason}.") from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not tensors or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"The checkpoint {path!r} holds no network's weights.")
    prefix = "network."
    ours = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return (ours, False) if ours else (tensors, True)


def metric(trainer: pl.Trainer, name: str) -> float | None:
    """A logged metric's last value, if it was logged."""
    value = trainer.callback_metrics.get(name)
    return None if value is None else value.item()


def publish_search(cfg: DictConfig, trainer: pl.Trainer) -> str | None:
    """Publish a search's genotype and its checkpoint; returns the genotype's name if it has one."""
    folder = Path(cfg.output_dir)
    about = {"experiment": HydraConfig.get().runtime.choices["experiment"], "seed": cfg.seed}
    for name in ("search/val_loss", "search/val_accuracy"):
        about[name] = metric(trainer, name)
    publish(trainer.loggers, "checkpoint", [folder / "checkpoints" / "last.ckpt"], about)
    genotypes = [folder / name for name in (GENOTYPE_FILE, BEST_GENOTYPE_FILE)]
    return publish(trainer.loggers, "genotype", genotypes, about)


def report_genotype(cfg: DictConfig, trainer: pl.Trainer, artifact: str | None) -> None:
    """Print what a search found, where it lies, and the command to type next."""
    folder = relative(cfg.output_dir)
    rows = {
        **scores(trainer, "search"),
        "Genotype": f"{folder}/{GENOTYPE_FILE}",
        "Best": f"{folder}/{BEST_GENOTYPE_FILE}",
        "Cells": f"{folder}/cells.png",
    }
    if artifact is not None:
        rows["Artifact"] = artifact
    print_summary("The search", rows)
    if cfg.next_experiment is not None:
        print_command(next_command(cfg))


def report_test(cfg: DictConfig, trainer: pl.Trainer, before: Mapping[str, str]) -> float:
    """Print what a test came to, below what came before it; returns the accuracy."""
    accuracy = trainer.callback_metrics["test/accuracy"].item()
    error = 100 * (1 - accuracy)
    rows = {**before, "Test accuracy": f"{100 * accuracy:.2f} %   (error {error:.2f} %)"}
    checkpoint = Path(cfg.output_dir) / "checkpoints" / "last.ckpt"
    if checkpoint.exists():
        rows["Checkpoint"] = relative(checkpoint)
    print_summary("The network", rows)
    return accuracy


def scores(trainer: pl.Trainer, group: str) -> dict[str, str]:
    """Loss and accuracy of both halves after the last epoch, as far as they were logged."""
    found = {}
    for half, name in (("train", "Training"), ("val", "Validation")):
        loss, accuracy = (metric(trainer, f"{group}/{half}_{of}") for of in ("loss", "accuracy"))
        if loss is not None and accuracy is not None:
            found[name] = f"loss {loss:.3f}, accuracy {100 * accuracy:.2f} %"
    return found


def next_command(cfg: DictConfig) -> str:
    """The command that trains what a search found, on the same data and hardware."""
    of_data = ("root", "image_size", "in_channels", "mean", "std", "num_workers")
    kept = ("data=", "hardware=", *(f"data.{key}=" for key in of_data))
    return command(
        f"experiment={cfg.next_experiment}",
        *(override for override in given_overrides() if override.startswith(kept)),
        "genotype=from_file",
        f"genotype.path={quote(relative(Path(cfg.output_dir) / GENOTYPE_FILE))}",
    )


TASKS = {task.__name__: task for task in (search, train, evaluate, draw, quick_start)}


def run(cfg: DictConfig) -> float | None:
    """Run the config's task.

    Raises:
        UserError: for a mistake that a person can mend.
    """
    if cfg.task not in TASKS:
        raise unknown("task", cfg.task, TASKS)
    quiet = nullcontext() if is_first_process() else redirect_stdout(io.StringIO())
    with quiet, finished_runs():
        return TASKS[cfg.task](cfg)
