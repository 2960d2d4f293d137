"""A digest of which images a data set has: names, sizes and labels, by their listing alone.

No image is read. A resumed run compares the digests with those of its checkpoint: the stream of
images is a function of the index of an image, so another listing is another run.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from cspnet.sources.data_root import Source
from cspnet.sources.names import count_and_names
from cspnet.text import printable


@dataclass(frozen=True)
class Listing:
    """Digests of one split, as hexadecimal text."""

    images: int
    labels: str  # of the class index of each image, in order
    contents: list[str]  # for each class: of the names and sizes of its images, in order

    @classmethod
    def of(cls, source: Source) -> "Listing":
        """The listing of an open source. OSError where the size of a file cannot be read."""
        contents = [hashlib.blake2b(digest_size=8) for _ in source.classes]
        prefixes = [f"{name}/" for name in source.classes]
        for (name, size), label in zip(source.listing(), source.labels.tolist(), strict=True):
            line = f"{name.removeprefix(prefixes[label])}\0{size}\n"
            contents[label].update(line.encode(errors="surrogateescape"))
        labels = hashlib.blake2b(np.ascontiguousarray(source.labels, np.int32), digest_size=16)
        return cls(len(source), labels.hexdigest(), [d.hexdigest() for d in contents])


def compare_listings(
    split: str, then: Listing, now: Listing, classes: list[str]
) -> tuple[list[str], list[str]]:
    """What sets two listings of a split with the same classes apart: label changes, other changes.

    Two classes that exchanged their images are a change of labels: the names alone do not show it.
    """
    if then == now:
        return [], []
    if then.images != now.images:
        return [f"{split} had {then.images:,} images, has {now.images:,} now"], []
    before = {digest: name for name, digest in zip(classes, then.contents, strict=True)}
    pairs = zip(classes, then.contents, now.contents, strict=True)
    changed = [(name, digest) for name, old, digest in pairs if digest != old]
    moved = [
        printable(f"{split}: the images of class {before[digest]} are in class {name} now")
        for name, digest in changed
        if digest in before
    ]
    if moved:
        return moved[:3] + [f"{split}: and so on"] * (len(moved) > 3), []
    which = count_and_names([name for name, _ in changed], "class")
    if then.labels != now.labels:
        return [f"{split}: images were moved between classes, or added and removed: {which}"], []
    return [], [f"{split}: files have other names or sizes in {which}; the labels are the same"]
