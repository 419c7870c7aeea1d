"""What every data module promises, on Digits; the CIFAR-10 archive; the shipped configs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from dartsl.data import CIFAR10, Digits, ImageDataModule, count_classes
from dartsl.data.images import TensorImages
from dartsl.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "data"
DIGITS: dict[str, Any] = {
    "num_classes": 10,
    "in_channels": 1,
    "image_size": 8,
    "mean": [0.30545918],
    "std": [0.37613163],
}
RGB: dict[str, Any] = {
    "num_classes": 10,
    "in_channels": 3,
    "image_size": 32,
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
}


def digits(**options: Any) -> Digits:
    data = Digits(**DIGITS | options)
    data.setup()
    return data


def labels(loader: Any) -> torch.Tensor:
    return torch.cat([y for _, y in loader])


def test_a_gpu_evaluates_more_at_once_from_its_memory() -> None:
    """And trains on batches as they were asked for; a source of files reads as many as these."""
    for limit, kept, at_once in ((2**31, "meta", 400), (2**31, "cpu", 100), (0, "meta", 100)):
        data = digits(batch_size=100, in_memory_limit=limit)
        strategy = SimpleNamespace(root_device=torch.device(kept))
        data.trainer = SimpleNamespace(
            strategy=strategy, global_rank=0, world_size=1, limit_train_batches=1.0
        )
        for loader in (data.val_dataloader(), data.test_dataloader()):
            assert loader.batch_size == at_once
        assert data.train_dataloader().weights.batch_size == 100


def test_search_trains_on_one_half_and_validates_on_the_other() -> None:
    data = digits()
    assert not set(data.train_indices) & set(data.val_indices)
    assert len(data.train_indices) + len(data.val_indices) == 1438
    batch = next(iter(data.train_dataloader()))
    assert {side: tuple(x.shape) for side, (x, _) in batch.items()} == {
        "train": (64, 1, 8, 8),
        "val": (64, 1, 8, 8),
    }
    assert batch["train"][0].dtype == torch.float32
    assert batch["train"][1].dtype == torch.int64
    assert len(labels(data.val_dataloader())) == len(data.val_indices)
    assert len(labels(data.test_dataloader())) == 359


def test_train_on_everything_validates_on_the_test_set() -> None:
    data = digits(task="train", train_fraction=1.0)
    assert len(labels(data.train_dataloader())) == 1438
    assert torch.equal(labels(data.val_dataloader()), labels(data.test_dataloader()))


def test_train_on_a_part_validates_on_the_rest_of_the_same_split() -> None:
    data = digits(task="train", train_fraction=0.5, seed=3)
    search = digits(task="search", train_fraction=0.5, seed=3)
    assert np.array_equal(data.train_indices, search.train_indices)
    assert len(labels(data.val_dataloader())) == len(data.val_indices)


def test_the_test_set_does_not_depend_on_the_seed_but_the_halves_do() -> None:
    first, second = digits(seed=0), digits(seed=1)
    assert torch.equal(labels(first.test_dataloader()), labels(second.test_dataloader()))
    assert not np.array_equal(first.train_indices, second.train_indices)


def test_digits_statistics_are_those_of_the_training_images() -> None:
    train, test = Digits(**DIGITS).load()
    pixels = train.images.double() / 255
    assert pixels.mean().item() == pytest.approx(DIGITS["mean"][0], abs=1e-6)
    assert pixels.std(correction=0).item() == pytest.approx(DIGITS["std"][0], abs=1e-6)
    assert np.bincount(test.labels).min() >= 34


def test_state_survives_a_new_object_at_any_step() -> None:
    data = digits()
    batches = iter(data.train_dataloader())
    for _ in range(3):
        next(batches)
    resumed = digits()
    resumed.load_state_dict(data.state_dict())
    assert resumed.state_dict() == {"step": 3}
    torch.testing.assert_close(next(iter(resumed.train_dataloader())), next(batches))


def test_setup_reads_the_images_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = digits()
    monkeypatch.setattr(data, "load", lambda: pytest.fail("read again"))
    data.setup("fit")
    data.setup("test")


def test_large_sets_go_through_workers_with_the_same_numbers() -> None:
    small, large = digits(cutout_length=2), digits(cutout_length=2, in_memory_limit=0)
    ours, theirs = iter(small.train_dataloader()), iter(large.train_dataloader())
    for _ in range(2):
        torch.testing.assert_close(next(ours), next(theirs), rtol=0, atol=0)


def test_imagenet_recipe_runs() -> None:
    data = digits(recipe="imagenet", image_size=14, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert batch["train"][0].shape == (4, 1, 14, 14)
    assert next(iter(data.val_dataloader()))[0].shape == (4, 1, 14, 14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "serach"}, "Unknown task 'serach'.*search"),
        ({"split": "random"}, "Unknown split"),
        ({"recipe": "autoaugment"}, "Unknown recipe"),
        ({"split": "official"}, "CIFAR-10"),
        ({"train_fraction": 1.0}, "train_fraction=1.0"),
        ({"task": "train", "train_fraction": 1.5}, "train_fraction=1.5"),
        ({"num_classes": 9}, "num_classes=9.*10 classes"),
        ({"image_size": 32}, "image_size"),
        ({"in_channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}, "in_channels"),
        ({"in_channels": 2}, "in_channels=2"),
        ({"mean": [0.5] * 3}, "mean"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_mistakes_end_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        digits(**options)
    assert "\n" not in str(caught.value)


def in_memory(labels: Any, n: int = 4, dtype: torch.dtype = torch.uint8) -> TensorImages:
    return TensorImages(torch.zeros(n, 1, 8, 8, dtype=dtype), labels)


@pytest.mark.parametrize("label", [-1, 2])
def test_a_test_set_of_unknown_labels_is_a_mistake(label: int) -> None:
    class Own(ImageDataModule):
        def load(self) -> tuple[TensorImages, TensorImages]:
            return in_memory(np.array([0, 1, 0, 1])), in_memory(np.array([0, 1, label, 1]))

    data = Own(**DIGITS | {"num_classes": 2})
    with pytest.raises(UserError, match=f"test set has the label {label}, .* are 0 to 1"):
        data.setup()


@pytest.mark.parametrize(
    ("labels", "dtype", "message"),
    [
        (np.arange(4), torch.float32, r"uint8 .*not torch\.float32"),
        (np.arange(5), torch.uint8, r"of 4 images .*not int64 \[5\]"),
        (np.arange(4.0), torch.uint8, r"whole numbers, not float64 \[4\]"),
    ],
)
def test_images_in_memory_are_bytes_with_a_whole_number_each(
    labels: np.ndarray, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        in_memory(labels, dtype=dtype)


def test_labels_of_any_whole_numbers_become_int64() -> None:
    found = in_memory(np.arange(4, dtype=np.int32)).labels
    assert found.dtype == np.int64
    assert found.tolist() == [0, 1, 2, 3]


# ---- CIFAR-10 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("corrupted"), TimeoutError()])
def test_failed_download_says_what_to_do(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fail)
    data = CIFAR10(root=str(tmp_path), **RGB)
    for step in (data.prepare_data, data.setup):
        with pytest.raises(UserError, match=r"by hand.*data=image_folder") as caught:
            step()
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_cifar10_official_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    def archive(root: Path, train: bool, download: bool) -> SimpleNamespace:
        rng = np.random.default_rng(train)
        n = 200 if train else 100
        pixels = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        return SimpleNamespace(data=pixels, targets=rng.permutation(np.arange(n) % 10).tolist())

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", archive)
    data = CIFAR10(**RGB)
    data.setup()
    assert data.train_indices.tolist() == list(range(100))
    assert data.val_indices.tolist() == list(range(100, 200))
    x, y = next(iter(data.test_dataloader()))
    reference = archive(Path(), train=False, download=True)
    assert y.tolist() == reference.targets[:64]
    pixels = torch.from_numpy(reference.data[:64]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(x, (pixels - 0.5) / 0.25)


# ---- configs ------------------------------------------------------------------------------------


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    for name in ("cat", "dog", "eel"):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (40, 36), (index, 0, 0)).save(folder / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_shipped_config_makes_its_data_module(name: str, image_root: Path) -> None:
    OmegaConf.register_new_resolver("count_classes", count_classes, replace=True)
    with initialize_config_dir(str(CONF.parent), version_base="1.3"):
        config = compose(overrides=[f"+data={name}", "+seed=7"])
    needs_root = OmegaConf.is_missing(config.data, "root")
    if needs_root:
        config.data.root = str(image_root)
    data = instantiate(config.data)
    assert data.seed == 7
    if needs_root:
        data.num_workers = 0
        data.setup()
        assert data.num_classes == 3
        x, _ = next(iter(data.train_dataloader()))["train"]
        assert x.shape[1:] == (3, config.data.image_size, config.data.image_size)


def test_loaders_without_setup_are_a_mistake() -> None:
    data = Digits(**DIGITS)
    for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader):
        with pytest.raises(UserError, match=r"call setup\(\) before"):
            loader()
