"""The command line: every shipped experiment runs, and every mistake ends in one sentence."""

import errno
import json
import re
import resource
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from PIL import Image

import run
from dartsl import tasks
from dartsl.checkpoints import find_fault
from dartsl.config import check_types, differing_keys, kept_overrides, resolved
from dartsl.genotype import Genotype, published
from dartsl.help import help_text
from dartsl.interop import official_state_dict
from dartsl.networks import FinalNetwork
from tests.modules.test_resume import assert_same, other_source
from tests.reports import report_content

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@dataclass
class Result:
    code: int
    out: str
    error: str
    folder: Path

    @property
    def output_dir(self) -> Path:
        """Of the one run so far, or the folder that the run names."""
        named = re.findall(r"^Genotype: (.+)/genotype.yaml$", self.out, re.MULTILINE)
        return self.folder / named[-1]

    @property
    def accuracy(self) -> float:
        return float(re.findall(r"Test accuracy: ([\d.]+) %", self.out)[-1])


Command = Callable[..., Result]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """Runs `python run.py <arguments>` in an empty folder, within this process."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", [str(ROOT / "run.py"), *arguments])
        code = 0
        try:
            run.cli()
        except SystemExit as end:
            # What Python does with it: a message goes to stderr, and the status is 1.
            code = end.code if isinstance(end.code, int) else 1
            print(end.code, file=sys.stderr)
        out, error = capfd.readouterr()
        return Result(code, out, error, tmp_path)

    return call


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that has never seen Weights & Biases."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of three classes, which differ in colour."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, number in (("train", 16), ("test", 4)):
        for label, name in enumerate(("blue whale", "crow", "élan")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 80, (8, 8, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


SMALL_SEARCH = ("supernet.channels=4", "supernet.num_cells=3", "data.batch_size=8",
                "search_space.num_intermediate_nodes=2")  # fmt: skip
SMALL_TRAIN = ("network.channels=4", "network.num_cells=3", "data.batch_size=8")
ON_DIGITS = ("data=digits", "data.max_images=24", "trainer.max_epochs=1")


def on_images(images: Path, *, small: tuple[str, ...]) -> list[str]:
    folder = ["data=image_folder", f"data.root={images}", "data.image_size=8"]
    return [*folder, "trainer.max_epochs=1", *small]


# Every experiment


def experiment_arguments(name: str, images: Path, checkpoint: Path) -> list[str]:
    """What makes an experiment a matter of seconds."""
    if name.startswith("search"):
        return on_images(images, small=SMALL_SEARCH)
    if name.startswith("train"):
        return ["genotype=darts_v2", *on_images(images, small=SMALL_TRAIN)]
    if name == "evaluate":
        small = on_images(images, small=SMALL_TRAIN)
        return ["genotype=darts_v2", f"ckpt_path={checkpoint}", *small]
    if name.startswith("select"):
        return ["run_dir=searches", *on_images(images, small=SMALL_TRAIN)]
    return {
        "draw": ["genotype=darts_v2"],
        "report": ["run_dir=run"],
        "quick_start": ["data.max_images=24", "trainer.max_epochs=1"],
    }[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_runs(name: str, images: Path, command: Command, tmp_path: Path) -> None:
    checkpoint = tmp_path / "elsewhere.pt"
    with torch.random.fork_rng():
        network = FinalNetwork(published("darts_v2"), channels=4, num_cells=3, num_classes=3)
    # As DataParallel names them, in which the official code trains on ImageNet.
    state = {f"module.{key}": value for key, value in official_state_dict(network).items()}
    torch.save({"epoch": 3, "state_dict": state}, checkpoint)
    if name == "report":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "history.jsonl").write_text(
            json.dumps({"epoch": 0, "seconds": 1.5, "metrics": {"train/train_loss": 2.5}}) + "\n"
        )
    published("darts_v1").save(tmp_path / "searches" / "0" / "genotype.yaml")
    arguments = experiment_arguments(name, images, checkpoint)
    result = command(f"experiment={name}", *arguments)
    assert result.code == 0, result.error
    if name.startswith("train") or name in ("evaluate", "quick_start"):
        assert 0 <= result.accuracy <= 100
    if name.startswith("search"):
        assert {path.name for path in result.output_dir.iterdir()} >= {
            "cells.png", "cells.svg", "checkpoints", "config.yaml", "csv", "environment.yaml",
            "genotype.yaml", "genotype_best.yaml", "history.jsonl", "report.html", "search.gif",
            "strengths.png", "strengths.svg",
        }  # fmt: skip


@pytest.mark.parametrize("name", options("experiment"))
def test_an_experiment_says_on_top_how_it_is_launched(name: str) -> None:
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    launch = "python run.py" if name == "quick_start" else f"python run.py experiment={name}"
    assert f"# {launch}" in text


@pytest.fixture
def composed() -> Callable[..., None]:
    """Composes as `run.py` does, and resolves every value."""

    def check(*overrides: str) -> None:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            whole = compose("config", [*overrides, "output_dir=x"], return_hydra_config=True)
            HydraConfig.instance().set_config(whole)
            cfg = compose("config", [*overrides, "output_dir=x"])
        check_types(cfg)
        assert "${" not in OmegaConf.to_yaml(resolved(cfg))

    return check


CHOICES = [
    (group, name)
    for group in ("data", "debug", "genotype", "hardware", "logger", "method", "optimizer",
                  "search_space", "sweep")
    for name in options(group)
    if (group, name) != ("method", "default")  # what the others are made of
]  # fmt: skip


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes_with_a_paper_experiment(
    group: str, name: str, images: Path, composed: Callable[..., None]
) -> None:
    trains = group == "genotype" or name.startswith("train")
    experiment = "train_final" if trains else "search_cifar10"
    if name == "optuna":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="an extra")
    more = {
        "image_folder": [f"data.root={images}"],
        "imagenet": [f"data.root={images}"],
        "from_file": ["genotype.path=genotype.yaml"],
        "from_wandb": ["genotype.artifact=team/dartsl/genotype-abc:v0"],
    }
    composed(f"experiment={experiment}", f"{group}={name}", *more.get(name, []))


# One line from data to a trained cell


@pytest.mark.slow
def test_search_then_train_then_evaluate(command: Command) -> None:
    searched = command("experiment=search_digits", "data.max_images=60", "trainer.max_epochs=2")
    assert searched.code == 0, searched.error
    found = Genotype.load(searched.output_dir / "genotype.yaml")
    assert len(found.normal) == 8

    # The command that the search names, as it names it, but shorter.
    following = searched.out.split("Next:")[1].strip().splitlines()[0]
    arguments = shlex.split(following)
    assert Path(arguments[1]) == ROOT / "run.py"  # as it was called from elsewhere
    assert "experiment=train_digits" in arguments
    trained = command(*arguments[2:], "data.max_images=60", "trainer.max_epochs=2")
    assert trained.code == 0, trained.error
    (checkpoint,) = Path("outputs/train_digits").glob("*/checkpoints/last.ckpt")
    measured = OmegaConf.load(checkpoint.parents[1] / "test.yaml")
    assert 100 * measured.accuracy == pytest.approx(trained.accuracy, abs=0.005)
    assert Genotype.load(checkpoint.parents[1] / "genotype.yaml") == found
    assert (checkpoint.parents[1] / "report.html").exists()

    genotype = f"genotype.path={searched.output_dir / 'genotype.yaml'}"
    network = ["network.channels=16", "network.num_cells=3", "network.auxiliary=false"]
    evaluated = command(
        "experiment=evaluate", "data=digits", "genotype=from_file", genotype,
        f"ckpt_path={checkpoint}", *network,
    )  # fmt: skip
    assert evaluated.code == 0, evaluated.error
    assert evaluated.accuracy == trained.accuracy

    other = command(
        "experiment=evaluate",
        "data=digits",
        "genotype=darts_v1",
        f"ckpt_path={checkpoint}",
        *network,
    )
    assert other.code == 1
    assert "Error: The checkpoint is of another network" in other.error

    other_source(found).save("other.yaml")
    other = command(
        "experiment=evaluate", "data=digits", "genotype=from_file", "genotype.path=other.yaml",
        f"ckpt_path={checkpoint}", *network,
    )  # fmt: skip
    assert other.code == 1
    assert f"though its tensors fit: it has {found.notation()}" in other.error


@pytest.mark.slow
def test_a_stopped_search_goes_on_where_it_was(command: Command) -> None:
    search = ("experiment=search_digits", *ON_DIGITS, *SMALL_SEARCH, "trainer.max_epochs=3",
              "callbacks.checkpoint.every_n_steps=1")  # fmt: skip
    whole = command(*search, "hydra.run.dir=whole")
    assert whole.code == 0, whole.error
    stopped = command(*search, "trainer.max_steps=4")
    assert stopped.code == 0, stopped.error
    resumed = command(*search, "ckpt_path=last", "hydra.run.dir=outputs/search_digits/resumed")
    assert resumed.code == 0, resumed.error
    assert "Going on from outputs/search_digits/" in resumed.out

    folders = Path("whole"), Path("outputs/search_digits/resumed")
    whole_end, resumed_end = (
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in folders
    )
    for part in ("state_dict", "optimizer_states", "epoch", "global_step"):
        assert_same(resumed_end[part], whole_end[part], part)
    for name in ("genotype.yaml", "genotype_best.yaml", "cells.png", "strengths.svg"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


@pytest.mark.slow
def test_a_run_is_not_written_over(command: Command) -> None:
    search = ("experiment=search_digits", *ON_DIGITS, *SMALL_SEARCH, "hydra.run.dir=here")
    assert command(*search).code == 0
    before = Path("here/genotype.yaml").stat().st_mtime_ns
    again = command(*search)
    assert again.code == 1
    assert "holds a run already: go on with it by resume=auto" in again.error
    assert Path("here/genotype.yaml").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_sweep_runs_each_seed_in_its_own_folder(command: Command) -> None:
    result = command("-m", "experiment=search_digits", *ON_DIGITS, *SMALL_SEARCH, "seed=0,1",
                     "print_config=false", "hydra.sweep.dir=sweep")  # fmt: skip
    assert result.code == 0, result.error
    assert Path("sweep/report.html").exists()
    for job in ("0", "1"):
        assert (Path("sweep") / job / "genotype.yaml").exists()
        assert OmegaConf.load(Path("sweep") / job / "config.yaml").seed == int(job)


@pytest.mark.slow
def test_a_failed_job_of_a_sweep_costs_that_job_only(command: Command) -> None:
    result = command(
        "-m", "experiment=search_digits", *ON_DIGITS, *SMALL_SEARCH, "data.max_images=1,24",
        "print_config=false", "hydra.sweep.dir=sweep",
    )  # fmt: skip
    assert result.code == 1
    assert "Error: 1 of 2 jobs failed:" in result.error
    assert "sweep/0 (data.max_images=1): max_images=1 must be at least 2" in result.error
    assert "Traceback" not in result.error
    assert not Path("sweep/0/genotype.yaml").exists()
    assert Path("sweep/1/genotype.yaml").exists()
    jobs = report_content(Path("sweep"))["tables"]
    assert [table["rows"][0][:2] for table in jobs] == [
        ["0", "data.max_images=1"],
        ["1", "data.max_images=24"],
    ]


@pytest.mark.slow
def test_a_job_that_fails_for_no_mistake_shows_where(command: Command, monkeypatch) -> None:
    def fail(cfg: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(tasks, "run", fail)
    result = command("-m", "experiment=search_digits", "seed=0,1", "hydra.sweep.dir=sweep")
    assert result.code == 1
    assert 'raise RuntimeError("a bug")' in Path("sweep/1/run.log").read_text()
    assert "sweep/1 (seed=1): RuntimeError: a bug" in result.error


def test_the_papers_four_searches_as_a_sweep(composed: Callable[..., None]) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["experiment=search_cifar10", "sweep=seeds"]
        cfg = compose("config", overrides, return_hydra_config=True)
    assert cfg.hydra.sweeper.params == {"seed": "0,1,2,3"}


@pytest.mark.slow
def test_the_value_that_a_sweeper_optimises(command: Command, monkeypatch) -> None:
    values = []
    run_task = tasks.run
    monkeypatch.setattr(tasks, "run", lambda cfg: values.append(run_task(cfg)) or values[-1])
    searched = command("experiment=search_digits", *ON_DIGITS, *SMALL_SEARCH)
    accuracy = re.findall(r"val: loss [\d.]+, accuracy ([\d.]+) %", searched.out)[-1]
    assert 100 * values[0] == pytest.approx(float(accuracy), abs=0.005)
    train = ["experiment=train_digits", "genotype=darts_v1", *ON_DIGITS, *SMALL_TRAIN]
    # Of a training that is validated on images of its own; else it is the test set's accuracy.
    own = ["data.train_fraction=0.5", "trainer.limit_val_batches=null", "hydra.run.dir=own"]
    trained = command(*train, *own, "resume=auto")
    found = yaml.safe_load(Path("own/result.yaml").read_text())
    assert 100 * found["test_accuracy"] == pytest.approx(trained.accuracy, abs=0.005)
    assert "Finished already" in command(*train, *own, "resume=auto").out
    assert values[-2:] == [found["val_accuracy"]] * 2
    for seen in ("trainer.limit_val_batches=0", "trainer.limit_val_batches=null"):
        assert command(*train, seen, f"hydra.run.dir={seen[-1]}").code == 0
        assert yaml.safe_load(Path(seen[-1], "result.yaml").read_text())
        assert values.pop() is None


# Drawing, loggers, debugging


@pytest.mark.parametrize("name", ["darts_v2", "nasnet"])
def test_draw(name: str, command: Command) -> None:
    result = command("experiment=draw", f"genotype={name}", "hydra.run.dir=pictures")
    assert result.code == 0, result.error
    assert result.out.split() == ["pictures/cells.png", "pictures/cells.svg"]
    with Image.open("pictures/cells.png") as picture:
        assert min(picture.size) > 500
    assert Path("pictures/cells.svg").read_text().startswith("<?xml")


def test_draw_several_side_by_side(command: Command) -> None:
    published("nasnet").save("found.yaml")
    given = ("genotypes=[darts_v1,found.yaml]", "genotype=random", "hydra.run.dir=pictures")
    result = command("experiment=draw", *given)
    assert result.code == 0, result.error
    svg = Path("pictures/cells.svg").read_text()
    for edge, number in (("normal-edge-7", 3), ("normal-edge-9", 1)):
        assert svg.count(f'id="{edge}"') == number


@pytest.mark.slow
@pytest.mark.parametrize("logger", options("logger"))
def test_every_logger_works_without_an_account(logger: str, command: Command) -> None:
    result = command("experiment=search_digits", *ON_DIGITS, *SMALL_SEARCH, f"logger={logger}",
                     "hydra.run.dir=here")  # fmt: skip
    assert result.code == 0, result.error
    pattern = {
        "csv": "csv/version_0/metrics.csv",
        "tensorboard": "tensorboard/version_0/events.out.tfevents.*",
        "wandb": "wandb/offline-run-*/run-*.wandb",
    }[logger]
    (written,) = Path("here").glob(pattern)
    assert written.stat().st_size > 0
    if logger == "csv":
        header, *rows = written.read_text().splitlines()
        assert {"search/val_accuracy", "alpha/normal_entropy", "epoch"} <= set(header.split(","))
        assert rows


@pytest.mark.slow
@pytest.mark.parametrize("debug", options("debug"))
def test_every_debug_setting(debug: str, command: Command) -> None:
    result = command("experiment=search_digits", *SMALL_SEARCH, f"debug={debug}",
                     "trainer.max_epochs=1", "hydra.run.dir=here")  # fmt: skip
    assert result.code == 0, result.error
    if debug == "profiler":
        assert "optimizer_step" in Path("here/fit-profile.txt").read_text()
    if debug == "fast_dev_run":
        assert not Path("here/checkpoints").exists()


def test_a_debug_setting_has_the_last_word() -> None:
    overrides = ["experiment=search_digits", "debug=profiler"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose("config", overrides).trainer.max_epochs == 1


def test_a_warning_that_nobody_can_act_on(monkeypatch, recwarn: pytest.WarningsRecorder) -> None:
    """Is not shown, whatever process runs a task: the workers of launchers do not run `run.py`."""

    def warn(cfg: DictConfig) -> None:
        for module in ("pytorch_lightning.utilities._pytree", "elsewhere"):
            warnings.warn_explicit(
                "`isinstance(treespec, LeafSpec)` is deprecated", FutureWarning, "x.py", 1, module
            )

    monkeypatch.setitem(tasks.TASKS, "warn", warn)
    tasks.run(OmegaConf.create({"task": "warn"}))
    assert len(recwarn) == 1


# Mistakes

# The command, and below it what the sentence says.
MISTAKES = """
experiment=serch_cifar10
    Unknown experiment 'serch_cifar10'. Did you mean 'search_cifar10'? Choices: draw,
