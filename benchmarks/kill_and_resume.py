"""Kills runs at random moments, resumes them, and compares their ends with runs never stopped.

    python benchmarks/kill_and_resume.py --kills 200 --json kills.json

A short search and a short final training on scikit-learn's digits, each in one process and in two
(`hardware=ddp_cpu`), through the command line's own entry. A run is started in its folder with
`resume=auto`, killed by SIGKILL, and started again, until it ends by itself. Half of the moments
are uniform in time; the others come a few milliseconds after a phase (below) has begun. With two
processes the first, the second or both are killed. At the end everything that a run leaves must be
the same bit for bit: weights, alphas, optimizers, metrics, genotypes, pictures, the result.

Runs are forked from this process, which has imported everything: of seconds a run most would be
imports. Nothing in dartsl knows of this; the phases are noted by wrapping its methods here.
"""

import argparse
import json
import mmap
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import yaml  # noqa: E402
from pytorch_lightning.utilities import rank_zero_only  # noqa: E402

import run  # noqa: E402
from dartsl import processes  # noqa: E402
from dartsl.callbacks import GenotypeWriter  # noqa: E402
from dartsl.checkpoints import AtomicCheckpoint, WholeCheckpoints  # noqa: E402
from dartsl.modules import SearchModule, TrainModule  # noqa: E402

SHORT = (
    "data=digits", "data.max_images=60", "data.batch_size=8", "trainer.max_epochs=2",
    "callbacks.checkpoint.every_n_steps=2", "print_config=false", "resume=auto", "hydra.run.dir=.",
)  # fmt: skip
SEARCH = (
    "experiment=search_digits", "method=darts_unrolled", "supernet.channels=2",
    "search_space.num_intermediate_nodes=2",
    "search_space.primitives=[none,skip_connect,max_pool_3x3,sep_conv_3x3]", *SHORT,
)  # fmt: skip
TRAIN = (
    "experiment=train_digits", "genotype=darts_v2", "network.channels=4", "network.auxiliary=true",
    "module.drop_path_prob=0.3", "data.train_fraction=0.8", "trainer.limit_val_batches=1.0",
    *SHORT,
)  # fmt: skip
CASES = {
    "search": SEARCH,
    "training": TRAIN,
    "search in two processes": (*SEARCH, "hardware=ddp_cpu", "data.batch_size=4"),
    "training in two processes": (*TRAIN, "hardware=ddp_cpu", "data.batch_size=4"),
}
# In the order of what they interrupt; "elsewhere" is the start, and what is between them.
PHASES = {
    "alpha step": (SearchModule, "alpha_step"),
    "weight step": (SearchModule, "weight_step"),
    "training step": (TrainModule, "training_step"),
    "validation": (SearchModule, "validation_step"),
    "validation or test": (TrainModule, "validation_step"),
    "checkpoint: writing": (WholeCheckpoints, "save_checkpoint"),
    "checkpoint: all of it": (AtomicCheckpoint, "save"),
    "genotype": (GenotypeWriter, "on_train_epoch_end"),
    "pictures": (GenotypeWriter, "on_train_end"),
}
ELSEWHERE = "elsewhere"
NAMES = [ELSEWHERE, *PHASES]


class Harness:
    """Starts and kills runs; knows in which phase each is."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.phase = mmap.mmap(-1, 1)  # shared with the runs
        self.phases: list[int] = []  # that a case has
        self.kills: Counter[str] = Counter()
        for number, (owner, method) in enumerate(PHASES.values(), 1):
            setattr(owner, method, self.noted(getattr(owner, method), number))
        processes._Other = _Forked  # type: ignore[misc]

    def noted(self, method: Callable[..., Any], number: int) -> Callable[..., Any]:
        """The method, noting when it begins and ends in the first process."""

        def call(*args: Any, **options: Any) -> Any:
            if rank_zero_only.rank > 0:  # type: ignore[attr-defined]
                return method(*args, **options)
            before, self.phase[0] = self.phase[0], number
            try:
                return method(*args, **options)
            finally:
                self.phase[0] = before

        return call

    def start(self, arguments: tuple[str, ...], folder: Path) -> int:
        """A run in a process, and process group, of its own."""
        folder.mkdir(exist_ok=True)
        self.phase[0] = 0
        pid = os.fork()
        if pid:
            return pid
        os.setpgid(0, 0)
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        sys.argv = [str(ROOT / "run.py"), *arguments]
        status = 1
        try:
            run.cli()
            status = 0
        except SystemExit as end:
            print(end, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def run_whole(self, arguments: tuple[str, ...], folder: Path) -> float:
        """A run that is not killed; returns its seconds."""
        began = time.monotonic()
        self.finish(self.start(arguments, folder), folder)
        return time.monotonic() - began

    def finish(self, pid: int, folder: Path) -> None:
        """Wait for a run's own end."""
        _, status = os.waitpid(pid, 0)
        if status != 0:
            tail = "\n".join((folder / "log.txt").read_text().splitlines()[-30:])
            raise SystemExit(f"A run ended with status {status}:\n{tail}")

    def run_killed(
        self, arguments: tuple[str, ...], folder: Path, seconds: float, most: int
    ) -> int:
        """A run killed up to `most` times and resumed until it ends; returns the kills."""
        for number in range(most):
            pid = self.start(arguments, folder)
            if not self.wait_for_a_moment(pid, seconds):
                self.finish(pid, folder)
                return number
            self.kill(pid, two="hardware=ddp_cpu" in arguments)
        self.run_whole(arguments, folder)
        return most

    def wait_for_a_moment(self, pid: int, seconds: float) -> bool:
        """Wait until a run is to be killed; False where it has ended before."""
        deadline = time.monotonic() + self.random.uniform(0, seconds)
        wanted = self.random.choice(self.phases) if self.random.random() < 0.5 else None
        while time.monotonic() < deadline if wanted is None else self.phase[0] != wanted:
            if has_ended(pid):
                return False
            time.sleep(0 if wanted else 0.001)
        time.sleep(self.random.uniform(0, 0.005) if wanted else 0)
        return not has_ended(pid)

    def kill(self, pid: int, two: bool) -> None:
        """Kill a run's process, or one of its two, or both; wait until both are gone."""
        self.kills[NAMES[self.phase[0]]] += 1
        others = children(pid) if two else []
        victims = self.random.choice([[pid], others, [pid, *others]]) or [pid]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        patience = time.monotonic() + 2.0  # the first may take a minute to end after the second
        while not has_ended(pid) and time.monotonic() < patience:
            time.sleep(0.01)
        for each in (pid, *others):
            end(each)
        os.waitpid(pid, 0)


