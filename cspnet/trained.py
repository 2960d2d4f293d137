"""A trained net in any file: a checkpoint, safetensors, timm's state dicts, `.weights`.

A file says how its images are to be prepared only where it is ours. For the others the convention
of their makers is taken, and said: Darknet's validation for `.weights`, timm's for a state dict.
"""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from cspnet.errors import CheckpointError, RecipeError
from cspnet.nets import create
from cspnet.nets.csp import NETS
from cspnet.nets.darknet import FormatError, net_from_cfg, read_weights
from cspnet.nets.foreign import create_foreign
from cspnet.recipe import flatten, from_text
from cspnet.recipe import load as load_recipe
from cspnet.schema import IDLE, TIMM, Recipe
from cspnet.train.checkpoint import load as load_checkpoint
from cspnet.train.checkpoint import read_torch

# timm's conventions for cspdarknet53 (timm/models/cspnet.py), where a file says nothing itself.
TIMMS_OWN = (
    *("model.activation=leaky", "model.leaky_slope=0.01", "data.normalize=imagenet"),
    *("evaluate.crop=0.887", "evaluate.resize=antialias"),
)
# The line of our own `.cfg` that keeps the recipe's view of a validation, and what is in it.
VIEW_MARK = "# cspnet: "
VIEW = ("crop", "resize")
# What a net was trained with and must go on with; a difference costs accuracy and raises nothing.
HABITS = ("model.activation", "model.leaky_slope", "model.norm_eps", "data.normalize")


@dataclass(frozen=True)
class Trained:
    """A net with what is known of it. On the CPU, float32, channels-last."""

    net: nn.Module  # with `name` and `classes`
    recipe: Recipe
    classes: list[str] | None  # names in index order; None: the file has none
    step: int = 0
    averaged: bool = False  # the weights are a moving average
    seen: int = 0  # images trained on
    remarks: list[str] = field(default_factory=list)
    # Darknet's order of the classes: the i-th of ours is its order[i]-th. None: the same.
    order: list[int] | None = None
    # The order of classes without names: that of the sorted names, or unknown.
    sorted: bool = True


def build_net(recipe: Recipe, classes: int) -> nn.Module:
    """The net of a recipe with fresh weights, float32, channels-last, on the CPU.

    The weights are a function of the seed, whatever the device. RecipeError: not a net of timm's.
    """
    model = recipe.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if model.name.startswith(TIMM):
            try:
                net = create_foreign(model.name, classes=classes, size=recipe.data.size)
            except ValueError as error:
                raise RecipeError(f"model.name={model.name}: {error}") from None
            return net.to(memory_format=torch.channels_last)
        net = create_own(recipe, classes)
    return net.to(memory_format=torch.channels_last)


def create_own(recipe: Recipe, classes: int) -> nn.Module:
    """A net of ours by a recipe, with weights of torch's present seed, on its present device."""
    model = recipe.model
    return create(
        model.name,
        classes=classes,
        activation=model.activation,
        leaky_slope=model.leaky_slope,
        width=model.width,
        norm_eps=model.norm_eps,
        norm_momentum=model.norm_momentum,
        group=recipe.group,
    )


def starting_net(recipe: Recipe, classes: list[str]) -> tuple[nn.Module, list[str]]:
    """The net that a run starts from, and remarks: fresh, or with the recipe's `model.weights`.

    Everything but the classifier must fit. The classifier is taken over where its classes are these
    by name, or have no names and are as many in the sorted order. CheckpointError.
    """
    net = build_net(recipe, len(classes))
    origin = recipe.model.weights
    if origin is None:
        return net, []
    found = open_trained(origin, recipe)
    state, own = found.net.state_dict(), net.state_dict()
    head = [key for key in own if key.startswith(net.classifier_prefixes)]
    if found.classes is None:
        same = found.sorted and found.net.classes == len(classes)
    else:
        same = found.classes == classes
    if not same:
        for key in head:
            state[key] = own[key]
    fill(net, state, origin)
    taken = f"{origin}, step {found.step:,}{', averaged' if found.averaged else ''}"
    if same:
        remarks = [f"started from {taken}: all {len(own)} tensors loaded"]
    else:
        remarks = [
            f"started from {taken}: {len(own) - len(head)} tensors loaded; not loaded: "
            f"{', '.join(head)}, as its {found.net.classes} classes are not these {len(classes)}"
        ]
    then, now = dict(flatten(found.recipe)), dict(flatten(recipe))
    for key in HABITS:
        if then[key] != now[key] and not (key in IDLE and IDLE[key](recipe)):
            remarks.append(f"careful: these weights go with {key}={then[key]}, not {now[key]}")
    return net, [*found.remarks, *remarks]


