"""`dartsl.native.separable_sum` on a GPU, in Triton.

Shapes: B images, H x W pixels of x, H' x W' of the output, N output pixels B H' W', T branches of G
groups of I inputs and O outputs, both C here. All maps are in channels_last, in single or half
precision; weights, statistics and sums are in single precision.

A GPU waits for kernels to begin: a pass through PyTorch's modules launches twelve thousand, as
cuDNN computes a pointwise convolution in groups one group at a time. Here a kernel computes all
branches of a level at once: convolutions of equal sizes beside each other, each with weights, a
kernel size and a dilation of its own.

And it waits for all that is not a product of matrices. A depthwise and a pointwise convolution,
both linear, are one convolution, whose kernel is the product of theirs:

    W[(tap, i), o] = depthwise[i, tap] pointwise[o, i].

It takes O times the multiplications, on tensor cores, where they take less time than the depthwise
convolution alone elsewhere. What would be between the two is never computed, and the gradients of
both weights are sums over that of W. Nor is a normalized map kept that is only summed. (In float16
W is one product, rounded, where two numbers were: what is below 6e-8 vanishes.)
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from dartsl.native import separable_sum
from dartsl.native.separable_sum import MAX_CHAINS
from dartsl.native.triton_sums import (
    MULTIPROCESSORS,
    add_moments,
    are_there,
    counters,
    finish_moments,
    four,
    is_last,
    join_running,
    no_moments,
    of_branch,
    on_its_device,
    room,
    rows_at_once,
    share,
    store_moments,
    tile_of,
    tiles_of,
    two_totals,
)

REACH = tl.constexpr(7)  # from a kernel's middle: a dilation of 2 and a size of 7 are 6
# Numbers that no kernel is compiled anew for.
SIZES = [
    "pixels", "numbers", "tiles", "groups", "members", "blocks", "split", "summed", "programs",
    "sources", "units", "rows", "channels", "all_channels", "first_channels", "second_channels",
    "begin", "size_0", "size_1", "size_2", "size_3",
    "dilation_0", "dilation_1", "dilation_2", "dilation_3",
]  # fmt: skip


@triton.jit
def _taps_before(branch, size_0, size_1, size_2):
    """Of the branches before this one, whose matrices stand before its own."""
    taps = 0
    if branch > 0:
        taps += size_0 * size_0
    if branch > 1:
        taps += size_1 * size_1
    if branch > 2:
        taps += size_2 * size_2
    return taps


@triton.jit
def _over(number, divisor):
    """`number // divisor`, which takes a GPU 20 instructions.

    For a divisor up to MAX_GROUPS, and numbers up to what MAX_GROUPS and the largest kernel make.
    """
    return (number * ((1 << 20) // divisor + 1)) >> 20


@triton.jit
def _beyond(ok, row, column, H: tl.constexpr, W: tl.constexpr):
    """Which rows and columns up to REACH from a pixel are outside of the map, as bits; see `_bits`.

    Where there is no such pixel, all are.
    """
    top, left = tl.maximum(-row, -REACH) + REACH, tl.maximum(-column, -REACH) + REACH
    bottom = tl.minimum(H - 1 - row, REACH) + REACH
    right = tl.minimum(W - 1 - column, REACH) + REACH
    rows, columns = (2 << bottom) - (1 << top), (2 << right) - (1 << left)
    return tl.where(ok, ~(rows | columns << (2 * REACH + 1)), -1)


@triton.jit
def _bits(ok, down, right):
    """The bits of what is so far from a pixel; if not ok, one that is always set."""
    return tl.where(ok, (1 << (down + REACH)) | (1 << (right + 3 * REACH + 1)), 1 << 30)


@triton.jit
def _middles(p, ok, row_size, H: tl.constexpr, W: tl.constexpr, STRIDE: tl.constexpr):
    """Where the middles of output pixels' kernels are in memory, and what is outside there."""
    b, h, w = tile_of(p, (H - 1) // STRIDE + 1, (W - 1) // STRIDE + 1)
    row, column = h * STRIDE, w * STRIDE
    return ((b * H + row) * W + column) * row_size, _beyond(ok, row, column, H, W)


@triton.jit
def _steps(k, depth, size, dilation, row_size, W: tl.constexpr, I: tl.constexpr):
    """How far from a kernel's middle in memory is what rows k of W multiply, and its bits."""
    tap = k // I
    row = _over(tap, size)
    down, right = dilation * (row - size // 2), dilation * (tap - row * size - size // 2)
    return (down * W + right) * row_size + k % I, _bits(k < depth, down, right)


@triton.jit
def _around(x, at, beyond, step_at, bits):
    """Of x, for pixels [P] and steps [K] away from them, [P, K]; 0 outside.

    A pixel is `at` a place in memory, and what is a step away stands `step_at` numbers behind it.
    """
    there = (beyond[:, None] & bits[None, :]) == 0
    return tl.load((x + at)[:, None] + step_at[None, :], mask=there, other=0.0)


@triton.jit
def _input_of(unit, sources, I: tl.constexpr):
    """The first channel of x that a unit reads: there is a source for each, or one for all."""
    first = unit * I
    if sources == 1:
        first = 0
    return first


@triton.jit(do_not_specialize=SIZES)
def _compose(
    depthwise_0, depthwise_1, depthwise_2, depthwise_3,
    pointwise_0, pointwise_1, pointwise_2, pointwise_3,
    size_0, size_1, size_2, size_3, matrices, groups,
    I: tl.constexpr, O: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """W of all branches, [K^2 I, G O] each, one below the other."""
    branch = tl.program_id(2)
    depthwise = of_branch(branch, depthwise_0, depthwise_1, depthwise_2, depthwise_3)
    pointwise = of_branch(branch, pointwise_0, pointwise_1, pointwise_2, pointwise_3)
    size = of_branch(branch, size_0, size_1, size_2, size_3)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    tap, i = k // I, k % I
    mask = (tap < size * size)[:, None] & (o < groups * O)[None, :]
    at = ((o // O * I)[None, :] + i[:, None]) * size * size + tap[:, None]
    value = tl.load(depthwise + at, mask=mask, other=0.0)
    value *= tl.load(pointwise + o[None, :] * I + i[:, None], mask=mask, other=0.0)
    row = _taps_before(branch, size_0, size_1, size_2) * I + k
    value = value.to(matrices.dtype.element_ty)
    tl.store(matrices + row[:, None] * (groups * O) + o[None, :], value, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _convolve(
    x, matrices, size_0, size_1, size_2, size_3, dilation_0, dilation_1, dilation_2, dilation_3,
    y, partial, counter, statistics, eps,
    pixels, groups, members, blocks, sources, tiles,
    H: tl.constexpr, W: tl.constexpr, STRIDE: tl.constexpr, I: tl.constexpr, O: tl.constexpr,
    P: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Y [N, T G O], and [3, T G O]: its mean, 1 / sqrt(var + eps) and variance without bias.

    A unit is `members` groups of a branch that read the same one of the `sources`. A program takes
    `tiles` times P pixels, and one of the `blocks` of a unit's outputs.
    """
    program, place = tl.program_id(0), tl.program_id(1)
    unit, block = place // blocks, place % blocks
    branch, first_group = unit * members // groups, unit * members % groups
    size = of_branch(branch, size_0, size_1, size_2, size_3)
    dilation = of_branch(branch, dilation_0, dilation_1, dilation_2, dilation_3)
    outputs = tl.num_programs(1) // blocks * members * O
    o = block * BO + tl.arange(0, BO)
    o_ok = o < members * O
    x += _input_of(unit, sources, I)
    first_row = _taps_before(branch, size_0, size_1, size_2) * I
    depth = size * size * I
    count, mean, squares = no_moments(P, BO, True)
    for tile in range(tiles_of(program, tiles, pixels, P)):
        p = (program * tiles + tile) * P + tl.arange(0, P)
        ok = are_there(p, pixels, WHOLE)
        origin, beyond = _middles(p, ok, sources * I, H, W, STRIDE)
        product = tl.zeros([P, BO], tl.float32)
        for begin in range(0, depth, BK):
            k = begin + tl.arange(0, BK)
            step_at, bits = _steps(k, depth, size, dilation, sources * I, W, I)
            found = _around(x, origin, beyond, step_at, bits)
            at = (first_row + k)[:, None] * (groups * O) + (first_group * O + o)[None, :]
            weight = tl.load(matrices + at, mask=(k < depth)[:, None] & o_ok[None, :], other=0.0)
            product = tl.dot(found, weight, product, input_precision=PRECISION)
        at = p[:, None] * outputs + (unit * members * O + o)[None, :]
        tl.store(y + at, product.to(y.dtype.element_ty), mask=ok[:, None] & o_ok[None, :])
        # Of what is not rounded: to go there and back takes a GPU long.
        count, mean, squares = add_moments(product, ok, count, mean, squares, P, BO, True)
    at = unit * members * O + o
    store_moments(partial, count, mean, squares, outputs, at, o_ok, P, BO, True)
    if is_last(counter, place, tl.num_programs(0)):
        finish_moments(partial, statistics, pixels, tiles * P, outputs, at, o_ok, eps, BO, ROWS)


@triton.jit
def _normalized(y, statistics, p, at, channels, mask, ok):
    """The normalized map at channels `at` of all, [P, C]."""
    mean = tl.load(statistics + at, mask=ok, other=0.0)
    inverse = tl.load(statistics + channels + at, mask=ok, other=0.0)
    value = tl.load(y + p[:, None] * channels + at[None, :], mask=mask, other=0.0).to(tl.float32)
    return (value - mean[None, :]) * inverse[None, :]


@triton.jit(do_not_specialize=SIZES)
def _rectify(
    y, statistics, scales, shifts, output, pixels, channels, all_channels,
    AFFINE: tl.constexpr, UNIT: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The rectified [N, channels] of the first channels of y, normalized, AFFINE also scaled."""
    channels, all_channels = channels * UNIT, all_channels * UNIT
    p = tl.program_id(0) * P + tl.arange(0, P)
    c = tl.program_id(1) * C + tl.arange(0, C)
    mask = (p < pixels)[:, None] & (c < channels)[None, :]
    value = _normalized(y, statistics, p, c, all_channels, mask, c < channels)
    if AFFINE:
        value *= tl.load(scales + c, mask=c < channels, other=0.0)[None, :]
        value += tl.load(shifts + c, mask=c < channels, other=0.0)[None, :]
    value = tl.where(value < 0, 0.0, value)  # NaN stays
    at = p[:, None] * channels + c[None, :]
    tl.store(output + at, value.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _sum_maps(
    first, first_statistics, second, second_statistics, scales, shift, addend, output,
    pixels, channels,
    FIRST: tl.constexpr, SECOND: tl.constexpr, AFFINE: tl.constexpr, ADDED: tl.constexpr,
    UNIT: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The scaled sum [N, C'] of normalized maps, AFFINE shifted.

    They are the FIRST of one, and the SECOND of the other, which stand behind so many there.
    """
    channels *= UNIT
    first_channels, second_channels = FIRST * channels, (FIRST + SECOND) * channels
    p = tl.program_id(0) * P + tl.arange(0, P)
    c = tl.program_id(1) * C + tl.arange(0, C)
    ok = c < channels
    mask = (p < pixels)[:, None] & ok[None, :]
    at = p[:, None] * channels + c[None, :]
    total = tl.zeros([P, C], tl.float32)
    if AFFINE:
        total += tl.load(shift + c, mask=ok, other=0.0)[None, :]
    if ADDED:
        total += tl.load(addend + at, mask=mask, other=0.0).to(tl.float32)
    for m in tl.static_range(FIRST):
        where = m * channels + c
        value = _normalized(first, first_statistics, p, where, first_channels, mask, ok)
        total += value * tl.load(scales + where, mask=ok, other=0.0)[None, :]
    for m in tl.static_range(SECOND):
        where = (FIRST + m) * channels + c
        value = _normalized(second, second_statistics, p, where, second_channels, mask, ok)
        total += value * tl.load(scales + where, mask=ok, other=0.0)[None, :]
    tl.store(output + at, total.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _sum_gradient(
    gradient, first, first_statistics, second, second_statistics, partial, counter, sums, products,
    pixels, tiles, channels, first_channels, second_channels, begin, split,
    UNIT: tl.constexpr, P: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sums over all pixels of g [N, C'], and of g times a normalized map, for every map.

    Program m along the third axis does so for map m of the first, which has `split` of them, or of
    the second from channel `begin` on.
    """
    program, block, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channels, begin = channels * UNIT, begin * UNIT
    c = block * C + tl.arange(0, C)
    ok = c < channels
    y, statistics, all_channels = second, second_statistics, second_channels * UNIT
    at = begin + (which - split) * channels + c
    if which < split:
        y, statistics, all_channels = first, first_statistics, first_channels * UNIT
        at = which * channels + c
    mean = tl.load(statistics + at, mask=ok, other=0.0)
    # By place in a tile, so that nothing waits for other pixels before the end.
    totals = tl.zeros([P, C], tl.float32)
    products_of = tl.zeros([P, C], tl.float32)
    for tile in tl.range(tiles_of(program, tiles, pixels, P), loop_unroll_factor=2):
        p = (program * tiles + tile) * P + tl.arange(0, P)
        mask = (p < pixels)[:, None] & ok[None, :]
        g = tl.load(gradient + p[:, None] * channels + c[None, :], mask=mask, other=0.0)
        g = g.to(tl.float32)
        around = tl.load(y + p[:, None] * all_channels + at[None, :], mask=mask, other=0.0)
        totals += g
        products_of += g * (around.to(tl.float32) - mean[None, :])
    row = tl.num_programs(2) * channels
    where = which * channels + c
    tl.store(partial + program * 2 * row + where, tl.sum(totals, 0), mask=ok)
    tl.store(partial + (program * 2 + 1) * row + where, tl.sum(products_of, 0), mask=ok)
    if is_last(counter, which * tl.num_programs(1) + block, tl.num_programs(0)):
        total, product = two_totals(partial, row, 2 * row, where, ok, C, ROWS)
        inverse = tl.load(statistics + all_channels + at, mask=ok, other=0.0)
        tl.store(sums + where, total, mask=ok)
        tl.store(products + where, product * inverse, mask=ok)


@triton.jit(do_not_specialize=SIZES)
def _denormalize(
    gradient, sums, products, scales, own_gradient, own_sums, own_products, own_scales,
    y, statistics, output, pixels, channels, split,
    SCALED: tl.constexpr, UNIT: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradient of y [N, M C'] by those of its M normalized maps.

    The first `split` maps have a gradient of their own each, of what they are SCALED to; those
    after them share theirs [N, C'], as they are scaled and summed. The sums are those of
    `_sum_gradient`, for all maps that share theirs `sums` and `products`. Program m along the third
    axis takes map m.
    """
    channels *= UNIT
    which, all_channels = tl.program_id(2), tl.num_programs(2) * channels
    p = tl.program_id(0) * P + tl.arange(0, P)
    c = tl.program_id(1) * C + tl.arange(0, C)
    at, ok = which * channels + c, c < channels
    source, row, in_row = gradient, channels, c
    if which < split:
        source, row, in_row = own_gradient, split * channels, at
        sums, products, scales = own_sums, own_products, own_scales
    mask = (p < pixels)[:, None] & ok[None, :]
    mean = tl.load(statistics + at, mask=ok, other=0.0)
    inverse = tl.load(statistics + all_channels + at, mask=ok, other=0.0)
    of_mean = tl.load(sums + at, mask=ok, other=0.0) / pixels
    slope = tl.load(products + at, mask=ok, other=0.0) * inverse / pixels
    factor = inverse
    factor *= tl.load(scales + at, mask=ok & (SCALED | (which >= split)), other=1.0)
    g = tl.load(source + p[:, None] * row + in_row[None, :], mask=mask, other=0.0)
    where = p[:, None] * all_channels + at[None, :]
    around = tl.load(y + where, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    g = (g.to(tl.float32) - of_mean[None, :] - around * slope[None, :]) * factor[None, :]
    tl.store(output + where, g.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _gradient_of_matrices(
    gradient, x, size_0, size_1, size_2, size_3, dilation_0, dilation_1, dilation_2, dilation_3,
    partial, pixels, groups, members, blocks, sources, tiles, rows,
    H: tl.constexpr, W: tl.constexpr, STRIDE: tl.constexpr, I: tl.constexpr, O: tl.constexpr,
    P: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs' shares of the gradient of W, of all branches, by that of Y.

    A program takes BK rows of W and, as in `_convolve`, pixels and outputs.
    """
    program, place = tl.program_id(0), tl.program_id(2)
    unit, block = place // blocks, place % blocks
    branch, first_group = unit * members // groups, unit * members % groups
    size = of_branch(branch, size_0, size_1, size_2, size_3)
    dilation = of_branch(branch, dilation_0, dilation_1, dilation_2, dilation_3)
    outputs = tl.num_programs(2) // blocks * members * O
    o = block * BO + tl.arange(0, BO)
    o_ok = o < members * O
    x += _input_of(unit, sources, I)
    depth = size * size * I
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    step_at, bits = _steps(k, depth, size, dilation, sources * I, W, I)
    if tl.program_id(1) * BK < depth:
        total = tl.zeros([BK, BO], tl.float32)
        for tile in range(tiles_of(program, tiles, pixels, P)):
            p = (program * tiles + tile) * P + tl.arange(0, P)
            ok = are_there(p, pixels, WHOLE)
            origin, beyond = _middles(p, ok, sources * I, H, W, STRIDE)
            found = _around(x, origin, beyond, step_at, bits)
            at = p[:, None] * outputs + (unit * members * O + o)[None, :]
            g = tl.load(gradient + at, mask=ok[:, None] & o_ok[None, :], other=0.0)
            total = tl.dot(tl.trans(found), g, total, input_precision=PRECISION)
        row = program * rows + _taps_before(branch, size_0, size_1, size_2) * I + k
        at = row[:, None] * (groups * O) + (first_group * O + o)[None, :]
        tl.store(partial + at, total, mask=(k < depth)[:, None] & o_ok[None, :])


@triton.jit(do_not_specialize=SIZES)
def _decompose(
    partial, depthwise_0, depthwise_1, depthwise_2, depthwise_3,
    pointwise_0, pointwise_1, pointwise_2, pointwise_3,
    of_depthwise_0, of_depthwise_1, of_depthwise_2, of_depthwise_3,
    of_pointwise_0, of_pointwise_1, of_pointwise_2, of_pointwise_3,
    size_0, size_1, size_2, size_3, programs, rows,
    I: tl.constexpr, O: tl.constexpr, TAPS: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """The gradients of a group's weights at one of its inputs, by programs' shares of that of W."""
    i, group, branch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(1)
    size = of_branch(branch, size_0, size_1, size_2, size_3)
    first_row = _taps_before(branch, size_0, size_1, size_2) * I
    tap, o = tl.arange(0, TAPS), tl.arange(0, BO)
    ok = (tap < size * size)[:, None] & (o < O)[None, :]
    at = (first_row + tap * I + i)[:, None] * (groups * O) + (group * O + o)[None, :]
    total = tl.zeros([TAPS, BO], tl.float32)
    for start in range(0, programs, 4):
        for part in tl.static_range(4):  # loads that do not wait for each other
            here = partial + (start + part) * rows * (groups * O)
            total += tl.load(here + at, mask=ok & (start + part < programs), other=0.0)
    depthwise = of_branch(branch, depthwise_0, depthwise_1, depthwise_2, depthwise_3)
    pointwise = of_branch(branch, pointwise_0, pointwise_1, pointwise_2, pointwise_3)
    tap_at = (group * I + i) * size * size + tap
    o_at = (group * O + o) * I + i
    of_tap = tl.load(depthwise + tap_at, mask=tap < size * size, other=0.0)
    of_output = tl.load(pointwise + o_at, mask=o < O, other=0.0)
    depthwise = of_branch(branch, of_depthwise_0, of_depthwise_1, of_depthwise_2, of_depthwise_3)
    pointwise = of_branch(branch, of_pointwise_0, of_pointwise_1, of_pointwise_2, of_pointwise_3)
    tl.store(depthwise + tap_at, tl.sum(total * of_output[None, :], 1), mask=tap < size * size)
    tl.store(pointwise + o_at, tl.sum(total * of_tap[:, None], 0), mask=o < O)


@triton.jit
def _store_rectified(x_gradient, x, at, value, mask):
    """The gradient of what x was rectified from, by its own."""
    value = tl.where(tl.load(x + at, mask=mask, other=0.0) <= 0, 0.0, value)
    tl.store(x_gradient + at, value.to(x_gradient.dtype.element_ty), mask=mask)


@triton.jit
def _taps_of(odd, size, dilation, STRIDE: tl.constexpr):
    """Of a kernel's rows, those that read even or odd ones: the first, every which, how many."""
    first, every, number = 0, 1, size
    if STRIDE == 2:
        if dilation == 1:
            first, every = (odd + size // 2) % 2, 2
            number = (size - first + 1) // 2
        elif odd == 1:  # with a dilation of 2, all read even ones
            number = 0
    return first, every, number


@triton.jit(do_not_specialize=SIZES)
def _gradient_of_input(
    gradient, matrices, size_0, size_1, size_2, size_3,
    dilation_0, dilation_1, dilation_2, dilation_3, x, partial, counter, x_gradient,
    pixels, numbers, groups, members, units, summed,
    H: tl.constexpr, W: tl.constexpr, STRIDE: tl.constexpr, I: tl.constexpr, O: tl.constexpr,
    P: tl.constexpr, BK: tl.constexpr, BI: tl.constexpr, APART: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of what x [B H W, S I] was rectified from, by that of Y.

    It is the sum over the `summed` units of outputs that have read the same inputs; APART, a
    program computes one unit's part, and the last of them adds them.
    """
    source, outputs = tl.program_id(2), units * members * O
    begin_unit, end_unit = source, source + summed
    if APART:
        source, begin_unit, end_unit = 0, tl.program_id(2), tl.program_id(2) + 1
    # With a stride of 2, every tap has read pixels of one kind alone, by whether their row and
    # their column are even; a program takes pixels of one kind.
    place, below, beside = tl.program_id(0), 0, 0
    if STRIDE == 2:
        place, below, beside = place // 4, place // 2 % 2, place % 2
    p = place * P + tl.arange(0, P)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    height: tl.constexpr = (H - 1) // STRIDE + 1
    width: tl.constexpr = (W - 1) // STRIDE + 1
    ok = are_there(p, pixels, WHOLE)
    b, h, w = tile_of(p, height, width)
    beyond = _beyond(ok, h, w, height, width)
    total = tl.zeros([P, BI], tl.float32)
    for unit in range(begin_unit, end_unit):
        branch, first_group = unit * members // groups, unit * members % groups
        size = of_branch(branch, size_0, size_1, size_2, size_3)
        dilation = of_branch(branch, dilation_0, dilation_1, dilation_2, dilation_3)
        first_row = _taps_before(branch, size_0, size_1, size_2) * I
        first_tap, every, rows = _taps_of(below, size, dilation, STRIDE)
        left_tap, every, columns = _taps_of(beside, size, dilation, STRIDE)
        depth = rows * columns * members * O
        for begin in range(0, depth, BK):
            k = begin + tl.arange(0, BK)
            step = _over(k // O, members)
            o = k - step * (members * O)
            of_row = _over(step, tl.maximum(columns, 1))
            tap_row = first_tap + every * of_row
            tap_column = left_tap + every * (step - of_row * columns)
            # Of output pixel q, tap j has read pixel STRIDE q + dilation (j - K // 2).
            down = (below - dilation * (tap_row - size // 2)) >> (STRIDE - 1)
            right = (beside - dilation * (tap_column - size // 2)) >> (STRIDE - 1)
            step_at = (down * width + right) * outputs + unit * members * O + o
            bits = _bits(k < depth, down, right)
            g = _around(gradient, p * outputs, beyond, step_at, bits)
            at = (first_row + (tap_row * size + tap_column) * I)[:, None] + i[None, :]
            at = at * (groups * O) + (first_group * O + o)[:, None]
            mask = (k < depth)[:, None] & (i < I)[None, :]
            weight = tl.load(matrices + at, mask=mask, other=0.0)
            total = tl.dot(g, weight, total, input_precision=PRECISION)
    if STRIDE == 2:
        h, w = h * 2 + below, w * 2 + beside
        ok = ok & (h < H) & (w < W)
        p = (b * H + h) * W + w
    mask = ok[:, None] & (i < I)[None, :]
    if APART:
        at = p[:, None] * I + i[None, :]
        tl.store(partial + begin_unit * numbers + at, total, mask=mask)
        group = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if is_last(counter, group, summed):
            total = tl.zeros([P, BI], tl.float32)
            for unit in range(summed):
                where = partial + unit * numbers + at
                total += tl.load(where, mask=mask, other=0.0, cache_modifier=".cg")
            _store_rectified(x_gradient, x, at, total, mask)
    else:
        at = p[:, None] * (tl.num_programs(2) * I) + (source * I + i)[None, :]
        _store_rectified(x_gradient, x, at, total, mask)


class Level:
    """Separable convolutions beside each other, from rectified x to what is normalized.

    Args:
        x: [B, S I, H, W] in channels_last; S is 1 where all groups read the same, or T G.
        depthwise: weight of every branch, [G I, 1, K, K].
        pointwise: the same, [G O, I, 1, 1].
        stride: 1 or 2.
        dilations: of every branch.
        matrices: W of the branches, one below the other, in the type of x; made unless given.
    """

    wide_block, block = 128, 64  # rows of a product of matrices: pixels, or rows of W
    inner_bytes = 128  # of what rows and columns are multiplied over: rows of W, or pixels
    outer_block = 64  # columns: inputs, and outputs in single precision

    def __init__(
        self,
        x: Tensor,
        depthwise: Sequence[Tensor],
        pointwise: Sequence[Tensor],
        stride: int,
        dilations: Sequence[int],
        matrices: Tensor | None = None,
    ) -> None:
        self.x = x
        self.stride = stride
        self.depthwise = [tensor.contiguous() for tensor in depthwise]
        self.pointwise = [tensor.contiguous() for tensor in pointwise]
        self.branches = len(depthwise)
        self.inputs = pointwise[0].shape[1]
        self.groups = len(depthwise[0]) // self.inputs
        self.outputs = len(pointwise[0]) // self.groups
        kernels = [tensor.shape[-1] for tensor in depthwise]
        self.taps = max(kernels) ** 2
        self.shapes = *four(kernels), *four(dilations)
        self.rows = sum(kernel**2 for kernel in kernels) * self.inputs
        self.sources = x.shape[1] // self.inputs
        # Outputs that read the same inputs of a branch are computed together.
        self.members = self.groups if self.sources == 1 else 1
        self.units = self.branches * self.groups // self.members
        images, _, height, width = x.shape
        self.size = -(-height // stride), -(-width // stride)
        self.pixels = images * self.size[0] * self.size[1]
        self.constants = {
            "H": height,
            "W": width,
            "STRIDE": stride,
            "I": self.inputs,
            "O": self.outputs,
            # In single precision: three products of its numbers' halves, of 11 bits each.
            "PRECISION": "tf32x3",
        }
        self.matrices = self._compose() if matrices is None else matrices

    def _compose(self) -> Tensor:
        matrices = self.x.new_empty(self.rows, self.groups * self.outputs)
        grid = (
            triton.cdiv(self.taps * self.inputs, 32),
            triton.cdiv(self.groups * self.outputs, 64),
            self.branches,
        )
        _compose[grid](
            *four(self.depthwise), *four(self.pointwise), *self.shapes[:MAX_CHAINS], matrices,
            self.groups, self.inputs, self.outputs, BK=32, BO=64,
        )  # fmt: skip
        return matrices

    def convolve(self, eps: float, running: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Y [B, T G O, H', W'] and its statistics [3, T G O], or by `running` [2, T G O].

        Args:
            eps: is added to the variances.
            running: means of the branches' norms, then their variances; none for the batch's.
        """
        channels = self.branches * self.groups * self.outputs
        y = self.new_map(channels)
        statistics = self.pointwise[0].new_empty(3, channels)
        block, blocks = self.outputs_of_a_program
        pixels = self.pixels_of_a_program(self.pixels, self.units * blocks)
        programs, tiles = share(self.pixels, pixels, self.units * blocks, self.resident)
        _convolve[programs, self.units * blocks](
            self.x, self.matrices, *self.shapes, y, room(y, programs * 2 * channels),
            counters(y.device), statistics, eps,
            self.pixels, self.groups, self.members, blocks, self.sources, tiles,
            P=pixels, BK=self.inner_block, BO=block, ROWS=rows_at_once(block),
            WHOLE=self.pixels % pixels == 0, **self.constants,
        )  # fmt: skip
        return y, join_running(running, eps, len(running[0])) if running else statistics

    def gradient_of_input(self, gradient: Tensor) -> Tensor:
        """Of what x was rectified from, [B, S I, H, W].

        Args:
            gradient: of Y, [B, T G O, H', W'].
        """
        output = torch.empty_like(self.x)
        kinds = self.stride**2  # of pixels, each as many as there are of y
        block = min(self.outer_block, max(16, triton.next_power_of_2(self.inputs)))
        blocks = triton.cdiv(self.inputs, block)
        rows = self.pixels_of_a_program(self.pixels, kinds * blocks * self.sources)
        programs = triton.cdiv(self.pixels, rows) * kinds
        summed = self.units // self.sources
        # Where few programs would compute all units, one after the other.
        apart = summed > 1 and programs * blocks < MULTIPROCESSORS // 2
        partial = room(output, summed * output.numel() if apart else 0)
        _gradient_of_input[programs, blocks, summed if apart else self.sources](
            gradient, self.matrices, *self.shapes, self.x, partial, counters(output.device), output,
            self.pixels, output.numel(), self.groups, self.members, self.units, summed,
            P=rows, BK=self.inner_block, BI=block, APART=apart, WHOLE=self.pixels % rows == 0,
            **self.constants,
        )  # fmt: skip
        return output

    def gradients_of_weights(self, gradient: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Of the depthwise and of the pointwise weights.

        Args:
            gradient: of Y, [B, T G O, H', W'].
        """
        block, blocks = self.outputs_of_a_program
        line = self.wide_block if self.x.element_size() == 2 else self.block
        lines = triton.cdiv(self.taps * self.inputs, line)
        columns = lines * self.units * blocks
        programs, tiles = share(self.pixels, self.inner_block, columns, self.resident)
        partial = room(gradient, programs * self.matrices.numel())
        _gradient_of_matrices[programs, lines, self.units * blocks](
            gradient, self.x, *self.shapes, partial,
            self.pixels, self.groups, self.members, blocks, self.sources, tiles, self.rows,
            P=self.inner_block, BK=line, BO=block, WHOLE=self.pixels % self.inner_block == 0,
            **self.constants,
            num_stages=4 if block <= 32 else 3,
        )  # fmt: skip
        of_depthwise = [torch.empty_like(weight) for weight in self.depthwise]
        of_pointwise = [torch.empty_like(weight) for weight in self.pointwise]
        taps, outer = triton.next_power_of_2(self.taps), triton.next_power_of_2(self.outputs)
        _decompose[self.inputs, self.groups, self.branches](
            partial, *four(self.depthwise), *four(self.pointwise), *four(of_depthwise),
            *four(of_pointwise), *self.shapes[:MAX_CHAINS], programs, self.rows,
            self.inputs, self.outputs, TAPS=taps, BO=outer,
        )  # fmt: skip
        return of_depthwise, of_pointwise

    def new_map(self, channels: int) -> Tensor:
        """[B, channels, H', W'], to be filled."""
        return torch.empty(
            (len(self.x), channels, *self.size),
            dtype=self.x.dtype,
            device=self.x.device,
            memory_format=torch.channels_last,
        )

    @property
    def inner_block(self) -> int:
        """How many numbers a row and a column are multiplied over at once."""
        return self.inner_bytes // self.x.element_size()

    @property
    def resident(self) -> int:
        """Programs of a multiprocessor; more where some branches take longer, to even them out."""
        return 2 if self.branches == 1 else 4

    def pixels_of_a_program(self, pixels: int, columns: int) -> int:
        """As many as registers take, but fewer where some multiprocessors had nothing to do.

        Args:
            pixels: of all.
            columns: how often the programs are there beside each other.
        """
        few = triton.cdiv(pixels, self.wide_block) * columns < MULTIPROCESSORS
        return self.block if few or self.x.element_size() > 2 else self.wide_block

    @property
    def outputs_of_a_program(self) -> tuple[int, int]:
        """How many outputs of a unit a program computes, and how many programs there are for it."""
        outputs = self.members * self.outputs
        most = self.wide_block if self.x.element_size() == 2 else self.outer_block
        block = min(most, max(16, triton.next_power_of_2(outputs)))
        return block, triton.cdiv(outputs, block)


Normalized = tuple[Tensor, Tensor]  # a map before it is, [B, C, H', W'], and statistics [3, C]
Sums = tuple[Tensor, Tensor]


def sum_gradient(
    gradient: Tensor, maps: int, second: Normalized, begin: int = 0, first: Normalized | None = None
) -> Sums:
    """The sums over all pixels of g and of g times normalized maps, both [M C].

    Args:
        gradient: g, [B, C, H', W'].
        maps: M, how many have it, of C channels each.
        second: holds the last of them, from channel `begin` on.
        begin: see there.
        first: consists of those before them; None if there are no others.
    """
    channels = gradient.shape[1]
    first, split = (second, 0) if first is None else (first, first[0].shape[1] // channels)
    sums = tuple(second[1].new_empty(maps * channels) for _ in range(2))
    block = min(64, triton.next_power_of_2(channels))
    blocks, rows = triton.cdiv(channels, block), 2048 // block
    pixels = gradient.numel() // channels
    programs, tiles = share(pixels, rows, blocks * maps)
    widths = channels, first[0].shape[1], second[0].shape[1], begin
    unit = _unit(*widths)
    _sum_gradient[programs, blocks, maps](
        gradient, *first, *second, room(gradient, programs * 2 * maps * channels),
        counters(gradient.device), *sums, pixels, tiles,
        *(width // unit for width in widths), split,
        UNIT=unit, P=rows, C=block, ROWS=rows_at_once(block),
    )  # fmt: skip
    return cast(Sums, sums)


def rectify(y: Tensor, statistics: Tensor, affine: Sequence[Tensor], output: Tensor) -> None:
    """Fill in the normalized first channels of y, scaled and shifted, 0 where they are negative.

    Args:
        y: [B, C, H', W'].
        statistics: of y, [3, C].
        affine: scale and shift of each channel that is filled in; none for 1 and 0.
        output: [B, C', H', W'].
    """
    channels = output.shape[1]
    pixels, grid, blocks = _tiles(output)
    unit = _unit(channels, y.shape[1])
    scales, shifts = affine or (statistics, statistics)
    _rectify[grid](
        y, statistics, scales, shifts, output, pixels, channels // unit, y.shape[1] // unit,
        AFFINE=bool(affine), UNIT=unit, **blocks,
    )  # fmt: skip


def denormalize(
    gradient: Tensor,
    sums: Sums,
    scales: Tensor,
    normalized: Normalized,
    own_gradient: Tensor | None = None,
    own_sums: Sums | None = None,
    own_scales: Tensor | None = None,
) -> Tensor:
    """The gradient of what M maps were normalized from, [B, M C, H', W'].

    Args:
        gradient: [B, C, H', W'], of what maps are scaled and summed to.
        sums: of `sum_gradient`, for all maps.
        scales: [M C].
        normalized: the maps.
        own_gradient: of the first maps, which are not summed, [B, M' C, H', W'].
        own_sums: the same for it.
        own_scales: of these maps, [M' C]; None for 1.
    """
    channels, y = gradient.shape[1], normalized[0]
    output = torch.empty_like(y)
    pixels, grid, blocks = _tiles(gradient)
    split = 0 if own_gradient is None else own_gradient.shape[1] // channels
    unit = _unit(channels)
    _denormalize[(*grid, y.shape[1] // channels)](
        gradient, *sums, scales,
        gradient if own_gradient is None else own_gradient, *(own_sums or sums),
        scales if own_scales is None else own_scales,
        *normalized, output, pixels, channels // unit, split,
        SCALED=own_scales is not None, UNIT=unit, **blocks,
    )  # fmt: skip
    return output


def forward(
    x: Tensor,
    scales: Tensor,
    addend: Tensor | None,
    affine: Sequence[Tensor],
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    dilations: Sequence[int],
    deep: int,
    stride: int,
    eps: float,
    running: Sequence[Tensor] = (),
) -> list[Tensor]:
    """The sum over T chains of scale times normalized map, shifted, plus addend; and what is kept.

    Args:
        x: [B, C, H, W], which all chains read.
        scales: [T, G C].
        addend: [B, G C, H', W']; None for 0.
        affine: shift of the sum, [G C], and if there are deep chains scales and shifts between
            their convolutions, [deep, G C]; none for 0, 1 and 0.
        depthwise: weights of the T chains, then of the second convolutions, [G C, 1, K, K].
        pointwise: the same, [G C, C, 1, 1].
        dilations: of all of these.
        deep: number of second convolutions; they belong to the first chains.
        stride: of the first convolutions.
        eps: is added to the variances.
        running: of the norms of the first convolutions, their means and then their variances, and
            of those of the second ones, in place of the batch's; none for those.

    Returns:
        The sum; y [B, T G C, H', W'] of the first convolutions and its statistics [3, T G C]; the
        rectified maps of the deep chains, [B, deep G C, H', W'], their y and its statistics;
        rectified x and the matrices of both levels.
    """
    chains, channels = scales.shape
    x, addend = _channels_last(x), None if addend is None else _channels_last(addend)
    scales, affine = scales.contiguous(), [tensor.contiguous() for tensor in affine]
    first = Level(x.relu(), depthwise[:chains], pointwise[:chains], stride, dilations[:chains])
    y, statistics = first.convolve(eps, running[: 2 * chains])
    inner = first.new_map(deep * channels)
    if deep:
        rectify(y, statistics, affine[1:], inner)
        second = Level(inner, depthwise[chains:], pointwise[chains:], 1, dilations[chains:])
        deep_y, deep_statistics = second.convolve(eps, running[2 * chains :])
        deep_matrices = second.matrices
    else:
        deep_y, deep_statistics = first.new_map(0), statistics.new_empty(3, 0)
        deep_matrices = first.matrices.new_empty(0, channels)
    output = first.new_map(channels)
    pixels, grid, blocks = _tiles(output)
    unit = _unit(channels)
    _sum_maps[grid](
        deep_y, deep_statistics, y, statistics, scales, affine[0] if affine else scales,
        addend, output, pixels, channels // unit, FIRST=deep, SECOND=chains - deep,
        AFFINE=bool(affine), ADDED=addend is not None, UNIT=unit, **blocks,
    )  # fmt: skip
    levels = first.x, first.matrices, deep_matrices
    return [output, y, statistics, inner, deep_y, deep_statistics, *levels]


def backward(
    gradient: Tensor,
    x: Tensor,
    scales: Tensor,
    affine: Sequence[Tensor],
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    kept: Sequence[Tensor],
    dilations: Sequence[int],
    deep: int,
    stride: int,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, of the scales, and where they are wanted of `affine` and of all weights.

    Args:
        gradient: of the sum, [B, G C, H', W'].
        x: as it was given to `forward`, and so is all that is not named here.
        scales: see there.
        affine: see there.
        depthwise: see there.
        pointwise: see there.
        kept: what it returned behind the sum.
        dilations: see there.
        deep: see there.
        stride: see there.
        wanted: those of x, and of the weights and `affine`.
    """
    y, statistics, inner, deep_y, deep_statistics, rectified, matrices, deep_matrices = kept
    of_x, of_weights = wanted
    chains, channels = scales.shape
    gradient, scales = _channels_last(gradient), scales.contiguous()
    # Of the deep chains' second maps, and of the other chains' only ones.
    sums = sum_gradient(
        gradient, chains, (y, statistics), deep * channels, (deep_y, deep_statistics)
    )
    of_scales = sums[1].view_as(scales)
    if not (of_x or of_weights):
        return [x.new_empty(0), of_scales]
    own_gradient, own_sums, own_scales = None, None, None
    of_deep: tuple[list[Tensor], list[Tensor]] = [], []
    # The channels' sums of g alone are the shifts', and those of g times a map are the scales'.
    of_affine = [sums[0][:channels]]
    if deep:
        second = Level(
            inner, depthwise[chains:], pointwise[chains:], 1, dilations[chains:], deep_matrices
        )
        of_y = denormalize(gradient, sums, scales, (deep_y, deep_statistics))
        own_gradient = second.gradient_of_input(of_y)
        own_sums = sum_gradient(own_gradient, 1, (y, statistics))
        of_affine += (of_maps.view(deep, channels) for of_maps in reversed(own_sums))
        own_scales = affine[1].contiguous() if affine else None
        if of_weights:
            of_deep = second.gradients_of_weights(of_y)
    first = Level(
        rectified, depthwise[:chains], pointwise[:chains], stride, dilations[:chains], matrices
    )
    of_y = denormalize(gradient, sums, scales, (y, statistics), own_gradient, own_sums, own_scales)
    of_input = first.gradient_of_input(of_y) if of_x else x.new_empty(0)
    of_first: tuple[list[Tensor], list[Tensor]] = [], []
    if of_weights:
        of_first = first.gradients_of_weights(of_y)
    (of_depthwise, of_pointwise), (of_deep_depthwise, of_deep_pointwise) = of_first, of_deep
    of_both = *of_depthwise, *of_deep_depthwise, *of_pointwise, *of_deep_pointwise
    return [of_input, of_scales, *(of_affine if affine and of_weights else []), *of_both]


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


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


torch.library.impl(separable_sum.FORWARD, "CUDA", on_its_device(forward))
torch.library.impl(separable_sum.BACKWARD, "CUDA", on_its_device(backward))
