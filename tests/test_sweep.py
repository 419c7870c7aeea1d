"""Sweeps: what the jobs found as one result, and the engines that run them."""

import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from dartsl.config import EXTRAS, find_mistake
from dartsl.errors import UserError
from dartsl.genotype import GENOTYPE_FILE, Genotype, published
from dartsl.sweep import (
    ERROR_FILE,
    Job,
    Spread,
    SweepSummary,
    describe,
    read_jobs,
    save_result,
    save_summary,
    setting_of,
    spreads,
)
from tests.test_distributed import command

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
SEARCH = ("experiment=search_digits", "data.max_images=20", "trainer.max_epochs=1",
          "data.batch_size=8", "supernet.channels=4", "search_space.num_intermediate_nodes=2",
          "print_config=false")  # fmt: skip


def make_job(folder: Path, *overrides: str, **result: float) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    if result:
        save_result(folder, **result)


def test_mean_and_standard_deviation_over_the_seeds() -> None:
    assert Spread((0.5, 0.7)).mean == pytest.approx(0.6)
    assert Spread((0.5, 0.7)).std == pytest.approx(0.02**0.5)  # of a sample
    assert Spread((0.5,)).std is None
    assert Spread((math.nan,)).std is None


def test_jobs_that_differ_in_the_seed_alone_are_one_setting(tmp_path: Path) -> None:
    for number, accuracy in enumerate((0.9, 0.8, 0.7, 0.5)):
        cell = "darts_v1" if number < 3 else "darts_v2"
        overrides = ("experiment=x", f"genotype={cell}", f"seed={number}")
        make_job(tmp_path / str(number), *overrides, test_accuracy=accuracy)
    jobs = read_jobs(tmp_path)
    numbers = spreads(jobs)
    assert numbers["experiment=x", "genotype=darts_v1"]["test_accuracy"].values == (0.9, 0.8, 0.7)
    assert describe(jobs) == [
        "genotype=darts_v1   test accuracy 80.00 ± 10.00 % (n = 3)",
        "genotype=darts_v2   test accuracy 50.00 %",
    ]


def test_jobs_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 9, 0):
        make_job(tmp_path / str(number), f"seed={number}")
    assert [job.folder.name for job in read_jobs(tmp_path)] == ["0", "9", "10"]
    assert read_jobs(tmp_path)[0] == Job(tmp_path / "0", ("seed=0",), None, None)


def test_what_is_none_is_no_result(tmp_path: Path) -> None:
    save_result(tmp_path, val_accuracy=None, test_accuracy=0.5)
    assert yaml.safe_load((tmp_path / "result.yaml").read_text()) == {"test_accuracy": 0.5}


def test_a_job_that_failed_finds_nothing(tmp_path: Path) -> None:
    """What its folder holds is of a job before, which had another seed."""
    make_job(tmp_path / "0", "seed=0", val_accuracy=0.5)
    make_job(tmp_path / "1", "seed=2", "resume=auto", val_accuracy=0.7)
    assert describe(read_jobs(tmp_path)) == ["val accuracy 60.00 ± 14.14 % (n = 2)"]
    (tmp_path / "1" / ERROR_FILE).write_text("the folder holds a run with another seed")
    assert describe(read_jobs(tmp_path)) == ["val accuracy 50.00 %"]


def test_a_result_that_is_no_number_has_no_deviation(tmp_path: Path) -> None:
    for number, accuracy in enumerate((0.5, math.nan, 0.7)):
        make_job(tmp_path / str(number), f"seed={number}", test_accuracy=accuracy)
    jobs = read_jobs(tmp_path)
    assert math.isnan(spreads(jobs)[()]["test_accuracy"].std)
    assert describe(jobs) == ["test accuracy nan ± nan % (n = 3)"]
    save_summary(tmp_path, jobs)
    (setting,) = yaml.safe_load((tmp_path / "summary.yaml").read_text())["settings"]
    assert math.isnan(setting["test_accuracy"]["std"])


def test_a_result_of_text_is_refused(tmp_path: Path) -> None:
    make_job(tmp_path / "0", "seed=0")
    (tmp_path / "0" / "result.yaml").write_text("test_accuracy: high\n")
    with pytest.raises(UserError, match=r"result\.yaml holds no run's result: delete it"):
        read_jobs(tmp_path)


