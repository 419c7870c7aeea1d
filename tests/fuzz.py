"""Hostile input: a clear error or a right answer, never a traceback, foreign code or a hang.

    python tests/fuzz.py --cases 1000            # so many of each kind
    python tests/fuzz.py --cases 100 --kind image_folder --seed 7

Prints the number of cases of each kind and how they ended; every case is a function of (seed, kind,
number), and one that breaks the rule is named by its number and ends the program with status 1.
"""

import argparse
import contextlib
import io
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import run  # noqa: E402
from dartsl.data import ImageFolder  # noqa: E402
from dartsl.errors import UserError  # noqa: E402
from dartsl.genotype import Genotype, published  # noqa: E402
from dartsl.interop import official_state_dict  # noqa: E402
from dartsl.networks import FinalNetwork  # noqa: E402
from dartsl.search_space import SearchSpace, random_genotype  # noqa: E402

MARK = "executed"  # a file that only foreign code would make, in the present folder
SECONDS = 60  # a case that takes longer hangs
MEMORY = 8 * 1024**3  # address space of the program
WORDS = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1",
    "2",
    "3",
    "0.5",
    "1e308",
    "1e-308",
    "99999999999999999999",
    "-99999999999",
    "null",
    "true",
    "false",
    "''",
    "abc",
    "[]",
    "{}",
    "[1,2]",
    "[a]",
    "{a:1}",
    "???",
    "'???'",
    "${oc.env:HOME}",
    "${nowhere}",
    "${oc.env:NO_SUCH_VARIABLE}",
    "${seed}",
    "'${'",
    "\\u0000",
    "'é 漢字'",
    "'a b'",
    "..",
    "/",
    "/dev/null",
    "/etc/passwd",
    "~",
    "x" * 300,
    "0x10",
    "1_000",
    "1.0",
    f'\'__import__("os").mkdir("{MARK}")\'',
    "float",
    "int",
    "1,2",
    "range(1,3)",
    "interval(0,1)",
)


class Mkdir:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (MARK,)


# ---- genotypes -----------------------------------------------------------------------------------


def some_genotype(rng: random.Random) -> Genotype:
    if rng.random() < 0.5:
        return published(rng.choice(("darts_v1", "darts_v2", "nasnet", "amoebanet", "snas")))
    return random_genotype(SearchSpace(num_intermediate_nodes=rng.randint(1, 5)), rng.randrange(99))


CODE = (
    f"__import__('os').mkdir('{MARK}')",
    f"[__import__('os').mkdir('{MARK}') for _ in [1]]",
    f"eval(\"__import__('os').mkdir('{MARK}')\")",
    "9**9**9",
    "'a'*10**10",
    "range(10**12)",
    "range(2,6)",
    "list(range(2,6))",
    "(",
    ")",
    "[",
    "]",
    "Genotype(",
    "normal=",
    "None",
    "...",
    "1e400",
    "-1",
    "1j",
    "b'x'",
    "'" * 3,
    "\\",
    "#",
    "\n",
    "\t",
    "\x00",
    "\ud7ff",
    "{}",
    "**{}",
    "*[]",
    "lambda: 0",
    "f'{1}'",
    "yield",
    "await x",
    "0x7fffffffffffffff",
    "1_0",
    "True",
    "'none'",
)
TAGS = (
    f"!!python/object/apply:os.mkdir ['{MARK}']",
    "!!python/name:os.system",
    "&a [*a, *a]",
    "<<: *a",
    "!!binary aGk=",
    "!!set {a}",
    "!!timestamp 2001-01-01",
    "? [a]\n: b",
    "---\n...",
    "%YAML 9.9",
    "{a: &x [x], b: *x}",
    "!!int 0x",
    ".nan",
    "1:30:00",
    "_target_: os.mkdir",
    "- - - -",
    "|\n  x",
    "&a [&b [&c [*a, *b, *c]]]",
)


