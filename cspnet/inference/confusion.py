"""Which classes a net takes for which, from a confusion matrix."""

from typing import NamedTuple

import numpy as np

from cspnet.text import printable


class Pair(NamedTuple):
    """Images of a class that were taken for another."""

    true: str
    taken_for: str
    images: int
    of: int  # images of the class

    @property
    def share(self) -> float:
        return self.images / self.of


def worst_pairs(confusion: np.ndarray, names: list[str], most: int = 20) -> list[Pair]:
    """The pairs of classes with the most images confused, most first; int64 [K, K] by class.

    Rows are the true classes. Equal counts stand in the order of the classes.
    """
    true, other = np.nonzero(confusion)  # few: at most one an image
    true, other = true[true != other], other[true != other]
    images = confusion[true, other]
    order = np.argsort(-images, kind="stable")[:most]
    counts = confusion.sum(1)
    return [
        Pair(names[true[i]], names[other[i]], int(images[i]), int(counts[true[i]])) for i in order
    ]


def to_markdown(pairs: list[Pair]) -> str:
    """A table of pairs, as TensorBoard's text tab shows it. Names are escaped: it is UTF-8."""
    rows = [
        f"| {_cell(pair.true)} | {_cell(pair.taken_for)} | {pair.images:,} of {pair.of:,} | "
        f"{pair.share:.0%} |"
        for pair in pairs
    ]
    return "\n".join(["| class | taken for | images | share |", "|---|---|---|---|", *rows])


def _cell(name: str) -> str:
    """A name in a cell of a Markdown table, which a bar would end."""
    return printable(name).replace("|", "\\|")
