"""The charts of a run: its curves over the steps, shortened, and drawn with matplotlib."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from cspnet.report.drawing import SERIES, Drawing, new_figure
from cspnet.report.style import LIGHT
from cspnet.run.reader import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 600  # per curve: about the width of a chart on a screen, in pixels
MAX_DOTS = 60  # up to this many points of a curve are marked
MAX_MARKS = 40  # up to this many starts and stops are marked
HEADROOM = 1.5  # how far a chart of losses extends above the largest training loss
MARGIN = 0.04  # of the range of values, above and below the curves
LARGE = 1e4  # from here on, numbers are shortened to 12k or 3.4M
TICK_STEPS = [1, 2, 2.5, 5, 10]
NAMES = ("loss", "accuracy", "learning-rate", "throughput", "data-wait", "loss-scale")


@dataclass(frozen=True)
class Curve:
    label: str
    steps: np.ndarray  # float64 [n], rising
    values: np.ndarray  # float64 [n], finite
    colour: int  # index into SERIES
    kind: str = "line"  # "faint": behind another curve, not in the legend; "dots": with markers


@dataclass(frozen=True)
class Chart:
    """Curves over the optimizer steps 0 to `last_step`."""

    name: str  # one of NAMES
    title: str
    curves: list[Curve]
    last_step: int
    note: str = ""
    from_zero: bool = False
    ceiling: float = math.inf  # larger values are drawn at the upper edge


def thin(
    steps: np.ndarray, values: np.ndarray, max_points: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray]:
    """The finite values and their steps, averaged over at most `max_points` equal spans of steps.

    Up to `max_points` finite values are returned unchanged.
    """
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(steps) <= max_points:
        return steps, values
    width = max(steps[-1] - steps[0], 1) / max_points
    span = np.minimum((steps - steps[0]) // width, max_points - 1).astype(np.int64)
    counts = np.bincount(span, minlength=max_points)
    filled = counts > 0
    sums = [np.bincount(span, column, max_points)[filled] for column in (steps, values)]
    return sums[0] / counts[filled], sums[1] / counts[filled]


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value and `reach` neighbours on either side.

    Near the ends the window shrinks on both sides alike, so that a steep start is not shifted.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    positions = np.arange(len(values))
    near = np.minimum(np.minimum(positions, len(values) - 1 - positions), reach)
    return (sums[positions + near + 1] - sums[positions - near]) / (2 * near + 1)


def run_charts(run: RunRecord) -> list[Chart]:
    """The charts of a run, without empty curves; none if nothing has been logged."""
    training, validation = run.training, run.validation
    waits = {**training, "data_wait": 100 * training["data_wait"]}
    accuracy = [
        _curve(f"top-{k}", validation, f"top{k}", colour, "dots") for colour, k in enumerate((1, 5))
    ]
    charts = [
        _loss_chart(run),
        Chart("accuracy", "Validation accuracy (%)", accuracy, run.step, from_zero=True),
    ]
    for name, title, columns, metric in (
        ("learning-rate", "Learning rate", training, "lr"),
        ("throughput", "Throughput (images/s)", training, "images_per_second"),
        ("data-wait", "Time spent waiting for data (%)", waits, "data_wait"),
        ("loss-scale", "Loss scale", training, "loss_scale"),
    ):
        curve = _curve("last", columns, metric, 0)
        if metric != "loss_scale" or len(np.unique(curve.values)) > 1:
            charts.append(Chart(name, title, [curve], run.step, from_zero=True))
    filled = [replace(c, curves=[curve for curve in c.curves if len(curve.steps)]) for c in charts]
    return [chart for chart in filled if chart.curves]


def _curve(
    label: str, columns: dict[str, np.ndarray], metric: str, colour: int, kind: str = "line"
) -> Curve:
    steps, values = thin(columns["step"], columns[metric])
    return Curve(label, steps, values, colour, kind if len(steps) <= MAX_DOTS else "line")


def _loss_chart(run: RunRecord) -> Chart:
    raw = _curve("training", run.training, "loss", 0)
    curves, notes = [raw], []
    reach = len(raw.steps) // 40
    if reach:
        curves = [
            replace(raw, kind="faint"),
            Curve("training (smoothed)", raw.steps, smooth(raw.values, reach), 0),
        ]
        notes.append(f"Smoothed: moving average of {2 * reach + 1} points.")
    validation = _curve("validation", run.validation, "loss", 1, "dots")
    curves.append(validation)
    ceiling = math.inf
    if len(raw.steps) and len(validation.steps):
        limit = HEADROOM * float(raw.values.max())
        if validation.values.max() > limit:
            # EMA weights are far off in the first steps and would flatten all other curves.
            ceiling = limit
            largest = format_number(float(validation.values.max()))
            notes.append(f"Validation losses up to {largest} are drawn at the upper edge.")
    softened = [
        word
        for key, word in (("mix.probability", "mixed"), ("loss.label_smoothing", "smoothed"))
        if run.fields.get(key)
    ]
    if softened:
        notes.append(
            f"The training loss uses {' and '.join(softened)} labels: it cannot reach 0 and is "
            "not comparable with the validation loss."
        )
    non_finite = int(np.isnan(run.training["loss"]).sum())
    if non_finite:
        notes.append(f"{non_finite:,} log lines have no finite loss.")
    return Chart("loss", "Loss (nats)", curves, run.step, " ".join(notes), ceiling=ceiling)


def thinning_note(run: RunRecord) -> str:
    """A sentence on how the curves were shortened; empty if they show every line."""
    lines = max(len(columns["step"]) for columns in run.parts)
    if lines <= MAX_POINTS:
        return ""
    return (
        f"The log has {lines:,} lines; each point of a curve is the mean over one of {MAX_POINTS} "
        "equal spans of steps."
    )


def resume_steps(run: RunRecord) -> list[int]:
    """The steps from which the run was resumed; empty if there are too many to mark."""
    steps = sorted({event.step for event in run.events if event.kind == "resume"})
    return steps if len(steps) <= MAX_MARKS else []


def draw_chart(chart: Chart, marked_steps: list[int]) -> Drawing:
    """Draws a chart with a legend that gives the last values; `marked_steps` get dotted lines."""
    with new_figure(4.6, 2.6) as figure:
        axes = figure.subplots()
        figure.suptitle(chart.title, x=0.01, ha="left")
        axes.set_xlabel("optimizer step")
        axes.set_xlim(0, max(chart.last_step, 1))
        axes.margins(y=MARGIN)
        for step in marked_steps:
            axes.axvline(step, color=LIGHT["dim"], linestyle=":", linewidth=1)
        tooltips = {}
        for number, curve in enumerate(chart.curves):
            last = format_number(float(curve.values[-1]))
            (line,) = axes.plot(
                curve.steps,
                np.minimum(curve.values, chart.ceiling),
                color=LIGHT[SERIES[curve.colour]],
                marker="o" if curve.kind == "dots" else None,
                markersize=3.5,
                linewidth=0.8 if curve.kind == "faint" else 1.5,
                alpha=0.4 if curve.kind == "faint" else 1,
                clip_on=curve.kind != "dots",  # a dot on an axis is shown whole
                label=None if curve.kind == "faint" else f"{curve.label}: {last}",
            )
            if curve.kind == "dots":
                line.set_gid(f"curve-{number}")
                tooltips[f"curve-{number}"] = [
                    f"{curve.label} {format_number(float(value))} at step {int(step):,}"
                    for step, value in zip(curve.steps, curve.values, strict=True)
                ]
        if chart.from_zero:
            axes.update_datalim([(0, 0)])
            axes.set_ylim(bottom=0)
        if math.isfinite(chart.ceiling):
            axes.set_ylim(top=chart.ceiling)
        format_axes(axes)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=3,
            borderaxespad=0.6,
            borderpad=0,
            handlelength=1.4,
            columnspacing=1.4,
        )
    return Drawing(chart.name, figure, chart.title, describe(chart), chart.note, tooltips)


def describe(chart: Chart) -> str:
    """The chart in words: the range of its steps, and where each curve starts and ends."""
    curves = [
        f"{curve.label} from {format_number(float(curve.values[0]))} "
        f"to {format_number(float(curve.values[-1]))}"
        for curve in chart.curves
        if curve.kind != "faint"
    ]
    steps = np.concatenate([curve.steps for curve in chart.curves])
    return f"Steps {steps.min():,.0f} to {steps.max():,.0f}: {'; '.join(curves)}."


def format_axes(axes: "Axes") -> None:
    """Round ticks: whole steps such as 500 or 12k below, short numbers on the left."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=TICK_STEPS))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS))
    # Engineering notation would turn a learning rate of 0.05 into 50m.
    large = max(map(abs, axes.get_ylim())) >= LARGE
    axes.yaxis.set_major_formatter(
        EngFormatter(sep="") if large else StrMethodFormatter("{x:,.4g}")
    )


def format_number(value: float) -> str:
    """Four significant digits; 12.3k and 4.5M for large numbers."""
    from matplotlib.ticker import EngFormatter

    if abs(value) >= LARGE:
        text = f"{value:.4g}"
        return EngFormatter(sep="")(float(text))
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"
