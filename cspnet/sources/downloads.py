"""Well-known data sets as unpacked from their archives, whose layouts need conversion."""

import os
import re
from pathlib import Path

from cspnet.sources.tree import has_own_images, list_entries

# In the folder of Kaggle's archive: the data root, and the class of each validation image.
KAGGLE, SOLUTION = Path("ILSVRC", "Data", "CLS-LOC"), "LOC_val_solution.csv"
FLAT = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")
ANNOTATIONS = "val_annotations.txt"  # of Tiny-ImageNet
SORT = "Sort them into one folder per class"


def known_layout(folder: Path) -> str:
    """Which known download a folder is, and what to do with it; empty for other folders.

    Raises DataError if the folder cannot be read.
    """
    return _kaggle(folder) or _flat_imagenet(folder) or _tiny_imagenet(folder)


def _kaggle(folder: Path) -> str:
    """ImageNet from Kaggle: the data root is up to three levels down, and its val/ is flat."""
    for skipped in range(len(KAGGLE.parts)):
        root = folder.joinpath(*KAGGLE.parts[skipped:])
        if (root / "train").is_dir():
            message = f"{folder} is ImageNet from Kaggle: give its data root, {root}."
            flat = _flat_imagenet(root / "val") if (root / "val").is_dir() else ""
            return f"{message} First convert its val/: {flat}" if flat else message
    return ""


def _flat_imagenet(folder: Path) -> str:
    """ImageNet's validation images in one folder, as in the official archive and in Kaggle's."""
    entries = list_entries(folder)
    count = sum(bool(FLAT.fullmatch(entry.name)) for entry in entries)
    if not count or any(entry.is_dir() for entry in entries):
        return ""
    parents = Path(os.path.abspath(folder)).parents[: len(KAGGLE.parts) + 1]
    tables = [parent / SOLUTION for parent in parents if (parent / SOLUTION).is_file()]
    table = f" according to {tables[0]}, which lists them" if tables else ""
    return (
        f"{folder} is flat: {count:,} validation images of ImageNet and no class folder. "
        f"{SORT}{table}; data/README.md has the commands."
    )


def _tiny_imagenet(folder: Path) -> str:
    """Tiny-ImageNet's validation images in one folder, with their classes in a table."""
    if not (folder / ANNOTATIONS).is_file() or not has_own_images(folder / "images"):
        return ""
    return (
        f"{folder} is the validation set of Tiny-ImageNet as in its archive: all images are in "
        f"images/, and {ANNOTATIONS} lists their classes. {SORT}; "
        "data/README.md has the commands."
    )
