"""Which class an index of a net stands for: label files, and the class orders of other trainers.

A label file holds one class name per line, in index order, as Darknet's do. Names are bytes, of any
encoding: they are compared with folder names, which are bytes too (`os.fsdecode` of both).

Trainers number class folders in different orders: torchvision and cspnet sort their names by code
point ("10" before "2"), timm naturally ("2" before "10", upper and lower case alike).
"""

import itertools
import os
import re
from dataclasses import replace
from pathlib import Path

from cspnet.errors import CheckpointError, RecipeError
from cspnet.text import printable
from cspnet.weights.trained import Trained, permute_classes

CLASS_ORDERS = ("natural", "sorted")
BOM = b"\xef\xbb\xbf"


def read_labels(path: Path, classes: int) -> tuple[list[str], list[str]]:
    """The names of a net's classes from the first lines of a label file, and remarks.

    A line ends in LF or CRLF; blanks are part of a name. As in Darknet a blank line counts: it
    would be a class without a name. CheckpointError.
    """
    shown = printable(str(path))
    try:
        content = path.read_bytes().removeprefix(BOM)
    except OSError as error:
        raise CheckpointError(f"{shown} cannot be read: {error.strerror}") from None
    lines = [line.removesuffix(b"\r") for line in content.removesuffix(b"\n").split(b"\n")]
    names = [os.fsdecode(line) for line in lines[:classes]]
    if not content.strip():
        raise CheckpointError(f"{shown} is empty: each line must name a class, {classes} in all")
    if len(names) < classes:
        raise CheckpointError(
            f"{shown} has {len(names)} lines, the net {classes} classes: it is the list of another "
            "net, or cut short"
        )
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name:
            raise CheckpointError(
                f"{shown}, line {number} is blank. Each line names a class, the first line the "
                "first class; remove the blank line if it is not meant to be one"
            )
        if name in first:
            raise CheckpointError(
                f"{shown}, lines {first[name]} and {number}: both are {printable(name)}; "
                "each class needs a name of its own"
            )
        first[name] = number
    rest = [line for line in lines[classes:] if line]
    if not rest:
        return names, []
    return names, [f"{shown} has {len(lines):,} lines; the first {classes:,} are the classes"]


def natural_key(name: str) -> list[int | str]:
    """timm's sort key of a class folder (timm/utils/misc.py): numbers by value, lower case."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def assign_class_names(trained: Trained, names: list[str]) -> Trained:
    """The net with these class names, given in the order of its outputs; its classes are sorted.

    The net is changed in place.
    """
    order = sorted(range(len(names)), key=names.__getitem__)
    if order == list(range(len(names))):
        return replace(trained, classes=names, inferred=False)
    permute_classes(trained.net, order)
    remarks = [*trained.remarks, "the classes were put in sorted order"]
    return replace(trained, classes=sorted(names), order=order, remarks=remarks, inferred=False)


def apply_label_file(trained: Trained, file: Path, option: str = "") -> Trained:
    """The net with the class names of a label file, which the user may have given by an option."""
    if trained.classes is not None and not trained.inferred:
        if not option:
            return trained
        raise RecipeError(f"{option} has no effect: the weights have class names. Leave it out")
    names, remarks = read_labels(file, trained.net.classes)
    remarks = [*trained.remarks, f"class names from {printable(str(file))}", *remarks]
    return assign_class_names(replace(trained, remarks=remarks), names)


LABELS_ADVICE = "put them into NAME.labels beside the weights, one a line, in class order"
LABELS_OR_ORDER_ADVICE = f"Give --labels FILE with the class names, or {LABELS_ADVICE}; or give --class-order natural or sorted"


def resolve_class_names(
    trained: Trained,
    folders: list[str],
    origin: str,
    order: str | None = None,
    option: str = "--class-order",
    ways: str = LABELS_OR_ORDER_ADVICE,
) -> Trained:
    """A net with class names: its own ones, or those of as many class folders, in an `order`.

    Without one the order must not matter. `folders` are sorted names, `option` is where the order
    comes from and `ways` what a user can do without one. The net is changed in place. RecipeError
    where the option has no effect, CheckpointError where the order cannot be known.
    """
    if trained.classes is not None and not (order and trained.inferred):
        if order:
            raise RecipeError(f"{option} has no effect: {origin} has class names. Leave it out")
        return trained
    if len(folders) != trained.net.classes:
        raise CheckpointError(
            f"{origin} has {trained.net.classes} classes without names, the data {len(folders)}"
        )
    natural = sorted(folders, key=natural_key)
    reason = ""
    if tie := order in (None, "natural") and _tie(natural):
        reason = f"timm sorts folder names naturally, where {tie} are equal and come in any order"
        ways = f"Give --labels FILE with the class names, or {LABELS_ADVICE}" if order else ways
    elif order is None and trained.unordered:
        reason = trained.unordered
    elif order is None and natural != folders:
        pairs = enumerate(zip(natural, folders, strict=True))
        place, pair = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
        reason = (
            "timm sorts folder names naturally, torchvision and cspnet by code point, and the two "
            f"differ here: class {place} would be {' or '.join(map(ascii, pair))}"
        )
    if reason:
        raise CheckpointError(
            f"{origin} has no class names, and the order of its {len(folders)} classes is unknown: "
            f"{reason}. {ways}"
        )
    how = f"in {order} order, by {option}" if order else "in sorted order, which is assumed"
    remarks = [*trained.remarks, f"no class names in the file: those of the folders, {how}"]
    return assign_class_names(
        replace(trained, remarks=remarks), natural if order == "natural" else folders
    )


def _tie(names: list[str]) -> str:
    """Two names that are equal to timm, which takes them in the order of a set: any order."""
    for one, other in itertools.pairwise(names):
        if natural_key(one) == natural_key(other):
            return f"{printable(one)} and {printable(other)}"
    return ""