@pytest.mark.parametrize("seed", ["seed=0", "+seed=0", "++seed=0"])
def test_a_seed_however_it_is_given_is_no_part_of_a_setting(seed: str) -> None:
    assert setting_of(["genotype=darts_v1", seed]) == ("genotype=darts_v1",)


def test_after_a_sweep_of_trainings_nothing_is_selected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_job(tmp_path / "0", "seed=0", test_accuracy=0.5)
    published("darts_v1").save(tmp_path / "0" / GENOTYPE_FILE)  # as a training keeps it
    make_job(tmp_path / "1", "seed=1")
    (tmp_path / "1" / ERROR_FILE).write_text("no memory")
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    OmegaConf.set_struct(config, True)
    with pytest.raises(SystemExit, match="1 of 2 jobs failed"):
        SweepSummary().on_multirun_end(config)
    printed = capsys.readouterr().out
    assert "test accuracy 50.00 %" in printed
    assert "run_dir" not in printed


@pytest.mark.parametrize(("plugin", "extra"), EXTRAS.items())
def test_an_extra_that_is_not_installed_is_named(plugin: str, extra: str) -> None:
    mistake = find_mistake(MissingConfigException("", missing_cfg_file=plugin), ())
    assert f"pip install -e '.[{extra}]'" in str(mistake)


# The engines, each where it is installed


def is_installed(plugin: str) -> bool:
    """Whether a Hydra plugin is there."""
    plugins = find_spec("hydra_plugins")
    return plugins is not None and find_spec(f"hydra_plugins.{plugin}") is not None


def installed(plugin: str) -> pytest.MarkDecorator:
    """Skips where a Hydra plugin is missing."""
    reason = f"{plugin} is an extra that is not installed"
    return pytest.mark.skipif(not is_installed(plugin), reason=reason)


LAUNCHERS = [
    pytest.param(
        ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
        marks=installed("hydra_joblib_launcher"),
        id="joblib",
    ),
    pytest.param(
        ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hardware=ddp_cpu"),
        marks=installed("hydra_joblib_launcher"),
        id="joblib-ddp_cpu",
    ),
    pytest.param(
        ("hydra/launcher=submitit_local",),
        marks=installed("hydra_submitit_launcher"),
        id="submitit_local",
    ),
    pytest.param(
        ("hydra/launcher=slurm_local",), marks=installed("hydra_submitit_launcher"), id="local"
    ),
    pytest.param(
        ("hydra/launcher=ray", "+hydra.launcher.ray.init.include_dashboard=false",
         "+hydra.launcher.ray.init.num_cpus=2"),
        marks=installed("hydra_ray_launcher"),
        id="ray",
    ),
]  # fmt: skip


def own_lines(text: str) -> str:
    """Without those that Ray relays of its workers, late and in any order."""
    return "\n".join(line for line in text.splitlines() if "(_run_job pid=" not in line).rstrip()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_sweep_by_each_launcher(launcher: tuple[str, ...], tmp_path: Path) -> None:
    """Its third job fails, which costs that job alone."""
    done = command(tmp_path, "-m", *SEARCH, "seed=0,1,-1", "hydra.sweep.dir=here", *launcher)
    assert done.returncode == 1
    assert own_lines(done.stderr).endswith(
        "Error: 1 of 3 jobs failed:\n"
        "  here/2 (seed=-1): seed=-1 must be a whole number from 0 to 2^32 - 1."
    )
    summary = yaml.safe_load((tmp_path / "here" / "summary.yaml").read_text())
    (setting,) = summary["settings"]
    found = [
        yaml.safe_load((tmp_path / "here" / job / "result.yaml").read_text()) for job in ("0", "1")
    ]
    assert setting["val_accuracy"]["values"] == [each["val_accuracy"] for each in found]
    assert setting["val_accuracy"]["mean"] == pytest.approx(
        sum(each["val_accuracy"] for each in found) / 2
    )
    assert [failed["job"] for failed in summary["failed"]] == ["2"]
    for job in ("0", "1"):
        assert len(Genotype.load(tmp_path / "here" / job / "genotype.yaml").normal) == 4
    assert f"Next: python {ROOT / 'run.py'} experiment=select_digits" in done.stdout
    assert own_lines(done.stdout).endswith("run_dir=here")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "hydra/launcher").iterdir()))
