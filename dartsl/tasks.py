"""What `run.py` can do: search, train, evaluate, draw, and the quick start.

A task takes the composed config and returns the number that a sweeper maximises.
"""

import functools
import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from dartsl.callbacks import GENOTYPE_FILE
from dartsl.checkpoints import LAST, PREVIOUS, find_fault, find_whole
from dartsl.config import (
    build,
    check_missing,
    check_types,
    command,
    compose_experiment,
    differing_keys,
    given_overrides,
    print_tree,
    quote,
    relative,
    resolved,
)
from dartsl.distributed import is_first_process
from dartsl.errors import UserError, unknown
from dartsl.files import whole_file
from dartsl.genotype import Genotype
from dartsl.interop import load_official_network
from dartsl.modules.resumable import check_same_tensors
from dartsl.processes import processes
from dartsl.visualize import draw_genotype, save_figure

log = logging.getLogger(__name__)

CONFIG_FILE, RESULT_FILE = "config.yaml", "result.yaml"
Task = Callable[[DictConfig], float | None]


def resumable(task: Task) -> Task:
    """A task that keeps its value in its folder; `resume=auto` goes on with it or skips it."""

    @functools.wraps(task)
    def start_or_go_on(cfg: DictConfig) -> float | None:
        if cfg.resume not in (None, "auto"):
            raise UserError(f"resume={cfg.resume} must be auto or null.")
        result = Path(cfg.output_dir) / RESULT_FILE
        if cfg.resume == "auto":
            check_same_run(cfg)
            if result.is_file():
                return report_finished(result)
        value = task(cfg)
        if is_first_process() and not cfg.trainer.fast_dev_run:
            with whole_file(result) as part:
                part.write_text(yaml.safe_dump({"value": value}))
        return value

    return start_or_go_on


@resumable
def search(cfg: DictConfig) -> float | None:
    """Search for a genotype; returns the accuracy on the alpha half after the last epoch."""
    prepare(cfg)
    supernet = build(cfg.supernet)()
    module = build(cfg.module)(supernet=supernet)
    cfg.ckpt_path = find_checkpoint(cfg)
    with running(cfg) as (trainer, data):
        trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
    if is_first_process():
        report_genotype(cfg)
    return metric(trainer, "search/val_accuracy")


@resumable
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
        trainer.test(module, datamodule=data, verbose=False)
    test = report_test(trainer)
    return test if validation is None else validation


@resumable
def evaluate(cfg: DictConfig) -> float | None:
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
    return report_test(trainer)


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
            "The quick start is two runs, which no one checkpoint goes on with: give resume=auto "
            "and hydra.run.dir=FOLDER instead of ckpt_path."
        )
    folder = Path(cfg.output_dir)
    steps = [f"output_dir={quote(folder / name)}" for name in ("search", "train")]
    genotype = f"genotype.path={quote(folder / 'search' / GENOTYPE_FILE)}"
    searched = compose_experiment(cfg.experiments[0], steps[0], "next_experiment=null")
    trained = compose_experiment(cfg.experiments[1], steps[1], "genotype=from_file", genotype)
    search(searched)
    accuracy = train(trained)
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
    output_dir = Path(cfg.output_dir)
    goes_on = cfg.ckpt_path is not None or cfg.resume is not None
    if is_first_process() and (output_dir / "checkpoints").exists() and not goes_on:
        raise UserError(
            f"{output_dir} holds a run already: go on with it by resume=auto, or choose another "
            "folder by hydra.run.dir=FOLDER."
        )
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    pl.seed_everything(cfg.seed, verbose=False)


def announce(cfg: DictConfig) -> None:
    """Show and keep the config of a run that is about to start."""
    if not is_first_process():
        return
    plain = resolved(cfg)
    output_dir = Path(cfg.output_dir)
    (output_dir / RESULT_FILE).unlink(missing_ok=True)  # of a run that is not finished any more
    with whole_file(output_dir / CONFIG_FILE) as part:
        OmegaConf.save(plain, part)
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


def check_same_run(cfg: DictConfig) -> None:
    """Check that the output folder's run, if it holds one, is the one that the config describes.

    Raises:
        UserError: where it would give other numbers.
    """
    check_missing(cfg)
    folder = Path(cfg.output_dir)
    kept = folder / CONFIG_FILE
    if not kept.is_file() or not ((folder / RESULT_FILE).exists() or checkpoint_time(folder)):
        return
    keys = differing_keys(cast(DictConfig, OmegaConf.load(kept)), resolved(cfg))
    if keys:
        raise UserError(
            f"{folder} holds a run of another config: {', '.join(keys[:5])} "
            f"{'differs' if len(keys) == 1 else 'differ'}. Choose another folder; or go on with "
            "it nevertheless by ckpt_path=last in place of resume=auto."
        )


def find_checkpoint(cfg: DictConfig) -> str | None:
    """The path to go on from, None at a run's start.

    With resume=auto it is this folder's newest; `ckpt_path=last` is that, or else the one of the
    experiment's last run.

    Raises:
        UserError: where there is none but ckpt_path asks for one, and where none is whole.
    """
    if cfg.resume is not None:
        if cfg.ckpt_path is not None:
            raise UserError("resume=auto goes on from the output folder: leave out ckpt_path.")
        path = find_whole(Path(cfg.output_dir) / "checkpoints")
        cfg.resume = None  # the run's other processes are told by ckpt_path
        if path is None:
            return None
    elif cfg.ckpt_path is None:
        return None
    elif cfg.ckpt_path == "last":
        folder = last_run(cfg) / "checkpoints"
        path = find_whole(folder) or folder / LAST
    else:
        path = Path(cfg.ckpt_path)
        fault = find_fault(path) if path.is_file() else None
        if fault is not None:
            raise UserError(f"Cannot go on from the checkpoint {str(path)!r}: {fault}.")
    if not path.is_file():
        raise UserError(f"No checkpoint at {str(path)!r}: give ckpt_path=FILE, or leave it out.")
    print(f"Going on from {relative(path)}")
    return str(path)


def last_run(cfg: DictConfig) -> Path:
    """The output folder, or that of the experiment's last run where it holds none."""
    folder = Path(cfg.output_dir)
    # The folders beside a sweep's job are other jobs, not earlier runs of it.
    if checkpoint_time(folder) or HydraConfig.get().mode != RunMode.RUN:
        return folder
    earlier = [path for path in folder.parent.glob("*") if checkpoint_time(path)]
    return max(earlier, key=checkpoint_time, default=folder)


def checkpoint_time(folder: Path) -> float:
    """When the last checkpoint of an output folder was written; 0 where there is none."""
    paths = (folder / "checkpoints" / name for name in (LAST, PREVIOUS))
    return max((path.stat().st_mtime for path in paths if path.is_file()), default=0.0)


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


def report_finished(path: Path) -> float | None:
    """Say that a run is finished; returns the value that it ended with.

    Raises:
        UserError: for a file that holds none.
    """
    try:
        value = yaml.safe_load(path.read_text())["value"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no run's result: delete it to end the run again.") from error
    print(f"Finished already: {relative(path.parent)}" + ("" if value is None else f" ({value})"))
    return value


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
    try:
        with nullcontext() if is_first_process() else redirect_stdout(io.StringIO()):
            return TASKS[cfg.task](cfg)
    finally:
        if "wandb" in sys.modules:  # or the next job of a sweep would log into this one's run
            sys.modules["wandb"].finish()
