"""Starts the other processes of a run, each with the config that this one has.

Lightning's own launcher runs the command line again, all of it: in a job of a sweep that is the
whole sweep, in the quick start both of its parts. What is started here calls one function.
"""

import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

from dartsl.errors import UserError

RANK_VARIABLES = (
    "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
)  # fmt: skip
SECONDS_TO_FAIL = 5.0  # that a process takes from its failure to its end
SECONDS_TO_END = 60.0  # that the others may go on when one has ended


@contextmanager
def processes(trainer: pl.Trainer, function: Callable[..., Any], *args: Any) -> Iterator[None]:
    """Within: this process is rank 0 of `trainer`, and `function(*args)` runs as every other rank.

    Nothing is started for a single process, nor where another started them (torchrun, Slurm, this
    function). Afterwards all have ended, and the environment is what it was.

    Args:
        trainer: says how many processes there are.
        function: builds the same trainer and calls the same of its methods; importable by name.
        *args: picklable.

    Raises:
        UserError: where another process failed first; what it had to say stands on stderr.
    """
    if not _launches(trainer):
        yield
        return
    with _restored_environment():
        others = _Others(_start(trainer.num_devices, function, args))
        try:
            yield
            others.check(SECONDS_TO_END)
        except UserError:
            raise
        except Exception as error:
            others.check(SECONDS_TO_FAIL, error)
            raise
        finally:
            others.end()
            if dist.is_initialized():
                dist.destroy_process_group()


class _Others(threading.Thread):
    """Waits for the other processes, alone: two threads that wait for one take its status away."""

    def __init__(self, processes: Sequence[SpawnProcess]) -> None:
        super().__init__(daemon=True)
        self.processes = processes
        self.failure: str | None = None
        self.settled = threading.Event()  # one has failed, or all have ended
        self.ended = threading.Event()  # this process has, too
        self.start()

    def run(self) -> None:
        """Note who fails first, until all have ended."""
        running = list(self.processes)
        while running:
            sentinels = wait([other.sentinel for other in running])
            for other in [other for other in running if other.sentinel in sentinels]:
                running.remove(other)
                other.join()
                if other.exitcode != 0 and self.failure is None:
                    self.fail(self.processes.index(other) + 1, other.exitcode)
        self.settled.set()

    def fail(self, rank: int, status: int | None) -> None:
        """Note a failure; on GPUs rank 0 may wait for that process for ever."""
        self.failure = f"The process of rank {rank} stopped with status {status}"
        self.settled.set()
        if not self.ended.wait(SECONDS_TO_END):
            print(f"Error: {self.failure}.", file=sys.stderr, flush=True)
            os._exit(1)  # and the others with it

    def check(self, seconds: float, error: Exception | None = None) -> None:
        """Raise a UserError where another process failed, or does so within some seconds.

        Args:
            seconds: to wait at most; no longer than until one has failed or all have ended.
            error: what this process fails with; the other failure may be the reason.
        """
        self.settled.wait(seconds)
        if self.failure is not None:
            raise UserError(f"{self.failure}: what it had to say stands above.") from error

    def end(self) -> None:
        """End those that still run."""
        self.ended.set()
        for other in self.processes:
            other.kill()
        self.join()


def _launches(trainer: pl.Trainer) -> bool:
    """Whether Lightning would run the command line again."""
    strategy = trainer.strategy
    return (
        trainer.num_devices > 1
        and isinstance(strategy, ParallelStrategy)
        and isinstance(strategy.launcher, _SubprocessScriptLauncher)
        and isinstance(strategy.cluster_environment, LightningEnvironment)
        and not strategy.cluster_environment.creates_processes_externally
    )


@contextmanager
def _restored_environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    threads = torch.get_num_threads()  # Lightning lowers it to a process' share
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _start(number: int, function: Callable[..., Any], args: tuple[Any, ...]) -> list[SpawnProcess]:
    """Ranks 1 to `number` - 1; each finds its rank in the environment, where Lightning looks."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "NODE_RANK": "0"}
    others = []
    with _default_start_method("spawn"):
        for rank in range(1, number):
            os.environ["LOCAL_RANK"] = str(rank)
            other = multiprocessing.get_context("spawn").Process(target=_run, args=(function, args))
            other.start()
            others.append(other)
    os.environ["LOCAL_RANK"] = "0"
    return others


@contextmanager
def _default_start_method(name: str) -> Iterator[None]:
    """A new process sets this process' default as its own; joblib's workers have one of theirs."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(name, force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """What another process does; it does not outlive rank 0."""
    threading.Thread(target=_exit_with_rank_zero, daemon=True).start()
    try:
        function(*args)
    except UserError as error:
        sys.exit(f"Error: {error}")


def _exit_with_rank_zero() -> None:
    rank_zero = multiprocessing.parent_process()
    assert rank_zero is not None
    rank_zero.join()
    os._exit(1)
