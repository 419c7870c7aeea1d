"""How fast a step of the search is: dartsl beside a literal implementation, in one process.

    python benchmarks/search_step.py --device cpu --batch-size 64 --threads 1 --unrolled

The literal one (tests/literal_darts.py) is the baseline: a module per operation and edge, loops as
in the official code, NCHW. Both run the same search on the same data, one after the other in every
repetition, so that a busy machine slows both. dartsl's step is what `SearchModule` does in a batch,
without Lightning. Times are medians after a warm-up.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measuring import (
    Report,
    count_operators,
    interleaved,
    parser,
    peak_memory,
    print_surroundings,
    profile,
    saved_activations,
    start,
    surroundings,
    write,
)
from torch import Tensor, nn

from dartsl.hypergradient import (
    BilevelProblem,
    FirstOrder,
    Hypergradient,
    Unrolled,
    held_constant,
    sgd_direction,
)
from dartsl.networks import Supernet
from dartsl.networks.graphs import replay_passes
from dartsl.networks.regions import compile_regions
from dartsl.search_space import SearchSpace
from tests import literal_darts

LEARNING_RATE = 0.025
Batch = tuple[Tensor, Tensor]


class Literal:
    """The baseline's step."""

    def __init__(self, args: argparse.Namespace, train: Batch, val: Batch) -> None:
        self.network = literal_darts.Network(args.channels, args.classes, args.cells)
        self.network.to(args.device)
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
        self.network = Supernet(
            SearchSpace(), args.channels, args.cells, args.classes, recompute=args.recompute
        )
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
        self.precision = torch.autocast(args.device, torch.bfloat16, enabled=args.bf16)
        if args.compile:
            compile_regions(self.network.regions(), args.compile, args.device)
        if args.graphs:
            replay_passes(self.network, args.device)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross entropy."""
        torch.clear_autocast_cache()
        with self.precision:
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
            buffers=lambda: list(self.network.buffers()),
        )
        hypergradient: Hypergradient = Unrolled() if unrolled else FirstOrder()
        for alpha, gradient in zip(self.alphas, hypergradient(problem), strict=True):
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


Model = Literal | Ours


def forward_of(model: Model) -> Callable[[], Tensor]:
    """The loss of the training batch, as a function of nothing."""
    x, y = model.batches[0]
    return lambda: F.cross_entropy(model.network(x), y)


def measure(models: dict[str, Model], args: argparse.Namespace) -> Report:
    """Every row of the table: name -> model -> number."""
    passes, first = interleaved({name: model.one_pass for name, model in models.items()}, args)
    rows: Report = {"one pass (ms)": passes}
    kinds = {"first-order step (ms)": False}
    if args.unrolled:
        kinds["unrolled step (ms)"] = True
    for row, unrolled in kinds.items():
        calls = {n: lambda m=m, u=unrolled: m.step(u) for n, m in models.items()}
        rows[row], _ = interleaved(calls, args)
    if args.compile or args.graphs:
        rows["first pass (ms)"] = first
    else:
        rows["operators a pass"] = {n: count_operators(m.one_pass) for n, m in models.items()}
    if args.graphs:  # which hide what they keep
        return rows
    rows["saved activations (MB/image)"] = {
        name: saved_activations(forward_of(model), model.network) / args.batch_size / 1e6
        for name, model in models.items()
    }
    return rows


def print_table(report: Report) -> None:
    """The report, readable."""
    print_surroundings(report)
    names = report["models"]
    print(f"{'':32}" + "".join(f"{name:>12}" for name in names) + f"{'ratio':>10}")
    for row, values in report["rows"].items():
        numbers = "".join(f"{values[name]:12,.1f}" for name in names)
        ratio = f"{values['literal'] / values['dartsl']:9.2f}x" if len(names) == 2 else ""
        print(f"{row:32}{numbers}{ratio}")
    print(f"{'peak memory, all (MB)':32}{report['peak_memory_mb']:12,.1f}")


def parse_args() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__)
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--channels", type=int, default=16)
    options.add_argument("--cells", type=int, default=8)
    options.add_argument("--classes", type=int, default=10)
    options.add_argument("--image-size", type=int, default=32)
    options.add_argument("--unrolled", action="store_true", help="the unrolled step too")
    options.add_argument(
        "--compile", nargs="?", const="default", help="dartsl's operations, in this mode"
    )
    options.add_argument("--graphs", action="store_true", help="dartsl's passes as CUDA graphs")
    options.add_argument("--recompute", action="store_true", help="dartsl's cells in the backward")
    options.add_argument("--bf16", action="store_true", help="dartsl in mixed precision")
    options.add_argument("--profile", action="store_true", help="of one pass of dartsl")
    options.add_argument("--only", choices=["literal", "dartsl"], help="one model (peak memory)")
    return options.parse_args()


def main() -> None:
    """Measure, print, and write the report."""
    args = parse_args()
    start(args)
    shape = args.batch_size, 3, args.image_size, args.image_size
    train, val = (
        (
            torch.randn(shape, device=args.device),
            torch.randint(args.classes, (args.batch_size,), device=args.device),
        )
        for _ in range(2)
    )
    kinds: dict[str, Any] = {"literal": Literal, "dartsl": Ours}
    names = [args.only] if args.only else list(kinds)
    models = {name: kinds[name](args, train, val) for name in names}
    if args.profile:
        profile(Ours(args, train, val).one_pass, args)
    report = {
        "surroundings": surroundings(args),
        "models": names,
        "rows": measure(models, args),
        "peak_memory_mb": peak_memory(args),
    }
    print_table(report)
    write(report, args)


if __name__ == "__main__":
    main()
