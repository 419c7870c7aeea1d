"""The two halves of a training set, one for the weights, one for alpha, and parts of them."""

from collections.abc import Iterator

import numpy as np

from dartsl.data.randomness import generator
from dartsl.errors import UserError


def stratified_halves(
    labels: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """A seeded random split of every class by the same fraction.

    Args:
        labels: the class of each image, int [N].
        fraction: of each class that goes to the first half, 0 < fraction < 1.
        seed: which permutation of each class.

    Returns:
        Sorted indices of the two halves; disjoint, together everything, each with every class.

    Raises:
        UserError: for a fraction outside (0, 1) and for a class of a single image.
    """
    _check_fraction(fraction)
    first, second = [], []
    for label, members in _shuffled_classes(labels, seed):
        if len(members) < 2:
            raise UserError(
                f"Class number {label} has only {len(members)} image, but each half of the "
                "training set needs one of every class: add images or remove the class."
            )
        # Rounding must not leave a half without the class.
        size = min(max(round(fraction * len(members)), 1), len(members) - 1)
        first.append(members[:size])
        second.append(members[size:])
    return np.sort(np.concatenate(first)), np.sort(np.concatenate(second))


def stratified_part(labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """A seeded random part with the same fraction of every class, but one image of each at least.

    Args:
        labels: the class of each image, int [N].
        most: images of the part, where there are not more classes.
        seed: which permutation of each class.

    Returns:
        Sorted indices.
    """
    classes = [members for _, members in _shuffled_classes(labels, seed)]
    fraction = most / len(labels)
    sizes = np.array([max(round(fraction * len(members)), 1) for members in classes])
    while sizes.sum() > most and sizes.max() > 1:  # by rounding, and by the ones of small classes
        sizes[sizes.argmax()] -= 1
    parts = [members[:size] for members, size in zip(classes, sizes, strict=True)]
    return np.sort(np.concatenate(parts))


def _shuffled_classes(labels: np.ndarray, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each class and the indices of its images, in the order in which a part takes them."""
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        yield label, generator(seed, "split", label).permutation(members)


def official_halves(n: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The official split: the first floor(fraction * n) images and the rest.

    Only right where the images are stored in a random order, as in CIFAR-10's own archive: of a
    set that is sorted by class it would give each half other classes.

    Raises:
        UserError: for a fraction outside (0, 1).
    """
    _check_fraction(fraction)
    size = int(np.floor(fraction * n))
    return np.arange(size), np.arange(size, n)


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(
            f"train_fraction={fraction} leaves one half empty; choose one between 0 and 1, "
            "e.g. 0.5."
        )
