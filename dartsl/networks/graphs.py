"""Whole passes as CUDA graphs: Python launches a network's kernels once, not in every pass.

A pass through a network is the same sequence of kernels on the same memory as long as shapes,
precision and the tensors whose gradients are wanted stay the same. It is captured when it first
runs and replayed from then on, the forward pass as one graph and the backward pass as another. What
a pass reads (weights, alphas, running statistics, random numbers) it reads where it is at the time.
"""

import functools
import gc
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dartsl.errors import first_line

log = logging.getLogger(__name__)

WARM_UPS = 3  # passes after which no library has anything left to set up, as in PyTorch's own
MAX_PASSES = 16  # kinds of passes that are kept: shapes, precisions, choices of gradients

Outputs = Tensor | tuple[Tensor | None, ...]


def replay_passes(network: nn.Module, device: torch.device | str) -> bool:
    """Have a network's passes captured and replayed, in place.

    Args:
        network: a `Supernet` or `FinalNetwork`, or one that also says by a method `variant` what
            its passes depend on beside tensors; its modules stay as they are, in training or in
            evaluation mode as a whole.
        device: where it will run.

    Returns:
        Whether it was done: there are CUDA graphs on GPUs only, which the log says.
    """
    if torch.device(device).type != "cuda":
        log.warning("CUDA graphs need a GPU: the network runs without.")
        return False
    gc.collect()  # networks of runs before: they and their graphs, which hold memory, are a circle
    replay = Replay(network)
    network.forward, network._apply = replay, replay.move  # type: ignore[method-assign]
    return True


