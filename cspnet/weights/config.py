"""timm's `config.json`, which accompanies `model.safetensors` on the Hugging Face Hub.

It describes the architecture, the preprocessing and the class names (timm/models/_hub.py,
save_config_for_hf). Missing keys have timm's defaults (timm/models/_pretrained.py, PretrainedCfg).
timm's pretrained networks use the same preprocessing keys.
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
HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # on the Hub, in order of preference
ACTIVATION_OVERRIDES = {
    None: ("model.activation=leaky", "model.leaky_slope=0.01"),
    "leaky_relu": ("model.activation=leaky", "model.leaky_slope=0.01"),
    "mish": ("model.activation=mish",),
}
INTERPOLATIONS = {"bilinear": "antialias", "bicubic": "bicubic"}
# Arguments of timm.create_model that do not affect an evaluation.
IGNORED_ARGUMENTS = ("num_classes", "drop_rate", "drop_path_rate", "proj_drop_rate", "pretrained")
PREPROCESSING_DEFAULTS: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "crop_pct": 0.875,
    "crop_mode": "center",
    "interpolation": "bicubic",
}


@dataclass(frozen=True)
class HubConfig:
    """The contents of a `config.json` that cspnet uses."""

    origin: str  # its path, for messages
    recipe: Recipe
    classes: int | None
    names: list[str] | None  # in the order of the network's outputs


def find_hub_weights(folder: Path) -> Path | None:
    """The weights file in a folder with the layout of timm and the Hub; None for other folders.

    CheckpointError if there is a `config.json` without weights.
    """
    for name in HUB_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    if not (folder / CONFIG_FILE).is_file():
        return None
    raise CheckpointError(
        f"{printable(str(folder))} has a {CONFIG_FILE}, but no {' or '.join(HUB_WEIGHTS)}: "
        "give the weights file itself"
    )


def read_hub_config(weights: Path) -> HubConfig | None:
    """The `config.json` next to a weights file; None if it is missing or another program's.

    CheckpointError if it is malformed, or needs something that cspnet does not support.
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
            f"{origin} needs unsupported settings: {recipe_problems(error)}"
        ) from None


def apply_hub_config(trained: Trained, config: HubConfig) -> Trained:
    """Add a config's class names to the network that was built from it. CheckpointError."""
    if config.classes not in (None, trained.net.classes):
        raise CheckpointError(
            f"{config.origin}: num_classes is {config.classes}, but the weights have "
            f"{trained.net.classes} classes"
        )
    remark = f"architecture and preprocessing from {config.origin}"
    remarks = [*trained.remarks, remark]
    if config.names is None:
        return replace(trained, remarks=remarks)
    if len(config.names) != trained.net.classes:
        raise CheckpointError(
            f"{config.origin}: label_names has {len(config.names)} names, but the weights have "
            f"{trained.net.classes} classes"
        )
    return labels.assign_class_names(replace(trained, remarks=[remark]), config.names)


def preprocessing_overrides(pretrained_cfg: dict[str, Any], origin: str) -> list[str]:
    """Recipe overrides for the preprocessing in a timm configuration. CheckpointError."""
    values = {
        key: pretrained_cfg.get(key) or default for key, default in PREPROCESSING_DEFAULTS.items()
    }
    size = values["input_size"]
    if not _are_numbers(size, 3) or size[0] != 3 or size[1] != size[2]:
        raise CheckpointError(
            f"{origin}: input_size is {size}; cspnet supports only square RGB images, 3×N×N"
        )
    if values["crop_mode"] != "center":
        raise CheckpointError(
            f"{origin}: crop_mode is {values['crop_mode']!r}; cspnet supports only center"
        )
    interpolation = values["interpolation"]
    if not isinstance(interpolation, str) or interpolation not in INTERPOLATIONS:
        raise CheckpointError(
            f"{origin}: interpolation is {interpolation!r}; cspnet supports only "
            f"{' and '.join(INTERPOLATIONS)}"
        )
    if not _are_numbers([values["crop_pct"]], 1):
        raise CheckpointError(f"{origin}: crop_pct is {values['crop_pct']!r}, not a number")
    return [
        f"data.image_size={size[1]}",
        f"evaluate.crop_pct={values['crop_pct']}",
        f"evaluate.interpolation={INTERPOLATIONS[interpolation]}",
        *_normalization(values, origin),
    ]


