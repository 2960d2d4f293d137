"""Images in tar files, read in place with the help of an index.

A tar file contains class folders (`apple/0.jpg`), or WebDataset samples (`0.jpg` with `0.cls` or
`0.json`). The images are ordered as in a folder: by class, then by name. Names in a tar file are
used for sorting and as labels, but never opened as paths.
"""

import contextlib
import errno
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cspnet.errors import DataError
from cspnet.shell import command_line
from cspnet.sources import messages, tar_members
from cspnet.sources.names import count_and_names
from cspnet.sources.protocol import require_nonempty_classes
from cspnet.sources.roots import SPLITS, VALIDATION_NAMES
from cspnet.sources.tar_classes import assign_classes, read_class_list
from cspnet.sources.tar_index import INDEX_VERSION, TarIndex, load_index, save_index
from cspnet.sources.tar_members import TarError
from cspnet.sources.tree import list_entries
from cspnet.text import printable

MAX_IMAGE_BYTES = 2**30  # of an image; anything larger is damage, and would only exhaust the memory
SHARD_SUFFIX = r"([-_]\d+(-of-\d+)?)?\.tar"  # of a file name, after the name of a split
# Open files per process. The usual limit is 1,024, and few data sets have more shards than this.
MAX_OPEN = 256


@dataclass(frozen=True)
class TarSet:
    """The tar files of a split, and the path of their index."""

    where: str  # for messages
    files: tuple[Path, ...]
    index: Path

    @classmethod
    def in_folder(cls, folder: Path) -> "TarSet | None":
        """The tar files in a folder. Raises DataError if there are class folders, too.

        Tar files with the names of the folders are ignored: the folders were unpacked from them.
        """
        entries = list_entries(folder)
        tars = [e.name for e in entries if e.name.endswith(".tar") and not e.is_dir()]
        folders = [entry.name for entry in entries if entry.is_dir()]
        if {name.removesuffix(".tar") for name in tars} <= set(folders):
            return None
        if folders:
            both = f"{count_and_names(folders, 'folder')} and {count_and_names(tars, 'tar file')}"
            raise DataError(
                f"{folder} contains both {both}: which are the images? Move the others elsewhere."
            )
        return cls(str(folder), tuple(folder / name for name in tars), folder / "index.cspnet")

    @classmethod
    def by_name(cls, root: Path, names: tuple[str, ...]) -> "TarSet | None":
        """The tar files in a data root that are a split by name: `train.tar`, or `train-0.tar` ….

        A single one next to its unpacked folder `train/` is ignored. Raises DataError if several
        of the `names` have files or folders.
        """
        try:
            files = [entry.name for entry in list_entries(root) if not entry.is_dir()]
        except DataError:  # a root that cannot be listed may contain a train/ that can
            return None
        by_split: dict[str, list[str]] = {}
        for name in names:
            shards = [file for file in files if re.fullmatch(name + SHARD_SUFFIX, file)]
            if shards and not ((root / name).is_dir() and shards == [f"{name}.tar"]):
                by_split[name] = shards
        if not by_split:
            return None
        (name, shards), *others = by_split.items()
        conflicts = [f"{other}/" for other in names if (root / other).is_dir()]
        conflicts += [other_shards[0] for _, other_shards in others]
        if conflicts:
            count = count_and_names(shards, "tar file")
            raise DataError(
                f"{root} has {count}, but also {', '.join(conflicts)}: "
                "which are the images? Keep one."
            )
        paths = tuple(root / file for file in shards)
        return cls(str(root / f"{name}*.tar"), paths, root / f"{name}.index.cspnet")

    def stamp(self) -> dict:
        """Names, sizes and times of the files, which identify an index. Raises DataError."""
        shards = []
        for file in self.files:
            try:
                status = os.stat(file)
            except OSError as error:
                raise DataError(f"{file} cannot be opened: {error.strerror}") from None
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{file} is not a regular file, so it cannot be read in place")
            shards.append([file.name, status.st_size, status.st_mtime_ns])
        classes = read_class_list(self.index.parent)
        return {"version": INDEX_VERSION, "shards": shards, "listed": classes}


def split_as_root(folder: Path) -> str:
    """The message for a folder of tar files that is a split, but given as a data root; or empty."""
    absolute = Path(os.path.abspath(folder))
    if absolute.name not in SPLITS or not TarSet.in_folder(folder):
        return ""
    return (
        f"{folder} has no folder train/. It contains the tar files of {absolute.name}/: give its "
        f"parent, {absolute.parent}."
    )


