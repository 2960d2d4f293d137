"""A trained net in any file: a checkpoint, safetensors, timm's state dicts, `.weights`.

A file says how its images are to be prepared only where it is ours. For the others the convention
of their makers is taken, and said: Darknet's validation for `.weights`, timm's for a state dict.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cspnet.errors import CheckpointError
from cspnet.nets import create
from cspnet.nets.csp import NETS, CspNet
from cspnet.nets.darknet import FormatError, net_from_cfg, read_weights
from cspnet.recipe import Recipe, from_text
from cspnet.recipe import load as load_recipe
from cspnet.train.checkpoint import load as load_checkpoint
from cspnet.train.checkpoint import read_torch

# timm's conventions for cspdarknet53 (timm/models/cspnet.py), where a file says nothing itself.
TIMM = (
    *("model.activation=leaky", "model.leaky_slope=0.01", "data.normalize=imagenet"),
    *("evaluate.crop=0.887", "evaluate.resize=antialias"),
)


@dataclass(frozen=True)
class Trained:
    """A net with what is known of it. On the CPU, float32, channels-last."""

    net: CspNet
    recipe: Recipe
    classes: list[str] | None  # names in index order; None: the file has none
    step: int = 0
    averaged: bool = False  # the weights are a moving average
    seen: int = 0  # images trained on
    remarks: list[str] = field(default_factory=list)


def build_net(recipe: Recipe, classes: int) -> CspNet:
    """The net of a recipe with fresh weights, float32, channels-last, on the CPU.

    The weights are a function of the seed, whatever the device.
    """
    model = recipe.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        net = create(
            model.name,
            classes=classes,
            activation=model.activation,
            leaky_slope=model.leaky_slope,
            width=model.width,
            norm_eps=model.norm_eps,
            norm_momentum=model.norm_momentum,
            group=recipe.group,
        )
    return net.to(memory_format=torch.channels_last)


def open_trained(name: str) -> Trained:
    """The net in a file, by its suffix, or of `timm:NAME`. CheckpointError where there is none."""
    if name.startswith("timm:"):
        return _from_timm(name.removeprefix("timm:"))
    path = Path(name)
    if path.suffix == ".weights":
        return _from_darknet(path)
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    if path.suffix in (".pth", ".bin", ".tar"):
        return _from_state_dict(_find_weights(read_torch(path), path), str(path))
    return _from_checkpoint(path)


def load(name: str) -> CspNet:
    """The net in a file, in evaluation mode: for detectors, `load("best.pt").pyramid(images)`.

    Images are float [N, 3, H, W], prepared as the file's recipe says; `cspnet predict` says how.
    """
    return open_trained(str(name)).net.eval()


def fill(net: CspNet, state: dict[str, torch.Tensor], origin: str) -> None:
    """Loads a state dict strictly; CheckpointError names the first tensor that does not fit."""
    for key, tensor in net.state_dict().items():
        if key not in state:
            raise CheckpointError(f"{origin} has no tensor {key}, which {net.name} needs")
        if state[key].shape != tensor.shape:
            raise CheckpointError(
                f"{origin}: {key} is {list(state[key].shape)}, {net.name} needs "
                f"{list(tensor.shape)}"
            )
    extra = [key for key in state if key not in net.state_dict()]
    if extra:
        raise CheckpointError(f"{origin} has a tensor {extra[0]} that {net.name} has not")
    net.load_state_dict(state)


def _from_checkpoint(path: Path) -> Trained:
    saved = load_checkpoint(path)
    recipe = from_text(saved["recipe"])
    net = build_net(recipe, len(saved["classes"]))
    averaged = saved["state_dict_ema"] is not None
    fill(net, saved["state_dict_ema" if averaged else "state_dict"], str(path))
    seen = saved["step"] * recipe.batch
    return Trained(net, recipe, saved["classes"], saved["step"], averaged, seen)


def _from_safetensors(path: Path) -> Trained:
    _require_file(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated, or no safetensors file: {error}") from None
    if "cspnet" not in metadata:
        return _from_state_dict(state, str(path))
    ours = json.loads(metadata["cspnet"])
    recipe = from_text(ours["recipe"])
    net = build_net(recipe, len(state["head.fc.bias"]))
    fill(net, state, str(path))
    return Trained(net, recipe, ours["classes"], ours["step"], ours["averaged"], ours["seen"])


def _from_darknet(path: Path) -> Trained:
    _require_file(path)
    cfg = path.with_suffix(".cfg")
    if not cfg.is_file():
        raise CheckpointError(f"{path} needs its .cfg beside it: {cfg} does not exist")
    try:
        net, size = net_from_cfg(cfg)
        seen = read_weights(net, path)
    except FormatError as error:
        raise CheckpointError(str(error)) from None
    slope = ["model.leaky_slope=0.1"] if net.activation == "leaky" else []
    recipe = load_recipe(
        None,
        [
            *(f"model.name={net.name}", f"model.width={net.width}", f"data.size={size}"),
            *(f"model.activation={net.activation}", *slope),
        ],
    )
    labels = _darknet_labels(path, net.classes)
    remarks = ["prepared as Darknet's valid: RGB in [0, 1], shorter side to the size, centre crop"]
    if labels is None:
        remarks.append(
            f"no {path.with_suffix('.data').name} with a labels list beside it: no class names"
        )
    elif labels != sorted(labels):
        # Our classes are sorted; Darknet's list need not be.
        order = sorted(range(len(labels)), key=labels.__getitem__)
        with torch.no_grad():
            net.head.fc.weight.copy_(net.head.fc.weight[order])
            net.head.fc.bias.copy_(net.head.fc.bias[order])
        labels = sorted(labels)
        remarks.append("the classes of its labels list were put in sorted order")
    net = net.to(memory_format=torch.channels_last)
    return Trained(net, recipe, labels, seen // recipe.batch, False, seen, remarks)


def _darknet_labels(path: Path, classes: int) -> list[str] | None:
    """The labels list that the `.data` beside a `.weights` names; the first `classes` lines."""
    data = path.with_suffix(".data")
    if not data.is_file():
        return None
    options = dict(
        line.replace(" ", "").split("=", 1) for line in data.read_text().splitlines() if "=" in line
    )
    named = options.get("labels") or options.get("names")
    for candidate in (Path(named or ""), path.parent / Path(named or "").name):
        if named and candidate.is_file():
            labels = candidate.read_text().split("\n")[:classes]
            if len(labels) == classes and len(set(labels)) == classes and all(labels):
                return labels
            raise CheckpointError(
                f"{candidate} has {len(set(labels))} different labels, the net {classes} classes"
            )
    return None


def _from_timm(name: str) -> Trained:
    architecture = name.partition(".")[0]
    if architecture not in NETS:
        raise CheckpointError(f"timm:{name} is none of {', '.join(NETS)}")
    import timm

    try:
        net = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client has a dozen of its own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"timm:{name} could not be fetched ({first[:160]}). It needs the network once; without "
            "one, give a file that was fetched elsewhere."
        ) from None
    return _from_state_dict(net.state_dict(), f"timm:{name}")


def _from_state_dict(state: dict[str, torch.Tensor], origin: str) -> Trained:
    """A bare state dict: which net it is shows in its names and shapes, its activation does not."""
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): t for key, t in state.items()}
    try:
        classes, features = state["head.fc.weight"].shape
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{origin} has no matrix head.fc.weight: it is no net of ours"
        ) from None
    shared = {}
    for name in NETS:
        with torch.device("meta"):
            net = create(name, classes=classes, width=features / NETS[name].stages[-1].outputs)
        shared[name] = len(net.state_dict().keys() & state.keys()) / len(
            net.state_dict().keys() | state.keys()
        )
    name = max(shared, key=shared.get)
    width = features / NETS[name].stages[-1].outputs
    recipe = load_recipe(None, [f"model.name={name}", f"model.width={width}", *TIMM])
    net = build_net(recipe, classes)
    fill(net, state, origin)
    names = None
    if classes == 1000:
        from timm.data import ImageNetInfo

        names = list(ImageNetInfo("imagenet-1k").label_names())
    remark = (
        "a bare state dict: taken for timm's, so leaky with slope 0.01, ImageNet's mean and "
        "standard deviation, crop 0.887, bilinear" + (", sorted synsets" if names else "")
    )
    return Trained(net, recipe, names, remarks=[remark])


def _find_weights(content: object, path: Path) -> dict[str, torch.Tensor]:
    """The state dict in what a `.pth` holds, under the keys that timm looks for."""
    if isinstance(content, dict):
        for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return content
    raise CheckpointError(f"{path} holds no state dict")


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"the file {path} does not exist")
