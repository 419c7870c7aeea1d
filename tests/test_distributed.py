"""Several processes find what one finds: gloo processes on this machine, in float64.

A process of its own runs the groups of ranks, one after the other, since it forks; `python -c`
calls functions of this file there.
"""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Checkpoint
from torch.utils.data import DataLoader, IterableDataset

from dartsl.checkpoints import find_fault
from dartsl.data import Digits
from dartsl.data.loaders import Plan, Shard, batch_sizes
from dartsl.distributed import (
    ReplicaStrategy,
    average,
    average_gradients,
    broadcast,
    check_replicas,
    gather,
    largest,
    share_of,
)
from dartsl.errors import UserError
from dartsl.genotype import Genotype, published
from dartsl.hypergradient import FirstOrder, Unrolled
from dartsl.interop import official_state_dict
from dartsl.modules import SearchModule, TrainModule
from dartsl.networks import FinalNetwork, Supernet
from dartsl.processes import RANK_VARIABLES, processes
from dartsl.search_space import SearchSpace

ROOT = Path(__file__).parents[1]
SPACE = SearchSpace(("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"), 2)
HYPERGRADIENTS = {
    "first_order": FirstOrder(),
    "finite_difference": Unrolled(),
    "exact": Unrolled("exact"),
}
KINDS = [*HYPERGRADIENTS, "train"]
CHEAP = ("first_order", "train")
WITH_STATISTICS = KINDS[1:]  # of the batch; first order takes no step that these do not
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=3e-4)


