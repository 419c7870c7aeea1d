"""A Weights & Biases workspace for searches and trainings, made by code.

    python -m dartsl.dashboard --entity E --project P
    python -m dartsl.dashboard --print

What stands in it is plain data (`specification`), which needs neither wandb-workspaces nor a
network; `build` says it in wandb-workspaces' words, and `main` saves that.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from dartsl.errors import UserError
from dartsl.search_space import CELL_KINDS

Panel = dict[str, Any]
Section = dict[str, Any]

_HALVES = ("train", "val")


def specification(name: str = "dartsl") -> dict[str, Any]:
    """The dashboard as plain data: its name, and sections of panels.

    A panel has a `kind`: `lines` (metrics over epochs; one `pattern` in the place of `metrics` for
    those of every edge; `grouped` as mean and standard deviation over a group's runs), `pictures`,
    `bars` and `scatter` (of summaries, `<metric>.<min, max or last>`), `parallel` (of summaries and
    config values, `config:<key>`), `differences` (of configs).
    """
    sections = [_search(), _collapse(), _cells(), _final_training(), _sweep_comparison()]
    return {"name": name, "sections": sections}


def _lines(title: str, *metrics: str, **more: Any) -> Panel:
    return {"kind": "lines", "title": title, "x": "epoch", "metrics": list(metrics)} | more


def _edges(title: str, group: str) -> Panel:
    return {"kind": "lines", "title": title, "x": "epoch", "pattern": f"alpha/{group}/.*"}


def _halves(title: str, group: str, of: str) -> Panel:
    return _lines(title, *(f"{group}/{half}_{of}" for half in _HALVES))


def _search() -> Section:
    """How the supernet learns."""
    step = "search/train_loss_step"
    return {
        "name": "Search",
        "panels": [
            _halves("Accuracy of both halves", "search", "accuracy"),
            _halves("Loss of both halves", "search", "loss"),
            _lines("Loss of the weights' batches", step) | {"x": "trainer/global_step"},
            _lines("Learning rate", "search/learning_rate"),
            _lines("Seconds an epoch", "system/epoch_seconds"),
            _lines(
                "Steps skipped, as their gradients were not finite",
                "search/skipped_weight_steps",
                "search/skipped_alpha_steps",
            ),
        ],
    }


def _collapse() -> Section:
    """Whether alpha decides itself, and whether skip connections take over."""
    names = {"normal": "normal", "reduce": "reduction"}
    of_edges = [
        _edges(f"{what} of the {name} cell's edges", f"{kind}_edge_{what.lower()}")
        for what in ("Strength", "Entropy")
        for kind, name in names.items()
    ]
    return {
        "name": "Collapse",
        "panels": [
            _lines("Skip connections", *(f"alpha/{kind}_skip_connections" for kind in CELL_KINDS)),
            _lines("Entropy of the cells", *(f"alpha/{kind}_entropy" for kind in CELL_KINDS)),
            _lines("Edges that changed since the last epoch", "alpha/genotype_distance"),
            *of_edges,
        ],
    }


def _cells() -> Section:
    """What the search would end with."""
    return {
        "name": "Cells",
        "panels": [
            {"kind": "pictures", "title": "The cells", "metrics": ["cells/genotype"]},
            {"kind": "pictures", "title": "Edge weights", "metrics": ["cells/edge_weights"]},
        ],
    }


def _final_training() -> Section:
    """How the found network learns."""
    return {
        "name": "Final training",
        "panels": [
            _halves("Accuracy", "train", "accuracy"),
            _halves("Loss", "train", "loss"),
            _lines("Learning rate", "train/learning_rate"),
            _lines("Drop path", "train/drop_path_prob"),
            _lines("Steps skipped, as their gradients were not finite", "train/skipped_steps"),
            {"kind": "bars", "title": "Test accuracy", "metrics": ["test/accuracy.last"]},
        ],
    }


def _sweep_comparison() -> Section:
    """The jobs of a sweep, which are one group, beside each other."""
    accuracy, skips = "search/val_accuracy", "alpha/normal_skip_connections"
    columns = ["config:seed", "config:optimizer.weights.lr", f"{skips}.last", f"{accuracy}.last"]
    return {
        "name": "Sweep comparison",
        "panels": [
            _lines("Accuracy on alpha's half: mean and deviation", accuracy, grouped=True),
            {
                "kind": "bars",
                "title": "Best accuracy on alpha's half",
                "metrics": [f"{accuracy}.max"],
            },
            {
                "kind": "scatter",
                "title": "Skip connections and accuracy",
                "metrics": [f"{skips}.last", f"{accuracy}.last"],
            },
            {"kind": "parallel", "title": "Seeds and results", "metrics": columns},
            {"kind": "differences", "title": "Configs"},
        ],
    }


# ---- in wandb-workspaces' words ------------------------------------------------------------------


def build(spec: dict[str, Any], entity: str, project: str) -> Any:
    """The `Workspace` of a specification, not saved yet.

    Raises:
        UserError: where wandb-workspaces is not installed.
    """
    try:
        workspaces = importlib.import_module("wandb_workspaces.workspaces")
        panels = importlib.import_module("wandb_workspaces.reports.v2")
    except ImportError as error:
        raise UserError(
            "The dashboard needs wandb-workspaces: pip install 'dartsl[dashboard]'. "
            "--print shows it without."
        ) from error
    sections = [
        workspaces.Section(
            name=section["name"],
            panels=[_panel(panels, panel) for panel in section["panels"]],
            is_open=True,
        )
        for section in spec["sections"]
    ]
    return workspaces.Workspace(
        entity=entity, project=project, name=spec["name"], sections=sections
    )


def _panel(panels: Any, panel: Panel) -> Any:
    """One panel; `panels` is the module that has them all."""
    title, metrics = panel["title"], panel.get("metrics", [])
    match panel["kind"]:
        case "lines":
            chosen: Panel = (
                {"metric_regex": panel["pattern"]} if "pattern" in panel else {"y": metrics}
            )
            if panel.get("grouped"):
                chosen |= {
                    "groupby": "Group", "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev",
                }  # fmt: skip
            return panels.LinePlot(title=title, x=panel["x"], **chosen)
        case "pictures":
            return panels.MediaBrowser(title=title, media_keys=metrics, num_columns=2)
        case "bars":
            return panels.BarPlot(title=title, metrics=[_value(panels, name) for name in metrics])
        case "scatter":
            x, y = (_value(panels, name) for name in metrics)
            return panels.ScatterPlot(title=title, x=x, y=y)
        case "parallel":
            columns = [
                panels.ParallelCoordinatesPlotColumn(_value(panels, name)) for name in metrics
            ]
            return panels.ParallelCoordinatesPlot(title=title, columns=columns)
        case _:
            return panels.RunComparer(diff_only="split")


def _value(panels: Any, name: str) -> Any:
    """A run's one number: of its config or of its summary."""
    key = name.removeprefix("config:")
    return panels.Config(key) if key != name else panels.SummaryMetric(name)


def save(workspace: Any) -> str:
    """Save a workspace; returns its address.

    Raises:
        UserError: where Weights & Biases refuses it or cannot be reached.
    """
    import wandb

    try:
        workspace.save()
    except (wandb.Error, ValueError, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"Cannot save the dashboard of {workspace.entity}/{workspace.project}: {reason}. "
            "The project must exist (a run with logger=wandb makes it); `wandb login` keeps a key."
        ) from error
    return str(workspace.url)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m dartsl.dashboard", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--entity", help="user or team that the project belongs to")
    parser.add_argument(
        "--project", default="dartsl", help="of conf/logger/wandb.yaml: %(default)s"
    )
    parser.add_argument("--name", default="dartsl", help="of the saved view: %(default)s")
    parser.add_argument(
        "--print", action="store_true", help="show what would be saved, and save nothing"
    )
    given = parser.parse_args(arguments)
    spec = specification(given.name)
    if given.print:
        print(yaml.safe_dump(spec, sort_keys=False), end="")
        return
    if given.entity is None:
        parser.error("give --entity, the user or team that the project belongs to (or --print)")
    try:
        print(save(build(spec, given.entity, given.project)))
    except UserError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
