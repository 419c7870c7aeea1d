"""What `run.py` can do: search, train, evaluate, select, draw, and the quick start.

A task takes the composed config and returns the number that a sweeper maximises.
"""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from dartsl import selection
from dartsl.callbacks import GENOTYPE_FILE
from dartsl.config import (
    build,
    check_missing,
    check_types,
    command,
    compose_experiment,
    kept_overrides,
    print_tree,
    quote,
    relative,
    resolved,
)
from dartsl.distributed import is_first_process
from dartsl.errors import UserError, unknown
from dartsl.genotype import Genotype
from dartsl.interop import load_official_network
from dartsl.modules.resumable import check_same_tensors
from dartsl.processes import processes
from dartsl.sweep import load_result, save_result
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
        accuracy = validation_accuracy(trainer, module, data, "search/val_accuracy")
    save_result(cfg.output_dir, val_accuracy=accuracy)
    if is_first_process():
        report_genotype(cfg)
    return accuracy


def train(cfg: DictConfig) -> float | None:
    """Train a genotype's network, then test it; returns the validation accuracy.

    With data.train_fraction=1 the validation set is the test set, as in the official code; without
    any validation it is the test accuracy that is returned. Nothing may be selected by either.
    With test=false the test set is left alone.
    """
    prepare(cfg)
    network = build(cfg.network)(genotype=find_genotype(cfg))
    module = build(cfg.module)(network=network)
    cfg.ckpt_path = find_checkpoint(cfg)
    with running(cfg) as (trainer, data):
        trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
        validation = validation_accuracy(trainer, module, data, "train/val_accuracy")
        test = None
        if cfg.test:
            trainer.test(module, datamodule=data, verbose=False)
            test = report_test(trainer)
    save_result(cfg.output_dir, val_accuracy=validation, test_accuracy=test)
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
    accuracy = report_test(trainer)
    save_result(cfg.output_dir, test_accuracy=accuracy)
    return accuracy


def select(cfg: DictConfig) -> float | None:
    """Of the genotypes that searches found, the best after a short training of each."""
    check_missing(cfg)
    check_types(cfg)
    return selection.select(cfg, run)


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
    save_result(folder, **(load_result(trained.output_dir) or {}))
    print(f"Next:     {command(f'experiment={cfg.next_experiment}')}")
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
    check_fit(cfg)
    output_dir = Path(cfg.output_dir)
    if is_first_process() and cfg.ckpt_path is None and holds_run(output_dir):
        raise UserError(
            f"{output_dir} holds a run already: go on with it by ckpt_path=last, or choose another "
            "folder by hydra.run.dir=FOLDER."
        )
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    pl.seed_everything(cfg.seed, verbose=False)


def check_fit(cfg: DictConfig) -> None:
    """Raise a UserError where the network does not take the data's images or classes."""
    network = cfg.get("supernet") or cfg.get("network") or {}
    data = cfg.get("data") or {}
    for key in ("in_channels", "num_classes"):
        if key in network and key in data and network[key] != data[key]:
            raise UserError(
                f"The network has {key}={network[key]}, but the data {key}={data[key]}: set "
                f"data.{key} alone, the network takes it from there."
            )


def holds_run(folder: Path) -> bool:
    """Whether a run has left checkpoints in a folder.

    Raises:
        UserError: where there can be no such folder.
    """
    try:
        return (folder / "checkpoints").exists()
    except OSError as error:
        raise UserError(f"Cannot write into {folder}: {error.strerror}.") from error


def announce(cfg: DictConfig) -> None:
    """Show and keep the config of a run that is about to start."""
    if not is_first_process():
        return
    plain = resolved(cfg)
    output_dir = Path(cfg.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(plain, output_dir / "config.yaml")
    except OSError as error:
        raise UserError(f"Cannot write into {output_dir}: {error.strerror}.") from error
    if cfg.print_config:
        print_tree(plain)


def build_trainer(cfg: DictConfig) -> pl.Trainer:
    """The Lightning Trainer with the config's callbacks and loggers.

    Raises:
        UserError: where this machine is not what `hardware` says.
    """
    callbacks = [instantiate(node) for node in (cfg.get("callbacks") or {}).values()]
    loggers = [instantiate(node) for node in (cfg.get("logger") or {}).values()]
    try:
        trainer: pl.Trainer = build(cfg.trainer)(callbacks=callbacks, logger=loggers)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if environment is not None:  # what Lightning would check after all data is read
            environment.validate_settings(trainer.num_devices, trainer.num_nodes)
        return trainer
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(
            f"This machine cannot run with these settings: {error} "
            "hardware=auto takes what there is."
        ) from error


@contextmanager
def running(cfg: DictConfig) -> Iterator[tuple[pl.Trainer, pl.LightningDataModule]]:
    """The trainer and the data of a run; within, the trainer's other processes run it too."""
    trainer = build_trainer(cfg)
    data = instantiate(cfg.data)
    announce(cfg)
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
    if (
        not isinstance(tensors, dict)
        or not tensors
        or not all(isinstance(k, str) and is_plain(v) for k, v in tensors.items())
    ):
        raise UserError(f"The checkpoint {path!r} holds no network's weights.")
    prefix = "network."
    ours = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return (ours, False) if ours else (tensors, True)


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor of numbers, as weights are."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_quantized or value.is_complex())
    )


def validation_accuracy(
    trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, name: str
) -> float | None:
    """A fit's last validation accuracy, logged as `name`; None where nothing is validated.

    A fit that goes on from a checkpoint of its end has not logged one: then it is measured.
    """
    if name not in trainer.callback_metrics and trainer.limit_val_batches > 0:
        trainer.validate(module, datamodule=data, verbose=False)
    value = trainer.callback_metrics.get(name)
    return None if value is None else value.item()


def report_genotype(cfg: DictConfig) -> None:
    """Print where a search left its genotype, and the command to type next."""
    print(f"\nGenotype: {relative(cfg.output_dir)}/{GENOTYPE_FILE}")
    print(f"Cells:    {relative(cfg.output_dir)}/cells.png")
    if cfg.next_experiment is not None:
        print(f"Next:     {next_command(cfg)}")


def report_test(trainer: pl.Trainer) -> float:
    """Print and return the test accuracy."""
    accuracy = trainer.callback_metrics["test/accuracy"].item()
    print(f"\nTest accuracy: {100 * accuracy:.2f} %   (error {100 * (1 - accuracy):.2f} %)")
    return accuracy


def next_command(cfg: DictConfig) -> str:
    """The command that trains what a search found, on the same data and hardware."""
    return command(
        f"experiment={cfg.next_experiment}",
        *kept_overrides(),
        "genotype=from_file",
        f"genotype.path={quote(relative(Path(cfg.output_dir) / GENOTYPE_FILE))}",
    )


TASKS = {task.__name__: task for task in (search, train, evaluate, select, draw, quick_start)}


def run(cfg: DictConfig) -> float | None:
    """Run the config's task.

    Raises:
        UserError: for a mistake that a person can mend.
    """
    if cfg.task not in TASKS:
        raise unknown("task", cfg.task, TASKS)
    try:
        with nullcontext() if is_first_process() else redirect_stdout(io.StringIO()):
            return TASKS[cfg.task](cfg)
    finally:
        if "wandb" in sys.modules:  # or the next job of a sweep would log into this one's run
            sys.modules["wandb"].finish()
