"""The copies of a node are PyTorch's, in C and without it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dartsl.native import build
from dartsl.native import copies as native
from dartsl.networks.merged import rectified_copies
from tests.derivatives import Ends

needs_compiler = pytest.mark.skipif(not build.is_built(), reason="no C compiler on this machine")


def reference(x: Tensor, num_edges: int, readers: int) -> list[Tensor]:
    return [F.relu(torch.cat([x] * num_edges, dim=1))] * readers


def random(*shape: int, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def gradient_of_x(copies, x: Tensor, edges: int, directions: list[Tensor | None]) -> Tensor:
    """The gradient of x where readers give these gradients; who gives None does not read."""
    outputs = copies(x, edges, len(directions))
    read = [(o, d) for o, d in zip(outputs, directions, strict=True) if d is not None]
    (found,) = torch.autograd.grad([o for o, _ in read], x, [d for _, d in read])
    return found


@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 5, 3), (3, 1, 1, 1), (1, 20, 33, 33)])
def test_copies_and_gradients_are_pytorchs(shape, dtype) -> None:
    edges, readers = 3, 2
    x = random(*shape, dtype=dtype).requires_grad_()
    for found in rectified_copies(x, edges, readers):
        assert torch.equal(found, reference(x, edges, readers)[0])
        assert found.is_contiguous(memory_format=torch.channels_last)
    batch, channels, *size = shape
    directions = random(readers, batch, edges * channels, *size, dtype=dtype).unbind()
    for given in (list(directions), [None, directions[1]]):
        found, expected = (
            gradient_of_x(copies, x, edges, given) for copies in (rectified_copies, reference)
        )
        assert torch.allclose(found, expected, rtol=0, atol=4 * torch.finfo(dtype).eps * 6)


@needs_compiler
def test_no_reader_gives_a_gradient() -> None:
    x = random(2, 3, 4, 4).requires_grad_()
    total = sum(Ends.apply(output).sum() for output in rectified_copies(x, 2, 2))
    assert torch.autograd.grad(total, x, allow_unused=True) == (None,)


@needs_compiler
@pytest.mark.parametrize("again", [False, True])
def test_nan_and_what_relu_stops(again) -> None:
    """As PyTorch's: NaN stays, its gradient passes; a gradient that is not finite is stopped."""
    x = torch.tensor([float("nan"), -1.0, 0.0, 1.0]).view(1, 4, 1, 1).requires_grad_()
    direction = torch.full((1, 8, 1, 1), float("inf"))
    for copies in (rectified_copies, reference):
        (output,) = copies(x, 2, 1)
        (found,) = torch.autograd.grad(output, x, direction, create_graph=again)
        assert output.isnan().flatten().tolist() == [True, False, False, False] * 2
        assert found.flatten().tolist() == [float("inf"), 0.0, 0.0, float("inf")]


@needs_compiler
@pytest.mark.parametrize("read", [(0, 1, 2), (1,)])
def test_gradients_and_their_gradients_are_those_of_finite_differences(read) -> None:
    x = random(2, 2, 2, 3).requires_grad_()

    def function(x: Tensor) -> tuple[Tensor, ...]:
        outputs = rectified_copies(x, 2, 3)
        return tuple((reader + 1) * outputs[reader] ** 2 for reader in read)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@needs_compiler
def test_any_number_of_threads_gives_the_same_bits() -> None:
    x, directions = random(5, 20, 33, 33), random(2, 5, 60, 33, 33)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            output = native.rectified_copies(x, 3)
            backward = native.rectified_copies_backward(directions.unbind(), x, 3)
            found.append((output, backward))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_under_autocast_and_without_a_compiler_they_are_pytorchs(monkeypatch) -> None:
    monkeypatch.setattr(native, "rectified_copies", None)  # it would fail
    x = random(2, 3, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = rectified_copies(x, 2, 1)
    assert torch.equal(found, reference(x, 2, 1)[0])
    monkeypatch.setattr(build, "is_built", lambda: False)
    (found,) = rectified_copies(x, 2, 1)
    assert torch.equal(found, reference(x, 2, 1)[0])


@needs_compiler
def test_the_operations_of_torch() -> None:
    x = random(2, 3, 4, 5)
    operations = torch.ops.dartsl
    torch.library.opcheck(operations.rectified_copies.default, (x, 2))
    output = operations.rectified_copies(x, 2)
    given = [torch.randn_like(output)] * 2, x, 2
    torch.library.opcheck(operations.rectified_copies_backward.default, given)
