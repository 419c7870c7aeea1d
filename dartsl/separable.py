"""Separable convolutions with their BatchNorm as one operation.

Shapes: B images, C channels, H x W pixels, G groups of I inputs and O outputs.

Machines wait for their memory. One after the other, a depthwise convolution, a pointwise one,
BatchNorm and ReLU pass over their maps many times; `dartsl.native` passes over them few times and
keeps half as many. The function is the same, and where it cannot be used the modules compute it.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.batch_norm import count, follow, running_statistics
from dartsl.depthwise import DepthwiseConv2d, depthwise_conv2d
from dartsl.fused import (
    Precision,
    differentiable_gradients,
    found_once,
    has_hooks,
    precision,
    works,
)
from dartsl.native.separable import KERNELS
from dartsl.native.separable_sum import MAX_CHAINS, MAX_GROUPS

# Images, channels, their height and width: few pixels, so that a CPU computes it soon.
TRIAL = 64, 64, 8
# Where more products are summed, two convolutions as one should take longer than one by one: an
# estimate, no measurement.
MAX_DEPTH = 4096
Options = tuple[Sequence[int], int, int, float]  # dilations, deep, stride, eps


class Unit(NamedTuple):
    """ReLU, a depthwise convolution, a pointwise one, BatchNorm: modules that follow each other.

    The norm is an `nn.BatchNorm2d`, or a module with its attributes that knows whether it is
    `synchronized`.
    """

    relu: nn.ReLU
    depthwise: DepthwiseConv2d
    pointwise: nn.Conv2d
    norm: Any


def units_of(chain: Iterable[nn.Module]) -> list[Unit]:
    """The units that a chain of modules is made of; none if there is anything else in it."""
    layers: list[Any] = list(chain)
    size = len(Unit._fields)
    if len(layers) % size or any(map(has_hooks, layers)):
        return []
    units = [Unit(*layers[first : first + size]) for first in range(0, len(layers), size)]
    return units if all(map(_is_unit, units)) else []


def _is_unit(unit: Unit) -> bool:
    # These types and no others made of them, which may compute something else.
    return (
        type(unit.relu) is nn.ReLU
        and type(unit.depthwise) is DepthwiseConv2d
        and unit.depthwise.kernel_size[0] in KERNELS
        and unit.depthwise.stride[0] in (1, 2)
        and unit.depthwise.dilation[0] in (1, 2)
        and type(unit.pointwise) is nn.Conv2d
        and unit.pointwise.kernel_size == unit.pointwise.stride == (1, 1)
        and unit.pointwise.padding == (0, 0)
        and unit.pointwise.bias is None
        and (type(unit.norm) is nn.BatchNorm2d or hasattr(unit.norm, "synchronized"))
    )


def can_fuse(
    units: Sequence[Unit], x: Tensor, scale: Tensor | None = None, addend: Tensor | None = None
) -> bool:
    """Whether `fused` takes these in this place: on a CPU."""
    return not x.is_cuda and _can_compute(units, x, scale, addend, training=True)


def _can_compute(
    units: Sequence[Unit],
    x: Tensor,
    scale: Tensor | None,
    addend: Tensor | None,
    training: bool,
) -> bool:
    types = precision(x)
    return (
        bool(units)
        and types is not None
        and all(unit.norm.training is training for unit in units)
        and all(_fits(unit, types.weights) for unit in units)
        and _fits_input(units, x)
        and _fits_output(units, x, scale, addend, types)
    )


def _fits(unit: Unit, dtype: torch.dtype) -> bool:
    _, depthwise, pointwise, norm = unit
    return (
        norm.running_var is not None
        and norm.momentum is not None
        and not getattr(norm, "synchronized", False)
        and depthwise.weight.dtype == pointwise.weight.dtype == norm.running_var.dtype == dtype
        and len(depthwise.weight) == pointwise.groups * pointwise.weight.shape[1]
        and len(pointwise.weight) == len(norm.running_var)
    )


def _fits_input(units: Sequence[Unit], x: Tensor) -> bool:
    """Whether the channels of x are those of the first unit, and so on."""
    first = units[0]
    return (
        x.dim() == 4
        and x.shape[1] in (first.pointwise.weight.shape[1], len(first.depthwise.weight))
        and all(len(a.pointwise.weight) == len(b.depthwise.weight) for a, b in pairwise(units))
    )


def _fits_output(
    units: Sequence[Unit],
    x: Tensor,
    scale: Tensor | None,
    addend: Tensor | None,
    types: Precision,
) -> bool:
    """Whether a channel of the output has several pixels, and scale and addend are made for it."""
    images, _, *size = x.shape
    stride = math.prod([unit.depthwise.stride[0] for unit in units])
    height, width = (-(-length // stride) for length in size)
    shape = images, len(units[-1].pointwise.weight), height, width
    return (
        images * height * width > 1  # one alone cannot be normalized
        and (scale is None or (scale.dtype == types.weights and scale.shape == shape[1:2]))
        and (addend is None or (addend.dtype == types.maps and addend.shape == shape))
    )


def fused(
    units: Sequence[Unit], x: Tensor, scale: Tensor | None = None, addend: Tensor | None = None
) -> Tensor:
    """What the units give in training, one after the other.

    Args:
        units: see `can_fuse`.
        x: [B, G I, H, W], or [B, I, H, W] for all groups.
        scale: weight of the last BatchNorm, [G O], where it has none of its own.
        addend: is added to the output, [B, G O, H', W'].

    Returns:
        [B, G O, H', W'].
    """
    for unit in units:
        _, depthwise, pointwise, norm = unit
        last = unit is units[-1]
        count(norm)
        x = normalized_separable(
            x,
            depthwise.weight,
            pointwise.weight,
            norm.running_mean,
            norm.running_var,
            scale if last and norm.weight is None else norm.weight,
            norm.bias,
            addend if last else None,
            depthwise.stride[0],
            depthwise.dilation[0],
            norm.momentum,
            norm.eps,
        )
    return x


def normalized_separable(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    stride: int = 1,
    dilation: int = 1,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`batch_norm(conv2d(depthwise_conv2d(relu(x)))) + addend` in training, as one operation.

    Args:
        x: [B, G I, H, W], or [B, I, H, W] that all groups read.
        depthwise: weight of the depthwise convolution, [G I, 1, K, K].
        pointwise: weight of the pointwise convolution, [G O, I, 1, 1].
        running_mean: of the BatchNorm, [G O]; it follows the batch's.
        running_var: the same of the variance.
        scale: the weight of the BatchNorm, [G O]; None for 1.
        bias: of the BatchNorm, [G O]; None for 0.
        addend: [B, G O, ceil(H / stride), ceil(W / stride)]; None for 0.
        stride: of the depthwise convolution, 1 or 2.
        dilation: of the depthwise convolution, 1 or 2.
        momentum: of the running statistics.
        eps: is added to the variance.

    Returns:
        [B, G O, ceil(H / stride), ceil(W / stride)].
    """
    output, statistics = NormalizedSeparable.apply(
        x, depthwise, pointwise, scale, bias, addend, stride, dilation, eps
    )
    mean, _, var = statistics.unbind()
    follow([running_mean, running_var], [mean, var], momentum)
    return output


