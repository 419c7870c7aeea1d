"""The best of several found cells, by validation alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from dartsl import selection
from dartsl.errors import UserError
from dartsl.genotype import Genotype, published
from dartsl.networks import FinalNetwork
from dartsl.search_space import SearchSpace, random_genotype
from dartsl.selection import Candidate, find_candidates, quick_count, select, training_of
from tests.test_run import (  # noqa: F401
    CONF,
    SMALL_TRAIN,
    Command,
    command,
    images,
    no_key,
    on_images,
)


@pytest.fixture
def searches(tmp_path: Path) -> Path:
    """What a sweep of two searches leaves, and another folder."""
    folder = tmp_path / "searches"
    for job, name in ((0, "darts_v1"), (1, "pc_darts_cifar")):
        published(name).save(folder / str(job) / "genotype.yaml")
    (folder / "other").mkdir()
    return folder


@pytest.fixture
def without_test_images(images: Path, tmp_path: Path) -> Path:  # noqa: F811
    """An image folder whose test images cannot be read."""
    root = tmp_path / "images"
    shutil.copytree(images, root)
    for path in (root / "test").rglob("*.png"):
        path.write_text("not an image")
    return root


@pytest.mark.slow
def test_the_best_cell_is_found_without_the_test_set(
    searches: Path,
    without_test_images: Path,
    command: Command,  # noqa: F811
) -> None:
    settings = on_images(without_test_images, small=SMALL_TRAIN)
    select = ("experiment=select", "run_dir=searches", *settings)
    done = command(*select, "random_cells=1")
    assert done.code == 0, done.error
    folder = searches / "select"
    accuracies = {
        path.parent.name: yaml.safe_load(path.read_text()) for path in folder.glob("*/result.yaml")
    }
    assert all(list(result) == ["val_accuracy"] for result in accuracies.values())
    (random,) = set(accuracies) - {"0", "1"}
    assert random.startswith("random_")
    best = max(("0", "1"), key=lambda job: accuracies[job]["val_accuracy"])
    chosen = Genotype.load(folder / "genotype.yaml")
    if accuracies["0"] != accuracies["1"]:
        assert chosen == Genotype.load(searches / best / "genotype.yaml")
    rows = [line.split(",") for line in (folder / "table.csv").read_text().splitlines()[1:]]
    assert [row[2] for row in rows] == [
        f"{100 * accuracies[row[1]]['val_accuracy']:.2f}" for row in rows
    ]
    assert [float(row[2]) for row in rows] == sorted((float(row[2]) for row in rows), reverse=True)
    sizes = {row[1]: int(row[3]) for row in rows}
    assert 0.9 * min(sizes["0"], sizes["1"]) <= sizes[random] <= 1.1 * max(sizes["0"], sizes["1"])
    assert (folder / "table.md").read_text() in done.out
    assert "-m experiment=train_final" in done.out
    assert "genotype.path=searches/select/genotype.yaml seed=0,1,2" in done.out

    # Reading one test image would have failed.
    trained = command("experiment=train_final", "genotype=darts_v1", *settings)
    assert trained.code == 1
    assert "Cannot read the image" in trained.error


@pytest.mark.slow
def test_what_is_trained_is_not_trained_again(
    searches: Path,
    images: Path,  # noqa: F811
    command: Command,  # noqa: F811
) -> None:
    select = ("experiment=select", "run_dir=searches", *on_images(images, small=SMALL_TRAIN))
    first = command(*select, "only=1")
    assert first.code == 0, first.error
    assert "Not trained yet: 0" in first.out
    assert not (searches / "select" / "genotype.yaml").exists()
    result = searches / "select" / "1" / "result.yaml"
    before = result.stat().st_mtime_ns
    second = command(*select)
    assert second.code == 0, second.error
    assert "Training 0 (2 of 2)" in second.out
    assert "Training 1" not in second.out
    assert result.stat().st_mtime_ns == before
    assert (searches / "select" / "genotype.yaml").exists()

    # A training that was interrupted goes on; here at its end.
    result.unlink()
    third = command(*select)
    assert "Going on from searches/select/1/checkpoints/last.ckpt" in third.out
    assert result.exists()

    other = command(*select, "optimizer.weights.lr=0.05")
    assert other.code == 1
    assert "searches/select/0 holds a training with another module" in other.error


@pytest.mark.slow
def test_a_training_that_ends_before_it_is_validated(
    searches: Path,
    images: Path,  # noqa: F811
    command: Command,  # noqa: F811
) -> None:
    """However often it is tried."""
    for _ in range(2):
        done = command(
            "experiment=select", "run_dir=searches", *on_images(images, small=SMALL_TRAIN),
            "data.batch_size=4", "trainer.max_steps=1",
        )  # fmt: skip
        assert done.code == 1
        last = done.error.strip().splitlines()[-1]
        assert last.startswith("Error: The training of 0 has ended before it was validated")


def keep(folder: Path, cell: str, config: dict[str, Any] | None, ended: bool = True) -> None:
    """What a run leaves in its folder."""
    published(cell).save(folder / "genotype.yaml")
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if ended:
        (folder / "result.yaml").write_text("val_accuracy: 0.5\n")


def candidates(tmp_path: Path, *overrides: str) -> list[Candidate]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        small = ["network.channels=4", "network.num_cells=3", f"output_dir={tmp_path}/select"]
        return find_candidates(compose("config", ["experiment=select_digits", *small, *overrides]))


def test_only_searches_that_have_ended_take_part(tmp_path: Path, capsys) -> None:
    """Neither trainings nor another selection, nor what was found before a search died."""
    for name in ("0", "1"):
        keep(tmp_path / name, "darts_v1", {"task": "search"})
    keep(tmp_path / "2", "darts_v1", {"task": "search"}, ended=False)
    keep(tmp_path / "by_hand", "darts_v2", None, ended=False)
    keep(tmp_path / "train", "darts_v2", {"task": "train"})
    keep(tmp_path / "select", "darts_v2", {"task": "train"})
    (tmp_path / "select" / "table.csv").write_text("")
    keep(tmp_path / "another", "darts_v2", None)
    (tmp_path / "another" / "table.csv").write_text("")
    found = candidates(tmp_path, f"run_dir={tmp_path}")
    assert [each.name for each in found] == ["0", "1", "by_hand"]
    assert capsys.readouterr().out == f"Left out: {tmp_path}/2, a search that has not ended\n"


def test_a_single_search_has_the_name_of_its_folder(tmp_path: Path, monkeypatch) -> None:
    keep(tmp_path / "found", "darts_v1", {"task": "search"})
    monkeypatch.chdir(tmp_path / "found")
    (found,) = candidates(tmp_path, "run_dir=.")
    assert found.name == "found"


def test_a_search_may_be_called_random(tmp_path: Path) -> None:
    """And is none of the baseline's, of which none takes its name."""
    for number, name in enumerate(("random_0", "random_search")):
        keep(tmp_path / name, "darts_v1", {"task": "search"})
        usual = random_genotype(SearchSpace(), number)  # whose size most have
        usual.save(tmp_path / name / "genotype.yaml")
    drawn = candidates(tmp_path, f"run_dir={tmp_path}", "random_cells=3")
    assert [each.is_random for each in drawn] == [False, False, True, True, True]
    assert len({each.name for each in drawn}) == 5


