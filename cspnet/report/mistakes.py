"""The mistakes that a net is surest of: found while it is evaluated, shown as it sees them."""

import heapq
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from cspnet.images.decode import UnreadableError, decode, evaluation_view
from cspnet.recipe.schema import Recipe
from cspnet.report.curves import plain, save
from cspnet.sources.data_root import Source

MAX_MISTAKES = 24
SIDE = 192  # pixels of a picture, at most


@dataclass(frozen=True)
class Mistake:
    """An image that the net took for another class."""

    index: int  # in the source
    true: int
    taken_for: int
    probability: float  # of the class that it was taken for, in [0, 1]


class TopMistakes:
    """Keeps the mistakes with the highest probability; `evaluate` tells it of every batch."""

    def __init__(self, most: int = MAX_MISTAKES):
        self.most = most
        # The smallest on top: probability, then the later image.
        self._heap: list[tuple[float, int, int, int]] = []

    def __call__(self, first: int, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Logits float32 [n, K] and labels [n] of the images from `first` on."""
        # In double: a sure net's probabilities are all 1 in single precision.
        found, taken = logits.double().softmax(1).max(1)
        wrong = (taken != labels).nonzero()[:, 0]
        best = wrong[found[wrong].argsort(descending=True, stable=True)[: self.most]]
        rows = zip(
            *(part[best].tolist() for part in (found, labels, taken)), best.tolist(), strict=True
        )
        for probability, true, other, row in rows:
            heapq.heappush(self._heap, (probability, -(first + row), true, other))
            if len(self._heap) > self.most:
                heapq.heappop(self._heap)

    def mistakes(self) -> list[Mistake]:
        """The surest first; equal ones in the order of the images."""
        ordered = sorted(self._heap, reverse=True)
        return [Mistake(-index, true, other, p) for p, index, true, other in ordered]


def view(source: Source, index: int, recipe: Recipe) -> np.ndarray:
    """What the net sees of an image, uint8 RGB [S, S, 3]; black where it cannot be read."""
    size = recipe.data.image_size
    try:
        return evaluation_view(decode(source.read(index)[0]), size, recipe.evaluate)
    except (OSError, UnreadableError):
        return np.zeros((size, size, 3), np.uint8)


def to_jpeg(picture: np.ndarray) -> bytes:
    """A JPEG of an RGB picture, uint8 [S, S, 3], SIDE pixels wide at most."""
    if len(picture) > SIDE:
        picture = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    quality = 82 if len(picture) == SIDE else 95
    return cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[
        1
    ].tobytes()


def draw(mistakes: list[Mistake], pictures: list[np.ndarray], names: list[str], path: Path) -> None:
    """The pictures with what they are and what they were taken for, as PNG."""
    from matplotlib.figure import Figure

    columns = min(6, len(mistakes))
    rows = -(-len(mistakes) // columns)
    figure = Figure(figsize=(2 * columns, 2.5 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for place in places:
        place.axis("off")
    for place, mistake, picture in zip(places, mistakes, pictures, strict=False):
        place.imshow(picture)
        true, taken = (
            plain(name if len(name) < 26 else f"{name[:24]}…")
            for name in (names[mistake.true], names[mistake.taken_for])
        )
        place.set_title(f"{true}\nas {taken}, {percent(mistake.probability)}", fontsize=7)
    save(figure, path)


def percent(probability: float) -> str:
    """In percent, and never 100 where it is less."""
    return f"{min(100 * probability, 99.99) if probability < 1 else 100:.4g} %"
