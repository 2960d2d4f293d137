"""What images there are. A source is map-style: `read(i)` gives encoded bytes and a class index.

`classes` are the names in index order: folder names in plain string order, as torchvision sorts
them. A training and a validation set are matched by these names, never by index.
"""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from cspnet.errors import DataError
from cspnet.recipe.schema import DIGITS
from cspnet.sources import messages, parquet, roots, tar_set
from cspnet.sources.downloads import recognise
from cspnet.sources.names import NETWORK, TRAINING, class_differences
from cspnet.sources.parquet import ParquetSet, ParquetSource
from cspnet.sources.roots import SPLITS, VALIDATION_NAMES
from cspnet.sources.tar_set import TarSet, TarSource
from cspnet.sources.tree import SUFFIXES, folders, is_image, unreadable_folder, walk
from cspnet.text import printable

Place = Path | TarSet | ParquetSet  # of a part of a data set: class folders, or files


class Source(Protocol):
    classes: list[str]
    labels: np.ndarray  # int32 [N]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]:
        """Encoded image and class index. OSError where the file cannot be read."""
        ...

    def name(self, index: int) -> str:
        """What to call the image in a message: its path."""
        ...

    def listing(self) -> Iterator[tuple[str, int]]:
        """Of each image in order: its name below the root, and its size in bytes. OSError."""
        ...


class Folder:
    """A folder with a sub-folder per class, searched to any depth; links are followed.

    Raises DataError where it is none, and for a class folder without images, if not `empty`.
    The paths are one block of bytes with offsets: a list of a million strings would be copied into
    every worker as its reference counts are touched (pytorch#13246).
    """

    def __init__(self, root: str | Path, empty: bool = False):
        self.root = Path(root)
        self.classes = folders(self.root)
        if mistake := recognise(self.root):
            raise DataError(mistake)
        if not self.classes:
            raise DataError(messages.no_classes(self.root))
        if mistake := messages.nested(self.root, self.classes):
            raise DataError(mistake)
        paths: list[bytes] = []
        counts = []
        for name in self.classes:
            before = len(paths)
            paths.extend(sorted(_images(self.root, name)))
            counts.append(len(paths) - before)
        without = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        if without and not empty:
            raise DataError(messages.empty_classes(self.root, without))
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._block = b"".join(paths)
        self._ends = np.cumsum([len(path) for path in paths], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return str(self.root / os.fsdecode(self._block[start : self._ends[index]]))

    def read(self, index: int) -> tuple[bytes, int]:
        with open(self.name(index), "rb") as file:
            return file.read(), int(self.labels[index])

    def listing(self) -> Iterator[tuple[str, int]]:
        root, start = os.fsencode(self.root), 0
        for end in self._ends.tolist():
            below, start = self._block[start:end], end
            try:
                size = os.stat(os.path.join(root, below)).st_size
            except OSError:  # a broken link is replaced like any unreadable image
                size = -1
            yield os.fsdecode(below), size


class Digits:
    """scikit-learn's 1,797 real handwritten digits, 8×8 grey, as PNG; each fifth is held out."""

    def __init__(self, train: bool):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise DataError(
                "the embedded digits need scikit-learn: pip install scikit-learn"
            ) from None
        import cv2

        digits = load_digits()
        held_out = np.arange(len(digits.target)) % 5 == 4
        self._indices = np.flatnonzero(held_out != train)
        self.classes = [str(digit) for digit in range(10)]
        self.labels = digits.target[self._indices].astype(np.int32)
        pictures = np.rint(digits.images[self._indices] * (255 / 16)).astype(np.uint8)
        self._files = [cv2.imencode(".png", picture)[1].tobytes() for picture in pictures]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"digits/{self._indices[index]}.png"

    def read(self, index: int) -> tuple[bytes, int]:
        return self._files[index], int(self.labels[index])

    def listing(self) -> Iterator[tuple[str, int]]:
        return ((self.name(index), len(file)) for index, file in enumerate(self._files))


class Files:
    """Files by their paths. They have no classes: every label is 0."""

    def __init__(self, paths: list[str]):
        self.paths = paths
        self.classes: list[str] = []
        self.labels = np.zeros(len(paths), np.int32)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> tuple[bytes, int]:
        with open(self.paths[index], "rb") as file:
            return file.read(), 0

    def listing(self) -> Iterator[tuple[str, int]]:
        return ((path, os.path.getsize(path)) for path in self.paths)


def find_images(paths: list[str]) -> list[str]:
    """The files among the paths as they are, and the images below the folders among them.

    In the order given, sorted within a folder, each path once. Raises DataError where a path leads
    nowhere, or a folder holds no image.
    """
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        shown = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        raise DataError(f"no such file or folder: {shown}")
    found: dict[str, str] = {}
    for path in paths:
        files = [path]
        if os.path.isdir(path):
            folder = Path(path)
            files = sorted(str(folder / os.fsdecode(image)) for image in _images(folder, "."))
            if not files:
                raise DataError(
                    f"{folder} holds no image ({', '.join(SUFFIXES[:3])} …); "
                    f"found there: {messages.listing(folder)}"
                )
        for file in files:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values())


def open_training(root: str) -> Source:
    """The training images below a data root. Writes nothing."""
    return Digits(train=True) if root == DIGITS else open_location(training_place(root))


