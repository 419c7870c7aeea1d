"""What the benchmarks share: clocks, counts, surroundings, tables."""

import argparse
import gc
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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dartsl.native.memory import keep_freed_memory  # noqa: E402

Report = dict[str, Any]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument("--threads", type=int, default=1, help="of the CPU")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--warm-up", type=int, default=1)
    options.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: of this process, which a busy machine disturbs less; for one thread",
    )
    options.add_argument(
        "--in-a-row",
        type=int,
        default=1,
        help="calls between two looks at the clock but for the first; they keep a GPU's queue full",
    )
    options.add_argument("--json", type=Path, help="write the report to this file")
    return options


def start(args: argparse.Namespace) -> None:
    """Fix what every benchmark fixes, as a run does."""
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)


def milliseconds(function: Callable[[], Any], args: argparse.Namespace, calls: int = 1) -> float:
    """Time of one of so many calls by the chosen clock, the device's work included."""
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    synchronize()
    begin = clock()
    for _ in range(calls):
        function()
    synchronize()
    return 1e3 * (clock() - begin) / calls


def interleaved(
    calls: dict[str, Callable[[], Any]], args: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds of each call, and those of its first; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(args.warm_up + args.repeats):
        for name, call in calls.items():
            times[name].append(milliseconds(call, args, args.in_a_row if turn else 1))
    medians = {name: statistics.median(t[args.warm_up :]) for name, t in times.items()}
    return medians, {name: t[0] for name, t in times.items()}


class CountOperators(TorchDispatchMode):
    """Counts operator calls; what only looks at a tensor in another way is left out."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and run."""
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


def count_operators(call: Callable[[], Any]) -> int:
    """Operators that a call runs."""
    with CountOperators() as counter:
        call()
    return counter.calls


def saved_activations(forward: Callable[[], Tensor], network: torch.nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward, parameters left out."""
    parameters = {tensor.untyped_storage().data_ptr() for tensor in network.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # with its function, it would keep the graph that keeps it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    gc.collect()
    return sum(storages.values())


def peak_memory(args: argparse.Namespace) -> float:
    """Peak memory in MB: of the device, or of this process where there is none."""
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def surroundings(args: argparse.Namespace) -> Report:
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


def profile(call: Callable[[], Any], args: argparse.Namespace) -> None:
    """Print the operators that a call spends its time in, and the share that a GPU is busy."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if args.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    call()
    elapsed = milliseconds(call, args)
    with torch.profiler.profile(activities=activities) as profiler:
        call()
    averages = profiler.key_averages()
    key = "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    print(averages.table(sort_by=key, row_limit=25, max_name_column_width=50))
    if args.device == "cuda":
        busy = sum(event.self_device_time_total for event in averages) / 1e3
        print(f"GPU busy {busy:.1f} of {elapsed:.1f} ms: {100 * busy / elapsed:.0f} %")


def print_surroundings(report: Report) -> None:
    """One line."""
    print("  ".join(f"{key}={value}" for key, value in report["surroundings"].items()))


def write(report: Report, args: argparse.Namespace) -> None:
    """Write the report where `--json` says."""
    if args.json:
        args.json.write_text(json.dumps(report, indent=2, default=str) + "\n")