experiment=train_final genotype=darts_v3
    Unknown genotype 'darts_v3'. Did you mean 'darts_v2'?
experiment=train_final
    No genotype: give a published one (genotype=darts_v2)
experiment=search_digits method=pc_dart
    Unknown method 'pc_dart'. Did you mean 'pc_darts'?
experiment=search_digits hardwar=gpu
    Unknown key 'hardwar'. Did you mean 'hardware'?
method=pc_darts
    'method' is no part of this experiment
experiment=search_digits hardware=cpu trainer.devices=2
    2 processes need a strategy that averages what a search and a training average
experiment=train_digits genotype=darts_v1 +trainer.accumulate_grad_batches=2
    trainer.accumulate_grad_batches is not for searches and trainings that resume exactly
optimizer.weights.lr=0.1
    'optimizer' is no part of this experiment
experiment=search_digits search_space.primitives=[none,sep_conv_3x4]
    Unknown primitive 'sep_conv_3x4'. Did you mean 'sep_conv_3x3'?
experiment=search_digits search_space.primitives=[none]
    at least one primitive other than 'none'
experiment=search_cifar10 data=image_folder
    The command lacks data.root=...
experiment=search_cifar10 data=image_folder data.root=nowhere
    No class folders in nowhere/train
experiment=search_digits logger=wandb logger.wandb.mode=ofline
    logger.wandb.mode=ofline must be one of online, offline, disabled
