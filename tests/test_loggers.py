"""What a run sends to Weights & Biases, read from the file that an offline run leaves."""

import csv
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import run
from dartsl import dashboard
from dartsl.errors import UserError
from dartsl.genotype import Genotype, published
from dartsl.loggers import finished_runs, genotype_artifact, wandb_logger
from dartsl.search_space import SearchSpace
from tests.wandb_file import OfflineRun

ROOT = Path(__file__).parents[1]
SPACE = SearchSpace()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forget_wandb(monkeypatch, tmp_path)


def forget_wandb(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """A machine that has never seen Weights & Biases."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "NETRC", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(home / name.lower()))


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "run.py"), *arguments])
    run.cli()


@dataclass
class Runs:
    """A search that was stopped and went on, and a sweep of two trainings."""

    folder: Path
    stopped: OfflineRun
    search: OfflineRun
    trainings: list[OfflineRun]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("runs")
    small = ("data.max_images=24", "data.batch_size=8", "print_config=false",
             "logger=[csv,tensorboard,wandb]", "logger.wandb.mode=offline",
             "trainer.log_every_n_steps=1")  # fmt: skip
    search = ("experiment=search_digits", *small, "supernet.channels=4", "trainer.max_epochs=3",
              "callbacks.checkpoint.every_n_steps=1")  # fmt: skip
    training = ("-m", "experiment=train_digits", "genotype=darts_v1", *small, "seed=0,1",
                "network.channels=4", "trainer.max_epochs=2", "trainer.limit_val_batches=1",
                "data.train_fraction=0.5")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.chdir(folder)
        forget_wandb(patch, folder)
        command(patch, *search, "hydra.run.dir=stopped", "trainer.max_steps=4")
        checkpoint = "ckpt_path=stopped/checkpoints/last.ckpt"
        command(patch, *search, "hydra.run.dir=search", checkpoint)
        command(patch, *training, "hydra.sweep.dir=sweep")
        yield Runs(
            folder,
            OfflineRun.read(folder / "stopped"),
            OfflineRun.read(folder / "search"),
            [OfflineRun.read(folder / "sweep" / job) for job in ("0", "1")],
        )


@pytest.mark.slow
def test_a_run_says_what_it_is(runs: Runs) -> None:
    assert runs.search.job_type == "search"
    assert runs.search.group == "search_digits"
    assert runs.search.tags == {"search_digits", "digits", "darts_first_order", "auto"}
    assert runs.trainings[0].job_type == "train"
    assert {"train_digits", "darts_v1"} < runs.trainings[0].tags
    for found, folder in ((runs.search, "search"), (runs.trainings[1], "sweep/1")):
        whole = OmegaConf.to_container(OmegaConf.load(runs.folder / folder / "config.yaml"))
        assert {key: found.config[key] for key in whole} == whole


@pytest.mark.slow
def test_a_sweep_is_one_group_and_each_job_one_finished_run(runs: Runs) -> None:
    assert {found.group for found in runs.trainings} == {"train_digits/sweep"}
    assert len({found.id for found in runs.trainings}) == 2
    assert [found.config["seed"] for found in runs.trainings] == [0, 1]
    assert [found.exit_code for found in runs.trainings] == [0, 0]
    for found in runs.trainings:
        assert [epoch for epoch, _ in found.series("train/train_loss")] == [0, 1]


@pytest.mark.slow
def test_the_quick_start_is_two_runs_of_one_group(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, "logger=wandb", "logger.wandb.mode=offline", "data.max_images=24",
            "trainer.max_epochs=1", "print_config=false", "hydra.run.dir=here")  # fmt: skip
    search, training = (OfflineRun.read(tmp_path / "here" / part) for part in ("search", "train"))
    assert search.id != training.id
    assert search.group == training.group == "quick_start"
    assert (search.job_type, training.job_type) == ("search", "train")


@pytest.mark.slow
def test_a_resumed_run_goes_on_under_its_id(runs: Runs) -> None:
    assert runs.search.id == runs.stopped.id
    assert runs.stopped.exit_code == runs.search.exit_code == 0
    assert [epoch for epoch, _ in runs.stopped.series("search/val_loss")] == [0]
    assert [epoch for epoch, _ in runs.search.series("search/val_loss")] == [1, 2]
    # The first epoch's genotype, which the second is compared with, is the stopped run's.
    assert "alpha/genotype_distance" not in runs.stopped.logged
    assert [epoch for epoch, _ in runs.search.series("alpha/genotype_distance")] == [1, 2]


@pytest.mark.slow
def test_every_number_has_its_axis_and_summary(runs: Runs) -> None:
    for found in (runs.search, *runs.trainings):
        names = {name for name in found.logged if "/" in name} - {"trainer/global_step"}
        assert {"search/train_loss_step", "train/loss_step"} & names
        for name in names:
            definitions = [
                metric
                for key, metric in found.metrics.items()
                if key == name or (key.endswith("*") and name.startswith(key[:-1]))
            ]
            of_step = name.endswith("_step")
            assert len(definitions) == 1 + of_step  # an exact name goes before a pattern
            definition = found.metrics.get(name, definitions[0])
            assert definition.step_metric == ("trainer/global_step" if of_step else "epoch")
            if not name.startswith("cells/"):
                assert definition.summary.min
                assert definition.summary.last
                assert definition.summary.max != of_step
                parts = {"min", "last"} if of_step else {"min", "max", "last"}
                assert set(found.summary[name]) == parts


@pytest.mark.slow
def test_every_edge_is_a_line(runs: Runs) -> None:
    for kind in ("normal", "reduce"):
        for measure in ("strength", "entropy"):
            prefix = f"alpha/{kind}_edge_{measure}/"
            names = {name for name in runs.search.logged if name.startswith(prefix)}
            assert names == {f"{prefix}node_{n}_from_{s}" for n, s in SPACE.edges}
        mean = sum(
            runs.search.series(f"alpha/{kind}_edge_entropy/node_{n}_from_{s}")[-1][1]
            for n, s in SPACE.edges
        ) / len(SPACE.edges)
        assert runs.search.series(f"alpha/{kind}_entropy")[-1][1] == pytest.approx(mean, rel=1e-6)


def test_tensorboard_has_the_settings_of_a_run_and_no_curve_of_them(tmp_path: Path) -> None:
    config = OmegaConf.load(ROOT / "conf/logger/tensorboard.yaml").tensorboard
    logger = instantiate(config, save_dir=str(tmp_path))
    logger.log_hyperparams({"optimizer": {"lr": 0.1}})
    logger.log_metrics({"search/val_loss": 2.0}, 3)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    assert events.Tags()["scalars"] == ["search/val_loss"]
    assert b"optimizer/lr" in b"".join(events.PluginTagToContent("hparams").values())


@pytest.mark.slow
def test_every_epoch_has_its_pictures(runs: Runs) -> None:
    for name in ("cells/genotype", "cells/edge_weights"):
        pictures = runs.search.pictures(name)
        assert len(pictures) == 2
        for path in pictures:
            with Image.open(path) as picture:
                assert min(picture.size) > 500
    (events,) = runs.folder.glob("search/tensorboard/version_0/events.*")
    tags = EventAccumulator(str(events)).Reload().Tags()
    assert {"cells/genotype", "cells/edge_weights"} <= set(tags["images"])
    assert {"alpha/genotype_distance", "search/val_loss"} <= set(tags["scalars"])


@pytest.mark.slow
def test_csv_holds_the_same_numbers(runs: Runs) -> None:
    with (runs.folder / "search/csv/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    pictures = {"cells/genotype", "cells/edge_weights"}
    names = {name for name in runs.search.logged if "/" in name} - pictures
    for name in names - {"trainer/global_step"}:
        kept = [(int(row["epoch"]), float(row[name])) for row in rows if row[name]]
        for (epoch, value), (other_epoch, other) in zip(
            kept, runs.search.series(name), strict=True
        ):
            assert epoch == other_epoch
            assert value == pytest.approx(other, rel=1e-6)


@pytest.mark.slow
def test_a_search_publishes_its_genotype_and_its_checkpoint(runs: Runs) -> None:
    assert set(runs.search.artifacts) == {"genotype", "checkpoint"}
    for kind, names in (
        ("genotype", ["genotype.yaml", "genotype_best.yaml"]),
        ("checkpoint", ["last.ckpt"]),
    ):
        artifact = runs.search.artifacts[kind]
        assert artifact.name == f"{kind}-{runs.search.id}"
        assert sorted(entry.path for entry in artifact.manifest.contents) == names
    staged = {e.path: e.local_path for e in runs.search.artifacts["genotype"].manifest.contents}
    assert Genotype.load(staged["genotype.yaml"]) == Genotype.load(
        runs.folder / "search/genotype.yaml"
    )
    assert not runs.trainings[0].artifacts


def test_a_run_that_fails_is_marked_so(tmp_path: Path) -> None:
    def fail() -> None:
        with finished_runs():
            logger = wandb_logger(save_dir=str(tmp_path), job_type="search", mode="offline")
            logger.log_metrics({"search/val_loss": 1.0}, 0)
            raise RuntimeError("no space left")

    with pytest.raises(RuntimeError, match="no space left"):
        fail()
    assert OfflineRun.read(tmp_path).exit_code == 1


# From an artifact


class FakeArtifact:
    """What `wandb.Api().artifact(name)` gives: files that can be downloaded."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files

    def download(self, root: str) -> str:
        for name, text in self.files.items():
            Path(root, name).write_text(text)
        return root


@pytest.fixture
def published_files(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """The artifacts that there are, by name."""
    shelf: dict[str, dict[str, str]] = {}

    def artifact(name: str) -> FakeArtifact:
        if name not in shelf:
            raise wandb.errors.CommError(f"artifact '{name}' not found")
        return FakeArtifact(shelf[name])

    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(artifact=artifact))
    return shelf


NAME = "team/dartsl/genotype-abc:v0"


def test_a_genotype_comes_from_an_artifact(published_files, tmp_path: Path) -> None:
    published("darts_v1").save(tmp_path / "genotype.yaml")
    published_files[NAME] = {"genotype.yaml": (tmp_path / "genotype.yaml").read_text()}
    assert genotype_artifact(NAME) == published("darts_v1")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (None, f"Cannot get the artifact '{NAME}': artifact '{NAME}' not found. Its name is"),
        ({"model.ckpt": ""}, f"The artifact '{NAME}' holds no genotype.yaml"),
        ({"genotype.yaml": "!!python/object/apply:os.abort []"}, "No genotype in"),
        ({"genotype.yaml": "Genotype(normal=__import__('os').abort())"}, "No genotype in"),
    ],
)
def test_an_artifact_that_is_none(files, sentence: str, published_files) -> None:
    if files is not None:
        published_files[NAME] = files
    with pytest.raises(UserError, match=re.escape(sentence)):
        genotype_artifact(NAME)


