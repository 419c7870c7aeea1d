"""Chains of separable convolutions, summed by Triton's kernels, are PyTorch's."""

import copy
import functools
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dartsl import operations, separable
from dartsl.batch_norm import following_together
from dartsl.depthwise import DepthwiseConv2d
from dartsl.errors import UserError
from dartsl.fused import Precision
from dartsl.native.separable import KERNELS
from dartsl.native.separable_sum import MAX_GROUPS
from dartsl.networks import merged
from dartsl.networks.merged import MergedBatchNorm
from dartsl.operations import DilatedConv, SeparableConv
from dartsl.separable import (
    Unit,
    _formula_of_sum,
    _parts,
    can_sum,
    fused_sum,
    units_of,
)
from tests.triton_kernels import DEVICE, TOLERANCE, TYPES, difference, load

gpu, triton_sums = load("separable_sum_gpu"), load("triton_sums")
triton, tl, over = gpu.triton, gpu.tl, gpu._over


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch) -> None:
    """PyTorch's modules, which the kernels are compared with, in whole single precision."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


# kernels of the chains, dilations, how many have a second unit, edges, channels, stride, image
SUMS = [
    ((3, 5, 3, 5), (1, 1, 2, 2), 2, 2, 4, 1, (5, 4)),
    ((5, 3), (1, 2), 1, 1, 16, 2, (7, 6)),
    ((3, 5), (1, 2), 0, 2, 4, 1, (5, 6)),
    ((5, 3, 7), (1, 1, 1), 3, 1, 4, 1, (6, 5)),
    ((3, 3), (1, 2), 1, 2, 20, 1, (5, 5)),
    ((5,), (1,), 0, 2, 4, 2, (1, 7)),
    ((7,), (2,), 0, 1, 4, 1, (9, 16)),  # as far from a pixel as any
    ((3, 5), (2, 1), 1, 2, 4, 1, (8, 8)),  # pixels are whole tiles
    ((3,), (1,), 0, 1, 4, 2, (16, 16)),  # here, too
]


def sum_inputs(case: tuple, dtype: torch.dtype, affine: bool = False) -> tuple:
    """x, scales, what is affine and weights, options, addend."""
    kernels, dilations, deep, edges, channels, stride, image = case
    torch.manual_seed(0)
    total = edges * channels
    kernels, dilations = kernels + kernels[:deep], dilations + (1,) * deep
    x = torch.randn(2, channels, *image).to(dtype)
    weights = [torch.randn(total, 1, k, k) / k for k in kernels]
    weights += [torch.randn(total, channels, 1, 1) / channels**0.5 for _ in kernels]
    scales = torch.rand(len(case[0]), total) + 0.5
    addend = torch.randn(2, total, *(-(-length // stride) for length in image)).to(dtype)
    if affine:
        inner = [torch.rand(deep, total) + 0.5, torch.randn(deep, total)] if deep else []
        weights = [torch.randn(total), *inner, *weights]
    return x, scales, weights, (dilations, deep, stride, 1e-5), addend


def assert_equal(
    case: tuple, dtype: torch.dtype, wanted=(True, True), affine: bool = False
) -> None:
    x, scales, rest, options, addend = sum_inputs(case, dtype, affine)
    ends = [tensor.double().requires_grad_() for tensor in (x, scales, *rest)]
    expected = _formula_of_sum(*ends, options=options)
    gradient = torch.randn_like(expected).to(dtype)
    of_inputs = torch.autograd.grad(expected, ends, gradient.double())
    x, scales, addend, gradient = (t.to(DEVICE) for t in (x, scales, addend, gradient))
    parts = _parts([tensor.to(DEVICE) for tensor in rest], options)
    output, *kept = gpu.forward(x, scales, addend, *parts, *options)
    assert difference(output.cpu() - addend.cpu(), expected.detach()) < 2 * TOLERANCE[dtype]
    found = gpu.backward(gradient, x, scales, *parts, kept, *options[:3], wanted)
    assert len(found) == 2 + wanted[1] * len(rest)
    assert found[0].numel() == wanted[0] * x.numel()
    for tensor, of_input in list(zip(found, of_inputs, strict=False))[not wanted[0] :]:
        assert difference(tensor.cpu(), of_input) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("case", SUMS, ids=str)
def test_a_sum_of_chains(case) -> None:
    assert_equal(case, torch.float32)


@pytest.mark.parametrize("case", [SUMS[2], SUMS[4], SUMS[5]], ids=str)
def test_a_sum_of_chains_that_is_scaled_and_shifted(case) -> None:
    assert_equal(case, torch.float32, affine=True)


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_a_sum_of_chains_in_half_precision(dtype) -> None:
    assert_equal(SUMS[4], dtype)


@pytest.mark.parametrize(
    ("case", "dtype"), list(zip(itertools.cycle(SUMS[1:3]), TYPES, strict=False)), ids=str
)
def test_where_programs_are_enough_each_sums_all_chains(case, dtype, monkeypatch) -> None:
    """Otherwise each computes one chain's part of the gradient, of fewer pixels."""
    monkeypatch.setattr(gpu, "MULTIPROCESSORS", 0)
    assert_equal(case, dtype)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_a_sum_of_chains_whose_gradients_are_not_all_wanted(wanted) -> None:
    assert_equal(((3, 3), (1, 2), 1, 2, 4, 1, (5, 5)), torch.float32, wanted)