experiment=train_digits genotype=from_wandb
    The command lacks genotype.artifact=...
experiment=search_digits ckpt_path=nothing.ckpt
    No checkpoint at 'nothing.ckpt'
experiment=search_digits ckpt_path=last
    No checkpoint at
experiment=search_digits supernet.chanels=3
    Unknown key of supernet 'chanels'. Did you mean 'channels'?
experiment=search_digits +supernet.chanels=3
    Unknown key of supernet 'chanels'. Did you mean 'channels'?
experiment=search_digits +data.foo=3
    Unknown key of data 'foo'. Choices
experiment=search_digits +optimizer.schedule.foo=3
    Unknown key of optimizer.schedule 'foo'. Choices
experiment=search_digits hardware=[1,2]
    A group takes a name, or a list of names
experiment=search_digits +method.relaxation.foo=1
    Unknown key of method.relaxation 'foo'. Choices: none
experiment=search_digits method.relaxation._target_=dartsl.networks.Softma
    method.relaxation._target_=dartsl.networks.Softma names no class and no function
experiment=search_digits method.relaxation._target_=foo.bar
    method.relaxation._target_=foo.bar names no class and no function
experiment=search_digits method.relaxation._target_=dartsl.networks
    method.relaxation._target_=dartsl.networks names no class and no function
