"""Command lines to print for the user to copy, quoted for a POSIX shell."""

import re
import shlex
from os import PathLike, fsdecode

# Control characters, and surrogates, which stand for bytes that are not UTF-8 (surrogateescape).
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def shell_quote(word: str | PathLike) -> str:
    """Quotes one word of a command line if it has spaces or characters special to a shell.

    Control characters and bytes that are not UTF-8 become escapes in `$'…'`, from which bash, zsh
    and ksh restore the same bytes.
    """
    text = fsdecode(word)
    if not _UNPRINTABLE.search(text):
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + _UNPRINTABLE.sub(_escape, escaped) + "'"


def command_line(*words: str | PathLike) -> str:
    """A command line of these words, each quoted."""
    return " ".join(shell_quote(word) for word in words)


def _escape(match: re.Match[str]) -> str:
    return "".join(f"\\x{byte:02x}" for byte in match[0].encode("utf-8", "surrogateescape"))
