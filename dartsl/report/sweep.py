"""The report of a sweep, written from within Hydra."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from dartsl.report.runs import runs_below
from dartsl.report.write import leave_report


class SweepReport(Callback):
    """Writes a sweep's `report.html` after every job, so that a killed or failed one has it too.

    At the end it is written once more, since jobs that run side by side do not see each other.
    """

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """Report what has ended so far."""
        if config.hydra.mode == RunMode.MULTIRUN:
            self.report(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Report all jobs."""
        self.report(config)

    def report(self, config: DictConfig) -> None:
        """Write the report, where any job has something to report."""
        folder = Path(config.hydra.sweep.dir)
        if any(run.history for run in runs_below(folder)):
            leave_report(folder)