experiment=search_digits method.relaxation._target_=..x
    method.relaxation._target_=..x names no class and no function
experiment=search_digits method.relaxation._target_=null
    method.relaxation._target_=None names no class and no function
experiment=search_digits method.relaxation._target_=[]
    method.relaxation._target_=[] names no class and no function
experiment=search_digits ~supernet._target_
    supernet lacks a _target_, the name of the class that it describes: leave supernet as it was
experiment=search_digits supernet=null
    supernet lacks a _target_
experiment=search_digits ~module._target_
    module lacks a _target_
experiment=train_digits genotype=darts_v1 ~network._target_
    network lacks a _target_
experiment=search_digits ~data._target_
    data lacks a _target_
experiment=search_digits ~hardware
    trainer lacks a _target_
experiment=search_digits ~callbacks.checkpoint._target_
    callbacks.checkpoint lacks a _target_
experiment=search_digits callbacks.progress=null
    callbacks.progress lacks a _target_
experiment=search_digits +callbacks.foo.bar=1
    callbacks.foo lacks a _target_
experiment=search_digits +logger.foo=1
    logger.foo lacks a _target_
experiment=search_digits ~data.mean
    data cannot be built: ImageDataModule.__init__() missing 1 required keyword-only argument
experiment=search_digits ~optimizer.weights._partial_
    module.weight_optimizer cannot be built: SGD.__init__() missing 1 required
experiment=search_digits method.relaxation._target_=os.system
    It cannot be authorized
experiment=search_digits data.mean=[a]
    data.mean=['a'] must be a list, each a number
experiment=search_digits method.arch_optimizer.betas=[0.5]
    method.arch_optimizer.betas=[0.5] must be a list of 2, each a number
experiment=search_digits +trainer.check_val_every_n_epoch=0
    trainer.check_val_every_n_epoch=0 must be above 0
