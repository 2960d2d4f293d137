"""What names, sizes and places of a data set's files tell, without a look into any."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cspnet.errors import DataError
from cspnet.sources import messages
from cspnet.sources.data_root import Folder, Source, require_classes
from cspnet.sources.names import TRAINING, count_and_names, fold_name
from cspnet.sources.tree import is_image, is_system, walk

SHARE = 0.1  # of the median: a class with less is nearly empty
FEW = 100  # validation images: each of less is more than one percent of top-1
SAMPLE = 100  # validation images whose names are looked up among the training images


@dataclass(frozen=True)
class Finding:
    """Something that was found in a data set."""

    kind: str
    severity: str  # error, warning or note
    message: str
    files: list[str] = field(default_factory=list)  # all that it is about, by their paths
    groups: list[list[str]] = field(default_factory=list)  # the files by picture, of the same bytes
    classes: list[str] = field(default_factory=list)  # all that it is about


def count_files(names: list[str]) -> str:
    """How many they are, in words."""
    return f"{len(names):,} file" + "s" * (len(names) != 1)


def image_counts(source: Source) -> np.ndarray:
    """Images of each class, int64 [K]."""
    return np.bincount(source.labels, minlength=len(source.classes))


def of_classes(name: str, source: Source) -> Iterator[Finding]:
    """What the classes of a part and their sizes tell."""
    counts = image_counts(source)
    middle = float(np.median(counts))
    without = [source.classes[k] for k in np.flatnonzero(counts == 0)]
    if without:
        told = f"{name}: no image of {count_and_names(without, 'class')}, which classes.txt lists"
        if isinstance(source, Folder):
            told = messages.empty_classes(source.root, without)
        yield Finding("empty class", "error", told, classes=without)
    if len(counts) == 1:
        told = f"{name}: one class only ({source.classes[0]}); training needs two"
        yield Finding("one class", "error", told, classes=source.classes)
    few = [source.classes[k] for k in np.flatnonzero((counts > 0) & (counts < SHARE * middle))]
    if few:
        told = f"{name}: {count_and_names(few, 'class')} with less than a tenth of the median of "
        yield Finding("small class", "warning", f"{told}{middle:g} images", classes=few)
    folded: dict[str, list[str]] = {}
    for label in source.classes:
        folded.setdefault(fold_name(label), []).append(label)
    twins = [label for labels in folded.values() if len(labels) > 1 for label in labels]
    if twins:
        told = (
            f"{name}: {count_and_names(twins, 'class')} whose names hardly differ: are they meant?"
        )
        yield Finding("alike", "warning", told, classes=twins)


def of_strays(name: str, source: Folder) -> Iterator[Finding]:
    """What lies in the folder of a part and is not read."""
    lost, loose, hidden, system = [], [], [], []
    others: dict[str, list[str]] = {}  # by suffix
    skipped: list[str] = []  # folders
    for entry in sorted(os.scandir(source.root), key=lambda entry: entry.name):
        if not os.path.exists(entry.path):
            lost.append(entry.path)
        elif is_system(entry.name) or entry.name.startswith("."):
            skipped.append(entry.path)
        elif is_image(entry.name):
            loose.append(entry.path)
    for label in source.classes:
        for folder, names in walk(source.root / label, skipped):
            for file in sorted(names):
                path = os.path.join(folder, file)
                if is_image(file):
                    continue
                if not os.path.exists(path):
                    lost.append(path)
                elif is_system(file):
                    system.append(path)
                elif file.startswith("."):
                    hidden += [path] * is_image(file.lstrip("._"))
                else:
                    suffix = os.path.splitext(file)[1].lower() or "no suffix"
                    others.setdefault(suffix, []).append(path)
    for path in skipped:
        if is_system(os.path.basename(path)):
            system.append(path)
        else:
            hidden += [path] * _holds_images(path)
    yield from _strays(name, lost, loose, hidden, system, others)


def _strays(
    name: str,
    lost: list[str],
    loose: list[str],
    hidden: list[str],
    system: list[str],
    others: dict[str, list[str]],
) -> Iterator[Finding]:
    if lost:
        told = f"{name}: {count_files(lost)} linked to nowhere"
        yield Finding("broken link", "error", told, lost)
    if loose:
        told = f"{name}: {count_files(loose)} beside the class folders, of no class and not read"
        yield Finding("loose", "warning", told, loose)
    if hidden:
        told = f"{name}: {count_files(hidden)} or folders with a dot in front, not read"
        yield Finding("hidden", "note", told, hidden)
    if system:
        counts = Counter(os.path.basename(path) for path in system)
        kinds = ", ".join(f"{count:,} × {kind}" for kind, count in counts.most_common(5))
        told = f"{name}: {count_files(system)} or folders of an operating system, file server or "
        yield Finding("system", "note", f"{told}notebook, not read: {kinds}", system)
    if others:
        most = sorted(others.items(), key=lambda item: (-len(item[1]), item[0]))
        kinds = ", ".join(f"{len(paths):,} × {suffix}" for suffix, paths in most[:5])
        every = [path for _, paths in most for path in paths]
        told = f"{name}: {count_files(every)} of no image suffix, not read: {kinds}"
        yield Finding("other files", "note", told, every)


def _holds_images(folder: str) -> bool:
    with contextlib.suppress(OSError):
        return any(map(is_image, os.listdir(folder)))
    return False


def of_pair(where: str, training: Source, validation: Source) -> Iterator[Finding]:
    """Whether the classes of the two parts of `where` are the same, by name."""
    try:
        require_classes(validation, training.classes, where, TRAINING)
    except DataError as error:
        either = sorted(set(training.classes) ^ set(validation.classes))
        yield Finding("classes", "error", str(error), classes=either)


def of_sharing(training: Source, validation: Source) -> Iterator[Finding]:
    """What sizes and places tell of two parts that should have nothing in common."""
    if len(validation) > len(training):
        told = f"val has more images than train ({len(validation):,} and {len(training):,})"
        yield Finding("exchanged", "warning", f"{told}: are the two exchanged?")
    if 0 < len(validation) < FEW:
        told = f"val: {len(validation)} images only, each of them {100 / len(validation):.2g} %"
        yield Finding("few", "warning", f"{told} of top-1")
    if not (isinstance(training, Folder) and isinstance(validation, Folder)):
        return
    if _same_file(training.root, validation.root):
        told = f"{validation.root} and {training.root} are the same folder"
        yield Finding("same files", "error", f"{told}: a score will say nothing")
        return
    shared = [
        label
        for label in validation.classes
        if _same_file(training.root / label, validation.root / label)
    ]
    if shared:
        told = f"val and train have the same folders of {count_and_names(shared, 'class')}"
        yield Finding("same files", "error", f"{told}: a score will say little", classes=shared)
        return
    yield from _of_namesakes(training, validation)


def _of_namesakes(training: Folder, validation: Folder) -> Iterator[Finding]:
    """Whether validation images are training images of the same name; some are looked up."""
    if not len(validation):
        return
    indices = np.unique(np.linspace(0, len(validation) - 1, SAMPLE).astype(int))
    names = [validation.name(index) for index in indices]
    pairs = [(name, training.root / os.path.relpath(name, validation.root)) for name in names]
    linked = [name for name, other in pairs if _same_file(name, other)]
    copied = [name for name, other in pairs if _same_size(name, other)]
    looked = f"of {len(names)} images of val that were looked up"
    if linked:
        told = f"{len(linked)} {looked}, are links to the files of train: a score will say little"
        yield Finding("same files", "error", told, linked)
    elif len(copied) > len(names) / 2:
        told = f"{len(copied)} {looked}, have names and sizes of images of train: copies?"
        yield Finding("copies", "warning", told, copied)


def _same_file(one: str | Path, other: str | Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    return False


def _same_size(one: str | Path, other: str | Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.getsize(one) == os.path.getsize(other)
    return False
