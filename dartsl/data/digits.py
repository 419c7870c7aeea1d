"""Scikit-learn's handwritten digits: real images that come inside a dependency, no download."""

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from dartsl.data.image_data import ImageDataModule
from dartsl.data.images import TensorImages
from dartsl.data.split import stratified_halves


class Digits(ImageDataModule):
    """1,797 handwritten digits, 8×8 grey, 10 classes; a fixed stratified fifth is the test set.

    Args:
        crop_padding: 1 pixel of 8 by default.
        horizontal_flip: off by default: a mirrored digit is another sign.
        **options: of `ImageDataModule`.
    """

    def __init__(self, *, crop_padding: int = 1, horizontal_flip: bool = False, **options: Any):
        super().__init__(crop_padding=crop_padding, horizontal_flip=horizontal_flip, **options)

    def load(self) -> tuple[TensorImages, TensorImages]:
        """The training set (1,438 images) and the test set (359)."""
        digits = load_digits()
        # 17 grey levels, 0..16, spread over the range of a byte.
        images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))[:, None]
        everything = TensorImages(images, digits.target.astype(np.int64))
        # Not self.seed: the test set is the same in every run.
        train, test = stratified_halves(everything.labels, fraction=0.8, seed=0)
        return everything.subset(train), everything.subset(test)
