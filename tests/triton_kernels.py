"""Kernels in Triton for tests: compiled on a GPU, interpreted where there is none (conftest.py)."""

import importlib
from types import ModuleType

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies no matrices in bfloat16.
TYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def load(name: str) -> ModuleType:
    """A module of `dartsl.native` with kernels; its test is skipped where there is no Triton."""
    pytest.importorskip("triton", reason="no Triton on this machine")
    return importlib.import_module(f"dartsl.native.{name}")


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of tensors of the same shape."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm())
