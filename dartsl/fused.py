"""What the operations share that compute at once what PyTorch's modules compute one by one.

They are there twice: in C for a CPU, in Triton for a GPU.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dartsl.native import build

GPU_TYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_NUMBERS = 2**28  # of a map: those of all edges together are counted in 32 bits on a GPU


class Precision(NamedTuple):
    """What a fused operation computes with.

    Attributes:
        maps: the type of its input and output.
        weights: that of weights, statistics and their gradients.
    """

    maps: torch.dtype
    weights: torch.dtype


def precision(x: Tensor) -> Precision | None:
    """The precision in which such a tensor is computed with in this place; None where it is not."""
    if x.device.type == "cpu":
        # Autocast chooses a precision for each of the modules.
        fits = x.dtype in build.SUFFIXES and not torch.is_autocast_enabled("cpu")
        return Precision(x.dtype, x.dtype) if fits and build.is_built() else None
    if x.device.type == "cuda" and x.dtype in GPU_TYPES and x.numel() < MAX_NUMBERS:
        mixed = torch.is_autocast_enabled("cuda")
        maps = torch.get_autocast_dtype("cuda") if mixed else x.dtype
        return Precision(maps, torch.float32) if _has_triton(x.device) else None
    return None


@torch.compiler.assume_constant_result
@functools.cache
def _has_triton(device: torch.device) -> bool:
    """Whether the kernels run on this GPU; loads them."""
    if os.environ.get("DARTSL_NATIVE") == "0" or importlib.util.find_spec("triton") is None:
        return False
    # Older ones have no bfloat16. Others than Nvidia's have not been tried.
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    importlib.import_module("dartsl.native.separable_sum_gpu")
    importlib.import_module("dartsl.native.pools_gpu")
    return True


def has_hooks(module: nn.Module) -> bool:
    """Whether something happens when it is called, such as pruning."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def differentiable_gradients(
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    gradient: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the inputs that are wanted, by functions that know their own gradients.

    Args:
        formula: of all inputs, by PyTorch's functions.
        inputs: of the operation.
        gradient: of the formula's value.
        wanted: of the inputs' gradients.
    """
    # Views: the gradients end here, even where one of the inputs is made from another.
    ends = [
        tensor.view_as(tensor) if want and tensor is not None else tensor
        for tensor, want in zip(inputs, wanted, strict=True)
    ]
    found = torch.autograd.grad(
        formula(*ends),
        [end for end, want in zip(ends, wanted, strict=True) if want and end is not None],
        gradient,
        create_graph=True,
    )
    remaining = iter(found)
    return [next(remaining) if want else None for want in wanted]
