"""What a person sees, at whatever width, and what a program reads."""

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from dartsl.callbacks import EpochLines, Progress
from dartsl.genotype import published
from dartsl.terminal import compact, is_terminal, print_command, print_epoch, print_summary
from tests.test_callbacks import search

METRICS = {"train_loss": 1.25, "train_accuracy": 0.5, "val_loss": 2.5, "val_accuracy": 0.25}
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(width: int) -> Console:
    return Console(file=Terminal(), width=width, force_terminal=True, color_system="truecolor")


def shown(console: Console) -> str:
    """All that was ever written, without colours and movements."""
    assert isinstance(console.file, io.StringIO)
    return ESCAPES.sub("", console.file.getvalue()).replace("\r", "\n")


@pytest.fixture(autouse=True)
def capable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_search_fits_the_window(width: int) -> None:
    console = terminal(width)
    search(EpochLines(console), Progress(console))
    print_summary("The search", {"Genotype": "outputs/" + "long/" * 20}, console)
    text = shown(console)
    assert max(map(cell_len, text.splitlines())) <= width
    words = text.split()
    for word in ("Epochs", "Validation", "1/2", "2/2", "3/3", "0:00:00"):
        assert word in words
    assert "train loss" in text
    assert re.search(r"\bN (skip|avg3|none):[01] ", text)
    assert "…" not in text  # nothing had to be cut


def test_the_bars_count_steps_and_epochs() -> None:
    console, counted = terminal(80), []

    class Watched(Progress):
        def on_train_batch_end(self, *args) -> None:
            super().on_train_batch_end(*args)
            self.note()

        def on_validation_batch_end(self, *args) -> None:
            super().on_validation_batch_end(*args)
            self.note()

        def note(self) -> None:
            assert self.bars is not None
            counted.append([(t.description, t.completed, t.total) for t in self.bars.tasks])

    search(Watched(console))  # two epochs of three steps, and three of validation
    steps = [steps for _, steps in counted]
    assert steps[:6] == [
        ("Epoch 1", 1, 3), ("Epoch 1", 2, 3), ("Epoch 1", 3, 3),
        ("Validation", 1, 3), ("Validation", 2, 3), ("Validation", 3, 3),
    ]  # fmt: skip
    assert steps[6] == ("Epoch 2", 1, 3)
    epochs = [epochs for epochs, _ in counted]
    assert [done for _, done, _ in epochs] == pytest.approx([step / 6 for step in range(1, 13)])
    assert {(name, total) for name, _, total in epochs} == {("Epochs", 2)}


def test_the_cells_stand_on_one_line_where_they_fit() -> None:
    genotype = published("darts_v2")
    for width, lines in ((120, 2), (80, 3)):
        console = terminal(width)
        print_epoch(console, 3, 50, METRICS, genotype)
        text = shown(console).splitlines()
        assert len(text) == lines
        assert text[0] == "epoch   3/50   train loss 1.250 acc 50.00 %   val loss 2.500 acc 25.00 %"
        joined = " ".join(" ".join(text[1:]).split())
        assert joined == f"N {compact(genotype.normal)} R {compact(genotype.reduce)}"


def test_a_cell_in_few_letters() -> None:
    edges = (("sep_conv_5x5", 1), ("skip_connect", 0), ("conv_7x1_1x7", 2), ("max_pool_3x3", 0))
    assert compact(edges) == "sep5:1 skip:0 conv7:2 max3:0"


def test_a_program_reads_one_plain_line_an_epoch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    search(EpochLines(), Progress())
    lines = [line for line in capsys.readouterr().out.splitlines() if "epoch" in line]
    number = r"[\d.]+"
    pattern = (
        rf"epoch   [12]/2   train: loss {number}, accuracy {number} %"
        rf"   val: loss {number}, accuracy {number} %   learning rate 0\.1"
    )
    assert len(lines) == 2
    assert all(re.fullmatch(pattern, line) for line in lines)


def test_a_run_of_so_many_steps_counts_its_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    search(EpochLines(), max_epochs=-1, max_steps=5)  # three are an epoch
    assert re.findall(r"epoch +(\d/.+?) ", capsys.readouterr().out) == ["1/2"]


def test_a_program_reads_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    path = "long/" * 50 + "genotype.yaml"
    print_summary("The search", {"Genotype": path})
    print_command("python run.py " + path)
    assert capsys.readouterr().out == f"\nGenotype: {path}\nNext: python run.py {path}\n"


def test_a_command_is_never_broken() -> None:
    console = terminal(40)
    print_command("python run.py " + "x" * 100, console)
    assert shown(console) == f"Next: python run.py {'x' * 100}\n"


def test_a_name_may_look_like_markup() -> None:
    console = terminal(80)
    print_summary("The search", {"Genotype": "runs/[red]/genotype.yaml"}, console)
    assert "runs/[red]/genotype.yaml" in shown(console)


def test_what_a_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_terminal(terminal(80))
    assert not is_terminal(Console(file=io.StringIO(), force_terminal=True))
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal(terminal(80))
