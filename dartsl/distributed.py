"""Several processes that search or train one network: what they exchange, and when.

Every process holds the whole network and takes its share of each batch; what leaves a process is
gradients alone. They are averaged in one call a backward pass, here. Where there is one process,
nothing happens.
"""

from collections.abc import Iterable, Sequence

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins import LayerSync
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from dartsl.batch_norm import SynchronizedBatchNorm2d
from dartsl.networks.merged import MergedBatchNorm


class ReplicaStrategy(DDPStrategy):
    """Data parallel, without the wrapper that reduces gradients as a backward pass goes.

    That wrapper does not serve a search: it never sees the gradients of `torch.autograd.grad`, so
    that every rank would find an architecture of its own, and it stops at parameters without a
    gradient. The modules call `average` instead.
    """

    def setup(self, trainer: pl.Trainer) -> None:
        """As Lightning does it, with a BatchNorm that is synchronized if the trainer says so."""
        if self._layer_sync is not None:
            self._layer_sync = SyncBatchNorm()
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Begin with the weights and buffers of rank 0, and wrap nothing."""
        assert self.model is not None
        broadcast([*self.model.parameters(), *self.model.buffers()])


class SyncBatchNorm(LayerSync):
    """Has all BatchNorms of a module take the statistics of all processes' batches."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronize the BatchNorms of `model`, in place."""
        self._set(model, nn.BatchNorm2d, SynchronizedBatchNorm2d, True)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Leave every process its own statistics again, in place."""
        self._set(model, SynchronizedBatchNorm2d, nn.BatchNorm2d, False)
        return model

    @staticmethod
    def _set(model: nn.Module, before: type, after: type, synchronized: bool) -> None:
        for module in model.modules():
            if type(module) is before:
                module.__class__ = after
            elif isinstance(module, MergedBatchNorm):
                module.synchronized = synchronized


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes; known before any is launched."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The means of tensors over all processes, in one exchange; laid out as they are."""
    if world_size() == 1 or not tensors:
        return list(tensors)
    flat = _flatten(tensors)
    dist.all_reduce(flat)
    return _unflatten(flat / world_size(), tensors)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Put the mean over all processes in the place of every `.grad`.

    A parameter without a gradient in this process counts as zero (a method may sample other
    operations in every process); without one in any it stays so, and the optimizer passes it by.

    Args:
        parameters: the same in all processes; those that require no gradient are left alone.
    """
    if world_size() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    used = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    *means, used_by = average([*gradients, used])
    for index, (parameter, mean) in enumerate(zip(trained, means, strict=True)):
        # Reading a number makes a GPU wait: only where this process cannot know it.
        if parameter.grad is not None or used_by[index] > 0:
            parameter.grad = mean


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


def largest(numbers: Sequence[int], device: torch.device) -> list[int]:
    """The largest of each number in any process, the same in all; a GPU waits for it."""
    if world_size() == 1:
        return list(numbers)
    tensor = torch.tensor(numbers, device=device, dtype=torch.long)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def gather(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors of every process in the order of their ranks, in one exchange."""
    if world_size() == 1 or not tensors:
        return [[tensor.clone() for tensor in tensors]]
    flat = _flatten(tensors)
    parts = [torch.empty_like(flat) for _ in range(world_size())]
    dist.all_gather(parts, flat)
    return [_unflatten(part, tensors) for part in parts]


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by those of rank 0, in one exchange a type."""
    if world_size() == 1:
        return
    for group in _by_type(tensors):
        flat = _flatten(group)
        dist.broadcast(flat, src=0)
        torch._foreach_copy_(group, _unflatten(flat, group))


def _by_type(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor.detach())
    return list(groups.values())


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """New tensors of the shapes, types and memory layouts of others."""
    parts = flat.split([tensor.numel() for tensor in like])
    results = [torch.empty_like(tensor) for tensor in like]
    for result, part in zip(results, parts, strict=True):
        result.copy_(part.view(result.shape))
    return results


@torch.no_grad()
def check_replicas(tensors: Iterable[Tensor], what: str) -> None:
    """Stop where the processes have drifted apart, which averaging makes impossible.

    Args:
        tensors: equal bit for bit in all processes, unless something is broken.
        what: they are called in the error.

    Raises:
        RuntimeError: where they differ.
    """
    if world_size() == 1:
        return
    drifted = []
    for group in _by_type(tensors):
        mine = _flatten(group)
        first = mine.clone()
        dist.broadcast(first, src=0)
        # As bytes: NaN is not equal to itself, and a search that diverged has not drifted.
        drifted.append((mine.view(torch.uint8) != first.view(torch.uint8)).any().float())
    differs = torch.stack(drifted).amax()
    dist.all_reduce(differs)
    if differs > 0:
        raise RuntimeError(
            f"In {int(differs)} of {world_size()} processes the {what} differ from rank 0's: "
            "this is no longer one search, and its result would mean nothing."
        )
