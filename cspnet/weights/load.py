"""Trained networks from any file: checkpoints, safetensors, timm's state dicts, `.weights`.

The preprocessing is read from our own files and from timm's `config.json`. For other files the
convention of their origin is assumed and reported: Darknet's validation for `.weights`, timm's for
a state dict. The readers are in cspnet/weights.
"""

import os
from pathlib import Path

from cspnet.errors import CheckpointError
from cspnet.nets.network import Network
from cspnet.recipe.load import flatten
from cspnet.recipe.schema import Recipe, no_effect
from cspnet.text import printable
from cspnet.weights import config
from cspnet.weights.checkpoint import from_checkpoint
from cspnet.weights.darknet import from_darknet
from cspnet.weights.labels import LABELS_ADVICE, apply_label_file, resolve_class_names
from cspnet.weights.pretrained import from_timm
from cspnet.weights.tensors import TENSOR_SUFFIXES, from_tensors
from cspnet.weights.trained import Trained, build_net, load_strict

# Weights must be used with the settings of their training; a mismatch silently costs accuracy.
CONVENTIONS = (
    *("model.activation", "model.leaky_slope", "model.norm_eps"),
    *("data.normalize", "data.mean", "data.std"),
)


def init_net(recipe: Recipe, classes: list[str]) -> tuple[Network, list[str]]:
    """The initial network of a run, and remarks: fresh, or with the weights in `model.init_from`.

    Everything except the classifier must match. The classifier is loaded if its class names are
    `classes`, or if it has the same number of unnamed classes in a known order. CheckpointError if
    the weights cannot be used.
    """
    net = build_net(recipe, len(classes))
    origin = recipe.model.init_from
    if origin is None:
        return net, []
    trained = load_weights(origin, recipe)
    order = recipe.model.class_order
    if order != "fresh" and trained.net.classes == len(classes):
        trained = resolve_class_names(
            trained,
            classes,
            origin,
            None if order == "auto" else order,
            option="model.class_order",
            ways=f"If you know the names, {LABELS_ADVICE}; "
            "if you know the order, set model.class_order to natural or sorted; "
            "model.class_order=fresh initializes a new classifier",
        )
    state, initial_state = trained.net.state_dict(), net.state_dict()
    head = net.classifier_keys()
    is_complete = order != "fresh" and trained.classes == classes
    if not is_complete:
        for key in head:
            state[key] = initial_state[key]
    load_strict(net, state, origin)
    start = f"initialized from {origin}, step {trained.step:,}{', EMA' if trained.averaged else ''}"
    if is_complete:
        remarks = [f"{start}: all {len(state)} tensors loaded"]
    else:
        reason = (
            "because model.class_order is fresh"
            if order == "fresh"
            else f"because its {trained.net.classes} classes differ from the data set's "
            f"{len(classes)} classes"
        )
        remarks = [
            f"{start}: {len(initial_state) - len(head)} tensors loaded; not loaded: "
            f"{', '.join(head)}, {reason}"
        ]
    return net, [*trained.remarks, *remarks, *_convention_warnings(trained.recipe, recipe)]


def _convention_warnings(trained: Recipe, recipe: Recipe) -> list[str]:
    """The conventions of trained weights that the recipe of a new run changes."""
    old, new = dict(flatten(trained)), dict(flatten(recipe))
    return [
        f"warning: the weights were trained with {key}={old[key]}, this run has {new[key]}"
        for key in CONVENTIONS
        if old[key] != new[key] and not no_effect(recipe, key)
    ]


def load_weights(name: str, wanted: Recipe | None = None, labels: Path | None = None) -> Trained:
    """The trained network in a file, whose suffix is its format, or the pretrained `timm:NAME`.

    A folder must have the layout of timm and the Hub. For a bare state dict, `wanted` is the recipe
    of its network; without it, the most similar of our networks is assumed, with timm's
    conventions. `labels` is a file of class names for weights without names. CheckpointError if the
    weights cannot be loaded; RecipeError if they have class names already.
    """
    if name.startswith("timm:"):
        trained = from_timm(name.removeprefix("timm:"))
    else:
        trained = _open_file(name, wanted, find_labels=labels is None)
    return apply_label_file(trained, labels, f"--labels {labels}") if labels else trained


def load_network(name: str | os.PathLike[str]) -> Network:
    """The network in a file, in evaluation mode. Detectors use `load("best.pt").pyramid(images)`.

    Images are float [N, 3, H, W], preprocessed as in the file's recipe, which `cspnet predict`
    prints. CheckpointError if the file cannot be loaded.
    """
    return load_weights(str(name)).net.eval()


def _open_file(name: str, wanted: Recipe | None, find_labels: bool) -> Trained:
    """The network in a file or folder; `find_labels`: with the class names in NAME.labels."""
    path = Path(os.path.expanduser(name))
    origin = printable(str(path))
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # the reader reports which files exist instead
    except OSError as error:
        raise CheckpointError(f"{origin} cannot be read: {error.strerror}") from None
    if path.is_dir():
        path = config.find_hub_weights(path) or path
        origin = printable(str(path))
    if path.suffix == ".weights" or path.suffix in TENSOR_SUFFIXES:
        _require_file(path, origin)
    elif path.is_file() and path.suffix != ".pt":
        raise CheckpointError(
            f"{origin}: unknown suffix; supported are .pt, .safetensors, .pth, .bin, .tar and "
            ".weights"
        )
    else:
        return from_checkpoint(path, origin)
    if path.suffix == ".weights":
        return from_darknet(path, origin)
    trained = from_tensors(path, origin, wanted)
    labels = path.with_suffix(".labels")
    return apply_label_file(trained, labels) if find_labels and os.path.isfile(labels) else trained


def _require_file(path: Path, origin: str) -> None:
    if path.is_dir():
        raise CheckpointError(
            f"{origin} is a folder without {' or '.join(config.HUB_WEIGHTS)}: give a file"
        )
    if not path.is_file():
        raise CheckpointError(f"the file {origin} does not exist")
