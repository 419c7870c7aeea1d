"""How fast a step of the final training is (20 cells, 36 channels, batch 96 in the paper).

    python benchmarks/train_step.py --device cuda --bf16

dartsl's network beside the same network as the official code runs it: NCHW and PyTorch's own
depthwise convolutions. They take turns. A step is forward, backward, clipping and SGD, with drop
path and auxiliary head, without Lightning. Times are medians after a warm-up.
"""

import argparse
import copy

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

from dartsl.depthwise import DepthwiseConv2d
from dartsl.genotype import published
from dartsl.networks import FinalNetwork
from dartsl.networks.graphs import replay_passes
from dartsl.networks.regions import compile_regions
from dartsl.operations import SeparableChain


class Step:
    """The training of one network."""

    def __init__(self, args: argparse.Namespace, network: FinalNetwork) -> None:
        self.network = network.to(args.device)
        self.network.drop_path_prob = 0.1
        self.optimizer = torch.optim.SGD(
            network.parameters(), 0.025, momentum=0.9, weight_decay=3e-4, foreach=True
        )
        shape = args.batch_size, 3, args.image_size, args.image_size
        self.x = torch.randn(shape, device=args.device)
        self.y = torch.randint(args.classes, (args.batch_size,), device=args.device)
        self.precision = torch.autocast(args.device, torch.bfloat16, enabled=args.bf16)

    def loss(self) -> Tensor:
        """Cross entropy, the auxiliary head's added."""
        with self.precision:
            logits, auxiliary = self.network(self.x)
            return F.cross_entropy(logits, self.y) + 0.4 * F.cross_entropy(auxiliary, self.y)

    def run(self) -> None:
        """Forward, backward, clip, move."""
        self.optimizer.zero_grad()
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimizer.step()


def literal(network: FinalNetwork) -> FinalNetwork:
    """The same network in NCHW, a module after the other, with PyTorch's own gradients."""
    plain = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    for module in plain.modules():
        if isinstance(module, DepthwiseConv2d):
            module.forward = super(DepthwiseConv2d, module).forward  # type: ignore[method-assign]
        if isinstance(module, SeparableChain):
            module.forward = super(SeparableChain, module).forward  # type: ignore[method-assign]
    plain.memory_format = torch.contiguous_format
    return plain


def measure(steps: dict[str, Step], args: argparse.Namespace) -> Report:
    """Every row of the table: name -> network -> number."""
    medians, first = interleaved({name: step.run for name, step in steps.items()}, args)
    rows: Report = {"step (ms)": medians}
    if args.compile or args.graphs:
        rows["first step (ms)"] = first
    else:
        rows["operators a step"] = {n: count_operators(step.run) for n, step in steps.items()}
    if args.graphs:  # which hide what they keep
        return rows
    rows["saved activations (MB/image)"] = {
        name: saved_activations(step.loss, step.network) / args.batch_size / 1e6
        for name, step in steps.items()
    }
    return rows


def print_table(report: Report) -> None:
    """The report, readable."""
    print_surroundings(report)
    print(f"{'':32}{'literal':>12}{'dartsl':>12}{'ratio':>10}")
    for row, values in report["rows"].items():
        ratio = values["literal"] / values["dartsl"]
        print(f"{row:32}{values['literal']:12,.1f}{values['dartsl']:12,.1f}{ratio:9.2f}x")
    print(f"{'peak memory, both (MB)':32}{report['peak_memory_mb']:12,.1f}")


def parse_args() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__)
    options.add_argument("--genotype", default="darts_v2")
    options.add_argument("--batch-size", type=int, default=96)
    options.add_argument("--channels", type=int, default=36)
    options.add_argument("--cells", type=int, default=20)
    options.add_argument("--classes", type=int, default=10)
    options.add_argument("--image-size", type=int, default=32)
    options.add_argument(
        "--compile", nargs="?", const="default", help="dartsl's operations, in this mode"
    )
    options.add_argument("--graphs", action="store_true", help="dartsl's passes as CUDA graphs")
    options.add_argument("--recompute", action="store_true", help="dartsl's cells in the backward")
    options.add_argument("--bf16", action="store_true", help="mixed precision")
    options.add_argument("--profile", action="store_true", help="of one step of dartsl")
    return options.parse_args()


def main() -> None:
    """Measure, print, and write the report."""
    args = parse_args()
    start(args)
    network = FinalNetwork(
        published(args.genotype), args.channels, args.cells, args.classes, recompute=args.recompute
    )
    steps = {"literal": Step(args, literal(network)), "dartsl": Step(args, network)}
    steps["literal"].network.recompute = False
    if args.compile:
        compile_regions(network.regions(), args.compile, args.device)
    if args.graphs:
        replay_passes(network, args.device)
    if args.profile:
        profile(steps["dartsl"].run, args)
    report = {
        "surroundings": surroundings(args),
        "rows": measure(steps, args),
        "peak_memory_mb": peak_memory(args),
    }
    print_table(report)
    write(report, args)


if __name__ == "__main__":
    main()
