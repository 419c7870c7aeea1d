"""`dartsl.native.separable_sum` on a GPU, in Triton.

Shapes: B images, H x W pixels of x, H' x W' of the output, N output pixels B H' W', T branches of G
groups of I inputs and O outputs. All maps are in channels_last, in single or half precision;
weights, statistics and sums are in single precision.

A GPU too waits for its memory, and for kernels to begin: a pass through PyTorch's modules launches
twelve thousand of them, as cuDNN computes a pointwise convolution in groups one group at a time.
Here a kernel computes all branches of a level at once: convolutions of equal sizes beside each
other, each with weights, a kernel size and a dilation of its own. Neither a depthwise convolution
nor a normalized map that is only summed is kept.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dartsl.native import separable_sum
from dartsl.native.triton_sums import counters, is_last, parts_of, room, share, tile_of

MAX_BRANCHES = 4

# Numbers that no kernel is compiled anew for.
SIZES = [
    "pixels", "height", "width", "out_height", "out_width", "step", "tiles", "groups", "split",
    "summed", "programs", "sources", "all_groups", "channels", "all_channels", "begin", "size_0",
    "size_1", "size_2", "size_3", "dilation_0", "dilation_1", "dilation_2", "dilation_3",
]  # fmt: skip


@triton.jit
def _of_branch(branch, first, second, third, fourth):
    found = first
    if branch == 1:
        found = second
    elif branch == 2:
        found = third
    elif branch == 3:
        found = fourth
    return found


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
    x, depthwise_0, depthwise_1, depthwise_2, depthwise_3,
    pointwise_0, pointwise_1, pointwise_2, pointwise_3,
    size_0, size_1, size_2, size_3, dilation_0, dilation_1, dilation_2, dilation_3,
    y, partial, counter, statistics, eps,
    pixels, height, width, out_height, out_width, step, groups, tiles, channels,
    I: tl.constexpr, O: tl.constexpr, WIDEST: tl.constexpr, OWN: tl.constexpr, UNIT: tl.constexpr,
    P: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Y [N, T G O], and [3, T G O]: its mean, 1 / sqrt(var + eps) and variance without bias.

    A program takes `tiles` times P pixels of a group, which reads inputs of its OWN, or those that
    all read.
    """
    program, place_of_group = tl.program_id(0), tl.program_id(1)
    branch, group = place_of_group // groups, place_of_group % groups
    depthwise = _of_branch(branch, depthwise_0, depthwise_1, depthwise_2, depthwise_3)
    pointwise = _of_branch(branch, pointwise_0, pointwise_1, pointwise_2, pointwise_3)
    size = _of_branch(branch, size_0, size_1, size_2, size_3)
    dilation = _of_branch(branch, dilation_0, dilation_1, dilation_2, dilation_3)
    outputs = tl.num_programs(1) * O
    channels *= UNIT
    first_own = place_of_group * I if OWN else 0
    o, inner = tl.arange(0, BO), tl.arange(0, BI)
    count = 0.0
    mean = tl.zeros([BO], tl.float32)
    squares = tl.zeros([BO], tl.float32)
    for tile in range(tiles):
        p = (program * tiles + tile) * P + tl.arange(0, P)
        ok, b, h, w = tile_of(p, pixels, out_height, out_width)
        product = tl.zeros([P, BO], tl.float32)
        for first in range(0, I, BI):
            i = first + inner
            a = tl.zeros([P, BI], tl.float32)
            for line in range(size):
                row = h * step + dilation * (line - size // 2)
                for place in tl.static_range(WIDEST):
                    column = w * step + dilation * (place - size // 2)
                    found = _taken_in(
                        x, ok & (place < size), b, row, column, height, width, channels,
                        first_own, i, I,
                    )  # fmt: skip
                    tap_at = (group * I + i) * size * size + line * size + place
                    tap = tl.load(depthwise + tap_at, mask=(i < I) & (place < size), other=0.0)
                    a += _rectified(found) * tap[None, :]
            at = (group * O + o)[None, :] * I + i[:, None]
            weight = tl.load(pointwise + at, mask=(o < O)[None, :] & (i < I)[:, None], other=0.0)
            a, weight = a.to(y.dtype.element_ty), weight.to(y.dtype.element_ty)
            product = tl.dot(a, weight, product, input_precision="ieee")
        value = product.to(y.dtype.element_ty)
        at = p[:, None] * outputs + (place_of_group * O + o)[None, :]
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
    at = place_of_group * O + o
    tl.store(partial + program * 2 * outputs + at, mean, mask=o < O)
    tl.store(partial + (program * 2 + 1) * outputs + at, squares, mask=o < O)
    if is_last(counter, place_of_group):
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


@triton.jit
def _normalized(y, statistics, p, at, channels, mask, ok):
    """The normalized map at channels `at` of all, [P, C]."""
    mean = tl.load(statistics + at, mask=ok, other=0.0)
    inverse = tl.load(statistics + channels + at, mask=ok, other=0.0)
    value = tl.load(y + p[:, None] * channels + at[None, :], mask=mask, other=0.0).to(tl.float32)
    return (value - mean[None, :]) * inverse[None, :]


@triton.jit(do_not_specialize=SIZES)
def _normalize(
    y, statistics, output, pixels, channels, all_channels,
    UNIT: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """(y - mean) / sqrt(var + eps), [N, channels], of the first channels of y."""
    channels, all_channels = channels * UNIT, all_channels * UNIT
    p = tl.program_id(0) * P + tl.arange(0, P)
    c = tl.program_id(1) * C + tl.arange(0, C)
    mask = (p < pixels)[:, None] & (c < channels)[None, :]
    value = _normalized(y, statistics, p, c, all_channels, mask, c < channels)
    at = p[:, None] * channels + c[None, :]
    tl.store(output + at, value.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _sum_maps(
    first, first_statistics, second, second_statistics, scales, addend, output,
    pixels, channels,
    FIRST: tl.constexpr, BEHIND: tl.constexpr, SECOND: tl.constexpr, ADDED: tl.constexpr,
    UNIT: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The scaled sum [N, C'] of normalized maps.

    They are the FIRST of one, and the SECOND of the other, which stand BEHIND so many there.
    """
    channels *= UNIT
    first_channels, second_channels = FIRST * channels, (BEHIND + SECOND) * channels
    p = tl.program_id(0) * P + tl.arange(0, P)
    c = tl.program_id(1) * C + tl.arange(0, C)
    ok = c < channels
    mask = (p < pixels)[:, None] & ok[None, :]
    at = p[:, None] * channels + c[None, :]
    total = tl.zeros([P, C], tl.float32)
    if ADDED:
        total += tl.load(addend + at, mask=mask, other=0.0).to(tl.float32)
    for m in tl.static_range(FIRST):
        where = m * channels + c
        value = _normalized(first, first_statistics, p, where, first_channels, mask, ok)
        total += value * tl.load(scales + where, mask=ok, other=0.0)[None, :]
    for m in tl.static_range(SECOND):
        where = (BEHIND + m) * channels + c
        value = _normalized(second, second_statistics, p, where, second_channels, mask, ok)
        scale = tl.load(scales + (FIRST + m) * channels + c, mask=ok, other=0.0)
        total += value * scale[None, :]
    tl.store(output + at, total.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _sum_gradient(
    gradient, y, statistics, partial, counter, sums, products,
    pixels, tiles, channels, all_channels, begin,
    UNIT: tl.constexpr, P: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sums over all pixels of g [N, C'] and of g (y - mean) / sqrt(var + eps).

    Program m along the third axis does so for the C' channels of y from `begin` + m C' on.
    """
    program, block, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channels, all_channels, begin = channels * UNIT, all_channels * UNIT, begin * UNIT
    c = block * C + tl.arange(0, C)
    ok = c < channels
    at = begin + which * channels + c
    mean = tl.load(statistics + at, mask=ok, other=0.0)
    total = tl.zeros([C], tl.float32)
    product = tl.zeros([C], tl.float32)
    for tile in range(tiles):
        p = (program * tiles + tile) * P + tl.arange(0, P)
        mask = (p < pixels)[:, None] & ok[None, :]
        g = tl.load(gradient + p[:, None] * channels + c[None, :], mask=mask, other=0.0)
        g = g.to(tl.float32)
        around = tl.load(y + p[:, None] * all_channels + at[None, :], mask=mask, other=0.0)
        around = around.to(tl.float32) - mean[None, :]
        total += tl.sum(g, 0)
        product += tl.sum(g * around, 0)
    row = tl.num_programs(2) * channels
    where = which * channels + c
    tl.store(partial + program * 2 * row + where, total, mask=ok)
    tl.store(partial + (program * 2 + 1) * row + where, product, mask=ok)
    if is_last(counter, which * tl.num_programs(1) + block):
        programs = tl.num_programs(0)
        total = tl.zeros([C], tl.float32)
        product = tl.zeros([C], tl.float32)
        for start in range(0, programs, ROWS):
            of_g, of_both, _ = parts_of(
                partial, start, programs, row, where, pixels, tiles * P, ok, ROWS
            )
            total += tl.sum(of_g, 0)
            product += tl.sum(of_both, 0)
        inverse = tl.load(statistics + all_channels + at, mask=ok, other=0.0)
        tl.store(sums + at, total, mask=ok)
        tl.store(products + at, product * inverse, mask=ok)


@triton.jit(do_not_specialize=SIZES)
def _pointwise_backward(
    gradient, own_gradient, x, depthwise_0, depthwise_1, depthwise_2, depthwise_3,
    pointwise_0, pointwise_1, pointwise_2, pointwise_3,
    size_0, size_1, size_2, size_3, dilation_0, dilation_1, dilation_2, dilation_3,
    scale, y, statistics, sums, products, inner_gradient, partial,
    pixels, height, width, out_height, out_width, step, groups, split, tiles, channels,
    I: tl.constexpr, O: tl.constexpr, WIDEST: tl.constexpr, OWN: tl.constexpr, UNIT: tl.constexpr,
    SCALED: tl.constexpr, WEIGHTS: tl.constexpr, INNER: tl.constexpr,
    P: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The gradient [N, T G I] of the depthwise convolution, and programs' shares of the weights'.

    The first `split` groups have a gradient of their own each; the branches after them share
    theirs [N, G O], as they are scaled and summed. A program takes `tiles` times P pixels and BI
    inputs of a group.
    """
    program, place_of_group = tl.program_id(0), tl.program_id(1)
    all_groups = tl.num_programs(1)
    branch, group = place_of_group // groups, place_of_group % groups
    depthwise = _of_branch(branch, depthwise_0, depthwise_1, depthwise_2, depthwise_3)
    pointwise = _of_branch(branch, pointwise_0, pointwise_1, pointwise_2, pointwise_3)
    size = _of_branch(branch, size_0, size_1, size_2, size_3)
    dilation = _of_branch(branch, dilation_0, dilation_1, dilation_2, dilation_3)
    source, row_of_source, in_source = gradient, groups * O, group * O
    if place_of_group < split:
        source, row_of_source, in_source = own_gradient, split * O, place_of_group * O
    outputs = all_groups * O
    channels *= UNIT
    first_own = place_of_group * I if OWN else 0
    o = tl.arange(0, BO)
    i = tl.program_id(2) * BI + tl.arange(0, BI)
    at = place_of_group * O + o
    mean = tl.load(statistics + at, mask=o < O, other=0.0)
    inverse = tl.load(statistics + outputs + at, mask=o < O, other=0.0)
    mean_gradient = tl.load(sums + at, mask=o < O, other=0.0) / pixels
    slope = tl.load(products + at, mask=o < O, other=0.0) * inverse / pixels
    factor = inverse
    if SCALED:
        scaled = (o < O) & (place_of_group >= split)
        factor *= tl.load(scale + at - split * O, mask=scaled, other=1.0)
    weight_at = (group * O + o)[:, None] * I + i[None, :]
    weight_ok = (o < O)[:, None] & (i < I)[None, :]
    weight = tl.load(pointwise + weight_at, mask=weight_ok, other=0.0).to(y.dtype.element_ty)
    of_pointwise = tl.zeros([BO, BI], tl.float32)
    of_depthwise = tl.zeros([TAPS, BI], tl.float32)
    taps = tl.arange(0, TAPS)
    for tile in range(tiles):
        p = (program * tiles + tile) * P + tl.arange(0, P)
        ok, b, h, w = tile_of(p, pixels, out_height, out_width)
        mask = ok[:, None] & (o < O)[None, :]
        where = p[:, None] * row_of_source + (in_source + o)[None, :]
        g = tl.load(source + where, mask=mask, other=0.0).to(tl.float32)
        where = p[:, None] * outputs + at[None, :]
        around = tl.load(y + where, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        g = (g - mean_gradient[None, :] - around * slope[None, :]) * factor[None, :]
        g = tl.where(mask, g, 0.0).to(y.dtype.element_ty)
        of_a = tl.dot(g, weight, input_precision="ieee")
        if INNER:
            in_row = p[:, None] * (all_groups * I) + (place_of_group * I + i)[None, :]
            value = of_a.to(y.dtype.element_ty)
            tl.store(inner_gradient + in_row, value, mask=ok[:, None] & (i < I)[None, :])
        if WEIGHTS:
            a = tl.zeros([P, BI], tl.float32)
            for line in range(size):
                row = h * step + dilation * (line - size // 2)
                for place in tl.static_range(WIDEST):
                    column = w * step + dilation * (place - size // 2)
                    found = _taken_in(
                        x, ok & (place < size), b, row, column, height, width, channels,
                        first_own, i, I,
                    )  # fmt: skip
                    found = _rectified(found)
                    tap_at = (group * I + i) * size * size + line * size + place
                    tap = tl.load(depthwise + tap_at, mask=(i < I) & (place < size), other=0.0)
                    a += found * tap[None, :]
                    of_tap = tl.sum(found * of_a, 0)
                    here = (taps == line * size + place) & (place < size)
                    of_depthwise += tl.where(here[:, None], of_tap[None, :], 0.0)
            of_pointwise = tl.dot(
                tl.trans(g), a.to(y.dtype.element_ty), of_pointwise, input_precision="ieee"
            )
    if WEIGHTS:
        # [T, G O, I], then [T, G I, WIDEST^2].
        share = partial + program * all_groups * (O * I + I * WIDEST * WIDEST)
        tl.store(share + branch * groups * O * I + weight_at, of_pointwise, mask=weight_ok)
        share += all_groups * O * I
        where = (place_of_group * I + i)[None, :] * (WIDEST * WIDEST) + taps[:, None]
        mask = (taps < WIDEST * WIDEST)[:, None] & (i < I)[None, :]
        tl.store(share + where, of_depthwise, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _add_shares(
    partial, pointwise_0, pointwise_1, pointwise_2, pointwise_3,
    depthwise_0, depthwise_1, depthwise_2, depthwise_3,
    size_0, size_1, size_2, size_3, programs, groups,
    I: tl.constexpr, O: tl.constexpr, WIDEST: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradients of a branch's weights, of which each program has found a share."""
    branch, branches = tl.program_id(1), tl.num_programs(1)
    pointwise = _of_branch(branch, pointwise_0, pointwise_1, pointwise_2, pointwise_3)
    depthwise = _of_branch(branch, depthwise_0, depthwise_1, depthwise_2, depthwise_3)
    size = _of_branch(branch, size_0, size_1, size_2, size_3)
    of_pointwise, of_depthwise = groups * O * I, groups * I * WIDEST * WIDEST
    n = tl.program_id(0) * C + tl.arange(0, C)
    rest = n - of_pointwise
    where = branch * of_pointwise + n
    where = tl.where(rest < 0, where, branches * of_pointwise + branch * of_depthwise + rest)
    total = tl.zeros([C], tl.float32)
    for start in range(0, programs, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < programs)[:, None] & (rest < of_depthwise)[None, :]
        at = rows[:, None] * (branches * (of_pointwise + of_depthwise)) + where[None, :]
        total += tl.sum(tl.load(partial + at, mask=mask, other=0.0), 0)
    tl.store(pointwise + n, total, mask=rest < 0)
    tap = rest % (WIDEST * WIDEST)
    at = rest // (WIDEST * WIDEST) * size * size + tap
    tl.store(depthwise + at, total, mask=(rest >= 0) & (rest < of_depthwise) & (tap < size * size))


@triton.jit(do_not_specialize=SIZES)
def _depthwise_backward(
    inner_gradient, x, depthwise_0, depthwise_1, depthwise_2, depthwise_3,
    size_0, size_1, size_2, size_3, dilation_0, dilation_1, dilation_2, dilation_3, x_gradient,
    pixels, height, width, out_height, out_width, step, groups, summed, sources, all_groups,
    I: tl.constexpr, WIDEST: tl.constexpr, P: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """The gradient of x, [B H W, S I]: the sum over `summed` groups that have read the same."""
    channels, all_channels = sources * I, all_groups * I
    p = tl.program_id(0) * P + tl.arange(0, P)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    ok, b, h, w = tile_of(p, pixels, height, width)
    place_of_source = tl.program_id(2)
    total = tl.zeros([P, BI], tl.float32)
    for place_of_group in range(place_of_source, place_of_source + summed):
        branch, group = place_of_group // groups, place_of_group % groups
        depthwise = _of_branch(branch, depthwise_0, depthwise_1, depthwise_2, depthwise_3)
        size = _of_branch(branch, size_0, size_1, size_2, size_3)
        dilation = _of_branch(branch, dilation_0, dilation_1, dilation_2, dilation_3)
        for line in range(size):
            # Of output o, tap j has read pixel step o + dilation (j - K // 2); step is 1 or 2.
            row = h - dilation * (line - size // 2)
            there = ok & ((row & (step - 1)) == 0)
            for place in tl.static_range(WIDEST):
                column = w - dilation * (place - size // 2)
                found = _taken_in(
                    inner_gradient, there & ((column & (step - 1)) == 0) & (place < size), b,
                    row >> (step - 1), column >> (step - 1), out_height, out_width,
                    all_channels, place_of_group * I, i, I,
                )  # fmt: skip
                tap_at = (group * I + i) * size * size + line * size + place
                tap = tl.load(depthwise + tap_at, mask=(i < I) & (place < size), other=0.0)
                total += found * tap[None, :]
    at = p[:, None] * channels + (place_of_source * I + i)[None, :]
    mask = ok[:, None] & (i < I)[None, :]
    value = tl.load(x + at, mask=mask, other=0.0)
    total = tl.where(value <= 0, 0.0, total)
    tl.store(x_gradient + at, total.to(x_gradient.dtype.element_ty), mask=mask)


class Level:
    """Separable convolutions beside each other, from x to what is normalized.

    Args:
        x: [B, S I, H, W] in channels_last; S is 1 where all groups read the same, or T G.
        depthwise: weight of every branch, [G I, 1, K, K].
        pointwise: the same, [G O, I, 1, 1].
        stride: 1 or 2.
        dilations: of every branch.
    """

    block = 64  # pixels
    inner_block = 16  # inputs

    def __init__(
        self,
        x: Tensor,
        depthwise: Sequence[Tensor],
        pointwise: Sequence[Tensor],
        stride: int,
        dilations: Sequence[int],
    ) -> None:
        self.x, self.stride = x, stride
        self.depthwise = [tensor.contiguous() for tensor in depthwise]
        self.pointwise = [tensor.contiguous() for tensor in pointwise]
        self.branches = len(depthwise)
        self.inputs = pointwise[0].shape[1]
        self.groups = len(depthwise[0]) // self.inputs
        self.all_groups = self.branches * self.groups
        self.outputs = len(pointwise[0]) // self.groups
        self.kernels = [tensor.shape[-1] for tensor in depthwise]
        self.widest = max(self.kernels)
        self.dilations = dilations
        self.sources = x.shape[1] // self.inputs
        images, _, height, width = x.shape
        self.size = -(-height // stride), -(-width // stride)
        self.pixels = images * self.size[0] * self.size[1]
        self.programs, self.tiles = share(self.pixels, self.block, self.all_groups)

    def convolve(self, eps: float) -> tuple[Tensor, Tensor]:
        """Y [B, T G O, H', W'] and its statistics [3, T G O]."""
        channels = self.all_groups * self.outputs
        y = self.new_map(channels)
        statistics = self.pointwise[0].new_empty(3, channels)
        unit = _unit(self.x.shape[1])
        _forward[self.programs, self.all_groups](
            self.x, *_four(self.depthwise), *_four(self.pointwise), *_four(self.kernels),
            *_four(self.dilations), y, room(y, self.programs * 2 * channels), counters(y.device),
            statistics, eps, self.pixels, *self.x.shape[2:], *self.size, self.stride, self.groups,
            self.tiles, self.x.shape[1] // unit, self.inputs, self.outputs, self.widest,
            OWN=self.sources > 1, UNIT=unit, P=self.block, BI=self.inner_block, BO=self.outer_block,
            ROWS=max(1, 1024 // self.outer_block),
        )  # fmt: skip
        return y, statistics

    def backward(
        self,
        y: Tensor,
        statistics: Tensor,
        sums: tuple[Tensor, Tensor],
        gradient: Tensor,
        own_gradient: Tensor | None,
        scale: Tensor | None,
        of_x: bool,
        of_weights: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Gradients of x and of the weights; empty where they are not wanted.

        Args:
            y: of `convolve`.
            statistics: the same.
            sums: of `sum_gradient`.
            gradient: [B, G O, H', W'], of what branches are scaled and summed to.
            own_gradient: of the normalized maps of the first branches, which are not.
            scale: of the branches that are, one after the other; None for 1.
            of_x: whether that is wanted.
            of_weights: the same.
        """
        split = 0 if own_gradient is None else own_gradient.shape[1] // self.outputs
        inner_gradient = y.new_empty(self.pixels if of_x else 0, self.all_groups * self.inputs)
        numbers = self.outputs * self.inputs + self.inputs * self.widest**2
        partial = room(y, self.programs * self.all_groups * numbers if of_weights else 0)
        chunks = triton.cdiv(self.inputs, self.inner_block)
        unit = _unit(self.x.shape[1])
        _pointwise_backward[self.programs, self.all_groups, chunks](
            gradient, gradient if own_gradient is None else own_gradient, self.x,
            *_four(self.depthwise), *_four(self.pointwise), *_four(self.kernels),
            *_four(self.dilations), scale, y, statistics, *sums, inner_gradient, partial,
            self.pixels, *self.x.shape[2:], *self.size, self.stride, self.groups, split,
            self.tiles, self.x.shape[1] // unit, self.inputs, self.outputs, self.widest,
            OWN=self.sources > 1, UNIT=unit,
            SCALED=scale is not None, WEIGHTS=of_weights, INNER=of_x,
            P=self.block, BI=self.inner_block, BO=self.outer_block,
            TAPS=triton.next_power_of_2(self.widest**2),
        )  # fmt: skip
        of_depthwise: list[Tensor] = []
        of_pointwise: list[Tensor] = []
        if of_weights:
            of_depthwise = [torch.empty_like(weight) for weight in self.depthwise]
            of_pointwise = [torch.empty_like(weight) for weight in self.pointwise]
            _add_shares[triton.cdiv(self.groups * numbers, 64), self.branches](
                partial, *_four(of_pointwise), *_four(of_depthwise), *_four(self.kernels),
                self.programs, self.groups, self.inputs, self.outputs, self.widest, ROWS=64, C=64,
            )  # fmt: skip
        of_input = self.x.new_empty(0)
        if of_x:
            of_input = torch.empty_like(self.x)
            pixels = self.x.numel() // self.x.shape[1]
            _depthwise_backward[triton.cdiv(pixels, self.block), chunks, self.sources](
                inner_gradient, self.x, *_four(self.depthwise), *_four(self.kernels),
                *_four(self.dilations), of_input, pixels, *self.x.shape[2:], *self.size,
                self.stride, self.groups, self.all_groups // self.sources, self.sources,
                self.all_groups, self.inputs, self.widest,
                P=self.block, BI=self.inner_block,
            )  # fmt: skip
        return of_input, of_depthwise, of_pointwise

    def new_map(self, channels: int) -> Tensor:
        """[B, channels, H', W'], to be filled."""
        return torch.empty(
            (len(self.x), channels, *self.size),
            dtype=self.x.dtype,
            device=self.x.device,
            memory_format=torch.channels_last,
        )

    @property
    def outer_block(self) -> int:
        """Outputs of a group, as a power of two."""
        return max(16, triton.next_power_of_2(self.outputs))


def sum_gradient(
    gradient: Tensor,
    y: Tensor,
    statistics: Tensor,
    sums: tuple[Tensor, Tensor],
    begin: int = 0,
    maps: int = 1,
) -> None:
    """Fill in the sums over all pixels of g and of g times the normalized y.

    Args:
        gradient: g, [B, C, H', W'].
        y: [B, C', H', W'].
        statistics: its, [3, C'].
        sums: both [C'], of which the channels from `begin` on are filled, C for each map.
        begin: see there.
        maps: that have the same gradient.
    """
    channels = gradient.shape[1]
    block = min(64, triton.next_power_of_2(channels))
    blocks, rows = triton.cdiv(channels, block), 2048 // block
    pixels = y.numel() // y.shape[1]
    programs, tiles = share(pixels, rows, blocks * maps)
    unit = _unit(channels, y.shape[1], begin)
    _sum_gradient[programs, blocks, maps](
        gradient, y, statistics, room(y, programs * 2 * maps * channels), counters(y.device),
        *sums, pixels, tiles, channels // unit, y.shape[1] // unit, begin // unit,
        UNIT=unit, P=rows, C=block,
        ROWS=1024 // block,
    )  # fmt: skip


def normalize(y: Tensor, statistics: Tensor, output: Tensor) -> None:
    """Fill in the normalized first channels of y."""
    channels = output.shape[1]
    pixels, grid, blocks = _tiles(output)
    unit = _unit(channels, y.shape[1])
    _normalize[grid](
        y, statistics, output, pixels, channels // unit, y.shape[1] // unit, UNIT=unit, **blocks
    )


def forward(
    x: Tensor,
    scales: Tensor,
    addend: Tensor | None,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    dilations: Sequence[int],
    deep: int,
    stride: int,
    eps: float,
) -> list[Tensor]:
    """The sum over T chains of scale times normalized map, plus addend, and what is kept for it.

    Args:
        x: [B, C, H, W], which all chains read.
        scales: [T, G C].
        addend: [B, G C, H', W']; None for 0.
        depthwise: weights of the T chains, then of the second convolutions, [G C, 1, K, K].
        pointwise: the same, [G C, C, 1, 1].
        dilations: of all of these.
        deep: number of second convolutions; they belong to the first chains.
        stride: of the first convolutions.
        eps: is added to the variances.

    Returns:
        The sum; y [B, T G C, H', W'] of the first convolutions and its statistics [3, T G C]; the
        normalized maps of the deep chains, [B, deep G C, H', W'], their y and its statistics.
    """
    chains, channels = scales.shape
    x, addend = _channels_last(x), None if addend is None else _channels_last(addend)
    scales = scales.contiguous()
    first = Level(x, depthwise[:chains], pointwise[:chains], stride, dilations[:chains])
    y, statistics = first.convolve(eps)
    inner = first.new_map(deep * channels)
    deep_y, deep_statistics = inner, statistics[:, :0].contiguous()
    if deep:
        normalize(y, statistics, inner)
        second = Level(inner, depthwise[chains:], pointwise[chains:], 1, dilations[chains:])
        deep_y, deep_statistics = second.convolve(eps)
    else:
        deep_y = first.new_map(0)
    output = first.new_map(channels)
    pixels, grid, blocks = _tiles(output)
    unit = _unit(channels)
    _sum_maps[grid](
        deep_y, deep_statistics, y, statistics, scales, addend, output,
        pixels, channels // unit, FIRST=deep, BEHIND=deep, SECOND=chains - deep,
        ADDED=addend is not None, UNIT=unit, **blocks,
    )  # fmt: skip
    return [output, y, statistics, inner, deep_y, deep_statistics]


def backward(
    gradient: Tensor,
    x: Tensor,
    scales: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    kept: Sequence[Tensor],
    dilations: Sequence[int],
    deep: int,
    stride: int,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, of the scales, and of all weights where they are wanted.

    Args:
        gradient: of the sum, [B, G C, H', W'].
        x: as it was given to `forward`, and so is all that is not named here.
        scales: see there.
        depthwise: see there.
        pointwise: see there.
        kept: what it returned behind the sum.
        dilations: see there.
        deep: see there.
        stride: see there.
        wanted: those of x and of the weights.
    """
    y, statistics, inner, deep_y, deep_statistics = kept
    of_x, of_weights = wanted
    chains, channels = scales.shape
    x, gradient, scales = _channels_last(x), _channels_last(gradient), scales.contiguous()
    sums = statistics.new_empty(chains * channels), statistics.new_empty(chains * channels)
    own_gradient: Tensor | None = None
    of_scales = sums[1].view_as(scales)
    of_deep: list[list[Tensor]] = [[], []]
    if deep < chains:
        sum_gradient(gradient, y, statistics, sums, deep * channels, chains - deep)
    if deep:
        deep_sums = sums[0].new_empty(deep * channels), sums[0].new_empty(deep * channels)
        sum_gradient(gradient, deep_y, deep_statistics, deep_sums, maps=deep)
        of_scales = torch.cat([deep_sums[1].view(deep, -1), of_scales[deep:]])
        if of_x or of_weights:
            second = Level(inner, depthwise[chains:], pointwise[chains:], 1, dilations[chains:])
            own_gradient, *of_deep = second.backward(
                deep_y, deep_statistics, deep_sums, gradient, None, scales[:deep], True, of_weights
            )
            sum_gradient(own_gradient, y, statistics, sums)
    if not (of_x or of_weights):
        return [x.new_empty(0), of_scales]
    first = Level(x, depthwise[:chains], pointwise[:chains], stride, dilations[:chains])
    scale = scales[deep:] if deep < chains else None
    of_input, of_depthwise, of_pointwise = first.backward(
        y, statistics, sums, gradient, own_gradient, scale, of_x, of_weights
    )
    return [of_input, of_scales, *of_depthwise, *of_deep[0], *of_pointwise, *of_deep[1]]


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _four(values: Sequence[Any]) -> list[Any]:
    """The branches' values, and the last one in the place of those that are not there."""
    return [*values, *[values[-1]] * (MAX_BRANCHES - len(values))]


def _unit(*numbers: int) -> int:
    """What a kernel may know that all of these are multiples of: it reads so much at once."""
    return math.gcd(16, *numbers)


def _tiles(output: Tensor) -> tuple[int, tuple[int, int], dict[str, int]]:
    """Pixels, and how a map is parted among programs."""
    channels = output.shape[1]
    pixels = output.numel() // channels
    block = min(128, triton.next_power_of_2(channels))
    rows = 4096 // block
    return (
        pixels,
        (triton.cdiv(pixels, rows), triton.cdiv(channels, block)),
        {"P": rows, "C": block},
    )


torch.library.impl(separable_sum.FORWARD, "CUDA", forward)
torch.library.impl(separable_sum.BACKWARD, "CUDA", backward)
