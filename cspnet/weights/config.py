"""timm's `config.json`, which the Hugging Face Hub has beside `model.safetensors`.

It says which net the weights are of, how their images are prepared, and what the classes are called
(timm/models/_hub.py, save_config_for_hf). A key that is missing has timm's default
(timm/models/_pretrained.py, PretrainedCfg). The same view is that of timm's pretrained nets.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cspnet.data.augment import IMAGENET_MEAN, IMAGENET_STD
from cspnet.errors import CheckpointError, RecipeError
from cspnet.recipe.load import load_recipe
from cspnet.recipe.schema import STAGE_COUNTS, TIMM_PREFIX, Recipe
from cspnet.text import printable
from cspnet.weights import labels
from cspnet.weights.trained import Trained, recipe_problems

CONFIG_FILE = "config.json"
HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # what the Hub calls them, best first
ACTIVATION_OVERRIDES = {
    None: ("model.activation=leaky", "model.leaky_slope=0.01"),
    "leaky_relu": ("model.activation=leaky", "model.leaky_slope=0.01"),
    "mish": ("model.activation=mish",),
}
INTERPOLATIONS = {"bilinear": "antialias", "bicubic": "bicubic"}
# Arguments of timm.create_model that change nothing in an evaluation.
IGNORED_ARGUMENTS = ("num_classes", "drop_rate", "drop_path_rate", "proj_drop_rate", "pretrained")
PREPROCESSING_DEFAULTS = {
    "input_size": (3, 224, 224),
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "crop_pct": 0.875,
    "crop_mode": "center",
    "interpolation": "bicubic",
}


@dataclass(frozen=True)
class HubConfig:
    """What a `config.json` says, as far as cspnet can use it."""

    origin: str  # its path, for people
    recipe: Recipe
    classes: int | None
    names: list[str] | None  # in the order of the net's outputs


def find_hub_weights(folder: Path) -> Path | None:
    """The weights in a folder laid out as timm and the Hub do; None where it is another folder.

    CheckpointError where there is a `config.json` without weights.
    """
    for name in HUB_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    if not (folder / CONFIG_FILE).is_file():
        return None
    raise CheckpointError(
        f"{printable(str(folder))} has a {CONFIG_FILE}, but no {' and no '.join(HUB_WEIGHTS)}: "
        "name the file with the weights"
    )


def read_hub_config(weights: Path) -> HubConfig | None:
    """The `config.json` in the folder of a file; None where there is none, or another program's.

    CheckpointError where it is malformed, or asks for what cspnet has not.
    """
    path = weights.with_name(CONFIG_FILE)
    if not path.is_file():
        return None
    origin = printable(str(path))
    content = _read(path, origin)
    if "architecture" not in content and weights.name not in HUB_WEIGHTS:
        return None
    try:
        return _parse(content, origin)
    except RecipeError as error:
        raise CheckpointError(
            f"{origin} asks for what cspnet has not: {recipe_problems(error)}"
        ) from None


def apply_hub_config(trained: Trained, config: HubConfig) -> Trained:
    """A net that was built by a config, with its class names. CheckpointError."""
    if config.classes not in (None, trained.net.classes):
        raise CheckpointError(
            f"{config.origin}: num_classes is {config.classes}, the weights have "
            f"{trained.net.classes} classes"
        )
    remark = f"net and view as {config.origin} says"
    remarks = [*trained.remarks, remark]
    if config.names is None:
        return replace(trained, remarks=remarks)
    if len(config.names) != trained.net.classes:
        raise CheckpointError(
            f"{config.origin}: label_names has {len(config.names)} names, the weights have "
            f"{trained.net.classes} classes"
        )
    return labels.assign_class_names(replace(trained, remarks=[remark]), config.names)


def preprocessing_overrides(given: dict[str, Any], origin: str) -> list[str]:
    """The recipe's view of images by a timm data configuration, as overrides. CheckpointError."""
    values = {key: given.get(key) or default for key, default in PREPROCESSING_DEFAULTS.items()}
    size = values["input_size"]
    if not _numbers(size, 3) or size[0] != 3 or size[1] != size[2]:
        raise CheckpointError(f"{origin}: input_size is {size}; cspnet needs 3×N×N, RGB squares")
    if values["crop_mode"] != "center":
        raise CheckpointError(f"{origin}: crop_mode is {values['crop_mode']!r}; cspnet has center")
    if not isinstance(resize := values["interpolation"], str) or resize not in INTERPOLATIONS:
        raise CheckpointError(
            f"{origin}: interpolation is {resize!r}; cspnet has {' and '.join(INTERPOLATIONS)}"
        )
    if not _numbers([values["crop_pct"]], 1):
        raise CheckpointError(f"{origin}: crop_pct is {values['crop_pct']!r}, not a number")
    return [
        *(f"data.image_size={size[1]}", f"evaluate.crop_pct={values['crop_pct']}"),
        *(f"evaluate.interpolation={INTERPOLATIONS[resize]}", *_normalization(values, origin)),
    ]


