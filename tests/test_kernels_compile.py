"""Triton's kernels compile for GPUs that are not there: its interpreter takes more."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton_kernels import load

# Bytes that a program may have on all GPUs that the kernels are for (8.6 and 8.9 the least).
SHARED_MEMORY = 99 * 1024


@pytest.mark.slow
def test_kernels_compile(tmp_path) -> None:
    """For a Hopper GPU, and `python -m tests.compile_kernels 80 float32` for others."""
    modules = load("separable_sum_gpu"), load("pools_gpu"), load("triton_sums")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels", "90", "bfloat16"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads(done.stdout)
    source = "".join(Path(str(module.__file__)).read_text() for module in modules)
    assert set(shared) == set(re.findall(r"^ +(_[a-z]\w*)\[", source, re.MULTILINE))
    assert max(shared.values()) <= SHARED_MEMORY
