"""What a run shows while it goes on and when it ends: bars, lines and tables.

Where output is no terminal, it is plain lines that a program can read: no bar, no colour, no line
that a narrow window has broken.
"""

import re
from collections.abc import Mapping

import rich
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from dartsl.genotype import Edge, Genotype

_INDENT = 2


def is_terminal(console: Console) -> bool:
    """Whether a person looks; rich alone would be told so by FORCE_COLOR."""
    return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal


def bars(console: Console) -> Progress:
    """Bars of whatever is counted, with the time left; they take the width that there is."""
    text = Column(no_wrap=True)
    return Progress(
        TextColumn("{task.description}", table_column=text),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        MofNCompleteColumn(table_column=text),
        TimeRemainingColumn(table_column=text),
        console=console,
        expand=True,
        transient=True,
        speed_estimate_period=600,  # seconds: an epoch's validation is faster than its training
    )


# ---- one line an epoch ---------------------------------------------------------------------------


def print_epoch(
    console: Console,
    epoch: int,
    num_epochs: int | None,
    metrics: Mapping[str, float],
    genotype: Genotype | None = None,
) -> None:
    """Print loss and accuracy of both halves; for a person also what the search would end with.

    Args:
        console: where to; its bars stay below.
        epoch: counts from 1.
        num_epochs: of the run; None where something else ends it.
        metrics: by their names without the group's.
        genotype: of the epoch.
    """
    if not is_terminal(console):
        print(plain_line(epoch, num_epochs, metrics), file=console.file, flush=True)
        return
    line = Text(_count(epoch, num_epochs), style="bold")
    for half in halves(metrics):
        loss, accuracy = metrics[f"{half}_loss"], metrics[f"{half}_accuracy"]
        line.append(f"   {half} loss {loss:.3f} acc {100 * accuracy:.2f} %", style="not bold")
    console.print(line)
    if genotype is not None:
        cells = [f"N {compact(genotype.normal)}", f"R {compact(genotype.reduce)}"]
        width = console.width - _INDENT
        text = "  ".join(cells)
        text = text if len(text) <= width else "\n".join(cells)
        console.print(Padding(Text(text, style="dim"), (0, 0, 0, _INDENT)))


def plain_line(epoch: int, num_epochs: int | None, metrics: Mapping[str, float]) -> str:
    """An epoch for a program: loss and accuracy of both halves, and the learning rate."""
    parts = [_count(epoch, num_epochs)]
    for half in halves(metrics):
        loss, accuracy = metrics[f"{half}_loss"], metrics[f"{half}_accuracy"]
        parts.append(f"{half}: loss {loss:.3f}, accuracy {100 * accuracy:.2f} %")
    if "learning_rate" in metrics:
        parts.append(f"learning rate {metrics['learning_rate']:.4g}")
    return "   ".join(parts)


def _count(epoch: int, num_epochs: int | None) -> str:
    return f"epoch {epoch:>3}" + ("" if num_epochs is None else f"/{num_epochs}")


def halves(metrics: Mapping[str, float]) -> list[str]:
    """The halves that were measured."""
    return [half for half in ("train", "val") if f"{half}_loss" in metrics]


def compact(edges: tuple[Edge, ...]) -> str:
    """A cell in few letters: `sep3:0` takes `sep_conv_3x3` from node 0; two stand for a node."""
    return " ".join(f"{_short(primitive)}:{source}" for primitive, source in edges)


def _short(primitive: str) -> str:
    """The name's first word and first digit."""
    digit = re.search(r"\d", primitive)
    return primitive.split("_")[0] + (digit[0] if digit else "")


# ---- the end -------------------------------------------------------------------------------------


def print_summary(title: str, rows: Mapping[str, str], console: Console | None = None) -> None:
    """What a run came to, and where it lies.

    Args:
        title: above the table.
        rows: what it is called -> what it is.
        console: where to; the standard output.
    """
    console = console or rich.get_console()
    print(file=console.file)
    if is_terminal(console):
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(Text(name), Text(value))
        console.print(table)
    else:
        for name, value in rows.items():
            print(f"{name}: {value}", file=console.file)


def print_command(command: str, console: Console | None = None) -> None:
    """The command to type next, unbroken by the window's width, so that it can be copied."""
    file = (console or rich.get_console()).file
    print(f"Next: {command}", file=file, flush=True)
