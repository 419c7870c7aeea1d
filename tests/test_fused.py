"""What decides whether kernels are used."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dartsl.fused import found_once, works


def test_what_is_found_once_is_a_constant_for_a_compiler() -> None:
    asked = []

    @found_once
    def answer(device: torch.device, dtype: torch.dtype) -> bool:
        asked.append(torch.Generator().manual_seed(0))  # what no graph takes
        return dtype == torch.float64

    @torch.compile(backend="aot_eager", fullgraph=True)
    def twice(x: Tensor) -> Tensor:
        return 2 * x if answer(x.device, x.dtype) else x

    for _ in range(2):
        assert twice(torch.ones((), dtype=torch.float64)) == 2
        assert twice(torch.ones(())) == 1
    assert len(asked) == 2


def product(running: Sequence[Tensor], x: Tensor, weight: Tensor) -> Tensor:
    return x * weight * (running[0] if running else 1)


class WithGradientOf(torch.autograd.Function):
    """A product whose gradient is off by a factor."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factor = factor
        return x * weight

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return gradient * weight * ctx.factor, gradient * x, None


@pytest.mark.parametrize(
    ("maps", "factor", "in_evaluation", "expected"),
    [
        (torch.float32, 1.0, 1.0, True),
        (torch.float32, 1.01, 1.0, False),
        (torch.float32, 1.0, 1.01, False),
        (torch.float32, float("nan"), 1.0, False),
        (torch.bfloat16, 1.01, 1.01, True),
        (torch.bfloat16, 1.2, 1.0, False),
        (torch.bfloat16, 1.0, 1.2, False),
    ],
)
def test_kernels_work_that_find_what_pytorch_finds(
    maps, factor, in_evaluation, expected, caplog
) -> None:
    def by_kernels(running: Sequence[Tensor], x: Tensor, weight: Tensor) -> Tensor:
        if running:
            return product(running, x, weight) * in_evaluation
        return WithGradientOf.apply(x, weight, factor)

    found = works(
        "products", by_kernels, product, [(3, 4), (3, 4)], [(4,)], maps, torch.device("cpu")
    )
    assert found == expected
    assert [("kernels for products" in line) for line in caplog.messages] == [True] * (not found)
