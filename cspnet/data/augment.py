"""Augmentation on the device: colour jitter, CutMix, Mosaic, soft targets, normalization.

The host samples the random parameters per group, from (seed, step, group), and copies them to the
device as a few small arrays. They depend neither on the device nor on the size of a micro-batch.
CutMix and Mosaic are one operation: up to three rectangles of an image are replaced by the same
rectangles of other images of its group. The weight of a label is the area of its image.
"""

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch

from cspnet.data import stream
from cspnet.recipe.schema import Augment, Data, Mix, Recipe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class AugmentParams:
    """Augmentation parameters of one or more groups with B images in total."""

    hue: torch.Tensor  # float32 [B], shift as a fraction of the colour circle
    saturation: torch.Tensor  # float32 [B], factor
    value: torch.Tensor  # float32 [B], factor
    partners: torch.Tensor  # int64 [B, 3], index of the source image of each rectangle
    # int64 [B, 3, 4], rectangles (y0, y1, x0, x1): rows y0 ≤ y < y1, columns x0 ≤ x < x1. An empty
    # rectangle replaces nothing.
    boxes: torch.Tensor

    def to(self, device: torch.device) -> "AugmentParams":
        """Copy to the device in one asynchronous transfer from pinned memory."""
        if device.type == "cpu":
            return self
        tensors: list[torch.Tensor] = [getattr(self, field.name) for field in fields(self)]
        packed = torch.cat(
            [tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None] for tensor in tensors], 1
        )
        # float32 represents the indices exactly.
        packed = packed.pin_memory().to(device, non_blocking=True)
        columns = packed.split([tensor[0].numel() for tensor in tensors], 1)
        return AugmentParams(
            *(
                column.reshape(tensor.shape).to(tensor.dtype)
                for column, tensor in zip(columns, tensors, strict=True)
            )
        )


def sample_params(recipe: Recipe, step: int, groups: range) -> AugmentParams:
    """Sample the parameters of the given groups of a step. Partners stay within their group."""
    per_group = []
    for number, group in enumerate(groups):
        rng = stream.rng_for(recipe.seed, stream.GROUP_DOMAIN, step, group)
        colours = _sample_colours(rng, recipe.group, recipe.augment)
        partners, boxes = _sample_mix(rng, recipe.group, recipe.size_at(step), recipe.mix)
        per_group.append((*colours, partners + number * recipe.group, boxes))
    tensors = [torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*per_group, strict=True)]
    factors = [tensor.float() for tensor in tensors[:3]]  # hue, saturation, value
    return AugmentParams(*factors, *tensors[3:])


