"""Two disjoint halves, each with every class."""

import numpy as np
import pytest

from dartsl.data.split import official_halves, stratified_halves
from dartsl.errors import UserError

SORTED = np.repeat(np.arange(5), [2, 3, 10, 11, 50])  # as an image folder lists them


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.8, 0.99])
def test_halves_are_disjoint_and_hold_every_class(fraction: float) -> None:
    first, second = stratified_halves(SORTED, fraction, seed=0)
    assert np.array_equal(np.sort(np.concatenate([first, second])), np.arange(len(SORTED)))
    for half in (first, second):
        assert np.array_equal(np.unique(SORTED[half]), np.arange(5))


def test_every_class_is_split_by_the_fraction() -> None:
    first, _ = stratified_halves(SORTED, 0.8, seed=0)
    assert np.bincount(SORTED[first]).tolist() == [1, 2, 8, 9, 40]


def test_split_is_a_function_of_the_seed() -> None:
    first, _ = stratified_halves(SORTED, 0.5, seed=0)
    assert np.array_equal(first, stratified_halves(SORTED, 0.5, seed=0)[0])
    assert not np.array_equal(first, stratified_halves(SORTED, 0.5, seed=1)[0])


def test_class_of_one_image_is_an_error() -> None:
    with pytest.raises(UserError, match="Class number 1 has only 1 image"):
        stratified_halves(np.array([0, 0, 1]), 0.5, seed=0)


@pytest.mark.parametrize("fraction", [-0.5, 0.0, 1.0, 1.5])
def test_empty_half_is_an_error(fraction: float) -> None:
    with pytest.raises(UserError, match="train_fraction"):
        stratified_halves(SORTED, fraction, seed=0)
    with pytest.raises(UserError, match="train_fraction"):
        official_halves(10, fraction)


def test_official_split_is_the_first_images() -> None:
    first, second = official_halves(7, 0.5)
    assert first.tolist() == [0, 1, 2]
    assert second.tolist() == [3, 4, 5, 6]
