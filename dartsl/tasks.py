"""What `run.py` can do: search, train, evaluate, draw, and the quick start.

A task takes the composed config and returns the number that a sweeper maximises.
"""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from dartsl.callbacks import GENOTYPE_FILE
from dartsl.data import count_classes
from dartsl.errors import UserError, unknown
from dartsl.genotype import Genotype
from dartsl.interop import load_official_network
from dartsl.modules.resumable import check_same_tensors
from dartsl.visualize import draw_genotype, save_figure

log = logging.getLogger(__name__)

OmegaConf.register_new_resolver("count_classes", count_classes, replace=True)


def search(cfg: DictConfig) -> float:
    """Search for a genotype; returns the accuracy on the alpha half after the last epoch."""
    prepare(cfg)
    supernet = instantiate(cfg.supernet)
    module = instantiate(cfg.module, supernet=supernet)
    trainer = fit(cfg, module)
    print(f"\nGenotype: {Path(cfg.run_dir, GENOTYPE_FILE)}")
    print(f"Cells:    {Path(cfg.run_dir, 'cells.png')}")
    print(f"Next:     {next_command(cfg)}")
    return trainer.callback_metrics["search/val_accuracy"].item()


def train(cfg: DictConfig) -> float:
    """Train a genotype's network, then test it; returns the validation accuracy.

    Without a validation part (data.train_fraction=1) that is the test accuracy, as in the official
    code: nothing may be selected by it then.
    """
    prepare(cfg)
    network = instantiate(cfg.network, genotype=build_genotype(cfg))
    module = instantiate(cfg.module, network=network)
    trainer = fit(cfg, module)
    accuracy = trainer.callback_metrics["train/val_accuracy"].item()
    report_test(trainer.test(module, datamodule=trainer.datamodule, verbose=False))  # type: ignore[attr-defined]
    return accuracy


def evaluate(cfg: DictConfig) -> float:
    """Test accuracy of a checkpoint: dartsl's own, or a `.pt` file of the official code."""
    prepare(cfg)
    state_dict, official = read_checkpoint(cfg.ckpt_path)
    auxiliary = any(name.startswith("auxiliary_head.") for name in state_dict)
    network = instantiate(cfg.network, genotype=build_genotype(cfg), auxiliary=auxiliary)
    if official:
        load_official_network(network, state_dict)
    else:
        check_same_tensors(network.state_dict(), state_dict, "this genotype's")
        network.load_state_dict(state_dict)
    module = instantiate(cfg.module, network=network)
    trainer = build_trainer(cfg)
    return report_test(trainer.test(module, datamodule=instantiate(cfg.data), verbose=False))


def draw(cfg: DictConfig) -> None:
    """A picture of a genotype's cells, as PNG and SVG."""
    check_missing(cfg)
    stem = Path(cfg.run_dir) / "cells"
    for path in save_figure(draw_genotype(build_genotype(cfg), title=cfg.title), stem):
        print(path)


def quick_start(cfg: DictConfig) -> float:
    """Search, then train what was found: two experiments, given the overrides of this run."""
    searched, trained = (compose_experiment(name) for name in cfg.experiments)
    searched.run_dir = str(Path(cfg.run_dir) / "search")
    trained.run_dir = str(Path(cfg.run_dir) / "train")
    trained.genotype.path = str(Path(searched.run_dir) / GENOTYPE_FILE)
    search(searched)
    return train(trained)


# ---- parts ---------------------------------------------------------------------------------------


