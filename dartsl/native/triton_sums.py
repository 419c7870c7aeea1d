"""What the kernels in Triton share.

Sums over pixels are taken in parts, one for each program, and the last program of a group adds
them in their order: equal inputs give equal bits, and no further kernel is launched for it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dartsl.errors import UserError, first_line

MULTIPROCESSORS = 132  # of a Hopper GPU
PARTS = 4096  # numbers that a program adds at once: what registers hold


@triton.jit
def of_branch(branch, first, second, third, fourth):
    """Its value among those of all branches."""
    found = first
    if branch == 1:
        found = second
    elif branch == 2:
        found = third
    elif branch == 3:
        found = fourth
    return found


@triton.jit
def tiles_of(program, tiles, pixels, P: tl.constexpr):
    """How many tiles of P pixels a program has, of which each but the last has so many."""
    return tl.minimum(tiles, (pixels - program * tiles * P + P - 1) // P)


@triton.jit
def are_there(p, pixels, WHOLE: tl.constexpr):
    """Which of the pixels p there are: all, if known, and no kernel asks for it."""
    return tl.full(p.shape, True, tl.int1) if WHOLE else p < pixels


@triton.jit
def tile_of(p, height: tl.constexpr, width: tl.constexpr):
    """Of output pixels p: their image, row and column."""
    p = p.to(tl.uint32)  # whose divisions by powers of two are shifts
    row, rest = p // width, p % (height * width)
    return (
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
def two_totals(partial, apart, columns, at, ok, C: tl.constexpr, ROWS: tl.constexpr):
    """The sums of all programs' numbers for columns [C], and for those so far apart from them.

    Both at once, since this last program waits for memory alone.
    """
    first = tl.zeros([ROWS, C], tl.float32)
    second = tl.zeros([ROWS, C], tl.float32)
    for begin in range(0, tl.num_programs(0), ROWS):
        first += parts_of(partial, begin, columns, at, ok, ROWS)[0]
        second += parts_of(partial + apart, begin, columns, at, ok, ROWS)[0]
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def by_thread(value, P: tl.constexpr, C: tl.constexpr, PRODUCT: tl.constexpr):
    """[P, C] as [A, W, H, L, C], where a thread holds all of A and H, and of the others one place.

    So it does of a PRODUCT of matrices of four warps; with others the same is found, but slower.
    """
    if PRODUCT and P % 64 == 0:
        value = tl.reshape(value, [P // 64, 4, 2, 8, C])
    else:
        value = tl.reshape(value, [1, P, 1, 1, C])
    return value


@triton.jit
def over_thread(value):
    """The sums [1, W, 1, L, C] over what a thread holds."""
    return tl.sum(tl.sum(value, 2, keep_dims=True), 0, keep_dims=True)


@triton.jit
def no_moments(P: tl.constexpr, C: tl.constexpr, PRODUCT: tl.constexpr):
    """Of no pixels: number, means, and squares around them."""
    zeros = over_thread(by_thread(tl.zeros([P, C], tl.float32), P, C, PRODUCT))
    return over_thread(by_thread(tl.zeros([P, 1], tl.float32), P, 1, PRODUCT)), zeros, zeros


@triton.jit
def add_moments(
    value, ok, count, mean, squares, P: tl.constexpr, C: tl.constexpr, PRODUCT: tl.constexpr
):
    """Those of the pixels before and of these [P, C], of which some are there (Chan et al., 1979).

    By threads: they need not wait for each other until `store_moments`.
    """
    ok = by_thread(ok[:, None].to(tl.float32), P, 1, PRODUCT)
    value = by_thread(value, P, C, PRODUCT)
    number = over_thread(ok)
    of_these = over_thread(tl.where(ok > 0, value, 0.0)) * (1 / tl.maximum(number, 1.0))
    around = tl.where(ok > 0, value - of_these, 0.0)
    part = number / tl.maximum(count + number, 1.0)
    away = of_these - mean
    squares += over_thread(around * around) + away * away * (count * part)
    return count + number, mean + away * part, squares


@triton.jit
def store_moments(
    partial, count, mean, squares, columns, at, ok,
    P: tl.constexpr, C: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """This program's row of all, [2, columns]: mean and squares around it at places `at` [C]."""
    rows: tl.constexpr = 32 if PRODUCT and P % 64 == 0 else P
    count, mean = tl.reshape(count, [rows, 1]), tl.reshape(mean, [rows, C])
    of_all = tl.sum(count * mean, 0) / tl.sum(count)
    away = mean - of_all[None, :]
    squares = tl.sum(tl.reshape(squares, [rows, C]) + count * away * away, 0)
    partial += tl.program_id(0) * 2 * columns
    tl.store(partial + at, of_all, mask=ok)
    tl.store(partial + columns + at, squares, mask=ok)


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


@triton.jit(do_not_specialize=["channels", "part"])
def _join(
    mean_0, mean_1, mean_2, mean_3, var_0, var_1, var_2, var_3, statistics, eps, channels, part,
    C: tl.constexpr,
):  # fmt: skip
    """The mean and 1 / sqrt(var + eps) of norms, whose parts of their channels take turns."""
    branch, branches = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * C + tl.arange(0, C)
    ok = c < channels
    mean = tl.load(of_branch(branch, mean_0, mean_1, mean_2, mean_3) + c, mask=ok, other=0.0)
    var = tl.load(of_branch(branch, var_0, var_1, var_2, var_3) + c, mask=ok, other=1.0)
    at = (c // part * branches + branch) * part + c % part
    tl.store(statistics + at, mean, mask=ok)
    tl.store(statistics + branches * channels + at, 1 / tl.sqrt(var + eps), mask=ok)


def join_running(running: Sequence[Tensor], eps: float, part: int) -> Tensor:
    """The mean and 1 / sqrt(var + eps) of N norms by their running statistics, [2, N C].

    Args:
        running: the norms' means, then their variances, [C].
        eps: see there.
        part: so many channels of the first norm come first, then as many of the second, and so on.
    """
    norms, channels = len(running) // 2, len(running[0])
    statistics = running[0].new_empty(2, norms * channels)
    _join[triton.cdiv(channels, 128), norms](
        *four(running[:norms]), *four(running[norms:]), statistics, eps, channels, part, C=128
    )
    return statistics


def four(values: Sequence[Any]) -> list[Any]:
    """The branches' values, and the last one in the place of those that are not there."""
    return [*values, *[values[-1]] * (4 - len(values))]


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
    """The operation, whose kernels run where its first tensor is; Triton asks PyTorch where.

    What was tried before first use may still not compile for other sizes.
    """

    @functools.wraps(function)
    def guarded(first: Tensor, *rest: Any) -> Any:
        try:
            with torch.cuda.device_of(first):
                return function(first, *rest)
        except triton.errors.TritonError as error:
            raise UserError(
                f"Triton makes no kernels of these sizes ({first_line(error)}): set the "
                "environment variable DARTSL_NATIVE=0, and PyTorch computes what they would."
            ) from error

    return guarded
