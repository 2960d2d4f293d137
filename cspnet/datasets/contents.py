"""Findings from the contents of the image files, one by one and compared with each other."""

from array import array
from collections.abc import Callable, Iterator
from itertools import chain, pairwise

import numpy as np

from cspnet.datasets.findings import Finding, count_files
from cspnet.datasets.inspect_file import DIGEST_SIZE, TINY_SIDE, inspect_sources
from cspnet.sources.protocol import Source

# Kinds of findings about single files: severity and message. docs/data.md lists them.
FILE_FINDINGS = {
    "gone": ("error", "disappeared during the check"),
    "broken link": ("error", "broken link"),
    "unopenable": ("error", "cannot be opened"),
    "empty": ("error", "empty"),
    "truncated": ("error", "truncated; copy or download them again"),
    "unreadable": ("error", "cannot be decoded"),
    "unsupported": ("error", "no conversion to 8-bit RGB is defined"),
    "huge": ("error", "too large to decode"),
    "ribbon": ("error", "too long and narrow; `predict` and evaluations refuse them"),
    "damaged": ("warning", "damaged according to Pillow, but OpenCV decodes them"),
    "misnamed": ("note", "format differs from the suffix; decoded anyway"),
    "CMYK": ("note", "CMYK, converted to RGB without a colour profile"),
    "grey": ("note", "greyscale, converted to three equal channels"),
    "alpha": ("note", "transparency, which is dropped"),
    "16 bits": ("note", "more than 8 bits per sample, scaled to 8 bits"),
    "few levels": ("note", "sample range smaller than 8 bits, scaled to 0…255"),
    "turned": ("note", "stored rotated or mirrored; the orientation tag is applied"),
    "broken EXIF": ("note", "damaged EXIF or orientation tag; no orientation is applied"),
    "XMP orientation": ("warning", "different orientation in XMP, which is ignored"),
    "frames": ("note", "several frames or pages, of which the first is used"),
    "tiny": ("note", f"shorter side of less than {TINY_SIDE} pixels"),
}
# Kinds of findings about files with identical contents.
DUPLICATE_FINDINGS = {
    "leak": ("error", "also in train, so the score does not measure generalization"),
    "two classes": ("warning", "in several classes; at most one of the labels is correct"),
    "twice": ("note", "identical files within a class"),
}


def content_findings(
    sources: dict[str, Source], workers: int, progress: Callable[[int, int], None]
) -> Iterator[Finding]:
    """Read all files of the splits with `workers` processes.

    `progress` is called with the number of files done and their total. Memory holds a digest per
    file and the indices of the files with findings.
    """
    splits, total, done = list(sources.items()), sum(map(len, sources.values())), 0
    digests = [np.zeros((len(source), DIGEST_SIZE), np.uint8) for _, source in splits]
    indices: dict[tuple[str, int, str], array] = {}  # by kind, split and detail
    progress(0, total)
    for split, first, inspections in inspect_sources(list(sources.values()), workers):
        for index, inspection in enumerate(inspections, first):
            if inspection.digest:
                digests[split][index] = np.frombuffer(inspection.digest, np.uint8)
            for kind, detail in inspection.findings:
                indices.setdefault((kind, split, detail), array("I")).append(index)
        done += len(inspections)
        progress(done, total)
    for kind, (severity, phrase) in FILE_FINDINGS.items():
        for key in sorted(key for key in indices if key[0] == kind):
            name, source = splits[key[1]]
            files = [source.name(index) for index in indices[key]]
            detail = f" ({key[2]})" * bool(key[2])
            yield Finding(kind, severity, f"{name}, {count_files(files)}: {phrase}{detail}", files)
    if splits:
        yield from _duplicate_findings(splits, digests)


def _duplicate_findings(
    splits: list[tuple[str, Source]], digests: list[np.ndarray]
) -> Iterator[Finding]:
    """Files with identical contents: in train and val, in several classes, within a class."""
    starts = np.cumsum([0, *map(len, digests)])
    groups: dict[tuple[str, int], list[list[str]]] = {}  # identical files, by kind and split
    for duplicates in _equal_rows(np.concatenate(digests)):
        owners = np.searchsorted(starts, duplicates, side="right") - 1
        files: list[list[str]] = []  # by split
        for split, (_, source) in enumerate(splits):
            own = duplicates[owners == split] - starts[split]
            files.append([source.name(index) for index in own])
            if len(own) > 1:
                kind = "twice" if len(set(source.labels[own].tolist())) == 1 else "two classes"
                groups.setdefault((kind, split), []).append(files[-1])
        if sum(map(bool, files)) > 1:
            groups.setdefault(("leak", 1), []).append([*chain(*files)])
    for kind, (severity, phrase) in DUPLICATE_FINDINGS.items():
        for split, (name, _) in enumerate(splits):
            if same := groups.get((kind, split)):
                images = f"{len(same):,} image" + "s" * (len(same) > 1)
                message = f"{name}, {images}: {phrase}"
                yield Finding(kind, severity, message, [*chain(*same)], same)


def _equal_rows(digests: np.ndarray) -> list[np.ndarray]:
    """Sorted groups of indices of equal nonzero rows of uint8 [N, DIGEST_SIZE]."""
    known = np.flatnonzero(digests.any(1))
    words = digests[known].view(np.uint64)  # [M, 2]
    order = np.lexsort(words.T)
    is_first = np.ones(len(order) + 1, bool)
    is_first[1:-1] = (words[order[1:]] != words[order[:-1]]).any(1)
    bounds = np.flatnonzero(is_first)
    groups = [known[order[a:b]] for a, b in pairwise(bounds) if b - a > 1]
    return sorted(groups, key=lambda group: int(group[0]))
