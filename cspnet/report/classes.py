"""Scores by class from the confusion matrix, and the figures of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cspnet.inference.confusion import worst_pairs
from cspnet.report.drawing import new_figure
from cspnet.report.style import LIGHT
from cspnet.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_MATRIX = 30  # classes up to which the whole confusion matrix is readable
DARK_CELL = 0.75  # strength of a cell's colour above which its text is white
MAX_SHOWN = 20  # worst classes and pairs of classes in the report
MAX_LABEL_LENGTH = 30  # characters of a class name in a figure


@dataclass(frozen=True)
class ClassScore:
    """The result for one class on the validation set."""

    name: str
    images: int
    correct: int
    confused_with: str  # the most frequent wrong prediction; "": none
    confused_images: int  # images with that prediction

    @property
    def top1(self) -> float:
        """In percent of the images of the class."""
        return 100 * self.correct / self.images if self.images else 0.0


def class_labels(classes: list[str], names: list[str]) -> list[str]:
    """Unambiguous labels of the classes: a display name, with the synset in parentheses."""
    return [
        name if name == own else f"{name} ({own})"
        for own, name in zip(map(printable, classes), names, strict=True)
    ]


def class_scores(confusion: np.ndarray, names: list[str]) -> list[ClassScore]:
    """The scores of all classes in class order. `confusion`: int64 [K, K], rows: true classes."""
    errors = confusion.copy()
    np.fill_diagonal(errors, 0)
    top = errors.argmax(1)
    return [
        ClassScore(
            name=name,
            images=int(confusion[k].sum()),
            correct=int(confusion[k, k]),
            confused_with=names[top[k]] if errors[k, top[k]] else "",
            confused_images=int(errors[k, top[k]]),
        )
        for k, name in enumerate(names)
    ]


def worst_classes(scores: list[ClassScore], count: int = MAX_SHOWN) -> list[ClassScore]:
    """The classes with the lowest top-1, lowest first; without the classes that have no images."""
    return sorted((score for score in scores if score.images), key=lambda s: s.top1)[:count]


def count_ties(scores: list[ClassScore], shown: list[ClassScore]) -> int:
    """How many classes beyond the worst ones `shown` have the same top-1 as the last of these."""
    if not shown:
        return 0
    with_images = [score for score in scores if score.images]
    return sum(score.top1 <= shown[-1].top1 for score in with_images) - len(shown)


def row_fractions(confusion: np.ndarray) -> tuple[np.ndarray, float]:
    """The matrix divided by its row sums, float64 [K, K], and the largest off-diagonal value."""
    fractions = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    errors = fractions.copy()
    np.fill_diagonal(errors, 0)
    return fractions, float(errors.max())


def plot_confusion(confusion: np.ndarray, names: list[str]) -> "Figure":
    """The confusion matrix: correct predictions in blue, errors in orange."""
    from matplotlib.colors import to_rgb

    fractions, largest_error = row_fractions(confusion)
    count = len(names)
    diagonal = np.eye(count, dtype=bool)
    strength = np.where(diagonal, fractions, fractions / (largest_error or 1))[..., None]
    colour = np.where(diagonal[..., None], to_rgb(LIGHT["c0"]), to_rgb(LIGHT["c1"]))
    side = 3 + 0.36 * count
    with new_figure(side, side) as figure:
        axes = figure.subplots()
        axes.imshow(1 - strength * (1 - colour))
        axes.grid(False)
        for row, column in zip(*np.nonzero(confusion), strict=True):
            is_dark = strength[row, column, 0] > DARK_CELL
            axes.text(
                column,
                row,
                f"{confusion[row, column]}",
                color=LIGHT["paper"] if is_dark else LIGHT["ink"],
                ha="center",
                va="center",
                fontsize=7,
            )
        ticks = [shorten(name) for name in names]
        axes.set_xticks(range(count), ticks, rotation=90, fontsize=8)
        axes.set_yticks(range(count), ticks, fontsize=8)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
    return figure


def plot_worst_classes(scores: list[ClassScore], confusion: np.ndarray) -> "Figure":
    """Bars: the classes with the lowest top-1, and the pairs that are confused most often."""
    worst = worst_classes(scores)
    ties = count_ties(scores, worst)
    pairs = worst_pairs(confusion, [score.name for score in scores], MAX_SHOWN)
    with new_figure(9, 1.5 + 0.24 * (len(worst) + len(pairs))) as figure:
        heights = [max(1, len(worst)), max(1, len(pairs))]
        top, bottom = figure.subplots(2, 1, height_ratios=heights)
        _plot_bars(top, [shorten(s.name, 60) for s in worst], [s.top1 for s in worst], "c0")
        more = f"\n{ties:,} more with the same top-1 ({worst[-1].top1:.4g} %)" if ties else ""
        top.set_title(f"Worst classes: top-1 (%){more}")
        top.set_xlim(0, 110)  # percent, with room for the labels of the bars
        pair_names = [f"{shorten(p.true, 40)} → {shorten(p.predicted, 40)}" for p in pairs]
        _plot_bars(bottom, pair_names, [pair.images for pair in pairs], "c1")
        bottom.set_title("Most frequent confusions (images)")
    return figure


def _plot_bars(axes: "Axes", names: list[str], values: list[float], colour: str) -> None:
    from matplotlib.ticker import MaxNLocator

    bars = axes.barh(range(len(names)), values, color=LIGHT[colour])
    axes.bar_label(bars, fmt="{:.4g}", fontsize=8, padding=2)
    axes.grid(False)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlim(0, max(1, 1.1 * max(values, default=0)))


def shorten(name: str, length: int = MAX_LABEL_LENGTH) -> str:
    """A name for a figure, on one line. A long one loses its middle, as it may end in a synset."""
    text = printable(name)
    if len(text) <= length:
        return text
    end = length // 2 - 1
    return f"{text[: length - 1 - end]}…{text[-end:]}"
