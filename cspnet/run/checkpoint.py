"""Checkpoints: durable, atomic writes with a checksum, and reads that detect damaged files.

A checkpoint is a zip archive of plain tensors, numbers and text, as torch.save writes it, so
`torch.load(weights_only=True)` reads it. The archive's comment, its last bytes, holds a checksum of
all bytes before it. A file whose checksum is missing or wrong is never used.
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
from typing import Any, BinaryIO, cast

import torch

from cspnet.errors import CheckpointError, CheckpointVersionError, RecipeError, SaveError
from cspnet.files import fsync_path, nearest_existing_directory, replace_file, temporary_path
from cspnet.run.folder import BEST_NAME, LAST_NAME, PREVIOUS_NAME

FORMAT = 4
SEAL = b"cspnet blake2b "  # starts the archive's comment; 64 hexadecimal digits follow
SEAL_SIZE = len(SEAL) + 64
BLOCK = 1 << 20  # bytes hashed at a time


class CheckpointFiles:
    """The checkpoints of a run: last.pt, previous.pt, best.pt, and archives of some steps.

    Files of the same step are hard links to one file. `size` is the size of a checkpoint in bytes,
    0 until it is known.
    """

    def __init__(self, folder: Path, archive_every: int = 0, archive_keep: int = 1):
        self.folder, self.size = folder, 0
        self.archive_every, self.archive_keep = archive_every, archive_keep
        self.last, self.previous = folder / LAST_NAME, folder / PREVIOUS_NAME
        self.best = folder / BEST_NAME
        self._last_is_valid = True

    def archives(self) -> list[Path]:
        """step-0080000.pt and so on, oldest first."""
        archives = [p for p in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d+", p.stem)]
        return sorted(archives, key=lambda path: int(path.stem.removeprefix("step-")))

    @property
    def max_files(self) -> int:
        """Maximum number of files at a time: last, previous, best, a temporary one, archives."""
        return 4 + (self.archive_keep if self.archive_every else 0)

    def free_bytes(self) -> int:
        """Free space on the disk, in bytes."""
        return shutil.disk_usage(nearest_existing_directory(self.folder)).free

    def missing_bytes(self) -> int:
        """Additional disk space that `max_files` files need, in bytes; negative if it suffices."""
        existing = len({path.stat().st_ino for path in self._existing()})
        return (self.max_files - existing) * self.size - self.free_bytes()

    def require_space(self) -> None:
        """Raises RecipeError if the disk has too little free space for `max_files` files."""
        missing = self.missing_bytes()
        if missing > 0:
            archives = f", {self.archive_keep} archives" if self.archive_every else ""
            raise RecipeError(
                f"the disk of {self.folder.parent} lacks {missing / 1e6:,.0f} MB for the run's "
                f"checkpoints, {self.size / 1e6:,.0f} MB each: last, previous, best, one being "
                f"written{archives}. Free some space, or give a folder on another disk with "
                "--output."
            )

    def remove_temporary(self) -> None:
        """Removes the partial file that a killed save has left."""
        with contextlib.suppress(OSError):
            temporary_path(self.last).unlink(missing_ok=True)

    def save(self, content: dict, best: bool = False) -> None:
        """Replaces last.pt, and keeps the file before it as previous.pt.

        With `best`, best.pt becomes a link to the same file. At any interruption, each name refers
        to its old file or its new one, and both are complete. best.pt may then be newer than
        last.pt; repeating the steps after last.pt recreates the same best.pt. Raises SaveError, and
        last.pt is then unchanged.
        """
        links = [self.best] if best else []
        if self.archive_every and content["step"] % self.archive_every == 0:
            links.append(self.folder / f"step-{content['step']:07}.pt")

        def write_and_link(temporary: Path) -> None:
            write_checkpoint(content, temporary)
            for link in links:
                _replace_with_link(link, temporary)
            if self._last_is_valid and self.last.exists():
                _replace_with_link(self.previous, self.last)

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = self.free_bytes()
            if free < self.size:
                raise OSError(
                    0, f"No space left: {free / 1e6:,.0f} MB free, {self.size / 1e6:,.0f} needed"
                )
            replace_file(self.last, write_and_link, durable=True)
        except OSError as error:
            raise SaveError(
                f"{self.last} could not be written ({error.strerror}); the earlier one is untouched"
            ) from None
        self._last_is_valid = True
        surplus = self.archives()[: -self.archive_keep] if self.archive_every else []
        for archive in surplus:
            with contextlib.suppress(OSError):
                archive.unlink()

    def newest(self) -> tuple[dict | None, list[str]]:
        """The content of last.pt, or of the newest valid checkpoint, and warnings to print.

        None if there is no checkpoint. Raises CheckpointError if none of the existing ones is
        valid, or if last.pt has the format of another version.
        """
        if not self._existing():
            return None, []
        try:
            return load_checkpoint(self.last), []
        except CheckpointVersionError:
            raise
        except CheckpointError as error:
            problems = [str(error)]
        self._last_is_valid = False
        valid: list[tuple[int, dict, Path]] = []
        for path in self._existing():
            if path != self.last:
                try:
                    content = load_checkpoint(path)
                    valid.append((content["step"], content, path))
                except CheckpointError as error:
                    problems.append(str(error))
        if not valid:
            raise CheckpointError(
                "the run has no valid checkpoint:"
                + "".join(f"\n  - {problem}" for problem in problems)
                + "\nTo start over, give a new folder with --output."
            )
        _, content, path = max(valid, key=lambda entry: entry[0])
        return content, [*problems, f"loaded instead: {path}, step {content['step']:,}"]

    def _existing(self) -> list[Path]:
        paths = [self.last, self.previous, *reversed(self.archives()), self.best]
        return [path for path in paths if path.exists()]


def write_checkpoint(content: dict, path: Path) -> None:
    """Writes a checkpoint with its checksum, and fsyncs it. Raises OSError; the file is partial.

    Not atomic by itself: `path` is a temporary file.
    """
    with open(path, "w+b") as file:
        writer = _ErrorKeepingWriter(file)
        try:
            torch.save(content, cast(BinaryIO, writer))  # torch calls these two methods only
        except RuntimeError:
            raise writer.error or OSError(0, "torch could not write it") from None
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", SEAL_SIZE))  # the length of the archive's comment
        file.seek(0)
        digest = _digest(_blocks(file))
        file.write(SEAL + digest)
        file.flush()
        os.fsync(file.fileno())  # before a hard link to it replaces another checkpoint


class _ErrorKeepingWriter:
    """Keeps the OSError of a failed write, which torch.save replaces with another error."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def has_valid_checksum(path: Path) -> bool:
    """Whether a file ends in the checksum of the bytes before it. Raises OSError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < SEAL_SIZE:
            return False
        digest = _digest(_blocks(file, size - SEAL_SIZE))
        return file.read() == SEAL + digest


def _blocks(file: BinaryIO, size: int | None = None) -> Iterator[bytes]:
    """The next `size` bytes of a file, or all that follow, in blocks."""
    while block := file.read(BLOCK if size is None else min(BLOCK, size)):
        size = None if size is None else size - len(block)
        yield block


def _digest(blocks: Iterator[bytes]) -> bytes:
    state = hashlib.blake2b(digest_size=32)
    for block in blocks:
        state.update(block)
    return state.hexdigest().encode()


def _replace_with_link(path: Path, source: Path) -> None:
    """Replaces `path` by a hard link to `source`, or by a copy without hard links (exFAT, SMB)."""

    def link_or_copy(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            fsync_path(temporary)

    replace_file(path, link_or_copy)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint. CheckpointError if it is missing, damaged, or another format."""
    _require_file(path)
    try:
        is_valid = has_valid_checksum(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    content = read_torch(path)
    if not is_valid and isinstance(content, dict) and isinstance(content.get("format"), int):
        raise CheckpointError(
            f"{path} is damaged: its checksum is missing or does not match its content"
        )
    required = ("format", "recipe", "classes", "state_dict")
    if not isinstance(content, dict) or any(key not in content for key in required):
        raise CheckpointError(f"{path} holds tensors, but is not a checkpoint of cspnet")
    if content["format"] != FORMAT:
        raise CheckpointVersionError(
            f"{path} has checkpoint format {content['format']}, and this version of cspnet reads "
            f"format {FORMAT}: use cspnet {content.get('cspnet', '?')}, which wrote it"
        )
    return content


def read_torch(path: Path) -> object:
    """The content of a torch.save file: tensors and plain values only, no pickled code is run."""
    _require_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # zip, pickle and torch raise different ones for a damaged file
        if isinstance(error, UnpicklingError) and "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path} holds Python objects other than tensors, numbers and text. Loading them "
                "would run code from the file, so it is refused. Ask for its state dict alone."
            ) from None
        raise CheckpointError(
            f"{path} is truncated, damaged, or not a checkpoint ({path.stat().st_size:,} bytes)"
        ) from None


def _require_file(path: Path) -> None:
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"the checkpoint {path} {problem}{_suggestion(path)}")


def _suggestion(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    nearby = sorted({*folder.glob("*.pt"), *folder.glob("checkpoints/*.pt")})
    return f"; found there: {', '.join(map(str, nearby[:4]))}" if nearby else ""
