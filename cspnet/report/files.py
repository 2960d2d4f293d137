"""The output files of a report: replaced atomically, checked before the work starts."""

from pathlib import Path

from cspnet.errors import RecipeError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def require_png(path: Path) -> None:
    """Raises RecipeError unless a PNG can be written to the path; overwrites no other file type."""
    if path.suffix.lower() != ".png" or path.is_dir() or not path.absolute().parent.is_dir():
        raise RecipeError(f"--output {path}: must be a .png file in an existing folder")
    try:
        with open(path, "rb") as file:
            signature = file.read(len(PNG_SIGNATURE))
    except FileNotFoundError:
        return
    except OSError as error:
        raise RecipeError(f"--output {path}: {error.strerror}") from None
    if signature != PNG_SIGNATURE:
        raise RecipeError(f"--output {path}: exists and is not a PNG file; give another name")
