"""Files of a report, replaced whole."""

import os
from collections.abc import Callable
from pathlib import Path

from cspnet.errors import RecipeError

PNG = b"\x89PNG\r\n\x1a\n"


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file so that a kill or a full disk leaves the old one or the new one. OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_png(path: Path) -> None:
    """Raises RecipeError unless a PNG can be written there without loss of another kind of file."""
    if path.suffix.lower() != ".png" or path.is_dir() or not path.absolute().parent.is_dir():
        raise RecipeError(f"--out {path}: must be a .png file in a folder that exists")
    try:
        with open(path, "rb") as file:
            start = file.read(len(PNG))
    except FileNotFoundError:
        return
    except OSError as error:
        raise RecipeError(f"--out {path}: {error.strerror}") from None
    if start != PNG:
        raise RecipeError(f"--out {path} is a file, and no PNG: name another")