class _Forked(processes._Other):
    """In the place of the other ranks of dartsl.processes: forked, as the first is."""

    _Popen = staticmethod(multiprocessing.get_context("fork").Process._Popen)  # type: ignore

    def run(self) -> None:
        rank_zero_only.rank = int(os.environ["LOCAL_RANK"])  # type: ignore[attr-defined]
        super().run()


def has_ended(pid: int) -> bool:
    """Whether a child of this process has ended; it can still be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def end(pid: int) -> None:
    """Kill a process and wait until it is gone, or a zombie."""
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX":
            time.sleep(0.002)


def differences(found: Path, expected: Path) -> list[str]:
    """What two finished runs' folders do not have in common, bit for bit."""
    names = {path.name for path in (*found.iterdir(), *expected.iterdir()) if path.is_file()}
    # Times of the clock and names of folders; the lines of the history are in the checkpoint too.
    names -= {
        "log.txt", "run.log", "config.yaml", "environment.yaml", "history.jsonl", "report.html",
    }  # fmt: skip
    differing = [
        name for name in sorted(names) if content(found / name) != content(expected / name)
    ]
    checkpoints = (folder / "checkpoints" / "last.ckpt" for folder in (found, expected))
    pair = [torch.load(path, map_location="cpu", weights_only=True) for path in checkpoints]
    for checkpoint in pair:
        del checkpoint["loops"]  # Lightning's, which also counts batches validated twice
    return differing + unequal(*pair)


def content(path: Path) -> bytes | None:
    """A file's bytes, None where there is none."""
    return path.read_bytes() if path.is_file() else None


def unequal(found: Any, expected: Any, path: str = "") -> list[str]:
    """The places where two nested containers of tensors differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if found.keys() != expected.keys():
            return [f"{path} has the keys {found.keys() ^ expected.keys()} in one run alone"]
        keys = expected.keys() - {"seconds"}  # a clock's
        return [d for key in keys for d in unequal(found[key], expected[key], f"{path}.{key}")]
    if isinstance(expected, list | tuple) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [d for index, pair in pairs for d in unequal(*pair, f"{path}[{index}]")]
    if isinstance(expected, torch.Tensor):
        return [] if torch.equal(found, expected) else [path]
    return [] if found == expected else [path]


def examine(harness: Harness, case: str, kills: int) -> dict[str, Any]:
    """Runs of one case, killed as often as asked for in all."""
    arguments, folder = CASES[case], harness.folder / case.replace(" ", "_")
    folder.mkdir()
    harness.kills = Counter()
    other = TrainModule if case.startswith("search") else SearchModule
    harness.phases = [n for n, (owner, _) in enumerate(PHASES.values(), 1) if owner is not other]
    if other is SearchModule:
        harness.phases = [n for n in harness.phases if NAMES[n] not in ("genotype", "pictures")]
    began = time.monotonic()
    seconds = harness.run_whole(arguments, folder / "whole")
    done, runs, differing = 0, 0, []
    while done < kills:
        killed = folder / str(runs)
        done += harness.run_killed(arguments, killed, seconds, min(kills - done, 20))
        differing += [f"run {runs}: {what}" for what in differences(killed, folder / "whole")]
        runs += 1
    report = {
        "case": case, "kills": done, "runs": runs, "differences": differing,
        "killed_in": dict(harness.kills), "seconds": round(time.monotonic() - began, 1),
        "result": yaml.safe_load((folder / "whole" / "result.yaml").read_text()),
    }  # fmt: skip
    print(json.dumps(report), flush=True)
    return report


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=200, help="in all cases together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the figures are written as well")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    shares = [len(range(n, options.kills, len(options.cases))) for n in range(len(options.cases))]
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder), options.seed)
        reports = [examine(harness, *each) for each in zip(options.cases, shares, strict=True)]
    if options.json is not None:
        options.json.write_text(json.dumps(reports, indent=1) + "\n")
    differing = sum(len(report["differences"]) for report in reports)
    print(f"{sum(r['kills'] for r in reports)} kills, {differing} differences")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
