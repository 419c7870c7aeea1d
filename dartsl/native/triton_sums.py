"""What the kernels in Triton share.

Sums over pixels are taken in parts, one for each program, and the last program of a group adds
them in their order: equal inputs give equal bits, and no further kernel is launched for it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MULTIPROCESSORS = 132  # of a Hopper GPU
MAX_BLOCKS = 8 * MULTIPROCESSORS  # of a kernel that adds over pixels


@triton.jit
def tile_of(p, pixels, height, width):
    """Of output pixels p: which of them there are, their image, row and column."""
    rest = p % (height * width)
    return p < pixels, p // (height * width), rest // width, rest % width


@triton.jit
def is_last(counter, group, programs):
    """Whether all other programs of a group, of so many, have come here before this one."""
    tl.debug_barrier()  # what all threads have written comes before the count
    last = tl.atomic_add(counter + group, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter + group, 0)  # for the next kernel
    return last


@triton.jit
def parts_of(partial, begin, programs, outputs, at, pixels, size, ok, ROWS: tl.constexpr):
    """Two sums [R, O] of R programs, and the pixels [R, 1] that each has seen."""
    rows = begin + tl.arange(0, ROWS)
    mask = (rows < programs)[:, None] & ok[None, :]
    where = partial + rows[:, None] * 2 * outputs + at[None, :]
    counts = tl.minimum(tl.maximum(pixels - rows * size, 0), size).to(tl.float32)
    # Past the first cache, which may hold what was there before.
    one = tl.load(where, mask=mask, other=0.0, cache_modifier=".cg")
    return (
        one,
        tl.load(where + outputs, mask=mask, other=0.0, cache_modifier=".cg"),
        counts[:, None],
    )


def room(like: Tensor, size: int) -> Tensor:
    """So many numbers in single precision, to be filled, on the device of another tensor."""
    return torch.empty(size, dtype=torch.float32, device=like.device)


_COUNTERS: dict[torch.device, Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """Zeros, as every kernel leaves them: those of one device run one by one, on one stream."""
    if device not in _COUNTERS:
        _COUNTERS[device] = torch.zeros(65536, dtype=torch.int32, device=device)
    return _COUNTERS[device]


def share(pixels: int, block: int, columns: int) -> tuple[int, int]:
    """Programs among which so many pixels are parted, in blocks, and how many blocks each takes.

    Args:
        pixels: N.
        block: pixels of a block.
        columns: how often the programs are there beside each other.
    """
    blocks = triton.cdiv(pixels, block)
    tiles = triton.cdiv(blocks, max(1, MAX_BLOCKS // columns))
    return triton.cdiv(blocks, tiles), tiles


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The operation, whose kernels run where its first tensor is; Triton asks PyTorch where."""

    @functools.wraps(function)
    def guarded(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *rest)

    return guarded
