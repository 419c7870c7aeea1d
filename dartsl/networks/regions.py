"""Other ways to compute the same network: compiled operations, cells that are computed twice."""

import contextlib
import logging
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dartsl.errors import first_line, unknown

log = logging.getLogger(__name__)

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
# One code object runs for every width, stride, batch size and choice of gradients.
MAX_GRAPHS = 256


def compile_regions(
    regions: Iterable[nn.Module],
    mode: CompileMode = "default",
    device: torch.device | str = "cpu",
    backend: str = "inductor",
) -> bool:
    """Compile modules one by one, in place; those of equal sizes share their graphs.

    The graphs are made when a module first runs. What joins the regions stays as it is, so that no
    schedule makes them anew.

    Args:
        regions: what to compile, `Supernet.regions()` or `FinalNetwork.regions()`.
        mode: of `torch.compile`; "reduce-overhead" replays CUDA graphs.
        device: where they will run.
        backend: of `torch.compile`.

    Returns:
        Whether it was done: this machine may lack what torch.compile needs, which the log says.

    Raises:
        UserError: for an unknown mode.
    """
    if mode not in get_args(CompileMode):
        raise unknown("compile mode", mode, get_args(CompileMode))
    try:
        torch.compile(lambda x: x + 1, dynamic=False, backend=backend)(torch.ones(1, device=device))
    except Exception as error:  # whatever the compiler's parts raise
        reason = first_line(error)
        log.warning("torch.compile does not work here, the network runs uncompiled: %s", reason)
        return False
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = MAX_GRAPHS
    for region in regions:
        region.compile(dynamic=False, mode=mode if backend == "inductor" else None, backend=backend)
    return True


def recomputed(cell: nn.Module, *inputs: Any) -> Tensor:
    """`cell(*inputs)`, of which only the inputs are kept for the backward pass (arXiv:1604.06174).

    The backward pass computes the cell once more, with the same random numbers and buffers. What
    happens to buffers then does not count, so that running statistics count the first time alone.
    """
    return checkpoint(
        cell,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _AsBefore(cell.buffers())),
    )


class _AsBefore:
    """Within: buffers are as they were when this was made; after: as before it was entered.

    Entered in every backward pass.
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        # Beside autograd, which would take the change for one of what it has kept.
        self.buffers = [buffer.data for buffer in buffers]
        self.first = [buffer.clone() for buffer in self.buffers]

    def __enter__(self) -> None:
        self.saved = [buffer.clone() for buffer in self.buffers]
        torch._foreach_copy_(self.buffers, self.first)

    def __exit__(self, *_: object) -> None:
        torch._foreach_copy_(self.buffers, self.saved)