def open_trained(name: str, wanted: Recipe | None = None) -> Trained:
    """The net in a file, by its suffix, or of `timm:NAME`. CheckpointError where there is none.

    A bare state dict is taken for that of the net that is `wanted`; without one, for timm's net of
    the four of ours that it resembles most.
    """
    if name.startswith("timm:"):
        return _from_timm(name.removeprefix("timm:"))
    path = Path(name).expanduser()
    if path.suffix == ".weights":
        return _from_darknet(path)
    if path.suffix == ".safetensors":
        return _from_safetensors(path, wanted)
    if path.suffix in (".pth", ".bin", ".tar"):
        return _from_state_dict(_find_weights(read_torch(path), path), str(path), wanted)
    if path.is_file() and path.suffix != ".pt":
        raise CheckpointError(
            f"{path}: unknown suffix; known are .pt, .safetensors, .pth, .bin, .tar and .weights"
        )
    return _from_checkpoint(path)


def load(name: str) -> nn.Module:
    """The net in a file, in evaluation mode: for detectors, `load("best.pt").pyramid(images)`.

    Images are float [N, 3, H, W], prepared as the file's recipe says; `cspnet predict` says how.
    """
    return open_trained(str(name)).net.eval()


def require_order(trained: Trained, origin: str) -> None:
    """Raises CheckpointError where nobody can know which class an index of the net stands for."""
    if trained.classes is None and not trained.sorted:
        raise CheckpointError(
            f"{origin} has no class names, and Darknet's classes are not in a folder's order: the "
            "top-1 would be that of guessing. Put a .data beside it, with a line labels=FILE for "
            "the list that it was trained with (for ImageNet Darknet's data/imagenet.labels.list)"
        )


def fill(net: nn.Module, state: dict[str, torch.Tensor], origin: str) -> None:
    """Loads a state dict strictly; CheckpointError names the first tensor that does not fit."""
    for key, tensor in net.state_dict().items():
        if key not in state:
            raise CheckpointError(f"{origin} has no tensor {key}, which {net.name} needs")
        if state[key].shape != tensor.shape:
            raise CheckpointError(
                f"{origin}: {key} is {list(state[key].shape)}, {net.name} needs "
                f"{list(tensor.shape)}"
            )
    known = net.state_dict()  # once: asked for each key it took longer than all the rest
    extra = [key for key in state if key not in known]
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


