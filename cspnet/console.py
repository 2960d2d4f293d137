"""Standard output that survives its reader, and the log file of a run.

A training run must not end because nobody reads its output any more: a closed pipe, a closed
terminal and a full disk behind a redirection only end the output.
"""

import codecs
import io
import os
import sys
from collections import deque
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from rich.console import Console

from cspnet.text import printable


def ensure_utf8_mode() -> None:
    """Starts the program again in Python's UTF-8 mode if the locale has another encoding.

    Names of files and classes are stored in checkpoints: the same bytes must be the same name
    whatever the locale of a start. Output stays in the encoding of the terminal.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    os.environ.setdefault("PYTHONIOENCODING", encoding)
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _bytes_or_escape(error: UnicodeError) -> tuple[bytes | str, int]:
    """Writes the bytes of a name as they are, and escapes what the encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    code = ord(error.object[error.start])
    if 0xDC80 <= code <= 0xDCFF:
        return bytes([code - 0xDC00]), error.start + 1
    text, _ = codecs.backslashreplace_errors(
        UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    )
    return text, error.start + 1


codecs.register_error("cspnet.bytes_or_escape", _bytes_or_escape)


def allow_raw_bytes_on_stdout() -> None:
    """Lets stdout write names of files byte for byte, for another program to read."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="cspnet.bytes_or_escape")


def escape_unencodable_output() -> None:
    """Makes stdout and stderr print any text: what their encoding lacks is escaped.

    A stream that was closed by the caller (`>&-`) is replaced by /dev/null.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def tolerate_lost_output() -> None:
    """Lets this process continue when stdout or stderr can no longer be written."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), TolerantStream):
            setattr(sys, name, TolerantStream(getattr(sys, name)))


class TolerantStream(io.TextIOBase):
    """A text stream that drops what it is given after its first write error.

    `lost` is then the reason. Everything else is that of the wrapped stream.
    """

    def __init__(self, stream: io.TextIOBase):
        self._stream, self.lost = stream, None

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action) -> None:
        if self.lost is not None:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.lost = getattr(error, "strerror", None) or str(error)
            # The interpreter flushes what is still buffered at its exit, and would fail again.
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)

    def isatty(self) -> bool:
        return self.lost is None and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return self._stream.encoding

    @property
    def errors(self) -> str | None:
        return self._stream.errors

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


class RunOutput:
    """What a run prints: to a console, and with the time of day to the log that `open_log` names.

    The log has every line, also those that the console leaves out (`--quiet`).
    """

    def __init__(self, console: Console):
        self.console = console
        self._file: io.TextIOBase | None = None
        # Lines from before there is a file; if there never is one, the last of them.
        self._waiting: deque[str] = deque(maxlen=1000)
        self._reported_loss = False
        self._held: list[tuple[str, str | None]] | None = None

    def hold(self) -> None:
        """Keeps what is printed from the console until `release`."""
        self._held = []

    def release(self, only: str | None = None) -> None:
        """Prints what was kept, or `only` the lines of a style; from now on nothing is kept."""
        held, self._held = self._held or [], None
        for text, style in held:
            if only in (None, style):
                self._show(text, style)

    @property
    def is_terminal(self) -> bool:
        return self.console.is_terminal

    def print(self, text: str, style: str | None = None) -> None:
        """Text for the console and the log; with a style, a warning or an error.

        Names in it may hold any character: those that would act on a terminal are escaped.
        """
        text = printable(text, keep="\n")
        self.log(text)
        if self._held is None:
            self._show(text, style)
        else:
            self._held.append((text, style))

    def _show(self, text: str, style: str | None) -> None:
        self.console.print(text, style=style)
        lost = getattr(self.console.file, "lost", None)
        if lost and not self._reported_loss:
            self._reported_loss = True
            self.log(f"standard output cannot be written any more ({lost}); the run continues")

    def log(self, text: str) -> None:
        """A line for the log alone."""
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S} {printable(text, keep=chr(10))}\n"
        if self._file is None:
            self._waiting.append(line)
        else:
            self._write(line)

    def open_log(self, path: Path) -> None:
        """Appends to that file from now on, beginning with what was printed before.

        A file that cannot be written is no reason to stop: the record of a run is metrics.jsonl.
        """
        with suppress(OSError):
            self._file = open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
            for line in self._waiting:
                self._write(line)
            self._waiting.clear()

    def close_log(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _write(self, line: str) -> None:
        with suppress(OSError, ValueError):  # a full disk
            self._file.write(line)
