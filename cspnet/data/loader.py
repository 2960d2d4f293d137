"""Groups of decoded images, from any step on, and the batches of an evaluation.

A worker makes a whole group at once. Nothing depends on the number of workers: a group is a
function of the seed and of its address in the stream.

The images are written where they stay, into slots of memory that the processes share: the main
process hands out a free slot with each address and gets back the slot's number and the labels. A
slot is free again when nobody holds its images any more. Fresh memory for each group would cost as
much as a tenth of the decoding, for the pages alone.
"""

import atexit
import contextlib
import itertools
import math
import signal
import weakref
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cspnet.data import stream, worker
from cspnet.data.supervision import WorkerMonitor, end_all, supervised
from cspnet.images.decode import (
    SampledView,
    UnreadableError,
    decode,
    evaluation_view,
    render_view,
    sample_view,
)
from cspnet.recipe.schema import Evaluate, Recipe
from cspnet.sources.data_root import Source

TRIES = 20  # images in a row, from an unreadable one on, that are tried in its place


class Batch(NamedTuple):
    """Images of a group, or of a batch of an evaluation."""

    images: torch.Tensor  # uint8 [B, S, S, 3]
    labels: torch.Tensor  # int64 [B]
    mask: torch.Tensor  # bool [B]: false for what only fills up the last batch
    replaced: int  # images that another one, or black, stands in for
    unreadable: list[int]  # indices of the files that could not be read


