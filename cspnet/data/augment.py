"""What happens to images on the device, group by group: colour, CutMix and Mosaic, soft targets.

The random numbers are drawn on the host, by group, from (seed, step, group) and travel as a few
small arrays; the device applies them. A device, or a number of groups at once, changes nothing in
them. CutMix and Mosaic are the same operation: up to three rectangles, each taken in place from
another image of the group. A label's weight is the area that its image holds.
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
    """The random numbers of one or more groups of B images in all."""

    hue: torch.Tensor  # float32 [B], shift as a share of the colour circle
    saturation: torch.Tensor  # float32 [B], factor
    value: torch.Tensor  # float32 [B], factor
    partners: torch.Tensor  # int64 [B, 3], index of the image that each rectangle comes from
    boxes: torch.Tensor  # int64 [B, 3, 4], rows y0 ≤ y < y1 and columns x0 ≤ x < x1; may be empty

    def to(self, device: torch.device) -> "AugmentParams":
        """A copy on the device, without waiting for it: one transfer, out of pinned memory."""
        if device.type == "cpu":
            return self
        parts = [getattr(self, entry.name) for entry in fields(self)]
        packed = torch.cat(
            [part.flatten(1) if part.ndim > 1 else part[:, None] for part in parts], 1
        )
        packed = packed.pin_memory().to(device, non_blocking=True)  # float32 holds the indices
        moved = packed.split([part[0].numel() for part in parts], 1)
        return AugmentParams(
            *(
                new.reshape(part.shape).to(part.dtype)
                for new, part in zip(moved, parts, strict=True)
            )
        )


def sample_params(recipe: Recipe, step: int, groups: range) -> AugmentParams:
    """The random numbers of the given groups of a step; partners stay within their group."""
    drawn = []
    for place, group in enumerate(groups):
        rng = stream.rng_for(recipe.seed, stream.GROUP_DOMAIN, step, group)
        colours = _draw_colours(rng, recipe.group, recipe.augment)
        partners, boxes = _draw_mix(rng, recipe.group, recipe.size_at(step), recipe.mix)
        drawn.append((*colours, partners + place * recipe.group, boxes))
    hue, saturation, value, partners, boxes = (
        torch.from_numpy(np.concatenate(part)) for part in zip(*drawn, strict=True)
    )
    return AugmentParams(hue.float(), saturation.float(), value.float(), partners, boxes)


def _draw_colours(rng: np.random.Generator, images: int, augment: Augment) -> tuple:
    def two_sided(low: float) -> np.ndarray:
        factor = rng.uniform(low, 1, images)
        return np.where(rng.random(images) < 0.5, factor, 1 / factor)

    hue = rng.uniform(-augment.hue, augment.hue, images)
    return hue, two_sided(augment.saturation), two_sided(augment.value)


def _draw_mix(
    rng: np.random.Generator, images: int, size: int, mix: Mix
) -> tuple[np.ndarray, np.ndarray]:
    """Partners int64 [images, 3] and boxes int64 [images, 3, 4], by Darknet's src/data.c.

    One coin for `share` consecutive images; then each picks CutMix or Mosaic for itself. Darknet
    draws partners from the whole list; here they come from the group, three distinct other images,
    which costs one decode for each sample and not four.
    """
    coins = rng.random(-(-images // mix.images_per_draw)) < mix.probability
    coins = np.repeat(coins, mix.images_per_draw)[:images]
    if mix.cutmix and mix.mosaic:
        is_mosaic = rng.random(images) < 0.5
    else:
        is_mosaic = np.full(images, mix.mosaic)
    # Random order of the others: the first three offsets of a shuffled 1 … images - 1.
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
    nothing = (zero, zero, zero, zero)
    cutmix = ((top, top + height, left, left + width), nothing, nothing)
    mosaic = (  # the image itself keeps the top left
        (zero, cut_y, cut_x, full),
        (cut_y, full, zero, cut_x),
        (cut_y, full, cut_x, full),
    )
    stacked = [np.moveaxis(np.array(boxes), -1, 0) for boxes in (cutmix, mosaic)]  # [B, 3, 4]
    boxes = np.where(is_mosaic[:, None, None], stacked[1], stacked[0])
    return partners, boxes * coins[:, None, None]


def distort_colour(images: torch.Tensor, draws: AugmentParams) -> torch.Tensor:
    """Changes hue, saturation and value of RGB images in [0, 1], float [B, 3, H, W].

    Each image by its draws, as Darknet's distort_image: hue wraps, saturation and value may pass 1
    on the way, RGB is clamped at the end. Grey stays grey and black stays black.
    """
    hue, saturation, value = (
        part[:, None, None].to(images.dtype) for part in (draws.hue, draws.saturation, draws.value)
    )
    red, green, blue = images.unbind(1)  # [B, H, W]
    top = images.amax(1)
    span = top - images.amin(1)
    inverse = 1 / torch.where(span == 0, 1, span)
    # Sextant of the colour circle, in units of a sixth of a turn.
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


def mix_images(images: torch.Tensor, draws: AugmentParams) -> torch.Tensor:
    """Pastes each image's rectangles from its partners; [B, C, S, S] in, the same out."""
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device)[None, :, None]
    columns = torch.arange(width, device=images.device)[None, None, :]
    mixed = images
    for place in range(3):
        y0, y1, x0, x1 = draws.boxes[:, place, :, None, None].unbind(1)  # [B, 1, 1] each
        inside = (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)  # [B, H, W]
        mixed = torch.where(inside[:, None], images[draws.partners[:, place]], mixed)
    return mixed


