"""The jobs of a sweep as one result: means over seeds, and which jobs failed and why.

Every job keeps what it found in `result.yaml` in its folder, or why it failed in `error.txt`. So a
sweep can be read again at any time, whatever launcher ran its jobs and wherever.
"""

import logging
import math
import statistics
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from dartsl.config import (
    command,
    find_mistake,
    find_validation_fault,
    kept_overrides,
    quote,
    relative,
)
from dartsl.distributed import is_first_process
from dartsl.errors import UserError
from dartsl.files import RESULT_FILE, whole_file
from dartsl.genotype import GENOTYPE_FILE
from dartsl.terminal import print_command

log = logging.getLogger(__name__)

ERROR_FILE = "error.txt"
SUMMARY_FILE = "summary.yaml"
_SWEEPS_ALL = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"  # the others optimise
_OVERRIDES_FILE = ".hydra/overrides.yaml"  # Hydra writes it before a job starts

Result = dict[str, float]  # e.g. {"val_accuracy": 0.97, "test_accuracy": 0.96}


def save_result(folder: str | Path, **values: float | None) -> None:
    """Keep what a run found, where a sweep looks for it; what is None is left out."""
    if not is_first_process():
        return
    found = {name: value for name, value in values.items() if value is not None}
    _write_yaml(Path(folder) / RESULT_FILE, found)


def load_result(folder: str | Path) -> Result | None:
    """What the run of this folder found; None where it has not ended.

    Raises:
        UserError: for a file that holds no numbers.
    """
    path = Path(folder) / RESULT_FILE
    if not path.is_file():
        return None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict) or not all(
        isinstance(value, int | float) for value in found.values()
    ):
        raise UserError(f"{path} holds no run's result: delete it to end the run again.")
    return found


def _write_yaml(path: Path, content: Any) -> None:
    with whole_file(path) as part:
        part.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


# ---- jobs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A job of a sweep.

    Attributes:
        folder: of the job.
        overrides: that it was given.
        result: what it found; None where it failed, has not ended, or finds no numbers.
        error: why it failed.
    """

    folder: Path
    overrides: tuple[str, ...]
    result: Result | None
    error: str | None

    @property
    def setting(self) -> tuple[str, ...]:
        """The overrides but the seed."""
        return setting_of(self.overrides)


def setting_of(overrides: Iterable[str]) -> tuple[str, ...]:
    """The overrides that make a difference but for the seed: runs that share them repeat."""
    return tuple(t for t in overrides if not t.lstrip("+").startswith(("seed=", "resume=")))


def read_jobs(sweep_dir: str | Path) -> list[Job]:
    """The jobs of a sweep in the order of their numbers, by what they left in their folders."""
    folders = [path.parents[1] for path in Path(sweep_dir).rglob(_OVERRIDES_FILE)]
    return [_read_job(folder) for folder in sorted(folders, key=natural)]


def _read_job(folder: Path) -> Job:
    overrides = yaml.safe_load((folder / _OVERRIDES_FILE).read_text(encoding="utf-8"))
    failure = folder / ERROR_FILE
    error = failure.read_text(encoding="utf-8").strip() if failure.is_file() else None
    # What a job that failed finds in its folder is of another.
    return Job(folder, tuple(overrides or ()), None if error else load_result(folder), error)


def natural(path: Path) -> list[tuple[bool, int, str]]:
    """A key by which folders sort: numbered ones first, 10 after 9."""
    return [(False, int(part), "") if part.isdecimal() else (True, 0, part) for part in path.parts]


# ---- summary -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """A number over the seeds of one setting: mean and standard deviation (of a sample, n - 1)."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """The standard deviation; None for a single value, which has none."""
        if len(self.values) < 2:
            return None
        return statistics.stdev(self.values) if math.isfinite(self.mean) else math.nan


def spreads(jobs: Iterable[Job]) -> dict[tuple[str, ...], dict[str, Spread]]:
    """Each setting's numbers over the jobs that differ in the seed alone."""
    found: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for job in jobs:
        for name, value in (job.result or {}).items():
            found.setdefault(job.setting, {}).setdefault(name, []).append(value)
    return {
        setting: {name: Spread(tuple(values)) for name, values in numbers.items()}
        for setting, numbers in found.items()
    }


