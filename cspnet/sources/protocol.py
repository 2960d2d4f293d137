"""The interface of a data source: map-style access to encoded images and their class indices."""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from cspnet.errors import DataError


class Source(Protocol):
    """Images with class labels.

    `classes` are the class names by index, in plain string order, as in torchvision. Training and
    validation sets are matched by these names, never by index.
    """

    classes: list[str]
    labels: np.ndarray  # int32 [N]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]:
        """Encoded image and class index. OSError if the file cannot be read."""
        ...

    def name(self, index: int) -> str:
        """Path of the image, for messages."""
        ...

    def listing(self) -> Iterator[tuple[str, int]]:
        """Name relative to the root and size in bytes of each image, in order. OSError."""
        ...


def require_nonempty_classes(source: Source, message: Callable[[list[str]], str]) -> None:
    """Raise DataError if a class has no image, with the `message` for the names of such classes."""
    counts = np.bincount(source.labels, minlength=len(source.classes))
    empty = [source.classes[index] for index in np.flatnonzero(counts == 0)]
    if empty:
        raise DataError(message(empty))
