"""A trained network in Darknet's files: `.weights`, with its `.cfg` and `.data` next to it."""

import os
from pathlib import Path

import torch

from cspnet.errors import CheckpointError, RecipeError
from cspnet.recipe.load import load_recipe
from cspnet.text import printable
from cspnet.weights import labels
from cspnet.weights.darknet_cfg import create_from_cfg
from cspnet.weights.darknet_format import DarknetFormatError, load_darknet_weights
from cspnet.weights.trained import Trained, recipe_problems

# The start of the comment in our `.cfg` with the evaluation preprocessing; the keys in it.
PREPROCESSING_MARK = "# cspnet: "
PREPROCESSING_KEYS = ("crop_pct", "interpolation")
# The comment in our `.data` for a network without class names: its .names contains only indices.
UNNAMED_CLASSES_MARK = "# cspnet: the classes have no names"

DARKNET_PREPROCESSING = (
    "preprocessing as in Darknet's validation: RGB in [0, 1], shorter side resized, center crop"
)


def from_darknet(path: Path, origin: str) -> Trained:
    """The network in a `.weights` file, with its classes in sorted order. CheckpointError."""
    cfg = path.with_suffix(".cfg")
    if not cfg.is_file():
        raise CheckpointError(
            f"{origin} needs its .cfg next to it: {printable(str(cfg))} does not exist"
        )
    try:
        net, size = create_from_cfg(cfg)
        images_seen = load_darknet_weights(net, path)
        first_line = cfg.read_text(errors="replace").partition("\n")[0]
    except DarknetFormatError as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        raise CheckpointError(
            f"{printable(str(error.filename))} cannot be read: {error.strerror}"
        ) from None
    slope = ["model.leaky_slope=0.1"] if net.activation == "leaky" else []
    is_ours = first_line.startswith(PREPROCESSING_MARK)
    view = first_line.removeprefix(PREPROCESSING_MARK).split() if is_ours else []
    network = (f"model.name={net.name}", f"model.width={net.width}", f"data.image_size={size}")
    activation = (f"model.activation={net.activation}", *slope)
    try:
        recipe = load_recipe(None, [*network, *activation, *view])
    except RecipeError as error:
        raise CheckpointError(
            f"{printable(str(cfg))} needs unsupported settings: {recipe_problems(error)}"
        ) from None
    names, remarks, reason = _find_names(path, net.classes)
    if reason:
        remarks.append(f"no class names: {reason}")
    trained = Trained(
        net,
        recipe,
        None,
        step=images_seen // recipe.batch,
        images_seen=images_seen,
        remarks=["preprocessing from its .cfg" if view else DARKNET_PREPROCESSING, *remarks],
        order_unknown=f"{reason}. Darknet lists can have any order" if reason else "",
    )
    if names:
        trained = labels.assign_class_names(trained, names)
    net.to(memory_format=torch.channels_last)
    return trained


def _find_names(path: Path, classes: int) -> tuple[list[str], list[str], str]:
    """The class names for a `.weights` file in its order, remarks, and why there are no names."""
    data, labels_file = path.with_suffix(".data"), path.with_suffix(".labels")
    shown = printable(data.name)
    if not os.path.isfile(data):
        if not os.path.isfile(labels_file):
            return [], [], f"there is no {shown} that names a labels list"
        names, warnings = labels.read_labels(labels_file, classes)
        return names, [f"class names from {printable(str(labels_file))}", *warnings], ""
    options, nameless = _read_data(data)
    remarks: list[str] = []
    if (count := options.get("classes", str(classes))) != str(classes):
        remarks.append(f"{shown} says classes={printable(count)}, but the network has {classes}")
    if nameless:
        return [], remarks, f"{shown} says that the classes are unnamed"
    named = options.get("labels") or options.get("names")
    if not named:
        return [], remarks, f"{shown} has no line labels=FILE"
    files = _find_lists(named, data)
    if not files:
        return [], remarks, f"{shown} names the list {printable(named)}, which does not exist"
    lists = [labels.read_labels(file, classes) for file in files]
    for file, (names, _) in zip(files, lists, strict=True):
        if names != lists[0][0]:
            first, second = printable(str(files[0])), printable(str(file))
            raise CheckpointError(
                f"{shown} names the list {printable(named)}, which matches {first} and {second}, "
                "but the two differ: remove or rename one of them"
            )
    return lists[0][0], [*remarks, *lists[0][1]], ""


def _find_lists(named: str, data: Path) -> list[Path]:
    """The files that the name of a list in a `.data` may refer to.

    Darknet resolves it against the working folder. The `.data` may have been moved together with
    the list, so try its folder, too.
    """
    candidates = (Path(named), data.parent / named, data.parent / Path(named).name)
    existing = {os.path.realpath(path): path for path in candidates if os.path.isfile(path)}
    return list(existing.values())


def _read_data(path: Path) -> tuple[dict[str, str], bool]:
    """The options of a `.data` in any encoding, and whether it has UNNAMED_CLASSES_MARK.

    Like Darknet: # and ; start a comment only at the start of a line; the first of duplicate keys
    counts. CheckpointError.
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