def spoil_text(rng: random.Random, text: str, pieces: tuple[str, ...]) -> str:
    """Some edits of a text: cut, repeat, replace, insert."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randint(0, len(text))
        stop = min(len(text), start + rng.randint(0, 20))
        middle = rng.choice(
            (
                "",
                rng.choice(pieces),
                text[start:stop] * 2,
                chr(rng.randrange(0x300)),
                chr(rng.randrange(0x10FFFF) & ~0x800),
                str(rng.randrange(-9, 99)),
            )
        )
        text = text[:start] + middle + text[stop:]
    if rng.random() < 0.02:
        text = rng.choice(("(", "[", "{", "- ", "Genotype(", "&a ")) * rng.choice((999, 30_000))
    return text


def genotype_text(rng: random.Random, folder: Path) -> None:
    genotype = some_genotype(rng)
    if rng.random() < 0.1:
        assert Genotype.parse(repr(genotype)) == genotype
        return
    Genotype.parse(spoil_text(rng, repr(genotype), CODE))


def genotype_file(rng: random.Random, folder: Path) -> None:
    path = folder / "genotype.yaml"
    some = some_genotype(rng)
    if rng.random() < 0.1:
        some.save(path)
        assert Genotype.load(path) == some
        FinalNetwork(some, channels=2, num_cells=3)
        return
    fields = asdict(some) | {"_target_": "dartsl.genotype.Genotype"}
    fields = {
        k: [list(e) if isinstance(e, tuple) else e for e in v] if k != "_target_" else v
        for k, v in fields.items()
    }
    if rng.random() < 0.4:  # well-formed yaml of other content
        for _ in range(rng.randint(1, 2)):
            name = rng.choice((*fields, "other", 3, None))
            value = rng.choice(
                (
                    None,
                    3,
                    "x",
                    [],
                    [[]],
                    [["x", 0]],
                    {},
                    {"a": 1},
                    [2, 2],
                    1e308,
                    True,
                    {"_target_": "os.mkdir", "path": MARK},
                    [["skip_connect", 10**30]] * 2,
                    [10**30],
                    "dartsl.genotype.Genotype.load",
                    [[MARK, -1]] * 4,
                )
            )
            fields[name] = value
        path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    else:
        text = spoil_text(rng, yaml.safe_dump(fields), TAGS)
        path.write_bytes(spoil_bytes(rng, text.encode("utf-8", "surrogatepass"), 0.2))
    genotype = Genotype.load(path)
    FinalNetwork(genotype, channels=2, num_cells=3)


def spoil_bytes(rng: random.Random, content: bytes, probability: float = 1.0) -> bytes:
    """Bytes cut short, changed, inserted or taken away."""
    if rng.random() > probability or not content:
        return content
    data = bytearray(content)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    for _ in range(rng.choice((1, 1, 3, 50))):
        at = rng.randrange(len(data))
        if kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at : at + rng.randint(1, 9)] = rng.randbytes(rng.randint(0, 9))
        else:
            data[at : at + 4] = struct.pack("<i", rng.choice((-1, 0, 2**31 - 1)))
        if not data:
            break
    return bytes(data)


# ---- checkpoints ---------------------------------------------------------------------------------


def network() -> FinalNetwork:
    torch.manual_seed(0)
    return FinalNetwork(published("darts_v2"), 2, 3, 10, in_channels=1, auxiliary=False)


def spoil_tensors(rng: random.Random, tensors: dict[Any, Any]) -> dict[Any, Any]:
    """A state dict with other names, shapes, types or kinds."""
    name = rng.choice(list(tensors))
    tensor = tensors[name]
    strange = (
        tensor.reshape(-1),
        tensor[..., None],
        tensor.to(torch.float64),
        tensor.to(torch.complex64),
        tensor.to(torch.int8),
        torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else 1,
        torch.zeros(1).expand(10**12),
        torch.zeros(0),
        torch.empty(3, device="meta"),
        3,
        None,
        "x",
        [tensor],
        {name: tensor},
        tensor.to_sparse() if tensor.dim() else 0,
        torch.zeros(1, 10**6, 0),
        torch.zeros(1).expand(2, 2, 2, 2, 2),
        torch.Size([1]),
        torch.float32,
        b"x",
        tensor[None],
        torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
        torch.nn.Parameter(torch.ones(2)),
    )
    kind = rng.randrange(4)
    if kind == 0:
        return tensors | {name: rng.choice(strange)}
    if kind == 1:
        del tensors[name]
    elif kind == 2:
        tensors[rng.choice(("x", "", "network.x", "cells.99.x", 3, None, ("a",)))] = rng.choice(
            strange
        )
    else:
        return {f"{rng.choice(('module.', 'network.', 'x'))}{k}": v for k, v in tensors.items()}
    return tensors


def checkpoint_bytes(rng: random.Random) -> bytes:
    """A checkpoint of `network()`, spoilt in one of many ways or not at all."""
    ours = {f"network.{k}": v for k, v in network().state_dict().items()}
    tensors: Any = rng.choice((ours, official_state_dict(network())))
    kind = rng.randrange(8)
    if kind in (0, 1):
        tensors = spoil_tensors(rng, dict(tensors))
    content: Any = rng.choice(({"state_dict": tensors}, tensors))
    if kind == 2:
        content = rng.choice(
            (
                [],
                3,
                None,
                "x",
                [tensors],
                {"state_dict": None},
                {"state_dict": 3},
                {"state_dict": []},
                {},
                {"state_dict": {}},
                {"state_dict": "abc"},
                torch.ones(2),
                {"epoch": 3},
                {1: 2},
                {"state_dict": {"network.x": 1}},
            )
        )
    if kind == 3:
        content = {"state_dict": rng.choice((Mkdir(), {"network.x": Mkdir()}))}
    buffer = io.BytesIO()
    if kind == 3 and rng.random() < 0.5:
        return rng.choice(
            (
                pickle.dumps(Mkdir()),
                pickle.dumps({"state_dict": Mkdir()}, 2),
                b"cos\nmkdir\n(S'" + MARK.encode() + b"'\ntR.",
            )
        )
    torch.save(content, buffer, _use_new_zipfile_serialization=rng.random() < 0.7)
    data = buffer.getvalue()
    if kind in (4, 5, 6):
        data = spoil_bytes(rng, data)
    if kind == 7 and rng.random() < 0.5:
        data = rng.choice((b"", b"PK\x03\x04", zipped_bomb(), rng.randbytes(100), b"\x80\x04N."))
    return data


def zipped_bomb() -> bytes:
    """A small file whose pickle unpacks to much more."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 4_000_000 + b"}.")
        file.writestr("archive/version", "3")
    return buffer.getvalue()