def no_validation_tar(root: Path) -> str:
    """The message for a data root with tar files for training but not for validation; or empty."""
    tars = TarSet.by_name(root, ("train",))
    if not tars:
        return ""
    names = ", ".join(f"{name}.tar" for name in VALIDATION_NAMES)
    return f"{root} has {tars.files[0].name}, but none of {names}. Split off some images."


class TarSource:
    """The images in tar files, as a source.

    Opens the index, or builds one in memory, which `save` writes next to the tar files; `rebuild`
    ignores an existing one. Raises DataError if a tar file is damaged or an image has no class; if
    a class has no image, unless `allow_empty`. Each process opens a file when it first reads from
    it, and reads with pread.
    """

    def __init__(
        self,
        tars: TarSet,
        allow_empty: bool = False,
        save: bool = False,
        rebuild: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.tars = tars
        index = _open_index(tars, save, rebuild, progress)
        self.classes, self.labels = index.classes, index.labels
        self._index = index
        self._descriptors: dict[int, int] = {}
        if not allow_empty:
            require_nonempty_classes(
                self,
                lambda names: (
                    f"{tars.where}: no image of {count_and_names(names, 'class')} "
                    "listed in classes.txt. Add the missing tar files, or empty these lines."
                ),
            )

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The path of the tar file, a colon, and the name in the tar file."""
        start = self._index.ends[index - 1] if index else 0
        name = self._index.block[start : self._index.ends[index]]
        return f"{self.tars.files[self._index.shards[index]]}:{tar_members.decode_name(name)}"

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
            raise OSError(errno.EIO, "the tar file ends within the image", self.name(index))
        return data, int(self.labels[index])

    def listing(self) -> Iterator[tuple[str, int]]:
        """Names inside the tar files: how images are distributed over files does not matter."""
        start = 0
        for end, size in zip(self._index.ends.tolist(), self._index.sizes.tolist(), strict=True):
            yield tar_members.decode_name(self._index.block[start:end]), size
            start = end

    def _descriptor(self, shard: int) -> tuple[int, bool]:
        """A file descriptor of a shard, and whether it is kept open.

        A kept descriptor is never closed, so threads and forks can share it: pread does not move
        its position.
        """
        if shard in self._descriptors:
            return self._descriptors[shard], True
        descriptor = os.open(self.tars.files[shard], os.O_RDONLY | os.O_CLOEXEC)
        if len(self._descriptors) >= MAX_OPEN:
            return descriptor, False
        kept = self._descriptors.setdefault(shard, descriptor)
        if kept != descriptor:  # another thread was faster
            os.close(descriptor)
        return kept, True

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _open_index(
    tars: TarSet, save: bool, rebuild: bool, progress: Callable[[int, int], None]
) -> TarIndex:
    """The saved index if it matches the tar files, else a new one, with a message on stderr."""
    stamp = tars.stamp()
    if not rebuild:
        with contextlib.suppress(FileNotFoundError):
            if saved := load_index(tars.index, stamp):
                return saved
            _warn(f"{tars.index} does not match the tar files: building it again")
        _warn(
            f"{tars.where}: reading the headers of its tar files ({len(tars.files):,}); "
            f"`{command_line('cspnet', 'index', tars.index.parent)}` saves an index for next time"
        )
    index = _build_index(tars, stamp, progress)
    if save:
        try:
            save_index(tars.index, stamp, index)
        except OSError as error:
            _warn(
                f"{tars.index} cannot be saved ({error.strerror}): the index will be built at "
                "each start"
            )
    return index


def _warn(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def _build_index(tars: TarSet, stamp: dict, progress: Callable[[int, int], None]) -> TarIndex:
    """Read the headers of all tar files. Raises TarError with all problems in them."""
    if not any(size for _, size, _ in stamp["shards"]):
        raise DataError(messages.no_class_folders(tars.index.parent))
    scans = []
    progress(0, len(tars.files))
    for done, file in enumerate(tars.files, 1):
        scans.append(tar_members.scan_tar(file))
        progress(done, len(tars.files))
    problems = [problem for scan in scans for problem in scan.problems]
    if problems:
        raise TarError(tars.where, problems)
    images, classes = assign_classes(tars.where, scans, stamp["listed"])
    images.sort(key=lambda image: (image.label, image.name, image.shard))
    return TarIndex.from_images(images, classes)
