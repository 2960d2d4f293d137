"""A trained net in a file of tensors: safetensors, ours or timm's, and timm's `.pth` state dicts.

A bare state dict tells nothing but names and shapes. What else there is to know is in a
`config.json` beside it (cspnet/weights/config.py), in the recipe of the run that starts from it, or
is assumed to be timm's.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cspnet.errors import CheckpointError, RecipeError
from cspnet.nets import create
from cspnet.nets.csp import ARCHITECTURES
from cspnet.recipe.load import load_recipe, recipe_from_yaml
from cspnet.recipe.schema import Recipe
from cspnet.run.checkpoint import read_torch
from cspnet.weights import config
from cspnet.weights.trained import Trained, build_net, load_strict

TENSOR_SUFFIXES = (".safetensors", ".pth", ".bin", ".tar")
# timm's conventions for cspdarknet53 (timm/models/cspnet.py), where a file says nothing itself.
TIMM_CONVENTIONS = (
    *("model.activation=leaky", "model.leaky_slope=0.01", "data.normalize=imagenet"),
    *("evaluate.crop_pct=0.887", "evaluate.interpolation=antialias"),
)
# Of nameless classes in a file of a cspnet that did not write what is known of their order.
UNKNOWN_ORIGIN = "the file does not say where its classes come from"


def from_tensors(path: Path, origin: str, wanted: Recipe | None) -> Trained:
    """The net in a file with one of SUFFIXES. CheckpointError."""
    if path.suffix != ".safetensors":
        state, metadata = _find_weights(read_torch(path), origin), {}
    else:
        state, metadata = _read_safetensors(path, origin)
    if "cspnet" in metadata:
        return _from_own(state, metadata["cspnet"], origin)
    found = config.read_hub_config(path)
    if found is None:
        return from_state_dict(state, origin, wanted)
    try:
        return config.apply_hub_config(from_state_dict(state, origin, found.recipe), found)
    except RecipeError as error:  # a net that timm has not, or that does not take such images
        raise CheckpointError(f"{found.origin}: {error}") from None


def _read_safetensors(path: Path, origin: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with _readable(path) as name, safe_open(name, "pt") as file:
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{origin} is truncated, or no safetensors file: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{origin} cannot be read: {error.strerror or error}") from None


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[str]:
    """A name of the file that safetensors, which wants UTF-8, can open. OSError."""
    with open(path, "rb") as file:
        try:
            str(path).encode()
            yield str(path)
        except UnicodeEncodeError:
            yield f"/dev/fd/{file.fileno()}"


def _from_own(state: dict[str, torch.Tensor], text: str, origin: str) -> Trained:
    """cspnet's own file: its metadata has the recipe and the classes."""
    try:
        ours = json.loads(text)
        recipe = recipe_from_yaml(ours["recipe"])
        net = build_net(recipe, ours["count"])
        known = {key: ours[key] for key in ("classes", "step", "averaged", "seen", "order")}
        known["unordered"] = ours.get("unordered", UNKNOWN_ORIGIN)
        known["inferred"] = ours.get("inferred", False)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{origin}: its metadata is not cspnet's: {error}") from None
    load_strict(net, state, origin)
    return Trained(net, recipe, **known)


def _find_weights(content: object, origin: str) -> dict[str, torch.Tensor]:
    """The state dict in what a `.pth` holds, under the keys that timm looks for."""
    if isinstance(content, dict):
        for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return content
    raise CheckpointError(f"{origin} holds no state dict")


def from_state_dict(state: dict[str, torch.Tensor], origin: str, wanted: Recipe | None) -> Trained:
    """The net of a bare state dict: the one that is `wanted`; else timm's that it resembles most.

    Names and shapes show which net it is; its activation and its view are assumed. CheckpointError.
    """
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): t for key, t in state.items()}
    if wanted is None:
        return _from_timms(state, origin)
    weight = f"{build_net(wanted, 2).classifier_prefixes[0]}weight"
    if weight not in state:
        raise CheckpointError(
            f"{origin} has no tensor {weight}, the classifier of {wanted.model.name}"
        )
    net = build_net(wanted, len(state[weight]))
    load_strict(net, state, origin)
    return _guess_names(Trained(net, wanted, None))


def _from_timms(state: dict[str, torch.Tensor], origin: str) -> Trained:
    """The one of our four nets whose tensors' names are most alike, as timm trains it."""
    try:
        classes, features = state["head.fc.weight"].shape
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{origin} has no matrix head.fc.weight: it is no net of ours, or it has no "
            "classifier (num_classes=0)"
        ) from None
    shared = {}
    for name in ARCHITECTURES:
        with torch.device("meta"):
            net = create(
                name, classes=classes, width=features / ARCHITECTURES[name].stages[-1].outputs
            )
        shared[name] = len(net.state_dict().keys() & state.keys()) / len(
            net.state_dict().keys() | state.keys()
        )
    name = max(shared, key=shared.get)
    width = features / ARCHITECTURES[name].stages[-1].outputs
    recipe = load_recipe(None, [f"model.name={name}", f"model.width={width}", *TIMM_CONVENTIONS])
    net = build_net(recipe, classes)
    load_strict(net, state, origin)
    remark = (
        "a bare state dict: taken for timm's, so leaky with slope 0.01, ImageNet's mean and "
        "standard deviation, crop 0.887, bilinear"
    )
    return _guess_names(Trained(net, recipe, None, remarks=[remark]))


def _guess_names(trained: Trained) -> Trained:
    """1,000 classes without names are taken for ImageNet's, in the order of the synsets."""
    names = imagenet_names(trained.net.classes)
    if names is None:
        return trained
    remark = "1,000 classes without names: taken for ImageNet's synsets, in sorted order"
    return replace(trained, classes=names, remarks=[*trained.remarks, remark], inferred=True)


def imagenet_names(classes: int) -> list[str] | None:
    """The synsets in timm's order, which is the sorted one, if there are as many."""
    if classes != 1000:
        return None
    from timm.data import ImageNetInfo

    return list(ImageNetInfo("imagenet-1k").label_names())