NETWORK = (
    "network.channels=2",
    "network.num_cells=3",
    "network.auxiliary=false",
    "data=digits",
    "data.max_images=20",
    "data.batch_size=8",
    "trainer.limit_test_batches=1",
)


def checkpoint(rng: random.Random, folder: Path) -> None:
    (folder / "some.ckpt").write_bytes(checkpoint_bytes(rng))
    command("experiment=evaluate", "genotype=darts_v2", "ckpt_path=some.ckpt", *NETWORK)


# ---- the command line ----------------------------------------------------------------------------


def command(*arguments: str) -> None:
    """`python run.py <arguments>`; raises UserError where it ends with one sentence."""
    sys.argv = [str(ROOT / "run.py"), *arguments, "print_config=false", "hydra.run.dir=out"]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            run.cli()
    except SystemExit as end:
        message = str(end.code)
        if not message.startswith("Error: ") and end.code != 0:
            raise AssertionError(f"{shown(arguments)}: {message}\n{out.getvalue()}") from end
        if "Traceback" in out.getvalue():
            raise AssertionError(f"{shown(arguments)}: {out.getvalue()}") from end
        raise UserError(message) from end
    except Exception as error:
        raise AssertionError(f"{shown(arguments)}: {error!r}") from error


def shown(arguments: tuple[str, ...]) -> str:
    return " ".join(map(repr, arguments))


