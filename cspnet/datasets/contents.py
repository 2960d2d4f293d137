"""What the contents of a data set's files tell, of each file and of all of them together."""

from array import array
from collections.abc import Callable, Iterator
from itertools import chain, pairwise

import numpy as np

from cspnet.datasets.findings import Finding, count_files
from cspnet.datasets.inspect_file import DIGEST, TINY, looks
from cspnet.sources.data_root import Source

# What a look at a file finds: how bad it is, and how to say it of some files.
KINDS = {
    "gone": ("error", "vanished while they were looked at"),
    "broken link": ("error", "linked to nowhere"),
    "unopenable": ("error", "cannot be opened"),
    "empty": ("error", "empty"),
    "truncated": ("error", "cut short: copy or download them again"),
    "unreadable": ("error", "that cannot be decoded"),
    "unsupported": ("error", "for which no conversion to 8-bit RGB is defined"),
    "huge": ("error", "too large to be decoded"),
    "ribbon": ("error", "too long and narrow: `predict` and evaluations refuse them"),
    "damaged": ("warning", "damaged by Pillow's account, though OpenCV decodes them"),
    "misnamed": ("note", "of another format than their suffix says, decoded all the same"),
    "CMYK": ("note", "in CMYK, turned into RGB without a colour profile"),
    "grey": ("note", "grey: the net gets three equal channels"),
    "alpha": ("note", "with transparency, which is dropped"),
    "16 bits": ("note", "of more than 8 bits a sample, scaled to 8"),
    "few levels": ("note", "of samples with a smaller range than 8 bits, scaled to 0…255"),
    "turned": ("note", "with an orientation other than upright, which is applied"),
    "broken EXIF": ("note", "with an orientation or EXIF that is damaged, so that none is applied"),
    "XMP orientation": ("warning", "with another orientation in XMP, which is not applied"),
    "frames": ("note", "of several frames or pages, of which the first counts"),
    "tiny": ("note", f"with a side of less than {TINY} pixels"),
}
# The same for a picture that lies in several files.
SAME = {
    "leak": ("error", "in train too: a score on them says nothing of new pictures"),
    "two classes": ("warning", "in several classes: at most one of the labels is right"),
    "twice": ("note", "several times in a class, byte by byte"),
}


def of_contents(
    sources: dict[str, Source], workers: int, progress: Callable[[int, int], None]
) -> Iterator[Finding]:
    """Reads all files of the parts, by `workers` processes; tells `progress` how many of how many.

    Kept are a digest of each file, and the indices of those that there is something to say of.
    """
    parts, total, done = list(sources.items()), sum(map(len, sources.values())), 0
    digests = [np.zeros((len(source), DIGEST), np.uint8) for _, source in parts]
    found: dict[tuple[str, int, str], array] = {}  # indices by kind, part and detail
    progress(0, total)
    for part, first, chunk in looks(list(sources.values()), workers):
        for index, look in enumerate(chunk, first):
            if look.digest:
                digests[part][index] = np.frombuffer(look.digest, np.uint8)
            for kind, detail in look.found:
                found.setdefault((kind, part, detail), array("I")).append(index)
        done += len(chunk)
        progress(done, total)
    for kind, (severity, phrase) in KINDS.items():
        for key in sorted(key for key in found if key[0] == kind):
            name, source = parts[key[1]]
            names = [source.name(index) for index in found[key]]
            detail = f" ({key[2]})" * bool(key[2])
            yield Finding(kind, severity, f"{name}: {count_files(names)} {phrase}{detail}", names)
    if parts:
        yield from _same_pictures(parts, digests)


def _same_pictures(parts: list[tuple[str, Source]], digests: list[np.ndarray]) -> Iterator[Finding]:
    """Files of the same bytes: in train and val, in several classes of a part, within a class."""
    starts = np.cumsum([0, *map(len, digests)])
    found: dict[tuple[str, int], list[list[str]]] = {}  # groups of files by kind and part
    for group in _equal(np.concatenate(digests)):
        owners = np.searchsorted(starts, group, side="right") - 1
        names: list[list[str]] = []
        for part, (_, source) in enumerate(parts):
            own = group[owners == part] - starts[part]
            names.append([source.name(index) for index in own])
            if len(own) > 1:
                kind = "twice" if len(set(source.labels[own].tolist())) == 1 else "two classes"
                found.setdefault((kind, part), []).append(names[-1])
        if sum(map(bool, names)) > 1:
            found.setdefault(("leak", 1), []).append([*chain(*names)])
    for kind, (severity, phrase) in SAME.items():
        for part, (name, _) in enumerate(parts):
            if groups := found.get((kind, part)):
                pictures = f"{len(groups):,} picture" + "s" * (len(groups) > 1)
                told = f"{name}: {pictures} {phrase}"
                yield Finding(kind, severity, told, [*chain(*groups)], groups)


def _equal(digests: np.ndarray) -> list[np.ndarray]:
    """Groups of indices of rows that are equal and not zero, in order; from uint8 [N, DIGEST]."""
    known = np.flatnonzero(digests.any(1))
    words = digests[known].view(np.uint64)  # [M, 2]
    order = np.lexsort(words.T)
    fresh = np.ones(len(order) + 1, bool)
    fresh[1:-1] = (words[order[1:]] != words[order[:-1]]).any(1)
    bounds = np.flatnonzero(fresh)
    groups = [known[order[a:b]] for a, b in pairwise(bounds) if b - a > 1]
    return sorted(groups, key=lambda group: int(group[0]))