def test_random_cells_are_of_the_space_that_was_searched(tmp_path: Path) -> None:
    primitives = ["none", "skip_connect", "sep_conv_3x3", "dil_conv_3x3"]
    space = {"_target_": "dartsl.search_space.SearchSpace", "primitives": primitives}
    genotype = random_genotype(SearchSpace(tuple(primitives), 3), 9)
    config = {"task": "search", "search_space": space | {"num_intermediate_nodes": 3}}
    keep(tmp_path / "0", "darts_v1", config)
    genotype.save(tmp_path / "0" / "genotype.yaml")
    _, *drawn = candidates(tmp_path, f"run_dir={tmp_path}", "random_cells=8")
    assert set().union(*(each.genotype.primitives for each in drawn)) == set(primitives[1:])
    assert all(len(each.genotype.normal) == 6 for each in drawn)


def test_more_random_cells_than_there_are_end_before_a_network_is_built_for_each(
    tmp_path: Path, monkeypatch
) -> None:
    keep(tmp_path / "0", "darts_v1", {"task": "search"})
    random_genotype(SearchSpace(), 0).save(tmp_path / "0" / "genotype.yaml")  # many are as large
    built, build = [], selection._candidate

    def noted(cfg: DictConfig, name: str, *args: Any, **options: Any) -> Candidate:
        built.append(name)
        return build(cfg, name, *args, **options)

    monkeypatch.setattr(selection, "_MAX_DRAWS", 9)
    monkeypatch.setattr(selection, "_candidate", noted)
    with pytest.raises(UserError, match=r"Of 9 random cells only [1-9] have .* random_cells=10\."):
        candidates(tmp_path, f"run_dir={tmp_path}", "random_cells=10")
    assert built == ["0"]


