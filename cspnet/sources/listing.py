"""A digest of the images of a data set: names, sizes and labels, without reading the images.

A resumed run compares the digests with those in its checkpoint: the order of training images
depends on their indices, so a run cannot continue with another listing.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from cspnet.sources.names import count_and_names
from cspnet.sources.protocol import Source
from cspnet.text import printable


@dataclass(frozen=True)
class Listing:
    """Hexadecimal digests of one split."""

    images: int
    labels: str  # digest of the class index of each image, in order
    contents: list[str]  # for each class: digest of the names and sizes of its images, in order

    @classmethod
    def of(cls, source: Source) -> "Listing":
        """The listing of an open source. OSError if the size of a file cannot be read."""
        contents = [hashlib.blake2b(digest_size=8) for _ in source.classes]
        prefixes = [f"{name}/" for name in source.classes]
        for (name, size), label in zip(source.listing(), source.labels.tolist(), strict=True):
            line = f"{name.removeprefix(prefixes[label])}\0{size}\n"
            contents[label].update(line.encode(errors="surrogateescape"))
        labels = hashlib.blake2b(
            np.ascontiguousarray(source.labels, np.int32).tobytes(), digest_size=16
        )
        return cls(len(source), labels.hexdigest(), [d.hexdigest() for d in contents])


def compare_listings(
    split: str, then: Listing, now: Listing, classes: list[str]
) -> tuple[list[str], list[str]]:
    """Differences between two listings of a split with the same classes: label changes, others.

    If two classes exchanged their images, this is reported as a change of labels, although the
    set of names is the same.
    """
    if then == now:
        return [], []
    if then.images != now.images:
        return [f"{split} had {then.images:,} images and now has {now.images:,}"], []
    before = {digest: name for name, digest in zip(classes, then.contents, strict=True)}
    pairs = zip(classes, then.contents, now.contents, strict=True)
    changed = [(name, digest) for name, old, digest in pairs if digest != old]
    moved = [
        printable(f"{split}: the images of class {before[digest]} are now in class {name}")
        for name, digest in changed
        if digest in before
    ]
    if moved:
        return moved[:3] + [f"{split}: and more"] * (len(moved) > 3), []
    which = count_and_names([name for name, _ in changed], "class")
    if then.labels != now.labels:
        return [f"{split}: images were moved between classes, or added and removed, in {which}"], []
    return [], [f"{split}: names or sizes of files changed in {which}; the labels did not"]
