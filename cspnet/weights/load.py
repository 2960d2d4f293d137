"""A trained net in any file: a checkpoint, safetensors, timm's state dicts, `.weights`.

A file says how its images are to be prepared where it is ours or has timm's `config.json` beside
it. For the others the convention of their makers is taken, and said: Darknet's validation for
`.weights`, timm's for a state dict. The readers are in cspnet/weights.
"""

import os
from pathlib import Path

from torch import nn

from cspnet.errors import CheckpointError
from cspnet.recipe.load import flatten
from cspnet.recipe.schema import Recipe, no_effect
from cspnet.text import printable
from cspnet.weights import config
from cspnet.weights.checkpoint import from_checkpoint
from cspnet.weights.darknet import from_darknet
from cspnet.weights.labels import LABELS_ADVICE, apply_label_file, resolve_class_names
from cspnet.weights.pretrained import from_timm
from cspnet.weights.tensors import TENSOR_SUFFIXES, from_tensors
from cspnet.weights.trained import Trained, build_net, create_from_recipe, load_strict

__all__ = [
    "Trained",
    "build_net",
    "create_from_recipe",
    "load_network",
    "load_weights",
    "resolve_class_names",
]

# What a net was trained with and must go on with; a difference costs accuracy and raises nothing.
CONVENTIONS = (
    *("model.activation", "model.leaky_slope", "model.norm_eps"),
    *("data.normalize", "data.mean", "data.std"),
)


def init_net(recipe: Recipe, classes: list[str]) -> tuple[nn.Module, list[str]]:
    """The net that a run starts from, and remarks: fresh, or with the recipe's `model.init_from`.

    Everything but the classifier must fit. The classifier is taken over where its classes are these
    by name, or have no names and are as many, in an order that is known. CheckpointError.
    """
    net = build_net(recipe, len(classes))
    origin = recipe.model.init_from
    if origin is None:
        return net, []
    found = load_weights(origin, recipe)
    order = recipe.model.class_order
    if order != "fresh" and found.net.classes == len(classes):
        found = resolve_class_names(
            found,
            classes,
            origin,
            None if order == "auto" else order,
            option="model.class_order",
            ways=f"If you know the names, {LABELS_ADVICE}; if you know the order, give model.class_order="
            "natural or sorted; model.class_order=fresh does not take the classifier over",
        )
    state, own = found.net.state_dict(), net.state_dict()
    head = [key for key in own if key.startswith(net.classifier_prefixes)]
    same = order != "fresh" and found.classes == classes
    if not same:
        for key in head:
            state[key] = own[key]
    load_strict(net, state, origin)
    taken = f"{origin}, step {found.step:,}{', averaged' if found.averaged else ''}"
    if same:
        remarks = [f"started from {taken}: all {len(own)} tensors loaded"]
    else:
        reason = (
            "as model.class_order is fresh"
            if order == "fresh"
            else f"as its {found.net.classes} classes are not these {len(classes)}"
        )
        remarks = [
            f"started from {taken}: {len(own) - len(head)} tensors loaded; not loaded: "
            f"{', '.join(head)}, {reason}"
        ]
    then, now = dict(flatten(found.recipe)), dict(flatten(recipe))
    for key in CONVENTIONS:
        if then[key] != now[key] and not no_effect(recipe, key):
            remarks.append(f"careful: these weights go with {key}={then[key]}, not {now[key]}")
    return net, [*found.remarks, *remarks]


def load_weights(name: str, wanted: Recipe | None = None, labels: Path | None = None) -> Trained:
    """The net in a file, by its suffix, or of `timm:NAME`. CheckpointError where there is none.

    A folder is one that timm or the Hub has laid out. A bare state dict is taken for that of the
    net that is `wanted`; without one, for timm's net of the four of ours that it resembles most.
    `labels` is a list of the class names, for a file without any. RecipeError where it has some.
    """
    if name.startswith("timm:"):
        found = from_timm(name.removeprefix("timm:"))
    else:
        found = _open_file(name, wanted, named=labels is not None)
    return apply_label_file(found, labels, f"--labels {labels}") if labels else found


def load_network(name: str) -> nn.Module:
    """The net in a file, in evaluation mode: for detectors, `load("best.pt").pyramid(images)`.

    Images are float [N, 3, H, W], prepared as the file's recipe says; `cspnet predict` says how.
    """
    return load_weights(str(name)).net.eval()


def _open_file(name: str, wanted: Recipe | None, named: bool) -> Trained:
    """The net in a file or folder; with the list of class names beside it, if not `named`."""
    path = Path(os.path.expanduser(name))
    origin = printable(str(path))
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # the reader says what is there instead
    except OSError as error:
        raise CheckpointError(f"{origin} cannot be read: {error.strerror}") from None
    if path.is_dir():
        path = config.find_hub_weights(path) or path
        origin = printable(str(path))
    if path.suffix == ".weights" or path.suffix in TENSOR_SUFFIXES:
        _require_file(path, origin)
    elif path.is_file() and path.suffix != ".pt":
        raise CheckpointError(
            f"{origin}: unknown suffix; known are .pt, .safetensors, .pth, .bin, .tar and .weights"
        )
    else:
        return from_checkpoint(path, origin)
    if path.suffix == ".weights":
        return from_darknet(path, origin)
    found = from_tensors(path, origin, wanted)
    beside = path.with_suffix(".labels")
    return found if named or not os.path.isfile(beside) else apply_label_file(found, beside)


def _require_file(path: Path, origin: str) -> None:
    if path.is_dir():
        raise CheckpointError(
            f"{origin} is a folder without {' or '.join(config.HUB_WEIGHTS)}: name a file"
        )
    if not path.is_file():
        raise CheckpointError(f"the file {origin} does not exist")
