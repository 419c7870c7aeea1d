"""A convolution of single pixels with its BatchNorm is PyTorch's, in C and everywhere else."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl import pointwise
from dartsl.native import build
from dartsl.native import pointwise as native
from dartsl.networks.merged import MergedBatchNorm
from dartsl.pointwise import normalized_pointwise
from tests.derivatives import Ends

needs_compiler = pytest.mark.skipif(not build.is_built(), reason="no C compiler on this machine")

# groups, inputs and outputs of each, images, size. Vectors hold 2 to 16 numbers.
SMALL = [
    (1, 5, 7, 3, (5, 3)),
    (2, 1, 20, 2, (7, 7)),
    (3, 8, 16, 4, (3, 3)),
    (4, 20, 1, 2, (1, 5)),
    (5, 17, 14, 1, (6, 5)),  # more channels than are summed at once
    (1, 1, 1, 3, (2, 2)),
]
LARGE = (2, 5, 7, 9, (45, 45))  # of more parts than are summed apart

Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def arguments(groups: int, inputs: int, outputs: int, images: int, size: tuple) -> Arguments:
    """x, weight, scale and addend; all want gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (images, groups * inputs, *size),
        (groups * outputs, inputs, 1, 1),
        (groups * outputs,),
        (images, groups * outputs, *size),
    )
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    )


