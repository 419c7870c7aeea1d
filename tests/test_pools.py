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

# Of each of them, with every number of edges, in turn.
MAPS = [
    *(((0, 1), 1), ((0, 2), 1), ((0, 1, 2), 1)),
    *((kinds, stride) for kinds in ((1,), (2,), (1, 2)) for stride in (1, 2)),
]
SIZES = ((1, 9), (3, 1), (2, 2), (7, 5), (6, 8))
CHANNELS = (1, 3, 5, 16, 19)


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


@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize(("kinds", "stride"), MAPS, ids=str)
def test_any_sizes(kinds, stride) -> None:
    edges = itertools.cycle(range(1, 5))
    for size, channels in itertools.product(SIZES, CHANNELS):
        case = kinds, stride, next(edges), 4, channels, size
        given = inputs(case)
        expected = results(reference, case, *given)
        assert_close(results(ours, case, *given), expected, 1e-11)
        single = [tensor.detach().float().requires_grad_() for tensor in given]
        assert_close(results(ours, case, *single), expected, 3e-4)


@needs_compiler
@pytest.mark.parametrize(("kinds", "stride"), [m for m in MAPS if MAXIMUM in m[0]], ids=str)
def test_of_equal_pixels_the_first_has_the_gradient(kinds, stride) -> None:
    case = (kinds, stride, 2, 2, 16, (6, 6))
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


@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize(("kinds", "stride"), MAPS, ids=str)
def test_nan_is_the_highest_and_stays_in_its_channel(kinds, stride) -> None:
    case = (kinds, stride, 2, 2, 3, (5, 6))
    x, weights = inputs(case)
    with torch.no_grad():
        x[0, 1, 2, 2] = torch.nan
    found, expected = (results(function, case, x, weights) for function in (ours, reference))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-11, equal_nan=True)
    assert not found[2][:, ::2].isnan().any()


@needs_compiler
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_every_layout_gives_the_same_bits(case) -> None:
    x, weights = (tensor.detach() for tensor in inputs(case))
    wide = torch.cat([x, x], dim=3)[..., : x.shape[3]]
    expected = None
    for given in (x, wide, x.contiguous(memory_format=torch.channels_last)):
        for contiguous in (torch.contiguous_format, torch.channels_last):
            ends = given.clone(memory_format=torch.preserve_format), weights.clone()
            ends = tuple(end.requires_grad_() for end in ends)
            output, statistics = ours(case, *ends)
            gradient = torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view(output.shape)
            gradient = gradient.contiguous(memory_format=contiguous)
            found = [output, statistics, *torch.autograd.grad(output, ends, gradient)]
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
    output, y, statistics = torch.ops.dartsl.weighted_pools(x, weights, [1, 1, 1], 1, 1e-5, [])
    operation = torch.ops.dartsl.weighted_pools.default
    torch.library.opcheck(operation, (x, weights, [1, 1, 1], 1, 1e-5, []))
    for wanted in itertools.product((False, True), repeat=2):
        arguments = output, x, weights, y, statistics, [1, 1, 1], 1, list(wanted)
        operation = torch.ops.dartsl.weighted_pools_backward.default
        torch.library.opcheck(operation, arguments)


# In a mixed operation


def pool(kind: type[nn.Module] = nn.MaxPool2d, channels: int = 4, **options) -> NormalizedPool:
    module = kind(**{"kernel_size": 3, "stride": 1, "padding": 1} | options)
    return NormalizedPool(module, channels, 2)  # type: ignore[arg-type]


def average(**options) -> NormalizedPool:
    return pool(AvgPool2d, **{"count_include_pad": False} | options)


