"""Several processes find what one finds: gloo processes on this machine, in float64.

A process of its own runs each group of ranks, since it forks; `python -c` calls a function of this
file there.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from dartsl.data import Digits
from dartsl.data.loaders import Plan, Shard, batch_sizes
from dartsl.distributed import ReplicaStrategy, average, check_replicas, share_of
from dartsl.errors import UserError
from dartsl.genotype import Genotype, published
from dartsl.hypergradient import FirstOrder, Unrolled
from dartsl.interop import official_state_dict
from dartsl.modules import SearchModule, TrainModule
from dartsl.networks import FinalNetwork, Supernet
from dartsl.search_space import SearchSpace

ROOT = Path(__file__).parents[1]
SPACE = SearchSpace(("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"), 2)
HYPERGRADIENTS = {
    "first_order": FirstOrder(),
    "finite_difference": Unrolled(),
    "exact": Unrolled("exact"),
}
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=3e-4)


def global_batches(seed: int = 0) -> list[Any]:
    """Three batches; the last is short and does not divide evenly."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((12, 12), (12, 12), (7, 12))
    return [
        {
            half: (
                torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64),
                torch.randint(3, (size,), generator=generator),
            )
            for half, size in zip(("train", "val"), pair, strict=True)
        }
        for pair in sizes
    ]


class Shares(IterableDataset):
    """Each rank's share of every batch; for the final training, of its training half."""

    def __init__(self, paired: bool) -> None:
        self.paired = paired

    def __iter__(self):
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for batch in global_batches():
            shares = {half: (x[rank::world], y[rank::world]) for half, (x, y) in batch.items()}
            yield shares if self.paired else shares["train"]


class FixedStatistics(pl.Callback):
    """Normalisation in evaluation mode: an output depends on its own image alone."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        (pl_module.supernet if isinstance(pl_module, SearchModule) else pl_module.network).eval()


class AllRanks(pl.Callback):
    """Keeps alphas (or nothing) and weights of every rank at the end of training."""

    def on_train_end(self, trainer, pl_module) -> None:
        mine = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        ranks = pl_module.all_gather(mine).view(trainer.world_size, -1)
        if trainer.is_global_zero:
            torch.save(ranks, "ranks.pt")


def make_module(kind: str) -> pl.LightningModule:
    torch.manual_seed(1)
    if kind == "train":
        genotype = published("darts_v2")
        network = FinalNetwork(genotype, 4, 3, num_classes=3, in_channels=1, auxiliary=False)
        return TrainModule(network, SGD, drop_path_prob=0.0, gradient_clip=0.5)
    supernet = Supernet(SPACE, channels=4, num_cells=3, num_classes=3, in_channels=1)
    adam = partial(torch.optim.Adam, lr=0.01, betas=(0.5, 0.999))
    return SearchModule(supernet, HYPERGRADIENTS[kind], SGD, adam, gradient_clip=0.5)


def train(kind: str, processes: int, fixed_statistics: bool) -> None:
    """Two epochs of three steps; writes ranks.pt."""
    torch.set_num_threads(1)
    module = make_module(kind)
    strategy = ReplicaStrategy(start_method="fork") if processes > 1 else "auto"
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=processes, strategy=strategy,
        precision="64-true", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[AllRanks()] + [FixedStatistics()] * fixed_statistics,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Shares(kind != "train"), batch_size=None))


def in_own_process(call: str, folder: Path) -> None:
    """Runs a call of a function of this file; stops it where it hangs."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    name = call.split("(", maxsplit=1)[0]
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.test_distributed import {name}; {call}"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def ranks_after(kind: str, processes: int, fixed: bool, folder: Path) -> torch.Tensor:
    in_own_process(f"train({kind!r}, {processes}, {fixed})", folder)
    return torch.load(folder / "ranks.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*HYPERGRADIENTS, "train"])
def test_processes_find_what_one_finds(kind: str, tmp_path: Path) -> None:
    """With normalisation in evaluation mode; the last batch is short and uneven."""
    (alone,) = ranks_after(kind, 1, True, tmp_path / "1")
    for processes in (2, 3):
        ranks = ranks_after(kind, processes, True, tmp_path / str(processes))
        assert len(ranks) == processes
        for rank in ranks:
            assert torch.equal(rank, ranks[0])
            assert (rank - alone).abs().max() < 1e-10
    start = torch.cat([p.detach().flatten().double() for p in make_module(kind).parameters()])
    assert (alone - start).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["finite_difference", "train"])
def test_processes_agree_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """With each process' own batch statistics."""
    first, second = ranks_after(kind, 2, False, tmp_path)
    assert torch.equal(first, second)


def drift() -> None:
    """Two ranks, one of which has been tampered with; writes the error."""

    class Tamper(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if pl_module.global_rank == 1:
                pl_module.supernet.arch_parameters()[0].data[0, 0] += 1e-12

    torch.set_num_threads(1)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy=ReplicaStrategy(start_method="fork"),
        precision="64-true", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Tamper()],
    )  # fmt: skip
    try:
        trainer.fit(make_module("first_order"), DataLoader(Shares(True), batch_size=None))
    except Exception as error:
        Path("error.txt").write_text(str(error))


