"""Images that stay in tar files: an index says where in them each one lies.

A tar file holds class folders (`apple/0.jpg`) or samples as WebDataset has them (`0.jpg` with
`0.cls` or `0.json`). The order is that of a folder: by class, then by name. Names inside a tar file
sort and label; none is ever opened as a path.
"""

import contextlib
import errno
import io
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cspnet.errors import DataError
from cspnet.shell import command_line
from cspnet.sources import messages, tar_members
from cspnet.sources.roots import SPLITS
from cspnet.sources.tar_members import Image, TarError
from cspnet.text import printable

VERSION = 1
MAX_IMAGE_BYTES = 2**30  # of an image: more is none, and would only fill the memory
NUMBERED = r"([-_]\d+(-of-\d+)?)?\.tar"  # what follows on the name of a part
KEPT_OPEN = 256  # files a process; the system grants 1,024, and sets of more shards are seldom
ARRAYS = {  # of an index, by type; one entry for each image
    "ends": "int64",
    "shards": "int32",
    "offsets": "int64",
    "sizes": "int64",
    "labels": "int32",
}


@dataclass(frozen=True)
class TarSet:
    """Tar files that are one part of a data set, and what belongs to them."""

    where: str  # what to call them in a message
    files: tuple[Path, ...]
    index: Path

    def stamp(self) -> dict:
        """What an index is for. Raises DataError where a tar file is not there or is no file."""
        shards = []
        for file in self.files:
            try:
                status = os.stat(file)
            except OSError as error:
                raise DataError(f"{file} cannot be opened: {error.strerror}") from None
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{file} is not a regular file, so there is no reading in it")
            shards.append([file.name, status.st_size, status.st_mtime_ns])
        return {
            "version": VERSION,
            "shards": shards,
            "listed": tar_members.listed(self.index.parent),
        }


def inside(folder: Path) -> TarSet | None:
    """The tar files in a folder. Raises DataError where class folders lie beside them.

    Tar files with the names of the folders are what these were unpacked from: left alone.
    """
    found = messages.entries(folder)
    tars = [entry.name for entry in found if entry.name.endswith(".tar") and not entry.is_dir()]
    folders = [entry.name for entry in found if entry.is_dir()]
    if {name.removesuffix(".tar") for name in tars} <= set(folders):
        return None
    if folders:
        raise DataError(
            f"{folder} holds both {messages.count_and_names(folders, 'folder')} and "
            f"{messages.count_and_names(tars, 'tar file')}: which are the images? Move one kind elsewhere."
        )
    return TarSet(str(folder), tuple(folder / name for name in tars), folder / "index.cspnet")


def beside(root: Path, names: tuple[str, ...]) -> TarSet | None:
    """Tar files in a data root that are a part of it by name: `train.tar`, or `train-0.tar` ….

    One that was unpacked, into `train/`, is left alone. Raises DataError where there are several.
    """
    try:
        here = [entry.name for entry in messages.entries(root) if not entry.is_dir()]
    except DataError:  # what cannot be listed may have a train/ that can
        return None
    kinds: dict[str, list[str]] = {}
    for name in names:
        unpacked = (root / name).is_dir()
        files = [file for file in here if re.fullmatch(name + NUMBERED, file)]
        if files and not (unpacked and files == [f"{name}.tar"]):
            kinds[name] = files
    if not kinds:
        return None
    (name, files), *others = kinds.items()
    further = [f"{other}/" for other in names if (root / other).is_dir()]
    further += [found[0] for _, found in others]
    if further:
        raise DataError(
            f"{root} has {messages.count_and_names(files, 'tar file')}, and {', '.join(further)} too: "
            "which are the images? Keep one."
        )
    paths = tuple(root / file for file in files)
    return TarSet(str(root / f"{name}*.tar"), paths, root / f"{name}.index.cspnet")


