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
PARTS = 4096  # numbers that a program adds at once: what registers hold


@triton.jit
def tile_of(p, pixels, height: tl.constexpr, width: tl.constexpr):
    """Of output pixels p: which of them there are, their image, row and column."""
    ok = p < pixels
    p = p.to(tl.uint32)  # whose divisions by powers of two are shifts
    row, rest = p // width, p % (height * width)
    return (
        ok,
        (row // height).to(tl.int32),
        (rest // width).to(tl.int32),
        (p % width).to(tl.int32),
    )


@triton.jit
def is_last(counter, group, programs):
    """Whether all other programs of a group, of so many, have come here before this one."""
    tl.debug_barrier()  # what all threads have written comes before the count
    last = tl.atomic_add(counter + group, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter + group, 0)  # for the next kernel
    return last


@triton.jit
def parts_of(partial, begin, columns, at, ok, ROWS: tl.constexpr):
    """What R programs have written for columns [C] of a row, [R, C]; their rows [R]."""
    rows = begin + tl.arange(0, ROWS)
    mask = (rows < tl.num_programs(0))[:, None] & ok[None, :]
    # Past the first cache, which may hold what was there before.
    where = partial + rows[:, None] * columns + at[None, :]
    return tl.load(where, mask=mask, other=0.0, cache_modifier=".cg"), rows


@triton.jit
def total_of(partial, columns, at, ok, C: tl.constexpr, ROWS: tl.constexpr):
    """The sum of all programs' numbers for columns [C]."""
    total = tl.zeros([ROWS, C], tl.float32)
    for begin in range(0, tl.num_programs(0), ROWS):
        total += parts_of(partial, begin, columns, at, ok, ROWS)[0]
    return tl.sum(total, 0)


@triton.jit
def moments(value, ok, count, mean, squares):
    """Mean and squares around it, of so many pixels before and of these (Chan et al., 1979)."""
    number = tl.sum(ok.to(tl.float32))
    of_tile = tl.sum(tl.where(ok[:, None], value, 0.0), 0) / tl.maximum(number, 1.0)
    around = tl.where(ok[:, None], value - of_tile[None, :], 0.0)
    part = number / tl.maximum(count + number, 1.0)
    squares += tl.sum(around * around, 0) + (of_tile - mean) * (of_tile - mean) * count * part
    return mean + (of_tile - mean) * part, squares


@triton.jit
def finish_moments(
    partial, statistics, pixels, size, channels, at, ok, eps,
    C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of the moments of all programs: mean, 1 / sqrt(var + eps), variance without bias.

    A program's row has the means of its pixels, which are `size` but for the last one, and the
    squares around them. They are joined around the first program's means.
    """
    center = tl.load(partial + at, mask=ok, other=0.0, cache_modifier=".cg")
    first = tl.zeros([ROWS, C], tl.float32)
    second = tl.zeros([ROWS, C], tl.float32)
    for begin in range(0, tl.num_programs(0), ROWS):
        means, rows = parts_of(partial, begin, 2 * channels, at, ok, ROWS)
        squares, _ = parts_of(partial + channels, begin, 2 * channels, at, ok, ROWS)
        counts = tl.minimum(tl.maximum(pixels - rows * size, 0), size).to(tl.float32)[:, None]
        away = means - center[None, :]
        first += counts * away
        second += squares + counts * away * away
    away = tl.sum(first, 0) / pixels
    var = tl.sum(second, 0) / pixels - away * away
    var = tl.where(var < 0, 0.0, var)  # NaN stays
    tl.store(statistics + at, center + away, mask=ok)
    tl.store(statistics + channels + at, 1 / tl.sqrt(var + eps), mask=ok)
    tl.store(statistics + 2 * channels + at, var * (pixels / (pixels - 1)), mask=ok)


def rows_at_once(columns: int) -> int:
    """Of so many columns of what programs have written, the rows that the last one adds at once."""
    return max(1, PARTS // columns)


def room(like: Tensor, size: int) -> Tensor:
    """So many numbers in single precision, to be filled, on the device of another tensor."""
    return torch.empty(size, dtype=torch.float32, device=like.device)


_COUNTERS: dict[torch.device, Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """Zeros, as every kernel leaves them: those of one device run one by one, on one stream."""
    if device not in _COUNTERS:
        _COUNTERS[device] = torch.zeros(65536, dtype=torch.int32, device=device)
    return _COUNTERS[device]


def share(pixels: int, block: int, columns: int, resident: int = 4) -> tuple[int, int]:
    """Programs among which so many pixels are parted, in blocks, and how many blocks each takes.

    Few: what each of them has found is added by the last one alone.

    Args:
        pixels: N.
        block: pixels of a block.
        columns: how often the programs are there beside each other.
        resident: how many a multiprocessor is given, of all columns.
    """
    blocks = triton.cdiv(pixels, block)
    tiles = triton.cdiv(blocks, max(1, resident * MULTIPROCESSORS // columns))
    return triton.cdiv(blocks, tiles), tiles


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The operation, whose kernels run where its first tensor is; Triton asks PyTorch where."""

    @functools.wraps(function)
    def guarded(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *rest)

    return guarded
