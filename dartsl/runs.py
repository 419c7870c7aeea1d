"""A run from its config to its trainer: checked, announced, built, in all of its processes."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from dartsl.config import build, check_missing, check_types, command, print_tree, resolved
from dartsl.distributed import ReplicaStrategy, is_first_process
from dartsl.environment import environment
from dartsl.errors import UserError
from dartsl.files import CONFIG_FILE, ENVIRONMENT_FILE, RESULT_FILE, whole_file
from dartsl.modules.resumable import check_accumulation
from dartsl.native.memory import keep_freed_memory
from dartsl.networks import FinalNetwork, Supernet
from dartsl.networks.graphs import replay_passes
from dartsl.networks.regions import compile_regions
from dartsl.processes import processes

log = logging.getLogger(__name__)


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
    if cfg.threads is not None and not 1 <= cfg.threads <= 1024:  # of too many a process dies
        raise UserError(f"threads={cfg.threads} must be from 1 to 1024, or null.")
    check_length(cfg)
    check_accumulation(cfg.trainer.get("accumulate_grad_batches"))
    if (cfg.get("module") or {}).get("schedule") is not None:
        build(cfg.module.schedule)(0)  # it refuses its settings before any data is read
    check_fit(cfg)
    output_dir = Path(cfg.output_dir)
    trains = cfg.task != "evaluate"  # whose checkpoint is another run's
    goes_on = trains and (cfg.ckpt_path is not None or cfg.resume is not None)
    if is_first_process() and not goes_on and holds_run(output_dir):
        raise UserError(
            f"{output_dir} holds a run already: {'go on with it by resume=auto, or ' * trains}"
            "choose another folder by hydra.run.dir=FOLDER."
        )
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    keep_freed_memory()
    pl.seed_everything(cfg.seed, verbose=False)


def check_length(cfg: DictConfig) -> None:
    """Raise a UserError where a run would train nothing, or would never end."""
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        if cfg.trainer[key] == 0:
            raise UserError(f"trainer.{key}=0 trains nothing; it must be more.")
    if cfg.trainer.max_epochs is not None and cfg.trainer.max_epochs < 0:
        raise UserError(f"trainer.max_epochs={cfg.trainer.max_epochs} must be at least 1.")


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


def announce(cfg: DictConfig, loggers: Iterable[Logger]) -> None:
    """Show, keep and log the config of a run that is about to start."""
    if not is_first_process():
        return
    plain = resolved(cfg)
    folder = Path(cfg.output_dir)
    (folder / RESULT_FILE).unlink(missing_ok=True)  # of a run that is not finished any more
    with whole_file(folder / CONFIG_FILE) as part:
        OmegaConf.save(plain, part)
    ran_on = {"command": command(*HydraConfig.get().overrides.task), **environment()}
    with whole_file(folder / ENVIRONMENT_FILE) as part:
        text = yaml.safe_dump(ran_on, sort_keys=False, allow_unicode=True)
        part.write_text(text, encoding="utf-8")
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
        trainer: pl.Trainer = build(cfg.trainer)(callbacks=callbacks, logger=loggers)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if environment is not None:  # what Lightning would check after all data is read
            environment.validate_settings(trainer.num_devices, trainer.num_nodes)
    except (MisconfigurationException, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"This machine cannot run with these settings: {error} "
            "hardware=auto takes what there is."
        ) from error
    if trainer.world_size > 1 and not isinstance(trainer.strategy, ReplicaStrategy):
        raise UserError(
            f"{trainer.world_size} processes need a strategy that averages what a search and a "
            "training average: choose hardware=multi_gpu, ddp_cpu or multi_node."
        )
    return trainer


def speed_up(
    cfg: DictConfig,
    trainer: pl.Trainer,
    network: Supernet | FinalNetwork,
    differentiated_twice: bool = False,
) -> None:
    """Have the network's operations compiled and its passes replayed, as the config asks for it.

    Neither is for what is differentiated twice.
    """
    hardware, device = cfg.hardware, trainer.strategy.root_device
    if hardware.compile is not None:
        if differentiated_twice:
            log.warning("What torch.compile makes is not differentiated twice: this is uncompiled.")
        else:
            compile_regions(network.regions(), hardware.compile, device)
    if hardware.cuda_graphs and device.type == "cuda":
        reasons = {
            "hardware.recompute=true": hardware.recompute,
            f"hardware.compile={hardware.compile}, which has its own": hardware.compile
            in ("reduce-overhead", "max-autotune"),
            "trainer.sync_batchnorm=true": cfg.trainer.sync_batchnorm,
            "a hypergradient that differentiates twice": differentiated_twice,
        }
        reason = next((reason for reason, applies in reasons.items() if applies), None)
        if reason is None:
            replay_passes(network, device)
        else:
            log.info("No CUDA graphs with %s.", reason)


@contextmanager
def running(
    cfg: DictConfig, run_as_other: Callable[[dict[str, Any]], None]
) -> Iterator[tuple[pl.Trainer, pl.LightningDataModule]]:
    """The trainer and the data of a run; within, the trainer's other processes run it too.

    Args:
        cfg: composed.
        run_as_other: runs the same config, resolved, in another process.
    """
    trainer = build_trainer(cfg)
    data = instantiate(cfg.data)
    announce(cfg, trainer.loggers)
    with processes(trainer, run_as_other, OmegaConf.to_container(cfg, resolve=True)):
        yield trainer, data