def _sample_colours(
    rng: np.random.Generator, images: int, augment: Augment
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue shifts, saturation factors and value factors, float64 [images] each."""

    def rand_scale(low: float) -> np.ndarray:
        factor = rng.uniform(low, 1, images)
        return np.where(rng.random(images) < 0.5, factor, 1 / factor)

    hue = rng.uniform(-augment.hue, augment.hue, images)
    return hue, rand_scale(augment.saturation), rand_scale(augment.value)


def _sample_mix(
    rng: np.random.Generator, images: int, size: int, mix: Mix
) -> tuple[np.ndarray, np.ndarray]:
    """Partners int64 [images, 3] and boxes int64 [images, 3, 4], following Darknet's src/data.c.

    One random decision covers `mix.images_per_draw` consecutive images. Each of them then chooses
    between CutMix and Mosaic. Darknet samples partners from the whole data set. Here they are three
    distinct other images of the group, so that a sample costs one decode instead of four.
    """
    coins = rng.random(-(-images // mix.images_per_draw)) < mix.probability
    coins = np.repeat(coins, mix.images_per_draw)[:images]
    if mix.cutmix and mix.mosaic:
        is_mosaic = rng.random(images) < 0.5
    else:
        is_mosaic = np.full(images, mix.mosaic)
    # The first three offsets of a random permutation of 1 … images - 1.
    offsets = 1 + np.argsort(rng.random((images, images - 1)), axis=1)[:, :3]
    offsets = np.pad(offsets, ((0, 0), (0, 3 - offsets.shape[1])))
    partners = (np.arange(images)[:, None] + offsets) % images
    low, high = (int(bound * size) for bound in mix.cutmix_side)
    sides = rng.integers(low, high, (2, images), endpoint=True)
    corners = (rng.random((2, images)) * (size - sides)).astype(np.int64)
    low, high = (int(bound * size) for bound in mix.mosaic_split)
    cut_y, cut_x = rng.integers(low, high, (2, images), endpoint=True)
    zero, full = np.zeros(images, np.int64), np.full(images, size)
    (top, left), (height, width) = corners, sides
    empty = (zero, zero, zero, zero)
    cutmix = ((top, top + height, left, left + width), empty, empty)
    mosaic = (  # the image itself keeps the top left corner
        (zero, cut_y, cut_x, full),
        (cut_y, full, zero, cut_x),
        (cut_y, full, cut_x, full),
    )
    stacked = [np.moveaxis(np.array(boxes), -1, 0) for boxes in (cutmix, mosaic)]  # [B, 3, 4]
    boxes = np.where(is_mosaic[:, None, None], stacked[1], stacked[0])
    return partners, boxes * coins[:, None, None]


def distort_colour(images: torch.Tensor, params: AugmentParams) -> torch.Tensor:
    """Jitter hue, saturation and value of RGB images in [0, 1], float [B, 3, H, W].

    Follows Darknet's distort_image: hue wraps around, saturation and value may exceed 1 in between,
    RGB is clamped at the end. Grey stays grey and black stays black.
    """
    hue, saturation, value = (
        factors[:, None, None].to(images.dtype)
        for factors in (params.hue, params.saturation, params.value)
    )
    red, green, blue = images.unbind(1)  # [B, H, W]
    top = images.amax(1)
    span = top - images.amin(1)
    inverse = 1 / torch.where(span == 0, 1, span)
    # Hue in sextants: 6 is a full turn.
    sextant = torch.where(
        red == top,
        (green - blue) * inverse,
        torch.where(green == top, 2 + (blue - red) * inverse, 4 + (red - green) * inverse),
    )
    sextant = sextant + 6 * hue
    chroma = span * saturation * value  # new value times new saturation
    top = top * value
    channels = []
    for offset in (5, 3, 1):
        k = (sextant + offset) % 6
        channels.append(top - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1).clamp(0, 1)


def mix_images(images: torch.Tensor, params: AugmentParams) -> torch.Tensor:
    """Replace the rectangles of each image by those of its partners; [B, C, S, S] to the same."""
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device)[None, :, None]
    columns = torch.arange(width, device=images.device)[None, None, :]
    mixed = images
    for box in range(3):
        y0, y1, x0, x1 = params.boxes[:, box, :, None, None].unbind(1)  # [B, 1, 1] each
        inside = (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)  # [B, H, W]
        mixed = torch.where(inside[:, None], images[params.partners[:, box]], mixed)
    return mixed


def label_weights(params: AugmentParams, size: int) -> torch.Tensor:
    """Fraction of the area that shows the image and its three partners, float32 [B, 4].

    Rows sum to 1.
    """
    y0, y1, x0, x1 = params.boxes.unbind(-1)
    others = ((y1 - y0) * (x1 - x0)).float() / size**2  # [B, 3]
    return torch.cat([1 - others.sum(1, keepdim=True), others], 1)


def soft_targets(
    labels: torch.Tensor, params: AugmentParams, size: int, classes: int, smoothing: float
) -> torch.Tensor:
    """Target distributions of mixed images: float32 [B, classes] from int64 labels [B].

    Smoothing the mixture equals smoothing each image before mixing, as Darknet does.
    """
    mixed_labels = torch.cat([labels[:, None], labels[params.partners]], 1)  # [B, 4]
    targets = torch.zeros(len(labels), classes, device=labels.device)
    targets.scatter_add_(1, mixed_labels, label_weights(params, size))
    rest = smoothing / (classes - 1)
    return rest + targets * (1 - smoothing - rest)


def augment(
    images: torch.Tensor, labels: torch.Tensor, params: AugmentParams, recipe: Recipe, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment uint8 images [B, S, S, 3] with int64 labels [B] on their device.

    Returns images in [0, 1], float32 [B, 3, S, S] in channels-last format, and soft targets,
    float32 [B, classes].
    """
    pixels = images.permute(0, 3, 1, 2).float() / 255
    pixels = distort_colour(pixels, params)
    if recipe.mix.probability > 0:
        pixels = mix_images(pixels, params)
    targets = soft_targets(labels, params, images.shape[1], classes, recipe.loss.label_smoothing)
    return pixels.contiguous(memory_format=torch.channels_last), targets


def mean_and_std(data: Data) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which RGB images in [0, 1] are normalized, 3 values each."""
    if data.normalize == "none":
        return (0.0,) * 3, (1.0,) * 3
    if data.normalize == "imagenet":
        return IMAGENET_MEAN, IMAGENET_STD
    assert data.mean is not None and data.std is not None, "the schema requires both"
    return tuple(data.mean), tuple(data.std)


def normalize(images: torch.Tensor, data: Data) -> torch.Tensor:
    """Normalize images in [0, 1], float [B, 3, H, W], for the network: (images - mean) / std."""
    if data.normalize == "none":
        return images
    mean, std = _on_device(*mean_and_std(data), images.device)
    return (images - mean) / std


@lru_cache
def _on_device(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    # Cached on the device: copying them in each step would block the host.
    both = torch.tensor([mean, std], device=device)[..., None, None]
    return both[0], both[1]
