"""The README's commands compose, its files and names exist, its numbers are those of the code."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from dartsl.config import check_types, resolved

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"(?:^|`)((?:\.venv/bin/)?python3? .*?)(?:`|$)", README, re.MULTILINE)
RUNS = sorted({command.rpartition("run.py")[2] for command in COMMANDS if "run.py" in command})


def test_the_readme_has_commands() -> None:
    assert len(RUNS) > 10
    assert sum("pytest" in command for command in COMMANDS) == 1


@pytest.mark.parametrize("arguments", RUNS)
def test_every_command_composes(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.png").touch()
    overrides = [part for part in shlex.split(arguments) if not part.startswith("-")]
    overrides = [part.replace("=FOLDER", f"={tmp_path}") for part in overrides]
    # Of a sweep the first job; a list in brackets is no sweep.
    overrides = [part if "[" in part else part.split(",")[0] for part in overrides]
    overrides.append("output_dir=x")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        HydraConfig.instance().set_config(compose("config", overrides, return_hydra_config=True))
        check_types(resolved(compose("config", overrides)))


def test_the_set_up_commands_stand_on_one_line_each() -> None:
    start = "python3 -m venv .venv && .venv/bin/pip install -e "
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert [line.removeprefix(start) for line in lines] == [
        ". && .venv/bin/python run.py",
        "'.[test]' && .venv/bin/python -m pytest -n auto",
    ]


def test_every_file_that_it_names_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    paths = re.findall(r"`((?:conf|dartsl|tests|benchmarks|docs)/[\w/.]*)`", README)
    assert len(links) >= 3
    assert len(paths) >= 8
    for name in links + [path for path in paths if "NAME" not in path]:
        assert (ROOT / name).exists(), name
