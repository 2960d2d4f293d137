"""Buffers in shared memory, in which dataloader workers write their batches.

The main process acquires a free buffer for each batch and sends its slot number to a worker. The
worker writes the images there and returns the slot number and the labels. A slot becomes free when
the last reference to its images is gone. Allocating new memory for each batch would cost up to a
tenth of the decoding time in page faults.
"""

import itertools
import math
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch


class Batch(NamedTuple):
    """The images of a training group or of an evaluation batch."""

    images: torch.Tensor  # uint8 [B, S, S, 3]
    labels: torch.Tensor  # int64 [B]
    mask: torch.Tensor  # bool [B], false for the padding of the last batch
    replaced: int  # unreadable images, replaced by another image or by a black one
    unreadable: list[int]  # indices of the files that could not be read


class SharedBuffers:
    """A fixed number of buffers of `nbytes` bytes each, shared by all processes."""

    # The buffers of this process by number. A BatchHandle that arrives looks up its images here.
    pools: ClassVar[weakref.WeakValueDictionary[int, "SharedBuffers"]] = (
        weakref.WeakValueDictionary()
    )
    _numbers = itertools.count()

    def __init__(self, count: int, nbytes: int):
        self.number = next(self._numbers)
        self.memory = torch.empty(count, nbytes, dtype=torch.uint8).share_memory_()
        self._free = list(range(count))
        self.pools[self.number] = self

    def acquire(self) -> int | None:
        """A free slot, or None if all are in use."""
        return self._free.pop() if self._free else None

    def view(self, slot: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The images in a slot, uint8 of the given shape."""
        return self.memory[slot, : math.prod(shape)].view(shape)

    def lend(self, slot: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Like `view`, for an acquired slot, which is free again after the last reference."""
        images = self.view(slot, shape).numpy()
        weakref.finalize(images, self._free.append, slot).atexit = False
        return torch.from_numpy(images)  # the tensor and its views keep this very array alive


class SlotRequest(NamedTuple):
    """The address of a batch to load, and the slot to write it to. None: use new memory."""

    address: Any
    slot: int | None


class Addresses(Protocol):
    """The part of Sequence that a sampler needs."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class SlotSampler:
    """The addresses from index `start` on; with buffers, as SlotRequests.

    The slot is chosen when an address is requested, so it is one that is free by then.
    """

    def __init__(self, addresses: Addresses, start: int, buffers: SharedBuffers | None):
        self.addresses, self.start, self.buffers = addresses, start, buffers

    def __len__(self) -> int:
        return len(self.addresses) - self.start

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.start, len(self.addresses)):
            address = self.addresses[index]
            yield SlotRequest(address, self.buffers.acquire()) if self.buffers else address


class BatchHandle:
    """A batch on its way to the main process. Unpickling it there gives a Batch.

    The images stay in their slot. Without shared memory they are pickled.
    """

    def __init__(self, batch: Batch, buffers: SharedBuffers | None = None, slot: int | None = None):
        images, labels, mask, *rest = batch
        location = (buffers.number, slot, images.shape) if buffers else images.numpy()
        self._content = (location, labels.numpy(), mask.numpy(), *rest)

    def __reduce__(self):
        return _restore, self._content


def _restore(
    location: np.ndarray | tuple[int, int, torch.Size],
    labels: np.ndarray,
    mask: np.ndarray,
    replaced: int,
    unreadable: list[int],
) -> Batch:
    if isinstance(location, tuple):
        number, slot, shape = location
        images = SharedBuffers.pools[number].lend(slot, shape)
    else:
        images = torch.from_numpy(location)
    return Batch(images, torch.from_numpy(labels), torch.from_numpy(mask), replaced, unreadable)
