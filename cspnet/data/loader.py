"""Groups of decoded images, from any step on, and the batches of an evaluation.

A worker makes a whole group at once and hands it over through shared memory. Nothing depends on the
number of workers: a group is a function of the seed and of its address in the stream.
"""

import signal
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cspnet.data import stream
from cspnet.data.decode import Unreadable, decode, evaluation_view, train_view
from cspnet.data.sources import Source
from cspnet.schema import Evaluate, Recipe

TRIES = 20  # images in a row, from an unreadable one on, that are tried in its place


class Batch(NamedTuple):
    """Images of a group, or of a batch of an evaluation."""

    images: torch.Tensor  # uint8 [B, S, S, 3]
    labels: torch.Tensor  # int64 [B]
    mask: torch.Tensor  # bool [B]: false for what only fills up the last batch
    replaced: int  # images that another one, or black, stands in for
    unreadable: list[int]  # indices of the files that could not be read


class Groups(Dataset):
    """Training groups by address: `groups[step, group]`."""

    def __init__(self, source: Source, recipe: Recipe):
        self.source = source
        self.recipe = recipe

    def __getitem__(self, address: tuple[int, int]) -> Batch:
        recipe, size = self.recipe, self.recipe.data.size
        images = torch.empty(recipe.group, size, size, 3, dtype=torch.uint8)
        labels = torch.empty(recipe.group, dtype=torch.int64)
        mask = torch.ones(recipe.group, dtype=torch.bool)
        replaced, unreadable = 0, set()
        for slot, position in enumerate(stream.positions(*address, recipe.batch, recipe.group)):
            index = stream.index_at(recipe.seed, position, len(self.source))
            view, labels[slot], failed = self._readable(index, position)
            images[slot] = torch.from_numpy(view)
            replaced += bool(failed)
            unreadable.update(failed)
        return Batch(images, labels, mask, replaced, sorted(unreadable))

    def _readable(self, index: int, position: int) -> tuple[np.ndarray, int, list[int]]:
        """View and label of the image at `index`, or of the next one that can be read.

        Nothing in that is random. With the indices of those that could not be read.
        """
        recipe, failed = self.recipe, []
        for offset in range(TRIES):
            candidate = (index + offset) % len(self.source)
            rng = stream.random(recipe.seed, stream.VIEW, position)
            try:
                data, label = self.source.read(candidate)
                view = train_view(decode(data), rng, recipe.data.size, recipe.augment)
                return view, label, failed
            except (OSError, Unreadable):
                failed.append(candidate)
        # So many in a row: black, with the right label.
        black = np.zeros((recipe.data.size, recipe.data.size, 3), np.uint8)
        return black, int(self.source.labels[index]), failed


class Addresses:
    """Addresses (step, group) of the training stream, from one step to another."""

    def __init__(self, start: int, stop: int, groups: int):
        self.start, self.stop, self.groups = start, stop, groups

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in range(self.start, self.stop):
            for group in range(self.groups):
                yield step, group


class Batches(Dataset):
    """Evaluation batches of one fixed shape; under the mask, each image exactly once."""

    def __init__(self, source: Source, batch: int, size: int, how: Evaluate):
        self.source, self.batch, self.size, self.how = source, batch, size, how

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch)

    def __getitem__(self, number: int) -> Batch:
        images = torch.zeros(self.batch, self.size, self.size, 3, dtype=torch.uint8)
        labels = torch.zeros(self.batch, dtype=torch.int64)
        mask = torch.zeros(self.batch, dtype=torch.bool)
        unreadable: list[int] = []
        first = number * self.batch
        for slot, index in enumerate(range(first, min(first + self.batch, len(self.source)))):
            labels[slot] = int(self.source.labels[index])
            mask[slot] = True
            try:
                image = decode(self.source.read(index)[0])
                view = evaluation_view(image, self.size, self.how)
                images[slot] = torch.from_numpy(view)
            except (OSError, Unreadable):
                unreadable.append(index)  # stays black and counts: a val set is never thinned
        return Batch(images, labels, mask, len(unreadable), unreadable)


def training_groups(
    source: Source, recipe: Recipe, start: int, workers: int, pin: bool
) -> Generator[Batch, None, None]:
    """Groups in the order of the stream from step `start` to the end of the schedule."""
    addresses = Addresses(start, recipe.schedule.steps, recipe.groups)
    ahead = max(2, -(-2 * recipe.groups // max(1, workers)))  # two steps' worth in all
    return _load(Groups(source, recipe), addresses, workers, pin, ahead)


def evaluation_batches(
    source: Source, batch: int, size: int, how: Evaluate, workers: int, pin: bool
) -> Generator[Batch, None, None]:
    """Every image of the source once, in its order, in the view that `how` asks for."""
    batches = Batches(source, batch, size, how)
    return _load(batches, range(len(batches)), workers, pin, ahead=2)


def _load(
    dataset: Dataset, sampler, workers: int, pin: bool, ahead: int
) -> Generator[Batch, None, None]:
    """The items of the sampler in its order. Closing the generator ends the workers."""
    loader = DataLoader(
        dataset,
        batch_size=None,  # an item is a group already
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=ahead if workers else None,
        worker_init_fn=_start_worker,
    )
    iterator = iter(loader)
    try:
        yield from iterator
    finally:
        # Its destructor tells the workers to end; left to the interpreter's exit, they would be
        # sent SIGTERM, which they ignore.
        del iterator, loader


def _start_worker(_: int) -> None:
    # A terminal sends Ctrl-C to every process, a batch system SIGTERM; only the main one decides
    # what they mean. Workers end when it tells them to, or when they see that it is gone.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
