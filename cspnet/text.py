"""Text for people: names and messages that any terminal can show.

A file's name is bytes. Python decodes it with surrogate escapes, so that the same bytes come back
when the file is opened. Only what is displayed is escaped; paths stay as they are.
"""

import difflib
import re
from collections.abc import Iterable

LINE_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}  # of `to_line`
LINE_UNESCAPES = {escaped: char for char, escaped in LINE_ESCAPES.items()}


def printable(text: str, keep: str = "") -> str:
    """The text with escapes (`\\n`, `\\x1b`, `\\udcff`) for all that is not printable.

    Control characters would act on a terminal, and surrogates cannot be encoded. Characters in
    `keep` stay. Escaping twice changes nothing.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def escape_line(name: str) -> str:
    """A name on one line of a file; `from_line` returns it unchanged."""
    return "".join(LINE_ESCAPES.get(char, char) for char in name)


def unescape_line(line: str) -> str:
    """The name that `to_line` wrote."""
    return re.sub(r"\\[\\nr]", lambda found: LINE_UNESCAPES[found[0]], line)


def end_sentence(text: object) -> str:
    """The text with a full stop at its end, unless it already ends a sentence."""
    told = str(text).rstrip()
    return told if told.endswith((".", "!", "?", "…")) else f"{told}."


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The question " Did you mean 'x'?" for the most similar known word; empty if none is near.

    It starts with a space, to be appended to a message.
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""
