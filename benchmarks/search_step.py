"""How fast a step of the search is: dartsl beside a literal implementation, in one process.

    python benchmarks/search_step.py --device cpu --batch-size 64 --threads 1 --unrolled

The literal one (tests/literal_darts.py) is the baseline: a module per operation and edge, loops as
in the official code, NCHW. Both run the same search on the same data, one after the other in every
repetition, so that a busy machine slows both. dartsl's step is what `SearchModule` does in a batch,
without Lightning. Times are medians after a warm-up.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dartsl.hypergradient import (  # noqa: E402
    BilevelProblem,
    FirstOrder,
    Hypergradient,
    Unrolled,
    held_constant,
    sgd_direction,
)
from dartsl.networks import Supernet  # noqa: E402
from dartsl.search_space import SearchSpace  # noqa: E402
from tests import literal_darts  # noqa: E402

NUM_CLASSES = 10
LEARNING_RATE = 0.025
Batch = tuple[Tensor, Tensor]


class Literal:
    """The baseline's step."""

    def __init__(self, args: argparse.Namespace, train: Batch, val: Batch) -> None:
        self.network = literal_darts.Network(args.channels, NUM_CLASSES, args.cells).to(args.device)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=3e-4
        )
        self.architect = literal_darts.Architect(self.network)
        self.batches = train, val

    def step(self, unrolled: bool) -> None:
        """One iteration of the official loop."""
        literal_darts.search_step(
            self.network, self.architect, self.optimizer, *self.batches, LEARNING_RATE, unrolled
        )

    def one_pass(self) -> None:
        """Forward and backward, with gradients of weights and alphas."""
        self.network.zero_grad()
        self.network.loss(*self.batches[0]).backward()


class Ours:
    """dartsl's step: `SearchModule.training_step` without Lightning."""

    def __init__(self, args: argparse.Namespace, train: Batch, val: Batch) -> None:
        self.network = Supernet(SearchSpace(), args.channels, args.cells, NUM_CLASSES)
        self.network.to(args.device)
        self.weights = self.network.weight_parameters()
        self.alphas = self.network.arch_parameters()
        self.optimizer = torch.optim.SGD(
            self.weights, LEARNING_RATE, momentum=0.9, weight_decay=3e-4, foreach=True
        )
        self.arch_optimizer = torch.optim.Adam(
            self.alphas, 3e-4, betas=(0.5, 0.999), weight_decay=1e-3
        )
        self.batches = train, val
        if args.compile:
            for cell in self.network.cells:
                cell.compile()

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross entropy."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def step(self, unrolled: bool) -> None:
        """Alpha step, then weight step (Algorithm 1)."""
        train, val = self.batches
        problem = BilevelProblem(
            train_loss=lambda: self.loss(train),
            val_loss=lambda: self.loss(val),
            weights=self.weights,
            alphas=self.alphas,
            xi=LEARNING_RATE,
            virtual_direction=lambda gradients: sgd_direction(self.optimizer, gradients),
            buffers=list(self.network.buffers()),
        )
        hypergradient: Hypergradient = Unrolled() if unrolled else FirstOrder()
        for alpha, gradient in zip(self.alphas, hypergradient(problem).gradients, strict=True):
            alpha.grad = gradient
        self.arch_optimizer.step()
        self.optimizer.zero_grad()
        with held_constant(self.alphas):
            self.loss(train).backward()
        nn.utils.clip_grad_norm_(self.weights, 5.0)
        self.optimizer.step()

    def one_pass(self) -> None:
        """Forward and backward, with gradients of weights and alphas."""
        self.network.zero_grad()
        self.loss(self.batches[0]).backward()


class CountOperators(TorchDispatchMode):
    """Counts operator calls; what only looks at a tensor in another way is left out."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and run."""
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


