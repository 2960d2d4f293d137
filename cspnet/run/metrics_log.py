"""metrics.jsonl: the metrics of a run, one JSON object per line, in order of time."""

import json
import os
from contextlib import suppress
from io import FileIO
from pathlib import Path

from cspnet.errors import SaveError
from cspnet.files import replace_text


class MetricsLog:
    """Appends lines to metrics.jsonl, after removing those beyond the step the run starts from.

    Lines that a full disk does not take are kept in memory, and written later. If `path` is None,
    nothing is written. Raises SaveError if the file cannot be opened.
    """

    def __init__(self, path: Path | None, step: int, validated_step: int):
        self._path = path
        self._file: FileIO | None = None
        self._pending = b""
        if path is None:
            return
        try:
            _truncate(path, step, validated_step)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise SaveError(f"{path} cannot be written: {error.strerror}") from None

    def write(self, line: dict) -> None:
        """Appends a line. On a full disk, it is kept for the next line, or for `flush`."""
        self._pending += json.dumps(line).encode() + b"\n"
        with suppress(OSError):
            self._write_pending()

    def flush(self) -> None:
        """Writes all lines and fsyncs the file, so that it is never behind a checkpoint.

        Raises SaveError.
        """
        if self._file is None:
            return
        try:
            self._write_pending()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise SaveError(f"{self._path} could not be written ({error.strerror})") from None

    def close(self) -> None:
        """Writes what the disk takes, and closes the file."""
        with suppress(SaveError):
            self.flush()
        if self._file is not None:
            self._file.close()

    def _write_pending(self) -> None:
        if self._file is None:
            self._pending = b""
            return
        while self._pending:
            written = self._file.write(self._pending)
            self._pending = self._pending[written:]


def _truncate(path: Path, step: int, validated_step: int) -> None:
    """Removes training lines after `step`, validation lines after `validated_step`, and partial
    lines.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            content = json.loads(line)
            limit = validated_step if content["split"] == "val" else step
            if content["step"] <= limit:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    replace_text(path, "".join(kept))


def last_line(path: Path) -> dict | None:
    """The last line of metrics.jsonl, which is complete; None if there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else None
