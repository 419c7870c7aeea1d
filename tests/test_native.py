"""The C code gives PyTorch's gradients; without a compiler everything goes on without it."""

import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dartsl import depthwise
from dartsl.native import build
from dartsl.native import depthwise as native

needs_compiler = pytest.mark.skipif(not build.is_built(), reason="no C compiler on this machine")
ROOT = Path(__file__).parents[1]


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


def convolution(kernel: int, channels: int, size: tuple[int, int], stride: int, dilation: int):
    """x, weight, gradient of the output, and PyTorch's gradient of the weight."""
    torch.manual_seed(0)
    x = torch.randn(3, channels, *size, dtype=torch.float64)
    weight = torch.randn(channels, 1, kernel, kernel, dtype=torch.float64, requires_grad=True)
    padding = dilation * (kernel // 2)
    output = F.conv2d(x, weight, None, stride, padding, dilation, groups=channels)
    gradient = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, weight, gradient)
    return x, weight.detach(), gradient, expected


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize("channels", [1, 3, 8, 20])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_the_gradient_is_pytorchs(kernel, channels) -> None:
    for stride, dilation, size in itertools.product((1, 2), (1, 2), ((7, 5), (8, 8), (1, 1))):
        x, weight, gradient, expected = convolution(kernel, channels, size, stride, dilation)
        found = native.weight_gradient(gradient, x, weight, stride, dilation)
        assert relative_error(found, expected) < 1e-14
        single = [tensor.float() for tensor in (gradient, x, weight)]
        found = native.weight_gradient(*single, stride, dilation)
        assert found.dtype == torch.float32
        assert relative_error(found, expected) < 1e-6


@needs_compiler
def test_many_images_and_threads_give_the_same_bits() -> None:
    torch.manual_seed(0)
    x, gradient = torch.randn(2, 70, 20, 9, 9)
    weight = torch.empty(20, 1, 5, 5)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(native.weight_gradient(gradient, x, weight, 1, 1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])
    formula = torch.autograd.functional.vjp(
        lambda w: F.conv2d(x, w, padding=2, groups=20), weight, gradient
    )[1]
    assert relative_error(found[0], formula.double()) < 1e-5


@needs_compiler
def test_it_is_used_where_nothing_is_differentiated_twice(monkeypatch) -> None:
    calls = []
    original = native.weight_gradient
    monkeypatch.setattr(native, "weight_gradient", lambda *a: calls.append(a) or original(*a))
    x, weight, gradient, expected = convolution(5, 3, (6, 6), 1, 1)
    weight.requires_grad_()
    for again in (False, True):
        output = depthwise.depthwise_conv2d(x, weight)
        (found,) = torch.autograd.grad(output, weight, gradient, create_graph=again)
        assert relative_error(found.detach(), expected) < 1e-14
    assert len(calls) == 1


@needs_compiler
@pytest.mark.parametrize(
    ("name", "sizes", "others"),
    [
        ("weight_gradient", (1, 1, 1 << 24, 1 << 24, 3, 1, 1), (None,) * 3),
        ("pointwise", (2, 1, 1 << 48, 1, 0), (1e-5, *(None,) * 7)),
        ("pointwise_backward", (2, 1, 1 << 48, 1, 0), (None,) * 9),
    ],
)
def test_no_memory_is_an_error(name, sizes, others) -> None:
    with pytest.raises(MemoryError, match=f"No memory for {name.replace('_', ' ')}"):
        build.call(name, torch.float32, sizes, *others)


@needs_compiler
def test_it_is_built_once(fresh, monkeypatch) -> None:
    assert build.library() is not None
    (built,) = fresh.iterdir()
    assert built.suffix == ".so"
    build.library.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)  # it would fail
    assert build.library() is not None


@pytest.mark.parametrize("problem", ["switched off", "no compiler", "fails", "not whole"])
def test_without_it_the_gradient_is_the_same(fresh, monkeypatch, tmp_path, problem) -> None:
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
    x, weight, gradient, expected = convolution(5, 3, (6, 6), 1, 2)
    assert not native.can_weigh(x, weight)
    with torch.no_grad():
        found = depthwise.weight_gradient(gradient, x, weight, 1, 2)
    assert relative_error(found, expected) < 1e-14


@needs_compiler
def test_a_home_that_cannot_be_written_is_done_without(fresh, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert build.library() is not None


@needs_compiler
@pytest.mark.slow
def test_several_processes_build_it_at_once(tmp_path) -> None:
    command = "from dartsl.native import build; assert build.library() is not None"
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
