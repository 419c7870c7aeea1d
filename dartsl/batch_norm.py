"""BatchNorm whose statistics may be those of all processes.

Shapes: B images, C channels, H x W pixels.

PyTorch's own synchronized BatchNorm exists on GPUs only, cannot be differentiated twice and knows
none but PyTorch's modules. This one sums over the processes by a function whose derivative is the
same sum, so that all kinds of hypergradient go through it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    synchronized: bool = False,
) -> Tensor:
    """`F.batch_norm`, by the statistics of all processes' batches if `synchronized`.

    Args:
        x: [B, C, H, W]; B may differ between processes.
        running_mean: [C]; in training it follows the batch's.
        running_var: the same of the variance.
        weight: [C].
        bias: [C].
        training: whether the batch's statistics normalize, not the running ones.
        momentum: of the running statistics.
        eps: is added to the variance.
        synchronized: whether the batch is that of all processes.

    Returns:
        [B, C, H, W].
    """
    if not (training and synchronized and dist.is_initialized()):
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    mean, var, count = _moments_over_processes(x.to(running_mean.dtype))
    with torch.no_grad():
        ends = [mean.detach(), var.detach() * (count / (count - 1))]
        torch._foreach_lerp_([running_mean, running_var], ends, momentum)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    normalized = (x - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1)
    if bias is not None:
        normalized = normalized + bias.view(-1, 1, 1)
    return normalized.to(x.dtype)


def running_statistics(norms: Sequence[Any]) -> list[Tensor]:
    """The norms' means, then their variances."""
    return [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]


class Following(NamedTuple):
    """What waits for the end of `following_together`.

    Attributes:
        running: running statistics and the batches', by momentum, and by whether all are dense, as
            a kernel for many tensors wants it.
        counters: of batches.
    """

    running: dict[tuple[float, bool], tuple[list[Tensor], list[Tensor]]]
    counters: list[Tensor]


_following: ContextVar[Following | None] = ContextVar("following", default=None)


def follow(running: Sequence[Tensor], batch: Sequence[Tensor], momentum: float) -> None:
    """Let running statistics follow the batch's; within `following_together` at its end."""
    together = _together()
    if together is None:
        torch._foreach_lerp_(list(running), list(batch), momentum)
        return
    dense = all(tensor.is_contiguous() for tensor in (*running, *batch))
    all_running, all_batch = together.running.setdefault((momentum, dense), ([], []))
    all_running += running
    all_batch += batch


def count(norm: Any) -> None:
    """Let an `nn.BatchNorm2d` count a batch, when `follow` follows it; no other norm."""
    if type(norm) is not nn.BatchNorm2d or norm.num_batches_tracked is None:
        return
    together = _together()
    if together is None:
        norm.num_batches_tracked.add_(1)
    else:
        together.counters.append(norm.num_batches_tracked)


def _together() -> Following | None:
    return None if torch.compiler.is_compiling() else _following.get()


@contextmanager
def following_together() -> Iterator[None]:
    """Within: `follow` and `count` wait; at the end all statistics follow at once."""
    together = Following({}, [])
    token = _following.set(together)
    try:
        yield
    finally:
        _following.reset(token)
    with torch.no_grad():
        for (momentum, _), (running, batch) in together.running.items():
            torch._foreach_lerp_(running, batch, momentum)
        if together.counters:
            torch._foreach_add_(together.counters, 1)


@torch.compiler.disable
def _moments_over_processes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance [C] of x [B, C, H, W] in all processes, and the number of pixels.

    Nothing is lost where the mean is large beside the deviation: each process sends its mean and
    the variance around it (Chan et al., 1979), all in one exchange.
    """
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    own = torch.cat([mean, var, x.new_tensor([x.numel() // x.shape[1]])])
    rows = [torch.zeros_like(own)] * dist.get_world_size()
    rows[dist.get_rank()] = own
    table = SumOverProcesses.apply(torch.stack(rows))
    means, variances, counts = table.split([x.shape[1], x.shape[1], 1], dim=1)
    count = counts.sum()
    shares = counts / count
    mean = (shares * means).sum(dim=0)
    var = (shares * (variances + (means - mean) ** 2)).sum(dim=0)
    return mean, var, count.detach()


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, in each of them.

    Every process' output depends on every process' input, so the gradient of an input is the sum
    of the outputs' gradients: the same function again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Any shape, the same in all processes."""
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The sum of the gradients over all processes."""
        return SumOverProcesses.apply(gradients[0].contiguous())


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """An `nn.BatchNorm2d` by the statistics of all processes' batches.

    A module becomes one by its `__class__`: everything that refers to it, and its parameters and
    buffers, go on to.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            cast(float, self.momentum),
            self.eps,
            synchronized=True,
        )
