"""A mixed operation on a GPU in single precision is the one on the CPU in double precision."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dartsl.networks.supernet import MixedOperation
from dartsl.search_space import DARTS_PRIMITIVES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def results(mixed: nn.Module, x: Tensor, weights: Tensor, held: bool) -> list[Tensor]:
    """Outputs, gradients and buffers, on the CPU."""
    for parameter in mixed.parameters():
        parameter.requires_grad_(not held)
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    outputs = mixed(x, weights)
    total = sum((output * (1 + k)).square().sum() for k, output in enumerate(outputs))
    wanted = [x, weights, *(p for p in mixed.parameters() if p.requires_grad)]
    found = [*outputs, *torch.autograd.grad(total, wanted), *mixed.buffers()]
    return [tensor.detach().cpu().double() for tensor in found]


@pytest.mark.parametrize("held", [False, True], ids=["all gradients", "alpha's"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("edges", [1, 3])
def test_outputs_gradients_and_running_statistics(edges, stride, held) -> None:
    torch.manual_seed(0)
    exact = MixedOperation(16, stride, DARTS_PRIMITIVES, edges).double()
    single = copy.deepcopy(exact).float().cuda()
    single.to(memory_format=torch.channels_last)
    x = torch.randn(4, 16, 9, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    weights = torch.rand(edges, len(DARTS_PRIMITIVES), dtype=torch.float64)
    expected = results(exact, x, weights, held)
    actual = results(single, x.float().cuda(), weights.float().cuda(), held)
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).norm() <= 2e-4 * other.norm().clamp_min(1e-3)


def in_evaluation() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """In double precision on the CPU, in single precision on the GPU; what both are given."""
    torch.manual_seed(0)
    exact = MixedOperation(16, 1, DARTS_PRIMITIVES, 3).double().eval()
    for name, buffer in exact.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.5, 2.0)
    x = torch.randn(4, 16, 9, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    weights = torch.rand(3, len(DARTS_PRIMITIVES), dtype=torch.float64)
    return exact, copy.deepcopy(exact).float().cuda(), x, weights


def test_evaluation() -> None:
    exact, single, x, weights = in_evaluation()
    with torch.inference_mode():
        found = single(x.float().cuda(), weights.float().cuda())
        for one, other in zip(found, exact(x, weights), strict=True):
            assert (one.cpu().double() - other).norm() <= 2e-3 * other.norm()


def test_gradients_in_evaluation() -> None:
    exact, single, x, weights = in_evaluation()
    for held in (False, True):
        expected = results(exact, x, weights, held)
        actual = results(single, x.float().cuda(), weights.float().cuda(), held)
        for one, other in zip(actual, expected, strict=True):
            assert (one - other).norm() <= 2e-3 * other.norm().clamp_min(1e-3)  # TF32 by cuDNN
