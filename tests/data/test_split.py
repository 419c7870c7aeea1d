"""Two disjoint halves, each with every class."""

import numpy as np
import pytest

from dartsl.data.split import official_halves, stratified_halves, stratified_part
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


@pytest.mark.parametrize("most", [2, 5, 6, 7, 20, 41, 75])
def test_a_part_is_no_larger_than_asked_for_and_holds_every_class(most: int) -> None:
    labels = np.append(SORTED, 5)  # a class of one image
    part = stratified_part(labels, most, seed=0)
    assert len(np.unique(part)) == len(part) <= max(most, 6)
    assert np.array_equal(np.unique(labels[part]), np.arange(6))


def test_a_part_is_the_first_half_of_the_same_fraction() -> None:
    labels = np.repeat(np.arange(4), 50)
    half, _ = stratified_halves(labels, 0.3, seed=7)
    assert np.array_equal(stratified_part(labels, 60, seed=7), half)
    # Where rounding takes too many, the largest class gives way.
    assert np.bincount(labels[stratified_part(labels, 63, seed=7)]).tolist() == [15, 16, 16, 16]
    assert np.bincount(SORTED[stratified_part(SORTED, 9, seed=0)]).tolist() == [1, 1, 1, 1, 5]


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
