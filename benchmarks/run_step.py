"""What Python takes of a step in a run: trainer, data, optimizers, metrics, callbacks, loggers.

    python benchmarks/run_step.py
    python benchmarks/run_step.py --device cuda --experiment train_final

A GPU computes while Python goes on; it is busy for as long as a step takes Python less time than
the GPU. So the passes are left out: a network gives zeros, and gradients for all of its parameters
as a replayed CUDA graph does. It has few channels and sees few small images. Python does not know:
it handles as many tensors as of the full size.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from measuring import ROOT, Report, parser, print_surroundings, start, surroundings, write
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dartsl.config import build
from dartsl.networks.graphs import Outputs
from dartsl.runs import prepare, running
from dartsl.tasks import run_as_other

NETWORKS = {"search_cifar10": "supernet", "train_final": "network"}


class Idle:
    """A network's `forward` that computes a kind of pass once, and zeros from then on."""

    def __init__(self, network: nn.Module) -> None:
        self.compute = network.forward
        self.parameters = list(network.parameters())
        self.network = network
        self.outputs: dict[Any, Outputs] = {}

    def __call__(self, x: Tensor) -> Outputs:
        """What the network makes of x [B, C, H, W], or zeros."""
        kind = x.shape, self.network.training
        if kind not in self.outputs:
            with torch.no_grad():
                self.outputs[kind] = self.compute(x)
        outputs = self.outputs[kind]
        wanted = [p for p in self.parameters if p.requires_grad and torch.is_grad_enabled()]
        if isinstance(outputs, Tensor):
            return IdlePass.apply(1, outputs, *wanted)[0]
        filled = [output for output in outputs if output is not None]
        made = iter(IdlePass.apply(len(filled), *filled, *wanted))
        return tuple(None if output is None else next(made) for output in outputs)


class IdlePass(torch.autograd.Function):
    """Zeros, as a function of the parameters."""

    @staticmethod
    def forward(ctx: Any, number: int, *given: Tensor) -> tuple[Tensor, ...]:
        """So many outputs, in the shapes of the first ones given."""
        ctx.number, ctx.parameters = number, given[number:]
        return tuple(torch.zeros_like(output) for output in given[:number])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the parameters, in memory of their own."""
        return None, *[None] * ctx.number, *torch._foreach_mul(list(ctx.parameters), 0)


class Clock(pl.Callback):
    """Looks at the clock every so many steps."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.clock = time.perf_counter if args.clock == "wall" else time.process_time
        self.steps = args.steps
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Look, if it is time."""
        if trainer.fit_loop.epoch_loop.total_batch_idx % self.steps == 0:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(self.clock())


def milliseconds_a_step(method: str, args: argparse.Namespace, folder: str) -> float:
    """The median."""
    network = NETWORKS[args.experiment]
    search = network == "supernet"
    overrides = [
        f"experiment={args.experiment}", "data=digits", "data.batch_size=2",
        f"hardware={'gpu' if args.device == 'cuda' else 'cpu'}", f"threads={args.threads}",
        f"{network}.channels={1 if search else 2}", "trainer.max_epochs=50",
        f"trainer.max_steps={args.steps * (args.warm_up + args.repeats) + 1}", "print_config=false",
        # As on a GPU, where they are so by themselves.
        "+optimizer.weights.fused=true", f"output_dir={folder}/{method}",
    ]  # fmt: skip
    if search:
        overrides += [f"method={method}", "+method.arch_optimizer.fused=true"]
    else:
        overrides.append("genotype=darts_v2")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        HydraConfig.instance().set_config(compose("config", overrides, return_hydra_config=True))
        cfg = compose("config", overrides)
    prepare(cfg)
    given = {} if search else {"genotype": build(cfg.genotype)()}
    model = build(cfg[network])(**given)
    module = build(cfg.module)(**{network: model})
    model.forward = Idle(model)
    clock = Clock(args)
    with running(cfg, run_as_other) as (trainer, data):
        trainer.callbacks.append(clock)
        trainer.fit(module, datamodule=data)
    between = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return 1e3 * statistics.median(between[args.warm_up :]) / args.steps


def main() -> None:
    """Measure, print, and write the report."""
    options = parser(__doc__)
    options.add_argument("--experiment", choices=list(NETWORKS), default="search_cifar10")
    options.add_argument("--steps", type=int, default=50, help="between two looks at the clock")
    args = options.parse_args()
    start(args)
    methods = {"a step": "default"}
    if args.experiment == "search_cifar10":
        methods = {
            "a first-order step": "darts_first_order",
            "an unrolled step": "darts_unrolled",
        }
    with tempfile.TemporaryDirectory() as folder:
        rows = {
            f"{name}, passes left out (ms)": milliseconds_a_step(method, args, folder)
            for name, method in methods.items()
        }
    report: Report = {"surroundings": surroundings(args), "rows": rows}
    print_surroundings(report)
    for name, value in rows.items():
        print(f"{name:44}{value:8.1f}")
    write(report, args)


if __name__ == "__main__":
    main()
