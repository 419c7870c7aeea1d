"""What `run.py` can do: search, train, evaluate, select, draw, report, and the quick start.

A task takes the composed config and returns the number that a sweeper maximises: an accuracy on
images that no weight was trained on and that are not the test set, or else None.
"""

import io
import logging
import warnings
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dartsl import selection
from dartsl.callbacks import BEST_GENOTYPE_FILE
from dartsl.checkpoints import LAST
from dartsl.config import (
    build,
    check_missing,
    check_types,
    command,
    compose_experiment,
    find_validation_fault,
    kept_overrides,
    quote,
    relative,
)
from dartsl.distributed import is_first_process
from dartsl.errors import UserError, unknown
from dartsl.files import REPORT_FILE
from dartsl.genotype import GENOTYPE_FILE, Genotype, published
from dartsl.interop import load_official_network
from dartsl.loggers import finished_runs, publish
from dartsl.modules.resumable import check_same_operations, check_same_tensors
from dartsl.report import leave_report, write_report
from dartsl.resume import find_checkpoint, resumable
from dartsl.runs import prepare, running, speed_up
from dartsl.sweep import load_result, save_result
from dartsl.terminal import print_command, print_summary
from dartsl.visualize import draw_genotypes, save_figure

FOUND_FILES = {"Genotype": GENOTYPE_FILE, "Best": BEST_GENOTYPE_FILE, "Cells": "cells.png"}


@resumable
def search(cfg: DictConfig) -> float | None:
    """Search for a genotype; returns the accuracy on the alpha half after the last epoch."""
    check_finds_genotype(cfg)
    prepare(cfg)
    supernet = build(cfg.supernet)()
    module = build(cfg.module)(supernet=supernet)
    cfg.ckpt_path = find_checkpoint(cfg)
    with running(cfg, run_as_other) as (trainer, data):
        twice = getattr(module.hypergradient, "differentiates_twice", False)
        speed_up(cfg, trainer, module.supernet, twice)
        trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
        leave_report(cfg.output_dir)
        if is_first_process():
            report_genotype(cfg, trainer, publish_search(cfg, trainer))
        accuracy = metric(trainer, "search/val_accuracy")
    keep_result(cfg, val_accuracy=accuracy)
    return accuracy


@resumable
def train(cfg: DictConfig) -> float | None:
    """Train a genotype's network, then test it; returns the validation accuracy.

    With test=false the test set is left alone.
    """
    prepare(cfg)
    genotype = find_genotype(cfg)
    network = build(cfg.network)(genotype=genotype)
    module = build(cfg.module)(network=network)
    cfg.ckpt_path = find_checkpoint(cfg)
    with running(cfg, run_as_other) as (trainer, data):
        speed_up(cfg, trainer, module.network)
        if is_first_process():
            genotype.save(Path(cfg.output_dir) / GENOTYPE_FILE)
        trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
        validation = metric(trainer, "train/val_accuracy")
        rows, test = scores(trainer, "train"), None
        if cfg.test:
            trainer.test(module, datamodule=data, verbose=False)
            test = metric(trainer, "test/accuracy")
    leave_report(cfg.output_dir)
    report_network(cfg, rows, test)
    keep_result(cfg, val_accuracy=validation, test_accuracy=test)
    return None if find_validation_fault(cfg) else validation


@resumable
def evaluate(cfg: DictConfig) -> None:
    """Test accuracy of a checkpoint: dartsl's own, or a `.pt` file of the official code."""
    prepare(cfg)
    if cfg.ckpt_path is None:
        raise UserError("Nothing to evaluate: give ckpt_path=FILE, the checkpoint of a training.")
    if cfg.ckpt_path == "last":
        raise UserError("ckpt_path=last goes on with a run; to evaluate one, give ckpt_path=FILE.")
    checkpoint, state_dict = read_checkpoint(cfg.ckpt_path)
    auxiliary = any(name.startswith("auxiliary_head.") for name in state_dict)
    network = build(cfg.network)(genotype=find_genotype(cfg), auxiliary=auxiliary)
    module = build(cfg.module)(network=network)
    if checkpoint is None:
        load_official_network(network, state_dict)
    else:
        check_same_tensors(network.state_dict(), state_dict, "this run's network")
        check_same_operations(module.operations(), checkpoint)
        network.load_state_dict(state_dict)
    with running(cfg, run_as_other) as (trainer, data):
        trainer.test(module, datamodule=data, verbose=False)
        accuracy = metric(trainer, "test/accuracy")
    report_network(cfg, {}, accuracy)
    keep_result(cfg, test_accuracy=accuracy)


def select(cfg: DictConfig) -> float | None:
    """Of the genotypes that searches found, the best after a short training of each."""
    check_finds_genotype(cfg)
    check_missing(cfg)
    check_types(cfg)
    return selection.select(cfg, run)


def draw(cfg: DictConfig) -> None:
    """A picture of the cells of one genotype, or of several side by side, as PNG and SVG."""
    check_missing(cfg)
    check_types(cfg)
    names = [cfg.genotypes] if isinstance(cfg.genotypes, str) else cfg.genotypes or []
    named = [(str(name), find_named_genotype(str(name))) for name in names]
    if cfg.get("genotype") is not None or not named:
        named.insert(0, (cfg.title or "", find_genotype(cfg)))
    for path in save_figure(draw_genotypes(named), Path(cfg.output_dir) / "cells"):
        print(relative(path))


def report(cfg: DictConfig) -> None:
    """The report of a run or a sweep, made again from its folder."""
    check_missing(cfg)
    check_types(cfg)
    for path in write_report(cfg.run_dir):
        print(relative(path))


