"""`dartsl.native.pools` on a GPU, in Triton.

Shapes: B images, C channels, H x W pixels of x, H' x W' of the output, N output pixels B H' W', k
edges, M maps. All maps are in channels_last, in single or half precision; weights, statistics and
sums are in single precision. As in `pools.h`, a normalized map is never in memory.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dartsl.native import pools
from dartsl.native.triton_sums import (
    add_moments,
    are_there,
    counters,
    finish_moments,
    is_last,
    join_running,
    no_moments,
    on_its_device,
    room,
    rows_at_once,
    share,
    store_moments,
    tile_of,
    tiles_of,
    two_totals,
)

# Numbers that no kernel is compiled anew for.
SIZES = ["pixels", "tiles", "edges"]


@triton.jit
def _pixel(x, ok, b, row, column, height: tl.constexpr, width: tl.constexpr, channels, c):
    """Pixels of x [P, C], and which of them there are [P]."""
    ok = ok & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    at = ((b * height + row) * width + column)[:, None] * channels + c[None, :]
    found = tl.load(x + at, mask=ok[:, None] & (c < channels)[None, :], other=0.0)
    return found.to(tl.float32), ok


@triton.jit
def _window(
    x, ok, b, h, w, height: tl.constexpr, width: tl.constexpr, step: tl.constexpr, channels, c,
    P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The highest of 3 x 3 pixels, which of them it is first, and their average."""
    highest = tl.full([P, C], float("-inf"), tl.float32)
    first = tl.zeros([P, C], tl.int32)
    total = tl.zeros([P, C], tl.float32)
    number = tl.zeros([P], tl.float32)
    for tap in tl.static_range(9):
        value, there = _pixel(
            x, ok, b, h * step + tap // 3 - 1, w * step + tap % 3 - 1, height, width, channels, c
        )
        higher = there[:, None] & ((value > highest) | (value != value))
        highest = tl.where(higher, value, highest)
        first = tl.where(higher, tap, first)
        total += value
        number += there.to(tl.float32)
    return highest, first, total / tl.maximum(number, 1.0)[:, None]


