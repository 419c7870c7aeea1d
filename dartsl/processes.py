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
from multiprocessing.connection import Pipe, wait
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
    function). Rank 0 waits until every other has come here, too: one that ends before would be
    waited for where nothing interrupts. Afterwards all have ended, and the environment is what it
    was.

    Args:
        trainer: says how many processes there are.
        function: builds the same trainer and calls the same of its methods; importable by name.
        *args: picklable.

    Raises:
        UserError: where another process failed first; what it had to say stands on stderr.
    """
    if not _launches(trainer):
        this = multiprocessing.current_process()
        if isinstance(this, _Other):
            this.arrive()
        yield
        return
    with _restored_environment():
        store = _meeting_point()  # there until all have ended
        others = _Others(_start(trainer.num_devices, store.port, function, args))
        try:
            others.await_arrival()
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


class _Other(SpawnProcess):
    """Another rank: calls a function, says when it has come as far as `processes`.

    Args:
        function: what it does.
        args: of the function.
        start_method: of the processes that it starts, such as workers that read images; None for
            Python's default.
    """

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], start_method: str | None
    ) -> None:
        super().__init__()
        self.function = function
        self.args = args
        self.start_method = start_method
        self.arrival, self.own_end = Pipe(duplex=False)

    def start(self) -> None:
        """Start the process; the pipe ends with it."""
        super().start()
        self.own_end.close()

    def run(self) -> None:
        """What it does, there; it does not outlive rank 0."""
        threading.Thread(target=_exit_with_rank_zero, daemon=True).start()
        # A spawned worker imports for seconds, and does not see that its parent ends meanwhile.
        if self.start_method in (None, *multiprocessing.get_all_start_methods()):
            multiprocessing.set_start_method(self.start_method, force=True)
        try:
            self.function(*self.args)
        except UserError as error:
            sys.exit(f"Error: {error}")

    def arrive(self) -> None:
        """Say, there, that it has come as far as `processes`."""
        self.own_end.send_bytes(b"here")
        self.own_end.close()


class _Others(threading.Thread):
    """Waits for the other processes, alone: two threads that wait for one take its status away."""

    def __init__(self, processes: Sequence[_Other]) -> None:
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

    def await_arrival(self) -> None:
        """Wait until all have arrived.

        Raises:
            EOFError: where one has ended instead.
        """
        for other in self.processes:
            other.arrival.recv_bytes()

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


def _meeting_point() -> dist.TCPStore:
    """The store through which the ranks find each other, which listens already, here alone.

    Rank 0 joins the server that its own process has on a port. Between choosing a free port and
    listening on it, which Lightning does much later, another run could take it.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    return dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True,
        master_listen_fd=listening.detach(),
    )  # fmt: skip


def _start(
    number: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> list[_Other]:
    """Ranks 1 to `number` - 1; each finds its rank in the environment, where Lightning looks."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    others = []
    with _default_start_method("spawn") as own_method:
        for rank in range(1, number):
            os.environ["LOCAL_RANK"] = str(rank)
            others.append(_Other(function, args, own_method))
            others[-1].start()
    os.environ["LOCAL_RANK"] = "0"
    return others


@contextmanager
def _default_start_method(name: str) -> Iterator[str | None]:
    """Within: so; gives what it was. A new process takes over the default, which joblib changes."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(name, force=True)
    try:
        yield before
    finally:
        multiprocessing.set_start_method(before, force=True)


def _exit_with_rank_zero() -> None:
    rank_zero = multiprocessing.parent_process()
    assert rank_zero is not None
    rank_zero.join()
    os._exit(1)