experiment=search_digits +trainer.strategy=ddp
    trainer.strategy=ddp does not average what
experiment=search_digits trainer.max_epochs=0
    trainer.max_epochs=0 trains nothing
experiment=search_digits trainer.max_epochs=-1
    trainer.max_epochs=-1 must be at least 1
experiment=search_digits trainer.limit_train_batches=0.001
    You requested to check 0.001 of the `train_dataloader`
experiment=search_digits optimizer.schedule.final=-1
    optimizer.schedule.final=-1 must be a number of at least 0
experiment=search_digits data.std=[0]
    mean=0.30545918 must be a number, and std=0.0 one above 0
experiment=search_digits data.cutout_length=9999
    cutout_length=9999 must be at most 1024
experiment=search_digits optimizer.schedule.num_epochs=-1
    optimizer.schedule.num_epochs=-1 must be at least 1
experiment=search_digits supernet.channels=[
    Cannot read 'supernet.channels=['
experiment=search_digits genotype=darts_v2
    task=search takes no genotype, it is there to find one
experiment=search_digits logger=null
    A group takes a name, or a list of names, and nothing else: data=digits. Of loggers there may be
search_cifar10
    Cannot read 'search_cifar10': every word of a command is KEY=VALUE
experiment=search_digits data.root=~/x
    is quoted, for Hydra and for the shell: "data.root='~/x'"
experiment=search_digits supernet.channels=0
    channels is 0; it is at least 1
experiment=search_digits trainer.max_epochs=abc
    trainer.max_epochs=abc must be a whole number
experiment=search_digits supernet.channels=[4]
    supernet.channels=[4] must be a whole number
experiment=search_digits data.batch_size=null
    data.batch_size=None must be a whole number
experiment=search_digits threads=[1]
    threads=[1] must be a whole number
experiment=search_digits supernet.num_classes=9
    The network has num_classes=9, but the data num_classes=10
experiment=search_digits optimizer.gradient_clip=0
    gradient_clip=0 must be above 0
experiment=train_digits genotype=darts_v1 module.label_smoothing=2
    label_smoothing=2 must be from 0 to 1
experiment=train_digits genotype=darts_v1 module.auxiliary_weight=nan
    auxiliary_weight=nan must be a number of at least 0
experiment=search_digits optimizer.weights.momentum=-1
    The optimizer of the weights refuses its settings: Invalid momentum value: -1
experiment=search_digits trainer.devices=many
    cannot run with these settings: `devices`
experiment=search_digits data.horizontal_flip='${'
    Error merging override data.horizontal_flip
experiment=search_digits seed=${oc.env:NO_SUCH_VARIABLE}
    Environment variable 'NO_SUCH_VARIABLE' not found
experiment=search_digits optimizer.weights.lr=fast
    optimizer.weights.lr=fast must be a number
experiment=search_digits trainer.precision=bf17
    trainer.precision=bf17 must be one of
experiment=search_digits data.horizontal_flip=3
    data.horizontal_flip=3 must be true or false
experiment=search_digits hardware.cuda_graphs=off
    hardware.cuda_graphs=off must be true or false
experiment=search_digits data.batch_size=0
    batch_size=0 must be at least 1
experiment=search_digits data.train_fraction=1
    train_fraction=1 leaves a search without one of its two halves
experiment=search_digits seed=-1
    seed=-1 must be a whole number from 0 to
experiment=search_digits threads=0
    threads=0 must be from 1 to 1024
experiment=search_digits threads=99999999999999999999
    threads=99999999999999999999 must be from 1 to 1024
experiment=search_digits seed=x
    seed=x must be a whole number
experiment=search_digits method=pc_darts supernet.channels=6
    6 is not a multiple of it
experiment=search_digits method=darts_unrolled method.hypergradient.product=exactly
    must be one of finite_difference, exact
experiment=search_digits method=darts_unrolled optimizer.weights.nesterov=true
    nesterov
experiment=train_digits genotype=from_file
    The command lacks genotype.path=...
experiment=train_digits genotype=from_file genotype.path=no.yaml
    Cannot read the genotype file 'no.yaml'
experiment=evaluate genotype=darts_v2
    Nothing to evaluate: give ckpt_path=FILE
experiment=evaluate genotype=darts_v2 ckpt_path={ROOT}/README.md
    it is no checkpoint
experiment=evaluate genotype=darts_v2 ckpt_path=last
    ckpt_path=last goes on with a run; to evaluate one, give ckpt_path=FILE
experiment=evaluate genotype=darts_v2 ckpt_path=no.pt
    there is no such file
experiment=draw
    No genotype
experiment=search_digits module.stages=[1,2]
    module.stages=[1, 2] must be
experiment=search_digits resume=yes
    resume=yes must be auto or null
experiment=search_digits resume=auto ckpt_path={ROOT}/README.md
    resume=auto goes on from the output folder: leave out ckpt_path
experiment=search_digits ckpt_path={ROOT}/README.md
    Cannot go on from the checkpoint
experiment=search_digits callbacks.checkpoint.every_n_minutes=-1
    callbacks.checkpoint.every_n_minutes=-1 must be positive
experiment=search_digits hydra.run.dir={ROOT}/README.md/x
    Cannot use the file or folder
experiment=search_digits hydra.run.dir={ROOT}/README.md
    README.md': File exists
experiment=draw genotype=darts_v2 hydra.run.dir=/proc/x
    Cannot use the file or folder '/proc/x': No such file or directory
experiment=draw genotype=darts_v2 output_dir=null
    output_dir=None must be a text
experiment=draw genotypes=3
    genotypes=3 must be one of a text, a list
experiment=draw genotype=darts_v2 title=3
    title=3 must be a text
experiment=report
    The command lacks run_dir=...
experiment=report run_dir=null
    run_dir=None must be a text
experiment=report run_dir=[a]
    run_dir=['a'] must be a text
experiment=report run_dir=nowhere
    No run in 'nowhere': give run_dir=FOLDER
experiment=draw genotypes=[darts_v1,drats_v2]
    Unknown genotype 'drats_v2'. Did you mean 'darts_v2'?
experiment=draw genotypes=drats_v2
    Unknown genotype 'drats_v2'. Did you mean 'darts_v2'?
experiment=draw genotypes=[outputs/no.yaml]
    Cannot read the genotype file 'outputs/no.yaml'
ckpt_path=last
    The quick start is two runs
experiments=3
    experiments=3 must be a list of 2, each a text
experiments=[]
    experiments=[] must be a list of 2
experiments=[search_digit,train_digits]
    Unknown experiment 'search_digit'. Did you mean 'search_digits'?
"""


@pytest.mark.parametrize(
    ("arguments", "sentence"), re.findall(r"^(\S.*)\n    (.+)$", MISTAKES, re.MULTILINE)
)
def test_a_mistake_ends_in_one_sentence(arguments: str, sentence: str, command: Command) -> None:
    result = command(*arguments.replace("{ROOT}", str(ROOT)).split())
    assert result.code == 1
    last = result.error.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert sentence in last
    assert "Traceback" not in result.error + result.out
    assert not list(Path.cwd().rglob("genotype*.yaml"))


def test_a_target_of_ones_own_that_fails_shows_where(command: Command, monkeypatch) -> None:
    """What it lacks itself is a bug of its module, not of the command."""
    monkeypatch.syspath_prepend(Path.cwd())
    search = ("experiment=search_digits", "data.max_images=20", "method.relaxation._target_=")
    Path("own_part.py").write_text("import no_such_module")
    with pytest.raises(ImportError, match="no_such_module"):
        command(*search[:2], f"{search[2]}own_part.Relaxation")
    Path("own_call.py").write_text("def part(x): ...\ndef relaxation(): return part()")
    with pytest.raises(InstantiationException, match="missing 1 required"):
        command(*search[:2], f"{search[2]}own_call.relaxation")


def test_batches_of_one_image_for_the_auxiliary_head(command: Command) -> None:
    small = ("network.channels=4", "network.num_cells=3", "data.batch_size=1")
    result = command("experiment=train_final", "genotype=darts_v1", "data=digits", *small)
    assert result.code == 1
    last = result.error.strip().splitlines()[-1]
    assert last.startswith("Error: BatchNorm has nothing to normalise in a batch of one image")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(command: Command) -> None:
    result = command("experiment=search_digits", "hardware=gpu")
    assert result.code == 1
    assert "This machine cannot run with these settings" in result.error
    assert "hardware=auto takes what there is" in result.error


def test_cifar10_that_cannot_be_had(command: Command, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", refuse)
    result = command("experiment=search_cifar10")
    assert result.code == 1
    assert "Error: CIFAR-10 is not in data/cifar10 and could not be downloaded" in result.error
    assert "data=image_folder data.root=FOLDER" in result.error


def test_help_explains_commands_groups_and_choices(command: Command) -> None:
    result = command("--help")
    assert result.code == 0
    assert help_text(CONF) in result.out
    assert "ckpt_path=last" in result.out


@pytest.mark.slow
def test_compiled_and_computed_twice(command: Command) -> None:
    """Small operations, as every size and choice of gradients is compiled."""
    tiny = (
        "search_space.primitives=[none,skip_connect]", "search_space.num_intermediate_nodes=1",
        "supernet.num_cells=1", "supernet.channels=2", "debug=fast_dev_run",
        "method=darts_first_order",
    )  # fmt: skip
    options = ("hardware.compile=default", "hardware.recompute=true")
    done = command("experiment=search_digits", *tiny, *options)
    assert done.code == 0, done.error
    assert "uncompiled" not in done.error
    exact = command("experiment=search_digits", *tiny[:-1], "method=darts_unrolled_exact", *options)
    assert exact.code == 0, exact.error
    assert "uncompiled" in exact.out + exact.error


@pytest.mark.slow
def test_the_config_is_shown_and_kept(command: Command) -> None:
    result = command("experiment=search_digits", *ON_DIGITS, *SMALL_SEARCH, "hydra.run.dir=here")
    assert result.out.startswith("config\n")
    assert "channels: 4" in result.out
    kept = OmegaConf.load("here/config.yaml")
    assert kept.supernet.channels == 4
    assert "${" not in json.dumps(OmegaConf.to_container(kept, resolve=False))


def test_what_the_next_command_needs_too() -> None:
    """That it trains on the same data, as fast, and is seen in the same place."""
    kept = ["data=image_folder", "++data.root=x y", "data.horizontal_flip=false",
            "+data.archive=of_a_set_of_ones_own", "hardware=multi_gpu", "hardware.recompute=true",
            "trainer.devices=2", "trainer.strategy=x", "trainer.sync_batchnorm=true",
            "logger=[csv,wandb]", "logger.wandb.project=mine", "++threads=4"]  # fmt: skip
    own = ["experiment=search_cifar10", "seed=3", "trainer.max_epochs=9", "data.batch_size=32",
           "++data.max_images=9", "logger.wandb.name=a_search"]  # fmt: skip
    assert kept_overrides([*kept, *own]) == kept


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["data.crop_padding=2", "hardware=cpu", "seed=3"], ["hardware=cpu"]),  # of the digits
        (["data=image_folder", "data.root=here"], ["data=image_folder", "data.root=here"]),
    ],
)
def test_what_follows_a_quick_start_keeps_hardware_and_the_images_given(
    given: list[str], kept: list[str]
) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", given, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    following = shlex.split(tasks.larger_search_command(cfg))
    assert following[2:] == ["experiment=search_cifar10", *kept]


# Interruption: resume=auto, what was finished, what cannot be written


@pytest.mark.slow
def test_resume_auto_starts_goes_on_and_says_when_it_is_finished(
    command: Command, monkeypatch
) -> None:
    values = []
    run_task = tasks.run
    monkeypatch.setattr(tasks, "run", lambda cfg: values.append(run_task(cfg)) or values[-1])
    search = ("experiment=search_digits", *ON_DIGITS, *SMALL_SEARCH, "trainer.max_epochs=2",
              "callbacks.checkpoint.every_n_steps=1", "resume=auto")  # fmt: skip
    assert command(*search, "hydra.run.dir=whole").code == 0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dartsl.callbacks.GenotypeWriter.on_train_epoch_end", stop)
        stopped = command(*search, "hydra.run.dir=here")
        assert stopped.code == 1
    last = Path("here/checkpoints/last.ckpt")
    last.write_bytes(last.read_bytes()[:-9])
    other = command(*search, "hydra.run.dir=here", "optimizer.weights.lr=0.1", "threads=null")
    assert other.code == 1
    assert "here holds a run of another config: module.schedule.initial, " in other.error
    assert "threads" not in other.error

    resumed = command(*search, "hydra.run.dir=here")
    assert resumed.code == 0, resumed.error
    assert "going on from the one before it, previous.ckpt" in resumed.out + resumed.error
    assert "Going on from here/checkpoints/previous.ckpt" in resumed.out
    ends = (
        torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("here", "whole")
    )
    assert_same(*(end["state_dict"] | end["metrics"] for end in ends))
    for name in (
        "genotype.yaml",
        "genotype_best.yaml",
        "cells.png",
        "strengths.svg",
        "result.yaml",
    ):
        assert Path("here", name).read_bytes() == Path("whole", name).read_bytes(), name

    before = {path: path.read_bytes() for path in Path("here").rglob("*") if path.is_file()}
    finished = command(*search, "hydra.run.dir=here", "callbacks.checkpoint.every_n_steps=9")
    assert finished.code == 0
    assert f"Finished already: here (val_accuracy {values[-1]})" in finished.out
    assert values[-1] == values[-2] == values[0]
    kept = [path for path in before if ".hydra" not in path.parts and path.suffix != ".log"]
    assert all(path.read_bytes() == before[path] for path in kept)

    # Gone on with for longer, and stopped on the way: it is finished no more.
    with monkeypatch.context() as patch:
        patch.setattr("dartsl.callbacks.GenotypeWriter.on_train_epoch_end", stop)
        longer = ("trainer.max_epochs=3", "ckpt_path=last", "resume=null", "hydra.run.dir=here")
        assert command(*search, *longer).code == 1
    assert not Path("here/result.yaml").exists()

    Path("here/checkpoints/previous.ckpt").write_bytes(b"")
    last.unlink()
    lost = command(*search, "hydra.run.dir=here", "trainer.max_epochs=3")
    assert lost.code == 1
    assert "Nothing is left to go on from" in lost.error


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"threads": 2, "trainer.devices": 2, "data.batch_size": 4, "ckpt_path": "x"}, []),
        ({"data.batch_size": 4}, ["data.batch_size"]),
        ({"seed": 1, "data.root": "y", "logger.csv.name": "z"}, ["data.root", "seed"]),
        ({"task": "evaluate", "ckpt_path": "x"}, ["ckpt_path", "task"]),
    ],
)
def test_what_may_differ_when_a_run_goes_on(changes: dict, differing: list[str]) -> None:
    """What decides where it ends may not."""
    config = {
        "task": "search", "seed": 0, "threads": 1, "ckpt_path": None,
        "trainer": {"devices": 1}, "data": {"batch_size": 8}, "logger": {"csv": {"name": "csv"}},
    }  # fmt: skip
    before, now = OmegaConf.create(config), OmegaConf.create(config)
    for key, value in changes.items():
        OmegaConf.update(now, key, value, force_add=True)
    assert differing_keys(before, now) == differing


@pytest.mark.slow
def test_resume_auto_in_a_sweep_skips_what_is_finished(command: Command) -> None:
    sweep = ("-m", "experiment=search_digits", *ON_DIGITS, *SMALL_SEARCH, "seed=0,1",
             "print_config=false", "hydra.sweep.dir=sweep", "resume=auto")  # fmt: skip
    assert command(*sweep).code == 0
    results = [Path("sweep") / job / "result.yaml" for job in "01"]
    whole = [path.read_text() for path in results]
    results[1].unlink()  # killed at its very end
    again = command(*sweep)
    assert again.code == 0, again.error
    assert re.findall("Finished already: sweep/(.)", again.out) == ["0"]
    assert re.findall("Going on from sweep/(.)", again.out) == ["1"]
    assert [path.read_text() for path in results] == whole


@pytest.mark.slow
def test_a_search_that_ends_within_an_epoch(command: Command) -> None:
    """It leaves its genotype and names no file that is not there."""
    done = command(
        "experiment=search_digits", *SMALL_SEARCH, "data.max_images=48", "data.batch_size=16",
        "trainer.max_steps=2", "hydra.run.dir=here",
    )  # fmt: skip
    assert done.code == 0, done.error
    assert "Traceback" not in done.error + done.out
    assert "genotype_best" not in done.out
    assert "Genotype: here/genotype.yaml" in done.out
    assert len(Genotype.load("here/genotype.yaml").normal) == 4


@pytest.mark.slow
def test_an_evaluation_writes_over_no_training(command: Command) -> None:
    network = ("genotype=darts_v1", "network.channels=4", "network.num_cells=2")
    where = (*network, "network.auxiliary=false", "hydra.run.dir=here")
    trained = command("experiment=train_digits", *where, "data.max_images=40",
                      "trainer.max_epochs=1")  # fmt: skip
    assert trained.code == 0, trained.error
    before = {path: path.read_bytes() for path in Path("here").glob("*.yaml")}
    assert Path("here/result.yaml") in before
    done = command("experiment=evaluate", "data=digits", *where,
                   "ckpt_path=here/checkpoints/last.ckpt")  # fmt: skip
    assert done.code == 1
    assert "here holds a run already: choose another folder" in done.error
    assert {path: path.read_bytes() for path in Path("here").glob("*.yaml")} == before


@pytest.mark.slow
def test_without_a_next_experiment(command: Command) -> None:
    done = command("experiment=search_digits", *ON_DIGITS, *SMALL_SEARCH, "~next_experiment")
    assert done.code == 0, done.error
    assert "Genotype: " in done.out
    assert "Next:" not in done.out


def test_an_evaluation_of_another_config_is_not_told_to_go_on(command: Command) -> None:
    """By ckpt_path=last, which it does not take."""
    folder = Path("here")
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 1")
    (folder / "result.yaml").write_text("test_accuracy: 0.5")
    done = command("experiment=evaluate", "data=digits", "genotype=darts_v2", "ckpt_path=x.pt",
                   "hydra.run.dir=here", "resume=auto")  # fmt: skip
    assert "here holds a run of another config: " in done.error
    assert done.error.endswith("differ. Choose another folder.\n")


@pytest.mark.slow
def test_resume_auto_in_the_quick_start(command: Command) -> None:
    """Its two runs, each in its own folder."""
    quick = ("data.max_images=24", "trainer.max_epochs=1", "hydra.run.dir=here", "resume=auto")
    first = command(*quick)
    Path("here/train/result.yaml").unlink()
    again = command(*quick)
    assert first.code == again.code == 0, again.error
    assert "Finished already: here/search" in again.out
    assert "Going on from here/train/checkpoints/last.ckpt" in again.out
    assert again.accuracy == first.accuracy


@pytest.mark.slow
def test_a_full_disk_ends_in_one_sentence(command: Command) -> None:
    """No file of more than 30 kB can be written; a checkpoint is larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        result = command(
            "experiment=search_digits", *ON_DIGITS, *SMALL_SEARCH, "hydra.run.dir=here"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.code == 1
    assert "Traceback" not in result.error
    last = result.error.strip().splitlines()[-1]
    assert re.match("Error: Cannot write '.*next.ckpt': File too large", last)
    assert Path("here/config.yaml").exists()
    assert not [path for path in Path("here").rglob("*") if path.suffix in (".ckpt", ".part")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.yaml", "genotype.yaml", "cells.png", "result.yaml"])
def test_what_cannot_be_written_ends_in_one_sentence(
    name: str, command: Command, monkeypatch
) -> None:
    """A read-only folder, as far as this one file goes; what stood there is still there."""
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if Path(target).name == name:
            raise OSError(errno.EROFS, "Read-only file system")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    Path("here").mkdir()
    Path("here", name).write_text("before")
    result = command("experiment=search_digits", *ON_DIGITS, *SMALL_SEARCH, "hydra.run.dir=here")
    assert result.code == 1
    assert f"{name}': Read-only file system" in result.error.splitlines()[-1]
    assert "Traceback" not in result.error
    if name == "result.yaml":  # a run that begins is not finished any more
        assert not Path("here", name).exists()
    else:
        assert Path("here", name).read_text() == "before"
    assert not list(Path("here").rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_folder_that_vanishes(
    workers: int, images: Path, command: Command, tmp_path: Path, monkeypatch
) -> None:
    """Images that are not held in memory are missed when their turn comes."""
    root = tmp_path / "images"
    shutil.copytree(images, root)
    monkeypatch.setattr(
        "dartsl.modules.SearchModule.on_validation_start", lambda self: shutil.rmtree(root)
    )
    result = command("experiment=search_digits", *on_images(root, small=SMALL_SEARCH),
                     f"data.num_workers={workers}", "data.in_memory_limit=0",
                     "trainer.max_epochs=2", "hydra.run.dir=here")  # fmt: skip
    assert result.code == 1
    assert "Error: Cannot read the image" in result.error.splitlines()[-1]
    assert "Traceback" not in result.error
    assert find_fault(Path("here/checkpoints/last.ckpt")) is None
