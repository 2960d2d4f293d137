"""What is in a folder: images, the names to ignore, and a walk that follows links and ends."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from cspnet.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# What operating systems, file servers, archivers and notebooks put beside a user's files.
SYSTEM = frozenset(
    (
        *("@eadir", "#recycle", "#snapshot", "@tmp", "@sharebin"),  # Synology
        *("@recycle", "@recently-snapshot", ".@__thumb"),  # QNAP
        *("$recycle.bin", "system volume information"),  # Windows
        *("thumbs.db", "ehthumbs.db", "desktop.ini"),
        *("__macosx", ".ds_store", ".appledouble", ".spotlight-v100", ".trashes", ".fseventsd"),
        *("lost+found", ".trash", ".directory"),  # Linux
        *(".ipynb_checkpoints", "__pycache__"),
    )
)


def is_system(name: str) -> bool:
    """Whether a file or folder of this name belongs to a system, and not to a data set."""
    folded = name.casefold()
    return folded in SYSTEM or folded.startswith(".trash-")


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is not looked at: a hidden one, or a system's."""
    return name.startswith(".") or is_system(name)


def is_image(name: str) -> bool:
    """Whether a file of this name is read as an image."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def entries(folder: Path) -> list[os.DirEntry]:
    """What is in a folder and not ignored, by name. Raises DataError where it cannot be read."""
    try:
        found = [entry for entry in os.scandir(folder) if not is_ignored(entry.name)]
    except OSError as error:
        raise unreadable_folder(error) from None
    return sorted(found, key=lambda entry: entry.name)


def folders(folder: Path) -> list[str]:
    """Names of the sub-folders that are not ignored. Raises DataError as `entries` does."""
    return [entry.name for entry in entries(folder) if entry.is_dir()]


def unreadable_folder(error: OSError) -> DataError:
    """For a folder that the system does not let us list."""
    return DataError(
        f"{error.filename} cannot be read: {error.strerror}. Give yourself the right to read it "
        "(chmod -R u+rX), or look whether the disk is mounted and well."
    )


def walk(top: Path, skipped: list[str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Folders from `top` downward, links followed, each with the names of its files.

    Ignored folders are left out; `skipped` gets their paths. Raises DataError where a folder cannot
    be read, which os.walk would pass over.
    """

    def fail(error: OSError) -> None:
        raise unreadable_folder(error) from None

    for folder, inner, files in os.walk(top, onerror=fail, followlinks=True):
        if skipped is not None:
            skipped += [os.path.join(folder, name) for name in sorted(inner) if is_ignored(name)]
        inner[:] = [
            name
            for name in inner
            if not is_ignored(name) and not _leads_up(os.path.join(folder, name))
        ]
        yield folder, files


def has_images(folder: str | Path) -> bool:
    """Whether an image is in a folder, at any depth; False where it cannot be read."""
    with contextlib.suppress(DataError):
        return any(is_image(name) for _, names in walk(Path(folder)) for name in names)
    return False


def has_own_images(folder: str | Path) -> bool:
    """Whether an image is directly in a folder; False where it cannot be read."""
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        return any(is_image(entry.name) and not entry.is_dir() for entry in found)
    return False


def class_folders(folder: Path) -> list[str]:
    """Names of the sub-folders with an image in them, at any depth. Raises DataError."""
    return [name for name in folders(folder) if has_images(folder / name)]


def _leads_up(folder: str) -> bool:
    """Whether a folder is a link to one above it: walking there would never end."""
    if not os.path.islink(folder):
        return False
    above, here = os.path.realpath(folder), os.path.realpath(os.path.dirname(folder))
    return os.path.commonpath([above, here]) == above