class Replay:
    """A network's `forward` that captures a pass of each kind once and replays it.

    Args:
        network: on a GPU from the first call on.

    Note:
        One pass at a time: where a second begins before the first one's backward pass, the latter
        raises a RuntimeError, for what it needs is overwritten.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.compute: Callable[[Tensor], Outputs] = network.forward
        self.apply = network._apply
        self.parameters = list(network.parameters())
        self.names = [f"network.{name}" for name, _ in network.named_parameters()]
        self.passes: dict[Hashable, Pass] = {}
        # Shared, for no two passes are under way at a time.
        self.pool = torch.cuda.graph_pool_handle()
        self.under_way: object = None

    def __call__(self, x: Tensor) -> Outputs:
        """What the network makes of x [B, C, H, W]."""
        if x.requires_grad and torch.is_grad_enabled():
            return self.compute(x)  # whose gradient no pass has captured
        key = self._kind(x)
        if key not in self.passes:
            if len(self.passes) == MAX_PASSES:
                return self.compute(x)
            reason = self._capture(key, x)
            if reason is not None:
                return self._give_up(x, reason)
        found = self.passes[key]
        outputs: Iterator[Tensor] = iter(Replayed.apply(found, x, *found.inputs))
        if not found.is_tuple:
            return next(outputs)
        return tuple(next(outputs) if is_tensor else None for is_tensor in found.filled)

    def move(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """The network's `_apply`: what was captured reads where weights and buffers were before.

        Lightning moves a network to the CPU after a fit, and back for a test.
        """
        self.passes.clear()
        return self.apply(function, recurse)

    def _kind(self, x: Tensor) -> Hashable:
        wanted = tuple(p.requires_grad for p in self.parameters) if torch.is_grad_enabled() else ()
        precision = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        network: Any = self.network
        return x.shape, x.dtype, wanted, precision, network.training, network.variant()

    def _capture(self, key: Hashable, x: Tensor) -> str | None:
        """Capture a pass; returns what keeps it from being a graph, in words."""
        try:
            self.passes[key] = Pass(self, x)
        except RuntimeError as error:
            return first_line(error)
        return None

    def _give_up(self, x: Tensor, reason: str) -> Outputs:
        log.warning("This network cannot be a CUDA graph, it runs without: %s", reason)
        self.network.forward = self.compute
        # Memory may be what was lacking, of which the passes hold much.
        self.passes.clear()
        gc.collect()
        torch.cuda.empty_cache()
        return self.compute(x)


class _Computed(nn.Module):
    """The network that computes a pass, whose parameters `torch.func` can replace."""

    def __init__(self, replay: Replay) -> None:
        super().__init__()
        self.network = replay.network
        self.compute = replay.compute

    def forward(self, x: Tensor) -> Outputs:
        return self.compute(x)


class Pass:
    """One kind of pass, captured.

    Attributes:
        inputs: parameters whose gradients are wanted; none where only the outputs are.
    """

    def __init__(self, replay: Replay, x: Tensor) -> None:
        self.replay = replay
        grad_enabled = torch.is_grad_enabled()
        self.inputs = [p for p in replay.parameters if p.requires_grad and grad_enabled]
        device = x.device.type
        with (
            torch.cuda.device(x.device),
            # What stays is no tensor of inference mode, in which Lightning validates.
            torch.inference_mode(False),
            torch.set_grad_enabled(grad_enabled),
            # Casts are kernels of the pass like others; a cache would keep them out of it.
            torch.autocast(
                device,
                dtype=torch.get_autocast_dtype(device),
                enabled=torch.is_autocast_enabled(device),
                cache_enabled=False,
            ),
            _unchanged(replay.network),
        ):
            self.x = x.detach().clone()
            # The same memory, but of no graph that somebody still holds: its nodes belong to
            # another stream, for which the capture would have to wait.
            aliases = [p.detach().requires_grad_(p.requires_grad) for p in replay.parameters]
            compute = functools.partial(
                torch.func.functional_call,
                _Computed(replay),
                dict(zip(replay.names, aliases, strict=True)),
            )
            wanted = [alias for alias in aliases if alias.requires_grad and grad_enabled]
            self._warm_up(compute, wanted)
            self.forward_graph = torch.cuda.CUDAGraph()
            with self._captured(self.forward_graph):
                made = compute(self.x)
            self.is_tuple = isinstance(made, tuple)
            outputs = made if isinstance(made, tuple) else (made,)
            self.filled = [output is not None for output in outputs]
            self.outputs = [output for output in outputs if output is not None]
            self.gradients = [torch.zeros_like(output) for output in self.outputs]
            self.found: Sequence[Tensor | None] = []
            if self.inputs:
                self.backward_graph = torch.cuda.CUDAGraph()
                with self._captured(self.backward_graph):
                    self.found = self._backward(self.outputs, wanted)
            self.outputs = [output.detach() for output in self.outputs]

    def _captured(self, graph: torch.cuda.CUDAGraph) -> torch.cuda.graph:
        # Other threads, such as those that load data, may go on.
        return torch.cuda.graph(graph, pool=self.replay.pool, capture_error_mode="thread_local")

    def _warm_up(self, compute: Callable[[Tensor], Outputs], wanted: Sequence[Tensor]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                made = compute(self.x)
                if wanted:
                    outputs = made if isinstance(made, tuple) else (made,)
                    self.gradients = [torch.zeros_like(o) for o in outputs if o is not None]
                    self._backward([output for output in outputs if output is not None], wanted)
                del made
        torch.cuda.current_stream().wait_stream(stream)

    def _backward(
        self, outputs: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        return torch.autograd.grad(outputs, wanted, self.gradients, allow_unused=True)

    def run_forward(self, x: Tensor) -> list[Tensor]:
        """The outputs for x, which the next pass leaves as they are."""
        self.x.copy_(x)
        self.forward_graph.replay()
        return [output.clone() for output in self.outputs]

    def run_backward(self, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of the inputs from those of the outputs."""
        torch._foreach_copy_(self.gradients, list(gradients))
        self.backward_graph.replay()
        copies = iter(torch._foreach_mul([found for found in self.found if found is not None], 1))
        return [None if found is None else next(copies) for found in self.found]


class Replayed(torch.autograd.Function):
    """A captured pass as a function of x and the parameters."""

    @staticmethod
    def forward(ctx: Any, captured: Pass, x: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs that are not None."""
        ctx.captured = captured
        ctx.under_way = captured.replay.under_way = object()
        return tuple(captured.run_forward(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs."""
        captured: Pass = ctx.captured
        if captured.replay.under_way is not ctx.under_way:
            raise RuntimeError(
                "Another pass of the network has begun before this one's backward pass, and has "
                "overwritten what it needs: set hardware.cuda_graphs=false."
            )
        return None, None, *captured.run_backward(gradients)


@contextmanager
def _unchanged(network: nn.Module) -> Iterator[None]:
    """Within: passes may be run; after: buffers and the state of random numbers are as before."""
    buffers = [buffer.data for buffer in network.buffers()]
    saved = [buffer.clone() for buffer in buffers]
    random = torch.cuda.get_rng_state()
    try:
        # A capture that fails leaves its stream behind, ...
        with torch.cuda.stream(torch.cuda.current_stream()):
            yield
    except RuntimeError:
        # ... and a generator that still waits for its end.
        fresh = torch.Generator("cuda").graphsafe_get_state()
        torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
        raise
    finally:
        torch._foreach_copy_(buffers, saved)
        torch.cuda.set_rng_state(random)
