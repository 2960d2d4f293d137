"""Batches of decoded images: training groups from any step on, and evaluation batches.

A dataloader worker makes whole groups. A group is a function of the seed and its address in the
stream, so nothing depends on the number of workers.
"""

import atexit
import contextlib
import signal
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cspnet.data import stream
from cspnet.data.shared_memory import (
    Addresses,
    Batch,
    BatchHandle,
    SharedBuffers,
    SlotRequest,
    SlotSampler,
)
from cspnet.data.supervision import WorkerMonitor, shut_down_all, supervised_items
from cspnet.data.worker import init_worker
from cspnet.images.decode import (
    SampledView,
    UnreadableError,
    decode,
    evaluation_view,
    render_view,
    sample_view,
)
from cspnet.recipe.schema import Evaluate, Recipe
from cspnet.sources.protocol import Source

MAX_CANDIDATES = 20  # consecutive images tried for one position: the intended one and replacements


class BatchDataset(Dataset):
    """Batches by address.

    In a dataloader worker it returns BatchHandles. With buffers, addresses arrive as SlotRequests.
    """

    buffers: SharedBuffers | None = None
    in_worker = False

    def __init__(self, source: Source, batch: int, size: int):
        self.source, self.batch, self.size = source, batch, size

    def __getitem__(self, address: Any) -> Batch | BatchHandle:
        address, slot = address if isinstance(address, SlotRequest) else (address, None)
        if self.buffers is None or slot is None:
            batch = self.read(address)
            return BatchHandle(batch) if self.in_worker else batch
        batch = self.load(address, self.buffers.view(slot, self._shape(address)))
        return BatchHandle(batch, self.buffers, slot)

    def read(self, address: Any) -> Batch:
        """The batch at an address, in newly allocated memory."""
        return self.load(address, torch.empty(self._shape(address), dtype=torch.uint8))

    def _shape(self, address: Any) -> tuple[int, int, int, int]:
        size = self.size_at(address)
        return self.batch, size, size, 3

    def size_at(self, address: Any) -> int:
        """Side length of the images at an address, at most `size`."""
        return self.size

    def load(self, address: Any, images: torch.Tensor) -> Batch:
        """Load the batch at an address; write its images into `images`, uint8 [B, S, S, 3]."""
        raise NotImplementedError


class TrainGroups(BatchDataset):
    """Training groups by address: `groups[step, group]`."""

    def __init__(self, source: Source, recipe: Recipe):
        super().__init__(source, recipe.group, recipe.data.image_size)
        self.recipe = recipe

    def size_at(self, address: tuple[int, int]) -> int:
        return self.recipe.size_at(address[0])

    def load(self, address: tuple[int, int], images: torch.Tensor) -> Batch:
        recipe, rows = self.recipe, images.numpy()
        labels = torch.empty(recipe.group, dtype=torch.int64)
        mask = torch.ones(recipe.group, dtype=torch.bool)
        replaced = 0
        unreadable: set[int] = set()
        positions = stream.group_positions(*address, recipe.batch, recipe.group)
        indices = [stream.index_at(recipe.seed, at, len(self.source)) for at in positions]
        # `sample_view` explains why all views are sampled before the first is rendered.
        size = self.size_at(address)
        views = [
            self._draw_view(index, position, size)
            for index, position in zip(indices, positions, strict=True)
        ]
        for row, index in enumerate(indices):
            labels[row], failed = self._write_view(index, positions[row], views[row], rows[row])
            replaced += bool(failed)
            unreadable.update(failed)
        return Batch(images, labels, mask, replaced, sorted(unreadable))

    def _draw_view(self, index: int, position: int, size: int) -> tuple[SampledView, int] | None:
        """The random view of image `index` at a stream position, and its label.

        None if the file cannot be read.
        """
        rng = stream.rng_for(self.recipe.seed, stream.VIEW_DOMAIN, position)
        try:
            data, label = self.source.read(index)
        except (OSError, UnreadableError):
            return None
        return sample_view(data, rng, size, self.recipe.augment), label

    def _write_view(
        self, index: int, position: int, view: tuple[SampledView, int] | None, out: np.ndarray
    ) -> tuple[int, list[int]]:
        """Write the view of image `index`, or of the next readable image, to `out`.

        Returns the label and the indices of the unreadable images. Replacing is deterministic.
        """
        recipe, size = self.recipe, len(out)
        failed: list[int] = []
        for offset in range(MAX_CANDIDATES):
            candidate = (index + offset) % len(self.source)
            if offset:
                view = self._draw_view(candidate, position, size)
            with contextlib.suppress(UnreadableError):
                if view:
                    drawn, label = view
                    render_view(drawn, size, recipe.augment, recipe.data.reduced_decode, out)
                    return label, failed
            failed.append(candidate)
        out[:] = 0  # give up: a black image with the right label
        return int(self.source.labels[index]), failed


