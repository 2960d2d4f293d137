"""Sources of single files: class folders, a list of files, the embedded digits."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cspnet.errors import DataError
from cspnet.sources import messages
from cspnet.sources.downloads import known_layout
from cspnet.sources.protocol import require_nonempty_classes
from cspnet.sources.tree import IMAGE_SUFFIXES, is_image, list_folders, walk


class Folder:
    """A folder with one sub-folder per class, searched recursively; links are followed.

    Raises DataError if the folder has no class folders, or, unless `allow_empty`, if one of them
    has no images. The paths are stored as one block of bytes with offsets: the reference counts of
    a million strings would be touched, and so the strings copied, in every dataloader worker
    (pytorch#13246).
    """

    def __init__(self, root: str | Path, allow_empty: bool = False):
        self.root = Path(root)
        self.classes = list_folders(self.root)
        if problem := known_layout(self.root):
            raise DataError(problem)
        if not self.classes:
            raise DataError(messages.no_class_folders(self.root))
        if problem := messages.wrong_level(self.root, self.classes):
            raise DataError(problem)
        paths: list[bytes] = []
        counts = []
        for name in self.classes:
            images = sorted(_images(self.root, name))
            paths.extend(images)
            counts.append(len(images))
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        if not allow_empty:
            require_nonempty_classes(self, lambda names: messages.empty_classes(self.root, names))
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
            path, start = self._block[start:end], end
            try:
                size = os.stat(os.path.join(root, path)).st_size
            except OSError:  # a broken link; it is replaced like any unreadable image
                size = -1
            yield os.fsdecode(path), size


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8×8 grey, as PNG; every fifth one is held out."""

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
        images = np.rint(digits.images[self._indices] * (255 / 16)).astype(np.uint8)
        self._files = [cv2.imencode(".png", image)[1].tobytes() for image in images]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"digits/{self._indices[index]}.png"

    def read(self, index: int) -> tuple[bytes, int]:
        return self._files[index], int(self.labels[index])

    def listing(self) -> Iterator[tuple[str, int]]:
        return ((self.name(index), len(file)) for index, file in enumerate(self._files))


class Files:
    """Files given by path. They have no classes: every label is 0."""

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
    """Expand files and folders to image files: given files as they are, folders recursively.

    The order is that of `paths`, sorted within a folder; each file is listed once. Raises DataError
    if a path does not exist, or if a folder contains no image.
    """
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        shown = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        raise DataError(f"no such file or folder: {shown}")
    images: dict[str, str] = {}
    for path in paths:
        files = [path]
        if os.path.isdir(path):
            folder = Path(path)
            files = sorted(str(folder / os.fsdecode(image)) for image in _images(folder, "."))
            if not files:
                raise DataError(
                    f"{folder} contains no image ({', '.join(IMAGE_SUFFIXES[:3])} …), but "
                    f"{messages.folder_listing(folder)}"
                )
        for file in files:
            images.setdefault(os.path.abspath(file), file)
    return list(images.values())


def _images(root: Path, name: str) -> Iterator[bytes]:
    """Encoded paths, relative to `root`, of the images in its sub-folder `name`."""
    for folder, files in walk(root / name):
        relative = os.path.relpath(folder, root)
        for file in files:
            if is_image(file):
                yield os.fsencode(os.path.join(relative, file))
