"""A folder of images, one subfolder per class: any image set of one's own."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dartsl.data.image_data import ImageDataModule
from dartsl.data.images import IMAGE_SUFFIXES, FileImages
from dartsl.data.split import stratified_halves
from dartsl.errors import UserError

log = logging.getLogger(__name__)

_TEST_FOLDERS = ("test", "val")
_SUFFIXES_NAMED = 5


class ImageFolder(ImageDataModule):
    """Images laid out as `root/train/<class>/<image>`, and `root/test/<class>/<image>` if any.

    `root/val` is taken where there is no `root/test`; without either, a fixed stratified fifth of
    the training images is held out as the test set. Files whose suffix is of no image are passed
    over with a warning, hidden ones without. Images are converted to `in_channels`, and (but for
    the recipe "imagenet") brought to `image_size`: shorter side first, then a centre crop.

    Args:
        root: the folder above `train`.
        **options: of `ImageDataModule`.

    Raises:
        UserError: in `setup`, for a folder of another layout and for an image that cannot be read.
    """

    def __init__(self, *, root: str, **options: Any):
        super().__init__(**options)
        self.root = Path(root)

    def load(self) -> tuple[FileImages, FileImages]:
        """The training set and the test set."""
        classes = find_classes(self.root)
        train = self._part(self.root / "train", classes)
        test_folders = [self.root / name for name in _TEST_FOLDERS if (self.root / name).is_dir()]
        self._check_counts(train.labels, classes, bool(test_folders))
        if test_folders:
            return train, self._part(test_folders[0], classes)
        # Not self.seed: the test set is the same in every run.
        train_indices, test_indices = stratified_halves(train.labels, fraction=0.8, seed=0)
        return train.subset(train_indices), train.subset(test_indices)

    def _check_counts(self, labels: np.ndarray, classes: list[str], has_test: bool) -> None:
        """Every class must have an image for each part that the training set is split into."""
        parts = ["training"]
        if self.train_fraction < 1:
            parts.append("validation")
        if not has_test:
            parts.append("the test set")
        for name, count in zip(classes, np.bincount(labels), strict=True):
            if count < len(parts):
                raise UserError(
                    f"The class folder {self.root / 'train' / name} has only {count} of the "
                    f"{len(parts)} images that it needs, one each for {', '.join(parts)}; add "
                    "some or remove the folder."
                )

    def _part(self, folder: Path, classes: list[str]) -> FileImages:
        """The images of `train` or `test`; a class is numbered by its place among `classes`."""
        strangers = sorted(set(_class_folders(folder)) - set(classes))
        if strangers:
            raise UserError(
                f"{folder} has the class {strangers[0]!r}, which {self.root / 'train'} has not; "
                "rename or remove it."
            )
        files = [sorted(_files(folder / name)) for name in classes]
        images = [[path for path in paths if _is_image(path)] for paths in files]
        others = [path for paths in files for path in paths if not _is_image(path)]
        if others and self._shard().rank == 0:
            log.warning(
                "Passed over in %s, as such files are not read: %s.", folder, _suffixes(others)
            )
        labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in images])
        size = None if self.recipe == "imagenet" else self.image_size
        return FileImages(
            [path for paths in images for path in paths], labels, self.in_channels, size
        )


def find_classes(root: str | Path) -> list[str]:
    """The names of the classes: the subfolders of `root/train`, sorted.

    Raises:
        UserError: where there is no `root/train`, no class in it, or no image in a class.
    """
    folder = Path(root) / "train"
    classes = _class_folders(folder) if folder.is_dir() else []
    if not classes:
        raise UserError(
            f"No class folders in {folder} (looked for from {Path.cwd()}); data.root must be a "
            "folder with images laid out as train/<class>/<image>."
        )
    for name in classes:
        if not any(map(_is_image, _files(folder / name))):
            raise UserError(
                f"The class folder {folder / name} has no images ({', '.join(IMAGE_SUFFIXES)}); "
                "add some or remove the folder."
            )
    return classes


def count_classes(root: str | Path) -> int:
    """The number of classes of an image folder, for `num_classes` in a config.

    Raises:
        UserError: as `find_classes`.
    """
    return len(find_classes(root))


def _class_folders(folder: Path) -> list[str]:
    try:
        paths = list(folder.iterdir())
    except OSError as error:
        raise UserError(f"Cannot read the folder {folder}: {error.strerror}.") from error
    return sorted(path.name for path in paths if path.is_dir() and not path.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _suffixes(paths: Iterable[Path]) -> str:
    """How many files there are of which suffix, the most frequent ones by name."""
    counts = Counter(path.suffix.lower() or "without suffix" for path in paths)
    named = counts.most_common(_SUFFIXES_NAMED)
    others = counts.total() - sum(count for _, count in named)
    if others:
        named.append(("others", others))
    return ", ".join(f"{count} {suffix}" for suffix, count in named)


def _files(folder: Path) -> Iterator[Path]:
    """The files in a folder and below it, through links too; what is hidden is passed over.

    Links may run in circles: no folder is entered twice, and none that holds this one.
    """
    entered = {folder.resolve(), *folder.resolve().parents}
    for place, folders, names in os.walk(folder, followlinks=True):
        yield from (Path(place, name) for name in names if not name.startswith("."))
        below, folders[:] = sorted(folders), []
        for name in below:
            target = Path(place, name).resolve()
            if not name.startswith(".") and target not in entered:
                entered.add(target)
                folders.append(name)
