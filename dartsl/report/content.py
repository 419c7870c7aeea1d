"""What a report shows, as plain data that the page's script draws.

Shapes: E edges, P primitives.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import yaml

from dartsl.files import REPORT_FILE
from dartsl.genotype import Genotype, count_skips
from dartsl.layout import cell_layouts
from dartsl.report.runs import Run
from dartsl.sweep import setting_of
from dartsl.visualize import color_of, in_order

Content = dict[str, Any]
Setting = tuple[tuple[str, ...], Genotype | None]  # overrides, and the cell if it was given

TASKS = {"search": "Search", "train": "Training"}


def run_content(run: Run) -> Content:
    """The report of one run."""
    pictures = Pictures(genotypes_of(run))
    return {
        "title": title_of(run),
        "facts": facts_of(run),
        "charts": charts_of(run),
        "search": search_of(run, pictures),
        "genotype": None if run.genotype is None else pictures.index(run.genotype),
        "pictures": pictures.content(),
        "numbers": numbers_of(run),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        "environment": [[name, str(value)] for name, value in run.environment.items()],
    }


def sweep_content(folder: Path, runs: Sequence[Run]) -> Content:
    """The report of several runs."""
    pictures = Pictures(run.genotype for run in runs if run.genotype is not None)
    tasks = dict.fromkeys(run.task for run in runs)
    given_to_all = {part for run in runs for part in run.overrides if shared(part, runs)}
    tables = [
        table_of(folder, task, [run for run in runs if run.task == task], given_to_all)
        for task in tasks
    ]
    environment = next((run.environment for run in runs if run.environment), {})
    return {
        "title": f"{len(runs)} runs · {path_of(folder)}",
        "facts": [["Finished runs", complete_of(runs)]],
        "tables": tables,
        "cells": [
            {
                "run": " · ".join([name_of(folder, run), *own_overrides(run, given_to_all)]),
                "genotype": pictures.index(run.genotype),
            }
            for run in runs
            if run.genotype is not None
        ],
        "pictures": pictures.content(),
        "environment": [[n, str(v)] for n, v in environment.items() if n != "command"],
    }


class Pictures:
    """The different genotypes of a report, laid out on one grid.

    Args:
        genotypes: may repeat.
    """

    def __init__(self, genotypes: Iterable[Genotype]) -> None:
        self.genotypes = list(dict.fromkeys(genotypes))

    def index(self, genotype: Genotype) -> int:
        """Where a genotype stands in the content."""
        return self.genotypes.index(genotype)

    def content(self) -> Content:
        """Layouts, texts to copy, and the colours of the primitives."""
        names = in_order(name for genotype in self.genotypes for name in genotype.primitives)
        characters = max(map(len, names), default=0)
        cells = [
            {
                "layout": {
                    kind: rounded(asdict(layout))
                    for kind, layout in cell_layouts(genotype, characters).items()
                },
                "yaml": genotype.yaml(),
                "notation": genotype.notation(),
            }
            for genotype in self.genotypes
        ]
        return {"cells": cells, "colors": {name: color_of(name) for name in names}}


def genotypes_of(run: Run) -> list[Genotype]:
    """Of all epochs, and the one that the run ended with or began from."""
    return run.genotypes if run.genotype is None else [*run.genotypes, run.genotype]


def title_of(run: Run) -> str:
    """Kind and folder."""
    return f"{TASKS.get(run.task, run.task)} · {path_of(run.folder)}"


def path_of(folder: Path) -> str:
    """The last two parts of a path, which say the experiment and the time."""
    return "/".join(folder.resolve().parts[-2:])


def facts_of(run: Run) -> list[list[str]]:
    """What one wants to know first, as (name, value)."""
    facts = []
    test = run.test.get("accuracy")
    if test is not None:
        facts.append(["Test accuracy", percent(test)])
    accuracy = run.column(f"{run.task}/val_accuracy")
    half = run.halves[1]
    known = [(value, epoch) for epoch, value in enumerate(accuracy, 1) if value is not None]
    if known:
        value, epoch = max(known, key=lambda pair: (pair[0], -pair[1]))
        facts.append([f"Accuracy, {half}, last epoch", percent(known[-1][0])])
        if run.task == "search":  # of a training the best epoch would be chosen by the test set
            facts.append([f"Accuracy, {half}, best epoch", f"{percent(value)} (epoch {epoch})"])
    of = "" if run.max_epochs is None else f" of {run.max_epochs}"
    facts.append(["Epochs", f"{len(run.history)}{of}"])
    facts.append(["Time", duration(run.seconds)])
    for name, *keys in (("Data", "data"), ("Alpha's gradient", "module", "hypergradient")):
        target = target_of(run.config, *keys)
        if target:
            facts.append([name, target])
    facts.append(["Seed", str(run.config.get("seed", "unknown"))])
    return facts


def target_of(config: Content, *keys: str) -> str | None:
    """The name of the class that a part of the config stands for."""
    for key in keys:
        config = config.get(key) or {}
    return str(config.get("_target_", "")).rpartition(".")[2] or None


def charts_of(run: Run) -> list[Content]:
    """Curves over the epochs: those of the run's task that hold any value."""
    first, second = run.halves
    task = run.task
    metrics = {
        ("Accuracy", "%"): {first: f"{task}/train_accuracy", second: f"{task}/val_accuracy"},
        ("Loss", ""): {first: f"{task}/train_loss", second: f"{task}/val_loss"},
        ("Entropy of the edge weights", "nats"): alpha("entropy"),
        ("Skip connections in the genotype", ""): alpha("skip_connections"),
        ("Learning rate of the weights", ""): {"learning rate": f"{task}/learning_rate"},
        ("Drop path", ""): {"probability": f"{task}/drop_path_prob"},
    }
    charts = {
        title: {name: run.column(metric) for name, metric in curves.items()}
        for title, curves in metrics.items()
    }
    charts["Time of an epoch", "s"] = {"seconds": [line["seconds"] for line in run.history]}
    contents = []
    for (title, unit), curves in charts.items():
        known = {name: values for name, values in curves.items() if any_known(values)}
        series = [{"name": name, "values": rounded(values)} for name, values in known.items()]
        if series:
            contents.append({"title": title, "unit": unit, "series": series})
    return contents


