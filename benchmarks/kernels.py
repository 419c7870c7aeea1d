"""What the products of matrices on a GPU cost, launched in several ways.

    python benchmarks/kernels.py --device cuda --ways maxnreg=128 num_warps=8,maxnreg=128

The three kernels in which most of a pass is spent (`dartsl.native.separable_sum_gpu`), each for the
convolutions of a node of the search or of an edge of the final network, as it is launched and in
other ways: `num_warps` that share a program, `num_stages` of loads under way, `maxnreg` registers a
thread. Times are of CUDA graphs of many launches. On a CPU Triton interprets the kernels.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from measuring import Report, milliseconds, parser, print_surroundings, start, surroundings, write
from torch import Tensor

WAYS = ("num_stages=2", "num_stages=4", "maxnreg=168", "maxnreg=168,num_stages=2",
        "maxnreg=128,num_stages=2", "num_warps=8", "num_warps=8,num_stages=2")  # fmt: skip
COLUMNS = {"milliseconds": "14.4f", "ratio": "8.2f", "registers": "12.0f", "spilled": "10.0f",
           "shared (KB)": "13.0f"}  # fmt: skip


@dataclass(frozen=True)
class Convolutions:
    """Separable convolutions beside each other.

    Attributes:
        channels: C, of an input and of an output.
        size: of the image.
        kernels: sizes of the branches' kernels.
        dilations: of the branches.
        edges: G, groups of each branch.
        second: whether every group reads an input of its own, not all the same one.
    """

    channels: int
    size: int
    kernels: tuple[int, ...]
    dilations: tuple[int, ...]
    edges: int
    second: bool = False


LEVELS = {
    "search, 16": Convolutions(16, 32, (3, 5, 3, 5), (1, 1, 2, 2), 4),
    "search, 16, second": Convolutions(16, 32, (3, 5), (1, 1), 4, second=True),
    "search, 32": Convolutions(32, 16, (3, 5, 3, 5), (1, 1, 2, 2), 4),
    "search, 32, second": Convolutions(32, 16, (3, 5), (1, 1), 4, second=True),
    "search, 64": Convolutions(64, 8, (3, 5, 3, 5), (1, 1, 2, 2), 4),
    "search, 64, second": Convolutions(64, 8, (3, 5), (1, 1), 4, second=True),
    "training, 36": Convolutions(36, 32, (3,), (1,), 1),
    "training, 72": Convolutions(72, 16, (3,), (1,), 1),
    "training, 144": Convolutions(144, 8, (3,), (1,), 1),
}


class Launched:
    """A kernel with other launch options, which keeps what was compiled."""

    def __init__(self, kernel: Any, options: dict[str, int]) -> None:
        self.kernel = kernel
        self.options = options
        self.compiled: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        launch = self.kernel[grid]

        def call(*given: Any, **named: Any) -> None:
            self.compiled = launch(*given, **(named | self.options))

        return call

    def resources(self) -> Report:
        """Registers a thread, those spilled, and KB of shared memory; none where interpreted."""
        if self.compiled is None:
            return {}
        shared = self.compiled.metadata.shared / 1024
        return {
            "registers": self.compiled.n_regs,
            "spilled": self.compiled.n_spills,
            "shared (KB)": shared,
        }


def make_calls(
    gpu: ModuleType, level: Convolutions, args: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """By the names of the kernels, what launches them; the last one also `_decompose`."""
    draw = torch.Generator().manual_seed(0)
    total, branches = level.edges * level.channels, len(level.kernels)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(args.device)

    def image(channels: int) -> Tensor:
        tensor = normal(args.batch_size, channels, level.size, level.size).to(dtype)
        return tensor.contiguous(memory_format=torch.channels_last)

    x = image(branches * total if level.second else level.channels).relu()
    depthwise = [normal(total, 1, kernel, kernel) / kernel for kernel in level.kernels]
    pointwise = [normal(total, level.channels, 1, 1) / math.sqrt(level.channels)] * branches
    convolutions = gpu.Level(x, depthwise, pointwise, 1, level.dilations)
    gradient = image(branches * total)
    return {
        "_convolve": lambda: convolutions.convolve(1e-5)[0],
        "_gradient_of_input": lambda: convolutions.gradient_of_input(gradient),
        "_gradient_of_matrices": lambda: convolutions.gradients_of_weights(gradient)[1][0],
    }


def options_of(way: str) -> dict[str, int]:
    """Of "num_warps=8,maxnreg=128"."""
    return {name: int(value) for name, value in (part.split("=") for part in way.split(","))}


def measure(
    gpu: ModuleType,
    kernel: str,
    options: dict[str, int],
    call: Callable[[], Tensor],
    args: argparse.Namespace,
) -> tuple[Report, Tensor]:
    """Time and resources of a launch, and what was computed."""
    launched = Launched(getattr(gpu, kernel), options)
    setattr(gpu, kernel, launched)
    try:
        result = call()
        time = graph_milliseconds(call) if args.device == "cuda" else milliseconds(call, args)
        return {"milliseconds": time, **launched.resources()}, result
    finally:
        setattr(gpu, kernel, launched.kernel)


def graph_milliseconds(call: Callable[[], Tensor]) -> float:
    """Time of one of many launches in a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(call, return_mode="median")


def compare(
    gpu: ModuleType,
    kernel: str,
    call: Callable[[], Tensor],
    ways: Sequence[str],
    args: argparse.Namespace,
) -> Iterator[Report]:
    """A row for a kernel as it is launched, and for each way one."""
    shipped, expected = measure(gpu, kernel, {}, call, args)
    yield {"way": "as shipped", "ratio": 1.0} | shipped
    for way in ways:
        try:
            found, result = measure(gpu, kernel, options_of(way), call, args)
        except (RuntimeError, gpu.triton.errors.TritonError) as error:
            yield {"way": way, "fault": str(error).splitlines()[0]}
            continue
        difference = (result.float() - expected.float()).norm() / expected.float().norm()
        if not difference < 0.01:
            found["fault"] = f"computes something else: {difference:.1e}"
        yield {"way": way, "ratio": found["milliseconds"] / shipped["milliseconds"]} | found


def print_row(row: Report) -> None:
    """One line of the table."""
    numbers = [f"{row.get(key, math.nan):{width}}" for key, width in COLUMNS.items()]
    rest = row.get("fault") or "".join(numbers)
    print(f"{row['axis']:22}{row['kernel']:24}{row['way']:26}{rest}", flush=True)


def main() -> None:
    """Measure, print, and write the report."""
    options = parser(__doc__)
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--levels", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    options.add_argument("--ways", nargs="*", default=list(WAYS), help="name=number,... each")
    args = options.parse_args()
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton asks when it is first imported
    start(args)
    from dartsl.native import separable_sum_gpu as gpu

    report: Report = {"surroundings": surroundings(args), "rows": []}
    print_surroundings(report)
    print(f"{'':72}" + "".join(f"{key:>{width[:-3]}}" for key, width in COLUMNS.items()))
    for name in args.levels:
        for kernel, call in make_calls(gpu, LEVELS[name], args).items():
            for found in compare(gpu, kernel, call, args.ways, args):
                report["rows"].append({"axis": name, "kernel": kernel} | found)
                print_row(report["rows"][-1])
    write(report, args)


if __name__ == "__main__":
    main()
