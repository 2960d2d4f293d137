"""The curves of a run: which there are, made short enough to draw; as one picture."""

import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cspnet.run.reader import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 600  # of a curve, at most: more than a screen has columns for it
DOTTED = 60  # points of a curve, up to which each of them can be seen
MARKED = 40  # starts and stops, up to which there is room to mark each
HEADROOM = 1.5  # over the largest training loss, for those of validation


@dataclass(frozen=True)
class Curve:
    label: str
    steps: np.ndarray  # float64 [n], rising
    values: np.ndarray  # float64 [n], finite
    colour: int  # of the palette
    kind: str = "line"  # faint: behind another; dots: a line with its points


@dataclass(frozen=True)
class Chart:
    """Curves on one axis, over the steps from 0 to `until`."""

    title: str
    curves: list[Curve]
    until: int
    note: str = ""
    from_zero: bool = False
    ceiling: float = math.inf  # values above it are drawn there


def thin(steps: np.ndarray, values: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, ...]:
    """Steps and values, the finite ones, as the means over at most `points` equal spans of steps.

    Fewer values than that come back as they are.
    """
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(steps) <= points:
        return steps, values
    width = max(steps[-1] - steps[0], 1) / points
    span = np.minimum((steps - steps[0]) // width, points - 1).astype(np.int64)
    counts = np.bincount(span, minlength=points)
    filled = counts > 0
    sums = [np.bincount(span, part, points)[filled] for part in (steps, values)]
    return sums[0] / counts[filled], sums[1] / counts[filled]


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value and its neighbours, `reach` on either side; fewer near the ends.

    As many on one side as on the other: a steep beginning stays where it is.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    near = np.minimum(np.minimum(places, len(values) - 1 - places), reach)
    return (sums[places + near + 1] - sums[places - near]) / (2 * near + 1)


def charts(run: RunRecord) -> list[Chart]:
    """What there is to draw of a run; none without a line in the record."""
    training, validation = run.training, run.validation
    found = [_losses(run)]
    top = [
        _curve(f"top-{k}", validation, f"top{k}", colour, "dots")
        for colour, k in enumerate((1, 5))
        if np.isfinite(validation[f"top{k}"]).any()
    ]
    found.append(Chart("validation, % of the images right", top, run.step, from_zero=True))
    waits = {**training, "data_wait": 100 * training["data_wait"]}
    for title, part, name in (
        ("learning rate", training, "lr"),
        ("images per second", training, "images_per_second"),
        ("waiting for images, % of the time", waits, "data_wait"),
        ("loss scale", training, "loss_scale"),
    ):
        curve = _curve("last", part, name, 0)
        if name != "loss_scale" or len(np.unique(curve.values)) > 1:
            found.append(Chart(title, [curve], run.step, from_zero=True))
    kept = [
        replace(chart, curves=[curve for curve in chart.curves if len(curve.steps)])
        for chart in found
    ]
    return [chart for chart in kept if chart.curves]


def _curve(label: str, part: dict, name: str, colour: int, kind: str = "line") -> Curve:
    steps, values = thin(part["step"], part[name])
    return Curve(label, steps, values, colour, kind if len(steps) <= DOTTED else "line")


def _losses(run: RunRecord) -> Chart:
    raw = _curve("training", run.training, "loss", 0)
    curves, note = [raw], ""
    reach = len(raw.steps) // 40
    if reach:
        curves = [
            Curve("training", raw.steps, raw.values, 0, "faint"),
            Curve("training, smoothed", raw.steps, smooth(raw.values, reach), 0),
        ]
        note = f"Smoothed: the mean of {2 * reach + 1} points."
    tested = _curve("validation", run.validation, "loss", 1, "dots")
    curves.append(tested)
    ceiling = math.inf
    if len(raw.steps) and len(tested.steps) and tested.values.max() > HEADROOM * raw.values.max():
        # An average of weights is far off in the first steps, and would leave no room for the rest.
        ceiling = HEADROOM * float(raw.values.max())
        note += f" Validation had up to {tested.values.max():,.4g}: drawn at the upper edge."
    kinds = {"mix.probability": "mixed", "loss.label_smoothing": "smoothed"}
    softened = " and ".join(word for key, word in kinds.items() if run.fields.get(key))
    if softened:
        note += f" Training's is of {softened} labels, which cannot all be met: do not compare."
    broken = int(np.isnan(run.training["loss"]).sum())
    if broken:
        note += f" {broken:,} lines of the record have a loss that is no number."
    return Chart("loss, nats", curves, run.step, note.strip(), ceiling=ceiling)


def shortened(run: RunRecord) -> str:
    """A sentence on what the curves leave out; empty where they show every line."""
    lines = max(len(part["step"]) for part in run.parts)
    if lines <= POINTS:
        return ""
    return (
        f"The record has {lines:,} lines: each point of a curve is the mean of those in one of "
        f"{POINTS} equal spans of steps."
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high, at most `most`; low < high."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20, 50):
        width = factor * power
        first, last = math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9)
        if last - first < most:
            break
    return [float(f"{number * width:.12g}") for number in range(first, last + 1)]


def extent(chart: Chart) -> tuple[float, float, float, float]:
    """First and last step, lowest and highest value that a chart has to show; never empty."""
    values = np.concatenate([curve.values for curve in chart.curves])
    low, high = float(values.min()), min(float(values.max()), chart.ceiling)
    if chart.from_zero:
        low = min(low, 0.0)
        high = 1.0 if low == high == 0 else high  # else there would be room below 0
    if high <= low:
        room = abs(high) / 10 or 1.0
        low, high = low - room, high + room
    return 0.0, float(max(chart.until, 1)), low, high + 0.04 * (high - low)


def draw(run: RunRecord, drawn: list[Chart], marks: list[int], path: Path) -> None:
    """All charts of a run in one PNG; dotted lines at the steps of `marks`."""
    from matplotlib.figure import Figure  # a second to import

    columns = min(2, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(6.5 * columns, 3 * rows), layout="constrained")
    figure.suptitle(plain(run.name))
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for place in places[len(drawn) :]:
        place.remove()
    for place, chart in zip(places, drawn, strict=False):
        left, right, low, high = extent(chart)
        for curve in chart.curves:
            place.plot(
                *(
                    curve.steps,
                    np.minimum(curve.values, high),
                    "o-" if curve.kind == "dots" else "-",
                ),
                color=f"C{curve.colour}",
                alpha=0.3 if curve.kind == "faint" else 1,
                markersize=3,
                label=curve.label,
            )
        for step in marks:
            place.axvline(step, color="0.5", linestyle=":", linewidth=1)
        place.set_title(chart.title, fontsize=10)
        place.set_xlim(left, right)
        place.set_ylim(low, high)
        if len(chart.curves) > 1:
            place.legend(fontsize=8)
        place.set_xlabel("optimizer step", fontsize=8)
        for axis in (place.xaxis, place.yaxis):
            axis.set_major_formatter(lambda value, _: number(value))
    save(figure, path)


def save(figure: "Figure", path: Path) -> None:
    """A figure as PNG. OSError."""
    with warnings.catch_warnings():
        # matplotlib's font lacks many scripts: it draws boxes, and warns of each.
        warnings.simplefilter("ignore")
        figure.savefig(path, dpi=110, format="png")


def number(value: float) -> str:
    """Four digits, with k or M where there would be many more."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:,.4g}k"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def plain(text: str) -> str:
    """Text that matplotlib draws as it is, on one line: no formula between dollar signs."""
    known = text.encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() else "?" for c in known).replace("$", r"\$")