@pytest.mark.parametrize(("multiprocessors", "image"), [(1, (13, 11)), (3, (16, 10))])
def test_few_programs_take_many_blocks_of_pixels(multiprocessors, image, monkeypatch) -> None:
    """The last one fewer than others, and of these the last may be a part."""
    monkeypatch.setattr(triton_sums, "MULTIPROCESSORS", multiprocessors)
    assert_equal(((3, 3), (1, 1), 1, 1, 4, 1, image), torch.float32)


def test_the_last_program_adds_in_several_rounds(monkeypatch) -> None:
    """Of five programs' parts, one or two at once."""
    monkeypatch.setattr(triton_sums, "PARTS", 32)
    assert_equal(((3,), (1,), 1, 1, 4, 1, (13, 11)), torch.float32)


def everything(x: Tensor, scales: Tensor, rest: list[Tensor], options: tuple) -> list[Tensor]:
    """The sum, what is kept, and all gradients."""
    parts = _parts(rest, options)
    output, *kept = gpu.forward(x, scales, None, *parts, *options)
    gradient = output + 1
    found = gpu.backward(gradient, x, scales, *parts, kept, *options[:3], (True, True))
    return [output, *kept, *found]


def test_a_second_time_and_in_other_layouts_it_gives_the_same_bits(monkeypatch) -> None:
    monkeypatch.setattr(triton_sums, "MULTIPROCESSORS", 1)
    x, scales, weights, options, _ = sum_inputs(((3,), (1,), 1, 2, 4, 1, (9, 8)), torch.float32)
    x, scales, weights = x.to(DEVICE), scales.to(DEVICE), [w.to(DEVICE) for w in weights]
    expected = everything(x, scales, weights, options)
    wide = torch.cat([x, x], dim=3)
    for given in (x, wide[..., : x.shape[3]], x.contiguous(memory_format=torch.channels_last)):
        for actual, other in zip(
            everything(given, scales, weights, options), expected, strict=True
        ):
            assert torch.equal(actual, other)


@pytest.mark.parametrize(
    ("case", "affine"),
    [(SUMS[2], False), (SUMS[5], False), (SUMS[7], False), (SUMS[2], True), (SUMS[4], True)],
    ids=str,
)
def test_what_comes_is_as_it_is_declared(case, affine) -> None:
    """For compilers, which do not run the operations to know."""
    x, scales, weights, options, _ = sum_inputs(case, torch.float16, affine)
    x, scales, weights = x.to(DEVICE), scales.to(DEVICE), [w.to(DEVICE) for w in weights]
    expected = everything(x, scales, weights, options)
    with FakeTensorMode() as mode:
        x, scales, *weights = (mode.from_tensor(tensor) for tensor in (x, scales, *weights))
        parts = _parts(weights, options)
        output, *kept = torch.ops.dartsl.separable_sum(x, scales, None, *parts, *options, [])
        found = torch.ops.dartsl.separable_sum_backward(
            output, x, scales, *parts, kept, *options[:3], (True, True)
        )
    for declared, tensor in zip([output, *kept, *found], expected, strict=True):
        assert (declared.shape, declared.dtype) == (tensor.shape, tensor.dtype)
        assert declared.stride() == tensor.stride() or tensor.numel() == 0


