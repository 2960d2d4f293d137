"""Listing folders: images, ignored names, and a walk that follows links but always terminates."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from cspnet.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Names that operating systems, file servers, archivers and notebooks add to a user's folders.
SYSTEM_NAMES = frozenset(
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
    """Whether a file or folder with this name was added by a system, not by the user."""
    folded = name.casefold()
    return folded in SYSTEM_NAMES or folded.startswith(".trash-")


def is_ignored(name: str) -> bool:
    """Whether a file or folder with this name is ignored: a hidden one, or a system's."""
    return name.startswith(".") or is_system(name)


def is_image(name: str) -> bool:
    """Whether a file with this name is treated as an image."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def list_entries(folder: Path) -> list[os.DirEntry]:
    """Entries of a folder, sorted by name, without ignored ones. DataError if it is unreadable."""
    try:
        entries = [entry for entry in os.scandir(folder) if not is_ignored(entry.name)]
    except OSError as error:
        raise unreadable_folder(error) from None
    return sorted(entries, key=lambda entry: entry.name)


def list_folders(folder: Path) -> list[str]:
    """Names of the sub-folders, without ignored ones. DataError if the folder is unreadable."""
    return [entry.name for entry in list_entries(folder) if entry.is_dir()]


def unreadable_folder(error: OSError) -> DataError:
    """The error for a folder that cannot be listed."""
    return DataError(
        f"{error.filename} cannot be read: {error.strerror}. Check its permissions "
        "(chmod -R u+rX), and whether the disk is mounted and healthy."
    )


def walk(top: Path, skipped: list[str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Folders from `top` downwards, following links, each with the names of its files.

    Ignored folders are skipped, and their paths appended to `skipped`. Raises DataError for an
    unreadable folder, which os.walk would skip silently.
    """

    def fail(error: OSError) -> None:
        raise unreadable_folder(error) from None

    for folder, inner, files in os.walk(top, onerror=fail, followlinks=True):
        if skipped is not None:
            skipped += [os.path.join(folder, name) for name in sorted(inner) if is_ignored(name)]
        inner[:] = [
            name
            for name in inner
            if not is_ignored(name) and not _links_to_parent(os.path.join(folder, name))
        ]
        yield folder, files


def has_images(folder: str | Path) -> bool:
    """Whether a folder contains an image at any depth; False if it cannot be read."""
    with contextlib.suppress(DataError):
        return any(is_image(name) for _, names in walk(Path(folder)) for name in names)
    return False


def has_own_images(folder: str | Path) -> bool:
    """Whether a folder contains an image directly; False if it cannot be read."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return any(is_image(entry.name) and not entry.is_dir() for entry in entries)
    return False


def class_folders(folder: Path) -> list[str]:
    """Names of the sub-folders that contain an image at any depth. Raises DataError."""
    return [name for name in list_folders(folder) if has_images(folder / name)]


def _links_to_parent(folder: str) -> bool:
    """Whether a folder is a link to one of its parents: following it would never terminate."""
    if not os.path.islink(folder):
        return False
    target, parent = os.path.realpath(folder), os.path.realpath(os.path.dirname(folder))
    return os.path.commonpath([target, parent]) == target