def statistics(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Running mean and variance that are those of no batch."""
    channels = len(weight)
    return torch.linspace(-1, 1, channels).to(weight), torch.linspace(1, 2, channels).to(weight)


def ours(x: Tensor, weight: Tensor, scale=None, addend=None, rectify=False, **options) -> Tensor:
    running = options.pop("running", statistics(weight))
    return normalized_pointwise(x, weight, *running, scale, addend, rectify=rectify, **options)


def by_module(x: Tensor, weight: Tensor, scale=None, addend=None, rectify=False, training=True):
    """The BatchNorm of a supernet, which takes the C code where it can."""
    outputs, inputs = weight.shape[:2]
    convolution = nn.Conv2d(x.shape[1], outputs, 1, groups=x.shape[1] // inputs, bias=False)
    convolution.weight = nn.Parameter(weight.detach())
    norm = MergedBatchNorm(outputs, 1).train(training)
    norm.running_mean, norm.running_var = statistics(weight)
    return norm.after(convolution, x, scale, addend, rectify)


def reference(
    x: Tensor, weight: Tensor, scale=None, addend=None, rectify=False, running=None, **options
) -> Tensor:
    y = F.conv2d(x, weight, groups=x.shape[1] // weight.shape[1])
    options = {"training": True} | options
    output = F.batch_norm(y, *(running or statistics(weight)), scale, None, **options)
    output = F.relu(output) if rectify else output
    return output if addend is None else output + addend


def with_gradients(function, tensors: Arguments, rectify: bool) -> list[Tensor]:
    """The output and the gradients of all tensors that want them, for some gradient of it."""
    output = function(*tensors, rectify=rectify)
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad(output, wanted, gradient)]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        # The weight of a single input only scales: by the formula its gradient is almost 0.
        scale = other.norm().clamp_min(0.1)
        assert (one.double() - other).norm() / scale < tolerance


def in_single(tensors: Arguments) -> Arguments:
    return tuple(t if t is None else t.detach().float().requires_grad_() for t in tensors)


def in_double(tensors: Arguments) -> Arguments:
    return tuple(t if t is None else t.detach().double().requires_grad_() for t in tensors)


@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize("case", SMALL)
def test_it_is_pytorchs(case) -> None:
    x, weight, scale, addend = arguments(*case)
    for rectify, optional in itertools.product((False, True), ((scale, addend), (None, None))):
        tensors = in_single((x, weight, *optional))
        double = in_double(tensors)
        expected = with_gradients(reference, double, rectify)
        assert_close(with_gradients(ours, double, rectify), expected, 1e-13)
        found = with_gradients(ours, tensors, rectify)
        assert all(tensor.dtype == torch.float32 for tensor in found)
        assert_close(found, expected, 1e-5)


@needs_compiler
@pytest.mark.parametrize("rectify", [False, True])
def test_many_pixels(rectify) -> None:
    tensors = arguments(*LARGE)
    expected = with_gradients(reference, tensors, rectify)
    assert_close(with_gradients(ours, tensors, rectify), expected, 1e-13)


@needs_compiler
@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3))[1:])
def test_the_gradients_that_are_wanted(wanted) -> None:
    tensors = arguments(*SMALL[0])[:3]
    for tensor, want in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(want)
    expected = with_gradients(reference, tensors, True)
    assert len(expected) == 1 + sum(wanted)
    assert_close(with_gradients(ours, tensors, True), expected, 1e-13)


@needs_compiler
def test_running_statistics() -> None:
    x, weight, *_ = arguments(*SMALL[0])
    expected, found = statistics(weight), statistics(weight)
    for _ in range(2):
        reference(x, weight, running=expected, momentum=0.3)
        ours(x, weight, running=found, momentum=0.3)
    assert_close(list(found), list(expected), 1e-14)


@needs_compiler
def test_a_mean_that_is_large_beside_the_deviation() -> None:
    x, weight, scale, addend = arguments(4, 6, 5, 8, (20, 20))
    single = in_single((x + 1e3, weight, scale, addend))
    exact = with_gradients(reference, in_double(single), False)
    errors = [
        [(t.double() - e).norm() / e.norm() for t, e in zip(found, exact, strict=True)]
        for found in (with_gradients(f, single, False) for f in (ours, reference))
    ]
    for ours_is, pytorchs in zip(*errors, strict=True):
        assert ours_is <= 2 * pytorchs  # a processor may not have fused additions


@needs_compiler
@pytest.mark.parametrize("rectify", [False, True])
def test_nan_stays_in_its_group(rectify) -> None:
    tensors = arguments(*SMALL[2])
    tensors[0].data[1, 2, 0, 1] = float("nan")  # of the first group
    found, expected = (with_gradients(f, tensors, rectify) for f in (ours, reference))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
    assert found[0][:, :16].isnan().all()
    assert not found[0][:, 16:].isnan().any()


def layouts(tensor: Tensor) -> list[Tensor]:
    """The same numbers in channels_last, in NCHW, and in neither."""
    wider = torch.stack([tensor, tensor + 1], dim=-1)
    return [tensor.contiguous(memory_format=torch.channels_last), tensor, wider[..., 0]]


@needs_compiler
def test_every_layout_gives_the_same_bits() -> None:
    x, weight, scale, addend = (tensor.detach() for tensor in arguments(*SMALL[0]))
    gradient = torch.randn(3, 7, 5, 3, dtype=torch.float64)
    found = []
    for x_, addend_, gradient_ in zip(*map(layouts, (x, addend, gradient)), strict=True):
        output, y, of_y = native.normalized_pointwise(x_, weight, scale, addend_, 1e-5, True)
        given = gradient_, x_, weight, scale, y, of_y, 1, True
        gradients = native.normalized_pointwise_backward(*given, [True] * 3)
        found.append([output, y, of_y, *gradients])
        # What comes after need not put it in order.
        for tensor in (output, gradients[0]):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_compiler
def test_any_number_of_threads_gives_the_same_bits() -> None:
    tensors = in_single(arguments(*LARGE))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(with_gradients(ours, tensors, True))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_compiler
@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
def test_gradients_and_their_gradients_are_those_of_finite_differences(
    rectify, with_scale, weighed
) -> None:
    x, weight, scale, addend = arguments(2, 2, 3, 2, (2, 3))
    weight.requires_grad_(weighed)  # without, x is not kept
    tensors = (x, weight, scale if with_scale else None, addend)

    def function(*given: Tensor | None) -> Tensor:
        return ours(*given, rectify=rectify)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@needs_compiler
def test_an_input_that_is_made_of_another() -> None:
    """The gradient of a gradient ends at x, where it does not go on to what x is made of."""
    x, weight, scale, _ = arguments(*SMALL[0])

    def second(function) -> list[Tensor]:
        inner = torch.sin(x)
        output = function(inner, weight * scale.view(-1, 1, 1, 1), inner.mean() * scale)
        (gradient,) = torch.autograd.grad((output**3).sum(), inner, create_graph=True)
        return list(torch.autograd.grad((gradient**2).sum(), (x, weight, scale)))

    assert_close(second(ours), second(reference), 1e-11)


@needs_compiler
def test_an_output_that_nobody_differentiates() -> None:
    x, weight, *_ = arguments(*SMALL[0])
    _, _, of_batch = pointwise.NormalizedPointwise.apply(x, weight, None, None, 1e-5, False)
    assert not of_batch.requires_grad
    assert torch.autograd.grad(
        Ends.apply(ours(x, weight)).sum(), (x, weight), allow_unused=True
    ) == (None, None)


def test_one_pixel_cannot_be_normalized() -> None:
    x, weight, *_ = arguments(1, 3, 2, 1, (1, 1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        by_module(x, weight)
    expected = reference(x, weight, training=False)
    assert torch.equal(by_module(x, weight, training=False), expected)


def misfits() -> dict[str, Arguments]:
    x, weight, scale, addend = arguments(2, 4, 3, 2, (3, 3))
    return {
        "fewer inputs than a group has": (x[:, :6], weight, scale, None),
        "outputs that no group has": (x, weight[:5], scale[:5], None),
        "a scale of other channels": (x, weight, scale[:4], None),
        "an addend of fewer images": (x, weight, scale, addend[:0]),
        "a weight of another precision": (x, weight.float(), scale, None),
    }


@pytest.mark.parametrize("problem", misfits())
def test_the_c_code_does_not_take_what_does_not_fit(problem) -> None:
    assert not pointwise.can_normalize(*misfits()[problem])


def test_an_addend_is_broadcast_and_promoted() -> None:
    x, weight, scale, addend = arguments(2, 4, 3, 2, (3, 3))
    single = in_single((x, weight, scale, None))[:3]
    for tensors in ((x, weight, scale, addend[:1]), (*single, addend)):
        assert torch.equal(by_module(*tensors), reference(*tensors))


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("why", ["evaluation", "autocast", "no compiler", "half", "switched off"])
def test_elsewhere_it_is_pytorchs_bit_for_bit(why, rectify, monkeypatch) -> None:
    monkeypatch.setattr(native, "normalized_pointwise", None)  # it would fail
    tensors = in_single(arguments(*SMALL[2]))
    options = {"rectify": rectify, "training": why != "evaluation"}
    if why == "no compiler":
        monkeypatch.setattr(build, "is_built", lambda: False)
    if why == "switched off":
        monkeypatch.setenv("DARTSL_NATIVE", "0")
        monkeypatch.setattr(build, "library", build.library.__wrapped__)
    if why == "half":
        tensors = tuple(tensor.bfloat16() for tensor in tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=why == "autocast"):
        found = by_module(*tensors, **options)
        expected = reference(*tensors, **options)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@needs_compiler
@pytest.mark.parametrize("optional", [True, False])
def test_the_operations_of_torch(optional) -> None:
    """Schemas, and what torch.compile believes of shapes and strides."""
    x, weight, scale, addend = (tensor.detach() for tensor in arguments(*SMALL[0]))
    scale, addend = (scale, addend) if optional else (None, None)
    operations = torch.ops.dartsl
    given = x, weight, scale, addend, 1e-5, True
    output, y, of_y = operations.normalized_pointwise(*given)
    torch.library.opcheck(operations.normalized_pointwise.default, given)
    wanted = [True, False, optional]
    given = torch.randn_like(output), None, weight, scale, y, of_y, 1, True, wanted
    torch.library.opcheck(operations.normalized_pointwise_backward.default, given)


def test_which_convolutions_are_pointwise() -> None:
    conv = torch.nn.Conv2d
    assert pointwise.is_pointwise(conv(4, 6, 1, groups=2, bias=False))
    others = [
        conv(4, 6, 1),
        conv(4, 6, 3, bias=False),
        conv(4, 6, 1, stride=2, bias=False),
        conv(4, 6, 1, padding=1, bias=False),
        torch.nn.ConvTranspose2d(4, 6, 1, bias=False),
        torch.nn.ReLU(),
    ]
    assert not any(map(pointwise.is_pointwise, others))
