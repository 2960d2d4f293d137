"""Findings about a data set from the names, sizes and paths of its files, without reading them."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cspnet.errors import DataError
from cspnet.sources import messages
from cspnet.sources.data_root import require_classes
from cspnet.sources.folder import Folder
from cspnet.sources.names import TRAINING, count_and_names, fold_name
from cspnet.sources.protocol import Source
from cspnet.sources.tree import is_image, is_system, walk

SMALL_CLASS_RATIO = 0.1  # to the median class size: a smaller class is nearly empty
MIN_VALIDATION_IMAGES = 100  # with fewer, each image is more than one percent of top-1 accuracy
SAMPLED_IMAGES = 100  # validation images whose names are looked up in the training set

# Kinds of ignored files: severity, whether folders are counted, too, and message.
IGNORED = {
    "broken link": ("error", False, "broken link"),
    "loose": ("warning", False, "next to the class folders, not in one; ignored"),
    "hidden": ("note", True, "name starts with a dot; ignored"),
    "system": ("note", True, "created by an operating system, file server or notebook; ignored"),
    "other files": ("note", False, "no image suffix; ignored"),
}


@dataclass(frozen=True)
class Finding:
    """An observation about a data set."""

    kind: str
    severity: str  # error, warning or note
    message: str
    files: list[str] = field(default_factory=list)  # paths of all files concerned
    groups: list[list[str]] = field(default_factory=list)  # groups of files with the same contents
    classes: list[str] = field(default_factory=list)  # names of all classes concerned


def count_files(names: list[str], or_folders: bool = False) -> str:
    """For example "1 file" or "2,000 files"; with `or_folders`, "2 files or folders"."""
    plural = "s" * (len(names) != 1)
    return f"{len(names):,} file{plural}" + f" or folder{plural}" * or_folders


def image_counts(source: Source) -> np.ndarray:
    """Number of images per class, int64 [K]."""
    return np.bincount(source.labels, minlength=len(source.classes))


def class_findings(name: str, source: Source) -> Iterator[Finding]:
    """Empty, single, small and similarly named classes of the split `name`."""
    counts = image_counts(source)
    median = float(np.median(counts))
    without = [source.classes[k] for k in np.flatnonzero(counts == 0)]
    if without:
        message = f"{name}: no images of {count_and_names(without, 'class')} listed in classes.txt"
        if isinstance(source, Folder):
            message = messages.empty_classes(source.root, without)
        yield Finding("empty class", "error", message, classes=without)
    if len(counts) == 1:
        message = f"{name}: only one class ({source.classes[0]}); training needs at least two"
        yield Finding("one class", "error", message, classes=source.classes)
    is_small = (counts > 0) & (counts < SMALL_CLASS_RATIO * median)
    small = [source.classes[k] for k in np.flatnonzero(is_small)]
    if small:
        message = (
            f"{name}: {count_and_names(small, 'class')} with less than a tenth of the median class "
            f"size ({median:g} images)"
        )
        yield Finding("small class", "warning", message, classes=small)
    by_folded_name: dict[str, list[str]] = {}
    for label in source.classes:
        by_folded_name.setdefault(fold_name(label), []).append(label)
    similar = [label for labels in by_folded_name.values() if len(labels) > 1 for label in labels]
    if similar:
        message = (
            f"{name}: {count_and_names(similar, 'class')} with nearly identical names. "
            "Is this intended?"
        )
        yield Finding("alike", "warning", message, classes=similar)


def ignored_file_findings(name: str, source: Folder) -> Iterator[Finding]:
    """Files and folders in the folder of the split `name` that are not read."""
    ignored: dict[str, list[str]] = {kind: [] for kind in IGNORED}
    skipped: list[str] = []  # folders
    for entry in sorted(os.scandir(source.root), key=lambda entry: entry.name):
        if not os.path.exists(entry.path):
            ignored["broken link"].append(entry.path)
        elif is_system(entry.name) or entry.name.startswith("."):
            skipped.append(entry.path)
        elif is_image(entry.name):
            ignored["loose"].append(entry.path)
    for label in source.classes:
        for folder, names in walk(source.root / label, skipped):
            for file in sorted(names):
                path = os.path.join(folder, file)
                if is_image(file):
                    continue
                if not os.path.exists(path):
                    ignored["broken link"].append(path)
                elif is_system(file):
                    ignored["system"].append(path)
                elif file.startswith("."):
                    ignored["hidden"] += [path] * is_image(file.lstrip("._"))
                else:
                    ignored["other files"].append(path)
    for path in skipped:
        if is_system(os.path.basename(path)):
            ignored["system"].append(path)
        else:
            ignored["hidden"] += [path] * _contains_images(path)
    for kind, (severity, or_folders, phrase) in IGNORED.items():
        if not (paths := ignored[kind]):
            continue
        kinds = []
        if kind == "system":
            kinds = Counter(map(os.path.basename, paths)).most_common(5)
        elif kind == "other files":
            counts = Counter(map(_suffix, paths))
            paths.sort(key=lambda path: (-counts[_suffix(path)], _suffix(path)))
            kinds = Counter(map(_suffix, paths)).most_common(5)
        listed = ", ".join(f"{count:,} × {kind}" for kind, count in kinds)
        message = f"{name}, {count_files(paths, or_folders)}: {phrase}" + f": {listed}" * bool(
            kinds
        )
        yield Finding(kind, severity, message, paths)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "no suffix"


def _contains_images(folder: str) -> bool:
    with contextlib.suppress(OSError):
        return any(map(is_image, os.listdir(folder)))
    return False


def class_name_findings(where: str, training: Source, validation: Source) -> Iterator[Finding]:
    """Differences between the class names of the two splits of the data set `where`."""
    try:
        require_classes(validation, training.classes, where, TRAINING)
    except DataError as error:
        differing = sorted(set(training.classes) ^ set(validation.classes))
        yield Finding("classes", "error", str(error), classes=differing)


def overlap_findings(training: Source, validation: Source) -> Iterator[Finding]:
    """Signs that the two splits are swapped or share files, from sizes and paths."""
    if len(validation) > len(training):
        message = f"val has more images than train ({len(validation):,} and {len(training):,})"
        yield Finding("exchanged", "warning", f"{message}. Are the two swapped?")
    if 0 < len(validation) < MIN_VALIDATION_IMAGES:
        message = f"val: only {len(validation)} images, so each one counts "
        yield Finding("few", "warning", f"{message}{100 / len(validation):.2g} % of top-1 accuracy")
    if not (isinstance(training, Folder) and isinstance(validation, Folder)):
        return
    if _same_file(training.root, validation.root):
        message = f"{validation.root} and {training.root} are the same folder"
        yield Finding("same files", "error", f"{message}; the score is meaningless")
        return
    shared = [
        label
        for label in validation.classes
        if _same_file(training.root / label, validation.root / label)
    ]
    if shared:
        message = f"val and train share the folders of {count_and_names(shared, 'class')}"
        yield Finding("same files", "error", f"{message}; the score is inflated", classes=shared)
        return
    yield from _shared_name_findings(training, validation)


def _shared_name_findings(training: Folder, validation: Folder) -> Iterator[Finding]:
    """Whether a sample of the validation images are links or copies of namesakes in train."""
    if not len(validation):
        return
    indices = np.unique(np.linspace(0, len(validation) - 1, SAMPLED_IMAGES).astype(int))
    names = [validation.name(index) for index in indices]
    pairs = [(name, training.root / os.path.relpath(name, validation.root)) for name in names]
    linked = [name for name, other in pairs if _same_file(name, other)]
    copied = [name for name, other in pairs if _same_size(name, other)]
    sample = f"of {len(names)} sampled val images"
    if linked:
        message = f"{len(linked)} {sample} are links to files of train; the score is inflated"
        yield Finding("same files", "error", message, linked)
    elif len(copied) > len(names) / 2:
        message = (
            f"{len(copied)} {sample} have the name and size of a train image. Are they copies?"
        )
        yield Finding("copies", "warning", message, copied)


def _same_file(one: str | Path, other: str | Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    return False


def _same_size(one: str | Path, other: str | Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.getsize(one) == os.path.getsize(other)
    return False
