"""The C code is built where there is a compiler; everything goes on where there is none."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dartsl.native import build
from dartsl.operations import DilatedConv

needs_compiler = pytest.mark.skipif(not build.is_built(), reason="no C compiler on this machine")
ROOT = Path(__file__).parents[1]
KERNEL = torch.zeros(9)
LITTLE = "int nothing(void) { return 0; }"  # C code that is compiled in no time


@pytest.fixture
def fresh(monkeypatch, tmp_path) -> Path:
    """A machine that has built nothing yet; its cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    build._cache.cache_clear()
    yield tmp_path / "dartsl"
    monkeypatch.undo()
    build.library.cache_clear()
    build._cache.cache_clear()


@needs_compiler
@pytest.mark.parametrize(
    ("name", "sizes", "others"),
    [
        ("separable", (1, 1, 1, 1 << 48, 1, 1, 1, 3, 1, 1), (1e-5, *(None,) * 9)),
        ("separable_backward", (1, 1, 1, 1 << 48, 1, 1, 1, 3, 1, 1), (None,) * 13),
        # Where a thread is to take its room.
        (
            "separable",
            (1, 1, 1, 1, 1, 1 << 22, 1 << 22, 3, 1, 1),
            (1e-5, None, KERNEL, KERNEL, *(None,) * 6),
        ),
        ("pools", (1, 1 << 48, 1, 1, 1, 1, 0, 1, 1), (1e-5, *(None,) * 5)),
        ("pools", (1, 1, 1, 1 << 48, 1, 1, 0, 1, 1), (1e-5, *(None,) * 5)),
        ("pools_backward", (1, 1 << 48, 1, 1, 1, 1, 0, 1, 1), (None,) * 7),
    ],
)
def test_no_memory_is_an_error(name, sizes, others) -> None:
    with pytest.raises(MemoryError, match=f"No memory for {name.replace('_', ' ')}"):
        build.call(name, torch.float32, sizes, *others)


@pytest.fixture
def little(tmp_path, monkeypatch) -> Path:
    """A source of the C code that is `LITTLE`."""
    source = tmp_path / "source" / "kernels.c"
    source.parent.mkdir()
    source.write_text(LITTLE)
    monkeypatch.setattr(build, "SOURCE", source)
    return source


@needs_compiler
def test_it_is_built_once(fresh, little, monkeypatch) -> None:
    assert build.library() is not None
    (built,) = fresh.iterdir()
    assert built.suffix == ".so"
    build.library.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)  # it would fail
    assert build.library() is not None


@pytest.mark.parametrize("problem", ["switched off", "no compiler", "fails", "not whole"])
def test_without_it_everything_is_computed(fresh, monkeypatch, tmp_path, problem) -> None:
    if problem == "switched off":
        monkeypatch.setenv("DARTSL_NATIVE", "0")
    elif problem == "no compiler":
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", "")
    else:
        compiler = tmp_path / "cc"
        compiler.write_text(
            "#!/bin/sh\nexit 1\n" if problem == "fails" else '#!/bin/sh\n: > "${@: -2:1}"\n'
        )
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))
    assert build.library() is None
    convolution = DilatedConv(3, 5, 1, affine=True)
    x = torch.randn(2, 3, 6, 6)
    _, depthwise, pointwise, norm = convolution.op
    expected = F.conv2d(F.relu(x), depthwise.weight, padding=4, dilation=2, groups=3)
    expected = F.batch_norm(F.conv2d(expected, pointwise.weight), None, None, training=True)
    assert torch.equal(convolution(x), expected)
    assert norm.num_batches_tracked == 1


@needs_compiler
def test_a_home_that_cannot_be_written_is_done_without(fresh, little, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert build.library() is not None


@needs_compiler
@pytest.mark.slow
def test_several_processes_build_it_at_once(tmp_path, little) -> None:
    command = (
        "from pathlib import Path; from dartsl.native import build; "
        f"build.SOURCE = Path({str(little)!r}); assert build.library() is not None"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, env=environment)
        for _ in range(2)
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    assert len(list((tmp_path / "dartsl").iterdir())) == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_is_freed_is_kept() -> None:
    """Pages that are mapped anew are counted by the system as minor faults."""
    code = """
import resource, torch
from dartsl.native.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    maps = [torch.ones(2**20) for _ in range(40)]
    del maps
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
keep_freed_memory()
print(*(faults() for _ in range(4)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, *_, last = map(int, done.stdout.split())
    assert 10 * last < first
