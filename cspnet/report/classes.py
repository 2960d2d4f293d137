"""What an evaluation tells of each class, as numbers and as a picture."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cspnet.inference.confusion import worst_pairs
from cspnet.report.curves import plain, save
from cspnet.text import printable

MATRIX = 30  # classes, up to which the whole confusion matrix can be read
DEEP = 0.75  # of a colour, from which on text on it is white
WORST = 20  # classes, and pairs of classes, that are shown of more


@dataclass(frozen=True)
class ClassScore:
    """A class on the validation set."""

    name: str
    images: int
    right: int
    taken_for: str  # the class that its mistakes went to most often; "": there are none
    taken: int  # images that went there

    @property
    def top1(self) -> float:
        """Percent of its images."""
        return 100 * self.right / self.images if self.images else 0.0


def class_labels(classes: list[str], names: list[str]) -> list[str]:
    """What to call the classes where each must be told from all others: a synset keeps its id."""
    return [
        name if name == own else f"{name} ({own})"
        for own, name in zip(map(printable, classes), names, strict=True)
    ]


def class_scores(confusion: np.ndarray, names: list[str]) -> list[ClassScore]:
    """The classes in their order; int64 [K, K], rows are the true classes."""
    mistaken = confusion.copy()
    np.fill_diagonal(mistaken, 0)
    most = mistaken.argmax(1)
    return [
        ClassScore(
            name=name,
            images=int(confusion[k].sum()),
            right=int(confusion[k, k]),
            taken_for=names[most[k]] if mistaken[k, most[k]] else "",
            taken=int(mistaken[k, most[k]]),
        )
        for k, name in enumerate(names)
    ]


def worst(scores: list[ClassScore], most: int = WORST) -> list[ClassScore]:
    """The classes with the lowest top-1, lowest first; one without images is none of them."""
    return sorted((score for score in scores if score.images), key=lambda s: s.top1)[:most]


def more_alike(scores: list[ClassScore], shown: list[ClassScore]) -> int:
    """Classes with images beyond the worst ones `shown` that have the same top-1 as the last."""
    if not shown:
        return 0
    with_images = [score for score in scores if score.images]
    return sum(score.top1 <= shown[-1].top1 for score in with_images) - len(shown)


def shares(confusion: np.ndarray) -> tuple[np.ndarray, float]:
    """The parts of each row, float64 [K, K] in [0, 1], and the largest beside the diagonal."""
    parts = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    beside = parts.copy()
    np.fill_diagonal(beside, 0)
    return parts, float(beside.max())


def draw_matrix(confusion: np.ndarray, names: list[str], path: Path) -> None:
    """The confusion matrix as PNG: blue where right, orange where mistaken."""
    from matplotlib.figure import Figure

    parts, most = shares(confusion)
    count = len(names)
    right = np.eye(count, dtype=bool)
    strength = np.where(right, parts, parts / (most or 1))[..., None]
    ink = np.where(right[..., None], (0.14, 0.39, 0.69), (0.76, 0.31, 0.0))
    side = 3 + 0.36 * count
    figure = Figure(figsize=(side, side), layout="constrained")
    place = figure.subplots()
    place.imshow(1 - strength * (1 - ink))
    for row, column in zip(*np.nonzero(confusion), strict=True):
        place.text(
            *(column, row, f"{confusion[row, column]}"),
            color="white" if strength[row, column, 0] > DEEP else "black",
            ha="center",
            va="center",
            fontsize=7,
        )
    short = [plain(name if len(name) < 30 else f"{name[:28]}…") for name in names]
    place.set_xticks(range(count), short, rotation=90, fontsize=8)
    place.set_yticks(range(count), short, fontsize=8)
    place.set_xlabel("taken for")
    place.set_ylabel("true class")
    save(figure, path)


def draw_worst(scores: list[ClassScore], confusion: np.ndarray, path: Path) -> None:
    """The worst classes and the pairs that are confused most, as PNG."""
    from matplotlib.figure import Figure

    low = worst(scores)
    more = more_alike(scores, low)
    pairs = worst_pairs(confusion, [score.name for score in scores], WORST)
    figure = Figure(figsize=(9, 1.5 + 0.24 * (len(low) + len(pairs))), layout="constrained")
    heights = [max(1, len(low)), max(1, len(pairs))]
    classes, confused = figure.subplots(2, 1, height_ratios=heights)
    _bars(classes, [plain(score.name) for score in low], [score.top1 for score in low], "C0")
    alike = f"; and {more:,} more with the same top-1 ({low[-1].top1:.4g})" if more else ""
    classes.set_title(f"the worst classes: top-1, %{alike}", fontsize=10)
    classes.set_xlim(0, 110)  # percent, with room for the numbers
    told = [plain(f"{pair.true} → {pair.taken_for}") for pair in pairs]
    _bars(confused, told, [pair.images for pair in pairs], "C1")
    confused.set_title("confused most: images", fontsize=10)
    save(figure, path)


def _bars(place, names: list[str], values: list[float], colour: str) -> None:
    bars = place.barh(range(len(names)), values, color=colour)
    place.bar_label(bars, fmt="{:.4g}", fontsize=8, padding=2)
    place.set_yticks(range(len(names)), names, fontsize=8)
    place.invert_yaxis()
    place.margins(x=0.1)
    place.set_xlim(0, max(1, 1.1 * max(values, default=0)))
