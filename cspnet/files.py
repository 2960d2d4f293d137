"""Atomic replacement of files: the only code in the package that renames a file into place.

A reader, a kill or a full disk sees the old file or the new one, never a part of either.
"""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# A killed process leaves its temporary file behind; the next replacement of the file removes it.
TEMPORARY_SUFFIX = ".tmp"
NO_DIRECTORY_FSYNC = (errno.EINVAL, errno.ENOTSUP)  # of file systems that cannot fsync a directory


def temporary_path(path: Path, concurrent: bool = False) -> Path:
    """The hidden file beside `path` that is written before it replaces `path`.

    `concurrent`: several processes may replace the file at the same time, so each uses its own.
    """
    owner = f".{os.getpid()}" if concurrent else ""
    return path.with_name(f".{path.name}{owner}{TEMPORARY_SUFFIX}")


def replace_file(
    path: Path,
    write: Callable[[Path], object],
    *,
    durable: bool = False,
    concurrent: bool = False,
) -> None:
    """Replaces `path` by the file that `write` creates at the temporary path it is called with.

    The new file has the permissions that `write` gives it, so those of the umask. With `durable`,
    the file and its directory entry are on the disk on return. If anything fails, `path` is
    unchanged and the temporary file is removed. Raises OSError, and any exception of `write`.
    """
    temporary = temporary_path(path, concurrent)
    # It could be a hard link to another file, or belong to another user: never write into it.
    temporary.unlink(missing_ok=True)
    try:
        write(temporary)
        move_into_place(temporary, path, durable=durable)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Replaces `path` by a UTF-8 text file. Raises OSError."""
    replace_file(path, lambda temporary: temporary.write_text(text, "utf-8"), durable=durable)


def replace_bytes(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Replaces `path` by a file with this content. Raises OSError."""
    replace_file(path, lambda temporary: temporary.write_bytes(data), durable=durable)


def move_into_place(finished: Path, path: Path, *, durable: bool = False) -> None:
    """Renames a finished file (or, without `durable`, a directory) to `path`. Raises OSError.

    With `durable`, the file reaches the disk before it is renamed, and the new directory entry
    before this function returns.
    """
    if durable:
        fsync_path(finished)
    os.replace(finished, path)
    if durable:
        fsync_directory(path.parent)


def fsync_path(path: Path) -> None:
    """Waits until the content of a file is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(directory: Path) -> None:
    """Waits until the entries of a directory are on the disk, if the file system supports it."""
    try:
        fsync_path(directory)
    except OSError as error:
        if error.errno not in NO_DIRECTORY_FSYNC:
            raise


def nearest_existing_directory(path: Path) -> Path:
    """The directory itself, or its nearest parent that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