KEYS = [
    "seed",
    "threads",
    "output_dir",
    "data.batch_size",
    "data.train_fraction",
    "data.max_images",
    "data.mean",
    "data.std",
    "data.crop_padding",
    "data.cutout_length",
    "data.horizontal_flip",
    "data.image_size",
    "data.in_channels",
    "data.num_classes",
    "data.seed",
    "data.split",
    "data.task",
    "optimizer.weights.lr",
    "optimizer.weights.momentum",
    "optimizer.weights.weight_decay",
    "optimizer.gradient_clip",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.precision",
    "trainer.devices",
    "trainer.accelerator",
    "trainer.limit_train_batches",
    "trainer.limit_val_batches",
    "trainer.log_every_n_steps",
    "trainer.fast_dev_run",
    "trainer.profiler",
    "task",
    "experiment",
    "hardware",
    "logger",
    "callbacks",
    "debug",
    "genotype",
    "genotype.path",
]
SEARCH_KEYS = [
    "supernet.channels",
    "supernet.num_cells",
    "supernet.stem_multiplier",
    "supernet.num_classes",
    "supernet.in_channels",
    "search_space.primitives",
    "search_space.num_intermediate_nodes",
    "method",
    "method.arch_optimizer.lr",
    "method.arch_optimizer.betas",
    "method.arch_optimizer.weight_decay",
    "method.hypergradient",
    "optimizer.schedule.final",
    "optimizer.schedule.num_epochs",
    "next_experiment",
    "module.penalty",
    "module.stages",
    "callbacks.checkpoint.every_n_steps",
    "callbacks.checkpoint.dirpath",
    "callbacks.genotype.dirpath",
    "callbacks.collapse.max_skip_connections",
]
TRAIN_KEYS = [
    "network.channels",
    "network.num_cells",
    "network.num_classes",
    "network.stem",
    "network.auxiliary",
    "module.auxiliary_weight",
    "module.drop_path_prob",
    "module.label_smoothing",
    "module.gradient_clip",
    "test",
    "optimizer.schedule.final",
    "genotype.normal",
    "genotype.reduce",
    "genotype.normal_concat",
    "genotype.reduce_concat",
]


def config_value(rng: random.Random, folder: Path) -> None:
    searches = rng.random() < 0.5
    small = ("supernet.channels=2", "supernet.num_cells=3") if searches else NETWORK[:3]
    base = (
        ("experiment=search_digits",)
        if searches
        else ("experiment=train_digits", "genotype=darts_v1")
    )
    fast = ("data.max_images=20", "data.batch_size=8", "debug=fast_dev_run")
    keys = KEYS + (SEARCH_KEYS if searches else TRAIN_KEYS)
    overrides = [
        f"{rng.choice(('', '', '', '', '+', '++', '~'))}{rng.choice(keys)}={rng.choice(WORDS)}"
        for _ in range(rng.choice((1, 1, 1, 2)))
    ]
    command(*base, *small, *fast, *overrides)


# ---- image folders -------------------------------------------------------------------------------


def some_image(rng: random.Random) -> tuple[bytes, str]:
    """An image file of some mode, size and format, and its suffix."""
    mode = rng.choice(("RGB", "L", "P", "1", "LA", "RGBA", "CMYK", "YCbCr", "I;16", "F", "I"))
    size = rng.choice(((8, 8), (1, 1), (1, 50), (300, 2), (9, 7)))
    grey = Image.fromarray(
        np.random.default_rng(rng.randrange(99)).integers(
            0, 255, (size[1], size[0]), dtype=np.uint8
        )
    )
    image = Image.new("I;16", size, 40_000) if mode == "I;16" else grey.convert(mode)
    for kind in rng.sample(("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF"), 7):
        buffer = io.BytesIO()
        with contextlib.suppress(OSError, ValueError, KeyError):
            image.save(buffer, kind)
            suffix = rng.choice((f".{kind.lower()}", ".png", ".JPG", ".jpeg"))
            return buffer.getvalue(), suffix.replace(".gif", ".png")
    raise AssertionError(mode)


