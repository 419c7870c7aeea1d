"""CIFAR-10 from its own archive, downloaded by torchvision."""

from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from dartsl.data.image_data import ImageDataModule
from dartsl.data.images import TensorImages
from dartsl.errors import UserError


class CIFAR10(ImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images, 32×32 RGB, 10 classes.

    Args:
        root: folder of the archive; it is downloaded (170 MB) where it is missing.
        split: "official" (default; the archive's own order is shuffled) or "stratified".
        **options: of `ImageDataModule`.

    Raises:
        UserError: in `prepare_data` and `setup`, where the archive can neither be found nor
            downloaded.
    """

    has_official_split = True

    def __init__(self, *, root: str = "data/cifar10", split: str = "official", **options: Any):
        super().__init__(split=split, **options)
        self.root = Path(root)

    def prepare_data(self) -> None:
        """Downloads the archive, once per machine."""
        self._dataset(train=True)

    def load(self) -> tuple[TensorImages, TensorImages]:
        """The training set and the test set."""
        return self._part(train=True), self._part(train=False)

    def _part(self, train: bool) -> TensorImages:
        dataset = self._dataset(train)
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
        return TensorImages(images, np.array(dataset.targets, dtype=np.int64))

    def _dataset(self, train: bool) -> torchvision.datasets.CIFAR10:
        # URLError is an OSError; torchvision reports a corrupt archive as a RuntimeError.
        try:
            return torchvision.datasets.CIFAR10(self.root, train=train, download=True)
        except (OSError, RuntimeError, HTTPException) as error:
            raise UserError(
                f"CIFAR-10 is not in {self.root} and could not be downloaded ({error}): put "
                f"{torchvision.datasets.CIFAR10.filename} from "
                f"{torchvision.datasets.CIFAR10.url} into {self.root} by hand, or use your own "
                "images with data=image_folder data.root=FOLDER."
            ) from error
