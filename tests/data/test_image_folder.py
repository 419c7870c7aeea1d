"""Folders of images as people have them."""

import logging
import multiprocessing
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from dartsl.data import ImageFolder, count_classes
from dartsl.data.images import decode
from dartsl.errors import UserError
from tests.fuzz import bomb

CIFAR10_JPEG = Path(__file__).parents[3] / "shared" / "data" / "cifar10_jpeg.tar.xz"


def write(path: Path, mode: str = "RGB", size: tuple[int, int] = (8, 8), colour: Any = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def fill(root: Path, classes: tuple[str, ...] = ("cat", "dog"), n: int = 5) -> Path:
    for number, name in enumerate(classes):
        for index in range(n):
            write(root / "train" / name / f"{index}.png", colour=(number, index, 0))
    return root


def folder(root: Path, **options: Any) -> ImageFolder:
    defaults = {"image_size": 8, "in_channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    return ImageFolder(
        **{"root": str(root), "num_classes": 2, "batch_size": 4} | defaults | options
    )


def ready(root: Path, **options: Any) -> ImageFolder:
    data = folder(root, **options)
    data.setup()
    return data


def test_classes_are_sorted_and_test_has_the_same_numbers(tmp_path: Path) -> None:
    fill(tmp_path, ("dog", "cat"))
    write(tmp_path / "test" / "dog" / "a.png")
    train, test = folder(tmp_path).load()
    assert train.labels.tolist() == [0] * 5 + [1] * 5
    assert train.paths[0].parent.name == "cat"
    assert test.labels.tolist() == [1]
    assert count_classes(tmp_path) == 2


def test_val_folder_serves_as_test_set(tmp_path: Path) -> None:
    fill(tmp_path)
    write(tmp_path / "val" / "cat" / "a.png")
    assert [path.parents[1].name for path in folder(tmp_path).load()[1].paths] == ["val"]


def test_without_a_test_folder_a_fixed_fifth_is_held_out(tmp_path: Path) -> None:
    fill(tmp_path, n=10)
    train, test = folder(tmp_path, seed=0).load()
    assert np.bincount(train.labels).tolist() == [8, 8]
    assert np.bincount(test.labels).tolist() == [2, 2]
    assert not set(train.paths) & set(test.paths)
    assert folder(tmp_path, seed=1).load()[1].paths == test.paths


@pytest.mark.parametrize("channels", [1, 3])
def test_all_kinds_of_images_become_the_channels_asked_for(tmp_path: Path, channels: int) -> None:
    for mode, colour in (
        ("L", 9),
        ("RGB", (9, 9, 9)),
        ("RGBA", (9, 9, 9, 255)),
        ("P", 0),
        ("1", 0),
    ):
        for name in ("katze", "größe 大 = x"):
            write(tmp_path / "train" / name / f"bild {mode} ü.png", mode, (12, 9), colour)
    statistics = {"mean": [0.5] * channels, "std": [0.5] * channels}
    data = ready(tmp_path, in_channels=channels, **statistics)
    x, _ = next(iter(data.train_dataloader()))["train"]
    assert x.shape[1:] == (channels, 8, 8)
    images, _ = data.load()
    greys = {
        int(image.max())
        for image, path in zip(images.stack(), images.paths, strict=True)
        if "RGB" in path.name
    }
    assert greys == {9}


@pytest.mark.parametrize("channels", [1, 3])
def test_lab_becomes_the_channels_asked_for(tmp_path: Path, channels: int) -> None:
    write(tmp_path / "a.tif", "LAB", (1, 1), (255, 128, 128))
    assert (decode(tmp_path / "a.tif", channels, None) > 250).all()  # white


def transparent(kind: str) -> tuple[Image.Image, dict[str, Any]]:
    """Four black pixels, the first of them opaque, and what Pillow needs to save them so."""
    alpha = Image.frombytes("L", (4, 1), bytes([255, 0, 0, 0]))
    if kind in ("LA", "RGBA"):
        image = Image.new(kind, (4, 1), 0)
        image.putalpha(alpha)
        return image, {}
    if kind == "P":  # palette: opaque black, unseen black
        image = Image.frombytes("P", (4, 1), bytes([0, 1, 1, 1]))
        image.putpalette([0] * 6)
        return image, {"transparency": bytes([255, 0])}
    shades = Image.frombytes("L", (4, 1), bytes([0, 9, 9, 9])).convert(kind)
    return shades, {"transparency": 9 if kind == "L" else (9, 9, 9)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["LA", "RGBA", "P", "L", "RGB"])
def test_transparent_is_white(tmp_path: Path, kind: str, channels: int) -> None:
    image, options = transparent(kind)
    image.save(tmp_path / "a.png", **options)
    assert (
        decode(tmp_path / "a.png", channels, None)[:, 0].tolist() == [[0, 255, 255, 255]] * channels
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_opaque_alpha_changes_nothing(tmp_path: Path, mode: str, channels: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    image.save(tmp_path / "alpha.png")
    image.convert(mode[:-1]).save(tmp_path / "plain.png")
    with_alpha, plain = (decode(tmp_path / f"{n}.png", channels, 8) for n in ("alpha", "plain"))
    assert with_alpha.equal(plain)


QUARTER_TURNS = {1: 0, 3: 2, 6: 1, 8: -1}
"""EXIF's orientation -> how a camera with it has turned what is upright."""


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("jpg", np.uint8), ("png", np.uint8), ("png", np.uint16), ("tif", np.uint16)],
)
@pytest.mark.parametrize("orientation", QUARTER_TURNS)
def test_photographs_are_upright(tmp_path: Path, orientation: int, kind: str, dtype: Any) -> None:
    upright = np.repeat(np.repeat(np.array([[0, 100, 255], [255, 0, 0]], np.uint8), 16, 0), 16, 1)
    stored = np.rot90(upright, QUARTER_TURNS[orientation]).astype(dtype)
    stored = stored * 257 if dtype == np.uint16 else stored
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    # Pillow 13 itself scrambles grey TIFFs that are turned and not compressed.
    options = {"exif": exif} | ({"compression": "tiff_lzw"} if kind == "tif" else {})
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a.{kind}", **options)
    read = decode(tmp_path / f"a.{kind}", 1, None)[0].numpy()
    assert read.shape == upright.shape
    assert np.abs(read.astype(int) - upright).mean() < 6  # JPEG is lossy


def test_an_image_with_damaged_exif_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 4), "white").save(path, exif=b"Exif\0\0neither II nor MM")
    assert decode(path, 3, None).shape == (3, 4, 8)


