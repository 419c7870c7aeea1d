"""A run as its folder tells of it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dartsl.files import CONFIG_FILE, ENVIRONMENT_FILE, RESULT_FILE
from dartsl.genotype import GENOTYPE_FILE, Genotype
from dartsl.history import HISTORY_FILE, TEST_FILE, read_history
from dartsl.search_space import SearchSpace
from dartsl.sweep import natural


@dataclass(frozen=True)
class Run:
    """A search or a training; every file may be missing, as those of a run that failed are.

    Attributes:
        folder: where it wrote.
    """

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config, without interpolations."""
        return _read_yaml(self.folder / CONFIG_FILE)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """What it ran on."""
        return _read_yaml(self.folder / ENVIRONMENT_FILE)

    @cached_property
    def test(self) -> dict[str, float | None]:
        """What the test measured."""
        return _read_yaml(self.folder / TEST_FILE)

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """A line an epoch."""
        return read_history(self.folder)

    @cached_property
    def genotype(self) -> Genotype | None:
        """What was found or trained."""
        path = self.folder / GENOTYPE_FILE
        return Genotype.load(path) if path.is_file() else None

    @cached_property
    def genotypes(self) -> list[Genotype]:
        """Those of the epochs of a search."""
        return [Genotype.parse(line["genotype"]) for line in self.history if "genotype" in line]

    @property
    def space(self) -> SearchSpace:
        """That of a search whose first epoch has ended."""
        num_nodes = len(self.genotypes[-1].normal) // 2
        return SearchSpace(tuple(self.history[-1]["primitives"]), num_nodes)

    @cached_property
    def overrides(self) -> list[str]:
        """What the command gave."""
        for folder in (self.folder, self.folder.parent):  # the quick start's parts have one above
            path = folder / ".hydra" / "overrides.yaml"
            if path.is_file():
                return list(yaml.safe_load(path.read_text(encoding="utf-8")) or ())
        return []

    @property
    def task(self) -> str:
        """What kind of run it is: "search" or "train"."""
        return str(self.config.get("task", "run"))

    @property
    def halves(self) -> tuple[str, str]:
        """What its weights were fitted to, and what else was looked at after every epoch."""
        if self.task == "search":
            return "weight half", "alpha half"
        fraction = (self.config.get("data") or {}).get("train_fraction")
        # Without images of its own the validation looks at the test set, as the official code does.
        return "training set", "test set" if fraction == 1 else "validation set"

    @property
    def max_epochs(self) -> int | None:
        """The epochs that it was to have; None where something else ends it."""
        epochs = (self.config.get("trainer") or {}).get("max_epochs")
        return epochs if isinstance(epochs, int) and epochs > 0 else None

    @property
    def is_complete(self) -> bool:
        """Whether it has ended, by what `resume=auto` goes by too."""
        return (self.folder / RESULT_FILE).is_file()

    @property
    def seconds(self) -> float:
        """What its epochs took together."""
        return float(sum(line["seconds"] for line in self.history))

    def column(self, metric: str) -> list[float | None]:
        """A metric's value in every epoch."""
        return [line["metrics"].get(metric) for line in self.history]


def runs_below(folder: Path) -> list[Run]:
    """The runs in the folders below this one, those of a sweep that failed included."""
    names = HISTORY_FILE, ENVIRONMENT_FILE
    runs = {path.parent for name in names for path in folder.rglob(name)} - {folder}
    for path in folder.glob("*/.hydra"):  # of a job that failed before it began too
        if not any(run.is_relative_to(path.parent) for run in runs):
            runs.add(path.parent)
    return [Run(path) for path in sorted(runs, key=natural)]


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
