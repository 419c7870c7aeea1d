"""`python run.py --help`: every choice has its line, and none is typed twice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dartsl.help import describe, help_text, launch

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
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


def test_a_shell_completes_what_there_is() -> None:
    environment = os.environ | {"COMP_LINE": "python run.py experiment=sea", "COMP_POINT": "99"}
    found = subprocess.run(
        [sys.executable, "run.py", "-sc", "query=bash"], cwd=ROOT, check=True, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    names = [path.stem for path in (CONF / "experiment").glob("sea*.yaml")]
    assert found.stdout.split() == sorted(f"experiment={name}" for name in names)


def test_help_and_misspelt_commands_wait_for_no_torch() -> None:
    """Which takes seconds to import: they would pass at every TAB of a shell's completion, too."""
    code = "import sys, run; sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
