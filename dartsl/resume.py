"""`resume=auto` and `ckpt_path`: where a run goes on, and whether it may."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dartsl.checkpoints import LAST, PREVIOUS, find_fault, find_whole
from dartsl.config import (
    check_missing,
    differing_keys,
    find_validation_fault,
    relative,
    resolved,
)
from dartsl.errors import UserError
from dartsl.files import CONFIG_FILE, RESULT_FILE
from dartsl.sweep import load_result

Task = Callable[[DictConfig], float | None]


def resumable(task: Task) -> Task:
    """A task that under `resume=auto` goes on with its folder's run, or skips a finished one."""

    @functools.wraps(task)
    def start_or_go_on(cfg: DictConfig) -> float | None:
        if cfg.resume not in (None, "auto"):
            raise UserError(f"resume={cfg.resume} must be auto or null.")
        if cfg.resume == "auto":
            check_same_run(cfg)
            found = load_result(cfg.output_dir)
            if found is not None:
                numbers = ", ".join(f"{name} {value}" for name, value in found.items())
                print(f"Finished already: {relative(cfg.output_dir)} ({numbers})")
                return None if find_validation_fault(cfg) else found.get("val_accuracy")
        return task(cfg)

    return start_or_go_on


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
        go_on = "; or go on with it nevertheless by ckpt_path=last in place of resume=auto"
        if cfg.task == "evaluate":  # whose checkpoint is another run's
            go_on = ""
        raise UserError(
            f"{folder} holds a run of another config: {', '.join(keys[:5])} "
            f"{'differs' if len(keys) == 1 else 'differ'}. Choose another folder{go_on}."
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