@pytest.mark.slow
def test_a_search_whose_processes_drift_apart_stops(tmp_path: Path) -> None:
    in_own_process("drift()", tmp_path)
    assert "the alphas differ from rank 0's" in (tmp_path / "error.txt").read_text()


# Data


def digits(rank: int, world_size: int, **options: Any) -> Digits:
    class Trainer:
        global_rank = rank
        limit_train_batches = 1.0

        class strategy:  # noqa: N801
            root_device = torch.device("cpu")

    Trainer.world_size = world_size  # type: ignore[attr-defined]
    data = Digits(num_classes=10, in_channels=1, image_size=8, mean=[0.3], std=[0.4], **options)
    data.trainer = Trainer()  # type: ignore[assignment]
    data.setup()
    return data


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_shares_of_a_batch_are_the_batch_of_one_process(world_size: int) -> None:
    alone = list(digits(0, 1, batch_size=30 * world_size).train_dataloader())
    shares = [
        list(digits(rank, world_size, batch_size=30).train_dataloader())
        for rank in range(world_size)
    ]
    assert all(len(share) == len(alone) for share in shares)
    for batch, *parts in zip(alone, *shares, strict=True):
        for half in ("train", "val"):
            for whole, *pieces in zip(batch[half], *(part[half] for part in parts), strict=True):
                for rank, piece in enumerate(pieces):
                    assert torch.equal(piece, whole[rank::world_size])


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_every_image_is_evaluated_by_one_process(world_size: int) -> None:
    alone = torch.cat([x for x, _ in digits(0, 1).test_dataloader()])
    parts = [
        torch.cat([x for x, _ in digits(rank, world_size).test_dataloader()])
        for rank in range(world_size)
    ]
    assert sum(map(len, parts)) == len(alone) == 359
    for rank, part in enumerate(parts):
        assert torch.equal(part, alone[rank::world_size])


def test_no_process_is_left_without_images() -> None:
    assert batch_sizes(65, 32, world_size=2) == [32, 29, 4]
    assert batch_sizes(67, 32, world_size=2) == [32, 31, 4]
    assert batch_sizes(68, 32, world_size=2) == [32, 32, 4]
    assert batch_sizes(7, 6, world_size=2) == [6, 1]  # too small to give any away
    with pytest.raises(UserError, match="A batch has only 1 images for 2 processes"):
        digits(0, 2, batch_size=1).train_dataloader()


def test_a_share_keeps_images_and_draws_together() -> None:
    plan = Plan(torch.arange(5).numpy(), torch.arange(10).view(5, 2).numpy())
    share = plan.share(Shard(1, 2))
    assert share.indices.tolist() == [1, 3]
    assert share.draws.tolist() == [[2, 3], [6, 7]]


def test_one_process_exchanges_nothing() -> None:
    tensors = [torch.ones(2), torch.zeros(3)]
    assert all(mean is tensor for mean, tensor in zip(average(tensors), tensors, strict=True))
    assert share_of(5, torch.device("cpu")) == 1.0
    check_replicas(tensors, "tensors")


# The command line


@pytest.mark.slow
def test_a_command_with_two_processes(tmp_path: Path) -> None:
    command = [
        sys.executable, str(ROOT / "run.py"), "experiment=search_digits", "hardware=ddp_cpu",
        "data.max_images=40", "data.batch_size=8", "supernet.channels=4", "trainer.max_epochs=1",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {
        "cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 180,
    }  # fmt: skip
    done = subprocess.run([*command, "hydra.run.dir=here"], **options, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Genotype: here/genotype.yaml") == 1
    assert done.stdout.count("epoch   1/1") == 1
    assert len(Genotype.load(tmp_path / "here" / "genotype.yaml").normal) == 8
    again = subprocess.run([*command, "hydra.run.dir=here"], **options, check=False)
    assert again.returncode == 1
    assert "holds a run already" in again.stderr


def test_state_dict_of_one_process_is_untouched() -> None:
    module = make_module("first_order")
    assert isinstance(module, SearchModule)
    checkpoint = {"state_dict": module.state_dict()}
    assert set(module.epoch_metrics(checkpoint)) == {
        f"{half}_metrics.{name}.{state}"
        for half in ("train", "val")
        for name in ("loss", "accuracy")
        for state in ("mean_value", "weight")
    }
    assert not any(name.endswith("mean_value") for name in official_state_dict(module.supernet))
