"""Compile all kernels for a GPU that is not there; print the shared memory that each takes.

    python -m tests.compile_kernels 90 bfloat16

Triton's interpreter takes kernels that its compiler does not.
"""

import json
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class Absent:
    """What Triton asks of a GPU before it compiles for it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """The GPU, of whose threads 32 run together."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The one that is always there."""
        return 0


def compile_all(capability: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of shared memory, the most of every kernel's versions."""
    driver.set_active(Absent(capability))
    found: dict[str, int] = {}
    run = JITFunction.run

    def compiled(self: Any, *given: Any, **named: Any) -> None:
        kernel = run(self, *given, **{**named, "warmup": True})
        found[self.__name__] = max(found.get(self.__name__, 0), kernel.metadata.shared)

    JITFunction.run = compiled
    from dartsl.native import pools_gpu, separable_sum_gpu

    separable_sums(separable_sum_gpu, dtype)
    pools(pools_gpu, dtype)
    return found


def separable_sums(gpu: ModuleType, dtype: torch.dtype) -> None:
    """Of a node of the search, and of an edge of the final network."""
    for batch, channels, size, kernels, deep, edges, stride, affine in (
        (64, 16, 32, (3, 5, 3, 5), 2, 4, 2, False),
        (96, 36, 32, (3,), 1, 1, 1, True),
        (64, 64, 8, (3, 5), 0, 3, 1, False),  # chains apart, for there are few pixels
    ):
        total, all_kernels = edges * channels, kernels + kernels[:deep]
        x = channels_last(batch, channels, size, dtype)
        depthwise = [torch.zeros(total, 1, kernel, kernel) for kernel in all_kernels]
        pointwise = [torch.zeros(total, channels, 1, 1) for _ in all_kernels]
        scales, inner = torch.zeros(len(kernels), total), [torch.zeros(deep, total)] * 2
        given = [torch.zeros(total), *inner[: 2 * deep]] if affine else [], depthwise, pointwise
        options = (1,) * len(all_kernels), deep, stride
        norms = [torch.zeros(total)] * 2 * len(all_kernels)
        gpu.forward(x, scales, None, *given, *options, 1e-5, norms)
        output, *kept = gpu.forward(x, scales, None, *given, *options, 1e-5)
        gpu.backward(output, x, scales, *given, kept, *options, (True, True))


def pools(gpu: ModuleType, dtype: torch.dtype) -> None:
    """Of a node of the search."""
    x, weights = channels_last(64, 16, 32, dtype), torch.zeros(4, 3)
    gpu.forward(x, weights, (1, 1, 1), 1, 1e-5, [torch.zeros(64)] * 4)
    output, y, statistics = gpu.forward(x, weights, (1, 1, 1), 1, 1e-5)
    gpu.backward(output, x, weights, y, statistics, (1, 1, 1), 1, (True, True))


def channels_last(batch: int, channels: int, size: int, dtype: torch.dtype) -> Tensor:
    """An image's map of zeros."""
    x = torch.zeros(batch, channels, size, size, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]), getattr(torch, sys.argv[2]))))