HELD, READ_BY_WORKERS, READ = (2**31, 0), (0, 2), (0, 0)  # in_memory_limit, num_workers


@pytest.mark.parametrize(("limit", "workers"), [HELD, READ_BY_WORKERS])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_become_8(tmp_path: Path, channels: int, limit: int, workers: int) -> None:
    """As Pillow opens them: modes I;16, I;16B and, of a PGM, I."""
    grey = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    big_endian = grey.astype(">u2").tobytes()
    for name, kind in (("cat", "png"), ("cat", "tif"), ("dog", "tiff"), ("dog", "pgm")):
        path = tmp_path / "train" / name / f"grey.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "pgm":
            path.write_bytes(b"P5 8 8 65535\n" + big_endian)
        elif kind == "tiff":
            Image.frombytes("I;16B", (8, 8), big_endian).save(path)
        else:
            Image.fromarray(grey).save(path)
    write(tmp_path / "test" / "cat" / "a.png")
    options = {"mean": [0.0] * channels, "std": [1.0] * channels, "in_channels": channels}
    where = {"in_memory_limit": limit, "num_workers": workers, "crop_padding": 0}
    alike = {"horizontal_flip": False, "task": "train", "train_fraction": 1.0}
    (x, _), *_ = ready(tmp_path, **options, **where, **alike).train_dataloader()
    expected = np.floor(grey / 65535 * 255 + 0.5) / 255
    np.testing.assert_allclose(x, np.broadcast_to(expected, (4, channels, 8, 8)), atol=1e-6)


def tiff_of_12_bits(grey: np.ndarray) -> bytes:
    """Two pixels in three bytes, as Pillow reads but does not write them."""
    height, width = grey.shape
    pairs = grey.reshape(-1, 2).astype(np.uint32) @ np.array([1 << 12, 1], np.uint32)
    pixels = b"".join(int(pair).to_bytes(3, "big") for pair in pairs)
    size_in_header = 8 + 2 + 8 * 12 + 4
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: size_in_header, 278: height,
            279: len(pixels)}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels


def test_12_bits_become_8(tmp_path: Path) -> None:
    grey = np.arange(0, 4096, 64).reshape(8, 8)
    path = tmp_path / "grey.tif"
    path.write_bytes(tiff_of_12_bits(grey))
    with Image.open(path) as image:
        assert image.mode == "I;16"  # and nothing else says that white is 4095
    assert np.array_equal(decode(path, 1, None)[0], np.floor(grey / 4095 * 255 + 0.5))