class FakeRun:
    """Remembers what a run is told."""

    def __init__(self, offline: bool) -> None:
        self.id, self.offline, self.used = "abc", offline, []

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def use_artifact(self, name: str) -> None:
        self.used.append(name)


@pytest.mark.parametrize("offline", [True, False])
def test_a_training_is_linked_with_the_artifact(
    offline: bool, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeRun(offline)
    monkeypatch.setattr(wandb, "init", lambda **_: fake)
    logger = wandb_logger(save_dir=str(tmp_path), job_type="train", artifact=NAME, mode="online")
    assert logger.experiment is fake
    assert fake.used == ([] if offline else [NAME])
    assert (f"cannot be linked with {NAME}" in caplog.text) == offline


@pytest.mark.slow
def test_a_training_from_an_artifact(published_files, tmp_path: Path, monkeypatch) -> None:
    published("darts_v2").save(tmp_path / "genotype.yaml")
    published_files[NAME] = {"genotype.yaml": (tmp_path / "genotype.yaml").read_text()}
    given = {}
    make = wandb_logger
    monkeypatch.setattr("dartsl.loggers.wandb_logger", lambda **o: given.update(o) or make(**o))
    monkeypatch.chdir(tmp_path)
    command(
        monkeypatch, "experiment=train_digits", "genotype=from_wandb", f"genotype.artifact={NAME}",
        "logger=wandb", "network.channels=4", "data.max_images=24", "trainer.max_epochs=1",
        "print_config=false", "hydra.run.dir=here",
    )  # fmt: skip
    assert given["artifact"] == NAME
    assert OfflineRun.read(tmp_path / "here").config["genotype"]["artifact"] == NAME


def test_a_run_that_cannot_begin(tmp_path: Path, monkeypatch) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", refuse)
    logger = wandb_logger(save_dir=str(tmp_path), job_type="search", mode="online")
    with pytest.raises(UserError, match=r"no route to host\. logger\.wandb\.mode=offline keeps"):
        _ = logger.experiment


def test_an_evaluation_is_a_run_of_its_own(tmp_path: Path) -> None:
    kept = tmp_path / "run" / "wandb" / "run_id.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("abc\n")
    options = {"save_dir": str(tmp_path), "mode": "offline"}
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    ids = [
        wandb_logger(job_type=task, checkpoint=checkpoint, **options).version
        for task in ("train", "evaluate")
    ]
    assert ids == ["abc", None]
    assert wandb_logger(job_type="train", **options).version is None


# The dashboard


def metrics_of(spec: dict[str, Any]) -> list[tuple[str, str]]:
    """(kind of the panel, metric or pattern) of all panels."""
    found = []
    for section in spec["sections"]:
        for panel in section["panels"]:
            names = panel.get("metrics", [])
            found += [(panel["kind"], name) for name in names]
            found += [("pattern", panel["pattern"])] if "pattern" in panel else []
    return found


@pytest.mark.slow
def test_the_dashboard_shows_what_is_logged(runs: Runs) -> None:
    every = [runs.search, *runs.trainings]
    logged = set().union(*(found.logged for found in every))
    summary = {
        f"{name}.{part}"
        for found in every
        for name, value in found.summary.items()
        if isinstance(value, dict)
        for part in value
    }
    shown = metrics_of(dashboard.specification())
    for kind, name in shown:
        if name.startswith("config:"):
            assert OmegaConf.select(OmegaConf.create(runs.search.config), name[7:]) is not None
        elif kind == "pattern":
            assert sum(re.fullmatch(name, other) is not None for other in logged) == 14
        elif kind in ("lines", "pictures"):
            assert name in logged, name
        else:
            assert name in summary, name
    # And nothing that is logged has been forgotten.
    patterns = "|".join(name for kind, name in shown if kind == "pattern")
    names = {name.removesuffix(".last").removesuffix(".max") for _, name in shown}
    forgotten = {n for n in logged - names if "/" in n and not re.fullmatch(patterns, n)}
    assert forgotten == {"trainer/global_step", "train/loss_step", "test/loss"}


def test_the_dashboard_is_printed_without_its_package(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    dashboard.main(["--print", "--name", "mine"])
    assert yaml.safe_load(capsys.readouterr().out) == dashboard.specification("mine")
    with pytest.raises(SystemExit, match=r"pip install 'dartsl\[dashboard\]'"):
        dashboard.main(["--entity", "team"])


def test_the_sections_of_the_dashboard() -> None:
    assert [section["name"] for section in dashboard.specification()["sections"]] == [
        "Search", "Collapse", "Cells", "Final training", "Sweep comparison",
    ]  # fmt: skip


def test_the_dashboard_in_the_words_of_wandb_workspaces(monkeypatch, capsys) -> None:
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    saved = []
    monkeypatch.setattr(workspaces.Workspace, "save", lambda self: saved.append(self._to_model()))
    monkeypatch.setattr(workspaces.Workspace, "url", "https://there")
    dashboard.main(["--entity", "team", "--project", "cells"])
    assert capsys.readouterr().out == "https://there\n"
    (view,) = saved
    assert (view.entity, view.project, view.display_name) == ("team", "cells", "dartsl")
    sections = view.spec.section.panel_bank_config.sections
    sections = [section for section in sections if section.panels]
    spec = dashboard.specification()["sections"]
    assert [section.name for section in sections] == [section["name"] for section in spec]
    for section, expected in zip(sections, spec, strict=True):
        assert len(section.panels) == len(expected["panels"])
        for panel, said in zip(section.panels, expected["panels"], strict=True):
            text = panel.model_dump_json()
            names = [*said.get("metrics", []), *([said["pattern"]] if "pattern" in said else [])]
            for name in names:
                assert name.removeprefix("config:").split(".")[-1] in text
