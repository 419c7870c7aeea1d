"""What all tests share."""

import ctypes
import functools
import os
import platform
from pathlib import Path

import pytest
import torch

# Kernels in Triton are interpreted where there is no GPU; Triton asks when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dartsl.native import build

# The networks of the tests are tiny: more threads would only wait for each other.
torch.set_num_threads(1)

# Bytes of a vector, the flags that ask for them, and what a processor that has them says.
VECTORS = {16: ((), ""), 32: (("-mavx2", "-mfma"), "avx2"), 64: (("-mavx512f",), "avx512f")}


@pytest.fixture(params=["as it is built", *VECTORS])
def native_code(request, monkeypatch) -> None:
    """The C code as this machine builds it, and as machines with other registers do."""
    if not build.is_built():
        pytest.skip("no C compiler on this machine")
    if request.param in VECTORS:
        flags, needed = VECTORS[request.param]
        cpu = Path("/proc/cpuinfo")
        if platform.machine() != "x86_64" or not cpu.exists() or needed not in cpu.read_text():
            pytest.skip(f"no vectors of {request.param} bytes on this machine")
        loaded = compiled(flags)
        monkeypatch.setattr(build, "library", lambda: loaded)


@pytest.fixture(params=["in C", "in PyTorch"])
def each_code(request, monkeypatch) -> None:
    """What is written twice, in each of the two."""
    if request.param == "in PyTorch":
        monkeypatch.setattr(build, "is_built", lambda: False)
    elif not build.is_built():
        pytest.skip("no C compiler on this machine")


@functools.cache
def compiled(flags: tuple[str, ...]) -> ctypes.CDLL:
    """The C code with other flags."""
    return ctypes.CDLL(str(build.build(os.environ.get("CC", "cc"), flags)))
