"""Checks of the paths that pictures are written to."""

from pathlib import Path

from cspnet.errors import RecipeError

PNG = b"\x89PNG\r\n\x1a\n"


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
