"""Commands that are printed for the user to copy: every word is quoted for a POSIX shell."""

import re
import shlex
from os import PathLike, fsdecode

# What a terminal must not get raw, and what stands for bytes that are no UTF-8 (surrogateescape).
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def shell_quote(word: str | PathLike) -> str:
    """One word of a command line, quoted where it has blanks or characters special to a shell.

    Control characters and bytes that are no UTF-8 become escapes in `$'…'`, which bash, zsh and ksh
    read back byte for byte.
    """
    text = fsdecode(word)
    if not _UNPRINTABLE.search(text):
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + _UNPRINTABLE.sub(_escape, escaped) + "'"


def command_line(*words: str | PathLike) -> str:
    """A command line of these words, to be copied into a shell."""
    return " ".join(shell_quote(word) for word in words)


def _escape(found: re.Match) -> str:
    return "".join(f"\\x{byte:02x}" for byte in found[0].encode("utf-8", "surrogateescape"))