def test_nan_is_not_rectified_away() -> None:
    x, scales, weights, options, _ = sum_inputs(SUMS[2], torch.float32)
    x[0, 3, 2, 2] = torch.nan
    x, scales, weights = x.to(DEVICE), scales.to(DEVICE), [w.to(DEVICE) for w in weights]
    output, _, statistics, *_ = everything(x, scales, weights, options)
    assert output.isnan().all()
    assert statistics.isnan().all()


def test_operations_are_counted() -> None:
    x, scales, weights, options, _ = sum_inputs(SUMS[0], torch.float32)
    with FakeTensorMode() as mode:
        x, scales, *weights = (mode.from_tensor(t) for t in (x, scales, *weights))
        with FlopCounterMode(display=False) as counter:
            torch.ops.dartsl.separable_sum(x, scales, None, *_parts(weights, options), *options, [])
    assert counter.get_total_flops() == 2 * 2 * 20 * sum(weight.numel() for weight in weights)


def chain(kernels: tuple[int, ...], dilation: int, edges: int, channels: int) -> list[Unit]:
    """A merged chain's units."""
    total = edges * channels
    layers: list[nn.Module] = []
    for kernel in kernels:
        layers += [
            nn.ReLU(),
            DepthwiseConv2d(total, kernel, 1, dilation),
            nn.Conv2d(total, total, 1, groups=edges, bias=False),
            MergedBatchNorm(total, edges),
        ]
    return units_of(nn.ModuleList(layers).to(DEVICE))


@pytest.fixture
def here(monkeypatch) -> None:
    """What is for a GPU, on whatever device the tests run."""
    if DEVICE == "cuda":
        return
    types = Precision(torch.float32, torch.float32)
    monkeypatch.setattr(separable, "precision", lambda x: types)
    monkeypatch.setattr(merged, "sums_chains", lambda x: True)
    monkeypatch.setattr(torch.ops.dartsl, "separable_sum", gpu.forward)
    monkeypatch.setattr(torch.ops.dartsl, "separable_sum_backward", gpu.backward)


def test_deep_sums_are_left_to_modules(here) -> None:
    """The multiplications of both convolutions as one grow with the square of the channels."""
    x = torch.randn(1, 300, 2, 1, device=DEVICE)
    assert can_sum([units_of(SeparableConv(300, 3, 1, True).to(DEVICE).op)], x)
    assert not can_sum([units_of(SeparableConv(300, 5, 1, True).to(DEVICE).op)], x)


@pytest.fixture
def trial(here, monkeypatch):
    """The trial before first use, of small maps."""
    monkeypatch.setattr(separable, "TRIAL", (2, 4, 4))
    return lambda: separable._sums_well.__wrapped__(torch.device(DEVICE), torch.float32)


def test_kernels_are_tried_before_they_are_used(trial, caplog) -> None:
    state = torch.get_rng_state()

    def seen(tensor: Tensor) -> None:
        raise AssertionError("a checkpoint has seen what it will not see again")

    with torch.inference_mode(), torch.autograd.graph.saved_tensors_hooks(seen, seen):
        assert trial()
    assert not caplog.records
    assert torch.equal(torch.get_rng_state(), state)


def test_kernels_that_find_something_else_are_not_used(trial, monkeypatch, caplog) -> None:
    """What else there may be is in `tests/test_fused.py`."""
    right = torch.ops.dartsl.separable_sum_backward

    def wrong(*inputs):
        found = right(*inputs)
        found[-1] *= 1.01
        return found

    monkeypatch.setattr(torch.ops.dartsl, "separable_sum_backward", wrong)
    assert not trial()
    (line,) = caplog.messages
    assert "separable convolutions do not work on this GPU, PyTorch computes it: they are" in line


def test_kernels_that_do_not_compile_are_not_used(trial, monkeypatch, caplog) -> None:
    def fails(*inputs):
        raise RuntimeError("out of resource: shared memory\nHardware limit: 1")

    monkeypatch.setattr(torch.ops.dartsl, "separable_sum", fails)
    assert not trial()
    assert caplog.messages[0].endswith("PyTorch computes it: out of resource: shared memory")