def saved_activations(forward: Callable[[], Tensor], parameters: set[int]) -> int:
    """Bytes that a forward pass keeps for its backward, parameters left out."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(storages.values())


def forward_of(model: Literal | Ours) -> Callable[[], Tensor]:
    """The loss of the training batch, as a function of nothing."""
    x, y = model.batches[0]
    return lambda: F.cross_entropy(model.network(x), y)


def milliseconds(function: Callable[[], None], args: argparse.Namespace) -> float:
    """Time of one call by the chosen clock, the device's work included."""
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    synchronize()
    start = clock()
    function()
    synchronize()
    return 1e3 * (clock() - start)


def interleaved(
    models: dict[str, Literal | Ours],
    call: Callable[[Literal | Ours], None],
    args: argparse.Namespace,
) -> dict[str, float]:
    """Median milliseconds of each model's call, the models taking turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for repetition in range(args.warm_up + args.repeats):
        for name, model in models.items():
            elapsed = milliseconds(lambda model=model: call(model), args)  # type: ignore[misc]
            if repetition >= args.warm_up:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(models: dict[str, Literal | Ours], args: argparse.Namespace) -> dict[str, Any]:
    """Every row of the table: name -> model -> number."""
    rows: dict[str, Any] = {
        "one pass (ms)": interleaved(models, lambda model: model.one_pass(), args),
        "first-order step (ms)": interleaved(models, lambda model: model.step(False), args),
    }
    if args.unrolled:
        rows["unrolled step (ms)"] = interleaved(models, lambda model: model.step(True), args)
    if not args.compile:
        rows["operators a pass"] = {}
        for name, model in models.items():
            with CountOperators() as counter:
                model.one_pass()
            rows["operators a pass"][name] = counter.calls
    rows["saved activations (MB/image)"] = {
        name: saved_activations(
            forward_of(model),
            {tensor.untyped_storage().data_ptr() for tensor in model.network.parameters()},
        )
        / args.batch_size
        / 1e6
        for name, model in models.items()
    }
    return rows


def peak_memory(args: argparse.Namespace) -> float:
    """Peak memory in MB: of the device, or of this process where there is none."""
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def surroundings(args: argparse.Namespace) -> dict[str, Any]:
    """Hardware, versions and commit: what the numbers depend on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    name = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        lines = [line for line in cpu.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return {
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        **{key: value for key, value in vars(args).items() if key not in ("json", "threads")},
    }


def profile(model: Ours, args: argparse.Namespace) -> None:
    """Print the operators that one pass spends its time in."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if args.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        model.one_pass()
    key = "self_cuda_time_total" if args.device == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=50))


def print_table(report: dict[str, Any]) -> None:
    """The report, readable."""
    print("  ".join(f"{key}={value}" for key, value in report["surroundings"].items()))
    names = report["models"]
    print(f"{'':32}" + "".join(f"{name:>12}" for name in names) + f"{'ratio':>10}")
    for row, values in report["rows"].items():
        numbers = "".join(f"{values[name]:12,.1f}" for name in names)
        ratio = f"{values['literal'] / values['dartsl']:9.2f}x" if len(names) == 2 else ""
        print(f"{row:32}{numbers}{ratio}")
    print(f"{'peak memory, both (MB)':32}{report['peak_memory_mb']:12,.1f}")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--unrolled", action="store_true", help="the unrolled step too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: of this process, which a busy machine disturbs less; for one thread",
    )
    parser.add_argument("--compile", action="store_true", help="compile dartsl's cells")
    parser.add_argument("--profile", action="store_true", help="of one pass of dartsl")
    parser.add_argument("--only", choices=["literal", "dartsl"], help="one model (peak memory)")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write the report."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    train, val = (
        (
            torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device),
            torch.randint(NUM_CLASSES, (args.batch_size,), device=args.device),
        )
        for _ in range(2)
    )
    kinds: dict[str, Any] = {"literal": Literal, "dartsl": Ours}
    names = [args.only] if args.only else list(kinds)
    models = {name: kinds[name](args, train, val) for name in names}
    if args.profile:
        profile(Ours(args, train, val), args)
    report = {
        "surroundings": surroundings(args),
        "models": names,
        "rows": measure(models, args),
        "peak_memory_mb": peak_memory(args),
    }
    print_table(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
