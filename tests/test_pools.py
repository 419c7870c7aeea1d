"""The weighed pools are PyTorch's, in C and everywhere else."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.native import build
from dartsl.networks.merged import MergedBatchNorm, NormalizedPool, can_share, shared_sum
from dartsl.networks.supernet import MixedOperation
from dartsl.pools import AvgPool2d, WeightedPools, _formula
from dartsl.search_space import DARTS_PRIMITIVES

needs_compiler = pytest.mark.skipif(not build.is_built(), reason="no C compiler on this machine")
IDENTITY, MAXIMUM, AVERAGE = range(3)

# kinds of maps, stride, edges, images, channels, size; vectors hold 2 to 16 numbers
CASES = [
    ((0, 1, 2), 1, 3, 2, 16, (6, 6)),
    ((0, 1, 2), 1, 2, 3, 5, (1, 7)),
    ((0, 1, 2), 1, 4, 2, 19, (7, 2)),
    ((1, 2), 2, 2, 2, 16, (7, 9)),
    ((1, 2), 2, 2, 2, 3, (8, 6)),
    ((0, 1), 1, 1, 2, 33, (5, 4)),
    ((0, 2), 1, 2, 2, 8, (3, 3)),
    ((1,), 1, 2, 4, 1, (4, 4)),
    ((2,), 2, 3, 2, 20, (2, 2)),
    ((1, 2), 2, 2, 3, 4, (1, 1)),
    ((0, 1, 2), 1, 2, 40, 6, (9, 9)),  # of more images than are summed apart
]


def inputs(case: tuple, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x and weights, which want gradients."""
    kinds, _, edges, images, channels, size = case
    torch.manual_seed(0)
    x = torch.randn(images, channels, *size, dtype=dtype)
    return x.requires_grad_(), torch.rand(edges, len(kinds), dtype=dtype).requires_grad_()


