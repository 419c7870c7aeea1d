"""A separable convolution with its BatchNorm is PyTorch's, in C and everywhere else."""

import copy
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from dartsl import separable
from dartsl.batch_norm import SynchronizedBatchNorm2d
from dartsl.depthwise import DepthwiseConv2d
from dartsl.native import build
from dartsl.networks import merged
from dartsl.networks.merged import MergedBatchNorm, MergedChain, Source
from dartsl.separable import (
    NormalizedSeparable,
    Unit,
    can_fuse,
    fused,
    normalized_separable,
    units_of,
)
from tests.derivatives import Ends

needs_compiler = pytest.mark.skipif(not build.is_built(), reason="no C compiler on this machine")

KERNELS = (3, 5, 7)
STEPS = ((1, 1), (1, 2), (2, 1), (2, 2))  # stride and dilation


class Case(NamedTuple):
    groups: int
    inputs: int  # of a group
    outputs: int
    images: int
    size: tuple[int, int]
    shared: bool = False  # whether all groups read the same inputs


# Vectors hold 2 to 16 numbers; 8 pixels of a row and some 64 of a map are computed at once.
SMALL = [
    Case(1, 5, 7, 3, (5, 3)),
    Case(2, 1, 20, 2, (7, 7)),
    Case(3, 8, 16, 4, (4, 4), shared=True),
    Case(5, 17, 14, 2, (6, 5)),  # more channels than are summed at once
    Case(4, 20, 1, 2, (2, 19), shared=True),
    Case(2, 3, 3, 2, (20, 18)),
    Case(2, 4, 2, 5, (1, 1), shared=True),
    Case(1, 1, 1, 3, (2, 2)),
]
LARGE = Case(2, 5, 7, 40, (9, 9))  # of more images than are summed apart

Arguments = tuple[Tensor | None, ...]


