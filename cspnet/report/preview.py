"""Pictures of what the net sees: images with their label mixtures, the attack, the schedule."""

from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from cspnet.files import replace_file
from cspnet.recipe.schema import Recipe
from cspnet.text import printable
from cspnet.train.adversarial import attack_step_size
from cspnet.train.optim import learning_rate

COLUMNS = 8
TILE = 128  # the least width of a tile; smaller images are enlarged by a whole factor, unsmoothed
GAP = 4
LINE = 14  # height of a line of text, pixels


def mixtures(targets: torch.Tensor, names: list[str], smoothing: float) -> list[list[str]]:
    """The parts of each soft target [B, K], smoothing undone: "0.62 tench", largest first."""
    rest = smoothing / (targets.shape[1] - 1)
    shares = (targets.double().cpu() - rest) / (1 - smoothing - rest)
    captions = []
    for image in shares:
        parts = [(float(image[k]), names[k]) for k in image.gt(5e-4).nonzero()[:, 0].tolist()]
        shown = [(share, printable(name)) for share, name in sorted(parts, reverse=True)]
        captions.append([f"{share:.2f} {name}" for share, name in shown])
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

    With the same images after the attack, three rows more: before, after, and the difference, which
    is stretched to the full range around grey.
    """
    before = _pixels(images)
    rows = [
        (before[i : i + COLUMNS], captions)
        for i, captions in _chunks(mixtures(targets, names, smoothing))
    ]
    if attacked is not None:
        after = _pixels(attacked[:COLUMNS])
        moved = (attacked - images)[:COLUMNS].detach().float().cpu()
        most = max(float(moved.abs().max()), 1e-12)
        rows += [
            (before[:COLUMNS], [["before the attack"]] * len(after)),
            (after, [["after the attack"]] * len(after)),
            (
                _pixels(0.5 + moved / (2 * most)),
                [[f"difference, ±{255 * most:.2g}/255"]] * len(after),
            ),
        ]
    return _draw(rows, title)


def _pixels(images: torch.Tensor) -> np.ndarray:
    """uint8 [B, S, S, 3] of images in [0, 1], enlarged by a whole factor to TILE or more."""
    tiles = (images.detach().float().cpu() * 255).round().to(torch.uint8)
    tiles = tiles.permute(0, 2, 3, 1).numpy()
    factor = -(-TILE // tiles.shape[1])
    return tiles.repeat(factor, 1).repeat(factor, 2)


def _chunks(captions: list[list[str]]) -> list[tuple[int, list[list[str]]]]:
    return [(i, captions[i : i + COLUMNS]) for i in range(0, len(captions), COLUMNS)]


def _draw(rows: list[tuple[np.ndarray, list[list[str]]]], title: str) -> np.ndarray:
    side = rows[0][0].shape[1]
    font = ImageFont.load_default(LINE - 3)
    heights = [side + GAP + LINE * max(map(len, captions)) for _, captions in rows]
    width = COLUMNS * (side + GAP) + GAP
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
    """An RGB picture, uint8 [H, W, 3], as a PNG file. OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = cv2.imencode(".png", picture[:, :, ::-1])[1].tobytes()
    replace_file(path, lambda temporary: temporary.write_bytes(content))


def save_schedule(recipe: Recipe, path: Path) -> None:
    """Learning rate, shares of mixed images and strength of the attack over the steps, as PNG."""
    from matplotlib.figure import Figure  # a second to import

    total, warm = recipe.schedule.steps, recipe.schedule.warmup_steps
    steps = np.unique(
        np.concatenate([np.linspace(1, min(warm, total), 200), np.linspace(1, total, 600)]).round()
    )
    steps = steps[steps >= 1].astype(np.int64)
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    rate, mix, sat = figure.subplots(3, sharex=True)
    rates = [learning_rate(int(step), recipe) for step in steps]
    rate.plot(steps, rates, color="tab:blue")
    rate.set_ylabel("learning rate")
    rate.set_title(
        f"{total:,} steps of {recipe.batch}; warm-up {warm:,}, power {recipe.schedule.power:g}"
    )
    inner = rate.inset_axes((0.55, 0.4, 0.43, 0.55))
    early = steps <= 2 * warm
    inner.plot(steps[early], np.array(rates)[early], color="tab:blue")
    inner.text(0.05, 0.8, "the first steps", transform=inner.transAxes, fontsize=8)
    inner.tick_params(labelsize=7)
    kinds = int(recipe.mix.cutmix) + int(recipe.mix.mosaic)
    each = recipe.mix.probability / max(kinds, 1)
    shares = {
        "clean": 1 - recipe.mix.probability,
        "CutMix": each if recipe.mix.cutmix else 0.0,
        "Mosaic": each if recipe.mix.mosaic else 0.0,
    }
    mix.stackplot(
        [1, total],
        [[share, share] for share in shares.values()],
        labels=[f"{name} {100 * share:.0f} %" for name, share in shares.items()],
        alpha=0.7,
    )
    mix.set_ylabel("share of images")
    mix.set_ylim(0, 1)
    mix.legend(loc="center right")
    sat.plot(steps, [attack_step_size(int(step) - 1, recipe) for step in steps], color="tab:red")
    sat.set_ylabel("strength of the attack")
    half = 100 * recipe.adversarial.probability
    sat.set_title(
        f"on {half:.0f} % of the groups" if recipe.adversarial.step_size else "off", fontsize=9
    )
    sat.set_xlabel("optimizer step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