@pytest.mark.parametrize("nodes", [1, 3])
def test_networks_are_counted_without_being_built(nodes: int) -> None:
    built = []

    def count(genotype: Genotype) -> int:
        built.append(genotype)
        network = FinalNetwork(genotype, channels=4, num_cells=5, auxiliary=False)
        return sum(parameter.numel() for parameter in network.parameters())

    space = SearchSpace(num_intermediate_nodes=nodes)
    genotypes = [random_genotype(space, seed) for seed in range(100, 106)]
    quick = quick_count(count, space)
    counted = [quick(genotype) for genotype in genotypes]
    assert len(built) <= 1 + 2 * 2 * 7  # kinds of cell, places and primitives
    assert counted == [count(genotype) for genotype in genotypes]
    assert len(set(counted)) > 3


def test_its_trainings_are_no_trainings_to_weights_and_biases(tmp_path: Path) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["experiment=select_digits", "logger=wandb", "run_dir=searches"]
        cfg = compose("config", [*overrides, f"output_dir={tmp_path}"], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        candidate = Candidate("0", published("darts_v1"), 1, tmp_path / "0")
        training = training_of(cfg, candidate)
    assert training.task == "train"
    assert training.logger.wandb.job_type == "select"
    assert cfg.logger.wandb.job_type == "select"  # its own, by its task


def test_of_trainings_side_by_side_the_last_one_tells_of_all(tmp_path: Path, capsys) -> None:
    """As of `-m only=0,1` with a launcher of parallel jobs."""
    for name in ("0", "1"):
        keep(tmp_path / name, "darts_v1", {"task": "search"})
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["experiment=select_digits", f"run_dir={tmp_path}", "only=1"]
        cfg = compose("config", overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]

    def train(training: DictConfig) -> float:
        for name in ("0", "1"):
            (tmp_path / "select" / name).mkdir(exist_ok=True)
            keep(tmp_path / "select" / name, "darts_v1", OmegaConf.to_container(cfg, resolve=True))
        return 0.5

    assert select(cfg, train) == 0.5
    assert "Not trained yet" not in capsys.readouterr().out
    assert (tmp_path / "select" / "genotype.yaml").exists()


# What is added to the command, and what the sentence says.
MISTAKES = {
    ("run_dir=nowhere",): "No genotype in nowhere: run_dir is the folder of a sweep of searches",
    (): "The command lacks run_dir=...",
    ("run_dir=searches", "only=7"): "Unknown candidate 7. Choices: 0, 1.",
    ("run_dir=searches", "data.train_fraction=1"): "leaves no training images to select by",
    ("run_dir=searches", "trainer.limit_val_batches=0"): "leaves no images to select by",
    ("run_dir=searches", "random_cells=-1"): "random_cells=-1 must be a whole number",
}


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES.items())
def test_a_mistake_ends_in_one_sentence(
    arguments: tuple[str, ...],
    sentence: str,
    searches: Path,
    command: Command,  # noqa: F811
) -> None:
    done = command("experiment=select_digits", "network.channels=4", *arguments)
    assert done.code == 1
    assert sentence in done.error.strip().splitlines()[-1]
    assert not (searches / "select").exists()
