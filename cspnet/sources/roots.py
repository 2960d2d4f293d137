"""Which folder is a data root and which a set of class folders: by name, and where it matters by
contents.

A class may be named like a part of a data set: CIFAR-100 has a class `train`. A part holds class
folders, a class folder holds images.
"""

import os
import re
from pathlib import Path

from cspnet.sources.tree import class_folders, folders, has_images, has_own_images

VALIDATION_NAMES = ("val", "valid", "validation")
SPLITS = ("train", *VALIDATION_NAMES)
# What people call the splits of a data set, perhaps with a number.
SPLIT = re.compile(
    r"(train|training|val|valid|validation|tests?|testing|dev|eval|evaluation|holdout|"
    r"unlabell?ed)[\W_\d]*",
    re.IGNORECASE,
)


def split_names(folder: Path) -> list[str]:
    """Names of a folder's parts of a data set; links and files of such a name count, too.

    None where the folder holds classes, of which some have such a name. Raises DataError.
    """
    named = [name for name in SPLITS if os.path.lexists(folder / name)]
    return [] if named and _holds_classes(folder) else named


def is_root(folder: Path) -> bool:
    """Whether a folder has a part of a data set with class folders in it. Raises DataError."""
    return any(is_part(folder / name) for name in split_names(folder))


def is_part(folder: Path) -> bool:
    """Whether a folder holds class folders and is none itself. Raises DataError."""
    return folder.is_dir() and not has_own_images(folder) and bool(class_folders(folder))


def is_split(folder: Path) -> bool:
    """Whether a folder has the name of a split, ours or another, and images in it."""
    return bool(SPLIT.fullmatch(folder.name)) and has_images(folder)


def is_misplaced(folder: Path) -> bool:
    """Whether a folder without parts holds a data root, or parts with other names than ours.

    Then no sub-folder holds images directly. Raises DataError.
    """
    inner = [name for name in folders(folder) if has_images(folder / name)]
    if _is_like_its_sibling(folder, set(inner)):
        return False
    if any(has_own_images(folder / name) for name in inner):
        return False
    named = any(is_split(folder / name) for name in inner)
    return named or any(is_root(folder / name) for name in inner)


def _holds_classes(folder: Path) -> bool:
    """Whether the sub-folders that are named like parts are classes beside other classes."""
    inner = set(folders(folder))
    named, others = inner & set(SPLITS), inner - set(SPLITS)
    if not named:
        return False
    if _is_like_its_sibling(folder, inner):
        return True
    if any(not has_own_images(folder / name) or class_folders(folder / name) for name in named):
        return False
    return any(has_own_images(folder / name) for name in others if not SPLIT.fullmatch(name))


def _is_like_its_sibling(folder: Path, inner: set[str]) -> bool:
    """Whether a folder is a part by name, and a part beside it has the same classes."""
    here = Path(os.path.abspath(folder))
    if here.name not in SPLITS or len(inner) < 2:
        return False
    for name in SPLITS:
        if name != here.name and (here.parent / name).is_dir():
            beside = set(folders(here.parent / name))
            both = inner & beside
            if inner & set(SPLITS) <= both and (both - set(SPLITS) or inner == beside):
                return True
    return False