def is_part(folder: Path) -> str:
    """For a folder of tar files that is given as a data root and is a part of one; else nothing."""
    here = Path(os.path.abspath(folder))
    if here.name not in SPLITS or not inside(folder):
        return ""
    told = f"{folder} has no folder train/. It holds the tar files of {here.name}/"
    return f"{told}: give the one above, {here.parent}."


def no_validation(root: Path) -> str:
    """For a data root with tar files for training and none to validate on; else nothing."""
    tars = beside(root, ("train",))
    if not tars:
        return ""
    names = ", ".join(f"{name}.tar" for name in messages.VALIDATION_NAMES)
    return f"{root} has {tars.files[0].name}, but none of {names}. Split off some images."


class Index(NamedTuple):
    """Where the images are, by class and name."""

    classes: list[str]
    block: bytes  # the names, one after the other
    ends: np.ndarray  # int64 [N], of the names in the block
    shards: np.ndarray  # int32 [N]
    offsets: np.ndarray  # int64 [N]
    sizes: np.ndarray  # int64 [N]
    labels: np.ndarray  # int32 [N]


class TarSource:
    """The images in tar files, as a source.

    Opens its index, or makes one in memory; `save` puts that beside the tar files. Raises DataError
    where a tar file is damaged or its images have no classes; where a class has no image, if not
    `empty`. A file is opened by the process that reads from it first, and read by position.
    """

    def __init__(
        self,
        tars: TarSet,
        empty: bool = False,
        save: bool = False,
        again: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.tars = tars
        index = _open_index(tars, save, again, progress)
        self.classes, self.labels = index.classes, index.labels
        self._index = index
        counts = np.bincount(index.labels, minlength=len(index.classes))
        without = [index.classes[k] for k in np.flatnonzero(counts == 0)]
        if without and not empty:
            raise DataError(
                f"{tars.where}: no image of {messages.count_and_names(without, 'class')}, which classes.txt "
                "lists. Add their shards, or empty their lines."
            )
        self._descriptors: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The path of the tar file, a colon, and the name in it."""
        start = self._index.ends[index - 1] if index else 0
        name = self._index.block[start : self._index.ends[index]]
        return f"{self.tars.files[self._index.shards[index]]}:{tar_members.text(name)}"

    def read(self, index: int) -> tuple[bytes, int]:
        size, offset = int(self._index.sizes[index]), int(self._index.offsets[index])
        if size > MAX_IMAGE_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), self.name(index))
        descriptor, kept = self._descriptor(int(self._index.shards[index]))
        try:
            data = os.pread(descriptor, size, offset)
        finally:
            if not kept:
                os.close(descriptor)
        if len(data) < size:
            raise OSError(errno.EIO, "the tar file ends before its image does", self.name(index))
        return data, int(self.labels[index])

    def listing(self) -> Iterator[tuple[str, int]]:
        """Names within the tar files: which file an image is in does not change the stream."""
        start = 0
        for end, size in zip(self._index.ends.tolist(), self._index.sizes.tolist(), strict=True):
            yield tar_members.text(self._index.block[start:end]), size
            start = end

    def _descriptor(self, shard: int) -> tuple[int, bool]:
        """A descriptor of a shard, and whether it is kept; one that is kept is never closed.

        So that threads may share them, and forks: reading by position moves nothing.
        """
        if shard in self._descriptors:
            return self._descriptors[shard], True
        descriptor = os.open(self.tars.files[shard], os.O_RDONLY | os.O_CLOEXEC)
        if len(self._descriptors) >= KEPT_OPEN:
            return descriptor, False
        kept = self._descriptors.setdefault(shard, descriptor)
        if kept != descriptor:  # another thread was first
            os.close(descriptor)
        return kept, True

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _open_index(
    tars: TarSet, save: bool, again: bool, progress: Callable[[int, int], None]
) -> Index:
    """The saved index if it is of these very files, else a new one; what is done is said."""
    stamp = tars.stamp()
    if not again:
        with contextlib.suppress(FileNotFoundError):
            if saved := _load(tars.index, stamp):
                return saved
            _say(f"{tars.index} is not of these tar files as they are now: made anew")
        _say(
            f"{tars.where}: reading the headers of its tar files ({len(tars.files):,}); "
            f"`{command_line('cspnet', 'index', tars.index.parent)}` does it once for all starts"
        )
    index = _make(tars, stamp, progress)
    if save:
        try:
            _save(tars.index, stamp, index)
        except OSError as error:
            _say(f"{tars.index} cannot be saved ({error.strerror}): it is made at each start")
    return index


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def _make(tars: TarSet, stamp: dict, progress: Callable[[int, int], None]) -> Index:
    """Reads the headers of all tar files. Raises Unfit with all that is wrong in them."""
    if not any(size for _, size, _ in stamp["shards"]):
        raise DataError(messages.no_classes(tars.index.parent))
    scans = []
    progress(0, len(tars.files))
    for done, file in enumerate(tars.files, 1):
        scans.append(tar_members.scan(file))
        progress(done, len(tars.files))
    problems = [problem for scan in scans for problem in scan.problems]
    if problems:
        raise TarError(tars.where, problems)
    images, classes = tar_members.classify(tars.where, scans, stamp["listed"])
    images.sort(key=lambda image: (image.label, image.name, image.shard))
    return _compact(images, classes)


def _compact(images: list[Image], classes: list[str]) -> Index:
    numbers = {name: number for number, name in enumerate(classes)}
    return Index(
        classes,
        b"".join(image.name for image in images),
        np.cumsum([len(image.name) for image in images], dtype=np.int64),
        np.array([image.shard for image in images], np.int32),
        np.array([image.offset for image in images], np.int64),
        np.array([image.size for image in images], np.int64),
        np.array([numbers[image.label] for image in images], np.int32),
    )


def _save(file: Path, stamp: dict, index: Index) -> None:
    """Writes the index beside its place and renames it: who reads sees all of it or none."""
    head = json.dumps({"stamp": stamp, "classes": index.classes}).encode()
    content = io.BytesIO()
    np.savez(
        content,
        head=np.frombuffer(head, np.uint8),
        block=np.frombuffer(index.block, np.uint8),
        **{name: getattr(index, name) for name in ARRAYS},
    )
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.getbuffer())
        os.replace(temporary, file)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _load(file: Path, stamp: dict) -> Index | None:
    """The index in a file; None where it is of other tar files, or damaged.

    Raises FileNotFoundError where there is none.
    """
    try:
        with np.load(file, allow_pickle=False) as content:
            head = json.loads(content["head"].tobytes())
            if head["stamp"] != stamp:
                return None
            arrays = {name: content[name] for name in ARRAYS}
            index = Index(head["classes"], content["block"].tobytes(), **arrays)
        return index if _sound(index, stamp) else None
    except FileNotFoundError:
        raise
    except Exception:  # of any kind, from parsers that trust the file
        return None


def _sound(index: Index, stamp: dict) -> bool:
    """Whether an index can be that of tar files with this stamp."""
    lengths = np.array([size for _, size, _ in stamp["shards"]], np.int64)
    return (
        all(getattr(index, name).dtype == kind for name, kind in ARRAYS.items())
        and {getattr(index, name).shape for name in ARRAYS} == {(len(index.labels),)}
        and len(index.labels) > 0
        and bool((np.diff(index.ends, prepend=0) >= 0).all())
        and index.ends[-1] == len(index.block)
        and 0 <= index.shards.min() <= index.shards.max() < len(lengths)
        and 0 <= index.labels.min() <= index.labels.max() < len(index.classes)
        and min(index.offsets.min(), index.sizes.min()) >= 0
        and bool((index.sizes <= lengths[index.shards] - index.offsets).all())
    )
