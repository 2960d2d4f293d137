"""What images there are. A source is map-style: `read(i)` gives encoded bytes and a class index.

`classes` are the names in index order: folder names in plain string order, as torchvision sorts
them. A training and a validation set are matched by these names, never by index.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from cspnet.errors import DataError
from cspnet.recipe import DIGITS

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
VALIDATION = ("val", "valid", "validation")


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


class Folder:
    """A folder with a sub-folder per class, searched to any depth; links are followed.

    The paths are one block of bytes with offsets: a list of a million strings would be copied into
    every worker as its reference counts are touched (pytorch#13246).
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.classes = sorted(entry.name for entry in _entries(self.root) if entry.is_dir())
        if not self.classes:
            raise DataError(_no_classes(self.root))
        paths: list[bytes] = []
        counts = []
        for name in self.classes:
            before = len(paths)
            paths.extend(sorted(_images(self.root, name)))
            counts.append(len(paths) - before)
        empty = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        if empty:
            raise DataError(
                f"{self.root}: no image in {_some(empty, 'class folder')}. "
                f"Add images ({', '.join(SUFFIXES[:3])} …) or remove the folder."
            )
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
                    f"found there: {_listing(folder)}"
                )
        for file in files:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values())


def open_training(root: str) -> Source:
    """The training images below a data root."""
    if root == DIGITS:
        return Digits(train=True)
    folder = _existing(Path(root))
    if not (folder / "train").is_dir():
        raise DataError(
            f"{folder} has no folder train/. A data root holds train/ and val/, each with one "
            f"folder per class; found there: {_listing(folder)}"
        )
    return Folder(folder / "train")


def open_validation(root: str, classes: list[str] | None, count: int | None = None) -> Source:
    """The validation images below a data root, or in a val folder itself, with `classes` as labels.

    Raises DataError where the folder's classes are not exactly `classes`, by name; where the net
    has no names (None), unless there are `count` of them.
    """
    if root == DIGITS:
        source: Source = Digits(train=False)
    else:
        folder = _existing(Path(root))
        named = [folder / name for name in VALIDATION if (folder / name).is_dir()]
        if not named and (folder / "train").is_dir():
            raise DataError(
                f"{folder} has train/ but none of {', '.join(v + '/' for v in VALIDATION)}; "
                f"found there: {_listing(folder)}"
            )
        if len(named) > 1:
            raise DataError(f"{folder} has both {named[0].name}/ and {named[1].name}/: name one")
        source = Folder(named[0] if named else folder)
    if classes is not None:
        require_classes(source, classes, root)
    elif len(source.classes) != count:
        raise DataError(f"{root} has {len(source.classes)} classes, the network {count}")
    return source


def display_names(classes: list[str]) -> list[str]:
    """What to call the classes before people: WordNet's first word for a synset, else the name.

    timm carries the words of ImageNet's synsets (n01440764 is a tench).
    """
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return classes
    from timm.data import ImageNetInfo  # seconds to import

    words = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
    return [words.get(name, name).partition(",")[0] for name in classes]


def require_classes(source: Source, classes: list[str], where: str) -> None:
    """Raises DataError unless the source has exactly these classes, in this order of names."""
    have, want = set(source.classes), set(classes)
    missing = [name for name in classes if name not in have]
    extra = [name for name in source.classes if name not in want]
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"it lacks {_some(missing, 'class')}")
        if extra:
            parts.append(f"it has {_some(extra, 'class')} that the network was not trained for")
        raise DataError(
            f"{where}: the classes are not those of the network ({len(classes)}): "
            f"{'; '.join(parts)}. Folder names must be the class names of the training set."
        )


def _existing(folder: Path) -> Path:
    folder = folder.expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(
            f"the data folder {folder} {what}. Give one with --data DIR (or data.root=DIR); "
            f"--data {DIGITS} needs none."
        )
    return folder


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        return [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from None


def _images(root: Path, name: str) -> Iterator[bytes]:
    """Encoded paths, relative to `root`, of the images in a class folder."""
    for folder, _, files in os.walk(root / name, followlinks=True):
        below = os.path.relpath(folder, root)
        for file in files:
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                yield os.fsencode(os.path.join(below, file))


def _no_classes(folder: Path) -> str:
    flat = [entry.name for entry in _entries(folder) if entry.name.lower().endswith(SUFFIXES)]
    if flat:
        return (
            f"{folder} is flat: {len(flat)} images ({flat[0]} …) and no class folder. "
            "Sort them into one folder per class; data/README.md says how for ImageNet's val."
        )
    return f"{folder} has no class folder; found there: {_listing(folder)}"


def _listing(folder: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in _entries(folder))
    return ", ".join(names[:6]) + (" …" if len(names) > 6 else "") if names else "nothing"


def _some(names: list[str], noun: str) -> str:
    plural = noun if len(names) == 1 else noun + ("es" if noun.endswith("s") else "s")
    shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
    return f"{len(names)} {plural} ({shown})"