class Slots:
    """Memory for a number of batches of images, `size` bytes each, which all processes share."""

    numbers = itertools.count()
    # Those of this process by number: where a batch looks for its images when it arrives.
    here: ClassVar = weakref.WeakValueDictionary()

    def __init__(self, count: int, size: int):
        self.number = next(self.numbers)
        self.memory = torch.empty(count, size, dtype=torch.uint8).share_memory_()
        self._free = list(range(count))
        self.here[self.number] = self

    def take(self) -> int | None:
        """A free slot; None where there is none."""
        return self._free.pop() if self._free else None

    def images(self, slot: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The images in a slot, uint8 of that shape."""
        return self.memory[slot, : math.prod(shape)].view(shape)

    def lend(self, slot: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The same, of a slot that was taken: when the last tensor on them goes, it is free."""
        images = self.images(slot, shape).numpy()
        weakref.finalize(images, self._free.append, slot).atexit = False
        return torch.from_numpy(images)  # holds on to that very array, as do all views of it


class Place(NamedTuple):
    """What to make, and where: the slot is None where memory has to be found for it."""

    address: Any
    slot: int | None


class Parcel:
    """A batch on its way to the main process: unpickled there, it is a Batch.

    Its images lie in a slot; where there are no slots they go with it, through the pipe.
    """

    def __init__(self, batch: Batch, slots: Slots | None = None, slot: int | None = None):
        images, labels, mask, *rest = batch
        where = (slots.number, slot, images.shape) if slots else images.numpy()
        self._content = (where, labels.numpy(), mask.numpy(), *rest)

    def __reduce__(self):
        return _unpack, self._content


def _unpack(
    where: np.ndarray | tuple[int, int, torch.Size], labels: np.ndarray, mask: np.ndarray, *rest
) -> Batch:
    if isinstance(where, tuple):
        number, slot, shape = where
        images = Slots.here[number].lend(slot, shape)
    else:
        images = torch.from_numpy(where)
    return Batch(images, torch.from_numpy(labels), torch.from_numpy(mask), *rest)


class Made(Dataset):
    """Batches by address; for another process as Parcels. With slots, addresses come as Places."""

    slots: Slots | None = None
    sent = False  # to another process

    def __init__(self, source: Source, count: int, size: int):
        self.source, self.count, self.size = source, count, size

    def __getitem__(self, address: Any) -> Batch | Parcel:
        address, slot = address if isinstance(address, Place) else (address, None)
        size = self.size_at(address)
        shape = (self.count, size, size, 3)
        if slot is None:
            batch = self.make(address, torch.empty(shape, dtype=torch.uint8))
            return Parcel(batch) if self.sent else batch
        return Parcel(self.make(address, self.slots.images(slot, shape)), self.slots, slot)

    def size_at(self, address: Any) -> int:
        """Side of the images at an address, at most `size`."""
        return self.size

    def make(self, address: Any, images: torch.Tensor) -> Batch:
        """The batch at an address, its images written into the given ones, uint8 [B, S, S, 3]."""
        raise NotImplementedError


class TrainGroups(Made):
    """Training groups by address: `groups[step, group]`."""

    def __init__(self, source: Source, recipe: Recipe):
        super().__init__(source, recipe.group, recipe.data.image_size)
        self.recipe = recipe

    def size_at(self, address: tuple[int, int]) -> int:
        return self.recipe.size_at(address[0])

    def make(self, address: tuple[int, int], images: torch.Tensor) -> Batch:
        recipe, views = self.recipe, images.numpy()
        labels = torch.empty(recipe.group, dtype=torch.int64)
        mask = torch.ones(recipe.group, dtype=torch.bool)
        replaced, unreadable = 0, set()
        positions = stream.group_positions(*address, recipe.batch, recipe.group)
        indices = [stream.index_at(recipe.seed, at, len(self.source)) for at in positions]
        # All are drawn before the first is made: `draw_view` says why.
        size = self.size_at(address)
        drawn = [self._draw(*where, size) for where in zip(indices, positions, strict=True)]
        for row, index in enumerate(indices):
            labels[row], failed = self._make(index, positions[row], drawn[row], views[row])
            replaced += bool(failed)
            unreadable.update(failed)
        return Batch(images, labels, mask, replaced, sorted(unreadable))

    def _draw(self, index: int, position: int, size: int) -> tuple[SampledView, int] | None:
        """The view of the image at `index` that belongs to a position, and the image's label."""
        rng = stream.rng_for(self.recipe.seed, stream.VIEW_DOMAIN, position)
        try:
            data, label = self.source.read(index)
        except (OSError, UnreadableError):
            return None
        return sample_view(data, rng, size, self.recipe.augment), label

    def _make(
        self, index: int, position: int, drawn: tuple[SampledView, int] | None, view: np.ndarray
    ) -> tuple[int, list[int]]:
        """Writes the view of the image at `index`, or of the next one that can be read.

        Nothing in that is random. Its label, and the indices of those that could not be read.
        """
        recipe, size, failed = self.recipe, len(view), []
        for offset in range(TRIES):
            candidate = (index + offset) % len(self.source)
            if offset:
                drawn = self._draw(candidate, position, size)
            with contextlib.suppress(UnreadableError):
                if drawn:
                    render_view(drawn[0], size, recipe.augment, recipe.data.reduced_decode, view)
                    return drawn[1], failed
            failed.append(candidate)
        view[:] = 0  # so many in a row: black, with the right label
        return int(self.source.labels[index]), failed


class Addresses:
    """Addresses (step, group) of some groups of each step, from one step to another."""

    def __init__(self, start: int, stop: int, groups: range):
        self.start, self.stop, self.groups = start, stop, groups

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * len(self.groups)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: int) -> tuple[int, int]:
        step, group = divmod(place, len(self.groups))
        return self.start + step, self.groups[group]


class Places:
    """Addresses, each with a slot that is free when its turn comes."""

    def __init__(self, addresses: Collection, slots: Slots):
        self.addresses, self.slots = addresses, slots

    def __len__(self) -> int:
        return len(self.addresses)

    def __iter__(self) -> Iterator[Place]:
        for address in self.addresses:
            yield Place(address, self.slots.take())