def global_batches(seed: int = 0) -> list[Any]:
    """Two batches; the last is short and does not divide evenly."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((12, 12), (7, 12))
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

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_end(self, trainer, pl_module) -> None:
        mine = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        ranks = pl_module.all_gather(mine).view(trainer.world_size, -1)
        if trainer.is_global_zero:
            torch.save(ranks, self.path)


def make_module(kind: str, num_classes: int = 3) -> pl.LightningModule:
    torch.manual_seed(1)
    if kind == "train":
        genotype = published("darts_v2")
        network = FinalNetwork(genotype, 4, 3, num_classes, in_channels=1, auxiliary=False)
        return TrainModule(network, SGD, drop_path_prob=0.0, gradient_clip=0.5)
    supernet = Supernet(SPACE, channels=4, num_cells=3, num_classes=num_classes, in_channels=1)
    adam = partial(torch.optim.Adam, lr=0.01, betas=(0.5, 0.999))
    return SearchModule(supernet, HYPERGRADIENTS[kind], SGD, adam, gradient_clip=0.5)


def make_trainer(processes: int, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    torch.set_num_threads(1)
    strategy = ReplicaStrategy(start_method="fork") if processes > 1 else "auto"
    return pl.Trainer(
        **{"max_epochs": 2, "precision": "64-true"} | options,
        accelerator="cpu", devices=processes, strategy=strategy, callbacks=list(callbacks),
        logger=False, enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip


def train() -> None:
    """An epoch or two, of two steps, of each kind; writes <kind>-<name>.pt.

    With fixed statistics in 1 and 3 processes ("one", "three"); with those of the batch in one
    process ("batch"), in 2 with each one's own ("own") and with the same in both ("same").
    """
    fixed_names, names = {"one": 1, "three": 3}, {"batch": 1, "own": 2, "same": 2}
    for kind, (name, number) in (
        *itertools.product(KINDS, fixed_names.items()),
        *itertools.product(WITH_STATISTICS, names.items()),
    ):
        fixed = [FixedStatistics()] if name in fixed_names else []
        keeper = AllRanks(f"{kind}-{name}.pt")
        options = {"sync_batchnorm": name == "same", "max_epochs": 2 if kind in CHEAP else 1}
        trainer = make_trainer(number, keeper, *fixed, **options)
        trainer.fit(make_module(kind), DataLoader(Shares(kind != "train"), batch_size=None))


def in_own_process(call: str, folder: Path) -> str:
    """Runs calls of functions of this file, and stops them where they hang; returns stderr."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.test_distributed import *; {call}"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what all groups of ranks that fork have written.

    In one process: another would import for ten seconds.
    """
    folder = tmp_path_factory.mktemp("written")
    calls = "train(), drift(), exchange(), resume(), evaluate(1, 359), evaluate(2, 179)"
    in_own_process(calls, folder)
    return folder


@pytest.fixture(scope="module")
def found(written: Path) -> dict[str, torch.Tensor]:
    """The parameters of all ranks, by the name of their file."""
    return {path.stem: torch.load(path, weights_only=True) for path in written.glob("*-*.pt")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_processes_find_what_one_finds(kind: str, found: dict[str, torch.Tensor]) -> None:
    """With normalisation in evaluation mode; the last batch is short and uneven."""
    (alone,), ranks = found[f"{kind}-one"], found[f"{kind}-three"]
    assert len(ranks) == 3
    for rank in ranks:
        assert torch.equal(rank, ranks[0])
        assert (rank - alone).abs().max() < 1e-10
    start = torch.cat([p.detach().flatten().double() for p in make_module(kind).parameters()])
    assert (alone - start).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITH_STATISTICS)
def test_processes_agree_bit_for_bit(kind: str, found: dict[str, torch.Tensor]) -> None:
    """With each process' own batch statistics."""
    first, second = found[f"{kind}-own"]
    assert torch.equal(first, second)
    assert not torch.equal(first, found[f"{kind}-one"][0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITH_STATISTICS)
def test_with_the_statistics_of_all_batches_processes_find_what_one_finds(
    kind: str, found: dict[str, torch.Tensor]
) -> None:
    """With normalisation in training mode."""
    (alone,) = found[f"{kind}-batch"]
    for rank in found[f"{kind}-same"]:
        assert torch.equal(rank, found[f"{kind}-same"][0])
        assert (rank - alone).abs().max() < 1e-10
    assert (alone - found[f"{kind}-own"][0]).abs().max() > 1e-4


def drift() -> None:
    """Two ranks, one of which has been tampered with; writes the error."""

    class Tamper(pl.Callback):
        def __init__(self, number: int) -> None:
            self.number = number

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            supernet = pl_module.supernet
            groups = (supernet.arch_parameters(), supernet.weight_parameters())
            if pl_module.global_rank == 1:
                groups[self.number][0].data.view(-1)[0] += 1e-12

    for number, what in enumerate(("alphas", "weights")):
        data = DataLoader(Shares(True), batch_size=None)
        try:
            make_trainer(2, Tamper(number)).fit(make_module("first_order"), data)
        except Exception as error:
            Path(f"{what}.txt").write_text(str(error))


@pytest.mark.slow
def test_a_search_whose_processes_drift_apart_stops(written: Path) -> None:
    for what in ("alphas", "weights"):
        assert f"the {what} differ from rank 0's" in (written / f"{what}.txt").read_text()


# Exchanges


def exchange() -> None:
    """What average, average_gradients, broadcast and check_replicas do in two processes."""
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(
        _exchange, (Path("met").resolve(),), 2, start_method="fork"
    )


def _exchange(rank: int, meeting_point: Path) -> None:
    dist.init_process_group("gloo", init_method=meeting_point.as_uri(), rank=rank, world_size=2)
    # Types and memory layouts are kept.
    image = torch.full((2, 3, 4, 5), float(rank)).to(memory_format=torch.channels_last)
    number = torch.tensor([2.0 * rank], dtype=torch.float64)
    means = average([image, number])
    assert means[0].stride() == image.stride()
    assert means[0].dtype == torch.float32
    assert means[0].unique().tolist() == [0.5]
    assert means[1] == 1
    numbers = [torch.tensor([1.0 + rank]), torch.ones(2, 2)]
    assert [[part.sum().item() for part in each] for each in gather(numbers)] == [[1, 4], [2, 4]]
    assert largest([rank, 5 - rank], torch.device("cpu")) == [1, 5]
    # Used by both, by one, by none; held constant.
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    parameters[3].requires_grad_(False)
    for parameter in parameters[: 2 - rank]:
        parameter.grad = torch.full((2,), 1.0 + rank)
    average_gradients(parameters)
    assert parameters[0].grad.tolist() == [1.5, 1.5]
    assert parameters[1].grad.tolist() == [0.5, 0.5]
    assert parameters[2].grad is None
    assert parameters[3].grad is None
    # Types are sent apart; what is not a number is the same as itself.
    tensors = [torch.tensor([float("nan"), rank]), torch.tensor(7 + rank), torch.ones(3)]
    with pytest.raises(RuntimeError, match="In 1 of 2 processes the numbers differ"):
        check_replicas(tensors, "numbers")
    broadcast(tensors)
    check_replicas(tensors, "numbers")
    assert tensors[1] == 7
    dist.destroy_process_group()
    Path(f"exchanged-by-{rank}").touch()


@pytest.mark.slow
def test_exchanges(written: Path) -> None:
    assert len(list(written.glob("exchanged-by-*"))) == 2


# Checkpoints and evaluation


class SaveBatches(Checkpoint):
    """Saves after every batch."""

    def on_train_batch_end(self, trainer, *_: Any) -> None:
        trainer.save_checkpoint(f"{trainer.global_step}.ckpt")


class Logged(pl.Callback):
    """Keeps what was logged of every epoch, and the network at the end."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer, pl_module) -> None:
        values = trainer.callback_metrics.items()
        self.epochs.append({k: v.item() for k, v in values if not k.endswith("_step")})
        if trainer.is_global_zero:
            parameters = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
            torch.save((self.epochs, parameters), self.path)


def on_digits(batch_size: int, **options: Any) -> Digits:
    return Digits(
        num_classes=10, in_channels=1, image_size=8, mean=[0.3], std=[0.4],
        batch_size=batch_size, **options,
    )  # fmt: skip


def resume() -> None:
    """Two epochs of four steps in two processes; resumed in two, in one, and in one too small."""

    def fit(name: str, processes: int, batch_size: int, *callbacks, **options: Any) -> None:
        callbacks = (Logged(f"{name}.pt"), FixedStatistics(), *callbacks)
        module = make_module("first_order", num_classes=10)
        data = on_digits(batch_size, max_images=29)
        pl.seed_everything(0)
        make_trainer(processes, *callbacks).fit(module, data, weights_only=True, **options)

    fit("whole", 2, 4, SaveBatches())
    fit("two", 2, 4, ckpt_path="2.ckpt")
    fit("one", 1, 8, ckpt_path="2.ckpt")
    try:
        fit("refused", 1, 4, ckpt_path="2.ckpt")
    except UserError as error:
        Path("error.txt").write_text(str(error))


@pytest.mark.slow
def test_a_resume_within_an_epoch(written: Path) -> None:
    """Its metrics are those of all processes, however many go on."""
    epochs, parameters = torch.load(written / "whole.pt", weights_only=True)
    assert {"search/train_loss", "search/val_accuracy"} <= set(epochs[-1])
    for name, tolerance in (("two", 0), ("one", 1e-10)):
        epochs_resumed, resumed = torch.load(written / f"{name}.pt", weights_only=True)
        assert (resumed - parameters).abs().max() <= tolerance
        for found, expected in zip(epochs_resumed[-2:], epochs[-2:], strict=True):
            assert found == pytest.approx(expected, rel=1e-6 if name == "one" else 0, abs=0)
    error = (written / "error.txt").read_text()
    assert "batches of 8 images, these are of 4" in error


def evaluate(processes: int, batch_size: int) -> None:
    """Writes the test metrics."""

    class Write(pl.Callback):
        def on_test_end(self, trainer, pl_module) -> None:
            if trainer.is_global_zero:
                metrics = {k: v.item() for k, v in trainer.callback_metrics.items()}
                torch.save(metrics, f"{processes}.pt")

    module = make_module("train", num_classes=10)
    data = on_digits(batch_size, task="train")
    make_trainer(processes, Write()).test(module, data, verbose=False)


@pytest.mark.slow
def test_uneven_shares_are_evaluated_exactly(written: Path) -> None:
    """359 images: rank 0 has a batch more than rank 1."""
    alone, shared = (torch.load(written / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert shared == pytest.approx(alone, rel=1e-6)
    assert shared["test/accuracy"] * 359 == pytest.approx(round(shared["test/accuracy"] * 359))


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


def test_every_process_evaluates_something() -> None:
    data = digits(0, 3, task="train")
    data.val_indices = np.arange(2)
    with pytest.raises(UserError, match="2 images to validate or test on are too few for 3"):
        data.val_dataloader()


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


# The processes of a run


def launch(kind: str) -> None:
    """A training of two processes, of which one may fail; writes what came of it."""
    options = {"devices": 2, "strategy": ReplicaStrategy(), "max_epochs": 1, "logger": False}
    trainer = pl.Trainer(
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    module = make_module("first_order").double()

    if kind == "early" and "LOCAL_RANK" in os.environ:
        os._exit(3)
    Path(f"{kind}-{os.environ.get('LOCAL_RANK', 0)}.txt").write_text(
        multiprocessing.get_start_method()
    )

    def fail(*_: Any) -> None:
        if module.global_rank == 1 and kind == "mistake":
            raise UserError("an unreadable image")

    module.on_train_start = fail
    try:
        with processes(trainer, launch, kind):
            trainer.fit(module, DataLoader(Shares(True), batch_size=None))
    except UserError as error:
        if module.global_rank > 0:
            raise
        Path(f"{kind}-error.txt").write_text(str(error))
    if "LOCAL_RANK" not in os.environ:
        names = [name for name in RANK_VARIABLES if name in os.environ]
        Path(f"{kind}.txt").write_text(f"{names} {dist.is_initialized()}")


@pytest.mark.slow
def test_the_processes_of_a_run_end_with_it(tmp_path: Path) -> None:
    """In turn: rank 1 fails before the ranks have met, rank 1 fails later, and all goes well."""
    kinds = {"early": 3, "mistake": 1, "fine": 0}
    said = in_own_process(", ".join(f"launch({kind!r})" for kind in kinds), tmp_path)
    assert not (tmp_path / "fine-error.txt").exists()
    for kind in ("early", "mistake"):
        error = (tmp_path / f"{kind}-error.txt").read_text()
        assert error.startswith(f"The process of rank 1 stopped with status {kinds[kind]}")
    assert "Error: an unreadable image" in said
    for kind in kinds:
        assert (tmp_path / f"{kind}.txt").read_text() == "['OMP_NUM_THREADS'] False"
    # Its workers start as those of rank 0 do.
    methods = {(tmp_path / f"fine-{rank}.txt").read_text() for rank in (0, 1)}
    assert methods == {multiprocessing.get_start_method()}


# The command line

TINY = ("hardware=ddp_cpu", "data.max_images=40", "trainer.max_epochs=1", "print_config=false")


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments], cwd=folder, timeout=600, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_job_of_a_sweep_with_two_processes(tmp_path: Path) -> None:
    """The quick start: each of its parts runs once, in its own folder."""
    done = command(tmp_path, "-m", *TINY, "seed=3", "hydra.sweep.dir=here")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch   1/1") == 2
    assert done.stdout.count("Genotype: here/0/search/genotype.yaml") == 1
    assert done.stdout.count("Test accuracy") == 1
    assert len(Genotype.load(tmp_path / "here/0/search/genotype.yaml").normal) == 8
    checkpoints = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("last.ckpt*"))]
    assert list(map(str, checkpoints)) == [
        f"here/0/{part}/checkpoints/last.ckpt" for part in ("search", "train")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("reached", ["first", "both"])
def test_a_signal_ends_all_processes_after_a_whole_step(reached: str, tmp_path: Path) -> None:
    """Whether it reaches the first of them, or as Ctrl-C does all."""
    search = ("experiment=search_digits", *TINY, "search_space.num_intermediate_nodes=2",
              "data.batch_size=4", "supernet.channels=2", "trainer.max_epochs=100",
              "hydra.run.dir=here", "resume=auto")  # fmt: skip
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        running = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *search], cwd=tmp_path, stdout=file,
            stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip
        while "epoch   1/100" not in log.read_text() and running.poll() is None:
            time.sleep(0.1)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        (second,) = filter(is_rank, children)
        if reached == "first":
            os.kill(running.pid, signal.SIGTERM)
        else:
            os.killpg(running.pid, signal.SIGINT)
        assert running.wait(timeout=600) == 128 + (15 if reached == "first" else 2), log.read_text()
    assert "stopped after a whole step" in log.read_text()
    assert find_fault(tmp_path / "here/checkpoints/last.ckpt") is None
    assert not is_rank(second)


def is_rank(pid: str) -> bool:
    """Whether this is a running process that another rank started; not its resource tracker."""
    command = Path(f"/proc/{pid}/cmdline")
    return command.exists() and b"spawn_main" in command.read_bytes()


def test_state_dict_of_one_process_is_untouched() -> None:
    module = make_module("first_order")
    assert isinstance(module, SearchModule)
    checkpoint = {"state_dict": module.state_dict()}
    assert set(module.epoch_metrics(checkpoint)) == {
        f"{half}_metrics.{name}.sum_value"
        for half in ("train", "val")
        for name in ("loss", "correct", "count")
    }
    assert not any(name.endswith("sum_value") for name in official_state_dict(module.supernet))
