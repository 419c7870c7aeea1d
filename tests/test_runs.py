"""What of the hardware's settings a network is given."""

import logging
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from dartsl import runs


def config(compile: str | None = None, graphs: bool = True, recompute: bool = False, sync=False):
    hardware = {"compile": compile, "cuda_graphs": graphs, "recompute": recompute}
    return OmegaConf.create({"hardware": hardware, "trainer": {"sync_batchnorm": sync}})


@pytest.fixture
def done(monkeypatch) -> list[str]:
    """What is done to a network."""
    found: list[str] = []
    monkeypatch.setattr(runs, "replay_passes", lambda network, device: found.append("replayed"))
    monkeypatch.setattr(
        runs, "compile_regions", lambda regions, mode, device: found.append(f"compiled: {mode}")
    )
    return found


def speed_up(device: str, cfg, twice: bool = False) -> None:
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    network = SimpleNamespace(regions=list)
    runs.speed_up(cfg, trainer, network, twice)  # type: ignore[arg-type]


def test_passes_are_replayed_on_a_gpu_alone(done, caplog) -> None:
    speed_up("cuda", config())
    speed_up("cuda", config(compile="default"))
    assert done == ["replayed", "compiled: default", "replayed"]
    speed_up("cpu", config())
    speed_up("cuda", config(graphs=False))
    assert len(done) == 3
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"recompute": True}, "recompute"),
        ({"compile": "reduce-overhead"}, "reduce-overhead"),
        ({"sync": True}, "sync_batchnorm"),
        ({}, "differentiates twice"),
    ],
)
def test_where_passes_are_not_replayed_a_line_says_so(done, caplog, options, reason) -> None:
    with caplog.at_level(logging.INFO):
        speed_up("cuda", config(**options), twice=not options)
    assert "replayed" not in done
    (record,) = caplog.records
    assert reason in record.getMessage()


def test_what_is_differentiated_twice_is_not_compiled(done, caplog) -> None:
    speed_up("cpu", config(compile="default"), twice=True)
    assert not done
    assert "not differentiated twice" in caplog.text