class StepSampler:
    """Addresses (step, group) of the given groups of the steps from `start` to `stop` - 1."""

    def __init__(self, start: int, stop: int, groups: range):
        self.start, self.stop, self.groups = start, stop, groups

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * len(self.groups)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int, /) -> tuple[int, int]:
        step, group = divmod(index, len(self.groups))
        return self.start + step, self.groups[group]


class EvalBatches(BatchDataset):
    """Evaluation batches by number. All have the same shape; the mask excludes padding."""

    def __init__(self, source: Source, batch: int, size: int, how: Evaluate):
        super().__init__(source, batch, size)
        self.how = how

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch)

    def load(self, address: int, images: torch.Tensor) -> Batch:
        rows = images.numpy()
        labels = torch.zeros(self.batch, dtype=torch.int64)
        mask = torch.zeros(self.batch, dtype=torch.bool)
        unreadable: list[int] = []
        first = address * self.batch
        indices = range(first, min(first + self.batch, len(self.source)))
        rows[len(indices) :] = 0
        for row, index in enumerate(indices):
            labels[row] = int(self.source.labels[index])
            mask[row] = True
            try:
                image = decode(self.source.read(index)[0])
                evaluation_view(image, self.size, self.how, rows[row])
            except (OSError, UnreadableError):
                rows[row] = 0  # black, but counted: a validation set is never thinned out
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
    """Training groups in stream order, from step `start` to the end of the schedule.

    `groups` selects groups of each step (default: all). `monitor` is notified when workers die.
    Raises WorkersFailedError if they keep dying, unless the monitor handles that.
    """
    groups = range(recipe.groups) if groups is None else groups
    addresses = StepSampler(start, recipe.schedule.steps, groups)
    prefetch = prefetch_factor(len(groups), workers)
    # A micro-batch may hold all groups of a step while those of the next step are fetched.
    in_use = 2 * len(groups)
    return _load(TrainGroups(source, recipe), addresses, workers, pin, prefetch, in_use, monitor)


def prefetch_factor(groups: int, workers: int) -> int:
    """Groups that each worker loads ahead: two steps in total, but at least two per worker."""
    return max(2, -(-2 * groups // max(1, workers)))


def evaluation_batches(
    source: Source,
    batch: int,
    size: int,
    how: Evaluate,
    workers: int,
    pin: bool,
    rank: int = 0,
    ranks: int = 1,
    monitor: WorkerMonitor | None = None,
) -> Generator[Batch, None, None]:
    """Every image of the source once, in order, in the view that `how` defines.

    With several ranks, rank r receives the batches r, r + ranks, r + 2 * ranks … All ranks receive
    the same number of batches, the last of which may contain padding only.
    """
    batches = EvalBatches(source, batch, size, how)
    rounds = -(-len(batches) // ranks)
    return _load(batches, range(rank, rounds * ranks, ranks), workers, pin, 2, 2, monitor)


def _load(
    dataset: BatchDataset,
    addresses: Addresses,
    workers: int,
    pin: bool,
    prefetch: int,
    in_use: int,
    monitor: WorkerMonitor | None,
) -> Generator[Batch, None, None]:
    """The batches at the addresses, in order. Closing the generator shuts down the workers.

    Each worker loads at most `prefetch` batches ahead. Buffers are reused as long as the consumer
    holds at most `in_use` batches.
    """

    def make_loader(start: int, with_workers: bool) -> DataLoader:
        dataset.in_worker, dataset.buffers = with_workers, None
        if with_workers:
            count = min(len(addresses) - start, workers * prefetch + in_use)
            # If shared memory is too small for the buffers (/dev/shm of a container), images are
            # pickled. torch would send tensors through shared memory, too, and block forever.
            with contextlib.suppress(RuntimeError, OSError):
                dataset.buffers = SharedBuffers(count, dataset.batch * dataset.size**2 * 3)
        return DataLoader(
            dataset,
            batch_size=None,  # an item is a batch already
            sampler=SlotSampler(addresses, start, dataset.buffers),
            num_workers=workers if with_workers else 0,
            pin_memory=pin,
            prefetch_factor=prefetch if with_workers else None,
            worker_init_fn=_init_loader_worker,
        )

    yield from supervised_items(make_loader, len(addresses), workers, monitor or WorkerMonitor())


# Otherwise the interpreter would wait forever for the workers of generators that were never closed.
atexit.register(shut_down_all)


def _init_loader_worker(_: int) -> None:
    # A terminal sends SIGINT and SIGHUP to all processes, a batch system SIGTERM. Only the main
    # process handles them.
    init_worker(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    torch.set_num_threads(1)