@pytest.mark.parametrize("error", [TypeError, RuntimeError])
def test_whatever_pillow_makes_of_a_broken_file(tmp_path: Path, monkeypatch, error: Any) -> None:
    """TypeError of some damaged TIFFs of 16 bits, RuntimeError of damaged AVIFs."""
    write(tmp_path / "a.png")

    def fail(*_: Any, **__: Any) -> None:
        raise error("'NoneType' object is not subscriptable")

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(UserError, match="repair or remove this file"):
        decode(tmp_path / "a.png", 3, None)


def test_a_texture_of_an_unknown_kind(tmp_path: Path) -> None:
    """A DDS file under another suffix: Pillow says that this is not implemented."""
    write(tmp_path / "a.dds", "RGBA")
    texture = bytearray((tmp_path / "a.dds").read_bytes())
    texture[80:88] = struct.pack("<I4s", 4, b"ABCD")  # the pixels' format is one of four letters
    (tmp_path / "a.png").write_bytes(texture)
    with pytest.raises(UserError, match="repair or remove this file"):
        decode(tmp_path / "a.png", 3, None)


@pytest.mark.parametrize(("limit", "workers"), [HELD, READ_BY_WORKERS])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_white_are_refused(
    tmp_path: Path, dtype: Any, limit: int, workers: int
) -> None:
    fill(tmp_path)
    write(tmp_path / "test" / "cat" / "fine.png")
    odd = tmp_path / "train" / "cat" / "odd.tif"
    Image.fromarray(np.full((8, 8), 9, dtype)).save(odd)
    options = {"in_memory_limit": limit, "num_workers": workers}
    data = ready(tmp_path, task="train", train_fraction=1.0, **options)
    sentence = r"^Cannot use the image .*odd\.tif: .*; save it with 8 or 16 bits a channel\.$"
    with pytest.raises(UserError, match=sentence):
        list(data.train_dataloader())


def test_shorter_side_is_resized_and_the_centre_cropped(tmp_path: Path) -> None:
    fill(tmp_path)
    wide = Image.new("RGB", (40, 16))
    wide.paste((200, 0, 0), (12, 0, 28, 16))  # the centre square
    wide.save(tmp_path / "train" / "cat" / "0.png")
    images, _ = folder(tmp_path).load()
    index = next(i for i, path in enumerate(images.paths) if path.name == "0.png")
    assert images[index].shape == (3, 8, 8)
    assert (images[index][0, :, 1:-1] == 200).all()


def test_stray_files_are_passed_over(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "cat" / ".hidden.png").write_text("no image")
    (tmp_path / "train" / ".cache" / "x").mkdir(parents=True)
    (tmp_path / "train" / "README.md").write_text("no image")
    write(tmp_path / "train" / "cat" / "below" / "UPPER.PNG")
    assert count_classes(tmp_path) == 2
    train, test = folder(tmp_path).load()
    assert len(train) + len(test) == 11


@pytest.mark.parametrize("kind", ["gif", "jfif", "JPE", "jp2", "tga"])
def test_images_of_every_common_kind_are_found(tmp_path: Path, kind: str) -> None:
    for name in ("cat", "dog"):
        for index in range(5):
            write(tmp_path / "train" / name / f"{index}.{kind}", colour=(200, 200, 200))
    train, test = folder(tmp_path).load()
    assert (len(train), len(test)) == (8, 2)
    assert train.stack().float().mean() == pytest.approx(200, abs=2)


def test_files_passed_over_are_counted_in_one_line(tmp_path: Path, caplog) -> None:
    cat = fill(tmp_path) / "train" / "cat"
    names = [".hidden", "notes.txt", "a.heic", "b.HEIC", "labels", ".hidden.heic"]
    for name in names + [f"{number}.{number:03}" for number in range(7)]:
        (cat / name).touch()
    with caplog.at_level(logging.WARNING):
        folder(tmp_path).load()
    (record,) = caplog.records
    assert f"{tmp_path / 'train'}, as such files are not read: 2 .heic, 1 " in record.getMessage()
    assert record.getMessage().endswith(", 5 others.")


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    fill(tmp_path / "root")
    write(tmp_path / "elsewhere" / "more" / "a.png")
    cat = tmp_path / "root" / "train" / "cat"
    (cat / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(cat)
    (tmp_path / "elsewhere" / "more" / "up").symlink_to(tmp_path)  # dogs are no cats
    write(tmp_path / "root" / "test" / "cat" / "a.png")
    train, _ = folder(tmp_path / "root").load()
    files = [f"cat/{name}.png" for name in (0, 1, 2, 3, 4, "linked/more/a")]
    files += [f"dog/{index}.png" for index in range(5)]
    assert [path.relative_to(cat.parent).as_posix() for path in train.paths] == files


@pytest.mark.parametrize(("limit", "workers"), [HELD, READ, READ_BY_WORKERS])
@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "cut"])
def test_broken_image_is_named(
    tmp_path: Path, limit: int, workers: int, content: bytes | None
) -> None:
    fill(tmp_path)
    write(tmp_path / "test" / "cat" / "fine.png")
    broken = tmp_path / "train" / "cat" / "broken.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(broken)
    broken.write_bytes(broken.read_bytes()[:3000] if content is None else content)
    options = {"in_memory_limit": limit, "num_workers": workers}
    data = ready(tmp_path, task="train", train_fraction=1.0, **options)
    with pytest.raises(UserError, match=r"^Cannot read the image .*broken\.png") as caught:
        list(data.train_dataloader())
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    """Also as the first of all images, whose size says how they are decoded."""
    fill(tmp_path)
    (tmp_path / "train" / "cat" / "!.png").symlink_to("nowhere.png")
    write(tmp_path / "test" / "cat" / "fine.png")
    data = ready(tmp_path, task="train", train_fraction=1.0)
    with pytest.raises(UserError, match=r"^Cannot read the image .*!\.png: .* is gone; remove it"):
        data.train_dataloader()