def sums_chains(x: Tensor) -> bool:
    """Whether there is an operation that sums chains where x is: on a GPU."""
    types = precision(x) if x.is_cuda else None
    return types is not None and _sums_well(x.device, types.maps)


@found_once
def _sums_well(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it has done so in this place, with the paper's chains.

    As in a supernet and, with half the size, with norms that scale and shift.
    """
    images, channels, size = TRIAL
    outputs, kernels, dilations, deep = 3 * channels, (3, 5, 3, 5, 3, 5), (1, 1, 2, 2, 1, 1), 2
    ends: list[tuple[int, ...]] = [(images, channels, size, size), (len(kernels) - deep, outputs)]
    affine: list[tuple[int, ...]] = [(outputs,), (deep, outputs), (deep, outputs)]
    weights: list[tuple[int, ...]] = [(outputs, 1, kernel, kernel) for kernel in kernels]
    weights += [(outputs, channels, 1, 1)] * len(kernels)

    def by_kernels(options: Options, running: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        x, scales, *rest = inputs
        if running:
            given = x, scales, None, *_parts(rest, options), *options, running
            return cast(list[Tensor], torch.ops.dartsl.separable_sum(*given))[0]
        return cast(Tensor, SeparableSum.apply(x, scales, None, options, *rest)[0])

    def by_formula(options: Options, running: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        return _formula_of_sum(*inputs, options=options, running=running)

    return all(
        works(
            "separable convolutions",
            functools.partial(by_kernels, (dilations, deep, stride, 1e-5)),
            functools.partial(by_formula, (dilations, deep, stride, 1e-5)),
            shapes,
            [(outputs,)] * 2 * len(kernels),
            dtype,
            device,
        )
        for stride, shapes in ((1, ends + weights), (2, ends + affine + weights))
    )


def can_sum(
    chains: Sequence[Sequence[Unit]],
    x: Tensor,
    scales: Sequence[Tensor] | None = None,
    addend: Tensor | None = None,
) -> bool:
    """Whether `fused_sum` takes these in this place, where `sums_chains`.

    In evaluation it gives no gradients.
    """
    first = [chain[0] for chain in chains if chain]
    units = [unit for chain in chains for unit in chain]
    given: Sequence[Tensor | None] = [None] * len(chains) if scales is None else scales
    return (
        0 < len(first) == len(chains) <= MAX_CHAINS
        and all(len(chain) <= 2 for chain in chains)
        and x.dim() == 4
        and x.shape[1] == first[0].pointwise.weight.shape[1]
        # Their maps stand beside each other, counted in 32 bits.
        and len(first) * len(first[0].pointwise.weight) * (x.numel() // x.shape[1]) < 2**31
        and all(unit.pointwise.weight.shape == first[0].pointwise.weight.shape for unit in units)
        and all(_depth(unit) <= MAX_DEPTH for unit in units)
        and len(first[0].depthwise.weight) == len(first[0].pointwise.weight)
        and first[0].pointwise.groups <= MAX_GROUPS
        and len({unit.depthwise.stride[0] for unit in first}) == 1
        and all(chain[-1].depthwise.stride[0] == 1 for chain in chains if len(chain) == 2)
        and all((unit.norm.weight is None) == (scales is not None) for unit in units)
        and all((unit.norm.bias is None) == (scales is not None) for unit in units)
        and len({unit.norm.eps for unit in units}) == 1
        and (first[0].norm.training or not torch.is_grad_enabled())
        and all(
            _can_compute(chain, x, scale, addend, first[0].norm.training)
            for chain, scale in zip(chains, given, strict=True)
        )
    )


def _depth(unit: Unit) -> int:
    """Over how many products its two convolutions sum as one."""
    return unit.pointwise.weight.shape[1] * unit.depthwise.kernel_size[0] ** 2


def fused_sum(
    chains: Sequence[Sequence[Unit]],
    x: Tensor,
    scales: Sequence[Tensor] | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """The sum over T chains of scale times what a chain gives, plus addend, as one operation.

    Args:
        chains: of one unit or two, see `can_sum`.
        x: [B, I, H, W], which all groups of all chains read.
        scales: T times [G I]; None where the norms have weights and biases of their own.
        addend: [B, G I, H', W'].

    Returns:
        [B, G I, H', W'].
    """
    types = precision(x)
    assert types is not None
    # Chains of two units first.
    order = sorted(range(len(chains)), key=lambda chain: -len(chains[chain]))
    chains = [chains[chain] for chain in order]
    units = [chain[0] for chain in chains]
    second = [chain[1] for chain in chains if len(chain) == 2]
    affine: list[Tensor] = []
    if scales is None:
        last = [chain[-1].norm for chain in chains]
        rows = [norm.weight for norm in last]
        affine = [functools.reduce(torch.add, (norm.bias for norm in last))]
        if second:
            inner = [unit.norm for unit in units[: len(second)]]
            affine += _rows([norm.weight for norm in inner]), _rows([norm.bias for norm in inner])
    else:
        rows = [scales[chain] for chain in order]
    dilations = [unit.depthwise.dilation[0] for unit in units + second]
    options = dilations, len(second), units[0].depthwise.stride[0], units[0].norm.eps
    ends = x.to(types.maps), _rows(rows), addend
    depthwise = [unit.depthwise.weight for unit in units + second]
    pointwise = [unit.pointwise.weight for unit in units + second]
    if not units[0].norm.training:
        running = [
            s for level in (units, second) for s in running_statistics([u.norm for u in level])
        ]
        given = *ends, affine, depthwise, pointwise, *options, running
        return cast(list[Tensor], torch.ops.dartsl.separable_sum(*given))[0]
    output, *statistics = SeparableSum.apply(*ends, options, *affine, *depthwise, *pointwise)
    for level, found in zip((units, second), statistics, strict=True):
        for unit, of_unit in zip(level, found.tensor_split(len(level) or 1, dim=1), strict=False):
            norm, (mean, _, var) = unit.norm, of_unit.unbind()
            follow([norm.running_mean, norm.running_var], [mean, var], norm.momentum)
            count(norm)
    return output


def _rows(rows: Sequence[Tensor]) -> Tensor:
    """[R, C] of R times [C]; nothing is copied for one."""
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(list(rows))


class SeparableSum(torch.autograd.Function):
    """`fused_sum` with the statistics of the batch; see `dartsl.native.separable_sum`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scales: Tensor,
        addend: Tensor | None,
        options: Options,
        *rest: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output [B, G I, H', W'] and the statistics of the first and of the second units."""
        output, *kept = torch.ops.dartsl.separable_sum(
            x, scales, addend, *_parts(rest, options), *options, []
        )
        ctx.save_for_backward(x, scales, *rest, *kept)
        ctx.options = options
        statistics = kept[1], kept[4]
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        return output, *statistics

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x, the scales, addend and all others, as far as they are wanted."""
        gradient = gradients[0]
        if gradient is None:
            return (None,) * len(ctx.needs_input_grad)
        x, scales, *saved = ctx.saved_tensors
        x_wanted, scales_wanted, addend_wanted, _, *rest_wanted = ctx.needs_input_grad
        rest, kept = saved[: len(rest_wanted)], saved[len(rest_wanted) :]
        wanted = [x_wanted, scales_wanted, *rest_wanted]
        found: Sequence[Tensor | None]
        if not any(wanted):
            found = [None] * len(wanted)
        elif torch.is_grad_enabled():
            found = differentiable_gradients(
                lambda *given: _formula_of_sum(*given, options=ctx.options),
                (x, scales, *rest),
                gradient,
                wanted,
            )
        else:
            parts, of_both = _parts(rest, ctx.options), (x_wanted, any(rest_wanted))
            found = torch.ops.dartsl.separable_sum_backward(
                gradient, x, scales, *parts, kept, *ctx.options[:3], of_both
            )
            found = [*found, *[None] * (len(wanted) - len(found))]
        of_x, of_scales, *of_rest = (
            single if want else None for single, want in zip(found, wanted, strict=True)
        )
        return of_x, of_scales, gradient if addend_wanted else None, None, *of_rest


def _parts(
    rest: Sequence[Tensor], options: Options
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """What is affine, depthwise weights, pointwise weights: they stand in this order."""
    convolutions = len(options[0])
    depthwise, pointwise = rest[-2 * convolutions : -convolutions], rest[-convolutions:]
    return rest[: -2 * convolutions], depthwise, pointwise


class NormalizedSeparable(torch.autograd.Function):
    """`normalized_separable` with the statistics of the batch; see `dartsl.native.separable`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        depthwise: Tensor,
        pointwise: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        addend: Tensor | None,
        stride: int,
        dilation: int,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Output [B, G O, H', W'] and statistics [3, G O]."""
        output, y, statistics = torch.ops.dartsl.normalized_separable(
            x, depthwise, pointwise, scale, bias, addend, stride, dilation, eps
        )
        ctx.save_for_backward(x, depthwise, pointwise, scale, bias, y, statistics)
        ctx.options = stride, dilation, eps
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return output, statistics

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x, the weights, scale, bias and addend, as far as they are wanted."""
        gradient, _ = gradients
        if gradient is None:
            return (None,) * 9
        *inputs, y, statistics = ctx.saved_tensors
        *wanted, addend_wanted = ctx.needs_input_grad[:6]
        found: Sequence[Tensor | None]
        if not any(wanted):
            found = [None] * len(wanted)
        elif torch.is_grad_enabled():
            found = differentiable_gradients(
                lambda *given: _formula(*given, *ctx.options), inputs, gradient, wanted
            )
        else:
            stride, dilation, _ = ctx.options
            found = torch.ops.dartsl.normalized_separable_backward(
                gradient, *inputs, y, statistics, stride, dilation, wanted
            )
        of_inputs = (single if want else None for single, want in zip(found, wanted, strict=True))
        return *of_inputs, gradient if addend_wanted else None, None, None, None


def _formula(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: int,
    dilation: int,
    eps: float,
    running: Sequence[Tensor] = (),
) -> Tensor:
    """`normalized_separable` without addend, by PyTorch's functions.

    Mean and variance are those of the batch, or `running`.
    """
    groups = len(depthwise) // pointwise.shape[1]
    x = F.relu(x)
    if x.shape[1] < len(depthwise):
        x = torch.cat([x] * groups, dim=1)
    weights = depthwise.to(x.dtype), pointwise.to(x.dtype)
    y = F.conv2d(depthwise_conv2d(x, weights[0], stride, dilation), weights[1], groups=groups)
    mean, var = running or (None, None)
    return F.batch_norm(y, mean, var, scale, bias, not running, 0.0, eps)


def _formula_of_sum(
    x: Tensor,
    scales: Tensor,
    *rest: Tensor,
    options: Options,
    running: Sequence[Tensor] = (),
) -> Tensor:
    """`fused_sum` without addend, by PyTorch's functions.

    Means and variances are those of the batch, or `running`.
    """
    dilations, deep, stride, eps = options
    affine, depthwise, pointwise = _parts(rest, options)
    convolutions, chains = list(zip(depthwise, pointwise, strict=True)), len(scales)
    first, last = running[: 2 * chains], running[2 * chains :]
    total: Tensor | None = None
    for chain, scale in enumerate(scales):
        norm: Sequence[Tensor | None] = [scale, None]
        if chain < deep:
            norm = [rows[chain] for rows in affine[1:]] or [None, None]
        statistics = first[chain::chains]
        term = _formula(
            x, *convolutions[chain], norm[0], norm[1], stride, dilations[chain], eps, statistics
        )
        if chain < deep:
            second, statistics = convolutions[chains + chain], last[chain::deep]
            term = _formula(
                term, *second, scale, None, 1, dilations[chains + chain], eps, statistics
            )
        total = term if total is None else total + term
    assert total is not None
    return total + affine[0].view(-1, 1, 1).to(total.dtype) if affine else total
