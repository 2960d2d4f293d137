"""Python code that loads an exported network into timm, for users to copy.

Its `net` and `transform` reproduce our logits. It sets the activation's slope, BatchNorm's epsilon,
size, crop, interpolation and normalization explicitly, as timm's defaults differ.
"""

import math
from pathlib import Path
from typing import Any

from cspnet.data.augment import mean_and_std
from cspnet.recipe.schema import TIMM_PREFIX, Model, Recipe
from cspnet.weights.config import INTERPOLATIONS
from cspnet.weights.trained import Trained

TIMM_LEAKY_SLOPE, TIMM_NORM_EPS = 0.01, 1e-5


def timm_code(trained: Trained, file: Path) -> list[str]:
    """Lines that define `net`, in evaluation mode, and `transform`, which accepts a PIL image."""
    recipe = trained.recipe
    net = [
        repr(recipe.model.name.removeprefix(TIMM_PREFIX)),
        *([] if recipe.model.name.startswith(TIMM_PREFIX) else _layers(recipe.model)),
        f"num_classes={trained.net.classes}",
        f"checkpoint_path={str(file)!r}",
        f"pretrained_cfg_overlay={_overlay(recipe)}",
    ]
    corners = recipe.evaluate.interpolation == "align_corners"
    partial = any("functools." in argument for argument in net)
    return [
        *["import functools"] * partial,
        "import timm",
        *["import torch"] * (partial or corners),
        *["from torchvision.transforms.functional import pil_to_tensor"] * corners,
        "net = timm.create_model(",
        *(f"    {argument}," for argument in net),
        ").eval()",
        *(
            _corner_aligned(recipe)
            if corners
            else [
                "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))"
            ]
        ),
    ]


def _layers(model: Model) -> list[str]:
    layers = []
    if model.activation == "mish":
        layers.append("act_layer='mish'")
    elif model.leaky_slope == TIMM_LEAKY_SLOPE:
        layers.append("act_layer='leaky_relu'")
    else:
        slope = f"negative_slope={model.leaky_slope!r}"
        layers.append(f"act_layer=functools.partial(torch.nn.LeakyReLU, {slope})")
    if model.norm_eps != TIMM_NORM_EPS:
        eps = f"eps={model.norm_eps!r}"
        layers.append(f"norm_layer=functools.partial(torch.nn.BatchNorm2d, {eps})")
    return layers


def _overlay(recipe: Recipe) -> dict[str, Any]:
    """timm's preprocessing configuration for the recipe; the closest one for "align_corners"."""
    mean, std = mean_and_std(recipe.data)
    names = {ours: timms for timms, ours in INTERPOLATIONS.items()}
    return {
        "input_size": (3, recipe.data.image_size, recipe.data.image_size),
        "mean": mean,
        "std": std,
        "crop_pct": recipe.evaluate.crop_pct,
        "crop_mode": "center",
        "interpolation": names.get(recipe.evaluate.interpolation, "bilinear"),
    }


def _corner_aligned(recipe: Recipe) -> list[str]:
    """cspnet/images/decode.py's `evaluation_view` for "align_corners", in torch."""
    size, (mean, std) = recipe.data.image_size, mean_and_std(recipe.data)
    short = math.floor(size / recipe.evaluate.crop_pct)
    square = f"top : top + {size}, left : left + {size}"
    return [
        "def transform(image):  # Darknet's corner-aligned resize, which timm does not have",
        "    pixels = pil_to_tensor(image.convert('RGB'))[None].float()",
        "    height, width = pixels.shape[2:]",
        "    if height < width:",
        f"        height, width = {short}, width * {short} // height",
        "    else:",
        f"        height, width = height * {short} // width, {short}",
        "    pixels = torch.nn.functional.interpolate(",
        "        pixels, (height, width), mode='bilinear', align_corners=True",
        "    )",
        f"    top, left = (height - {size}) // 2, (width - {size}) // 2",
        f"    pixels = pixels[0, :, {square}].round() / 255",
        f"    mean, std = torch.tensor({list(mean)}), torch.tensor({list(std)})",
        "    return (pixels - mean[:, None, None]) / std[:, None, None]",
    ]
