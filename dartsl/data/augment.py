"""Augmentation as two pure functions: draw random numbers, then apply them to images.

`draw` is the only part with randomness and runs on the CPU; `apply` is a function of images and
draws and runs on whichever device holds the images.

Shapes: B images, C channels, H rows, W columns, k uniform numbers in [0, 1) per image.
"""

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF


class Augmentation(Protocol):
    """From uint8 images to the network's float32 input."""

    def draw(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        """The random numbers of a batch: float64 [B, k], uniform in [0, 1)."""
        ...

    def apply(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """The augmented images: uint8 [B, C, H, W] and float64 [B, k] -> float32 [B, C, h, w]."""
        ...


@dataclass(frozen=True)
class Normalise:
    """The evaluation transform: to [0, 1], then (x - mean) / std per channel; no randomness.

    Attributes:
        mean, std: one number per channel, in units of [0, 1].
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def draw(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        """No numbers: [B, 0]."""
        return np.empty((batch, 0))

    def apply(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Normalised images of the same size."""
        return _normalise(images, self.mean, self.std)


@dataclass(frozen=True)
class CropFlip:
    """The CIFAR recipe: pad with black and crop at random, flip, normalise, then cutout.

    Attributes:
        mean, std: one number per channel, in units of [0, 1].
        crop_padding: pixels of black added on each side before the crop; 0 = no crop.
        horizontal_flip: whether half of the images are mirrored.
        cutout_length: side of the square that is erased; 0 = none.

    Note:
        As in the official code the square is [centre - length // 2, centre + length // 2), its
        centre is uniform over the pixels, and it is filled with 0 after normalisation, i.e. with
        the mean colour. The crop's padding is 0 before normalisation, i.e. black.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 4
    horizontal_flip: bool = True
    cutout_length: int = 0

    def draw(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        """Crop row and column, flip, cutout row and column: [B, 5], whatever is switched on."""
        return rng.random((batch, 5))

    def offsets(self, draws: np.ndarray, height: int, width: int) -> np.ndarray:
        """The draws as whole numbers, int64 [B, 5]: top, left, flip (0 or 1), centre y, centre x.

        Args:
            draws: float64 [B, 5].
            height: of the images, in pixels.
            width: of the images, in pixels.
        """
        shifts = 2 * self.crop_padding + 1
        return (draws * [shifts, shifts, 2, height, width]).astype(np.int64)

    def apply(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Augmented images of the same size."""
        height, width = images.shape[-2:]
        # Floats become integers on the CPU: MPS has no float64.
        offsets = torch.from_numpy(self.offsets(draws, height, width))
        offsets = offsets.to(images.device, non_blocking=images.is_cuda)
        top, left, flip, centre_y, centre_x = offsets.unbind(1)
        if self.crop_padding or self.horizontal_flip:
            flip = flip if self.horizontal_flip else torch.zeros_like(flip)
            images = _crop_flip(images, top, left, flip, self.crop_padding)
        result = _normalise(images, self.mean, self.std)
        if self.cutout_length:
            hole = _square(centre_y, centre_x, height, width, self.cutout_length)
            result = result.masked_fill(hole, 0.0)
        return result


@dataclass(frozen=True)
class ResizeCentreCrop:
    """The ImageNet evaluation transform: shorter side to `resize`, centre crop, normalise.

    Attributes:
        mean, std: one number per channel, in units of [0, 1].
        size: side of the result, in pixels.
        resize: length of the shorter side before the crop, in pixels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int = 224
    resize: int = 256

    def draw(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        """No numbers: [B, 0]."""
        return np.empty((batch, 0))

    def apply(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Normalised images [B, C, size, size]."""
        images = TF.center_crop(TF.resize(images, [self.resize], antialias=True), [self.size])
        return _normalise(images, self.mean, self.std)


@dataclass(frozen=True)
class ResizedCropJitter:
    """The ImageNet recipe: random resized crop, flip, colour jitter, normalise.

    Attributes:
        mean, std: one number per channel, in units of [0, 1].
        size: side of the result, in pixels.
        scale: range of the crop's area, as a part of the image's.
        ratio: range of the crop's width / height; uniform in its logarithm.
        jitter: brightness, contrast and saturation factors are uniform in [1 - jitter, 1 + jitter].
        hue: the shift of hue is uniform in [-hue, hue], in turns.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: float = 0.4
    hue: float = 0.2

    # torchvision tries ten crops before it falls back to the centre.
    attempts = 10

    def draw(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        """Area and ratio of ten attempts, place, flip, four factors, their order: [B, 31]."""
        return rng.random((batch, 2 * self.attempts + 11))

    def apply(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Augmented images [B, C, size, size]; each image by its own row of draws."""
        results = [self._one(image, row) for image, row in zip(images, draws, strict=True)]
        return _normalise(torch.stack(results), self.mean, self.std)

    def _one(self, image: Tensor, row: np.ndarray) -> Tensor:
        crop, (flip, *rest) = row[: 2 * self.attempts + 2], row[2 * self.attempts + 2 :]
        top, left, height, width = self.crop_box(crop, *image.shape[-2:])
        side = [self.size, self.size]
        image = TF.resized_crop(image, top, left, height, width, side, antialias=True)
        if flip < 0.5:
            image = TF.horizontal_flip(image)
        return self._jitter(image, factors=np.array(rest[:4]), order=np.argsort(rest[4:]))

    def crop_box(self, draws: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
        """The crop of one image as (top, left, height, width), by torchvision's rule.

        Args:
            draws: [2 * attempts + 2]: (area, ratio) of each attempt, then the place (y, x).
            height: of the image, in pixels.
            width: of the image, in pixels.
        """
        place_y, place_x = draws[-2:]
        low, high = (math.log(bound) for bound in self.ratio)
        for area_draw, ratio_draw in draws[:-2].reshape(-1, 2):
            area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * area_draw)
            ratio = math.exp(low + (high - low) * ratio_draw)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(place_y * (height - h + 1)), int(place_x * (width - w + 1)), h, w
        # No attempt fitted: the largest centre crop whose ratio is within the range.
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        return (height - h) // 2, (width - w) // 2, h, w

    def _jitter(self, image: Tensor, factors: np.ndarray, order: np.ndarray) -> Tensor:
        brightness, contrast, saturation = 1 + self.jitter * (2 * factors[:3] - 1)
        hue = self.hue * (2 * factors[3] - 1)
        steps = (
            functools.partial(TF.adjust_brightness, brightness_factor=float(brightness)),
            functools.partial(TF.adjust_contrast, contrast_factor=float(contrast)),
            functools.partial(TF.adjust_saturation, saturation_factor=float(saturation)),
            functools.partial(TF.adjust_hue, hue_factor=float(hue)),
        )
        for index in order:
            image = steps[index](image)
        return image


def _normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """To [0, 1], then (x - mean) / std: torchvision's ToTensor and Normalize, bit for bit."""
    # Not by a number, whose inverse a GPU would multiply by.
    scaled = images.to(torch.float32).div_(torch.full((), 255.0, device=images.device))
    return scaled.sub_(_per_channel(mean, images.device)).div_(_per_channel(std, images.device))


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Constants as [C, 1, 1] on a device; kept, since each copy to a GPU would be a stall."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def _crop_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Crops of the zero-padded images, mirrored where flip is 1; top, left, flip: int64 [B]."""
    batch, channels, height, width = images.shape
    row = torch.arange(height, device=images.device)
    column = torch.arange(width, device=images.device)
    rows = top[:, None] + row
    columns = left[:, None] + torch.where(flip[:, None] == 1, width - 1 - column, column)
    padded = F.pad(images, (padding,) * 4)
    sample = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _square(y: Tensor, x: Tensor, height: int, width: int, length: int) -> Tensor:
    """The mask [B, 1, H, W] of a square about (y, x), clipped at the border; y, x: int64 [B]."""
    half = length // 2
    row = torch.arange(height, device=y.device)
    column = torch.arange(width, device=x.device)
    in_rows = (row >= y[:, None] - half) & (row < y[:, None] + half)
    in_columns = (column >= x[:, None] - half) & (column < x[:, None] + half)
    return in_rows[:, None, :, None] & in_columns[:, None, None, :]
