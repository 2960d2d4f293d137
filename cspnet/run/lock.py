"""The lock of a run folder: one process trains in it, and others can see whether it lives."""

import contextlib
import fcntl
import os
import struct
import sys
from pathlib import Path
from typing import IO

from cspnet.errors import RecipeError

LOCK_NAME = ".lock"
FLOCK = "@hhqqi"  # struct flock of 64-bit Linux: type, whence, start, length, pid


class RunLock(contextlib.AbstractContextManager):
    """Keeps a run folder for one process: two of them would cut back each other's record.

    A lock of POSIX on the file `.lock`, which goes with the process however that ends, and which
    its workers do not inherit.
    """

    def __init__(self):
        self._file: IO | None = None

    def take(self, folder: Path) -> None:
        """Takes a folder, unless this lock has it already. RecipeError: another process has it.

        Where there is no folder yet, or the disk knows no locks, nothing is taken.
        """
        if self._file:
            return
        with contextlib.suppress(OSError):
            self._file = open(folder / LOCK_NAME, "a")  # noqa: SIM115
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise RecipeError(
                    f"another process trains in {folder}: wait for its end, or name another folder "
                    "with --output"
                ) from None

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()


def is_locked(folder: Path) -> bool | None:
    """Whether a process trains in a run folder now; None where that cannot be told.

    It only asks, and takes no lock, not even for a moment: that could keep a run from starting.
    """
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        return None
    try:
        with open(folder / LOCK_NAME, "rb") as file:
            asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = fcntl.fcntl(file, fcntl.F_GETLK, asked)
    except OSError:
        return None
    return struct.unpack(FLOCK, answer)[0] != fcntl.F_UNLCK
