"""Pictures of training batches with their label mixtures, and of the schedules of a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from cspnet.files import replace_bytes
from cspnet.recipe.schedule import attack_step_size, learning_rate
from cspnet.recipe.schema import Recipe
from cspnet.report.charts import format_axes
from cspnet.report.drawing import new_figure, save_png
from cspnet.report.style import LIGHT
from cspnet.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TILES_PER_ROW = 8
MIN_TILE = 128  # pixels; smaller images are enlarged by an integer factor without smoothing
GAP = 4  # pixels between tiles
LINE = 14  # height of a line of text, pixels
MIN_WEIGHT = 5e-4  # of a class in a label mixture; smaller ones are left out

Row = tuple[np.ndarray, list[list[str]]]  # tiles, uint8 [n, S, S, 3], and the lines below each


def mixtures(targets: torch.Tensor, names: list[str], smoothing: float) -> list[list[str]]:
    """The label mixture of each soft target [B, K], largest first: "0.62 tench".

    `smoothing` is the label smoothing in the targets, which is undone.
    """
    offset = smoothing / (targets.shape[1] - 1)
    weights = (targets.double().cpu() - offset) / (1 - smoothing - offset)
    captions = []
    for image in weights:
        classes = image.gt(MIN_WEIGHT).nonzero()[:, 0].tolist()
        mixture = sorted(((float(image[k]), names[k]) for k in classes), reverse=True)
        captions.append([f"{weight:.2f} {printable(name)}" for weight, name in mixture])
    return captions


def render_sheet(
    images: torch.Tensor,
    targets: torch.Tensor,
    attacked: torch.Tensor | None,
    names: list[str],
    smoothing: float,
    title: str,
) -> np.ndarray:
    """A page of images in [0, 1], [B, 3, S, S], each with its label mixture; uint8 RGB [H, W, 3].

    If `attacked` holds the same images after the attack, three rows follow: before, after, and the
    difference, stretched to the full range around grey.
    """
    before = _tiles(images)
    captions = mixtures(targets, names, smoothing)
    rows = [
        (before[i : i + TILES_PER_ROW], captions[i : i + TILES_PER_ROW])
        for i in range(0, len(captions), TILES_PER_ROW)
    ]
    if attacked is not None:
        after = _tiles(attacked[:TILES_PER_ROW])
        difference = (attacked - images)[:TILES_PER_ROW].detach().float().cpu()
        largest = max(float(difference.abs().max()), 1e-12)
        rows += [
            (before[:TILES_PER_ROW], [["before the attack"]] * len(after)),
            (after, [["after the attack"]] * len(after)),
            (
                _tiles(0.5 + difference / (2 * largest)),
                [[f"difference, ±{255 * largest:.2g}/255"]] * len(after),
            ),
        ]
    return _render_rows(rows, title)


def _tiles(images: torch.Tensor) -> np.ndarray:
    """uint8 [B, S, S, 3] of images in [0, 1], enlarged by an integer to MIN_TILE or more."""
    scaled = (images.detach().float().cpu() * 255).round().to(torch.uint8)
    tiles = scaled.permute(0, 2, 3, 1).numpy()
    factor = -(-MIN_TILE // tiles.shape[1])
    return tiles.repeat(factor, 1).repeat(factor, 2)


def _render_rows(rows: list[Row], title: str) -> np.ndarray:
    side = rows[0][0].shape[1]
    font = ImageFont.load_default(LINE - 3)
    heights = [side + GAP + LINE * max(map(len, captions)) for _, captions in rows]
    width = TILES_PER_ROW * (side + GAP) + GAP
    page = Image.new("RGB", (width, sum(heights) + GAP * (len(rows) + 1) + LINE), "white")
    pen = ImageDraw.Draw(page)
    pen.text((GAP, GAP), printable(title), "black", font)
    top = 2 * GAP + LINE
    for (tiles, captions), height in zip(rows, heights, strict=True):
        for column, (tile, lines) in enumerate(zip(tiles, captions, strict=True)):
            left = GAP + column * (side + GAP)
            page.paste(Image.fromarray(tile), (left, top))
            for number, line in enumerate(lines):
                while line and pen.textlength(line, font) > side:
                    line = line[:-1]
                pen.text((left, top + side + 1 + LINE * number), line, "black", font)
        top += height + GAP
    return np.asarray(page)


def write_png(path: Path, picture: np.ndarray) -> None:
    """Writes an RGB picture, uint8 [H, W, 3], as PNG. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = cv2.imencode(".png", picture[:, :, ::-1])[1].tobytes()
    replace_bytes(path, content)


