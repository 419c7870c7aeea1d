"""The benchmarks run from a bare clone; what they count does not grow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


SMALL = ("--batch-size=2", "--channels=4", "--cells=3", "--image-size=8", "--repeats=1")


def run(script: str, folder: Path, *arguments: str) -> dict:
    report = folder / "report.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, "--json", report, *arguments],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads(report.read_text())
    assert {"hardware", "threads", "torch", "commit"} <= set(content["surroundings"])
    for row in content.get("rows", ()):
        assert (row["axis"] if isinstance(row, dict) else row) in done.stdout
    return content


@pytest.mark.slow
def test_a_search_step_beside_the_literal_one(tmp_path: Path) -> None:
    report = run("search_step.py", tmp_path, *SMALL, "--unrolled")
    assert report["models"] == ["literal", "dartsl"]
    assert set(report["rows"]) == {
        "one pass (ms)", "first-order step (ms)", "unrolled step (ms)", "operators a pass",
        "saved activations (MB/image)",
    }  # fmt: skip
    assert all(value > 0 for row in report["rows"].values() for value in row.values())


@pytest.mark.slow
def test_the_full_size_supernet_keeps_within_its_counts(tmp_path: Path) -> None:
    """Counts, not times: operators of a forward and backward pass, bytes kept in between."""
    once = ("--batch-size=2", "--repeats=1", "--warm-up=0", "--only=dartsl")
    rows = run("search_step.py", tmp_path, *once)["rows"]
    assert rows["operators a pass"]["dartsl"] <= 5_000
    assert rows["saved activations (MB/image)"]["dartsl"] <= 75
    rows = run("search_step.py", tmp_path, *once, "--recompute")["rows"]
    assert rows["saved activations (MB/image)"]["dartsl"] <= 10


@pytest.mark.slow
def test_a_training_step_beside_the_literal_one(tmp_path: Path) -> None:
    rows = run("train_step.py", tmp_path, *SMALL, "--recompute")["rows"]
    assert set(rows) == {"step (ms)", "operators a step", "saved activations (MB/image)"}
    kept = rows["saved activations (MB/image)"]
    assert kept["dartsl"] < kept["literal"]


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "rows"), [("search_cifar10", 2), ("train_final", 1)])
def test_steps_of_a_run_without_the_passes(experiment: str, rows: int, tmp_path: Path) -> None:
    few = (f"--experiment={experiment}", "--repeats=1", "--warm-up=0", "--steps=3")
    found = run("run_step.py", tmp_path, *few)["rows"]
    assert len(found) == rows
    assert all(value > 0 for value in found.values())


@pytest.mark.slow
def test_growth_with_the_batch(tmp_path: Path) -> None:
    picture = tmp_path / "growth.png"
    small = ("--axes", "batch_size", "--channels=2", "--cells=2", "--image-size=4", "--repeats=1")
    rows = run("growth.py", tmp_path, *small, "--plot", str(picture))["rows"]
    assert [row["value"] for row in rows] == [16, 32, 64, 128]
    kept = [row["saved activations (MB)"] for row in rows]
    # A straight line, whose constant part are statistics and weights as they are merged.
    assert kept[3] - kept[2] == pytest.approx(4 * (kept[1] - kept[0]))
    assert 0 <= 2 * kept[0] - kept[1] < 0.1 * kept[0]
    assert picture.stat().st_size > 1_000


@pytest.mark.slow
def test_batches_come_in_every_way(tmp_path: Path) -> None:
    few = ("--images=256", "--batch-size=16", "--workers", "0", "1", "--repeats=2")
    report = run("data.py", tmp_path, *few)
    assert len(report["milliseconds a batch"]) == 3


@pytest.mark.slow
def test_the_two_products_in_every_precision(tmp_path: Path) -> None:
    small = ("--channels=2", "--cells=3", "--image-size=8", "--batch-size=4")
    rows = run("products.py", tmp_path, *small)["rows"]
    assert rows["exact, 32 bits"]["cosine to exact"] > 0.99
    assert rows["finite difference, 32 bits"]["cosine to difference"] > 0.99
    assert len(rows) == 10


@pytest.mark.slow
def test_killed_runs_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    """A handful of what the long form does by the hundred."""
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kill_and_resume.py", "--kills=2", "--seed=1",
         "--cases", "search", "training in two processes", "--json", report],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    cases = json.loads(report.read_text())
    assert [case["kills"] for case in cases] == [1, 1]
    assert [case["differences"] for case in cases] == [[], []]
    assert sum(sum(case["killed_in"].values()) for case in cases) == 2
