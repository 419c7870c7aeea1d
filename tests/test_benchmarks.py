"""The benchmarks run from a bare clone; what they count does not grow."""

import argparse
import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig

from tests.triton_kernels import DEVICE, load

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "benchmarks"
SMALL = ("--batch-size=2", "--channels=4", "--cells=3", "--image-size=8", "--repeats=1")
Benchmark = Callable[..., dict]


@pytest.fixture
def benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Benchmark:
    """Runs a script in an empty folder and gives its report.

    Within this process: another would import for ten seconds.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)

    def call(script: str, *arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", [script, "--json", "report.json", *arguments])
        with torch.random.fork_rng():
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        content = json.loads(Path("report.json").read_text())
        assert {"hardware", "threads", "torch", "commit"} <= set(content["surroundings"])
        out = capsys.readouterr().out
        for row in content.get("rows", ()):
            assert (row["axis"] if isinstance(row, dict) else row) in out
        return content

    return call


def run(script: str, folder: Path, *arguments: str) -> str:
    """Runs a script in an empty folder, as a person does, and gives what it prints."""
    done = subprocess.run(
        [sys.executable, SCRIPTS / script, *arguments],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_search_step_beside_the_literal_one(tmp_path: Path) -> None:
    said = run("search_step.py", tmp_path, *SMALL, "--unrolled", "--json", "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["models"] == ["literal", "dartsl"]
    assert set(report["rows"]) == {
        "one pass (ms)", "first-order step (ms)", "unrolled step (ms)", "operators a pass",
        "saved activations (MB/image)",
    }  # fmt: skip
    assert all(row in said for row in report["rows"])
    assert all(value > 0 for row in report["rows"].values() for value in row.values())


@pytest.mark.slow
def test_the_full_size_supernet_keeps_within_its_counts(benchmark: Benchmark) -> None:
    """Counts, not times: operators of a forward and backward pass, bytes kept in between."""
    once = ("--batch-size=2", "--repeats=1", "--warm-up=0", "--only=dartsl")
    rows = benchmark("search_step.py", *once)["rows"]
    assert rows["operators a pass"]["dartsl"] <= 5_000
    assert rows["saved activations (MB/image)"]["dartsl"] <= 75
    rows = benchmark("search_step.py", *once, "--recompute")["rows"]
    assert rows["saved activations (MB/image)"]["dartsl"] <= 10


@pytest.mark.slow
def test_a_training_step_beside_the_literal_one(benchmark: Benchmark) -> None:
    rows = benchmark("train_step.py", *SMALL, "--recompute")["rows"]
    assert set(rows) == {"step (ms)", "operators a step", "saved activations (MB/image)"}
    kept = rows["saved activations (MB/image)"]
    assert kept["dartsl"] < kept["literal"]


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "rows"), [("search_cifar10", 2), ("train_final", 1)])
def test_steps_of_a_run_without_the_passes(
    experiment: str, rows: int, benchmark: Benchmark
) -> None:
    few = (f"--experiment={experiment}", "--repeats=1", "--warm-up=0", "--steps=3")
    found = benchmark("run_step.py", *few)["rows"]
    assert len(found) == rows
    assert all(value > 0 for value in found.values())


@pytest.mark.slow
def test_growth_with_the_batch(benchmark: Benchmark, tmp_path: Path) -> None:
    picture = tmp_path / "growth.png"
    small = ("--axes", "batch_size", "--channels=2", "--cells=2", "--image-size=4", "--repeats=1")
    rows = benchmark("growth.py", *small, "--plot", str(picture))["rows"]
    assert [row["value"] for row in rows] == [16, 32, 64, 128]
    kept = [row["saved activations (MB)"] for row in rows]
    # A straight line, whose constant part are statistics and weights as they are merged.
    assert kept[3] - kept[2] == pytest.approx(4 * (kept[1] - kept[0]))
    assert 0 <= 2 * kept[0] - kept[1] < 0.1 * kept[0]
    assert picture.stat().st_size > 1_000


@pytest.mark.slow
def test_batches_come_in_every_way(benchmark: Benchmark) -> None:
    few = ("--images=256", "--batch-size=16", "--workers", "0", "1", "--repeats=2")
    report = benchmark("data.py", *few)
    assert len(report["milliseconds a batch"]) == 3


@pytest.mark.slow
def test_the_two_products_in_every_precision(benchmark: Benchmark) -> None:
    small = ("--channels=2", "--cells=3", "--image-size=8", "--batch-size=4")
    rows = benchmark("products.py", *small)["rows"]
    assert rows["exact, 32 bits"]["cosine to exact"] > 0.99
    assert rows["finite difference, 32 bits"]["cosine to difference"] > 0.99
    assert len(rows) == 10


@pytest.mark.slow
def test_a_kernel_launched_in_several_ways(monkeypatch, tmp_path: Path, capsys) -> None:
    """It computes the same in each; what does not is told."""
    gpu = load("separable_sum_gpu")
    monkeypatch.syspath_prepend(SCRIPTS)
    kernels = importlib.import_module("kernels")
    monkeypatch.setattr(kernels, "LEVELS", {"tiny": kernels.Convolutions(4, 4, (3,), (1,), 1)})
    report, ways = tmp_path / "report.json", ("num_stages=2", "num_warps=8,num_stages=2")
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", DEVICE, "--batch-size=1",
                                      "--json", str(report), "--ways", *ways])  # fmt: skip
    kernels.main()
    rows = json.loads(report.read_text())["rows"]
    assert [row["way"] for row in rows] == ["as shipped", *ways] * 3
    assert {row["kernel"] for row in rows} == {
        "_convolve", "_gradient_of_input", "_gradient_of_matrices"
    }  # fmt: skip
    assert all(row["milliseconds"] > 0 and "fault" not in row for row in rows)
    assert capsys.readouterr().out.count("tiny  ") == len(rows)

    args = argparse.Namespace(device="cpu", clock="wall")
    results = iter(torch.tensor([1.0, 1.0, 1.1, 1.1]))
    _, other = kernels.compare(gpu, "_convolve", lambda: next(results), ["num_warps=8"], args)
    assert other["fault"].startswith("computes something else: 1.0e-01")


@pytest.mark.slow
def test_killed_runs_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    """A handful of what the long form does by the hundred."""
    report = tmp_path / "report.json"
    two = ("--cases", "search", "training in two processes")
    run("kill_and_resume.py", tmp_path, "--kills=2", "--seed=1", *two, "--json", str(report))
    cases = json.loads(report.read_text())
    assert [case["kills"] for case in cases] == [1, 1]
    assert [case["differences"] for case in cases] == [[], []]
    assert sum(sum(case["killed_in"].values()) for case in cases) == 2
