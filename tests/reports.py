"""Runs to report of, and what a report says."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml

from dartsl.search_space import SearchSpace, discretize


def report_content(folder: Path) -> dict[str, Any]:
    """The content of the report in a folder."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', page)
    assert found is not None
    return json.loads(found[1])


def write_search(folder: Path, *, epochs: int = 3, seed: int = 0, space: SearchSpace | None = None,
                 config: dict[str, Any] | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """A folder as a search leaves it, with edge weights that drift; its history."""
    space = space or SearchSpace()
    generator = torch.Generator().manual_seed(seed)
    shape = len(space.edges), len(space.primitives)
    drift = {kind: torch.randn(shape, generator=generator) for kind in ("normal", "reduce")}
    lines = []
    for epoch in range(epochs):
        noise = 0.3 * torch.randn(shape, generator=generator)
        strengths = {kind: (0.2 * epoch * d + noise).softmax(1) for kind, d in drift.items()}
        genotype = discretize(strengths, space)
        lines.append({
            "epoch": epoch,
            "seconds": 60.0 + epoch,
            "metrics": {
                "search/train_loss": 2.0 / (epoch + 1), "search/train_accuracy": 0.1 * (epoch + 1),
                "search/val_loss": None, "search/val_accuracy": 0.1 * epoch + 0.01 * seed,
                "alpha/normal_skip_connections": 1.0,
            },
            "genotype": genotype.notation(),
            "primitives": list(space.primitives),
            "strengths": {kind: values.tolist() for kind, values in strengths.items()},
        })  # fmt: skip
    genotype.save(folder / "genotype.yaml")
    write_files(
        folder, lines, {"task": "search", "trainer": {"max_epochs": epochs}} | (config or {})
    )
    return lines


def write_training(
    folder: Path, *, accuracy: float | None, max_epochs: int | None = 2, ended: bool = True
) -> None:
    """A folder as a training of two epochs leaves it; without a test it has no accuracy."""
    metrics = {"train/train_loss": 1.0, "train/val_accuracy": 0.5}
    lines = [{"epoch": epoch, "seconds": 1.0, "metrics": metrics} for epoch in range(2)]
    config = {"task": "train", "trainer": {"max_epochs": max_epochs}}
    write_files(folder, lines, config, ended)
    if accuracy is not None:
        (folder / "test.yaml").write_text(yaml.safe_dump({"accuracy": accuracy, "loss": 0.1}))


def write_overrides(folder: Path, *overrides: str) -> None:
    """What a job's command gave, as Hydra keeps it."""
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))


def write_files(
    folder: Path, lines: list[dict[str, Any]], config: dict[str, Any], ended: bool = True
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.yaml").write_text(
        yaml.safe_dump({"command": "python run.py", "cpu": "A"})
    )
    if ended:
        (folder / "result.yaml").write_text("{}\n")