def alpha(metric: str) -> dict[str, str]:
    """A metric of both cells' alphas: name in the chart -> name in the history."""
    return {"normal cell": f"alpha/normal_{metric}", "reduction cell": f"alpha/reduce_{metric}"}


def any_known(values: Iterable[Any]) -> bool:
    """Whether there is anything to show."""
    return any(value not in (None, "") for value in values)


def search_of(run: Run, pictures: Pictures) -> Content | None:
    """Genotype and edge weights [E, P] of every epoch of a search."""
    if not run.genotypes:
        return None
    strengths = [line["strengths"] for line in run.history]
    weights = [w for epoch in strengths for kind in epoch.values() for row in kind for w in row]
    palette = matplotlib.colormaps["cividis"]
    return {
        "primitives": list(run.space.primitives),
        "edges": [list(edge) for edge in run.space.edges],
        "palette": [[round(255 * part) for part in palette(i / 15)[:3]] for i in range(16)],
        "range": [min(weights), max(weights)],
        "genotypes": [pictures.index(genotype) for genotype in run.genotypes],
        "strengths": rounded(strengths),
    }


def numbers_of(run: Run) -> Content:
    """All metrics of all epochs, as a table."""
    names = sorted({name for line in run.history for name in line["metrics"]})
    return {
        "columns": ["epoch", *names, "seconds"],
        "rows": [
            [line["epoch"] + 1, *(line["metrics"].get(name) for name in names), line["seconds"]]
            for line in run.history
        ],
    }


