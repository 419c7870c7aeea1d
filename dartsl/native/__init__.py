"""The weight gradient of depthwise convolutions in C, built by this machine's compiler.

Shapes: B images, C channels, H x W pixels, K x K kernel.

`depthwise.c` has no headers but the C library's, so that any `cc` builds it in seconds, when it is
first used; the result is kept in the user's cache. Where there is no compiler, or with
DARTSL_NATIVE=0, dartsl does without it, with the same results up to rounding.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("depthwise.c")
# The first that the compiler takes. Torch has loaded an OpenMP library already; it is used.
FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ())
FUNCTIONS = {torch.float32: "weight_gradient_float", torch.float64: "weight_gradient_double"}
KERNELS = (3, 5, 7)

NAME = "dartsl::depthwise_weight_gradient"
torch.library.define(
    NAME, "(Tensor gradient, Tensor x, Tensor weight, int stride, int dilation) -> Tensor"
)


def can_weigh(x: Tensor, weight: Tensor) -> bool:
    """Whether `weight_gradient` takes x [B, C, H, W] and weight [C, 1, K, K] on this machine."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in FUNCTIONS
        and weight.shape[-1] in KERNELS
        and is_built()
    )


@torch.compiler.assume_constant_result
def is_built() -> bool:
    """Whether this machine has the compiled code; torch.compile takes the answer as a constant."""
    return library() is not None


def weight_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int
) -> Tensor:
    """Gradient [C, 1, K, K] of the weight of a depthwise convolution that keeps the size.

    Args:
        gradient: of the output, [B, C, ceil(H / stride), ceil(W / stride)].
        x: [B, C, H, W].
        weight: [C, 1, K, K]; its values do not matter.
        stride: 1 or 2.
        dilation: 1 or 2.
    """
    return torch.ops.dartsl.depthwise_weight_gradient(gradient, x, weight, stride, dilation)


@torch.library.impl(NAME, "CPU")
def _call(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    loaded = library()
    assert loaded is not None
    gradient, x = (t.contiguous(memory_format=torch.channels_last) for t in (gradient, x))
    found = torch.empty(weight.shape, dtype=weight.dtype)
    sizes = *x.shape, weight.shape[-1], stride, dilation, torch.get_num_threads()
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, gradient, found)]
    function = getattr(loaded, FUNCTIONS[x.dtype])
    if function((ctypes.c_int64 * len(sizes))(*sizes), *pointers):
        raise MemoryError("No memory for the gradient of a depthwise convolution.")
    return found


@torch.library.register_fake(NAME)
def _fake(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled `depthwise.c`, built if need be; None where that cannot be."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if os.environ.get("DARTSL_NATIVE") == "0" or compiler is None:
        return None
    for flags in FLAGS:
        try:
            return ctypes.CDLL(str(build(compiler, flags)))
        except (OSError, subprocess.SubprocessError) as error:
            log.debug("%s %s does not build %s: %s", compiler, flags, SOURCE.name, error)
    log.info("%s does not build %s: depthwise gradients are slower.", compiler, SOURCE.name)
    return None


def build(compiler: str, flags: tuple[str, ...]) -> Path:
    """Compile `depthwise.c` into the user's cache, unless it is there.

    Raises:
        OSError: where it cannot be written, or the compiler cannot be run.
        subprocess.SubprocessError: where the compiler fails.
    """
    made_of = (SOURCE.read_text(), compiler, *flags, _processor())
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    path = _cache() / f"depthwise-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            subprocess.run(
                [compiler, "-O3", "-shared", "-fPIC", *flags, "-o", str(part), str(SOURCE)],
                check=True,
                capture_output=True,
                timeout=120,
            )
            part.replace(path)  # whole at once: another process may be about to load it
    return path


def _processor() -> str:
    """What -march=native depends on: a cache may be shared by unlike machines."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"


@functools.cache
def _cache() -> Path:
    """The user's own folder for what is built; one of this process where that cannot be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dartsl"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # read-only; no home
        return Path(tempfile.mkdtemp(prefix="dartsl-"))
    return folder