def open_parts(root: str) -> tuple[Source, Source]:
    """The training and the validation images of a data root, which have the same classes.

    Raises DataError where they do not, or where one of them is missing. Writes nothing.
    """
    training, validation = open_training(root), _open_validation(root)
    require_classes(validation, training.classes, root, TRAINING)
    return training, validation


def open_validation(root: str, classes: list[str] | None, count: int | None = None) -> Source:
    """The validation images below a data root, or in a val folder itself, with a net's `classes`.

    Raises DataError where the folder's classes are not exactly `classes`, by name; where the net
    has no names (None), unless there are `count` of them.
    """
    source = _open_validation(root)
    if classes is not None:
        require_classes(source, classes, root)
    elif len(source.classes) != count:
        raise DataError(f"{root} has {len(source.classes)} classes, the network {count}")
    return source


def _open_validation(root: str) -> Source:
    return Digits(train=False) if root == DIGITS else open_location(validation_place(root))


def open_location(place: Place, empty: bool = False) -> Source:
    """The images in class folders, tar or parquet files; `empty` as theirs."""
    kinds = {TarSet: TarSource, ParquetSet: ParquetSource}
    return kinds.get(type(place), Folder)(place, empty)


def training_place(root: str) -> Place:
    """The files or the folder with the training images of a data root. Raises DataError."""
    if files := _files(require_data_folder(root), ("train",)):
        return files
    folder = training_folder(root)
    return tar_set.inside(folder) or folder


def validation_place(root: str) -> Place:
    """The same for validation; `root` itself where it is such a folder. Raises DataError."""
    if files := _files(require_data_folder(root), VALIDATION_NAMES):
        return files
    folder = validation_folder(root)
    return tar_set.inside(folder) or folder


def _files(root: Path, names: tuple[str, ...]) -> TarSet | ParquetSet | None:
    """The files that are a part of a data root by name."""
    return tar_set.beside(root, names) or parquet.beside(root, names)


def places(root: str, give: str = messages.GIVE) -> dict[str, Place]:
    """The parts of a data root, or the folder itself where it is a single one. Raises DataError."""
    folder = require_data_folder(root, give)
    if has_parts(folder):
        return {"train": training_place(root), "val": validation_place(root)}
    return {Path(os.path.abspath(folder)).name: tar_set.inside(folder) or folder}


def has_parts(folder: Path) -> bool:
    """Whether something in a folder is a part of a data set, by its name. Raises DataError."""
    return bool(roots.split_names(folder)) or any(_files(folder, (name,)) for name in SPLITS)


def training_folder(root: str) -> Path:
    """The folder train/ of a data root. Raises DataError where there is none."""
    folder = require_data_folder(root)
    if "train" not in roots.split_names(folder) or not os.path.isdir(folder / "train"):
        raise DataError(tar_set.is_part(folder) or messages.no_training_folder(folder))
    return folder / "train"


def validation_folder(root: str) -> Path:
    """The validation folder of a data root, or `root` where it is one itself. Raises DataError."""
    folder = require_data_folder(root)
    parts = [name for name in roots.split_names(folder) if os.path.isdir(folder / name)]
    named = [name for name in parts if name in VALIDATION_NAMES]
    if len(named) > 1:
        raise DataError(messages.two_validations(folder, named))
    if named:
        return folder / named[0]
    if "train" in parts:
        raise DataError(messages.no_validation(folder))
    if mistake := tar_set.no_validation(folder) or messages.training_as_validation(folder):
        raise DataError(mistake)
    return folder


def require_data_folder(root: str, give: str = messages.GIVE) -> Path:
    """The path of a data root, `~` expanded. Raises DataError where it is not a folder.

    `give` says how the command at hand is given one.
    """
    if "://" in root:
        raise DataError(messages.address(root))
    folder = Path(_spelled(root)).expanduser()
    if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
        raise unreadable_folder(OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder)))
    if not os.path.isdir(folder):
        raise DataError(messages.no_folder(folder, give))
    return folder


def _spelled(root: str) -> str:
    """A data root for a message, where `.` and `..` would look like a full stop."""
    return os.path.abspath(root) if os.path.normpath(root).endswith(".") else root


def display_names(classes: list[str]) -> list[str]:
    """What to call the classes before people: WordNet's first word for a synset, else the name.

    timm carries the words of ImageNet's synsets (n01440764 is a tench). What cannot be displayed or
    is no single line is escaped.
    """
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return list(map(printable, classes))
    from timm.data import ImageNetInfo  # seconds to import

    words = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
    return [words.get(name, name).partition(",")[0] for name in classes]


def require_classes(source: Source, classes: list[str], where: str, owner: str = NETWORK) -> None:
    """Raises DataError unless the source has exactly these classes, in this order of names.

    They are those of `owner`: NETWORK, or TRAINING, of which the source is the validation set.
    """
    if difference := class_differences(source.classes, classes, owner):
        told = "the classes are not those of the network"
        if owner == TRAINING:
            told = "the classes for validation are not those of train/"
        raise DataError(f"{_spelled(where)}: {told} ({len(classes)}): {difference}")


def _images(root: Path, name: str) -> Iterator[bytes]:
    """Encoded paths, relative to `root`, of the images in a class folder."""
    for folder, files in walk(root / name):
        below = os.path.relpath(folder, root)
        for file in files:
            if is_image(file):
                yield os.fsencode(os.path.join(below, file))