def arguments(case: Case, kernel: int = 3, steps: tuple[int, int] = (1, 1)) -> Arguments:
    """x, both weights, scale, bias and addend; all want gradients."""
    generator = torch.Generator().manual_seed(0)
    groups, inputs, outputs, images, (height, width), shared = case
    stride, _ = steps
    shapes = (
        (images, inputs if shared else groups * inputs, height, width),
        (groups * inputs, 1, kernel, kernel),
        (groups * outputs, inputs, 1, 1),
        (groups * outputs,),
        (groups * outputs,),
        (images, groups * outputs, -(-height // stride), -(-width // stride)),
    )
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[2] += tensors[2].sign()  # a single input with a weight near 0 would hardly vary
    return tuple(tensor.requires_grad_() for tensor in tensors)


def statistics(pointwise: Tensor) -> tuple[Tensor, Tensor]:
    """Running mean and variance that are those of no batch."""
    ends = (-1, 1), (1, 2)
    mean, var = (torch.linspace(*two, len(pointwise)).to(pointwise.dtype) for two in ends)
    return mean, var


def ours(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    steps: tuple[int, int] = (1, 1),
    running: tuple[Tensor, Tensor] | None = None,
    **options,
) -> Tensor:
    given = x, depthwise, pointwise, *(running or statistics(pointwise)), scale, bias, addend
    return normalized_separable(*given, *steps, **options)


def reference(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    steps: tuple[int, int] = (1, 1),
    running: tuple[Tensor, Tensor] | None = None,
    momentum: float = 0.1,
    training: bool = True,
) -> Tensor:
    channels, (stride, dilation) = len(depthwise), steps
    x = torch.cat([F.relu(x)] * (channels // x.shape[1]), dim=1)
    padding = dilation * (depthwise.shape[-1] // 2)
    x = F.conv2d(x, depthwise, None, stride, padding, dilation, groups=channels)
    y = F.conv2d(x, pointwise, groups=channels // pointwise.shape[1])
    running = running or statistics(pointwise)
    output = F.batch_norm(y, *running, scale, bias, training, momentum)
    return output if addend is None else output + addend


def with_gradients(function: Callable, tensors: Arguments, **options) -> list[Tensor]:
    """The output and the gradients of all tensors that want them, for some gradient of it."""
    output = function(*tensors, **options)
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad(output, wanted, gradient)]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        # The weight of a single input only scales: by the formula its gradient is almost 0.
        scale = other.norm().clamp_min(1)
        assert (one.double() - other).norm() / scale < tolerance


def in_single(tensors: Arguments) -> Arguments:
    return tuple(t if t is None else t.detach().float().requires_grad_() for t in tensors)


def in_double(tensors: Arguments) -> Arguments:
    return tuple(t if t is None else t.detach().double().requires_grad_() for t in tensors)


# Equality with PyTorch


@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize("case", SMALL)
def test_it_is_pytorchs(case) -> None:
    for kernel, steps in itertools.product(KERNELS, STEPS):
        x, *weights, scale, bias, addend = arguments(case, kernel, steps)
        combinations = (scale, bias, addend), (scale, None, addend), (None, bias, None), (None,) * 3
        for optional in combinations:
            tensors = in_single((x, *weights, *optional))
            double = in_double(tensors)
            expected = with_gradients(reference, double, steps=steps)
            assert_close(with_gradients(ours, double, steps=steps), expected, 1e-12)
            found = with_gradients(ours, tensors, steps=steps)
            assert all(tensor.dtype == torch.float32 for tensor in found)
            assert_close(found, expected, 2e-5)


@needs_compiler
@pytest.mark.parametrize("shared", [False, True])
def test_many_images(shared) -> None:
    tensors = arguments(LARGE._replace(shared=shared))
    expected = with_gradients(reference, tensors)
    assert_close(with_gradients(ours, tensors), expected, 1e-12)


@needs_compiler
@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=6))[1:])
def test_the_gradients_that_are_wanted(wanted) -> None:
    tensors = arguments(SMALL[0], steps=(2, 1))
    for tensor, want in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(want)
    expected = with_gradients(reference, tensors, steps=(2, 1))
    assert len(expected) == 1 + sum(wanted)
    assert_close(with_gradients(ours, tensors, steps=(2, 1)), expected, 1e-12)


@needs_compiler
def test_running_statistics() -> None:
    x, depthwise, pointwise, *_ = arguments(SMALL[0])
    expected, found = statistics(pointwise), statistics(pointwise)
    for _ in range(2):
        reference(x, depthwise, pointwise, running=expected, momentum=0.3)
        ours(x, depthwise, pointwise, running=found, momentum=0.3)
    assert_close(list(found), list(expected), 1e-13)


@needs_compiler
def test_a_mean_that_is_large_beside_the_deviation() -> None:
    x, depthwise, *others = arguments(Case(4, 6, 5, 8, (20, 20)))
    with torch.no_grad():  # padding with 0 is to change little at the border
        depthwise *= torch.tensor([[0, 1e-3, 0], [1e-3, 1, 1e-3], [0, 1e-3, 0]])
    single = in_single((x + 1e3, depthwise, *others))
    exact = with_gradients(reference, in_double(single))
    errors = [
        [(t.double() - e).norm() / e.norm() for t, e in zip(found, exact, strict=True)]
        for found in (with_gradients(f, single) for f in (ours, reference))
    ]
    for ours_is, pytorchs in zip(*errors, strict=True):
        assert ours_is <= 2 * pytorchs  # a processor may not have fused additions


@needs_compiler
@pytest.mark.parametrize("where", ["x", "depthwise", "pointwise"])
@pytest.mark.parametrize("shared", [False, True])
def test_nan_stays_in_its_group_and_relu_stops_what_is_not_positive(shared, where) -> None:
    case = SMALL[2]._replace(shared=shared)
    x, depthwise, pointwise, *optional = arguments(case, 5)
    in_first_group = {"x": x[1, 2, 0], "depthwise": depthwise[3, 0, 2], "pointwise": pointwise[5]}
    with torch.no_grad():
        in_first_group[where][1] = float("nan")
        x[0, :2] = torch.tensor([0.0, -0.0])[:, None, None]
    tensors = (x, depthwise, pointwise, *optional)
    found, expected = (with_gradients(f, tensors) for f in (ours, reference))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
    assert torch.equal(found[1] == 0, x.detach() <= 0)
    if where != "x" or not shared:
        assert not found[0][:, case.outputs :].isnan().any()


def layouts(tensor: Tensor) -> list[Tensor]:
    """The same numbers in channels_last, in NCHW, and in neither."""
    wider = torch.stack([tensor, tensor + 1], dim=-1)
    return [tensor.contiguous(memory_format=torch.channels_last), tensor, wider[..., 0]]


@needs_compiler
@pytest.mark.parametrize("case", SMALL[:3])
def test_every_layout_gives_the_same_bits(case) -> None:
    x, depthwise, pointwise, scale, bias, addend = (t.detach() for t in arguments(case))
    operations, found = torch.ops.dartsl, []
    gradient = torch.randn_like(addend)
    for x_, addend_, gradient_ in zip(*map(layouts, (x, addend, gradient)), strict=True):
        given = x_, depthwise, pointwise, scale, bias
        outputs = operations.normalized_separable(*given, addend_, 1, 2, 1e-5)
        output, *kept = outputs
        gradients = operations.normalized_separable_backward(
            gradient_, *given, *kept, 1, 2, [True] * 5
        )
        found.append([*outputs, *gradients])
        # What comes after need not put it in order.
        for tensor in (output, gradients[0]):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_compiler
def test_a_gradient_that_is_the_same_everywhere() -> None:
    """As `sum` gives it, which is one number in memory."""
    tensors = arguments(SMALL[0])
    found, expected = (torch.autograd.grad(f(*tensors).sum(), tensors) for f in (ours, reference))
    assert_close(list(found), list(expected), 1e-12)


@needs_compiler
@pytest.mark.parametrize("shared", [False, True])
def test_any_number_of_threads_gives_the_same_bits(shared) -> None:
    tensors = in_single(arguments(LARGE._replace(shared=shared)))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(with_gradients(ours, tensors))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


# Gradients of gradients


@needs_compiler
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
def test_gradients_and_their_gradients_are_those_of_finite_differences(
    weighed, shared, optional
) -> None:
    steps = (2, 1) if shared else (1, 2)
    x, *weights, scale, bias, addend = arguments(Case(2, 2, 3, 2, (4, 3), shared), steps=steps)
    for weight in weights:
        weight.requires_grad_(weighed)
    tensors = (x, *weights, *((scale, bias) if optional else (None, None)), addend)

    def function(*given: Tensor | None) -> Tensor:
        return ours(*given, steps=steps)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@needs_compiler
def test_an_input_that_is_made_of_another() -> None:
    """The gradient of a gradient ends at x, where it does not go on to what x is made of."""
    x, depthwise, pointwise, scale, *_ = arguments(SMALL[0])

    def second(function) -> list[Tensor]:
        inner = torch.sin(x)
        weight = pointwise * scale.view(-1, 1, 1, 1)
        output = function(inner, depthwise * pointwise.mean(), weight, inner.mean() * scale)
        (gradient,) = torch.autograd.grad((output**3).sum(), inner, create_graph=True)
        return list(torch.autograd.grad((gradient**2).sum(), (x, depthwise, pointwise, scale)))

    assert_close(second(ours), second(reference), 1e-11)


@needs_compiler
def test_only_what_is_differentiated_again_takes_the_formula(monkeypatch) -> None:
    formula, calls = separable._formula, []
    monkeypatch.setattr(separable, "_formula", lambda *a: calls.append(a) or formula(*a))
    tensors = arguments(SMALL[0])
    output = ours(*tensors)
    first = torch.autograd.grad(output.square().sum(), tensors, retain_graph=True)
    assert not calls
    again = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
    assert len(calls) == 1
    assert_close([tensor.detach() for tensor in again], list(first), 1e-12)


@needs_compiler
def test_an_output_that_nobody_differentiates() -> None:
    tensors = arguments(SMALL[0])
    _, of_batch = NormalizedSeparable.apply(*tensors, 1, 1, 1e-5)
    assert not of_batch.requires_grad
    unused = torch.autograd.grad(Ends.apply(ours(*tensors)).sum(), tensors, allow_unused=True)
    assert unused == (None,) * len(tensors)


# Units: modules that follow each other


def unit(channels: int = 4, outputs: int = 4, groups: int = 1, norm=None, **steps) -> Unit:
    pointwise = nn.Conv2d(channels, outputs, 1, groups=groups, bias=False)
    depthwise = DepthwiseConv2d(channels, 3, **steps)
    return Unit(nn.ReLU(), depthwise, pointwise, norm or nn.BatchNorm2d(outputs))


@needs_compiler
def test_fused_units_are_their_modules_one_after_the_other() -> None:
    torch.manual_seed(0)
    units = [unit(4, 6, groups=2, stride=2), unit(6, 5, dilation=2)]
    chain = nn.Sequential(*units[0], *units[1]).double()
    for parameter in chain.parameters():
        nn.init.normal_(parameter)
    by_modules = copy.deepcopy(chain)
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    found = with_gradients(lambda *_: fused(units, x), (x, *chain.parameters()))
    expected = with_gradients(lambda *_: by_modules(x), (x, *by_modules.parameters()))
    assert_close(found, expected, 1e-12)
    for one, other in zip(chain.buffers(), by_modules.buffers(), strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


def test_which_chains_are_units() -> None:
    first, second = unit(), unit(norm=MergedBatchNorm(4, 2))
    assert units_of([*first]) == [first]
    assert units_of([*first, *second]) == [first, second]
    assert units_of([]) == []
    conv = nn.Conv2d
    others = [
        first._replace(relu=nn.ReLU6()),
        first._replace(depthwise=conv(4, 4, 3, padding=1, groups=4, bias=False)),
        *(first._replace(depthwise=DepthwiseConv2d(4, kernel)) for kernel in (1, 9)),
        unit(stride=3),
        unit(dilation=3),
        first._replace(pointwise=conv(4, 4, 1)),  # it has a bias
        first._replace(pointwise=conv(4, 4, 3, bias=False)),
        first._replace(pointwise=conv(4, 4, 1, stride=2, bias=False)),
        first._replace(pointwise=conv(4, 4, 1, padding=1, bias=False)),
        first._replace(pointwise=nn.ConvTranspose2d(4, 4, 1, bias=False)),
        *(
            unit(norm=norm)
            for norm in (
                nn.InstanceNorm2d(4, track_running_stats=True),
                nn.GroupNorm(1, 4),
                nn.SyncBatchNorm(4),
                SynchronizedBatchNorm2d(4),
            )
        ),
    ]
    chains = [[*second, *other] for other in others]
    chains += [first[1:], first[:3], [*first, nn.ReLU()], [*first, *second[1:]]]
    assert not any(map(units_of, chains))


def test_modules_that_do_more_when_they_are_called_are_called() -> None:
    """Hooks; pruning is one of them, and a parametrization is another type."""
    changes = [
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.register_forward_pre_hook(lambda *_: None),
        lambda module: module.register_full_backward_hook(lambda *_: None),
        lambda module: prune.l1_unstructured(module, "weight", 1),
        lambda module: parametrize.register_parametrization(module, "weight", nn.Identity()),
    ]
    for change, changed in itertools.product(changes, range(1, 4)):
        chain = [*unit()]
        change(chain[changed])
        assert not units_of(chain)


@needs_compiler
def test_what_does_not_fit_is_left_to_the_modules() -> None:
    units = [unit(groups=2), unit(4, 5)]
    x, addend, scale = torch.randn(2, 4, 3, 3), torch.randn(2, 5, 3, 3), torch.ones(5)
    assert can_fuse(units, x, scale, addend)
    assert can_fuse(units, x[:, :2])  # shared by both groups
    misfits = [
        ([], x),
        (units, x[:, :3]),
        (units, x[0]),
        (units, x[:0]),
        (units, x.double()),
        (units, x.to("meta")),
        (units, x, scale[:4]),
        (units, x, scale.double()),
        (units, x, None, addend[:1]),
        (units, x, None, addend.double()),
        ([unit(4, 5), unit(4, 5)], x),
        ([unit(norm=nn.BatchNorm2d(5))], x),
        ([unit()._replace(pointwise=nn.Conv2d(8, 4, 1, bias=False))], x),
        ([unit(norm=nn.BatchNorm2d(4, momentum=None))], x),
        ([unit(norm=nn.BatchNorm2d(4, track_running_stats=False))], x),
        ([unit(norm=nn.BatchNorm2d(4).double())], x),
        ([unit(norm=nn.BatchNorm2d(4).eval())], x),
    ]
    assert [can_fuse(*given) for given in misfits] == [False] * len(misfits)


# Through a network's modules


def chain_of(*strides: int, num_edges: int = 3) -> MergedChain:
    """Merged chains of units with these strides."""

    def single() -> nn.Sequential:
        norms = (nn.BatchNorm2d(4, affine=False) for _ in strides)
        units = (unit(norm=norm, stride=s) for norm, s in zip(norms, strides, strict=True))
        return nn.Sequential(*itertools.chain(*units))

    torch.manual_seed(0)
    return MergedChain([single() for _ in range(num_edges)])


@pytest.mark.parametrize(("side", "strides"), [(1, (1,)), (2, (2,)), (2, (1, 2))])
def test_one_pixel_cannot_be_normalized(side, strides) -> None:
    chain, source = chain_of(*strides), Source(torch.randn(1, 4, side, side), 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        chain(source, torch.ones(12))
    assert chain.eval()(source, torch.ones(12)).shape == (1, 12, 1, 1)


def test_an_addend_is_broadcast_and_promoted() -> None:
    x, scale, addend = torch.randn(2, 4, 3, 3), torch.randn(12), torch.randn(2, 12, 3, 3)
    for given in (addend[:1], addend.double()):
        found = chain_of(1)(Source(x, 3), scale, given)
        assert torch.equal(found, by_functions(chain_of(1), x, scale, given))


def test_a_chain_that_does_not_fit_is_an_error() -> None:
    chain, source = chain_of(1), Source(torch.randn(2, 4, 3, 3), 3)
    with pytest.raises(RuntimeError):
        chain(source, torch.ones(4))
    with pytest.raises(RuntimeError):
        chain(source, torch.ones(12), torch.ones(2, 12, 2, 2))


def by_functions(chain: MergedChain, x: Tensor, scale: Tensor, addend: Tensor) -> Tensor:
    """What a merged chain of a single unit gives, by PyTorch's functions."""
    _, depthwise, pointwise, norm = chain
    running = norm.running_mean.clone(), norm.running_var.clone()
    options = {"running": running, "training": norm.training}
    return reference(x, depthwise.weight, pointwise.weight, scale, None, addend, **options)


@pytest.mark.parametrize(
    "why",
    ["evaluation", "autocast", "no compiler", "half", "switched off", "synchronized", "a hook"],
)
def test_elsewhere_it_is_pytorchs_bit_for_bit(why, monkeypatch) -> None:
    monkeypatch.setattr(merged, "fused", None)  # it would fail
    chain = chain_of(1).train(why != "evaluation")
    tensors = torch.randn(2, 4, 3, 5), torch.randn(12), torch.randn(2, 12, 3, 5)
    if why == "no compiler":
        monkeypatch.setattr(build, "is_built", lambda: False)
    if why == "switched off":
        monkeypatch.setenv("DARTSL_NATIVE", "0")
        monkeypatch.setattr(build, "library", build.library.__wrapped__)
    if why == "half":
        chain.bfloat16()
        tensors = tuple(tensor.bfloat16() for tensor in tensors)
    if why == "synchronized":
        chain[3].synchronized = True  # with nobody: of one process
    if why == "a hook":
        chain[1].register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=why == "autocast"):
        expected = by_functions(chain, *tensors)
        x, *others = tensors
        found = chain(Source(x, 3), *others)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


# PyTorch's view of the operations


@needs_compiler
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("optional", [False, True])
def test_the_operations_of_torch(optional, shared) -> None:
    """Schemas, and what torch.compile believes of shapes and strides."""
    tensors = arguments(SMALL[2]._replace(shared=shared), 5, (2, 2))
    x, depthwise, pointwise, *others = (tensor.detach() for tensor in tensors)
    scale, bias, addend = others if optional else [None] * 3
    operations, given = torch.ops.dartsl, (x, depthwise, pointwise, scale, bias)
    forward = *given, addend, 2, 2, 1e-5
    torch.library.opcheck(operations.normalized_separable.default, forward)
    output, *kept = operations.normalized_separable(*forward)
    wanted = [shared, not shared, optional, optional, False]
    backward = torch.randn_like(output), *given, *kept, 2, 2, wanted
    torch.library.opcheck(operations.normalized_separable_backward.default, backward)


@needs_compiler
def test_flops_are_counted() -> None:
    """As PyTorch counts those of the convolutions, and as many for each of their gradients."""
    x, *others = arguments(SMALL[2], steps=(2, 1))
    constants = [tensor.detach() for tensor in others]
    counts = []
    for function, tensors in ((reference, constants), (ours, constants), (ours, others)):
        with FlopCounterMode(display=False) as counter:
            output = function(x, *tensors, steps=(2, 1))
            counts.append(counter.get_total_flops())
            output.sum().backward()
        counts.append(counter.get_total_flops())
    forward, _, *found = counts
    assert found == [forward, 2 * forward, forward, 3 * forward]