class OtherPool(nn.MaxPool2d):
    """Whatever it computes."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(-input)


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
    with torch.no_grad():  # in evaluation, on a GPU alone
        assert not can_share([pool().eval()], x, rows(1))


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
@pytest.mark.parametrize("which", range(4), ids=["identity", "pool and norm", "pool", "norm"])
def test_hooks_are_not_shared(which) -> None:
    operations = [nn.Identity(), pool()]
    x = torch.randn(2, 4, 5, 5)
    assert can_share(operations, x, rows(2))
    modules = [*operations, *operations[1]]
    modules[which].register_forward_hook(lambda *_: None)
    assert not can_share(operations, x, rows(2))


@needs_compiler
def test_operations_of_different_strides_are_not_shared() -> None:
    x = torch.randn(2, 4, 5, 5)
    assert can_share([pool(stride=2), average(stride=2)], x, rows(2))
    assert not can_share([pool(stride=2), average()], x, rows(2))
    assert not can_share([nn.Identity(), pool(stride=2)], x, rows(2))


@needs_compiler
def test_synchronized_statistics_are_not_shared() -> None:
    other = pool()
    other[1].synchronized = True
    assert not can_share([other], torch.randn(2, 4, 5, 5), rows(1))


ORDERS = [
    DARTS_PRIMITIVES,
    DARTS_PRIMITIVES[::-1],
    *itertools.permutations(("max_pool_3x3", "avg_pool_3x3", "skip_connect")),
]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("primitives", ORDERS, ids="-".join)
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


def plain(primitives: tuple[str, ...] = ("avg_pool_3x3", "max_pool_3x3"), stride: int = 1):
    return MixedOperation(4, stride, primitives, 2)


def by_modules(mixed: MixedOperation, x: Tensor, weights: Tensor) -> list[Tensor]:
    """What its pools give to every edge; a norm in evaluation by its running statistics."""
    maps = []
    for single, norm in mixed.operations:
        running = norm.running_mean[: x.shape[1]], norm.running_var[: x.shape[1]]
        given = (None, None) if norm.training else running
        maps.append(F.batch_norm(single(x), *given, training=norm.training))
    return [sum(w * one for w, one in zip(row, maps, strict=True)) for row in weights]


def change(mixed: MixedOperation, why: str) -> None:
    (mean, norm), (highest, _) = mixed.operations
    if why == "a hook":
        highest.register_forward_hook(lambda *given: given[-1].exp())
    elif why == "another type":
        highest.__class__ = OtherPool
    elif why == "ceil mode":
        mean.ceil_mode = highest.ceil_mode = True
    elif why == "padding counts":
        mean.count_include_pad = True
    elif why == "another kernel":
        highest.kernel_size, highest.padding = 5, 2
    elif why == "synchronized":
        norm.synchronized = True  # with nobody: of one process
    elif why == "a norm in evaluation":
        norm.eval().running_mean.fill_(0.5)


@pytest.mark.parametrize(
    "why",
    [
        *("a hook", "another type", "ceil mode", "padding counts", "another kernel"),
        *("synchronized", "a norm in evaluation", "autocast", "half", "two of a kind"),
    ],
)
def test_whatever_the_pools_are_they_are_weighed(each_code, why) -> None:
    torch.manual_seed(0)
    two = ("max_pool_3x3",) * 2
    mixed = plain(two, 2) if why == "two of a kind" else plain(stride=2)
    change(mixed, why)
    x, weights = torch.randn(2, 4, 8, 8), torch.rand(2, 2)
    if why == "half":
        mixed, x, weights = mixed.bfloat16(), x.bfloat16(), weights.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=why == "autocast"):
        found, expected = mixed(x, weights), by_modules(mixed, x, weights)
    rough = why in ("autocast", "half")
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.float(), other.float(), atol=0.05 if rough else 1e-5)
    buffers = [norm.running_mean for _, norm in mixed.operations]
    assert all(buffer.any() for buffer in buffers)


@pytest.mark.usefixtures("each_code")
@pytest.mark.parametrize(("stride", "side"), [(1, 1), (2, 1), (2, 2)])
def test_one_pixel_cannot_be_normalized(stride, side) -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        plain(stride=stride)(torch.randn(1, 4, side, side), torch.rand(2, 2))


@pytest.mark.usefixtures("each_code")
@pytest.mark.parametrize("stride", [1, 2])
def test_the_running_statistics_of_every_edge_follow_the_batchs(stride) -> None:
    torch.manual_seed(0)
    mixed, expected = plain(stride=stride).double(), []
    for _, norm in mixed.operations:
        norm.momentum = 0.3
        for buffer in (norm.running_mean.normal_(), norm.running_var.uniform_(1, 2)):
            expected.append(buffer.clone())
    for _ in range(2):
        x = torch.randn(3, 4, 7, 6, dtype=torch.float64)
        mixed(x, torch.rand(2, 2, dtype=torch.float64))
        for (single, _), mean, var in zip(
            mixed.operations, expected[::2], expected[1::2], strict=True
        ):
            of_edges = single(x).repeat(1, 2, 1, 1)
            F.batch_norm(of_edges, mean, var, training=True, momentum=0.3)
    found = [b for _, norm in mixed.operations for b in (norm.running_mean, norm.running_var)]
    assert_close(found, expected, 1e-13)
