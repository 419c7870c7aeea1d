"""The benchmarks run from a bare clone; what they count does not grow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def search_step(folder: Path, *arguments: str) -> dict:
    report = folder / "report.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "search_step.py", "--json", report, *arguments],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads(report.read_text())
    for row in content["rows"]:
        assert row in done.stdout
    return content


@pytest.mark.slow
def test_a_search_step_beside_the_literal_one(tmp_path: Path) -> None:
    small = ("--batch-size=2", "--channels=4", "--cells=3", "--image-size=8", "--repeats=1")
    report = search_step(tmp_path, *small, "--unrolled")
    assert report["models"] == ["literal", "dartsl"]
    assert set(report["rows"]) == {
        "one pass (ms)", "first-order step (ms)", "unrolled step (ms)", "operators a pass",
        "saved activations (MB/image)",
    }  # fmt: skip
    assert all(value > 0 for row in report["rows"].values() for value in row.values())
    assert {"hardware", "threads", "torch", "commit"} <= set(report["surroundings"])


@pytest.mark.slow
def test_the_full_size_supernet_keeps_within_its_counts(tmp_path: Path) -> None:
    """Counts, not times: operators of a forward and backward pass, bytes kept in between."""
    once = ("--batch-size=2", "--repeats=1", "--warm-up=0", "--only=dartsl")
    rows = search_step(tmp_path, *once)["rows"]
    assert rows["operators a pass"]["dartsl"] <= 5_000
    assert rows["saved activations (MB/image)"]["dartsl"] <= 75


@pytest.mark.slow
def test_killed_runs_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    """A handful of what the long form does by the hundred."""
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kill_and_resume.py", "--kills=4", "--seed=1",
         "--cases", "search", "training in two processes", "--json", report],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    cases = json.loads(report.read_text())
    assert [case["kills"] for case in cases] == [2, 2]
    assert [case["differences"] for case in cases] == [[], []]
    assert sum(sum(case["killed_in"].values()) for case in cases) == 4