def test_an_image_of_absurdly_many_pixels_is_no_broken_one(tmp_path: Path) -> None:
    (tmp_path / "huge.png").write_bytes(bomb())
    with pytest.raises(UserError, match=r"huge\.png has more than [\d,]{9,} pixels.*smaller"):
        decode(tmp_path / "huge.png", 3, 32)


def test_imagenet_recipe_reads_images_of_any_size(tmp_path: Path) -> None:
    for index in range(10):
        write(tmp_path / "train" / "ab"[index % 2] / f"{index}.png", size=(20 + index, 30 - index))
    data = ready(tmp_path, recipe="imagenet", image_size=14)
    assert next(iter(data.train_dataloader()))["train"][0].shape == (4, 3, 14, 14)
    assert next(iter(data.test_dataloader()))[0].shape == (2, 3, 14, 14)


def test_class_sorted_folder_gives_both_halves_every_class(tmp_path: Path) -> None:
    data = ready(fill(tmp_path, tuple("abcdef"), n=10), num_classes=6)
    labels = data.load()[0].labels
    for half in (data.train_indices, data.val_indices):
        assert np.bincount(labels[half]).tolist() == [4] * 6


def test_official_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="split=stratified"):
        folder(tmp_path, split="official")


def test_missing_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train/<class>/<image>") as caught:
        count_classes(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "train") in str(caught.value)


def test_class_without_images_is_an_error(tmp_path: Path) -> None:
    (fill(tmp_path) / "train" / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no images"):
        count_classes(tmp_path)


def test_class_of_the_test_set_only_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path)
    write(tmp_path / "test" / "fox" / "a.png")
    with pytest.raises(UserError, match="fox"):
        ready(tmp_path)


def test_one_class_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_classes=1"):
        ready(fill(tmp_path, ("cat",)), num_classes=1)


@pytest.mark.parametrize(
    ("needed", "has_test", "options"),
    [
        (3, False, {}),
        (2, True, {}),
        (3, False, {"task": "train", "train_fraction": 0.9}),
        (2, False, {"task": "train", "train_fraction": 1.0}),
        (1, True, {"task": "train", "train_fraction": 1.0}),
    ],
)
def test_a_class_of_too_few_images_is_named(
    tmp_path: Path, needed: int, has_test: bool, options: dict[str, Any]
) -> None:
    fill(tmp_path, ("cat",))
    fill(tmp_path, ("dog",), n=needed)
    if has_test:
        write(tmp_path / "test" / "cat" / "a.png")
    ready(tmp_path, **options)
    if needed == 1:
        return
    (tmp_path / "train" / "dog" / "0.png").unlink()
    sentence = f"train/dog has only {needed - 1} of the {needed} images that it needs"
    with pytest.raises(UserError, match=sentence):
        ready(tmp_path, **options)


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10_JPEG.exists(), reason=f"needs {CIFAR10_JPEG}")
def test_cifar10_jpeg(tmp_path: Path) -> None:
    """The first 200 images of every class, and the test images among the same numbers."""
    with tarfile.open(CIFAR10_JPEG) as archive:
        few = (member for member in archive if member.name.split("/")[-1] < "0200.jpg")
        archive.extractall(tmp_path, few, filter="data")
    data = ready(tmp_path, num_classes=10, image_size=32, batch_size=64)
    loader = data.train_dataloader()
    assert len(loader) == 16
    assert [len(images) for images in data.load()] == [2000, 2000]
    assert np.bincount(data.load()[0].labels[data.val_indices]).tolist() == [100] * 10
    first = next(iter(loader))
    assert first["train"][0].shape == (64, 3, 32, 32)