def _from_safetensors(path: Path, wanted: Recipe | None) -> Trained:
    _require_file(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated, or no safetensors file: {error}") from None
    if "cspnet" not in metadata:
        return _from_state_dict(state, str(path), wanted)
    try:
        ours = json.loads(metadata["cspnet"])
        recipe = from_text(ours["recipe"])
        net = build_net(recipe, ours["count"])
        known = {key: ours[key] for key in ("classes", "step", "averaged", "seen", "order")}
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata is not cspnet's: {error}") from None
    fill(net, state, str(path))
    return Trained(net, recipe, **known)


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
    first = cfg.read_text(errors="replace").partition("\n")[0]
    view = first.removeprefix(VIEW_MARK).split() if first.startswith(VIEW_MARK) else []
    recipe = load_recipe(
        None,
        [
            *(f"model.name={net.name}", f"model.width={net.width}", f"data.size={size}"),
            *(f"model.activation={net.activation}", *slope, *view),
        ],
    )
    labels, order = _darknet_labels(path, net.classes), None
    remarks = [
        "images prepared as its .cfg says"
        if view
        else "prepared as Darknet's valid: RGB in [0, 1], shorter side to the size, centre crop"
    ]
    if labels is None:
        remarks.append(
            f"no {path.with_suffix('.data').name} with a labels list beside it: no class names"
        )
    elif labels != sorted(labels):
        # Our classes are sorted; Darknet's list need not be.
        order = sorted(range(len(labels)), key=labels.__getitem__)
        permute_classes(net, order)
        labels = sorted(labels)
        remarks.append("the classes of its labels list were put in sorted order")
    net = net.to(memory_format=torch.channels_last)
    step = seen // recipe.batch
    return Trained(net, recipe, labels, step, False, seen, remarks, order, labels is not None)


@torch.no_grad()
def permute_classes(net: nn.Module, order: list[int]) -> None:
    """Makes the `order[i]`-th class of a net the i-th, in place."""
    net.head.fc.weight.copy_(net.head.fc.weight[order])
    net.head.fc.bias.copy_(net.head.fc.bias[order])


def _darknet_labels(path: Path, classes: int) -> list[str] | None:
    """The labels list that the `.data` beside a `.weights` names; the first `classes` lines."""
    data = path.with_suffix(".data")
    if not data.is_file():
        return None
    options = dict(
        map(str.strip, line.split("=", 1)) for line in data.read_text().splitlines() if "=" in line
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
    import timm
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise CheckpointError(f"timm:{name}: timm has no net of this name")
    try:
        net = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client has a dozen of its own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"timm:{name} could not be fetched ({first[:160]}). It needs the network once; without "
            "one, give a file that was fetched elsewhere."
        ) from None
    if architecture in NETS:
        return _from_state_dict(net.state_dict(), f"timm:{name}", None)
    given = net.default_cfg
    views = {
        (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD): "imagenet",
        ((0.0,) * 3, (1.0,) * 3): "none",
    }
    normalize = views.get((tuple(given["mean"]), tuple(given["std"])))
    if normalize is None:
        raise CheckpointError(
            f"timm:{name} wants mean {given['mean']} and deviation {given['std']}; cspnet has "
            "ImageNet's, or none at all"
        )
    size = given["input_size"][-1]
    wanted = load_recipe(
        None,
        [
            *(f"model.name={TIMM}{architecture}", f"data.size={size}"),
            *(f"data.normalize={normalize}", f"evaluate.crop={given['crop_pct']}"),
            "evaluate.resize=antialias",
        ],
    )
    found = _from_state_dict(net.state_dict(), f"timm:{name}", wanted)
    remark = f"timm:{name}: images as timm prepares them, {size}×{size}, crop {given['crop_pct']}"
    if given["interpolation"] != "bilinear":
        remark += f"; but resized bilinearly, where timm takes {given['interpolation']}"
    return replace(found, classes=_imagenet(found.net.classes), remarks=[remark])


def _imagenet(classes: int) -> list[str] | None:
    """The synsets in timm's order, which is the sorted one, if there are as many."""
    if classes != 1000:
        return None
    from timm.data import ImageNetInfo

    return list(ImageNetInfo("imagenet-1k").label_names())


def _from_state_dict(state: dict[str, torch.Tensor], origin: str, wanted: Recipe | None) -> Trained:
    """A bare state dict: which net it is shows in its names and shapes, its activation does not."""
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): t for key, t in state.items()}
    if wanted is not None:
        weight = f"{build_net(wanted, 2).classifier_prefixes[0]}weight"
        if weight not in state:
            raise CheckpointError(
                f"{origin} has no tensor {weight}, the classifier of {wanted.model.name}"
            )
        net = build_net(wanted, len(state[weight]))
        fill(net, state, origin)
        return Trained(net, wanted, None)
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
    recipe = load_recipe(None, [f"model.name={name}", f"model.width={width}", *TIMMS_OWN])
    net = build_net(recipe, classes)
    fill(net, state, origin)
    names = _imagenet(classes)
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
