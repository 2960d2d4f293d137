"""Layouts in which well-known data sets come out of their archives, and that cannot be read so."""

import os
import re
from pathlib import Path

from cspnet.sources.tree import entries, has_own_images

KAGGLE = Path("ILSVRC", "Data", "CLS-LOC")  # the data root, below the folder of Kaggle's archive
SOLUTION = "LOC_val_solution.csv"  # in that folder: the class of each validation image
FLAT = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")
ANNOTATIONS = "val_annotations.txt"  # of Tiny-ImageNet
SORT = "Sort them into one folder per class"


def recognise(folder: Path) -> str:
    """What a folder is and what to do, where it has a known layout of another kind; else nothing.

    Raises DataError where the folder cannot be read.
    """
    return _kaggle(folder) or _flat_imagenet(folder) or _tiny_imagenet(folder)


def _kaggle(folder: Path) -> str:
    """ImageNet as Kaggle packs it: the data root is up to three folders down, its val/ is flat."""
    for skipped in range(len(KAGGLE.parts)):
        root = folder.joinpath(*KAGGLE.parts[skipped:])
        if (root / "train").is_dir():
            told = f"{folder} is ImageNet as Kaggle packs it: give its data root, {root}."
            flat = _flat_imagenet(root / "val") if (root / "val").is_dir() else ""
            return f"{told} Its val/ comes first: {flat}" if flat else told
    return ""


def _flat_imagenet(folder: Path) -> str:
    """The validation images of ImageNet as its archive and Kaggle's have them, without classes."""
    found = entries(folder)
    count = sum(bool(FLAT.fullmatch(entry.name)) for entry in found)
    if not count or any(entry.is_dir() for entry in found):
        return ""
    above = Path(os.path.abspath(folder)).parents[: len(KAGGLE.parts) + 1]
    lists = [parent / SOLUTION for parent in above if (parent / SOLUTION).is_file()]
    named = f" by {lists[0]}, which names their classes" if lists else ""
    return (
        f"{folder} is flat: {count:,} validation images of ImageNet and no class folder. "
        f"{SORT}{named}; data/README.md has the commands."
    )


def _tiny_imagenet(folder: Path) -> str:
    """The validation images of Tiny-ImageNet, all in one folder, with their classes in a table."""
    if not (folder / ANNOTATIONS).is_file() or not has_own_images(folder / "images"):
        return ""
    return (
        f"{folder} is the validation set of Tiny-ImageNet as its archive unpacks: all images are "
        f"in images/, and {ANNOTATIONS} names their classes. {SORT}; "
        "data/README.md has the commands."
    )
