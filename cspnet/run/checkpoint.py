"""Files of a run's state, written so that no crash loses them and read with suspicion.

A checkpoint is what torch.save writes of plain tensors, numbers and text: a zip archive, which
`torch.load(weights_only=True)` reads. In the archive's comment, its last bytes, is a checksum of
all the bytes before. A file without one, or with another, is never taken for good.
"""

import contextlib
import hashlib
import os
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO

import torch

from cspnet.errors import CheckpointError, SaveError

FORMAT = 3
SEAL = b"cspnet blake2b "  # begins the comment; the digest follows as 64 hexadecimal digits
SEAL_SIZE = len(SEAL) + 64
BLOCK = 1 << 20


class CheckpointFiles:
    """The checkpoints of a run: last.pt, the one before it, best.pt, and archives of some steps.

    Those of one step are hard links to one file. `size` is the number of bytes of one, once known.
    """

    def __init__(self, folder: Path, archive_every: int = 0, archive_keep: int = 1):
        self.folder, self.size = folder, 0
        self.archive_every, self.archive_keep = archive_every, archive_keep
        self.last, self.previous = folder / "last.pt", folder / "previous.pt"
        self.best = folder / "best.pt"
        self._last_is_good = True

    def archives(self) -> list[Path]:
        """step-0080000.pt and so on, oldest first."""
        found = [p for p in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d+", p.stem)]
        return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")))

    @property
    def most(self) -> int:
        """Files at once: last, previous, best, one being written, and the archives."""
        return 4 + (self.archive_keep if self.archive_every else 0)

    def free(self) -> int:
        """Bytes that are free on the disk."""
        return shutil.disk_usage(existing_above(self.folder)).free

    def shortage(self) -> int:
        """Bytes that are missing on the disk for all the files that the run will have at once."""
        there = len({path.stat().st_ino for path in self._all()})
        return (self.most - there) * self.size - self.free()

    def clean(self) -> None:
        """Removes what a save that was killed has left half-written."""
        with contextlib.suppress(OSError):
            (self.folder / ".last.pt.tmp").unlink(missing_ok=True)

    def save(self, content: dict, best: bool = False) -> None:
        """Writes last.pt, and keeps the one before; with `best`, the same file is best.pt too.

        Whatever happens, a name holds the old file or the new one, and both are whole. Where it is
        interrupted, best.pt may be newer than last.pt: the steps that are done again lead to the
        same best.pt. Raises SaveError with all files as they were.
        """
        names = [self.best] if best else []
        if self.archive_every and content["step"] % self.archive_every == 0:
            names.append(self.folder / f"step-{content['step']:07}.pt")
        temporary = self.folder / ".last.pt.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = self.free()
            if free < self.size:
                raise OSError(
                    0, f"No space left: {free / 1e6:,.0f} MB free, {self.size / 1e6:,.0f} needed"
                )
            write_checkpoint(content, temporary)
            for name in names:
                _link(temporary, name)
            if self._last_is_good and self.last.exists():
                _link(self.last, self.previous)
            os.replace(temporary, self.last)
            self._last_is_good = True
            _sync_folder(self.folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise SaveError(
                f"{self.last} could not be written ({error.strerror}); the earlier one is untouched"
            ) from None
        for surplus in self.archives()[: -self.archive_keep] if self.archive_every else []:
            with contextlib.suppress(OSError):
                surplus.unlink()

    def newest(self) -> tuple[dict | None, list[str]]:
        """The content of last.pt, or of the newest whole file, and what to say of it.

        None where there is no file. Raises CheckpointError where there are some and none is whole.
        """
        if not self._all():
            return None, []
        try:
            return load_checkpoint(self.last), []
        except CheckpointError as error:
            problems = [str(error)]
        self._last_is_good = False
        good: list[tuple[int, dict, Path]] = []
        for path in self._all():
            if path != self.last:
                try:
                    content = load_checkpoint(path)
                    good.append((content["step"], content, path))
                except CheckpointError as error:
                    problems.append(str(error))
        if not good:
            raise CheckpointError(
                "no checkpoint of the run can be used:"
                + "".join(f"\n  - {problem}" for problem in problems)
                + "\nTo train anew, name another folder."
            )
        _, content, path = max(good, key=lambda entry: entry[0])
        return content, [*problems, f"taken in its place: {path}, step {content['step']:,}"]

    def _all(self) -> list[Path]:
        named = [self.last, self.previous, *reversed(self.archives()), self.best]
        return [path for path in named if path.exists()]


def write_checkpoint(content: dict, path: Path) -> None:
    """A sealed checkpoint that has reached the disk. OSError, and half a file then."""
    with open(path, "w+b") as file:
        told = _Told(file)
        try:
            torch.save(content, told)
        except RuntimeError:
            raise told.error or OSError(0, "torch could not write it") from None
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", SEAL_SIZE))  # the length of the archive's comment
        file.seek(0)
        digest = _digest(_blocks(file))
        file.write(SEAL + digest)
        file.flush()
        os.fsync(file.fileno())


class _Told:
    """A file that remembers why it could not be written; torch's writer has words of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def has_valid_checksum(path: Path) -> bool:
    """Whether a file ends in the checksum of all that is before. OSError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < SEAL_SIZE:
            return False
        digest = _digest(_blocks(file, size - SEAL_SIZE))
        return file.read() == SEAL + digest


def _blocks(file: BinaryIO, size: int | None = None) -> Iterator[bytes]:
    while block := file.read(BLOCK if size is None else min(BLOCK, size)):
        size = None if size is None else size - len(block)
        yield block


def _digest(blocks: Iterator[bytes]) -> bytes:
    state = hashlib.blake2b(digest_size=32)
    for block in blocks:
        state.update(block)
    return state.hexdigest().encode()


def existing_above(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that there is."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _link(source: Path, target: Path) -> None:
    """Puts a hard link in the place of `target`; a copy where there are none (exFAT, SMB)."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """A rename is durable only when its folder has reached the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_checkpoint(path: Path) -> dict:
    """A checkpoint as `write` left it; CheckpointError where a bit of it is another, or none is."""
    _require_file(path)
    try:
        sealed = has_valid_checksum(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    content = read_torch(path) if sealed else _unsealed(path)
    wanted = ("format", "recipe", "classes", "state_dict")
    if not isinstance(content, dict) or any(key not in content for key in wanted):
        raise CheckpointError(f"{path} holds tensors, but is not a checkpoint of cspnet")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']}, this cspnet reads {FORMAT}: "
            f"it was written by cspnet {content.get('cspnet', '?')}"
        )
    return content


def _unsealed(path: Path) -> object:
    """Raises CheckpointError that says what a file without a valid checksum is, if not damaged."""
    content = read_torch(path)
    if isinstance(content, dict) and isinstance(content.get("format"), int):
        raise CheckpointError(
            f"{path} is damaged: its checksum is missing, or is not that of its content"
        )
    return content


def read_torch(path: Path) -> object:
    """What torch.save wrote to a file, tensors and plain values only: no pickle is executed."""
    _require_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # zip, pickle and torch each have their own for a broken file
        if isinstance(error, UnpicklingError) and "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path} holds Python objects other than tensors, numbers and text. Loading them "
                "would run code out of the file: refused. Ask for its state dict alone."
            ) from None
        raise CheckpointError(
            f"{path} is truncated, damaged, or not a checkpoint ({path.stat().st_size:,} bytes)"
        ) from None


def _require_file(path: Path) -> None:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"the checkpoint {path} {what}{_suggest(path)}")


def _suggest(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    near = sorted({*folder.glob("*.pt"), *folder.glob("checkpoints/*.pt")})
    return f"; found there: {', '.join(map(str, near[:4]))}" if near else ""
