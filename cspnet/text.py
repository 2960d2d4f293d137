"""Text that any terminal can display.

A file name is bytes, which Python decodes with surrogate escapes, so that opening the file uses the
same bytes. Only displayed text is escaped; paths are not.
"""

import difflib
import re
from collections.abc import Iterable

LINE_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
LINE_UNESCAPES = {escaped: char for char, escaped in LINE_ESCAPES.items()}


def printable(text: str, keep: str = "") -> str:
    """Escapes non-printable characters (`\\n`, `\\x1b`, `\\udcff`), except those in `keep`.

    Control characters would control the terminal, and surrogates cannot be encoded. The result is
    unchanged by a second call.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def escape_line(name: str) -> str:
    """Escapes a name so that it fits on one line of a text file; `unescape_line` reverses it."""
    return "".join(LINE_ESCAPES.get(char, char) for char in name)


def unescape_line(line: str) -> str:
    """The name that `escape_line` escaped."""
    return re.sub(r"\\[\\nr]", lambda match: LINE_UNESCAPES[match[0]], line)


def end_sentence(text: object) -> str:
    """Append a full stop, unless the text already ends like a sentence."""
    stripped = str(text).rstrip()
    return stripped if stripped.endswith((".", "!", "?", "…")) else f"{stripped}."


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6, count: int = 1) -> str:
    """The question " Did you mean 'x'?" for at most `count` similar words; empty if none is near.

    It starts with a space, to be appended to a message.
    """
    near = difflib.get_close_matches(word, list(known), n=count, cutoff=cutoff)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