def _normalization(values: dict[str, Any], origin: str) -> list[str]:
    for key in ("mean", "std"):
        if not _are_numbers(values[key], 3):
            raise CheckpointError(f"{origin}: {key} is {values[key]!r}, not three numbers")
    mean, std = (tuple(map(float, values[key])) for key in ("mean", "std"))
    if (mean, std) == (IMAGENET_MEAN, IMAGENET_STD):
        return ["data.normalize=imagenet"]
    if (mean, std) == ((0.0,) * 3, (1.0,) * 3):
        return ["data.normalize=none"]
    return ["data.normalize=custom", f"data.mean={list(mean)}", f"data.std={list(std)}"]


def _are_numbers(values: Any, count: int) -> bool:
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
        raise CheckpointError(f"{origin} contains a {type(content).__name__}, not an object")
    return content


def _parse(content: dict[str, Any], origin: str) -> HubConfig:
    # Older files have no nested pretrained_cfg, and keep the names under `labels`.
    pretrained_cfg = content.get("pretrained_cfg", content)
    arguments = content.get("model_args") or {}
    for key, value in (("pretrained_cfg", pretrained_cfg), ("model_args", arguments)):
        if not isinstance(value, dict):
            raise CheckpointError(f"{origin}: {key} is not an object")
    architecture = content.get("architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(
            f"{origin} has no architecture, so timm did not write it. Correct it, or rename the "
            f"weights to something other than {HUB_WEIGHTS[0]}"
        )
    classes = arguments.get(
        "num_classes", content.get("num_classes", pretrained_cfg.get("num_classes"))
    )
    if classes == 0 or arguments.get("features_only"):
        raise CheckpointError(f"{origin}: the network has no classifier; cspnet needs one")
    if classes is not None and not _are_numbers([classes], 1):
        raise CheckpointError(f"{origin}: num_classes is {classes!r}, not a number")
    overrides = _architecture(architecture.partition(".")[0], content, arguments, origin)
    recipe = load_recipe(None, [*overrides, *preprocessing_overrides(pretrained_cfg, origin)])
    names = content.get(
        "label_names", pretrained_cfg.get("label_names", pretrained_cfg.get("labels"))
    )
    return HubConfig(origin, recipe, classes, _class_names(names, origin))


def _architecture(
    name: str, content: dict[str, Any], arguments: dict[str, Any], origin: str
) -> list[str]:
    """Recipe overrides for an architecture and its timm model_args. CheckpointError."""
    other = {key: value for key, value in arguments.items() if key not in IGNORED_ARGUMENTS}
    if other.get("in_chans") == 3:
        del other["in_chans"]
    is_cspnet = name in STAGE_COUNTS
    if is_cspnet:
        pool = other.pop("global_pool", content.get("global_pool") or "avg")
        if pool != "avg":
            raise CheckpointError(f"{origin}: global_pool is {pool!r}; {name} supports only avg")
        activation = other.pop("act_layer", None)
        if not isinstance(activation, str | None) or activation not in ACTIVATION_OVERRIDES:
            raise CheckpointError(
                f"{origin}: act_layer is {activation!r}; cspnet supports only leaky_relu and mish"
            )
        if other.get("norm_layer") in ("batchnorm", "batchnorm2d"):
            del other["norm_layer"]
    if other:
        raise CheckpointError(
            f"{origin}: cspnet cannot build {name} with the model_args {json.dumps(other)}"
        )
    if is_cspnet:
        return [f"model.name={name}", *ACTIVATION_OVERRIDES[activation]]
    return [f"model.name={TIMM_PREFIX}{name}"]


def _class_names(names: Any, origin: str) -> list[str] | None:
    if names is None:
        return None
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) and name for name in names)
        or len(set(names)) != len(names)
    ):
        raise CheckpointError(f"{origin}: label_names is not a list of unique names")
    return names