def bomb() -> bytes:
    """A PNG of a few bytes that unpacks to 40,000 × 40,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    packed = zlib.compress(b"\x00" * 10_000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


def some_name(rng: random.Random) -> str:
    return rng.choice(
        (
            str(rng.randrange(99)),
            "é",
            "漢字",
            "a b",
            "x" * 120,
            "a=b,c",
            "'",
            "[x]",
            "${x}",
            ".hidden",
            "...",
            "-rf",
            "%s",
            "\u202e",
            "con",
            "a\nb",
        )
    )


def fill(rng: random.Random, folder: Path, number: int) -> None:
    """Images, and sometimes something worse among them."""
    for index in range(number):
        content, suffix = some_image(rng)
        (folder / f"{index}{some_name(rng)}{suffix}").write_bytes(content)
    if rng.random() > 0.1:
        return
    kind = rng.randrange(9)
    name = folder / f"{some_name(rng)}.png"
    content = some_image(rng)[0]
    if kind == 0:
        name.write_bytes(spoil_bytes(rng, content))
    elif kind == 1:
        name.write_bytes(rng.choice((b"", b"no image", rng.randbytes(99), pickle.dumps(Mkdir()))))
    elif kind == 2:
        name.write_bytes(bomb())
    elif kind == 3:
        name.symlink_to(rng.choice(("nowhere", ".", "..", name.name, "/dev/null", "/dev/zero")))
    elif kind == 4:
        name.mkdir()
    elif kind == 5:
        (folder / "notes.txt").write_text("not an image")
    elif kind == 6:
        os.mkfifo(name)
    elif kind == 7:
        (folder / "deeper").mkdir()
        (folder / "deeper" / "a.png").write_bytes(content)
    else:
        name.write_bytes(content)
        name.chmod(0)


def image_folder(rng: random.Random, folder: Path) -> None:
    root = folder / "images"
    classes = {some_name(rng) for _ in range(rng.choice((0, 1, 2, 3, 3, 4)))}
    parts = ("train",), ("train", "test"), ("train", "val"), ("train", "test", "val"), ("test",), ()
    for part in rng.choices(parts, (9, 9, 9, 3, 1, 1))[0]:
        for name in classes if rng.random() < 0.9 else {*classes, some_name(rng)}:
            (root / part / name).mkdir(parents=True)
            fill(rng, root / part / name, 6 if rng.random() < 0.9 else rng.choice((0, 1, 3)))
    number = len([p for p in (root / "train").glob("*") if not p.name.startswith(".")])
    channels = rng.choice((1, 3))
    data = ImageFolder(
        root=str(root),
        num_classes=max(number, 2),
        in_channels=channels,
        image_size=rng.choice((1, 8, 32)),
        mean=[0.5] * channels,
        std=[0.5] * channels,
        batch_size=4,
        task=rng.choice(("search", "train")),
        train_fraction=0.5,
        recipe=rng.choice(("crop_flip", "crop_flip", "imagenet")),
        in_memory_limit=rng.choice((0, 2**31)),
    )
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            x, y = batch["train"] if isinstance(batch, dict) else batch
            assert x.isfinite().all()
            assert x.shape[1:] == (channels, data.image_size, data.image_size)
            assert 0 <= y.min() <= y.max() < data.num_classes


# ---- the cases -----------------------------------------------------------------------------------

Kind = Callable[[random.Random, Path], None]
KINDS: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (genotype_text, genotype_file, checkpoint, config_value, image_folder)
}


def outcome(kind: str, seed: int, number: int) -> str:
    """ "answer" or "clear error" of a case.

    Raises:
        AssertionError: where it ends in another way.
    """
    before = Path.cwd()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.chdir(folder)
    try:
        with limited(SECONDS):
            KINDS[kind](random.Random(f"{seed}/{kind}/{number}"), folder)
        return "answer"
    except UserError as error:
        message = str(error)
        assert message, "an empty message"
        assert len(message) < 3_000, message
        return "clear error"
    except AssertionError:
        raise
    except BaseException as error:
        text = "".join(traceback.format_exception(error)[-3:])
        raise AssertionError(f"{type(error).__name__}: {error}\n{text}") from error
    finally:
        os.chdir(before)
        executed = (folder / MARK).exists()
        for path in folder.rglob("*"):
            if not path.is_symlink() and path.is_file():
                path.chmod(0o600)
        shutil.rmtree(folder)
        assert not executed, "foreign code ran"


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in what takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def main() -> int:
    """Tries the cases that the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100, help="of each kind")
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    broken = 0
    for kind in options.kind or KINDS:
        outcomes: Counter[str] = Counter()
        for number in range(options.first, options.first + options.cases):
            try:
                outcomes[outcome(kind, options.seed, number)] += 1
            except AssertionError as error:
                outcomes["BROKEN"] += 1
                broken += 1
                print(f"{kind} {number}: {re.sub('x{99,}', 'x…x', str(error))}", flush=True)
        ends = ", ".join(f"{count} {end}" for end, count in sorted(outcomes.items()))
        print(f"{kind}: {options.cases} cases: {ends}", flush=True)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