def prepare(cfg: DictConfig) -> None:
    """Check the config, show and keep it, and seed everything."""
    check_missing(cfg)
    run_dir = Path(cfg.run_dir)
    if cfg.ckpt_path is None and (run_dir / "checkpoints").exists():
        raise UserError(
            f"{run_dir} holds a run already; go on with it by ckpt_path=last, or choose another "
            "folder by hydra.run.dir=FOLDER."
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    resolved = OmegaConf.to_container(cfg, resolve=True)
    OmegaConf.save(OmegaConf.create(resolved), run_dir / "config.yaml")
    if cfg.print_config:
        print_tree(cfg)
    pl.seed_everything(cfg.seed, verbose=False)


def fit(cfg: DictConfig, module: pl.LightningModule) -> pl.Trainer:
    """Fit a module to the config's data, from the config's checkpoint if there is one."""
    trainer = build_trainer(cfg)
    trainer.fit(
        module,
        datamodule=instantiate(cfg.data),
        ckpt_path=find_checkpoint(cfg),
        weights_only=True,
    )
    if trainer.interrupted:
        raise UserError(f"Interrupted; go on by ckpt_path=last hydra.run.dir={cfg.run_dir}.")
    return trainer


def build_trainer(cfg: DictConfig) -> pl.Trainer:
    """The Lightning Trainer with the config's callbacks and loggers."""
    callbacks = [instantiate(node) for node in (cfg.callbacks or {}).values() if node]
    loggers = [instantiate(node) for node in (cfg.logger or {}).values() if node]
    return instantiate(cfg.trainer, callbacks=callbacks, logger=loggers or False)


def build_genotype(cfg: DictConfig) -> Genotype:
    """The genotype that the config names.

    Raises:
        UserError: where it names none.
    """
    if cfg.genotype is None:
        raise UserError(
            "No genotype: give a published one (genotype=darts_v2) or one that a search found "
            "(genotype=from_file genotype.path=.../genotype.yaml)."
        )
    return instantiate(cfg.genotype)


def check_missing(cfg: DictConfig) -> None:
    """Raise a UserError for the values that the command has to give and did not."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"Missing on the command line: {' '.join(f'{key}=...' for key in missing)}")


def find_checkpoint(cfg: DictConfig) -> str | None:
    """The path to go on from: `last` is this folder's, or else that of this experiment's last run.

    Raises:
        UserError: where there is none.
    """
    if cfg.ckpt_path is None:
        return None
    run_dir = Path(cfg.run_dir)
    path = Path(cfg.ckpt_path)
    if cfg.ckpt_path == "last":
        path = run_dir / "checkpoints" / "last.ckpt"
        # The folders beside a sweep's job are other jobs, not earlier runs of it.
        if not path.exists() and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.RUN:
            earlier = run_dir.parent.glob("*/checkpoints/last.ckpt")
            path = max(earlier, key=lambda found: found.stat().st_mtime, default=path)
    if not path.is_file():
        raise UserError(f"No checkpoint at {str(path)!r}: give ckpt_path=FILE, or leave it out.")
    log.info("Going on from %s", path)
    return str(path)


def read_checkpoint(path: str) -> tuple[dict[str, torch.Tensor], bool]:
    """A network's tensors, and whether the file is one of the official code.

    Raises:
        UserError: where the file is missing or holds something else.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for files that are no checkpoints
        reason = "there is no such file" if not Path(path).is_file() else "it is no checkpoint"
        raise UserError(f"Cannot read the checkpoint {path!r}: {reason}.") from error
    ours = isinstance(content, dict) and isinstance(content.get("state_dict"), dict)
    tensors = content["state_dict"] if ours else content
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise UserError(f"The checkpoint {path!r} holds no network's weights.")
    if ours and any(name.startswith("network.") for name in tensors):
        prefix = "network."
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, False
    return tensors, True


def report_test(results: Sequence[dict[str, float]]) -> float:
    """Print and return the test accuracy."""
    metrics = results[0]
    accuracy = metrics["test/accuracy"]
    print(f"\nTest accuracy: {100 * accuracy:.2f} %   (error {100 * (1 - accuracy):.2f} %)")
    return accuracy


def next_command(cfg: DictConfig) -> str:
    """The command that trains what a search found, on the same data and hardware."""
    kept = [o for o in given_overrides() if o.startswith(("data=", "data.root=", "data.image_size=", "hardware="))]
    path = Path(cfg.run_dir, GENOTYPE_FILE)
    overrides = [f"experiment={cfg.next_experiment}", *kept, "genotype=from_file", f"genotype.path={path}"]
    return shlex.join(["python", "run.py", *overrides])


def given_overrides() -> list[str]:
    """The overrides of the command line but the experiment's name."""
    if not HydraConfig.initialized():
        return []
    given = HydraConfig.get().overrides.task
    return [override for override in given if not override.startswith("experiment=")]


def compose_experiment(name: str) -> DictConfig:
    """The config of an experiment, under the overrides of this run, not printed.

    Raises:
        UserError: where it does not take one of them.
    """
    try:
        cfg = compose("config", [f"experiment={name}", *given_overrides()])
    except HydraException as error:
        raise UserError(f"The quick start hands its overrides to {name!r} too: {error}") from error
    with open_dict(cfg):
        cfg.print_config = False
    return cfg


def print_tree(cfg: DictConfig) -> None:
    """Show the composed config as a tree."""
    from rich import print as rich_print
    from rich.syntax import Syntax
    from rich.tree import Tree

    tree = Tree("config")
    for name in cfg:
        node = cfg[name]
        text = OmegaConf.to_yaml(node, resolve=True) if OmegaConf.is_config(node) else str(node)
        tree.add(str(name)).add(Syntax(text.rstrip(), "yaml", background_color="default"))
    rich_print(tree)


TASKS = {task.__name__: task for task in (search, train, evaluate, draw, quick_start)}


def run(cfg: DictConfig) -> float | None:
    """Run the config's task."""
    if cfg.task not in TASKS:
        raise unknown("task", cfg.task, TASKS)
    return TASKS[cfg.task](cfg)
