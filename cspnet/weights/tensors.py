"""A trained network in a file of tensors: safetensors (ours or timm's), `.pth` state dicts.

A bare state dict contains only names and shapes. The rest comes from a `config.json` next to it
(cspnet/weights/config.py) or from the recipe of the run that starts from it; otherwise timm's
conventions are assumed.
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
# timm's conventions for cspdarknet53 (timm/models/cspnet.py), assumed for files without metadata.
TIMM_CONVENTIONS = (
    *("model.activation=leaky", "model.leaky_slope=0.01", "data.normalize=imagenet"),
    *("evaluate.crop_pct=0.887", "evaluate.interpolation=antialias"),
)
# For unnamed classes in a file from a version of cspnet that did not store what it knew.
UNKNOWN_ORIGIN = "the file does not record the origin of its classes"


def from_tensors(path: Path, origin: str, wanted: Recipe | None) -> Trained:
    """The network in a file with one of TENSOR_SUFFIXES. CheckpointError.

    `wanted` is the recipe of the run that starts from the file, if there is one.
    """
    if path.suffix != ".safetensors":
        state = _find_state_dict(read_torch(path), origin)
    else:
        state, metadata = _read_safetensors(path, origin)
        if "cspnet" in metadata:
            return _from_own(state, metadata["cspnet"], origin)
    hub_config = config.read_hub_config(path)
    if hub_config is None:
        return from_state_dict(state, origin, wanted)
    try:
        trained = from_state_dict(state, origin, hub_config.recipe)
        return config.apply_hub_config(trained, hub_config)
    except RecipeError as error:  # unknown to timm, or does not accept images of this size
        raise CheckpointError(f"{hub_config.origin}: {error}") from None


def _read_safetensors(path: Path, origin: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with _readable(path) as name, safe_open(name, "pt") as file:
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{origin} is truncated, or not a safetensors file: {error}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{origin} cannot be read: {error.strerror or error}") from None


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[str]:
    """A path to the file that safetensors can open, which requires UTF-8. OSError."""
    with open(path, "rb") as file:
        try:
            str(path).encode()
            yield str(path)
        except UnicodeEncodeError:
            yield f"/dev/fd/{file.fileno()}"


def _from_own(state: dict[str, torch.Tensor], text: str, origin: str) -> Trained:
    """The network in a file that cspnet exported, with recipe and classes in its metadata."""
    try:
        metadata = json.loads(text)
        recipe = recipe_from_yaml(metadata["recipe"])
        trained = Trained(
            build_net(recipe, metadata["count"]),
            recipe,
            metadata["classes"],
            step=metadata["step"],
            averaged=metadata["averaged"],
            images_seen=metadata["seen"],
            file_order=metadata["order"],
            order_unknown=metadata.get("unordered", UNKNOWN_ORIGIN),
            inferred=metadata.get("inferred", False),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{origin}: its cspnet metadata is invalid: {error}") from None
    except RecipeError as error:
        raise CheckpointError(f"{origin}: {error}") from None
    load_strict(trained.net, state, origin)
    return trained


def _find_state_dict(content: object, origin: str) -> dict[str, torch.Tensor]:
    """The state dict in the contents of a `.pth`, under one of the keys that timm uses."""
    if isinstance(content, dict):
        for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
            nested = content.get(key)
            if isinstance(nested, dict):
                content = nested
                break
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return content
    raise CheckpointError(f"{origin} does not contain a state dict")


def from_state_dict(state: dict[str, torch.Tensor], origin: str, wanted: Recipe | None) -> Trained:
    """The network in a bare state dict: that of the recipe `wanted`, or the most similar of ours.

    Names and shapes identify the architecture; activation and preprocessing are assumed.
    CheckpointError.
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
    return _infer_names(Trained(net, wanted, None))


def _from_timms(state: dict[str, torch.Tensor], origin: str) -> Trained:
    """The CspNet with the most similar tensor names, with timm's conventions. CheckpointError."""
    try:
        classes, features = state["head.fc.weight"].shape
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{origin} has no matrix head.fc.weight: unsupported architecture, or a network "
            "without classifier (num_classes=0)"
        ) from None
    widths = {name: features / spec.stages[-1].outputs for name, spec in ARCHITECTURES.items()}

    def similarity(name: str) -> float:
        with torch.device("meta"):
            keys = create(name, classes=classes, width=widths[name]).state_dict().keys()
        return len(keys & state.keys()) / len(keys | state.keys())

    name = max(ARCHITECTURES, key=similarity)
    width = widths[name]
    recipe = load_recipe(None, [f"model.name={name}", f"model.width={width}", *TIMM_CONVENTIONS])
    net = build_net(recipe, classes)
    load_strict(net, state, origin)
    remark = (
        "no metadata: assuming timm's conventions (leaky ReLU with slope 0.01, ImageNet's mean and "
        "standard deviation, crop_pct 0.887, bilinear)"
    )
    return _infer_names(Trained(net, recipe, None, remarks=[remark]))


def _infer_names(trained: Trained) -> Trained:
    """Assume that 1,000 unnamed classes are ImageNet's, in the order of the synsets."""
    names = imagenet_names(trained.net.classes)
    if names is None:
        return trained
    remark = "1,000 unnamed classes: assuming ImageNet's synsets, in sorted order"
    return replace(trained, classes=names, remarks=[*trained.remarks, remark], inferred=True)


def imagenet_names(classes: int) -> list[str] | None:
    """ImageNet's synsets in timm's order, which is sorted; None unless there are 1,000 classes."""
    if classes != 1000:
        return None
    from timm.data import ImageNetInfo

    return list(ImageNetInfo("imagenet-1k").label_names())
