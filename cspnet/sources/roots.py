"""Tell a data root from a split (a folder of class folders): by names, and if need be by contents.

A class may have the name of a split: CIFAR-100 has a class `train`. A split contains class folders,
a class folder contains images.
"""

import os
import re
from pathlib import Path

from cspnet.sources.tree import class_folders, has_images, has_own_images, list_folders

VALIDATION_NAMES = ("val", "valid", "validation")
SPLITS = ("train", *VALIDATION_NAMES)
# Common names of splits, optionally with a number.
SPLIT_PATTERN = re.compile(
    r"(train|training|val|valid|validation|tests?|testing|dev|eval|evaluation|holdout|"
    r"unlabell?ed)[\W_\d]*",
    re.IGNORECASE,
)


def split_names(folder: Path) -> list[str]:
    """Names of the splits in a data root, including links and files with such names.

    Empty if the folder contains classes, some of which have such names. Raises DataError.
    """
    names = [name for name in SPLITS if os.path.lexists(folder / name)]
    return [] if names and _contains_classes(folder) else names


def is_data_root(folder: Path) -> bool:
    """Whether a folder has a split with class folders in it. Raises DataError."""
    return any(is_split(folder / name) for name in split_names(folder))


def is_split(folder: Path) -> bool:
    """Whether a folder contains class folders, and no images directly in it. Raises DataError."""
    return folder.is_dir() and not has_own_images(folder) and bool(class_folders(folder))


def has_split_name(folder: Path) -> bool:
    """Whether a folder has a common name of a split, and images in it."""
    return bool(SPLIT_PATTERN.fullmatch(folder.name)) and has_images(folder)


def is_misplaced(folder: Path) -> bool:
    """Whether a folder without splits contains a data root, or splits with other names than ours.

    In that case no sub-folder contains images directly. Raises DataError.
    """
    inner = [name for name in list_folders(folder) if has_images(folder / name)]
    if _is_like_its_sibling(folder, set(inner)):
        return False
    if any(has_own_images(folder / name) for name in inner):
        return False
    named = any(has_split_name(folder / name) for name in inner)
    return named or any(is_data_root(folder / name) for name in inner)


def _contains_classes(folder: Path) -> bool:
    """Whether the sub-folders named like splits are classes among other classes."""
    inner = set(list_folders(folder))
    named, others = inner & set(SPLITS), inner - set(SPLITS)
    if not named:
        return False
    if _is_like_its_sibling(folder, inner):
        return True
    if any(not has_own_images(folder / name) or class_folders(folder / name) for name in named):
        return False
    return any(
        has_own_images(folder / name) for name in others if not SPLIT_PATTERN.fullmatch(name)
    )


def _is_like_its_sibling(folder: Path, inner: set[str]) -> bool:
    """Whether a folder has the name of a split, and a sibling split has the same classes."""
    absolute = Path(os.path.abspath(folder))
    if absolute.name not in SPLITS or len(inner) < 2:
        return False
    for name in SPLITS:
        sibling = absolute.parent / name
        if name != absolute.name and sibling.is_dir():
            classes = set(list_folders(sibling))
            common = inner & classes
            if inner & set(SPLITS) <= common and (common - set(SPLITS) or inner == classes):
                return True
    return False