class EvalBatches(Made):
    """Evaluation batches of one fixed shape, by number; under the mask, each image exactly once."""

    def __init__(self, source: Source, batch: int, size: int, how: Evaluate):
        super().__init__(source, batch, size)
        self.how = how

    def __len__(self) -> int:
        return -(-len(self.source) // self.count)

    def make(self, address: int, images: torch.Tensor) -> Batch:
        views = images.numpy()
        labels = torch.zeros(self.count, dtype=torch.int64)
        mask = torch.zeros(self.count, dtype=torch.bool)
        unreadable: list[int] = []
        first = address * self.count
        indices = range(first, min(first + self.count, len(self.source)))
        views[len(indices) :] = 0
        for row, index in enumerate(indices):
            labels[row] = int(self.source.labels[index])
            mask[row] = True
            try:
                image = decode(self.source.read(index)[0])
                evaluation_view(image, self.size, self.how, views[row])
            except (OSError, UnreadableError):
                views[row] = 0  # black, and counts: a val set is never thinned
                unreadable.append(index)
        return Batch(images, labels, mask, len(unreadable), unreadable)


def training_groups(
    source: Source,
    recipe: Recipe,
    start: int,
    workers: int,
    pin: bool,
    groups: range | None = None,
    monitor: WorkerMonitor | None = None,
) -> Generator[Batch, None, None]:
    """Groups in the order of the stream from step `start` to the end of the schedule.

    All of each step, or those of them that are asked for. `monitor` hears of workers that died.
    """
    groups = range(recipe.groups) if groups is None else groups
    addresses = Addresses(start, recipe.schedule.steps, groups)
    ahead = prefetch_factor(len(groups), workers)
    # A pass may hold all groups of a step while those of the next one are fetched.
    held = 2 * len(groups)
    return _load(TrainGroups(source, recipe), addresses, workers, pin, ahead, held, monitor)


def prefetch_factor(groups: int, workers: int) -> int:
    """Groups that each worker makes ahead: together two steps' worth, and two at least."""
    return max(2, -(-2 * groups // max(1, workers)))


def evaluation_batches(
    source: Source,
    batch: int,
    size: int,
    how: Evaluate,
    workers: int,
    pin: bool,
    first: int = 0,
    each: int = 1,
    monitor: WorkerMonitor | None = None,
) -> Generator[Batch, None, None]:
    """Every image of the source once, in its order, in the view that `how` asks for.

    Or batch `first` of every `each` batches, equally many for each `first`: the last may be empty.
    """
    batches = EvalBatches(source, batch, size, how)
    rounds = -(-len(batches) // each)
    return _load(batches, range(first, rounds * each, each), workers, pin, 2, 2, monitor)


def _load(
    made: Made,
    addresses: Sequence,
    workers: int,
    pin: bool,
    ahead: int,
    held: int,
    monitor: WorkerMonitor | None,
) -> Generator[Batch, None, None]:
    """The batches at the addresses, in their order. Closing the generator ends the workers.

    Each worker is `ahead` batches ahead, at most; of `held` at a time the memory is used again.
    """

    def make(start: int, with_workers: bool) -> DataLoader:
        made.sent = with_workers
        places = _Rest(addresses, start)
        if with_workers:
            count = min(len(places), workers * ahead + held)
            # Without room for that in shared memory (a container's /dev/shm) the images go through
            # pipes: torch's way of sending a tensor needs it too, and would wait for ever.
            made.slots = None
            with contextlib.suppress(RuntimeError, OSError):
                made.slots = Slots(count, made.count * made.size**2 * 3)
                places = Places(places, made.slots)
        return DataLoader(
            made,
            batch_size=None,  # an item is a batch already
            sampler=places,
            num_workers=workers if with_workers else 0,
            pin_memory=pin,
            prefetch_factor=ahead if with_workers else None,
            worker_init_fn=_start_worker,
        )

    yield from supervised(make, len(addresses), workers, monitor or WorkerMonitor())


class _Rest:
    """A sequence of addresses from the one at `start` on."""

    def __init__(self, addresses: Sequence, start: int):
        self.addresses, self.start = addresses, start

    def __len__(self) -> int:
        return len(self.addresses) - self.start

    def __iter__(self) -> Iterator:
        for place in range(self.start, len(self.addresses)):
            yield self.addresses[place]


atexit.register(end_all)  # workers of what was never closed would be waited for, for ever


def _start_worker(_: int) -> None:
    # A terminal sends SIGINT and SIGHUP to every process, a batch system SIGTERM; only the main one
    # decides what they mean.
    worker.begin(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    torch.set_num_threads(1)
