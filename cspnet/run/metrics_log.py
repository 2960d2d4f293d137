"""The record of a run, metrics.jsonl: one JSON object a line, in the order of time."""

import json
import os
from contextlib import suppress
from pathlib import Path

from cspnet.errors import SaveError


class MetricsLog:
    """Lines at the end of the record, which is cut back first to the step that the run starts from.

    What a full disk will not take waits in memory. Without a path, nothing is written. SaveError.
    """

    def __init__(self, path: Path | None, step: int, validated: int):
        self._path, self._file = path, None
        self._pending = b""
        if path is None:
            return
        try:
            _cut_back(path, step, validated)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise SaveError(f"{path} cannot be written: {error.strerror}") from None

    def write(self, line: dict) -> None:
        """Adds a line; where the disk is full, later, with the next one or before the next save."""
        self._pending += json.dumps(line).encode() + b"\n"
        with suppress(OSError):
            self._push()

    def flush(self) -> None:
        """Brings the record to the disk: it is never behind a checkpoint. Raises SaveError."""
        if self._file is None:
            return
        try:
            self._push()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise SaveError(f"{self._path} could not be written ({error.strerror})") from None

    def close(self) -> None:
        with suppress(SaveError):
            self.flush()
        if self._file is not None:
            self._file.close()

    def _push(self) -> None:
        if self._file is None:
            self._pending = b""
        while self._pending:
            written = self._file.write(self._pending)
            self._pending = self._pending[written:]


def _cut_back(path: Path, step: int, validated: int) -> None:
    """Drops the lines of training after `step`, of validation after `validated`, and a torn one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            content = json.loads(line)
            limit = validated if content["split"] == "val" else step
            if content["step"] <= limit:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def last_line(path: Path) -> dict | None:
    """The last line of a record; None where there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else None