def test_every_ready_launcher_composes(name: str) -> None:
    plugin = "ray" if name.startswith("ray") else "submitit"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        if not is_installed(f"hydra_{plugin}_launcher"):
            with pytest.raises(MissingConfigException) as caught:
                compose("config", [f"hydra/launcher={name}"], return_hydra_config=True)
            assert f"pip install -e '.[{plugin}]'" in str(find_mistake(caught.value, ()))
            pytest.skip(f"the extra {plugin} is not installed")
        cfg = compose("config", [f"hydra/launcher={name}"], return_hydra_config=True)
    launcher = cfg.hydra.launcher
    assert launcher._target_.startswith(f"hydra_plugins.hydra_{plugin}_launcher.")
    if name == "slurm":
        assert (launcher.timeout_min, launcher.gpus_per_node) == (4320, 1)


@pytest.mark.slow
@installed("hydra_optuna_sweeper")
def test_optuna_maximises_what_the_task_returns(tmp_path: Path) -> None:
    done = command(
        tmp_path, "-m", *SEARCH, "sweep=optuna", "hydra.sweeper.n_trials=3", "hydra.sweep.dir=here"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    best = yaml.safe_load((tmp_path / "here" / "optimization_results.yaml").read_text())
    results = [job.result for job in read_jobs(tmp_path / "here")]
    assert len(results) == 3
    assert best["best_value"] == max(result["val_accuracy"] for result in results if result)
    assert set(best["best_params"]) == {"optimizer.weights.lr", "optimizer.weights.weight_decay"}


NOTHING_TO_SELECT_BY = {
    "experiment=train_digits": "data.train_fraction=1.0 leaves no training images to select by",
    "experiment=train_digits data.train_fraction=0.8": "trainer.limit_val_batches=0 leaves no",
    "experiment=search_digits trainer.limit_val_batches=0": "trainer.limit_val_batches=0 leaves no",
    "experiment=quick_start": "task=quick_start finds no validation accuracy to select by.",
}


@pytest.mark.parametrize(("arguments", "fault"), NOTHING_TO_SELECT_BY.items())
def test_no_sweeper_looks_for_the_best_test_accuracy(arguments: str, fault: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", arguments.split(), return_hydra_config=True)
    SweepSummary().on_multirun_start(cfg)  # one that tries every value selects nothing
    cfg.hydra.sweeper._target_ = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
    with pytest.raises(SystemExit, match=f"^Error: .+: {re.escape(fault)}"):
        SweepSummary().on_multirun_start(cfg)


def test_a_sweep_that_would_not_find_its_jobs_is_refused() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = ["experiment=search_digits", "hydra.output_subdir=null"]
        cfg = compose("config", given, return_hydra_config=True)
    with pytest.raises(SystemExit, match=r"^Error: hydra\.output_subdir=None: a sweep finds its"):
        SweepSummary().on_multirun_start(cfg)


@installed("hydra_optuna_sweeper")
def test_optuna_is_refused_before_any_job(tmp_path: Path) -> None:
    train = ("experiment=train_digits", "genotype=darts_v1", "hydra.sweep.dir=here")
    done = command(tmp_path, "-m", *train, "sweep=optuna")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: optuna: data.train_fraction=1.0 leaves")
    assert not read_jobs(tmp_path / "here")


# Processes that another has started


@pytest.mark.slow
def test_torchrun_and_slurm_start_the_processes_of_one_run(tmp_path: Path) -> None:
    """With `hardware=multi_node`: both find the same, and all processes write into one folder."""
    run = [str(ROOT / "run.py"), *SEARCH, "print_config=false"]
    cpu = ["hardware=multi_node", "trainer.accelerator=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*torchrun, *run, *cpu], cwd=tmp_path, env=environment, check=True, timeout=600,
        capture_output=True,
    )  # fmt: skip
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "x", "SLURM_NTASKS": "2",
             "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
             "SLURM_NODELIST": "localhost"}  # fmt: skip
    tasks = [
        subprocess.Popen(
            [sys.executable, *run, *cpu], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
            env=environment | slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    first, second = (task.communicate(timeout=600)[0] for task in tasks)
    assert [task.returncode for task in tasks] == [0, 0]
    assert "Genotype: outputs/search_digits/77/genotype.yaml" in first
    assert second == ""
    by_torchrun, by_slurm = sorted(
        (tmp_path / "outputs" / "search_digits").iterdir(), key=lambda path: path.name == "77"
    )
    for name in ("genotype.yaml", "result.yaml", "strengths.svg"):
        assert (by_torchrun / name).read_bytes() == (by_slurm / name).read_bytes(), name