def table_of(folder: Path, task: str, runs: Sequence[Run], given_to_all: set[str]) -> Content:
    """The runs of one task, a row each, with mean and deviation of their accuracies."""
    accuracies = [run.column(f"{task}/val_accuracy") for run in runs]
    half = runs[0].halves[1]
    columns: dict[str, list[float | str | None]] = {
        "run": [name_of(folder, run) for run in runs],
        "overrides": [" ".join(own_overrides(run, given_to_all)) for run in runs],
        "epochs": [len(run.history) or None for run in runs],
        f"{half}, last epoch (%)": [hundredfold(values[-1:]) for values in accuracies],
        f"{half}, best epoch (%)": [hundredfold(values) for values in accuracies],
        "test (%)": [hundredfold([run.test.get("accuracy")]) for run in runs],
        "skip connections, normal cell": [skips_of(run.genotype) for run in runs],
        "time (s)": [round(run.seconds, 1) or None for run in runs],
    }
    if task == "train":  # of a training the best epoch would be chosen by the test set
        del columns[f"{half}, best epoch (%)"]
    columns = {name: values for name, values in columns.items() if any_known(values)}
    return {
        "title": {"search": "Searches", "train": "Trainings"}.get(task, "Without a result"),
        "columns": list(columns),
        "rows": [list(row) for row in zip(*columns.values(), strict=True)],
        "reports": [report_of(folder, run) for run in runs],
        "means": means_of(folder, runs, columns, given_to_all),
        "complete": complete_of(runs),
    }


def means_of(
    folder: Path, runs: Sequence[Run], columns: Content, given_to_all: set[str]
) -> list[list[str]]:
    """Mean and deviation of each accuracy over finished runs that repeat each other.

    Where there are several settings, each mean is named after its own, and one run has none.
    """
    groups = repeats_of([run for run in runs if run.is_complete])
    means = []
    for (setting, cell), group in groups.items():
        if len(groups) > 1 and len(group) == 1:
            continue
        own = [override for override in setting if override not in given_to_all]
        if cell is not None:
            own.append(", ".join(name_of(folder, run) for run in group))
        for name, values in columns.items():
            of_group = [value for run, value in zip(runs, values, strict=True) if run in group]
            text = mean_and_deviation(of_group) if name.endswith("(%)") else ""
            if text:
                named = [*own, name] if len(groups) > 1 else [name]
                means.append([" · ".join(named).removesuffix(" (%)"), text])
    return means


def repeats_of(runs: Sequence[Run]) -> dict[Setting, list[Run]]:
    """Runs of one task by setting, and by cell where that is a part of the setting.

    It is so where trainings were given the same, the seed included: they are those of a selection.
    Where the seed differs, the cells are results, as of a sweep of quick starts.
    """
    times = Counter(tuple(run.overrides) for run in runs)
    groups: dict[Setting, list[Run]] = {}
    for run in runs:
        by_cell = run.task == "train" and times[tuple(run.overrides)] > 1
        key = setting_of(run.overrides), run.genotype if by_cell else None
        groups.setdefault(key, []).append(run)
    return groups


def shared(override: str, runs: Sequence[Run]) -> bool:
    """Whether all of several runs were given this."""
    return len(runs) > 1 and all(override in run.overrides for run in runs)


def own_overrides(run: Run, given_to_all: set[str]) -> list[str]:
    """What a run was given and some other was not."""
    return [override for override in run.overrides if override not in given_to_all]


def skips_of(genotype: Genotype | None) -> int | None:
    """The skip connections of the normal cell."""
    return None if genotype is None else count_skips(genotype.normal)


def hundredfold(values: Iterable[float | None]) -> float | None:
    """The largest share, in per cent."""
    known = [100 * value for value in values if value is not None]
    return max(known, default=None)


def mean_and_deviation(values: Sequence[Any]) -> str:
    """In per cent, as papers give it; of one value there is no deviation (of a sample, n - 1)."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    deviation = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.2f}{deviation} % (n = {len(known)})"


def complete_of(runs: Sequence[Run]) -> str:
    """How many of the runs have all that they were to have."""
    return f"{sum(run.is_complete for run in runs)} of {len(runs)}"


def name_of(folder: Path, run: Run) -> str:
    """A run's folder as seen from the sweep's."""
    return run.folder.relative_to(folder).as_posix()


def report_of(folder: Path, run: Run) -> str | None:
    """Where a run's own report is, as seen from the sweep's folder."""
    path = run.folder / REPORT_FILE
    return path.relative_to(folder).as_posix() if path.is_file() else None


def percent(share: float) -> str:
    """A share as per cent."""
    return f"{100 * share:.2f} %"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as far as they matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def rounded(value: Any, digits: int = 5) -> Any:
    """Plain data with shorter numbers: half the file."""
    if isinstance(value, dict):
        return {key: rounded(part, digits) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part, digits) for part in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