def quick_start(cfg: DictConfig) -> None:
    """Search, then train what was found: two experiments, given the overrides of this run."""
    check_types(cfg)
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
    run(searched)
    run(trained)
    keep_result(cfg, **(load_result(trained.output_dir) or {}))
    leave_report(folder)
    if cfg.get("next_experiment") is not None:
        print_command(larger_search_command(cfg))


# ---- parts ---------------------------------------------------------------------------------------


def run_as_other(plain: dict[str, Any]) -> None:
    """Run the task of a composed config, in another process than the one that composed it."""
    for name in ("pytorch_lightning", "lightning_fabric"):  # as conf/config.yaml has it
        logging.getLogger(name).setLevel(logging.WARNING)
    run(OmegaConf.create(plain))


def check_finds_genotype(cfg: DictConfig) -> None:
    """Raise a UserError for a genotype given to a task that would pay no heed to it."""
    if cfg.get("genotype") is not None:
        raise UserError(
            f"task={cfg.task} takes no genotype, it is there to find one: leave out genotype=..., "
            "or train it by experiment=train_final."
        )


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


def find_named_genotype(name: str) -> Genotype:
    """The genotype in a file of this path, or else the published one of this name.

    Raises:
        UserError: where there is neither.
    """
    path = Path(name)
    return Genotype.load(path) if path.is_file() or path.name != name else published(name)


def read_checkpoint(path: str) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor]]:
    """A training's checkpoint, or None for a file of the official code, and a network's tensors.

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
    if all(name.startswith("module.") for name in tensors):  # saved by way of DataParallel
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    prefix = "network."
    ours = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return (content, ours) if ours else (None, tensors)


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor of numbers, as weights are."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_quantized or value.is_complex())
    )


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
    publish(trainer.loggers, "checkpoint", [folder / "checkpoints" / LAST], about)
    genotypes = [folder / name for name in (GENOTYPE_FILE, BEST_GENOTYPE_FILE)]
    return publish(trainer.loggers, "genotype", genotypes, about)


def report_genotype(cfg: DictConfig, trainer: pl.Trainer, artifact: str | None) -> None:
    """Print what a search found, where it lies, and the command to type next."""
    folder = relative(cfg.output_dir)
    rows = scores(trainer, "search")
    for title, name in FOUND_FILES.items():
        if (Path(cfg.output_dir) / name).exists():
            rows[title] = f"{folder}/{name}"
    if artifact is not None:
        rows["Artifact"] = artifact
    print_summary("The search", rows | report_row(cfg))
    # Without callbacks there is no genotype.
    if cfg.get("next_experiment") is not None and "Genotype" in rows:
        print_command(next_command(cfg))


def report_row(cfg: DictConfig) -> dict[str, str]:
    """Where the report is, if it could be written."""
    path = Path(cfg.output_dir) / REPORT_FILE
    return {"Report": relative(path)} if path.exists() else {}


def report_network(cfg: DictConfig, rows: Mapping[str, str], test: float | None) -> None:
    """Print what a network came to, and where it lies."""
    shown = dict(rows)
    if test is not None:
        shown["Test accuracy"] = f"{100 * test:.2f} %   (error {100 * (1 - test):.2f} %)"
    checkpoint = Path(cfg.output_dir) / "checkpoints" / LAST
    if checkpoint.exists():
        shown["Checkpoint"] = relative(checkpoint)
    print_summary("The network", shown | report_row(cfg))


def keep_result(cfg: DictConfig, **numbers: float | None) -> None:
    """Keep what a run found, where sweeps and `resume=auto` look for it."""
    if not cfg.trainer.fast_dev_run:
        save_result(cfg.output_dir, **numbers)


def scores(trainer: pl.Trainer, group: str) -> dict[str, str]:
    """Loss and accuracy of both halves after the last epoch, as far as they were logged."""
    found = {}
    for half, name in (("train", "Training"), ("val", "Validation")):
        loss, accuracy = (metric(trainer, f"{group}/{half}_{of}") for of in ("loss", "accuracy"))
        if loss is not None and accuracy is not None:
            found[name] = f"loss {loss:.3f}, accuracy {100 * accuracy:.2f} %"
    return found


def larger_search_command(cfg: DictConfig) -> str:
    """The command after a quick start: on its hardware and logger, and on the images given."""
    kept = kept_overrides()
    if not any(override.startswith("data=") for override in kept):
        # What was said of the digits holds for no other images.
        kept = [override for override in kept if not override.lstrip("+").startswith("data.")]
    return command(f"experiment={cfg.next_experiment}", *kept)


def next_command(cfg: DictConfig) -> str:
    """The command that trains what a search found, on the same data, hardware and logger."""
    return command(
        f"experiment={cfg.next_experiment}",
        *kept_overrides(),
        "genotype=from_file",
        f"genotype.path={quote(relative(Path(cfg.output_dir) / GENOTYPE_FILE))}",
    )


TASKS = {
    task.__name__: task for task in (search, train, evaluate, select, draw, report, quick_start)
}


def run(cfg: DictConfig) -> float | None:
    """Run the config's task.

    Raises:
        UserError: for a mistake that a person can mend.
    """
    if cfg.task not in TASKS:
        raise unknown("task", cfg.task, TASKS)
    quiet = nullcontext() if is_first_process() else redirect_stdout(io.StringIO())
    with quiet, finished_runs(), warnings.catch_warnings():
        # Of Lightning 2.6 under torch 2.14 and later: nothing that a user can act on.
        warnings.filterwarnings(
            "ignore",
            message=r"`isinstance\(treespec, LeafSpec\)` is deprecated",
            module=r"pytorch_lightning\.utilities\._pytree",
        )
        return TASKS[cfg.task](cfg)
