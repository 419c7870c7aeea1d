"""The data module that every image set shares: split, streams, loaders and checks."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule

from dartsl.data.augment import (
    Augmentation,
    CropFlip,
    Normalise,
    ResizeCentreCrop,
    ResizedCropJitter,
)
from dartsl.data.images import ImageSet, TensorImages
from dartsl.data.loaders import (
    ALONE,
    BatchLoader,
    DeviceSource,
    EndlessStream,
    EvaluationLoader,
    PairedLoader,
    PassStream,
    Shard,
    Source,
    WorkerSource,
    batch_sizes,
)
from dartsl.data.split import official_halves, stratified_halves, stratified_part
from dartsl.errors import UserError, unknown

TASKS = ("search", "train")
SPLITS = ("official", "stratified")
RECIPES = ("crop_flip", "imagenet")
# So many training batches are evaluated at once from a GPU's memory: few images leave it idle, and
# where nothing is kept for gradients there is room for more.
EVALUATED_AT_ONCE = 4


class ImageDataModule(LightningDataModule):
    """Images of one classification task, for a search or for the training of a found network.

    | task | training batches | validation | test |
    |---|---|---|---|
    | `search` | `{"train": weight half, "val": alpha half}` | the alpha half | the test set |
    | `train` | the first `train_fraction` | the rest, or the test set if none is left | the same |

    A subclass gives the images: it defines `load`.

    Args:
        num_classes: of the task; checked against the labels found.
        in_channels: 1 (grey) or 3 (RGB).
        image_size: side of the network's input, in pixels.
        mean, std: of the training images, per channel, in units of [0, 1].
        seed: decides the split, every order and every augmentation; nothing else does.
        batch_size: in each process; from a GPU's memory four times as many images are evaluated at
            once.
        task: "search" or "train".
        train_fraction: part of the training set whose gradients move the weights.
        split: "stratified" (seeded, the same fraction of every class) or "official" (the first
            images; CIFAR-10 only).
        recipe: "crop_flip" (CIFAR) or "imagenet" (random resized crop and colour jitter, from
            images of any size).
        crop_padding, horizontal_flip, cutout_length: of the recipe "crop_flip", see `CropFlip`.
        num_workers: processes for sets that are not held in memory.
        in_memory_limit: a set of at most this many bytes as uint8 is held on the training device
            and augmented there.
        max_images: at most this many images of either half are used, the same fraction of every
            class, but one of each at least; for trying things out.

    Raises:
        UserError: for arguments that do not fit each other (at once) or the images (in `setup`).

    Note:
        With `train_fraction=1.0` validation is the test set, as in the official code. It is then
        for looking at only: nothing may be selected by it.
    """

    has_official_split = False

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        batch_size: int = 64,
        task: str = "search",
        train_fraction: float = 0.5,
        split: str = "stratified",
        recipe: str = "crop_flip",
        crop_padding: int = 4,
        horizontal_flip: bool = True,
        cutout_length: int = 0,
        num_workers: int = 0,
        in_memory_limit: int = 2 * 1024**3,
        max_images: int | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.image_size = image_size
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self.seed = seed
        self.batch_size = batch_size
        self.task = task
        self.train_fraction = train_fraction
        self.split = split
        self.recipe = recipe
        self.crop_padding = crop_padding
        self.horizontal_flip = horizontal_flip
        self.cutout_length = cutout_length
        self.num_workers = num_workers
        self.in_memory_limit = in_memory_limit
        self.max_images = max_images
        self._check_arguments()

        self._images: dict[str, ImageSet] = {}
        self._sources: dict[str, Source] = {}
        self._train_loader: BatchLoader | PairedLoader | None = None
        self._step = 0
        self._epoch_length: int | None = None  # of the run that goes on

    @abstractmethod
    def load(self) -> tuple[ImageSet, ImageSet]:
        """The training set and the test set.

        Raises:
            UserError: where they cannot be had; says what to do.
        """

    def setup(self, stage: str | None = None) -> None:
        """Reads and checks the images (once), and rewinds the training batches before a fit.

        Lightning restores a checkpoint after this, so a fit without one starts at step 0.

        Raises:
            UserError: for images that do not fit the arguments.
        """
        if not self._images:
            train, test = self.load()
            self._check_images(train, test)
            self.train_indices, self.val_indices = (
                self._at_most(half, train.labels) for half in self._halves(train.labels)
            )
            self._check_halves(train.labels)
            self._images = {"train": train, "test": test}
        if stage in ("fit", None):
            self._train_loader = None
            self._step, self._epoch_length = 0, None

    # ---- loaders --------------------------------------------------------------------------------

    def train_dataloader(self) -> BatchLoader | PairedLoader:
        """Paired batches of both halves (search), or batches of the training part (train).

        The same loader for the whole of a fit, so that it goes on where it is.
        """
        self._check_is_set_up()
        if self._train_loader is None:
            self._train_loader = self._make_train_loader()
            self._go_on(self._train_loader)
        return self._train_loader

    def val_dataloader(self) -> EvaluationLoader:
        """What training does not move the weights by; see the table and the note of the class."""
        self._check_is_set_up()
        if len(self.val_indices) == 0:
            return self.test_dataloader()
        return self._evaluation_loader("train", self.val_indices)

    def test_dataloader(self) -> EvaluationLoader:
        """The test set."""
        self._check_is_set_up()
        return self._evaluation_loader("test", np.arange(len(self._images["test"])))

    def state_dict(self) -> dict[str, int]:
        """The number of training batches handed out; part of every Lightning checkpoint.

        With a trainer also their size, over all processes, and the batches of an epoch, as a step
        number means nothing without.
        """
        loader = self._train_loader
        state = {"step": self._step} if loader is None else loader.state_dict()
        if self.trainer is not None:
            state["batch_size"] = self._global_batch_size()
            if loader is not None:
                state["epoch_length"] = loader.epoch_length
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved step.

        Lightning restores a loader's own state only within an epoch; this one always.

        Raises:
            UserError: for a step of batches of another size, or of epochs of another length.
        """
        saved, size = state_dict.get("batch_size"), self._global_batch_size()
        if saved not in (None, size):
            raise UserError(
                f"The checkpoint is of a run with batches of {saved} images, these are of {size}: "
                f"data.batch_size times the number of processes ({self._shard().world_size}) must "
                "be what it was."
            )
        self._step = int(state_dict["step"])
        self._epoch_length = state_dict.get("epoch_length")
        if self._train_loader is not None:
            self._go_on(self._train_loader)

    def _check_is_set_up(self) -> None:
        if not self._images:
            raise UserError("The images have not been read yet: call setup() before the loaders.")

    def _go_on(self, loader: BatchLoader | PairedLoader) -> None:
        """Have a loader begin with the restored step."""
        if self._epoch_length not in (None, loader.epoch_length):
            raise UserError(
                f"The checkpoint is of a run with epochs of {self._epoch_length} batches, these "
                f"are of {loader.epoch_length}: the images, data.max_images and "
                "trainer.limit_train_batches must be what they were."
            )
        loader.load_state_dict({"step": self._step})

    def _make_train_loader(self) -> BatchLoader | PairedLoader:
        source = self._source("train")
        shard = self._shard()
        batch_size = self._global_batch_size()
        options = (batch_size, self._training_transform(), self.seed, shard)
        self._check_shares(batch_size, shard.world_size)
        weights = PassStream("weights", self.train_indices, *options)
        epoch_length = self._limit(len(weights))
        if self.task == "train":
            return BatchLoader(source, weights, epoch_length)
        alpha = EndlessStream("alpha", self.val_indices, *options)
        return PairedLoader(source, weights, alpha, epoch_length)

    def _limit(self, length: int) -> int:
        """Batches of an epoch under the trainer's `limit_train_batches`, by Lightning's rule."""
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        return min(limit, length) if isinstance(limit, int) else int(limit * length)

    def _evaluation_loader(self, part: str, indices: np.ndarray) -> EvaluationLoader:
        shard = self._shard()
        if len(indices) < shard.world_size:  # a process without any would skip what others do
            raise UserError(
                f"{len(indices)} images to validate or test on are too few for {shard.world_size} "
                "processes: use fewer (trainer.devices) or more images."
            )
        source, transform = self._source(part), self._evaluation_transform()
        in_its_memory = isinstance(source, DeviceSource) and source.images.device.type != "cpu"
        batch_size = self.batch_size * (EVALUATED_AT_ONCE if in_its_memory else 1)
        return EvaluationLoader(source, indices, batch_size, transform, shard)

    def _global_batch_size(self) -> int:
        return self.batch_size * self._shard().world_size

    def _shard(self) -> Shard:
        """Which of the trainer's processes this one is."""
        trainer = self.trainer
        return ALONE if trainer is None else Shard(trainer.global_rank, trainer.world_size)

    def _source(self, part: str) -> Source:
        """The source of "train" or "test": made once, on the device of the trainer attached."""
        if part not in self._sources:
            device = torch.device("cpu")
            if self.trainer is not None:
                device = self.trainer.strategy.root_device
            images = self._images[part]
            if images.num_bytes <= self.in_memory_limit:
                self._sources[part] = DeviceSource(images, device)
            else:
                pin_memory = device.type == "cuda"
                self._sources[part] = WorkerSource(images, self.num_workers, pin_memory)
        return self._sources[part]

    def _training_transform(self) -> Augmentation:
        if self.recipe == "imagenet":
            return ResizedCropJitter(self.mean, self.std, self.image_size)
        return CropFlip(
            self.mean, self.std, self.crop_padding, self.horizontal_flip, self.cutout_length
        )

    def _evaluation_transform(self) -> Augmentation:
        if self.recipe == "imagenet":
            # 256 for the 224 of the paper, and in the same proportion for other sizes.
            resize = round(self.image_size * 256 / 224)
            return ResizeCentreCrop(self.mean, self.std, self.image_size, resize)
        return Normalise(self.mean, self.std)

    # ---- split and checks -----------------------------------------------------------------------

    def _halves(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.train_fraction == 1 and self.task == "train":
            return np.arange(len(labels)), np.arange(0)
        if self.split == "official":
            return official_halves(len(labels), self.train_fraction)
        return stratified_halves(labels, self.train_fraction, self.seed)

    def _at_most(self, indices: np.ndarray, labels: np.ndarray) -> np.ndarray:
        if self.max_images is None or len(indices) <= self.max_images:
            return indices
        return indices[stratified_part(labels[indices], self.max_images, self.seed)]

    def _check_arguments(self) -> None:
        for kind, value, choices in (
            ("task", self.task, TASKS),
            ("split", self.split, SPLITS),
            ("recipe", self.recipe, RECIPES),
        ):
            if value not in choices:
                raise unknown(kind, value, choices)
        if self.split == "official" and not self.has_official_split:
            raise UserError(
                "split=official takes the first images of the training set, which is right for "
                "CIFAR-10's own shuffled archive only (elsewhere a half could lack whole classes); "
                "use split=stratified."
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        if self.task == "search" and not 0 < self.train_fraction < 1:
            raise UserError(
                f"train_fraction={self.train_fraction} leaves a search without one of its two "
                "halves; choose one between 0 and 1, e.g. 0.5."
            )
        if not 0 < self.train_fraction <= 1:
            raise UserError(f"train_fraction={self.train_fraction} must be above 0 and at most 1.")
        if self.in_channels not in (1, 3):
            raise UserError(f"in_channels={self.in_channels} must be 1 (grey) or 3 (RGB).")
        if not len(self.mean) == len(self.std) == self.in_channels:
            raise UserError(
                f"mean={list(self.mean)} and std={list(self.std)} must have one number for each of "
                f"the {self.in_channels} channels."
            )
        for mean, std in zip(self.mean, self.std, strict=True):
            if not (math.isfinite(mean) and 0 < std < math.inf):
                raise UserError(f"mean={mean} must be a number, and std={std} one above 0.")
        smallest = 2 if self.recipe == "imagenet" else 1  # torch fails to resize to 1
        for name, least, most in (
            ("seed", 0, 2**64 - 1), ("batch_size", 1, math.inf), ("num_workers", 0, math.inf),
            ("image_size", smallest, math.inf),
            ("crop_padding", 0, 1024), ("cutout_length", 0, 1024),
        ):  # fmt: skip
            value = getattr(self, name)
            if value < least:
                raise UserError(f"{name}={value} must be at least {least}.")
            if value > most:
                raise UserError(f"{name}={value} must be at most {most}.")
        if self.max_images is not None and self.max_images < 2:
            raise UserError(f"max_images={self.max_images} must be at least 2, or null for all.")

    def _check_images(self, train: ImageSet, test: ImageSet) -> None:
        if len(train) < 2 or len(test) == 0:
            raise UserError(
                f"Found {len(train)} training and {len(test)} test images, too few to train on; "
                "add images."
            )
        found = np.unique(train.labels)
        if self.num_classes < 2 or not np.array_equal(found, np.arange(self.num_classes)):
            raise UserError(
                f"num_classes={self.num_classes}, but the training set has {len(found)} classes, "
                f"labelled {found[0]} to {found[-1]}; set num_classes to the classes of the data, "
                "at least 2, which are labelled from 0 on."
            )
        strange = test.labels[(test.labels < 0) | (test.labels >= self.num_classes)]
        if len(strange):
            raise UserError(
                f"The test set has the label {strange[0]}, but the training set's are 0 to "
                f"{self.num_classes - 1}."
            )
        expected = (self.in_channels, self.image_size, self.image_size)
        for images in (train, test):
            if not isinstance(images, TensorImages) or self.recipe == "imagenet":
                continue  # files are brought to the size and channels asked for
            if tuple(images.images.shape[1:]) != expected:
                raise UserError(
                    f"The images are {tuple(images.images.shape[1:])} (channels, height, width), "
                    f"not {expected}; set in_channels and image_size to fit."
                )

    def _check_shares(self, batch_size: int, world_size: int) -> None:
        halves = [self.train_indices] + ([self.val_indices] if self.task == "search" else [])
        smallest = min(
            size for half in halves for size in batch_sizes(len(half), batch_size, world_size)
        )
        if smallest < world_size:
            raise UserError(
                f"A batch has only {smallest} images for {world_size} processes: use fewer "
                "(trainer.devices) or more images."
            )

    def _check_halves(self, labels: np.ndarray) -> None:
        for name, indices in (("weight", self.train_indices), ("validation", self.val_indices)):
            held = len(np.unique(labels[indices]))
            if len(indices) and held < self.num_classes:
                raise UserError(
                    f"The {name} half has {len(indices)} images of only {held} of the "
                    f"{self.num_classes} classes; change train_fraction={self.train_fraction} or "
                    "use split=stratified."
                )
