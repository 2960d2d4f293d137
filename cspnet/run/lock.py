"""The lock of a run folder: one process trains in it, and others can see whether it is alive."""

import contextlib
import fcntl
import os
import struct
import sys
from pathlib import Path
from typing import IO

from cspnet.errors import RecipeError

LOCK_NAME = ".lock"
FLOCK_FORMAT = "@hhqqi"  # struct flock of 64-bit Linux: type, whence, start, length, pid


class RunLock(contextlib.AbstractContextManager):
    """Reserves a run folder for one process: two would truncate each other's metrics.jsonl.

    A POSIX record lock on the file `.lock`. The kernel releases it when the process ends in any
    way, and child processes (dataloader workers) do not inherit it.
    """

    def __init__(self) -> None:
        self._file: IO | None = None

    def take(self, folder: Path) -> None:
        """Locks a folder, once. Raises RecipeError if another process has locked it.

        Does nothing if the folder does not exist, or if the file system does not support locks.
        """
        if self._file:
            return
        with contextlib.suppress(OSError):
            self._file = open(folder / LOCK_NAME, "a")  # noqa: SIM115
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise RecipeError(
                    f"another process trains in {folder}: wait until it ends, or give another "
                    "folder with --output"
                ) from None

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()


def is_locked(folder: Path) -> bool | None:
    """Whether a process trains in a run folder now; None if that cannot be determined.

    Only queries the lock: taking it, even for a moment, could make a starting run fail.
    """
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        return None
    try:
        with open(folder / LOCK_NAME, "rb") as file:
            request = struct.pack(FLOCK_FORMAT, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = fcntl.fcntl(file, fcntl.F_GETLK, request)
    except OSError:
        return None
    return struct.unpack(FLOCK_FORMAT, answer)[0] != fcntl.F_UNLCK
