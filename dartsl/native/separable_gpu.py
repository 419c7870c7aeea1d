"""`dartsl.native.separable` on a GPU, in Triton.

Shapes: B images, H x W pixels of x, H' x W' of the output, G groups of I inputs and O outputs, N
pixels B H' W'. All maps are in channels_last, in single or half precision; weights, statistics and
sums are in single precision.

A GPU too waits for its memory, and for kernels to begin: a pass through PyTorch's modules launches
twelve thousand of them, as cuDNN computes a pointwise convolution in groups one group at a time.
Here an operation takes two kernels forward and four back. Neither the depthwise convolution nor the
normalized map is kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dartsl.native import separable
from dartsl.native.triton_sums import counters, is_last, parts_of, room, share, tile_of


# Numbers that no kernel is compiled anew for.
SIZES = [
    "pixels", "height", "width", "out_height", "out_width", "step", "dilation", "tiles",
]  # fmt: skip


@triton.jit
def _taken_in(x, ok, b, row, column, height, width, stride, first, i, I: tl.constexpr):
    """Pixels of x, 0 outside, [P, I']."""
    ok = ok & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    at = ((b * height + row) * width + column)[:, None] * stride + (first + i)[None, :]
    return tl.load(x + at, mask=ok[:, None] & (i < I)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _rectified(x):
    return tl.where(x < 0, 0.0, x)  # NaN stays


@triton.jit(do_not_specialize=SIZES)
def _forward(
    x, depthwise, pointwise, y, partial, counter, statistics, eps,
    pixels, height, width, out_height, out_width, step, dilation, tiles, channels, own,
    I: tl.constexpr, O: tl.constexpr, K: tl.constexpr,
    P: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y [N, G O], and [3, G O]: its mean, 1 / sqrt(var + eps) and variance without bias.

    A program takes `tiles` times P pixels of a group, which reads x from channel `own` times its
    number on.
    """
    program, group = tl.program_id(0), tl.program_id(1)
    outputs = tl.num_programs(1) * O
    o, inner = tl.arange(0, BO), tl.arange(0, BI)
    first = group * own
    count = 0.0
    mean = tl.zeros([BO], tl.float32)
    squares = tl.zeros([BO], tl.float32)
    for tile in range(tiles):
        p = (program * tiles + tile) * P + tl.arange(0, P)
        ok, b, h, w = tile_of(p, pixels, out_height, out_width)
        product = tl.zeros([P, BO], tl.float32)
        for begin in tl.static_range(0, I, BI):
            i = begin + inner
            a = tl.zeros([P, BI], tl.float32)
            for line in range(K):
                row = h * step + dilation * (line - K // 2)
                for place in tl.static_range(K):
                    column = w * step + dilation * (place - K // 2)
                    found = _taken_in(x, ok, b, row, column, height, width, channels, first, i, I)
                    tap_at = (group * I + i) * (K * K) + line * K + place
                    tap = tl.load(depthwise + tap_at, mask=i < I, other=0.0)
                    a += _rectified(found) * tap[None, :]
            at = (group * O + o)[None, :] * I + i[:, None]
            weight = tl.load(pointwise + at, mask=(o < O)[None, :] & (i < I)[:, None], other=0.0)
            a, weight = a.to(y.dtype.element_ty), weight.to(y.dtype.element_ty)
            product = tl.dot(a, weight, product, input_precision="ieee")
        value = product.to(y.dtype.element_ty)
        at = p[:, None] * outputs + (group * O + o)[None, :]
        tl.store(y + at, value, mask=ok[:, None] & (o < O)[None, :])
        # Moments around the mean of so many pixels, joined (Chan et al., 1979).
        value = value.to(tl.float32)
        number = tl.sum(ok.to(tl.float32))
        of_tile = tl.sum(tl.where(ok[:, None], value, 0.0), 0) / tl.maximum(number, 1.0)
        around = tl.where(ok[:, None], value - of_tile[None, :], 0.0)
        share = number / tl.maximum(count + number, 1.0)
        squares += tl.sum(around * around, 0) + (of_tile - mean) * (of_tile - mean) * count * share
        mean += (of_tile - mean) * share
        count += number
    at = group * O + o
    tl.store(partial + program * 2 * outputs + at, mean, mask=o < O)
    tl.store(partial + (program * 2 + 1) * outputs + at, squares, mask=o < O)
    if is_last(counter, group):
        programs = tl.num_programs(0)
        mean = tl.zeros([BO], tl.float32)
        squares = tl.zeros([BO], tl.float32)
        for begin in range(0, programs, ROWS):
            means, _, counts = parts_of(
                partial, begin, programs, outputs, at, pixels, tiles * P, o < O, ROWS
            )
            mean += tl.sum(means * counts, 0)
        mean /= pixels
        for begin in range(0, programs, ROWS):
            means, sums, counts = parts_of(
                partial, begin, programs, outputs, at, pixels, tiles * P, o < O, ROWS
            )
            around = means - mean[None, :]
            squares += tl.sum(sums + counts * around * around, 0)
        tl.store(statistics + at, mean, mask=o < O)
        tl.store(statistics + outputs + at, 1 / tl.sqrt(squares / pixels + eps), mask=o < O)
        tl.store(statistics + 2 * outputs + at, squares / (pixels - 1), mask=o < O)


@triton.jit(do_not_specialize=SIZES)
def _normalize(
    y, statistics, scale, bias, addend, output, pixels, channels,
    SCALED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """scale (y - mean) inverse + bias + addend, all [N, C']."""
    p = tl.program_id(0) * P + tl.arange(0, P)
    c = tl.program_id(1) * C + tl.arange(0, C)
    mask = (p < pixels)[:, None] & (c < channels)[None, :]
    at = p[:, None] * channels + c[None, :]
    factor = tl.load(statistics + channels + c, mask=c < channels, other=0.0)
    if SCALED:
        factor *= tl.load(scale + c, mask=c < channels, other=0.0)
    mean = tl.load(statistics + c, mask=c < channels, other=0.0)
    value = (tl.load(y + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * factor[None, :]
    if BIASED:
        value += tl.load(bias + c, mask=c < channels, other=0.0)[None, :]
    if ADDED:
        value += tl.load(addend + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + at, value.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _sum_gradient(
    gradient, y, statistics, partial, counter, sums, products, pixels, channels, tiles,
    P: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sums [C'] over all pixels of g and of g (y - mean) / sqrt(var + eps)."""
    program, block = tl.program_id(0), tl.program_id(1)
    c = block * C + tl.arange(0, C)
    mean = tl.load(statistics + c, mask=c < channels, other=0.0)
    total = tl.zeros([C], tl.float32)
    product = tl.zeros([C], tl.float32)
    for tile in range(tiles):
        p = (program * tiles + tile) * P + tl.arange(0, P)
        mask = (p < pixels)[:, None] & (c < channels)[None, :]
        at = p[:, None] * channels + c[None, :]
        g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(g, 0)
        around = tl.load(y + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        product += tl.sum(g * around, 0)
    tl.store(partial + program * 2 * channels + c, total, mask=c < channels)
    tl.store(partial + (program * 2 + 1) * channels + c, product, mask=c < channels)
    if is_last(counter, block):
        programs = tl.num_programs(0)
        total = tl.zeros([C], tl.float32)
        product = tl.zeros([C], tl.float32)
        for begin in range(0, programs, ROWS):
            of_g, of_both, _ = parts_of(
                partial, begin, programs, channels, c, pixels, tiles * P, c < channels, ROWS
            )
            total += tl.sum(of_g, 0)
            product += tl.sum(of_both, 0)
        inverse = tl.load(statistics + channels + c, mask=c < channels, other=0.0)
        tl.store(sums + c, total, mask=c < channels)
        tl.store(products + c, product * inverse, mask=c < channels)


@triton.jit(do_not_specialize=SIZES)
def _pointwise_backward(
    gradient, x, depthwise, pointwise, scale, y, statistics, sums, products, inner_gradient,
    partial,
    pixels, height, width, out_height, out_width, step, dilation, tiles, channels, own,
    I: tl.constexpr, O: tl.constexpr, K: tl.constexpr,
    SCALED: tl.constexpr, WEIGHTS: tl.constexpr, INNER: tl.constexpr,
    P: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The gradient [N, G I] of the depthwise convolution, and each program's share of the weights'.

    A program takes `tiles` times P pixels and BI inputs of a group.
    """
    program, group = tl.program_id(0), tl.program_id(1)
    groups = tl.num_programs(1)
    outputs = groups * O
    o = tl.arange(0, BO)
    i = tl.program_id(2) * BI + tl.arange(0, BI)
    at = group * O + o
    mean = tl.load(statistics + at, mask=o < O, other=0.0)
    inverse = tl.load(statistics + outputs + at, mask=o < O, other=0.0)
    mean_gradient = tl.load(sums + at, mask=o < O, other=0.0) / pixels
    slope = tl.load(products + at, mask=o < O, other=0.0) * inverse / pixels
    factor = inverse
    if SCALED:
        factor *= tl.load(scale + at, mask=o < O, other=0.0)
    weight_at = (group * O + o)[:, None] * I + i[None, :]
    weight_ok = (o < O)[:, None] & (i < I)[None, :]
    weight = tl.load(pointwise + weight_at, mask=weight_ok, other=0.0).to(y.dtype.element_ty)
    first = group * own
    of_pointwise = tl.zeros([BO, BI], tl.float32)
    of_depthwise = tl.zeros([TAPS, BI], tl.float32)
    taps = tl.arange(0, TAPS)
    for tile in range(tiles):
        p = (program * tiles + tile) * P + tl.arange(0, P)
        ok, b, h, w = tile_of(p, pixels, out_height, out_width)
        mask = ok[:, None] & (o < O)[None, :]
        where = p[:, None] * outputs + at[None, :]
        g = tl.load(gradient + where, mask=mask, other=0.0).to(tl.float32)
        around = tl.load(y + where, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        g = (g - mean_gradient[None, :] - around * slope[None, :]) * factor[None, :]
        g = tl.where(mask, g, 0.0).to(y.dtype.element_ty)
        of_a = tl.dot(g, weight, input_precision="ieee")
        if INNER:
            where = p[:, None] * (groups * I) + (group * I + i)[None, :]
            value = of_a.to(y.dtype.element_ty)
            tl.store(inner_gradient + where, value, mask=ok[:, None] & (i < I)[None, :])
        if WEIGHTS:
            a = tl.zeros([P, BI], tl.float32)
            for line in range(K):
                row = h * step + dilation * (line - K // 2)
                for place in tl.static_range(K):
                    column = w * step + dilation * (place - K // 2)
                    found = _taken_in(x, ok, b, row, column, height, width, channels, first, i, I)
                    found = _rectified(found)
                    tap = line * K + place
                    at_tap = (group * I + i) * (K * K) + tap
                    a += found * tl.load(depthwise + at_tap, mask=i < I, other=0.0)[None, :]
                    of_tap = tl.sum(found * of_a, 0)
                    of_depthwise += tl.where((taps == tap)[:, None], of_tap[None, :], 0.0)
            of_pointwise = tl.dot(
                tl.trans(g), a.to(y.dtype.element_ty), of_pointwise, input_precision="ieee"
            )
    if WEIGHTS:
        size = groups * (O * I + I * K * K)
        tl.store(partial + program * size + weight_at, of_pointwise, mask=weight_ok)
        where = (group * I + i)[None, :] * (K * K) + taps[:, None] + groups * O * I
        mask = (taps < K * K)[:, None] & (i < I)[None, :]
        tl.store(partial + program * size + where, of_depthwise, mask=mask)


@triton.jit(do_not_specialize=["size", "split", "programs"])
def _add_parts(partial, first, second, size, split, programs, ROWS: tl.constexpr, C: tl.constexpr):
    """The sum of [programs, size]: its first `split` numbers, and the others."""
    at = tl.program_id(0) * C + tl.arange(0, C)
    total = tl.zeros([C], tl.float32)
    for begin in range(0, programs, ROWS):
        rows = begin + tl.arange(0, ROWS)
        mask = (rows < programs)[:, None] & (at < size)[None, :]
        total += tl.sum(tl.load(partial + rows[:, None] * size + at[None, :], mask=mask, other=0.0), 0)
    tl.store(first + at, total, mask=at < split)
    tl.store(second + at - split, total, mask=(at >= split) & (at < size))


@triton.jit(do_not_specialize=[*SIZES, "summed"])
def _depthwise_backward(
    inner_gradient, x, depthwise, x_gradient,
    pixels, height, width, out_height, out_width, step, dilation, summed, channels, all_channels,
    I: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """The gradient of x, [B H W, S I]: the sum over the groups where all read the same."""
    p = tl.program_id(0) * P + tl.arange(0, P)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    ok, b, h, w = tile_of(p, pixels, height, width)
    source = tl.program_id(2)
    total = tl.zeros([P, BI], tl.float32)
    for group in range(source, source + summed):
        for line in range(K):
            # Of output o, tap j has read pixel step o + dilation (j - K // 2); step is 1 or 2.
            row = h - dilation * (line - K // 2)
            there = ok & ((row & (step - 1)) == 0)
            for place in tl.static_range(K):
                column = w - dilation * (place - K // 2)
                found = _taken_in(
                    inner_gradient, there & ((column & (step - 1)) == 0), b,
                    row >> (step - 1), column >> (step - 1), out_height, out_width,
                    all_channels, group * I, i, I,
                )  # fmt: skip
                at = (group * I + i) * (K * K) + line * K + place
                total += found * tl.load(depthwise + at, mask=i < I, other=0.0)[None, :]
    at = p[:, None] * channels + (source * I + i)[None, :]
    mask = ok[:, None] & (i < I)[None, :]
    value = tl.load(x + at, mask=mask, other=0.0)
    total = tl.where(value <= 0, 0.0, total)
    tl.store(x_gradient + at, total.to(x_gradient.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    addend: Tensor | None,
    stride: int,
    dilation: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dartsl.native.separable.forward`."""
    output, y, statistics = found = separable._results(x, depthwise, pointwise, stride)
    x, depthwise, pointwise, scale, bias, addend = map(
        separable._dense, (x, depthwise, pointwise, scale, bias, addend)
    )
    sizes = _Sizes(x, depthwise, pointwise, y)
    programs, tiles = share(sizes.pixels, sizes.block, sizes.groups)
    channels = len(pointwise)
    _forward[programs, sizes.groups](
        x, depthwise, pointwise, y, room(x, programs * 2 * channels), counters(x.device),
        statistics, eps, sizes.pixels, *sizes.maps, stride, dilation, tiles, *sizes.channels,
        *sizes.kernel,
        P=sizes.block, BI=sizes.inner_block, BO=sizes.outer_block, ROWS=64,
    )  # fmt: skip
    block = min(128, triton.next_power_of_2(channels))
    rows = 4096 // block
    _normalize[triton.cdiv(sizes.pixels, rows), triton.cdiv(channels, block)](
        y, statistics, scale, bias, addend, output, sizes.pixels, channels,
        SCALED=scale is not None, BIASED=bias is not None, ADDED=addend is not None,
        P=rows, C=block,
    )  # fmt: skip
    return found


def backward(
    gradient: Tensor,
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    statistics: Tensor,
    stride: int,
    dilation: int,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """See `dartsl.native.separable.backward`."""
    of_x, of_depthwise, of_pointwise, *_ = wanted
    of_weights = of_depthwise or of_pointwise
    gradient, x, depthwise, pointwise, scale, y = map(
        separable._dense, (gradient, x, depthwise, pointwise, scale, y)
    )
    sizes = _Sizes(x, depthwise, pointwise, y)
    programs, tiles = share(sizes.pixels, sizes.block, sizes.groups)
    channels = len(pointwise)
    block = min(64, triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, block)
    rows = 2048 // block
    adders, row_tiles = share(sizes.pixels, rows, blocks)
    of_bias, of_scale = statistics.new_empty(channels), statistics.new_empty(channels)
    _sum_gradient[adders, blocks](
        gradient, y, statistics, room(x, adders * 2 * channels), counters(x.device),
        of_bias, of_scale, sizes.pixels, channels, row_tiles, P=rows, C=block, ROWS=64,
    )  # fmt: skip
    found = [x.new_empty(0), depthwise.new_empty(0), pointwise.new_empty(0), of_scale, of_bias]
    if not (of_x or of_weights):
        return found
    inner_gradient = x.new_empty(sizes.pixels if of_x else 0, sizes.groups * sizes.inputs)
    size = pointwise.numel() + depthwise.numel()
    partial = room(x, programs * size if of_weights else 0)
    chunks = triton.cdiv(sizes.inputs, sizes.inner_block)
    _pointwise_backward[programs, sizes.groups, chunks](
        gradient, x, depthwise, pointwise, scale, y, statistics, of_bias, of_scale,
        inner_gradient, partial, sizes.pixels, *sizes.maps, stride, dilation, tiles,
        *sizes.channels, *sizes.kernel, SCALED=scale is not None, WEIGHTS=of_weights, INNER=of_x,
        P=sizes.block, BI=sizes.inner_block, BO=sizes.outer_block,
        TAPS=triton.next_power_of_2(sizes.width**2),
    )  # fmt: skip
    if of_weights:
        found[1], found[2] = torch.empty_like(depthwise), torch.empty_like(pointwise)
        _add_parts[(triton.cdiv(size, 64),)](
            partial, found[2], found[1], size, pointwise.numel(), programs, ROWS=64, C=64
        )
    if of_x:
        found[0] = torch.empty_like(x)
        pixels = x.numel() // x.shape[1]
        sources = x.shape[1] // sizes.inputs
        _depthwise_backward[triton.cdiv(pixels, sizes.block), chunks, sources](
            inner_gradient, x, depthwise, found[0], pixels, *sizes.maps, stride, dilation,
            sizes.groups // sources, x.shape[1], len(depthwise), sizes.inputs, sizes.width,
            P=sizes.block, BI=sizes.inner_block,
        )  # fmt: skip
    return found


class _Sizes:
    """What the kernels are told of their maps, and how the work is parted."""

    block = 64  # pixels
    inner_block = 16  # inputs

    def __init__(self, x: Tensor, depthwise: Tensor, pointwise: Tensor, y: Tensor) -> None:
        self.inputs, self.width = pointwise.shape[1], depthwise.shape[-1]
        self.groups = len(depthwise) // self.inputs
        outputs = len(pointwise) // self.groups
        self.outer_block = max(16, triton.next_power_of_2(outputs))
        self.pixels = y.numel() // y.shape[1]
        self.maps = *x.shape[2:], *y.shape[2:]
        shared = x.shape[1] < len(depthwise)
        self.channels = x.shape[1], 0 if shared else self.inputs
        self.kernel = self.inputs, outputs, self.width


torch.library.impl(separable.FORWARD, "CUDA", forward)
torch.library.impl(separable.BACKWARD, "CUDA", backward)
