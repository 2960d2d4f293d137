"""The most frequent confusions of classes, from a confusion matrix."""

from typing import NamedTuple

import numpy as np

from cspnet.text import printable


class Pair(NamedTuple):
    """The images of one class that were predicted as another."""

    true: str
    predicted: str
    images: int
    of: int  # images of the true class

    @property
    def share(self) -> float:
        return self.images / self.of


def worst_pairs(confusion: np.ndarray, names: list[str], most: int = 20) -> list[Pair]:
    """The pairs of classes with the most confused images, most first; ties in class order.

    `confusion` is int64 [K, K]; rows are the true classes, columns the predicted ones.
    """
    true, predicted = np.nonzero(confusion)  # sparse: at most one cell per image
    true, predicted = true[true != predicted], predicted[true != predicted]
    images = confusion[true, predicted]
    order = np.argsort(-images, kind="stable")[:most]
    counts = confusion.sum(1)
    return [
        Pair(names[true[i]], names[predicted[i]], int(images[i]), int(counts[true[i]]))
        for i in order
    ]


def to_markdown(pairs: list[Pair]) -> str:
    """A Markdown table for TensorBoard's text tab. Names are escaped, as it must be UTF-8."""
    rows = [
        f"| {_cell(pair.true)} | {_cell(pair.predicted)} | {pair.images:,} of {pair.of:,} | "
        f"{pair.share:.0%} |"
        for pair in pairs
    ]
    return "\n".join(["| class | predicted as | images | share |", "|---|---|---|---|", *rows])


def _cell(name: str) -> str:
    """A name as a cell of a Markdown table, with | escaped."""
    return printable(name).replace("|", "\\|")
