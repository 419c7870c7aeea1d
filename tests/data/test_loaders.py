"""Streams and loaders: what each batch is made of, and that it depends on the step alone."""

import collections
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from dartsl.data.augment import CropFlip, Normalise
from dartsl.data.images import TensorImages
from dartsl.data.loaders import (
    BatchLoader,
    DeviceSource,
    EndlessStream,
    EvaluationLoader,
    PairedLoader,
    PassStream,
    Source,
    WorkerSource,
    batch_sizes,
)

RECIPE = CropFlip((0.5,), (0.5,), crop_padding=1, cutout_length=2)


def numbered_images(n: int) -> TensorImages:
    """Images whose label is their index, so that batches tell which images they hold."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, 1, 4, 4), dtype=np.uint8)
    return TensorImages(torch.from_numpy(pixels), np.arange(n))


def device_source(n: int = 40) -> DeviceSource:
    return DeviceSource(numbered_images(n), torch.device("cpu"))


def weights(n: int = 23, batch_size: int = 4, seed: int = 0) -> PassStream:
    return PassStream("weights", np.arange(n), batch_size, RECIPE, seed)


def alpha(n: int = 10, batch_size: int = 4, seed: int = 0) -> EndlessStream:
    return EndlessStream("alpha", np.arange(30, 30 + n), batch_size, RECIPE, seed)


def paired(source: Source | None = None, seed: int = 0) -> PairedLoader:
    return PairedLoader(source or device_source(), weights(seed=seed), alpha(seed=seed))


def epochs(loader: Any, count: int) -> list[Any]:
    return [batch for _ in range(count) for batch in loader]


def assert_same(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("length", "batch_size", "sizes"),
    [
        (8, 4, [4, 4]),
        (10, 4, [4, 4, 2]),
        (9, 4, [4, 3, 2]),
        (5, 4, [3, 2]),
        (3, 4, [3]),
        (1, 4, [1]),
        (5, 2, [2, 2, 1]),
        (2, 1, [1, 1]),
    ],
)
def test_no_batch_of_one(length: int, batch_size: int, sizes: list[int]) -> None:
    assert batch_sizes(length, batch_size) == sizes


@pytest.mark.parametrize("n", [20, 21, 22, 23])
def test_every_image_once_an_epoch_in_a_new_order(n: int) -> None:
    loader = BatchLoader(device_source(), weights(n))
    orders = []
    for _ in range(3):
        labels = [y for _, y in loader]
        assert len(labels) == len(loader)
        assert min(len(y) for y in labels) > 1
        orders.append(torch.cat(labels).tolist())
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_alpha_runs_on_in_full_batches_across_epochs() -> None:
    loader = paired()
    batches = epochs(loader, 5)
    assert len(batches) == 5 * len(loader) == 30
    labels = [batch["val"][1] for batch in batches]
    assert {len(y) for y in labels} == {4}
    order = torch.cat(labels).tolist()
    passes = [order[start : start + 10] for start in range(0, 120, 10)]
    assert all(sorted(each) == list(range(30, 40)) for each in passes)
    assert len({tuple(each) for each in passes}) == len(passes)


def test_alpha_half_smaller_than_a_batch_comes_whole() -> None:
    stream = alpha(n=3, batch_size=8)
    for step in range(4):
        assert sorted(stream.plan(step).indices) == [30, 31, 32]


def test_halves_are_seen_by_their_own_side_only() -> None:
    seen: dict[str, set[int]] = collections.defaultdict(set)
    for batch in epochs(paired(), 3):
        for side, (_, y) in batch.items():
            seen[side].update(y.tolist())
    assert seen == {"train": set(range(23)), "val": set(range(30, 40))}


def test_same_seed_same_batches_and_another_seed_others() -> None:
    first = epochs(paired(), 2)
    assert_same(first, epochs(paired(), 2))
    other = epochs(paired(seed=1), 2)
    for side in ("train", "val"):
        assert not torch.equal(first[0][side][1], other[0][side][1])


def test_streams_and_epochs_have_their_own_augmentation() -> None:
    draws = [weights(20).plan(0, 0).draws, weights(20).plan(1, 0).draws, alpha().plan(0).draws]
    for one, another in itertools.combinations(draws, 2):
        assert not np.isin(one, another).any()


def test_global_randomness_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    source = WorkerSource(numbered_images(40))
    first = epochs(paired(source), 1)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    np_state = np.random.get_state()[1].copy()
    assert_same(first, epochs(paired(source), 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert np.array_equal(np_state, np.random.get_state()[1])


@pytest.mark.parametrize("step", range(14))
def test_a_fresh_loader_goes_on_from_any_step(step: int) -> None:
    expected = epochs(paired(), 4)
    loader = paired()
    loader.load_state_dict({"step": step})
    assert loader.state_dict() == {"step": step}
    rest = list(loader)
    assert len(rest) == 6 - step % 6
    assert_same(rest, expected[step : step + len(rest)])
    assert_same(list(loader), expected[step + len(rest) : step + len(rest) + 6])


def test_the_step_counts_batches_handed_out_not_prefetched() -> None:
    loader = paired(WorkerSource(numbered_images(40), num_workers=2))
    batches = iter(loader)
    assert loader.state_dict() == {"step": 0}
    next(batches)
    next(batches)
    assert loader.state_dict() == {"step": 2}


def test_workers_give_the_numbers_of_the_device() -> None:
    expected = epochs(paired(), 1)
    images = numbered_images(40)
    assert_same(epochs(paired(WorkerSource(images)), 1), expected)
    resumed = paired(WorkerSource(images, num_workers=2))
    resumed.load_state_dict({"step": 3})
    assert_same(list(resumed), expected[3:])


def test_short_epochs_begin_a_new_pass_each() -> None:
    loader = BatchLoader(device_source(), weights(), epoch_length=2)
    assert len(loader) == 6
    labels = [torch.cat([y for _, y in loader]).tolist() for _ in range(3)]
    assert [len(each) for each in labels] == [8, 8, 8]
    full = BatchLoader(device_source(), weights())
    assert labels == [torch.cat([y for _, y in full]).tolist()[:8] for _ in range(3)]


@pytest.mark.parametrize("workers", [None, 0])
def test_evaluation_is_in_order_and_repeats(workers: int | None) -> None:
    images = numbered_images(9)
    source = device_source(9) if workers is None else WorkerSource(images, workers)
    loader = EvaluationLoader(source, np.arange(9), 4, Normalise((0.5,), (0.5,)))
    for _ in range(2):
        batches = list(loader)
        assert [len(y) for _, y in batches] == [4, 4, 1]
        assert len(loader) == 3
        assert torch.cat([y for _, y in batches]).tolist() == list(range(9))
        expected = (images.images / 255 - 0.5) / 0.5
        torch.testing.assert_close(torch.cat([x for x, _ in batches]), expected)