def label_weights(draws: AugmentParams, size: int) -> torch.Tensor:
    """Area that the image itself and each of its three partners hold, float32 [B, 4], sums to 1."""
    y0, y1, x0, x1 = draws.boxes.unbind(-1)
    others = ((y1 - y0) * (x1 - x0)).float() / size**2  # [B, 3]
    return torch.cat([1 - others.sum(1, keepdim=True), others], 1)


def soft_targets(
    labels: torch.Tensor, draws: AugmentParams, size: int, classes: int, smoothing: float
) -> torch.Tensor:
    """Target distribution of mixed images: float32 [B, classes] from int64 labels [B].

    Smoothing each image before mixing, as Darknet does, equals smoothing the mixture.
    """
    holders = torch.cat([labels[:, None], labels[draws.partners]], 1)  # [B, 4]
    targets = torch.zeros(len(labels), classes, device=labels.device)
    targets.scatter_add_(1, holders, label_weights(draws, size))
    rest = smoothing / (classes - 1)
    return rest + targets * (1 - smoothing - rest)


def augment(
    images: torch.Tensor, labels: torch.Tensor, draws: AugmentParams, recipe: Recipe, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [0, 1], float32 [B, 3, S, S] channels-last, and soft targets [B, classes].

    From uint8 images [B, S, S, 3] and int64 labels [B], on the device where they are.
    """
    pixels = images.permute(0, 3, 1, 2).float() / 255
    pixels = distort_colour(pixels, draws)
    if recipe.mix.probability > 0:
        pixels = mix_images(pixels, draws)
    targets = soft_targets(labels, draws, images.shape[1], classes, recipe.loss.label_smoothing)
    return pixels.contiguous(memory_format=torch.channels_last), targets


def mean_and_std(data: Data) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What is subtracted from RGB in [0, 1], and what that is divided by; 3 values each."""
    known = {"none": ((0.0,) * 3, (1.0,) * 3), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)}
    return known.get(data.normalize) or (tuple(data.mean), tuple(data.std))


def normalize(images: torch.Tensor, data: Data) -> torch.Tensor:
    """What the net expects of images in [0, 1], float [B, 3, H, W]: (images - mean) / std."""
    if data.normalize == "none":
        return images
    mean, std = _on_device(*mean_and_std(data), images.device)
    return (images - mean) / std


@lru_cache
def _on_device(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    # Kept on the device: a fresh copy at each step would make the host wait.
    both = torch.tensor([mean, std], device=device)[..., None, None]
    return both[0], both[1]
