"""From (seed, stream, step) to batches, resumable at every step.

Three parts, one for each question:

- A stream says which images make batch number t, and with which random numbers: a `Plan`.
- A source turns plans into batches: on the device, or through worker processes.
- A loader counts the batches that it handed out, and its state is that number.

Shapes: B images of a batch, C channels, H rows, W columns, k random numbers per image.
"""

import functools
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dartsl.data.augment import Augmentation
from dartsl.data.images import ImageSet
from dartsl.data.randomness import generator
from dartsl.errors import UserError

Batch = tuple[Tensor, Tensor]
"""Images float32 [B, C, H, W] and labels int64 [B]."""


class Plan(NamedTuple):
    """What a batch is made of.

    Attributes:
        indices: of the images, int64 [B].
        draws: the augmentation's random numbers, float64 [B, k].
    """

    indices: np.ndarray
    draws: np.ndarray

    def share(self, shard: "Shard") -> "Plan":
        """This process' share of the batch."""
        part = slice(shard.rank, None, shard.world_size)
        return Plan(self.indices[part], self.draws[part])


class Shard(NamedTuple):
    """Which of several processes that share every batch this one is."""

    rank: int
    world_size: int


ALONE = Shard(0, 1)

# ---- streams ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """A shuffled, augmented index set.

    Attributes:
        name: tells the streams of one run apart, e.g. "weights".
        indices: int64 [N] into the image set.
        batch_size: of all processes together.
        augmentation: whose random numbers are drawn.
        seed: of the run.
        shard: which share of every batch is planned. The batches do not depend on it: what several
            processes see together is what one sees that has their batch sizes' sum.
    """

    name: str
    indices: np.ndarray
    batch_size: int
    augmentation: Augmentation
    seed: int
    shard: Shard = ALONE

    def order(self, number: int) -> np.ndarray:
        """The indices in the order of pass `number`, int64 [N]."""
        return self.indices[_permutation(self.seed, self.name, number, len(self.indices))]

    def _plan(self, indices: np.ndarray, step: int) -> Plan:
        rng = generator(self.seed, f"{self.name}/augmentation", step)
        return Plan(indices, self.augmentation.draw(rng, len(indices))).share(self.shard)


# A pass asks for its permutation at every batch, and two streams (with two passes each at a
# boundary) run side by side.
@functools.lru_cache(maxsize=4)
def _permutation(seed: int, name: str, number: int, length: int) -> np.ndarray:
    order = generator(seed, f"{name}/permutation", number).permutation(length)
    order.setflags(write=False)
    return order


class PassStream(Stream):
    """Passes over the index set, each in a new order; every image once a pass."""

    def __len__(self) -> int:
        return len(self._bounds()) - 1

    def plan(self, number: int, batch: int) -> Plan:
        """Batch `batch` of pass `number`."""
        start, end = self._bounds()[batch : batch + 2]
        return self._plan(self.order(number)[start:end], number * len(self) + batch)

    def _bounds(self) -> np.ndarray:
        return _batch_bounds(len(self.indices), self.batch_size, self.shard.world_size)


class EndlessStream(Stream):
    """The orders of passes 0, 1, 2, ... one after the other, cut into full batches.

    Where the index set is smaller than a batch, a batch has the index set's size.
    """

    def plan(self, step: int) -> Plan:
        """Batch number `step` since the start of training."""
        length = len(self.indices)
        size = min(self.batch_size, length)
        first, last = step * size, (step + 1) * size
        passes = range(first // length, (last - 1) // length + 1)
        orders = np.concatenate([self.order(number) for number in passes])
        start = first - passes.start * length
        return self._plan(orders[start : start + size], step)


def batch_sizes(length: int, batch_size: int, world_size: int = 1) -> list[int]:
    """The sizes of one pass's training batches: full ones, then the rest.

    One image alone would break BatchNorm where a map is a single pixel, so the batch before gives
    the rest as many of its images as make two for every process (of small batches it cannot).
    """
    full, rest = divmod(length, batch_size)
    sizes = [batch_size] * full + [rest] * (rest > 0)
    lacking = 2 * world_size - rest
    if full and rest and 0 < lacking <= batch_size - 2 * world_size:
        sizes[-2:] = [batch_size - lacking, rest + lacking]
    return sizes


@functools.lru_cache(maxsize=4)
def _batch_bounds(length: int, batch_size: int, world_size: int) -> np.ndarray:
    """Where the training batches of a pass begin, and where the last one ends."""
    return np.cumsum([0, *batch_sizes(length, batch_size, world_size)])


# ---- sources ------------------------------------------------------------------------------------


class Source(Protocol):
    """Turns plans into batches."""

    def batches(self, plans: Iterable[Plan], augmentation: Augmentation) -> Iterator[Batch]:
        """The batches of these plans, in order."""
        ...


class DeviceSource:
    """All images as one uint8 tensor on a device, augmented there a batch at a time.

    Args:
        images: the image set; it is decoded whole.
        device: where the images are kept and the batches made.
    """

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        self.images = images.stack().to(device)
        self.labels = torch.from_numpy(images.labels).to(device)

    def batches(self, plans: Iterable[Plan], augmentation: Augmentation) -> Iterator[Batch]:
        """The batches of these plans, on the device."""
        for plan in plans:
            indices = torch.from_numpy(plan.indices)
            indices = indices.to(self.images.device, non_blocking=self.images.is_cuda)
            yield augmentation.apply(self.images[indices], plan.draws), self.labels[indices]


class WorkerSource:
    """Images decoded and augmented one by one in worker processes.

    Each image travels with its own row of draws, so the numbers do not depend on the workers.

    Args:
        images: the image set.
        num_workers: processes; 0 does the work in this one.
        pin_memory: whether batches are put in page-locked memory, for a faster copy to a GPU.
    """

    def __init__(self, images: ImageSet, num_workers: int = 0, pin_memory: bool = False) -> None:
        self.images = images
        self.num_workers = num_workers
        self.pin_memory = pin_memory

    def batches(self, plans: Iterable[Plan], augmentation: Augmentation) -> Iterator[Batch]:
        """The batches of these plans, on the CPU."""
        loader: DataLoader[Any] = DataLoader(
            _Augmented(self.images, augmentation),
            batch_sampler=(list(zip(*plan, strict=True)) for plan in plans),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            # Without its own generator a DataLoader would advance torch's global one.
            generator=torch.Generator(),
        )
        try:
            yield from (tuple(batch) for batch in loader)  # torch collates to a list
        except UserError as error:
            # The frames that it has passed hold the workers, which would outlive it, and which the
            # workers of a sweep's next job would try to end.
            traceback.clear_frames(error.__traceback__)
            # From another process it comes wrapped in that process's traceback.
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


class _Augmented(Dataset[tuple[Tensor, int]]):
    """What a worker does: (index, row of draws) -> (augmented image [C, H, W], label)."""

    def __init__(self, images: ImageSet, augmentation: Augmentation) -> None:
        self.images = images
        self.augmentation = augmentation

    def __getitem__(self, item: tuple[int, np.ndarray]) -> tuple[Tensor, int]:
        index, row = item
        image = self.augmentation.apply(self.images[index][None], row[None])[0]
        return image, int(self.images.labels[index])


# ---- loaders ------------------------------------------------------------------------------------


class _Resumable:
    """A training loader whose whole state is the number of batches that it handed out.

    Iterating goes on from the current step to the end of that step's epoch. Lightning keeps the
    state of a loader that has these two methods, but restores it within an epoch only; the data
    module's own state covers the end of an epoch too.

    Args:
        length: batches of a pass.
        epoch_length: batches of an epoch; fewer than a pass under `limit_train_batches`. Each epoch
            begins a new pass.
    """

    def __init__(self, length: int, epoch_length: int | None) -> None:
        self.length = length
        self.epoch_length = epoch_length or length
        self.step = 0

    def __len__(self) -> int:
        return self.length

    def state_dict(self) -> dict[str, int]:
        """The number of batches since the start of training."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on from a saved step."""
        self.step = int(state_dict["step"])

    def _rest_of_epoch(self) -> range:
        return range(self.step, (self.step // self.epoch_length + 1) * self.epoch_length)


class BatchLoader(_Resumable):
    """Training batches `(x, y)` of one stream; an epoch is a pass.

    Args:
        source: where the images come from.
        stream: which images, in which order.
        epoch_length: batches of an epoch where it is cut short; default: a whole pass.
    """

    def __init__(self, source: Source, stream: PassStream, epoch_length: int | None = None) -> None:
        super().__init__(len(stream), epoch_length)
        self.source = source
        self.stream = stream

    def __iter__(self) -> Iterator[Batch]:
        plans = (self.stream.plan(*divmod(t, self.epoch_length)) for t in self._rest_of_epoch())
        for batch in self.source.batches(plans, self.stream.augmentation):
            self.step += 1
            yield batch


class PairedLoader(_Resumable):
    """Search batches `{"train": (x, y), "val": (x, y)}`; an epoch is a pass over the weight half.

    The alpha half runs on beside it without regard to epochs, always in full batches: the official
    code takes the first batch of a fresh shuffle at every step instead.

    Args:
        source: where the images of both halves come from.
        weights: the stream of the weight half ("train").
        alpha: the stream of the alpha half ("val").
        epoch_length: batches of an epoch where it is cut short; default: a whole pass.
    """

    def __init__(
        self,
        source: Source,
        weights: PassStream,
        alpha: EndlessStream,
        epoch_length: int | None = None,
    ) -> None:
        super().__init__(len(weights), epoch_length)
        self.source = source
        self.weights = weights
        self.alpha = alpha

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        steps = self._rest_of_epoch()
        weights = (self.weights.plan(*divmod(t, self.epoch_length)) for t in steps)
        alpha = (self.alpha.plan(t) for t in steps)
        pairs = zip(
            self.source.batches(weights, self.weights.augmentation),
            self.source.batches(alpha, self.alpha.augmentation),
            strict=True,
        )
        for train, val in pairs:
            self.step += 1
            yield {"train": train, "val": val}


class EvaluationLoader:
    """Every image of an index set once, in order, without randomness: batches `(x, y)`.

    Args:
        source: where the images come from.
        indices: int64 [N] into the image set.
        batch_size: B; the last batch is what is left.
        transform: an augmentation that draws nothing.
        shard: which share of the images comes.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        batch_size: int,
        transform: Augmentation,
        shard: Shard = ALONE,
    ) -> None:
        self.source = source
        self.indices = indices[shard.rank :: shard.world_size]
        self.batch_size = batch_size
        self.transform = transform
        # Of the largest share, so that a limit on the batches means the same in every process.
        self.length = -(-len(indices) // (batch_size * shard.world_size))

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        starts = range(0, len(self.indices), self.batch_size)
        parts = (self.indices[start : start + self.batch_size] for start in starts)
        plans = (Plan(part, np.empty((len(part), 0))) for part in parts)
        return self.source.batches(plans, self.transform)
