"""How time and memory of a search step grow with what a user chooses.

    python benchmarks/growth.py --unrolled --plot growth.png --json growth.json

Every row changes one thing of the paper's supernet (or of what the options give). Memory is what a
forward pass keeps for its backward; with --recompute that of cells is computed again.
"""

import argparse
from pathlib import Path

import torch
from measuring import (
    Report,
    interleaved,
    parser,
    print_surroundings,
    saved_activations,
    start,
    surroundings,
    write,
)
from search_step import Ours, forward_of

AXES = {
    "channels": (8, 16, 24, 32),
    "cells": (5, 8, 11, 14),
    "batch_size": (16, 32, 64, 128),
    "classes": (10, 100, 1000),
    "image_size": (16, 32, 48, 64),
}


def sizes(args: argparse.Namespace) -> list[tuple[str, int]]:
    """What is measured: each axis' values, those that the options ask for."""
    return [(axis, value) for axis, values in AXES.items() if axis in args.axes for value in values]


def measure(args: argparse.Namespace, axis: str, value: int) -> Report:
    """Milliseconds of a step and MB kept, with one size changed."""
    changed = argparse.Namespace(**vars(args) | {axis: value})
    shape = changed.batch_size, 3, changed.image_size, changed.image_size
    x = torch.randn(shape, device=args.device)
    y = torch.arange(changed.batch_size, device=args.device) % changed.classes
    model = Ours(changed, (x, y), (x, y))
    times, _ = interleaved({"step": lambda: model.step(args.unrolled)}, args)
    return {
        "axis": axis,
        "value": value,
        "step (ms)": times["step"],
        "saved activations (MB)": saved_activations(forward_of(model), model.network) / 1e6,
        "parameters": sum(weight.numel() for weight in model.weights),
    }


def print_row(row: Report) -> None:
    """One line of the table."""
    print(
        f"{row['axis']:12}{row['value']:>8}{row['step (ms)']:14,.0f}"
        f"{row['saved activations (MB)']:18,.0f}{row['parameters']:14,}",
        flush=True,
    )


def plot(report: Report, path: Path) -> None:
    """Time and memory against each axis, relative to its first value."""
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(row["axis"] for row in report["rows"]))
    figure = Figure(figsize=(3 * len(axes), 3), layout="constrained")
    for axis, panel in zip(axes, figure.subplots(1, len(axes), squeeze=False)[0], strict=True):
        rows = [row for row in report["rows"] if row["axis"] == axis]
        values = [row["value"] for row in rows]
        largest = 0.0
        for key, marker in (("step (ms)", "o"), ("saved activations (MB)", "s")):
            relative = [row[key] / rows[0][key] for row in rows]
            panel.plot(values, relative, marker=marker, label=key)
            largest = max(largest, *relative)
        panel.set_xlabel(axis.replace("_", " "))
        panel.set_xscale("log" if values[-1] > 20 * values[0] else "linear")
        panel.set_xticks(values, map(str, values))
        panel.minorticks_off()
        panel.set_ylim(0, 1.1 * largest)
    figure.axes[0].set_ylabel("relative to the first value")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=150)


def parse_args() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__)
    for name, default in (
        ("batch-size", 64), ("channels", 16), ("cells", 8), ("classes", 10), ("image-size", 32),
    ):  # fmt: skip
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    options.add_argument("--unrolled", action="store_true", help="the unrolled step")
    options.add_argument("--recompute", action="store_true", help="cells in the backward pass")
    options.add_argument("--compile", nargs="?", const="default", help="in this mode")
    options.add_argument("--bf16", action="store_true", help="mixed precision")
    options.set_defaults(graphs=False)  # they would hide what is kept
    options.add_argument("--plot", type=Path, help="a picture of the table")
    return options.parse_args()


def main() -> None:
    """Measure, print, draw, and write the report."""
    args = parse_args()
    start(args)
    report: Report = {"surroundings": surroundings(args), "rows": []}
    print_surroundings(report)
    print(f"{'':12}{'':>8}{'step (ms)':>14}{'activations (MB)':>18}{'parameters':>14}")
    for axis, value in sizes(args):
        report["rows"].append(measure(args, axis, value))
        print_row(report["rows"][-1])
    if args.plot:
        plot(report, args.plot)
    write(report, args)


if __name__ == "__main__":
    main()
