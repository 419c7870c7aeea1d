"""`python run.py --help`: every choice has its line, and none is typed twice."""

from pathlib import Path

import pytest

from dartsl.help import describe, help_text, launch

CONF = Path(__file__).parents[1] / "conf"
CHOICES = sorted(CONF.glob("*/**/*.yaml"))


@pytest.mark.parametrize("path", CHOICES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_choice_has_its_line(path: Path) -> None:
    line, text = describe(path), help_text(CONF)
    assert len(line.split()) >= 2
    if path.parent.name == "experiment":
        assert f"  {launch(path)}\n      {line}\n" in text
    else:
        name = path.parent.relative_to(CONF).as_posix()
        group = text.split(f"\n{name}=...\n")[1].split("\n\n")[0]
        (found,) = (row for row in group.splitlines() if row.split()[0] == path.stem)
        assert found.split(maxsplit=1)[1] == line


def test_the_line_is_the_first_that_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("# @package _global_\n# python run.py a=b\n# What it is.\n# More.\nx: 1\n")
    assert (describe(path), launch(path)) == ("What it is.", "python run.py a=b")
    path.write_text("x: 1  # one\n# What it is not.\n")
    assert (describe(path), launch(path)) == ("", "")
