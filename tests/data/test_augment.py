"""The augmentations against torchvision, image by image, on the same drawn numbers."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as TV1
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as TV2

from dartsl.data.augment import CropFlip, Normalise, ResizeCentreCrop, ResizedCropJitter
from dartsl.data.randomness import generator

MEAN = (0.49139968, 0.48215827, 0.44653124)
STD = (0.24703233, 0.24348505, 0.26158768)


def images(batch: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    pixels = generator(0, "test images").integers(0, 256, (batch, channels, height, width))
    return torch.from_numpy(pixels.astype(np.uint8))


def literal(recipe: CropFlip, image: torch.Tensor, offsets: np.ndarray) -> torch.Tensor:
    """The official recipe for one image, with torchvision and the official Cutout."""
    top, left, flip, y, x = offsets.tolist()
    _, h, w = image.shape
    pil = TV1.to_pil_image(image)
    if recipe.crop_padding:
        pil = TV1.crop(TV1.pad(pil, recipe.crop_padding), top, left, h, w)
    if recipe.horizontal_flip and flip:
        pil = TV1.hflip(pil)
    result = TV1.normalize(TV1.to_tensor(pil), recipe.mean, recipe.std)
    if recipe.cutout_length:
        half = recipe.cutout_length // 2
        y1, y2 = np.clip([y - half, y + half], 0, h)
        x1, x2 = np.clip([x - half, x + half], 0, w)
        result[:, y1:y2, x1:x2] = 0
    return result


@pytest.mark.parametrize("size", [(32, 32), (12, 20)])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("cutout", [0, 7, 16])
def test_cifar_recipe_is_the_official_one(
    size: tuple[int, int], padding: int, flip: bool, cutout: int
) -> None:
    recipe = CropFlip(MEAN, STD, padding, flip, cutout)
    batch = images(32, *size)
    draws = recipe.draw(generator(3, "test"), 32)
    offsets = recipe.offsets(draws, *size)
    expected = torch.stack(
        [literal(recipe, image, row) for image, row in zip(batch, offsets, strict=True)]
    )
    result = recipe.apply(batch, draws)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def test_draws_reach_every_offset_evenly() -> None:
    recipe = CropFlip(MEAN, STD)
    offsets = recipe.offsets(recipe.draw(generator(0, "test"), 90_000), 32, 32)
    for column, choices in zip(offsets.T, (9, 9, 2, 32, 32), strict=True):
        counts = np.bincount(column, minlength=choices)
        assert len(counts) == choices
        expected = 90_000 / choices
        assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)


def test_apply_leaves_the_images_alone_and_takes_grey() -> None:
    batch = images(4, 8, 8, channels=1)
    before = batch.clone()
    recipe = CropFlip((0.5,), (0.5,), crop_padding=1, cutout_length=4)
    assert recipe.apply(batch, recipe.draw(generator(0, "test"), 4)).shape == (4, 1, 8, 8)
    Normalise((0.5,), (0.5,)).apply(batch, np.empty((4, 0)))
    assert torch.equal(batch, before)


def test_normalise_is_torchvisions() -> None:
    batch = images(4, 8, 8)
    expected = torch.stack(
        [TV1.normalize(TV1.to_tensor(TV1.to_pil_image(image)), MEAN, STD) for image in batch]
    )
    assert torch.equal(Normalise(MEAN, STD).apply(batch, np.empty((4, 0))), expected)


def test_jitter_of_nothing_is_torchvisions_resized_crop() -> None:
    recipe = ResizedCropJitter(MEAN, STD, size=24, jitter=0.0, hue=0.0)
    batch = images(6, 40, 50)
    draws = recipe.draw(generator(1, "test"), 6)
    draws[0, 22] = 0.1  # flipped
    result = recipe.apply(batch, draws)
    assert result.shape == (6, 3, 24, 24)
    for image, row, ours in zip(batch, draws, result, strict=True):
        box = recipe.crop_box(row[:22], 40, 50)
        expected = TV2.resized_crop(image, *box, [24, 24], antialias=True)
        if row[22] < 0.5:
            expected = TV2.horizontal_flip(expected)
        # Brightness by 1 and hue by 0 go through floats: at most a grey level or two off.
        expected = Normalise(MEAN, STD).apply(expected[None], np.empty((1, 0)))[0]
        assert (ours - expected).abs().max() < 2.5 / 255 / min(STD)


def test_crop_boxes_are_distributed_as_torchvisions() -> None:
    recipe = ResizedCropJitter(MEAN, STD)
    draws = generator(2, "test").random((3000, 22))
    ours = np.array([recipe.crop_box(row, 60, 80) for row in draws])
    torch.manual_seed(0)
    reference = RandomResizedCrop(224)
    image = torch.zeros(3, 60, 80)
    params = [reference.make_params([image]) for _ in range(3000)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in params])
    error = np.sqrt(ours.var(0) / 3000 + theirs.var(0) / 3000)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * error).all()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= [60, 80]).all()


def test_no_crop_that_fits_falls_back_to_the_centre() -> None:
    recipe = ResizedCropJitter(MEAN, STD)
    # The whole area of a very wide image never fits.
    assert recipe.crop_box(np.full(22, 0.999), 10, 100) == (0, 43, 10, 13)


def test_colour_jitter_changes_colours_by_its_own_row_only() -> None:
    recipe = ResizedCropJitter(MEAN, STD, size=16)
    batch = images(3, 20, 20)
    draws = recipe.draw(generator(0, "test"), 3)
    result = recipe.apply(batch, draws)
    for index in range(3):
        alone = recipe.apply(batch[index : index + 1], draws[index : index + 1])
        assert torch.equal(alone[0], result[index])
    plain = dataclasses.replace(recipe, jitter=0.0, hue=0.0).apply(batch, draws)
    assert not torch.allclose(plain, result)


def test_imagenet_evaluation_is_torchvisions() -> None:
    batch = images(2, 30, 44)
    ours = ResizeCentreCrop(MEAN, STD, size=14, resize=16).apply(batch, np.empty((2, 0)))
    resized = TV2.center_crop(TV2.resize(batch, [16], antialias=True), [14])
    assert torch.equal(ours, Normalise(MEAN, STD).apply(resized, np.empty((2, 0))))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cifar_recipe_is_the_same_on_a_gpu() -> None:
    recipe = CropFlip(MEAN, STD, cutout_length=16)
    batch = images(32, 32, 32)
    draws = recipe.draw(generator(3, "test"), 32)
    on_gpu = recipe.apply(batch.cuda(), draws)
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), recipe.apply(batch, draws))
