"""Standard output that may be lost, and the log file of a run.

A training run must not fail because its output cannot be written: a closed pipe, a closed terminal
or a full disk behind a redirection only ends the output.
"""

import codecs
import io
import os
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from cspnet.text import printable


def ensure_utf8_mode() -> None:
    """Restarts the program in Python's UTF-8 mode if the locale has another encoding.

    Checkpoints store the names of files and classes, so the same bytes must be decoded to the same
    name in every locale. Output keeps the encoding of the terminal.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    os.environ.setdefault("PYTHONIOENCODING", encoding)
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _bytes_or_escape(error: UnicodeError) -> tuple[bytes | str, int]:
    """Error handler: keeps the bytes of a file name, and escapes characters the encoding lacks."""
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
    """Makes stdout write file names as their bytes, for other programs to read."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="cspnet.bytes_or_escape")


def escape_unencodable_output() -> None:
    """Makes stdout and stderr accept any text: characters their encoding lacks are escaped.

    A stream that the caller has closed (`>&-`) is replaced by /dev/null.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def tolerate_lost_output() -> None:
    """Lets this process continue if stdout or stderr can no longer be written."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), TolerantStream):
            setattr(sys, name, TolerantStream(getattr(sys, name)))


class TolerantStream(io.TextIOBase):
    """Wraps a text stream, and discards all text after the first failed write.

    `lost` is the reason of the failure, None before it.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.lost: str | None = None

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self.lost is not None:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.lost = getattr(error, "strerror", None) or str(error)
            # At its exit, the interpreter flushes the buffered text, which would fail again.
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)

    def isatty(self) -> bool:
        return self.lost is None and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # read-only in TextIOWrapper, too
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]  # as above
        return self._stream.errors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class RunOutput:
    """The output of a run: to a console and, with date and time, to a log file (`open_log`).

    The log has every line, including those that the console omits (`--quiet`).
    """

    def __init__(self, console: Console):
        self.console = console
        self._file: TextIO | None = None
        # The last lines logged while no file is open.
        self._waiting: deque[str] = deque(maxlen=1000)
        self._reported_loss = False
        self._held: list[tuple[str, str | None]] | None = None

    def hold(self) -> None:
        """Withholds text from the console until `release`."""
        self._held = []

    def release(self, only: str | None = None) -> None:
        """Prints the withheld text, or `only` that of a style, and withholds no more text."""
        held, self._held = self._held or [], None
        for text, style in held:
            if only in (None, style):
                self._show(text, style)

    @property
    def is_terminal(self) -> bool:
        return self.console.is_terminal

    def print(self, text: str, style: str | None = None) -> None:
        """Prints text to the console and the log; warnings and errors have a style.

        Non-printable characters are escaped: the text may contain file names.
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
        """Writes text to the log only."""
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S} {printable(text, keep=chr(10))}\n"
        if self._file is None:
            self._waiting.append(line)
        else:
            self._write(line)

    def open_log(self, path: Path) -> None:
        """Appends all output to a file from now on, after the lines printed before.

        Does nothing if the file cannot be opened: a run needs only its metrics.
        """
        with suppress(OSError):
            self._file = open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
            for line in self._waiting:
                self._write(line)
            self._waiting.clear()

    def close_log(self) -> None:
        """Closes the log file, if it is open."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _write(self, line: str) -> None:
        with suppress(OSError, ValueError):  # a full disk
            if self._file is not None:
                self._file.write(line)