def _normalization(values: dict[str, Any], origin: str) -> list[str]:
    for key in ("mean", "std"):
        if not _numbers(values[key], 3):
            raise CheckpointError(f"{origin}: {key} is {values[key]!r}, not three numbers")
    mean, std = (tuple(map(float, values[key])) for key in ("mean", "std"))
    known = {(IMAGENET_MEAN, IMAGENET_STD): "imagenet", ((0.0,) * 3, (1.0,) * 3): "none"}
    if (mean, std) in known:
        return [f"data.normalize={known[mean, std]}"]
    return ["data.normalize=custom", f"data.mean={list(mean)}", f"data.std={list(std)}"]


def _numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == count
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    )


def _read(path: Path, origin: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{origin} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{origin} holds a {type(content).__name__}, not an object")
    return content


def _parse(content: dict[str, Any], origin: str) -> HubConfig:
    # Older files are one level deep, with the names under `labels`.
    inner = content.get("pretrained_cfg", content)
    arguments = content.get("model_args") or {}
    for key, value in (("pretrained_cfg", inner), ("model_args", arguments)):
        if not isinstance(value, dict):
            raise CheckpointError(f"{origin}: {key} is not an object")
    architecture = content.get("architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(
            f"{origin} has no architecture: it is not timm's. Give the weights another name than "
            f"{HUB_WEIGHTS[0]}, or correct it"
        )
    classes = arguments.get("num_classes", content.get("num_classes", inner.get("num_classes")))
    if classes == 0 or arguments.get("features_only"):
        raise CheckpointError(f"{origin}: the net has no classifier; cspnet needs one")
    if classes is not None and not _numbers([classes], 1):
        raise CheckpointError(f"{origin}: num_classes is {classes!r}, not a number")
    overrides = [*_net(architecture.partition(".")[0], content, arguments, origin)]
    recipe = load_recipe(None, [*overrides, *preprocessing_overrides(inner, origin)])
    names = content.get("label_names", inner.get("label_names", inner.get("labels")))
    return HubConfig(origin, recipe, classes, _names(names, origin))


def _net(
    architecture: str, content: dict[str, Any], arguments: dict[str, Any], origin: str
) -> list[str]:
    """The net, as overrides of a recipe."""
    rest = {key: value for key, value in arguments.items() if key not in IGNORED_ARGUMENTS}
    if rest.get("in_chans") == 3:
        del rest["in_chans"]
    own = architecture in STAGE_COUNTS
    if own:
        pool = rest.pop("global_pool", content.get("global_pool") or "avg")
        if pool != "avg":
            raise CheckpointError(f"{origin}: global_pool is {pool!r}; {architecture} has avg")
        activation = rest.pop("act_layer", None)
        if not isinstance(activation, str | None) or activation not in ACTIVATION_OVERRIDES:
            raise CheckpointError(
                f"{origin}: act_layer is {activation!r}; cspnet has leaky_relu and mish"
            )
        if rest.get("norm_layer") in ("batchnorm", "batchnorm2d"):
            del rest["norm_layer"]
    if rest:
        raise CheckpointError(
            f"{origin}: cspnet cannot build {architecture} with the model_args {json.dumps(rest)}"
        )
    if own:
        return [f"model.name={architecture}", *ACTIVATION_OVERRIDES[activation]]
    return [f"model.name={TIMM_PREFIX}{architecture}"]


def _names(given: Any, origin: str) -> list[str] | None:
    if given is None:
        return None
    if (
        not isinstance(given, list)
        or not all(isinstance(name, str) and name for name in given)
        or len(set(given)) != len(given)
    ):
        raise CheckpointError(f"{origin}: label_names is not a list of different names")
    return given