def ours(case: tuple, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return WeightedPools.apply(x, weights, list(case[0]), case[1], 1e-5)


def reference(case: tuple, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The sums, and mean, 1 / sqrt(var + eps) and variance without bias of the pools."""
    kinds, stride, *_ = case
    pools = [F.max_pool2d(x, 3, stride, 1)] * (MAXIMUM in kinds)
    pools += [F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)] * (AVERAGE in kinds)
    maps = [x] * (IDENTITY in kinds)
    maps += [F.batch_norm(pool, None, None, training=True, eps=1e-5) for pool in pools]
    output = torch.cat(
        [sum(w * single for w, single in zip(row, maps, strict=True)) for row in weights], dim=1
    )
    var, mean = torch.var_mean(torch.cat(pools, dim=1), (0, 2, 3), correction=0)
    number = pools[0].numel() // pools[0].shape[1]
    return output, torch.stack([mean, (var + 1e-5).rsqrt(), var * number / (number - 1)])


def gradients(output: Tensor, ends: tuple[Tensor, ...]) -> list[Tensor]:
    torch.manual_seed(1)
    gradient = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    return list(torch.autograd.grad(output, ends, gradient))


def results(function, case: tuple, x: Tensor, weights: Tensor) -> list[Tensor]:
    output, statistics = function(case, x, weights)
    return [output.detach(), statistics.detach(), *gradients(output, (x, weights))]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_pytorchs(case) -> None:
    given = inputs(case)
    expected = results(reference, case, *given)
    assert_close(results(ours, case, *given), expected, 1e-11)
    single = [tensor.detach().float().requires_grad_() for tensor in given]
    assert_close(results(ours, case, *single), expected, 3e-4)


@needs_compiler
def test_of_equal_pixels_the_first_has_the_gradient() -> None:
    case = ((0, 1, 2), 1, 2, 2, 16, (6, 6))
    x, weights = inputs(case)
    x = (2 * x).round().detach().requires_grad_()
    assert_close(results(ours, case, x, weights), results(reference, case, x, weights), 1e-11)


@needs_compiler
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_the_gradients_that_are_wanted(wanted) -> None:
    case = CASES[0]
    given = inputs(case)
    expected = results(reference, case, *given)[2:]
    ends = [t.detach().requires_grad_(want) for t, want in zip(given, wanted, strict=True)]
    output, _ = ours(case, *ends)
    (actual,) = gradients(output, tuple(end for end in ends if end.requires_grad))
    assert torch.allclose(actual, expected[wanted.index(True)], rtol=1e-11, atol=1e-11)


@needs_compiler
def test_nan_is_the_highest() -> None:
    case = ((1, 2), 1, 1, 1, 3, (5, 5))
    x, weights = inputs(case)
    with torch.no_grad():
        x[0, 1, 2, 2] = torch.nan
        actual, _ = ours(case, x, weights)
        expected, _ = reference(case, x, weights)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.allclose(actual[:, ::2], expected[:, ::2])


@needs_compiler
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_every_layout_gives_the_same_bits(case) -> None:
    x, weights = (tensor.detach() for tensor in inputs(case))
    wide = torch.cat([x, x], dim=3)[..., : x.shape[3]]
    expected = None
    for given in (x, wide, x.contiguous(memory_format=torch.channels_last)):
        for contiguous in (torch.contiguous_format, torch.channels_last):
            ends = given.clone(memory_format=torch.preserve_format).requires_grad_(), weights
            output, statistics = ours(case, *ends)
            gradient = torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view(output.shape)
            gradient = gradient.contiguous(memory_format=contiguous)
            found = [output, statistics, *torch.autograd.grad(output, ends[:1], gradient)]
            expected = expected or found
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_compiler
def test_any_number_of_threads_gives_the_same_bits() -> None:
    case = ((0, 1, 2), 1, 3, 40, 5, (9, 9))
    given = inputs(case)
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(results(ours, case, *given))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    "case", [((0, 1, 2), 1, 2, 2, 2, (3, 3)), ((1, 2), 2, 2, 2, 2, (4, 3))], ids=str
)
def test_gradients_and_their_gradients_are_those_of_finite_differences(each_code, case) -> None:
    given = inputs(case)

    def function(x: Tensor, weights: Tensor) -> Tensor:
        if build.is_built():
            return ours(case, x, weights)[0]
        maps = [int(kind in case[0]) for kind in range(3)]
        return _formula(x, weights, maps, case[1], 1e-5)

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


@needs_compiler
def test_the_operations_of_torch() -> None:
    x, weights = (tensor.detach() for tensor in inputs(CASES[0]))
    output, y, statistics = torch.ops.dartsl.weighted_pools(x, weights, [1, 1, 1], 1, 1e-5)
    utilities = "test_schema", "test_faketensor"
    operation = torch.ops.dartsl.weighted_pools.default
    torch.library.opcheck(operation, (x, weights, [1, 1, 1], 1, 1e-5), test_utils=utilities)
    for wanted in itertools.product((False, True), repeat=2):
        arguments = output, x, weights, y, statistics, [1, 1, 1], 1, list(wanted)
        operation = torch.ops.dartsl.weighted_pools_backward.default
        torch.library.opcheck(operation, arguments, test_utils=utilities)


# ---- in a mixed operation -----------------------------------------------------------------------


def pool(kind: type[nn.Module] = nn.MaxPool2d, channels: int = 4, **options) -> NormalizedPool:
    module = kind(**{"kernel_size": 3, "stride": 1, "padding": 1} | options)
    return NormalizedPool(module, channels, 2)  # type: ignore[arg-type]


def average(**options) -> NormalizedPool:
    return pool(AvgPool2d, **{"count_include_pad": False} | options)


class OtherPool(nn.MaxPool2d):
    """Whatever it computes."""


def rows(number: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(torch.rand(number, 2, dtype=dtype))


@needs_compiler
def test_what_is_shared() -> None:
    x = torch.randn(2, 4, 5, 5)
    assert can_share([pool()], x, rows(1))
    assert can_share([average(), nn.Identity(), pool()], x, rows(3))
    assert can_share([pool(nn.AvgPool2d, count_include_pad=False)], x, rows(1))
    assert can_share([pool(), average()], x.double(), rows(2)) is False  # float norms
    assert not can_share([nn.Identity()], x, rows(1))
    assert not can_share([pool(), pool()], x, rows(2))
    assert not can_share([pool()], x, rows(1, torch.float64))
    assert not can_share([pool()], x[:1, :, :1, :1], rows(1))
    assert not can_share([pool(stride=2)], x[:1, :, :2, :2], rows(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_share([pool()], x, rows(1))
    assert not can_share([pool()], x.bfloat16(), rows(1))


@needs_compiler
@pytest.mark.parametrize(
    "other",
    [
        pool(OtherPool),
        pool(kernel_size=2, padding=0),
        pool(ceil_mode=True),
        pool(dilation=2),
        average(count_include_pad=True),
        average(divisor_override=3),
        nn.ReLU(),
    ],
    ids=str,
)
def test_other_operations_are_not_shared(other) -> None:
    assert not can_share([other], torch.randn(2, 4, 5, 5), rows(1))


@needs_compiler
def test_a_pool_that_does_more_when_it_is_called_is_called() -> None:
    operations = [nn.Identity(), pool()]
    x = torch.randn(2, 4, 5, 5)
    assert can_share(operations, x, rows(2))
    operations[1][0].register_forward_hook(lambda *_: None)
    assert not can_share(operations, x, rows(2))


@needs_compiler
def test_synchronized_statistics_are_not_shared() -> None:
    other = pool()
    other[1].synchronized = True
    assert not can_share([other], torch.randn(2, 4, 5, 5), rows(1))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("primitives", [DARTS_PRIMITIVES, DARTS_PRIMITIVES[::-1]], ids=["", "back"])
def test_a_mixed_operation_is_the_one_without_it(monkeypatch, stride, primitives) -> None:
    """Outputs, gradients, and running statistics of every edge."""
    torch.manual_seed(0)
    mixed = MixedOperation(6, stride, primitives, 3).double()
    for norm in (m for m in mixed.modules() if isinstance(m, MergedBatchNorm)):
        norm.running_mean.normal_()
    other = copy.deepcopy(mixed)
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    weights = torch.rand(3, len(primitives), dtype=torch.float64)

    def everything(mixed: MixedOperation) -> list[Tensor]:
        ends = x.clone().requires_grad_(), weights.clone().requires_grad_()
        outputs = mixed(*ends)
        total = sum((output * (1 + n)).square().sum() for n, output in enumerate(outputs))
        found = torch.autograd.grad(total, [*ends, *mixed.parameters()])
        return [*(output.detach() for output in outputs), *found, *mixed.buffers()]

    actual = everything(mixed)
    monkeypatch.setattr(build, "is_built", lambda: False)
    assert_close(actual, everything(other), 1e-10)


@needs_compiler
def test_the_order_of_the_operations_is_that_of_their_weights() -> None:
    operations = [average(), pool(), nn.Identity()]
    x, weights = torch.randn(2, 4, 5, 5), rows(3)
    forward = shared_sum(operations, x, weights)
    backward = shared_sum(operations[::-1], x, weights[::-1])
    assert torch.equal(forward, backward)
