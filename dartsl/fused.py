"""What the operations share that compute at once what PyTorch's modules compute one by one.

They are there twice: in C for a CPU, in Triton for a GPU.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dartsl.errors import first_line
from dartsl.native import build

log = logging.getLogger(__name__)

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


def found_once(function: Callable[..., bool]) -> Callable[..., bool]:
    """The function, called once for equal arguments; torch.compile takes the answer as a constant.

    Of `functools.cache` alone it would not: it looks through the cache into the function.
    """
    cached = functools.cache(function)

    @torch.compiler.assume_constant_result
    @functools.wraps(function)
    def constant(*arguments: Any) -> bool:
        return cached(*arguments)

    return constant


@found_once
def _has_triton(device: torch.device) -> bool:
    """Whether the kernels run on this GPU; loads them."""
    if os.environ.get("DARTSL_NATIVE") == "0" or importlib.util.find_spec("triton") is None:
        return False
    # Older ones have no bfloat16. Others than Nvidia's have not been tried.
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        importlib.import_module("dartsl.native.separable_sum_gpu")
        importlib.import_module("dartsl.native.pools_gpu")
    except Exception as error:  # of a Triton that is broken, or of another version
        log.warning("Triton cannot be loaded, PyTorch computes what it would: %s", error)
        return False
    return True


def works(
    name: str,
    operation: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    shapes: Sequence[tuple[int, ...]],
    running: Sequence[tuple[int, ...]],
    maps: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether a GPU's kernels find what a CPU does in double precision; the log says if not.

    Kernels are compiled for this GPU by this version of Triton, which nobody may have tried.

    Args:
        name: of what they compute.
        operation: by the kernels, of statistics and its inputs. The statistics are running ones, or
            none for the batch's; gradients are compared with these.
        formula: the same, by PyTorch's functions.
        shapes: of the inputs of both, a map and weights.
        running: the shapes of running statistics.
        maps: type of the map.
        device: that GPU.
    """
    tolerance = 1e-3 if maps == torch.float32 else 0.1

    def results(
        function: Callable[..., Tensor], inputs: Sequence[Tensor], statistics: Sequence[Tensor]
    ) -> list[Tensor]:
        ends = [tensor.detach().requires_grad_() for tensor in inputs]
        output = function((), *ends)
        gradient = torch.randn(output.shape, generator=draw.manual_seed(1)).to(output)
        found = output.detach(), *torch.autograd.grad(output, ends, gradient)
        with torch.no_grad():
            return [*found, function(statistics, *inputs)]

    draw = torch.Generator().manual_seed(0)  # nobody else's random numbers
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cuda", enabled=False),
            # Not those of a checkpoint, which wants to see the same again in the backward pass.
            torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept),
        ):
            x, *weights = (torch.randn(shape, generator=draw).to(device) for shape in shapes)
            inputs = [x.to(maps), *weights]
            statistics = [0.5 + torch.rand(shape, generator=draw).to(device) for shape in running]
            found = results(operation, inputs, statistics)
            exactly = [[tensor.double().cpu() for tensor in some] for some in (inputs, statistics)]
            expected = results(formula, *exactly)
        errors = [
            float((one.cpu() - other).norm() / other.norm())
            for one, other in zip(found, expected, strict=True)
        ]
        if all(error < tolerance for error in errors):  # none is NaN
            return True
        reason = "they are off by " + ", ".join(f"{error:.1e}" for error in errors)
    except Exception as error:  # whatever a compiler or a driver raises
        reason = first_line(error)
    log.warning("The kernels for %s do not work on this GPU, PyTorch computes it: %s", name, reason)
    return False


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
