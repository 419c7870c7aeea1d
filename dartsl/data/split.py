"""The two halves of a training set: one for the weights, one for alpha."""

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
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise UserError(
                f"Class number {label} has only {len(members)} image, but each half of the "
                "training set needs one of every class: add images or remove the class."
            )
        members = generator(seed, "split", int(label)).permutation(members)
        # Rounding must not leave a half without the class.
        size = min(max(round(fraction * len(members)), 1), len(members) - 1)
        first.append(members[:size])
        second.append(members[size:])
    return np.sort(np.concatenate(first)), np.sort(np.concatenate(second))


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