@triton.jit(do_not_specialize=SIZES)
def _pool(
    x, y, partial, counter, statistics, eps,
    pixels, tiles, channels,
    height: tl.constexpr, width: tl.constexpr,
    out_height: tl.constexpr, out_width: tl.constexpr, step: tl.constexpr,
    MAXIMUM: tl.constexpr, AVERAGE: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The pools [N, (MAXIMUM + AVERAGE) C], and their statistics."""
    program, block = tl.program_id(0), tl.program_id(1)
    c = block * C + tl.arange(0, C)
    all_channels = (MAXIMUM + AVERAGE) * channels
    second = MAXIMUM * channels + c  # where the average is
    count, mean, squares = no_moments(P, C, False)
    average_count, average_mean, average_squares = count, mean, squares
    for tile in range(tiles_of(program, tiles, pixels, P)):
        p = (program * tiles + tile) * P + tl.arange(0, P)
        ok = are_there(p, pixels, WHOLE)
        b, h, w = tile_of(p, out_height, out_width)
        mask = ok[:, None] & (c < channels)[None, :]
        highest, _, average = _window(x, ok, b, h, w, height, width, step, channels, c, P, C)
        if MAXIMUM:
            at = p[:, None] * all_channels + c[None, :]
            tl.store(y + at, highest.to(y.dtype.element_ty), mask=mask)
            count, mean, squares = add_moments(highest, ok, count, mean, squares, P, C, False)
        if AVERAGE:
            at = p[:, None] * all_channels + second[None, :]
            tl.store(y + at, average.to(y.dtype.element_ty), mask=mask)
            average_count, average_mean, average_squares = add_moments(
                average, ok, average_count, average_mean, average_squares, P, C, False
            )
    there = c < channels
    if MAXIMUM:
        store_moments(partial, count, mean, squares, all_channels, c, there, P, C, False)
    if AVERAGE:
        store_moments(
            partial, average_count, average_mean, average_squares, all_channels, second, there,
            P, C, False,
        )  # fmt: skip
    if is_last(counter, block, tl.num_programs(0)):
        size, ok = tiles * P, c < channels
        if MAXIMUM:
            finish_moments(partial, statistics, pixels, size, all_channels, c, ok, eps, C, ROWS)
        if AVERAGE:
            finish_moments(
                partial, statistics, pixels, size, all_channels, second, ok, eps, C, ROWS
            )


@triton.jit
def _normalize(value, statistics, at, row, ok):
    """The channels `at` of a map, by their means and what stands a row behind these."""
    mean = tl.load(statistics + at, mask=ok, other=0.0)
    inverse = tl.load(statistics + row + at, mask=ok, other=0.0)
    return (value - mean[None, :]) * inverse[None, :]


@triton.jit(do_not_specialize=[*SIZES, "step"])
def _weigh(
    x, y, statistics, weights, output, pixels, edges, step, channels,
    IDENTITY: tl.constexpr, MAXIMUM: tl.constexpr, AVERAGE: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Of every edge the weighted sum of the maps, [N, k C].

    Its statistics are `step` numbers behind those of the edge before.
    """
    p = tl.program_id(0) * P + tl.arange(0, P)
    c = tl.program_id(1) * C + tl.arange(0, C)
    mask = (p < pixels)[:, None] & (c < channels)[None, :]
    all_channels = (MAXIMUM + AVERAGE) * channels
    second = MAXIMUM * channels + c
    maps: tl.constexpr = IDENTITY + MAXIMUM + AVERAGE
    if IDENTITY:
        own = tl.load(x + p[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
    row, ok = p[:, None] * all_channels, c < channels
    if MAXIMUM:
        highest = tl.load(y + row + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if AVERAGE:
        average = tl.load(y + row + second[None, :], mask=mask, other=0.0).to(tl.float32)
    behind = all_channels + (edges - 1) * step  # the statistics of all edges
    for e in range(edges):
        total = tl.zeros([P, C], tl.float32)
        if IDENTITY:
            total += tl.load(weights + e * maps) * own
        if MAXIMUM:
            weight = tl.load(weights + e * maps + IDENTITY)
            total += weight * _normalize(highest, statistics + e * step, c, behind, ok)
        if AVERAGE:
            weight = tl.load(weights + e * maps + IDENTITY + MAXIMUM)
            total += weight * _normalize(average, statistics + e * step, second, behind, ok)
        at = p[:, None] * (edges * channels) + (e * channels + c)[None, :]
        tl.store(output + at, total.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _normalized(y, statistics, p, at, channels, mask, ok):
    value = tl.load(y + p[:, None] * channels + at[None, :], mask=mask, other=0.0).to(tl.float32)
    return _normalize(value, statistics, at, channels, ok)


@triton.jit(do_not_specialize=SIZES)
def _sum_edges(
    gradient, x, y, statistics, partial, counter, totals, pixels, tiles, channels,
    IDENTITY: tl.constexpr, MAXIMUM: tl.constexpr, AVERAGE: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """[4, k C]: the sums over all pixels of an edge's gradient g, and of g times every map."""
    program, block, edge = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    edges = tl.num_programs(2)
    c = block * C + tl.arange(0, C)
    ok = c < channels
    all_channels = (MAXIMUM + AVERAGE) * channels
    second = MAXIMUM * channels + c
    # By place in a tile, so that nothing waits for other pixels before the end.
    total = tl.zeros([P, C], tl.float32)
    of_own = tl.zeros([P, C], tl.float32)
    of_highest = tl.zeros([P, C], tl.float32)
    of_average = tl.zeros([P, C], tl.float32)
    for tile in tl.range(tiles_of(program, tiles, pixels, P), loop_unroll_factor=2):
        p = (program * tiles + tile) * P + tl.arange(0, P)
        mask = (p < pixels)[:, None] & ok[None, :]
        at = p[:, None] * (edges * channels) + (edge * channels + c)[None, :]
        g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
        total += g
        if IDENTITY:
            at = p[:, None] * channels + c[None, :]
            of_own += g * tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if MAXIMUM:
            value = _normalized(y, statistics, p, c, all_channels, mask, ok)
            of_highest += g * value
        if AVERAGE:
            value = _normalized(y, statistics, p, second, all_channels, mask, ok)
            of_average += g * value
    at = edge * channels + c
    size = edges * channels
    row = partial + program * 4 * size
    tl.store(row + at, tl.sum(total, 0), mask=ok)
    tl.store(row + size + at, tl.sum(of_own, 0), mask=ok)
    tl.store(row + 2 * size + at, tl.sum(of_highest, 0), mask=ok)
    tl.store(row + 3 * size + at, tl.sum(of_average, 0), mask=ok)
    if is_last(counter, edge * tl.num_programs(1) + block, tl.num_programs(0)):
        total_0, total_1 = two_totals(partial, size, 4 * size, at, ok, C, ROWS)
        total_2, total_3 = two_totals(partial, size, 4 * size, 2 * size + at, ok, C, ROWS)
        tl.store(totals + at, total_0, mask=ok)
        tl.store(totals + size + at, total_1, mask=ok)
        tl.store(totals + 2 * size + at, total_2, mask=ok)
        tl.store(totals + 3 * size + at, total_3, mask=ok)


@triton.jit
def _of_map(
    gradient, weights, totals, p, c, mask, ok, pixels, channels, edges, value, inverse,
    MAP: tl.constexpr, MAPS: tl.constexpr, PART: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradient of a pool, from those of the edges, and from its normalized value."""
    found = tl.zeros([P, C], tl.float32)
    total = tl.zeros([C], tl.float32)
    product = tl.zeros([C], tl.float32)
    size = edges * channels
    for e in range(edges):
        weight = tl.load(weights + e * MAPS + MAP)
        at = e * channels + c
        g = tl.load(gradient + p[:, None] * size + at[None, :], mask=mask, other=0.0)
        found += weight * g.to(tl.float32)
        total += weight * tl.load(totals + at, mask=ok, other=0.0)
        product += weight * tl.load(totals + PART * size + at, mask=ok, other=0.0)
    around = found - (total / pixels)[None, :] - value * (product / pixels)[None, :]
    return around * inverse[None, :]


@triton.jit(do_not_specialize=SIZES)
def _of_maps(
    gradient, x, y, statistics, weights, totals, found, first,
    pixels, edges, channels,
    height: tl.constexpr, width: tl.constexpr,
    out_height: tl.constexpr, out_width: tl.constexpr, step: tl.constexpr,
    IDENTITY: tl.constexpr, MAXIMUM: tl.constexpr, AVERAGE: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The maps' gradients [3, N, C], the average's for each of its pixels.

    And of every maximum which pixel has it first, [N, C].
    """
    p = tl.program_id(0) * P + tl.arange(0, P)
    c = tl.program_id(1) * C + tl.arange(0, C)
    ok = p < pixels
    b, h, w = tile_of(p, out_height, out_width)
    there = c < channels
    mask = ok[:, None] & there[None, :]
    all_channels = (MAXIMUM + AVERAGE) * channels
    maps: tl.constexpr = IDENTITY + MAXIMUM + AVERAGE
    at = p[:, None] * channels + c[None, :]
    if IDENTITY:
        total = tl.zeros([P, C], tl.float32)
        for e in range(edges):
            where = p[:, None] * (edges * channels) + (e * channels + c)[None, :]
            g = tl.load(gradient + where, mask=mask, other=0.0).to(tl.float32)
            total += tl.load(weights + e * maps) * g
        tl.store(found + at, total, mask=mask)
    if MAXIMUM:
        _, which, _ = _window(x, ok, b, h, w, height, width, step, channels, c, P, C)
        tl.store(first + at, which.to(tl.int8), mask=mask)
        value = _normalized(y, statistics, p, c, all_channels, mask, there)
        inverse = tl.load(statistics + all_channels + c, mask=there, other=0.0)
        total = _of_map(
            gradient, weights, totals, p, c, mask, there, pixels, channels, edges, value, inverse,
            IDENTITY, maps, 2, P, C,
        )  # fmt: skip
        tl.store(found + pixels * channels + at, total, mask=mask)
    if AVERAGE:
        second = MAXIMUM * channels + c
        value = _normalized(y, statistics, p, second, all_channels, mask, there)
        inverse = tl.load(statistics + all_channels + second, mask=there, other=0.0)
        total = _of_map(
            gradient, weights, totals, p, c, mask, there, pixels, channels, edges, value, inverse,
            IDENTITY + MAXIMUM, maps, 3, P, C,
        )  # fmt: skip
        top, left = h * step - 1, w * step - 1
        rows = tl.minimum(top + 3, height) - tl.maximum(top, 0)
        number = rows * (tl.minimum(left + 3, width) - tl.maximum(left, 0))
        total /= tl.maximum(number, 1).to(tl.float32)[:, None]
        tl.store(found + 2 * pixels * channels + at, total, mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "out_pixels"])
def _gather(
    found, first, x_gradient, pixels, out_pixels, channels,
    height: tl.constexpr, width: tl.constexpr,
    out_height: tl.constexpr, out_width: tl.constexpr, step: tl.constexpr,
    IDENTITY: tl.constexpr, MAXIMUM: tl.constexpr, AVERAGE: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradient of x, [B H W, C], from those of the windows that a pixel is in."""
    p = tl.program_id(0) * P + tl.arange(0, P)
    c = tl.program_id(1) * C + tl.arange(0, C)
    ok = p < pixels
    b, h, w = tile_of(p, height, width)
    mask = ok[:, None] & (c < channels)[None, :]
    at = p[:, None] * channels + c[None, :]
    total = tl.zeros([P, C], tl.float32)
    if IDENTITY:
        total += tl.load(found + at, mask=mask, other=0.0)
    plane = out_pixels * channels
    for tap in tl.static_range(9):
        row, column = h + 1 - tap // 3, w + 1 - tap % 3  # of the window whose pixel `tap` it is
        there = ok & (row >= 0) & (column >= 0)
        there = there & (((row | column) & (step - 1)) == 0)  # step is 1 or 2
        row, column = row >> (step - 1), column >> (step - 1)
        there = there & (row < out_height) & (column < out_width)
        where = ((b * out_height + row) * out_width + column)[:, None] * channels + c[None, :]
        mask_there = there[:, None] & (c < channels)[None, :]
        if MAXIMUM:
            which = tl.load(first + where, mask=mask_there, other=-1)
            g = tl.load(found + plane + where, mask=mask_there, other=0.0)
            total += tl.where(which == tap, g, 0.0)
        if AVERAGE:
            total += tl.load(found + 2 * plane + where, mask=mask_there, other=0.0)
    tl.store(x_gradient + at, total.to(x_gradient.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    weights: Tensor,
    maps: Sequence[int],
    stride: int,
    eps: float,
    running: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dartsl.native.pools.forward`."""
    output, y, statistics = made = pools._results(x, weights, maps, stride)
    x, weights = x.contiguous(memory_format=torch.channels_last), weights.contiguous()
    identity, *kinds = maps
    channels, pixels = x.shape[1], output.numel() // output.shape[1]
    block, columns, rows = _blocks(channels)
    programs, tiles = share(pixels, rows, columns)
    _pool[programs, columns](
        x, y, room(x, programs * 2 * y.shape[1]), counters(x.device), statistics, eps,
        pixels, tiles, channels, *x.shape[2:], *y.shape[2:], stride, *kinds,
        P=rows, C=block, ROWS=rows_at_once(block), WHOLE=pixels % rows == 0,
    )  # fmt: skip
    used, step = statistics, 0  # the same for all edges
    if running:
        used, step = join_running(running, eps, channels), y.shape[1]
    _weigh[triton.cdiv(pixels, rows), columns](
        x, y, used, weights, output, pixels, len(weights), step, channels,
        identity, *kinds, P=rows, C=block,
    )  # fmt: skip
    return made


def backward(
    gradient: Tensor,
    x: Tensor,
    weights: Tensor,
    y: Tensor,
    statistics: Tensor,
    maps: Sequence[int],
    stride: int,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """See `dartsl.native.pools.backward`."""
    gradient, x, y = (
        tensor.contiguous(memory_format=torch.channels_last) for tensor in (gradient, x, y)
    )
    weights = weights.contiguous()
    of_x, of_weights = wanted
    channels, edges, pixels = x.shape[1], len(weights), gradient.numel() // gradient.shape[1]
    block, columns, rows = _blocks(channels)
    programs, tiles = share(pixels, rows, columns * edges)
    totals = room(x, 4 * edges * channels)
    _sum_edges[programs, columns, edges](
        gradient, x, y, statistics, room(x, programs * totals.numel()), counters(x.device), totals,
        pixels, tiles, channels, *maps, P=rows, C=block, ROWS=rows_at_once(block),
    )  # fmt: skip
    found = [x.new_empty(0), weights.new_empty(0)]
    if of_weights:
        products = totals.view(4, edges, channels).sum(-1)
        columns_of_maps = [products[1 + kind] for kind, is_map in enumerate(maps) if is_map]
        found[1] = torch.stack(columns_of_maps, dim=1)
    if of_x:
        found[0] = torch.empty_like(x)
        of_maps = room(x, 3 * pixels * channels)
        first = torch.empty(pixels * channels, dtype=torch.int8, device=x.device)
        sizes = *x.shape[2:], *y.shape[2:], stride
        _of_maps[triton.cdiv(pixels, rows), columns](
            gradient, x, y, statistics, weights, totals, of_maps, first,
            pixels, edges, channels, *sizes, *maps, P=rows, C=block,
        )  # fmt: skip
        x_pixels = x.numel() // channels
        _gather[triton.cdiv(x_pixels, rows), columns](
            of_maps, first, found[0], x_pixels, pixels, channels, *sizes, *maps, P=rows, C=block,
        )  # fmt: skip
    return found


def _blocks(channels: int) -> tuple[int, int, int]:
    """Channels that a program takes, the programs that takes, and pixels: what registers hold."""
    block = min(32, max(8, triton.next_power_of_2(channels)))
    return block, triton.cdiv(channels, block), 1024 // block


torch.library.impl(pools.FORWARD, "CUDA", on_its_device(forward))
torch.library.impl(pools.BACKWARD, "CUDA", on_its_device(backward))