def save_summary(sweep_dir: str | Path, jobs: Sequence[Job]) -> None:
    """Write the sweep's numbers as `summary.yaml`."""
    settings = [
        {
            "overrides": list(setting),
            **{
                name: {"mean": spread.mean, "std": spread.std, "values": list(spread.values)}
                for name, spread in numbers.items()
            },
        }
        for setting, numbers in spreads(jobs).items()
    ]
    failed = [
        {"job": job.folder.name, "overrides": list(job.overrides), "error": job.error}
        for job in jobs
        if job.error
    ]
    _write_yaml(Path(sweep_dir) / SUMMARY_FILE, {"settings": settings, "failed": failed})


def describe(jobs: Iterable[Job]) -> list[str]:
    """A line for each setting: what tells it from the others, and its numbers in %."""
    found = spreads(jobs)
    common = set.intersection(*map(set, found)) if len(found) > 1 else set().union(*found)
    lines = []
    for setting, numbers in found.items():
        name = " ".join(text for text in setting if text not in common)
        lines.append("   ".join([*([name] if name else []), *map(_describe, numbers.items())]))
    return lines


def _describe(item: tuple[str, Spread]) -> str:
    name, spread = item
    deviation = "" if spread.std is None else f" ± {100 * spread.std:.2f}"
    count = "" if len(spread.values) == 1 else f" (n = {len(spread.values)})"
    return f"{name.replace('_', ' ')} {100 * spread.mean:.2f}{deviation} %{count}"


# ---- in a sweep ----------------------------------------------------------------------------------


class SweepSummary(Callback):
    """Of a sweep's jobs: a failed one costs itself alone, and the end says what all have found.

    Hydra's sweepers stop at a batch of jobs in which one has failed, and show the first failure
    only. Here a job's failure is kept in its folder, shown at once and shown again at the end, and
    the sweep goes on; its exit status is 1.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse a sweep for the best validation accuracy of jobs that have none.

        And one whose jobs nobody would find again.
        """
        if config.hydra.output_subdir != ".hydra":
            raise SystemExit(
                f"Error: hydra.output_subdir={config.hydra.output_subdir}: a sweep finds its jobs "
                "by what Hydra writes there; leave it as it is."
            )
        if config.hydra.sweeper._target_ == _SWEEPS_ALL:
            return
        fault = find_validation_fault(config)
        if fault is not None:
            # Not an exception, which Hydra would turn into a warning.
            raise SystemExit(f"Error: {config.hydra.runtime.choices['hydra/sweeper']}: {fault}")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Keep why a job failed."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        failure = Path(config.hydra.runtime.output_dir) / ERROR_FILE
        error = job_return._return_value
        if job_return.status != JobStatus.FAILED:
            failure.unlink(missing_ok=True)  # of an attempt before
            return
        job_return.status, job_return.return_value = JobStatus.COMPLETED, None
        if is_first_process():
            mistake = find_mistake(error, ())
            sentence = str(mistake or "".join(traceback.format_exception_only(error)).strip())
            with whole_file(failure) as part:
                part.write_text(sentence + "\n", encoding="utf-8")
            log.error(
                "Job %s failed: %s", config.hydra.job.num, sentence,
                exc_info=None if mistake else error,
            )  # fmt: skip

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Show and write what the jobs found; end with status 1 where some failed."""
        jobs = read_jobs(config.hydra.sweep.dir)
        if not jobs:
            return
        failed = [job for job in jobs if job.error]
        if is_first_process():
            save_summary(config.hydra.sweep.dir, jobs)
            folder = relative(config.hydra.sweep.dir)
            print("\n".join(["", f"Sweep: {folder} ({len(jobs)} jobs)", *describe(jobs)]))
            found = any((job.folder / GENOTYPE_FILE).is_file() for job in jobs)
            if found and "next_selection" in config:  # a training keeps its genotype, too
                print_command(_selection_command(config))
        if failed:
            # Not an exception, which Hydra would turn into a warning.
            raise SystemExit(failure_message(failed, jobs))


def failure_message(failed: Sequence[Job], jobs: Sequence[Job]) -> str:
    """What a sweep of these jobs ends with where some failed; names what tells them apart."""
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    lines = [f"Error: {len(failed)} of {len(jobs)} jobs failed:"]
    for job in failed:
        given = " ".join(text for text in job.overrides if text not in common)
        lines.append(f"  {relative(job.folder)} ({given}): {job.error}")
    return "\n".join(lines)


def _selection_command(config: DictConfig) -> str:
    """The command that selects among what a sweep of searches found."""
    parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    fixed = [each.input_line or "" for each in parsed if not each.is_sweep_override()]
    return command(
        f"experiment={config.next_selection}",
        *kept_overrides(fixed),
        f"run_dir={quote(relative(config.hydra.sweep.dir))}",
    )