def save_schedule(recipe: Recipe, path: Path) -> None:
    """Writes the figure of `plot_schedule` as PNG. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(plot_schedule(recipe), path)


def plot_schedule(recipe: Recipe) -> "Figure":
    """Learning rate, fractions of mixed images and step size of the attack over the steps."""
    total, warmup = recipe.schedule.steps, recipe.schedule.warmup_steps
    # Dense in the warm-up, which is a small part of a long schedule.
    early = min(2 * warmup, total)
    grid = np.concatenate([np.linspace(1, early, 200), np.linspace(1, total, 600)])
    steps = np.unique(grid.round()).astype(np.int64)
    steps = steps[steps >= 1]
    with new_figure(9, 7.5) as figure:
        rate, mix, attack = figure.subplots(3, sharex=True)
        rate.set_xlim(0, total)
        _plot_learning_rate(rate, recipe, steps)
        _plot_mixing(mix, recipe)
        sizes = [attack_step_size(int(step) - 1, recipe) for step in steps]
        attack.plot(steps, sizes, color=LIGHT["flag"])
        percentage = f"on {100 * recipe.adversarial.probability:.0f} % of the groups"
        state = percentage if recipe.adversarial.step_size else "off"
        attack.set_title(f"Step size of the attack: {state}")
        attack.set_xlabel("optimizer step")
        for axes in (rate, attack):
            format_axes(axes)
    return figure


def _plot_learning_rate(axes: "Axes", recipe: Recipe, steps: np.ndarray) -> None:
    """The learning rate at the steps, and its warm-up enlarged in an inset."""
    schedule = recipe.schedule
    rates = np.array([learning_rate(int(step), recipe) for step in steps])
    axes.plot(steps, rates, color=LIGHT["c0"])
    axes.set_title(
        f"Learning rate: {schedule.steps:,} steps of {recipe.batch} images, "
        f"warm-up {schedule.warmup_steps:,}, power {schedule.power:g}"
    )
    early = steps <= 2 * schedule.warmup_steps
    if not early.any():
        return
    inset = axes.inset_axes((0.6, 0.3, 0.38, 0.5))
    inset.plot(steps[early], rates[early], color=LIGHT["c0"])
    inset.set_title("first steps", fontsize=8)
    format_axes(inset)
    inset.tick_params(labelsize=7)


def _plot_mixing(axes: "Axes", recipe: Recipe) -> None:
    """The fractions of images without mixing, with CutMix and with Mosaic."""
    mix = recipe.mix
    each = mix.probability / max(int(mix.cutmix) + int(mix.mosaic), 1)
    fractions = {
        "not mixed": 1 - mix.probability,
        "CutMix": each if mix.cutmix else 0.0,
        "Mosaic": each if mix.mosaic else 0.0,
    }
    axes.stackplot(
        [1, recipe.schedule.steps],
        [[fraction, fraction] for fraction in fractions.values()],
        labels=[f"{name} {100 * fraction:.0f} %" for name, fraction in fractions.items()],
        colors=[LIGHT[name] for name in ("c0", "c1", "c2")],
        alpha=0.7,
    )
    axes.set_title("Mixing (fraction of the images)")
    axes.set_ylim(0, 1)
    axes.legend(loc="center right", frameon=True, framealpha=1)
