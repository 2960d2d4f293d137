"""The most confident errors of a network: collected during evaluation, and drawn."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

from cspnet.images.decode import UnreadableError, decode, evaluation_view
from cspnet.recipe.schema import Recipe
from cspnet.report.classes import shorten
from cspnet.report.drawing import new_figure
from cspnet.sources.protocol import Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_MISTAKES = 24
MAX_PICTURE_SIDE = 192  # pixels of a picture in the report
MAX_COLUMNS = 6


@dataclass(frozen=True)
class Mistake:
    """An image with a wrong prediction."""

    index: int  # in the source
    true: int  # class
    predicted: int
    probability: float  # of the predicted class, in [0, 1]


class TopMistakes:
    """Collects the errors with the highest probability; a callback of `evaluate`."""

    def __init__(self, count: int = MAX_MISTAKES):
        self.count = count
        # The most confident error first; equal ones in the order of the images.
        self.mistakes: list[Mistake] = []

    def __call__(self, first: int, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds a batch: float32 logits [n, K] and labels [n] of the images from index `first`."""
        # float64: in float32 the probabilities of a confident network are all 1.
        probabilities, predicted = logits.double().softmax(1).max(1)
        wrong = (predicted != labels).nonzero()[:, 0]
        best = wrong[probabilities[wrong].argsort(descending=True, stable=True)[: self.count]]
        columns = (first + best, labels[best], predicted[best], probabilities[best])
        self.mistakes += map(Mistake, *(column.tolist() for column in columns))
        self.mistakes.sort(key=lambda mistake: (-mistake.probability, mistake.index))
        del self.mistakes[self.count :]


def network_view(source: Source, index: int, recipe: Recipe) -> np.ndarray:
    """The input of the network for an image, uint8 RGB [S, S, 3]; black if it is unreadable."""
    size = recipe.data.image_size
    try:
        return evaluation_view(decode(source.read(index)[0]), size, recipe.evaluate)
    except (OSError, UnreadableError):
        return np.zeros((size, size, 3), np.uint8)


def encode_jpeg(picture: np.ndarray) -> bytes:
    """The JPEG of a picture, uint8 RGB [S, S, 3], at most MAX_PICTURE_SIDE wide."""
    if len(picture) > MAX_PICTURE_SIDE:
        picture = cv2.resize(
            picture, (MAX_PICTURE_SIDE, MAX_PICTURE_SIDE), interpolation=cv2.INTER_AREA
        )
    # Small pictures are enlarged in the page, which makes artefacts visible.
    quality = 82 if len(picture) == MAX_PICTURE_SIDE else 95
    encoded = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return encoded.tobytes()


def plot_mistakes(
    mistakes: list[Mistake], pictures: list[np.ndarray], names: list[str]
) -> "Figure":
    """The pictures with their true class, predicted class and probability."""
    columns = min(MAX_COLUMNS, len(mistakes))
    rows = -(-len(mistakes) // columns)
    with new_figure(2 * columns, 2.5 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid:
            axes.axis("off")
        for axes, mistake, picture in zip(grid, mistakes, pictures, strict=False):
            axes.imshow(picture)
            true, predicted = (shorten(names[k], 26) for k in (mistake.true, mistake.predicted))
            probability = format_percent(mistake.probability)
            axes.set_title(f"{true}\nas {predicted}, {probability}", fontsize=7)
    return figure


def format_percent(probability: float) -> str:
    """Four digits, and 100 % only for a probability of 1."""
    return f"{min(100 * probability, 99.99) if probability < 1 else 100:.4g} %"
