"""A trained net in Darknet's files: `.weights`, with its `.cfg` and `.data` beside it."""

import os
from pathlib import Path

import torch

from cspnet.errors import CheckpointError, RecipeError
from cspnet.recipe.load import load_recipe
from cspnet.text import printable
from cspnet.weights import labels
from cspnet.weights.darknet_format import DarknetFormatError, load_darknet_weights, net_from_cfg
from cspnet.weights.trained import Trained, recipe_problems

# The line of our own `.cfg` that keeps the recipe's view of a validation, and what is in it.
PREPROCESSING_MARK = "# cspnet: "
PREPROCESSING_KEYS = ("crop_pct", "interpolation")
# The line of our own `.data` for a net without class names: its names are but numbers.
UNNAMED_CLASSES_MARK = "# cspnet: the classes have no names"

DARKNET_PREPROCESSING = (
    "prepared as Darknet's valid: RGB in [0, 1], shorter side to the size, centre crop"
)


def from_darknet(path: Path, origin: str) -> Trained:
    """The net of a `.weights` file; its classes are put in the order of their names.

    CheckpointError.
    """
    cfg = path.with_suffix(".cfg")
    if not cfg.is_file():
        raise CheckpointError(
            f"{origin} needs its .cfg beside it: {printable(str(cfg))} does not exist"
        )
    try:
        net, size = net_from_cfg(cfg)
        seen = load_darknet_weights(net, path)
        first = cfg.read_text(errors="replace").partition("\n")[0]
    except DarknetFormatError as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        raise CheckpointError(
            f"{printable(str(error.filename))} cannot be read: {error.strerror}"
        ) from None
    slope = ["model.leaky_slope=0.1"] if net.activation == "leaky" else []
    view = (
        first.removeprefix(PREPROCESSING_MARK).split()
        if first.startswith(PREPROCESSING_MARK)
        else []
    )
    try:
        recipe = load_recipe(
            None,
            [
                *(f"model.name={net.name}", f"model.width={net.width}", f"data.image_size={size}"),
                *(f"model.activation={net.activation}", *slope, *view),
            ],
        )
    except RecipeError as error:
        raise CheckpointError(
            f"{printable(str(cfg))} asks for what cspnet has not: {recipe_problems(error)}"
        ) from None
    names, remarks = _find_names(path, net.classes)
    trained = Trained(
        net,
        recipe,
        None,
        step=seen // recipe.batch,
        seen=seen,
        remarks=["images prepared as its .cfg says" if view else DARKNET_PREPROCESSING, *remarks],
        unordered="" if names else f"{remarks[-1]}. A Darknet list has an order of its own",
    )
    if names:
        trained = labels.assign_class_names(trained, names)
    net.to(memory_format=torch.channels_last)
    return trained


def _find_names(path: Path, classes: int) -> tuple[list[str] | None, list[str]]:
    """The class names of a `.weights` in its own order, and remarks; the last says why not."""
    data, beside = path.with_suffix(".data"), path.with_suffix(".labels")
    shown = printable(data.name)
    if not os.path.isfile(data):
        if not os.path.isfile(beside):
            return None, [f"no {shown} with a labels list beside it: no class names"]
        names, remarks = labels.read_labels(beside, classes)
        return names, [f"class names from {printable(str(beside))}", *remarks]
    options, nameless = _read_data(data)
    remarks = []
    if (told := options.get("classes", str(classes))) != str(classes):
        remarks.append(f"{shown} says classes={printable(told)}, the net has {classes}")
    if nameless:
        return None, [*remarks, f"{shown} says that the classes have no names"]
    named = options.get("labels") or options.get("names")
    if not named:
        return None, [*remarks, f"{shown} has no line labels=FILE: no class names"]
    there = _places(named, data)
    if not there:
        told = f"{shown} names the list {printable(named)}, which does not exist: no class names"
        return None, [*remarks, told]
    lists = [labels.read_labels(file, classes) for file in there]
    for file, (names, _) in zip(there, lists, strict=True):
        if names != lists[0][0]:
            one, other = printable(str(there[0])), printable(str(file))
            raise CheckpointError(
                f"{shown} names the list {printable(named)}, which may be {one} or {other}, and "
                "the two differ: remove or rename one of them"
            )
    return lists[0][0], [*remarks, *lists[0][1]]


def _places(named: str, data: Path) -> list[Path]:
    """Where a list that a `.data` names is: where Darknet finds it, from the working folder; and
    from the folder of the `.data`, which may have been moved together with the list."""
    places = (Path(named), data.parent / named, data.parent / Path(named).name)
    there = {os.path.realpath(place): place for place in places if os.path.isfile(place)}
    return list(there.values())


def _read_data(path: Path) -> tuple[dict[str, str], bool]:
    """The options of a `.data`, of any encoding, and whether it says that classes have no names.

    As Darknet: # and ; begin a comment at the start of a line only; of two options the first holds.
    """
    try:
        lines = [os.fsdecode(line).strip() for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise CheckpointError(f"{printable(str(path))} cannot be read: {error.strerror}") from None
    options: dict[str, str] = {}
    for line in lines:
        key, equals, value = line.partition("=")
        if equals and line[0] not in "#;":
            options.setdefault(key.strip(), value.strip())
    return options, UNNAMED_CLASSES_MARK in lines
