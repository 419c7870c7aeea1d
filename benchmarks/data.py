"""How fast training batches come: from the device's memory, and through DataLoader workers.

    python benchmarks/data.py --device cuda --workers 0 4

Random images in CIFAR-10's number and size, with the augmentation of the final training (crop,
flip, cutout, normalise). Both ways give the same numbers, which is checked first. A search step
takes two batches.
"""

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from measuring import (
    Report,
    interleaved,
    parser,
    print_surroundings,
    start,
    surroundings,
    write,
)
from torch import Tensor

from dartsl.data.augment import CropFlip
from dartsl.data.images import TensorImages
from dartsl.data.loaders import BatchLoader, DeviceSource, PassStream, Source, WorkerSource

BATCHES = 50


def sources(args: argparse.Namespace) -> dict[str, Source]:
    """Every way to be measured."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (args.images, 3, args.image_size, args.image_size), np.uint8)
    images = TensorImages(torch.from_numpy(pixels), rng.integers(0, 10, args.images))
    on_device = {"on the device": DeviceSource(images, torch.device(args.device))}
    pin_memory = args.device == "cuda"
    return on_device | {
        f"DataLoader, {workers} workers": WorkerSource(images, workers, pin_memory)
        for workers in args.workers
    }


def batches(source: Source, args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches, on the device."""
    augmentation = CropFlip((0.5,) * 3, (0.25,) * 3, cutout_length=16)
    stream = PassStream("weights", np.arange(args.images), args.batch_size, augmentation, 0)
    for x, y in BatchLoader(source, stream):
        yield x.to(args.device, non_blocking=True), y.to(args.device, non_blocking=True)


def main() -> None:
    """Check, measure, print, and write the report."""
    options = parser(__doc__)
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--image-size", type=int, default=32)
    options.add_argument("--images", type=int, default=50_000)
    options.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    args = options.parse_args()
    start(args)
    ways = sources(args)
    expected = next(batches(ways["on the device"], args))[0]
    for name, source in ways.items():
        assert torch.equal(next(batches(source, args))[0], expected), name
    # One pass goes on for as long as batches are asked for; starting workers is not timed.
    running = {name: batches(source, args) for name, source in ways.items()}
    count = min(BATCHES, args.images // args.batch_size // (args.warm_up + args.repeats))
    calls = {
        name: lambda iterator=iterator: [next(iterator) for _ in range(count)]
        for name, iterator in running.items()
    }
    medians, _ = interleaved(calls, args)
    rows = {name: ms / count for name, ms in medians.items()}
    report: Report = {"surroundings": surroundings(args), "milliseconds a batch": rows}
    print_surroundings(report)
    for name, ms in rows.items():
        print(f"{name:24}{ms:8.2f} ms a batch{args.batch_size / ms * 1e3:12,.0f} images/s")
    write(report, args)


if __name__ == "__main__":
    main()
