"""Several processes that search or train one network: what they exchange, and when.

Every process holds the whole network and takes its share of each batch; what leaves a process is
gradients alone. They are averaged in one call a backward pass, here. Where there is one process,
nothing happens.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn


class ReplicaStrategy(DDPStrategy):
    """Data parallel, without the wrapper that reduces gradients as a backward pass goes.

    That wrapper does not serve a search: it never sees the gradients of `torch.autograd.grad`, so
    that every rank would find an architecture of its own, and it stops at parameters without a
    gradient. The modules call `average` instead.
    """

    def configure_ddp(self) -> None:
        """Begin with the weights and buffers of rank 0, and wrap nothing."""
        assert self.model is not None
        broadcast([*self.model.parameters(), *self.model.buffers()])


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes; known before any is launched."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The means of tensors over all processes, in one exchange; in their shapes."""
    if world_size() == 1 or not tensors:
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Put the mean over all processes in the place of every `.grad`."""
    if world_size() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient, mean in zip(gradients, average(gradients), strict=True):
            gradient.copy_(mean)


def share_of(count: int, device: torch.device) -> Tensor | float:
    """How much the mean loss over `count` examples weighs in the mean over all processes.

    Returns:
        count * processes / (examples of all processes): 1 but for an uneven last batch.
    """
    if world_size() == 1:
        return 1.0
    total = torch.tensor(float(count), device=device)
    dist.all_reduce(total)
    return count * world_size() / total


def total(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums of tensors over all processes."""
    sums = [tensor.clone() for tensor in tensors]
    if world_size() > 1:
        for tensor in sums:
            dist.all_reduce(tensor)
    return sums


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def check_replicas(tensors: Sequence[Tensor], what: str) -> None:
    """Stop where the processes have drifted apart, which averaging makes impossible.

    Args:
        tensors: equal bit for bit in all processes, unless something is broken.
        what: they are called in the error.

    Raises:
        RuntimeError: where they differ.
    """
    if world_size() == 1:
        return
    mine = torch.cat([tensor.detach().flatten() for tensor in tensors])
    first = mine.clone()
    dist.broadcast(first, src=0)
    differs = torch.tensor(float(not torch.equal(mine, first)), device=mine.device)
    dist.all_reduce(differs)
    if differs > 0:
        raise RuntimeError(
            f"In {int(differs)} of {world_size()} processes the {what} differ from rank 0's: "
            "this is no longer one search, and its result would mean nothing."
        )
