"""The class names of a network: label files, and the class orders of other trainers.

A label file has one class name per line, in index order, like Darknet's. Names are bytes in any
encoding. They are compared with folder names, which are bytes, too (both through `os.fsdecode`).

Trainers number class folders in different orders. torchvision and cspnet sort names by code point
("10" before "2"); timm sorts them naturally ("2" before "10", ignoring case).
"""

import itertools
import os
import re
from dataclasses import replace
from pathlib import Path

from cspnet.errors import CheckpointError, RecipeError
from cspnet.text import printable
from cspnet.weights.trained import Trained, permute_classes

BOM = b"\xef\xbb\xbf"


def read_labels(path: Path, classes: int) -> tuple[list[str], list[str]]:
    """The names of `classes` classes from the first lines of a label file, and remarks.

    A line ends with LF or CRLF; spaces are part of a name. As in Darknet, a blank line counts as a
    class, which would have no name. CheckpointError.
    """
    shown = printable(str(path))
    try:
        content = path.read_bytes().removeprefix(BOM)
    except OSError as error:
        raise CheckpointError(f"{shown} cannot be read: {error.strerror}") from None
    lines = [line.removesuffix(b"\r") for line in content.removesuffix(b"\n").split(b"\n")]
    names = [os.fsdecode(line) for line in lines[:classes]]
    if not content.strip():
        raise CheckpointError(
            f"{shown} is empty; it must have {classes} lines, each with a class name"
        )
    if len(names) < classes:
        raise CheckpointError(
            f"{shown} has {len(names)} lines, but the network has {classes} classes: it belongs to "
            "another network, or is truncated"
        )
    first_lines: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name:
            raise CheckpointError(
                f"{shown}, line {number} is blank. Each line names a class, starting with the "
                "first class; remove the line if it does not stand for a class"
            )
        if name in first_lines:
            raise CheckpointError(
                f"{shown}, lines {first_lines[name]} and {number}: both are {printable(name)}; "
                "class names must be unique"
            )
        first_lines[name] = number
    rest = [line for line in lines[classes:] if line]
    if not rest:
        return names, []
    return names, [f"{shown} has {len(lines):,} lines; the first {classes:,} are used"]


def natural_key(name: str) -> list[int | str]:
    """timm's sort key of a class folder (timm/utils/misc.py): numbers by value, case ignored."""
    pieces = re.split(r"(\d+)", name.lower())
    return [int(piece) if index % 2 else piece for index, piece in enumerate(pieces)]


def assign_class_names(trained: Trained, names: list[str]) -> Trained:
    """The network with class names, which are given in the order of its outputs.

    Its classes are permuted into sorted order, in place.
    """
    order = sorted(range(len(names)), key=names.__getitem__)
    if order == list(range(len(names))):
        return replace(trained, classes=names, inferred=False)
    permute_classes(trained.net, order)
    remarks = [*trained.remarks, "classes permuted into sorted order"]
    return replace(
        trained, classes=sorted(names), file_order=order, remarks=remarks, inferred=False
    )


def apply_label_file(trained: Trained, file: Path, option: str = "") -> Trained:
    """The network with the class names of a label file; `option` if the user gave the file.

    RecipeError if the network has class names already; CheckpointError for an invalid file.
    """
    if trained.classes is not None and not trained.inferred:
        if not option:
            return trained
        raise RecipeError(f"{option} has no effect, because the weights have class names. Omit it")
    names, remarks = read_labels(file, trained.net.classes)
    remarks = [*trained.remarks, f"class names from {printable(str(file))}", *remarks]
    return assign_class_names(replace(trained, remarks=remarks), names)


LABELS_ADVICE = "write them to NAME.labels next to the weights, one per line, in class order"
LABELS_OR_ORDER_ADVICE = (
    f"Give --labels FILE with the class names, or {LABELS_ADVICE}. "
    "If you know the order, use --class-order natural or sorted instead"
)


def resolve_class_names(
    trained: Trained,
    folders: list[str],
    origin: str,
    order: str | None = None,
    option: str = "--class-order",
    ways: str = LABELS_OR_ORDER_ADVICE,
) -> Trained:
    """The network with its own class names, or those of the class folders in the given `order`.

    Without `order`, all orders must agree. `folders` is sorted. `option` is the name of the option
    that sets the order, `ways` the advice for users who have not set it. Permutes the classes in
    place. RecipeError if the option has no effect; CheckpointError if the order is unknown.
    """
    if trained.classes is not None and not (order and trained.inferred):
        if order:
            raise RecipeError(f"{option} has no effect, because {origin} has class names. Omit it")
        return trained
    if len(folders) != trained.net.classes:
        raise CheckpointError(
            f"{origin} has {trained.net.classes} unnamed classes, but the data set has "
            f"{len(folders)}"
        )
    natural = sorted(folders, key=natural_key)
    reason = ""
    if tie := order in (None, "natural") and _tie(natural):
        reason = (
            f"timm sorts folder names naturally; {tie} compare equal, so their order is undefined"
        )
        ways = f"Give --labels FILE with the class names, or {LABELS_ADVICE}" if order else ways
    elif order is None and trained.order_unknown:
        reason = trained.order_unknown
    elif order is None and natural != folders:
        pairs = enumerate(zip(natural, folders, strict=True))
        index, pair = next((index, pair) for index, pair in pairs if pair[0] != pair[1])
        reason = (
            "timm sorts folder names naturally, torchvision and cspnet by code point, and the two "
            f"orders differ: class {index} would be {' or '.join(map(ascii, pair))}"
        )
    if reason:
        raise CheckpointError(
            f"{origin} has no class names, and the order of its {len(folders)} classes is unknown: "
            f"{reason}. {ways}"
        )
    how = f"in {order} order, by {option}" if order else "in sorted order (assumed)"
    remarks = [*trained.remarks, f"no class names in the file; using the folder names, {how}"]
    return assign_class_names(
        replace(trained, remarks=remarks), natural if order == "natural" else folders
    )


def _tie(names: list[str]) -> str:
    """Two names with the same sort key in timm, which reads them from an unordered set; or ""."""
    for first, second in itertools.pairwise(names):
        if natural_key(first) == natural_key(second):
            return f"{printable(first)} and {printable(second)}"
    return ""