def by_modules(units: list[Unit], x: Tensor, scale: Tensor, addend: Tensor) -> Tensor:
    """A merged chain, module by module."""
    x = torch.cat([x] * (len(scale) // x.shape[1]), dim=1)
    for unit in units:
        x = unit.pointwise(unit.depthwise(unit.relu(x)))
        x = unit.norm(x, *([scale, addend] if unit is units[-1] else []))
    return x


def test_summed_chains_are_the_chains_one_after_the_other(here) -> None:
    """The output, all gradients, second derivatives and running statistics."""
    torch.manual_seed(0)
    chains = [chain((3,), 2, 2, 4), chain((3, 3), 1, 2, 4), chain((5, 5), 1, 2, 4)]
    copies = copy.deepcopy(chains)
    x, addend = torch.randn(2, 4, 5, 5, device=DEVICE), torch.randn(2, 8, 5, 5, device=DEVICE)
    scales = list(torch.rand(3, 8, device=DEVICE) + 0.5)

    def results(together: bool, chains: list[list[Unit]]) -> list[Tensor]:
        weights = [
            w for units in chains for u in units for w in (u.depthwise.weight, u.pointwise.weight)
        ]
        inputs = [t.detach().clone().requires_grad_() for t in (x, addend, *scales)]
        given, total, *rows = inputs
        if together:
            assert can_sum(chains, given, rows, total)
            total = fused_sum(chains, given, rows, total)
        else:
            for units, row in zip(chains, rows, strict=True):
                total = by_modules(units, given, row, total)
        inputs += weights
        value = total.square().sum()
        first = torch.autograd.grad(value, inputs, retain_graph=True)
        again = torch.autograd.grad(value, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), inputs)
        running = [b for units in chains for u in units for b in u.norm.buffers()]
        return [total.detach(), *first, *again, *second, *running]

    pairs = zip(results(True, chains), results(False, copies), strict=True)
    for actual, expected in pairs:
        assert torch.allclose(
            actual, expected, rtol=1e-3, atol=1e-3 * float(expected.detach().abs().max())
        )


def test_in_evaluation_chains_are_normalized_by_running_statistics(here) -> None:
    torch.manual_seed(0)
    chains = [chain((3,), 2, 2, 4), chain((3, 3), 1, 2, 4), chain((5, 5), 1, 2, 4)]
    norms = [unit.norm.eval() for units in chains for unit in units]
    for norm in norms:
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    x, total = torch.randn(2, 4, 5, 5, device=DEVICE), torch.randn(2, 8, 5, 5, device=DEVICE)
    rows = list(torch.rand(3, 8, device=DEVICE) + 0.5)
    before = copy.deepcopy([norm.state_dict() for norm in norms])
    assert not can_sum(chains, x, rows, total)  # it would give no gradients
    with torch.no_grad():
        assert can_sum(chains, x, rows, total)
        found = fused_sum(chains, x, rows, total)
        for units, row in zip(chains, rows, strict=True):
            total = by_modules(units, x, row, total)
        norms[0].train()
        assert not can_sum(chains, x, rows, total)
    assert torch.allclose(found, total, rtol=1e-3, atol=1e-3 * float(total.abs().max()))
    for norm, state in zip(norms, before, strict=True):
        for name, value in norm.state_dict().items():
            assert torch.equal(value, state[name])


@pytest.mark.parametrize(
    "operation",
    [SeparableConv(8, 3, 2, True), SeparableConv(4, 5, 1, True), DilatedConv(20, 3, 1, True)],
    ids=["halved", "separable", "dilated"],
)
def test_a_chain_of_the_final_network_is_its_modules(operation, here, monkeypatch) -> None:
    """The output, all gradients, second derivatives, running statistics and counters."""
    torch.manual_seed(0)
    operation = operation.to(DEVICE)
    for norm in operation.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    given = torch.randn(2, len(operation.op[3].weight), 5, 6, device=DEVICE)

    def results(operation: nn.Module) -> list[Tensor]:
        inputs = [given.clone().requires_grad_(), *operation.parameters()]
        output = operation(inputs[0])
        value = output.square().mul(torch.linspace(1, 2, output.shape[-1], device=DEVICE)).sum()
        first = torch.autograd.grad(value, inputs, retain_graph=True)
        again = torch.autograd.grad(value, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), inputs)
        return [output.detach(), *first, *again, *second, *operation.buffers()]

    modules = copy.deepcopy(operation)
    modules.op.forward = functools.partial(nn.Sequential.forward, modules.op)
    monkeypatch.setattr(operations, "can_fuse", lambda units, x: False)
    monkeypatch.setattr(operations, "sums_chains", lambda x: True)
    expected = results(modules)
    calls = []
    monkeypatch.setattr(
        operations, "fused_sum", lambda *given: calls.append(1) or fused_sum(*given)
    )
    for actual, other in zip(results(operation), expected, strict=True):
        assert torch.allclose(
            actual, other, rtol=2e-3, atol=2e-3 * float(other.detach().abs().max())
        )
    assert calls
    with following_together():
        operation(given)
        assert operation.op[3].num_batches_tracked == 1
    assert operation.op[3].num_batches_tracked == 2


