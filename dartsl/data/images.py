"""Labelled sets of uint8 images: in memory, or as files that are decoded when asked for.

Shapes: N images, C channels, H rows, W columns.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dartsl.errors import UserError

PIL_MODES = {1: "L", 3: "RGB"}
"""The number of channels of an image file -> how Pillow calls it."""

IMAGE_SUFFIXES = (
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Of the files that Pillow reads, those that hold a picture, and not documents, films or data."""

# What Pillow raises for a broken file, and one of another kind.
_BROKEN_FILE = (OSError, RuntimeError, SyntaxError, TypeError, ValueError)
# Where Pillow's mode of 32-bit integers, "I", is of 16 bits: all PPM files, PNG until Pillow 10.3.
_16_BITS_AS_32 = ("PNG", "PPM")
_BITS_PER_SAMPLE = 258  # the number of a TIFF's tag
_DECODING_THREADS = 8
_DECODING_PART = 256  # images that a thread takes at a time
_LARGE_FILE_BYTES = 16 * 1024


class ImageSet(Protocol):
    """Images and their classes.

    Attributes:
        labels: int64 [N].
        num_bytes: size of all images in memory; infinite where they have no common size.
    """

    @property
    def labels(self) -> np.ndarray: ...  # noqa: D102

    @property
    def num_bytes(self) -> float: ...  # noqa: D102

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...

    def stack(self) -> Tensor:
        """All images as one uint8 tensor [N, C, H, W]."""
        ...


@dataclass(frozen=True)
class TensorImages:
    """Images in memory: uint8 [N, C, H, W] with labels int64 [N].

    Raises:
        UserError: for images of another type or shape, and for other labels.
    """

    images: Tensor
    labels: np.ndarray

    def __post_init__(self) -> None:
        images, labels = self.images, np.asarray(self.labels)
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise UserError(
                f"Images in memory are uint8 [N, C, H, W], from 0 to 255, not {images.dtype} "
                f"{list(images.shape)}."
            )
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise UserError(
                f"The labels of {len(images)} images are as many whole numbers, not "
                f"{labels.dtype} {list(labels.shape)}."
            )
        object.__setattr__(self, "labels", labels.astype(np.int64, copy=False))

    @property
    def num_bytes(self) -> float:
        """Size of the tensor."""
        return self.images.nbytes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]

    def subset(self, indices: np.ndarray) -> "TensorImages":
        """The images at these indices, in this order."""
        return TensorImages(self.images[torch.from_numpy(indices)], self.labels[indices])

    def stack(self) -> Tensor:
        """The tensor itself."""
        return self.images


@dataclass(frozen=True)
class FileImages:
    """Image files, decoded one by one; getting one raises UserError if it cannot be read.

    Attributes:
        paths: of the files, [N].
        labels: int64 [N].
        channels: 1 (grey) or 3 (RGB); files of other kinds are converted.
        size: side in pixels to which each image is brought (shorter side, then centre crop);
            None keeps each image as large as it is.
    """

    paths: Sequence[Path]
    labels: np.ndarray
    channels: int
    size: int | None

    @property
    def num_bytes(self) -> float:
        """Size of all images once decoded."""
        return math.inf if self.size is None else len(self) * self.channels * self.size**2

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        return decode(self.paths[index], self.channels, self.size)

    def subset(self, indices: np.ndarray) -> "FileImages":
        """The files at these indices, in this order."""
        paths = [self.paths[index] for index in indices]
        return FileImages(paths, self.labels[indices], self.channels, self.size)

    def stack(self) -> Tensor:
        """All files decoded; needs a common size."""
        # Decoding a large file releases the interpreter's lock; with small ones threads only wait
        # for it (32×32 JPEGs, 2 cores: 0.11 ms each in one thread, 0.21 ms in several).
        first = self.paths[0]
        large = first.is_file() and first.stat().st_size > _LARGE_FILE_BYTES  # else `decode` says
        with ThreadPoolExecutor(_DECODING_THREADS if large else 1) as pool:
            parts = pool.map(self._decode_part, range(0, len(self), _DECODING_PART))
            return torch.cat(list(parts))

    def _decode_part(self, start: int) -> Tensor:
        stop = min(start + _DECODING_PART, len(self))
        return torch.stack([self[index] for index in range(start, stop)])


def decode(path: Path, channels: int, size: int | None) -> Tensor:
    """One image file as uint8 [C, H, W], upright, and on white where it is transparent.

    Args:
        path: of the file, in any format that Pillow reads.
        channels: 1 or 3.
        size: side of the result; None keeps the file's own size.

    Raises:
        UserError: for a file that is not an image or is cut short, and for pixels of 32 bits
            or with a sign.
    """
    if not path.is_file():  # opening a pipe would wait for ever
        raise UserError(f"Cannot read the image {path}: it is no file, or is gone; remove it.")
    try:
        with Image.open(path) as file:
            _turn_upright(file)
            image = _on_white(_of_8_bits(file, path))
            if image.mode == "LAB":  # of which Pillow makes no grey
                image = image.convert("RGB")
            image = image.convert(PIL_MODES[channels])
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UserError(
            f"The image {path} has more than {most:,} pixels, the most that are read: make it "
            "smaller."
        ) from error
    except _BROKEN_FILE as error:
        raise UserError(
            f"Cannot read the image {path} ({error}); repair or remove this file."
        ) from error
    if size is not None:
        image = _resize_centre_crop(image, size)
    pixels = torch.from_numpy(np.array(image))
    return (pixels[None] if channels == 1 else pixels.permute(2, 0, 1)).contiguous()


def _turn_upright(file: Image.Image) -> None:
    """Turns the image as its EXIF says: a camera that is held upright stores pictures lying."""
    file.load()
    with suppress(Exception):  # damaged EXIF, of which Pillow makes many kinds of errors
        ImageOps.exif_transpose(file, in_place=True)


def _of_8_bits(file: Image.Image, path: Path) -> Image.Image:
    """The image with at most 8 bits a channel; Pillow's `convert` would clip 16 bits at 255."""
    is_16_bits = file.mode.startswith("I;16") or file.format in _16_BITS_AS_32
    if file.mode == "F" or (file.mode == "I" and not is_16_bits):
        raise UserError(
            f"Cannot use the image {path}: its pixels are signed or of 32 bits, and nothing says "
            "which number is white; save it with 8 or 16 bits a channel."
        )
    if not file.mode.startswith("I"):
        return file
    (bits,) = getattr(file, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))  # of a TIFF perhaps 12
    return Image.fromarray((np.asarray(file) * (255 / (2**bits - 1))).round().astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    """The image with white behind it; `convert` would show what colour lies unseen, often black."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _resize_centre_crop(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(scale * side)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
