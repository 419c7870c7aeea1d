"""Reads the numbers of the official implementation: tests/golden, or ../shared/golden beside it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden"


def load_golden(name: str) -> dict:
    """The content of a golden file; the test skips where it is absent."""
    for folder in (HERE, SHARED):
        if (folder / name).exists():
            return torch.load(folder / name, weights_only=True)
    pytest.skip(f"{name} is not part of the repository and ../shared/golden is absent")


def unpack(packed: dict) -> dict[str, Tensor]:
    """{keys, shapes, flat} -> {name: float64 tensor}."""
    sizes = [torch.Size(shape).numel() for shape in packed["shapes"]]
    parts = packed["flat"].double().split(sizes)
    tensors = zip(packed["keys"], packed["shapes"], parts, strict=True)
    return {key: part.view(tuple(shape)).clone() for key, shape, part in tensors}


def unpack_state_dict(packed: dict) -> dict[str, Tensor]:
    """`unpack`, with the counters that the packed form leaves out."""
    state = {}
    for key, value in unpack(packed).items():
        state[key] = value
        if key.endswith("running_var"):
            counter = key.removesuffix("running_var") + "num_batches_tracked"
            state[counter] = torch.tensor(packed.get("num_batches_tracked", 0))
    return state


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation in units of the largest expected magnitude."""
    assert actual.shape == expected.shape
    scale = expected.abs().max().clamp_min(1e-30)
    return ((actual - expected).abs().max() / scale).item()