@pytest.mark.parametrize("training", [True, False])
def test_chains_with_norms_of_their_own_are_summed(training, here) -> None:
    torch.manual_seed(0)
    ops = [DilatedConv(4, 3, 1, True).to(DEVICE), SeparableConv(4, 5, 1, True).to(DEVICE)]
    for parameter in (p for op in ops for p in op.parameters()):
        nn.init.normal_(parameter)
    x, chains = torch.randn(2, 4, 5, 5, device=DEVICE), [units_of(op.op) for op in ops]
    for op in ops:
        op.train(training)
    with torch.set_grad_enabled(training):
        assert can_sum(chains, x)
        found, expected = fused_sum(chains, x), sum(nn.Sequential.forward(op.op, x) for op in ops)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@triton.jit
def divide(divided, divisor, length, block: tl.constexpr):
    number = tl.arange(0, block)
    tl.store(divided + number, over(number, divisor), mask=number < length)


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 50, MAX_GROUPS])
def test_divisions_are_exact(divisor) -> None:
    """Of all taps of the largest kernel in all groups, and of a block of numbers behind them."""
    expected = torch.arange(max(KERNELS) ** 2 * divisor + 128, device=DEVICE) // divisor
    divided = torch.empty_like(expected, dtype=torch.int32)
    divide[(1,)](divided, divisor, len(divided), block=8192)
    assert torch.equal(divided, expected.int())


def test_which_chains_are_summed(here) -> None:
    x = torch.randn(2, 4, 5, 5, device=DEVICE)
    rows = list(torch.ones(5, 8, device=DEVICE))
    single, double = chain((3,), 2, 2, 4), chain((5, 5), 1, 2, 4)
    assert can_sum([single, double], x, rows[:2])
    assert can_sum([single], x, rows[:1])
    wide, many = (
        torch.ones(1, MAX_GROUPS + 1, device=DEVICE),
        torch.randn(2, 1, 5, 5, device=DEVICE),
    )
    assert can_sum([chain((3,), 1, MAX_GROUPS, 1)], many, list(wide[:, 1:]))
    assert not can_sum([chain((3,), 1, MAX_GROUPS + 1, 1)], many, list(wide))
    assert not can_sum([], x, [])
    assert not can_sum([single] * 5, x, rows)
    assert not can_sum([single, chain((3, 3, 3), 1, 2, 4)], x, rows[:2])
    assert not can_sum([single, chain((3,), 1, 2, 8)], x, rows[:2])
    assert not can_sum([single, double], x, [row.double() for row in rows[:2]])
    assert not can_sum([single, double], torch.randn(2, 8, 5, 5, device=DEVICE), rows[:2])
    # More numbers than 32 bits count.
    assert can_sum([single, double], x[:1, :, :1, :1].expand(2**11, -1, 2**7, 2**7), rows[:2])
    assert not can_sum([single, double], x[:1, :, :1, :1].expand(2**13, -1, 2**7, 2**7), rows[:2])
    assert not can_sum([single, double], x)  # their norms have no weights
    affine = [single[0]._replace(norm=nn.BatchNorm2d(8).to(DEVICE))]
    assert can_sum([affine], x)
    assert not can_sum([affine, double], x)
    assert not can_sum([affine], x, rows[:1])
    single[0].norm.eval()
    assert not can_sum([single, double], x, rows[:2])


def test_sizes_that_do_not_compile_end_in_one_sentence() -> None:
    class OutOfResources(triton.errors.TritonError):
        pass

    def operation(x: Tensor) -> Tensor:
        raise OutOfResources("out of resource: shared memory\nsee elsewhere")

    guarded = triton_sums.on_its_device(operation)
    with pytest.raises(UserError, match=r"\(out of resource: shared memory\): .*DARTSL_NATIVE=0"):
        guarded(torch.zeros(1))
