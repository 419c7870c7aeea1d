"""Builds the C code with this machine's compiler and loads it.

It needs nothing but the C library, so that any `cc` builds it in seconds, when it is first used;
the result is kept in the user's cache.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
# The first that the compiler takes. Torch has loaded an OpenMP library already; it is used.
FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ())
SUFFIXES = {torch.float32: "float", torch.float64: "double"}


@torch.compiler.assume_constant_result
def is_built() -> bool:
    """Whether this machine has the compiled code; torch.compile takes the answer as a constant."""
    return library() is not None


Argument = Tensor | float | None


def call(name: str, dtype: torch.dtype, sizes: Sequence[int], *arguments: Argument) -> None:
    """Call a function of `kernels.c` in the form for `dtype`, with torch's number of threads.

    Args:
        name: of the function, without the suffix.
        dtype: a key of SUFFIXES.
        sizes: the fields of its first argument, but for the number of threads.
        arguments: the others: a tensor for a pointer, None for a pointer to nothing, a number.

    Raises:
        MemoryError: where there is no room for what it keeps meanwhile.
    """
    loaded = library()
    assert loaded is not None
    function = getattr(loaded, f"{name}_{SUFFIXES[dtype]}")
    fields = (ctypes.c_int64 * (len(sizes) + 1))(*sizes, torch.get_num_threads())
    if function(fields, *map(_in_c, arguments)):
        raise MemoryError(f"No memory for {name.replace('_', ' ')}.")


def _in_c(argument: Argument) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return argument if argument is None else ctypes.c_double(argument)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code, built if need be; None where that cannot be."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if os.environ.get("DARTSL_NATIVE") == "0" or compiler is None:
        return None
    for flags in FLAGS:
        try:
            return ctypes.CDLL(str(build(compiler, flags)))
        except (OSError, subprocess.SubprocessError) as error:
            log.debug("%s %s does not build %s: %s", compiler, flags, SOURCE.name, error)
    log.info("%s does not build %s: the search is slower.", compiler, SOURCE.name)
    return None


def build(compiler: str, flags: tuple[str, ...]) -> Path:
    """Compile the code into the user's cache, unless it is there.

    Raises:
        OSError: where it cannot be written, or the compiler cannot be run.
        subprocess.SubprocessError: where the compiler fails.
    """
    sources = [path.read_text() for path in sorted(SOURCE.parent.glob("*.[ch]"))]
    made_of = (*sources, compiler, *flags, _processor())
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    path = _cache() / f"kernels-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            subprocess.run(
                [compiler, "-O3", "-shared", "-fPIC", *flags, "-o", str(part), str(SOURCE), "-lm"],
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
