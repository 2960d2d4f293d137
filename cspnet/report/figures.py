"""Charts and the time axis as HTML: lines in SVG, which stretches; text beside it, which does not.

So a page needs no script, no picture, and is as readable on a telephone as on a wide screen.
"""

import html
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from cspnet.report.curves import MARKED, Chart, Curve, extent, number, plain, save, ticks
from cspnet.run.reader import STOP_EVENTS, Period, RunRecord, running_periods
from cspnet.text import printable

SPANS = [
    *(timedelta(seconds=n) for n in (1, 2, 5, 10, 15, 30)),
    *(timedelta(minutes=n) for n in (1, 2, 5, 10, 15, 30)),
    *(timedelta(hours=n) for n in (1, 2, 3, 6, 12)),
    *(timedelta(days=n) for n in (1, 2, 3, 5, 7, 14, 28, 91, 364, 3640)),
]


def escape(text: str) -> str:
    """A text as HTML, in which other characters than printable ones are escaped too."""
    return html.escape(printable(text, keep="\n\t"))


def figure(chart: Chart, marks: list[int]) -> str:
    """A chart; dotted lines at the steps of `marks`."""
    left, right, low, high = extent(chart)

    def place(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """In thousandths of the plot, from its upper left corner."""
        top = np.maximum(high - values, 0)
        return 1000 * (steps - left) / (right - left), 1000 * top / (high - low)

    lines = [_path(curve, *place(curve.steps, curve.values)) for curve in chart.curves]
    rows = [(value, 100 * (value - low) / (high - low)) for value in ticks(low, high)]
    columns = [
        (step, 100 * (step - left) / (right - left))
        for step in ticks(left, right, 4)
        if step == int(step)
    ]
    grid = "".join(f"M0 {1000 - 10 * at:.1f}H1000" for _, at in rows)
    stops = "".join(
        f"M{place(np.array(step), np.array(low))[0]:.1f} 0V1000"
        for step in marks
        if left <= step <= right
    )
    keys = "".join(
        f'<span class="key {curve.kind} c{curve.colour}">{escape(curve.label)}'
        f" <b>{number(float(curve.values[-1]))}</b></span>"
        for curve in chart.curves
        if curve.kind != "faint"
    )
    note = f"<small>{escape(chart.note)}</small>" if chart.note else ""
    return (
        f"<figure><figcaption><h3>{escape(chart.title)}</h3>{keys}</figcaption>"
        f'<div class="plot" role="img" aria-label="{escape(_spoken(chart))}">'
        f'<div class="rows">{_labels(rows, "bottom")}</div>'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="grid" d="{grid}"/><path class="stop" d="{stops}"/>{"".join(lines)}</svg>'
        f'<div class="columns">{_labels(columns, "left")}</div></div>{note}</figure>'
    )


def _path(curve: Curve, x: np.ndarray, y: np.ndarray) -> str:
    points = " ".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))
    line = f'<path class="{curve.kind} c{curve.colour}" d="M{points}"/>'
    if curve.kind != "dots":
        return line
    # A line of no length with round ends is a dot that no stretching makes an egg.
    return line + "".join(
        f'<path class="dot c{curve.colour}" d="M{a:.1f} {b:.1f}h0"><title>{escape(curve.label)} '
        f"{number(float(value))} at step {int(step):,}</title></path>"
        for a, b, step, value in zip(x, y, curve.steps, curve.values, strict=True)
    )


def _labels(ticks: list[tuple[float, float]], side: str) -> str:
    return "".join(f'<span style="{side}:{at:.2f}%">{number(tick)}</span>' for tick, at in ticks)


def _spoken(chart: Chart) -> str:
    told = [
        f"{curve.label} from {number(float(curve.values[0]))} to {number(float(curve.values[-1]))}"
        for curve in chart.curves
    ]
    steps = np.concatenate([curve.steps for curve in chart.curves])
    return f"{chart.title}, steps {steps.min():,.0f} to {steps.max():,.0f}: {'; '.join(told)}"


def time_axis(run: RunRecord) -> str:
    """When the run was running, with a mark at each of its stops; empty without a history."""
    found = running_periods(run)
    if not found:
        return ""
    begin, end = _bounds(found)

    def at(time: datetime) -> float:
        return 100 * (time - begin) / (end - begin)

    bars, flags = [], []
    for period in found:
        left, right = at(period.begin.time), at(period.until)
        told = f"{stamp(period.begin.time)} to {stamp(period.until)}, from step "
        told += f"{period.begin.step:,}" + (f" to {period.end.step:,}" if period.end else "")
        style = f"left:{left:.3f}%;width:{max(0.0, right - left):.3f}%"
        bars.append(f'<i class="{_kind(period)}" style="{style}" title="{escape(told)}"></i>')
    for place, event in enumerate(run.events, 1):
        if event.kind in STOP_EVENTS:
            text = str(place) if len(run.events) <= MARKED else ""
            told = escape(f"{stamp(event.time)}: {' '.join(event.remarks)}")
            flags.append(f'<b style="left:{at(event.time):.3f}%" title="{told}">{text}</b>')
    marks = "".join(
        f'<span style="left:{at(time):.3f}%">{escape(text)}</span>'
        for time, text in _time_ticks(begin, end)
    )
    return (
        f'<div class="time" role="img" aria-label="{len(found)} periods of running between '
        f'{stamp(begin)} and {stamp(end)}"><div class="flags">{"".join(flags)}</div>'
        f'<div class="lane">{"".join(bars)}</div><div class="columns">{marks}</div></div>'
        f'<p class="legend">{_legend(found)}</p>'
    )


LEGEND = {
    "run": "running",
    "open": "no end noted: until the last line of the record",
    "lost": "killed some time before the next start",
    "flag": "a stop, by its number below",
}


def _legend(found: list[Period]) -> str:
    kinds = {_kind(period) for period in found}
    kinds |= {"flag" for period in found if period.end and period.end.kind in STOP_EVENTS}
    return "".join(
        f'<span class="key {kind}">{text}</span>' for kind, text in LEGEND.items() if kind in kinds
    )


def _kind(period: Period) -> str:
    return "run" if period.end else "open" if period.last else "lost"


def _bounds(found: list[Period]) -> tuple[datetime, datetime]:
    begin = min(period.begin.time for period in found)
    return begin, max(max(period.until for period in found), begin + timedelta(seconds=1))


def _time_ticks(begin: datetime, end: datetime, most: int = 4) -> list[tuple[datetime, str]]:
    """Round times from begin to end, at most `most`, and how to write them."""
    zero = datetime(2000, 1, 3, tzinfo=UTC)  # a Monday
    for span in SPANS:
        first, last = -(-(begin - zero) // span), (end - zero) // span
        if last - first < most:
            break
    day = timedelta(days=1)
    pattern = "%d %b" if span >= day else "%H:%M" if span >= timedelta(minutes=1) else "%H:%M:%S"
    if pattern != "%d %b" and begin.date() != end.date():
        pattern = f"%d %b {pattern}"
    times = [zero + span * place for place in range(first, last + 1)]
    return [(time, time.astimezone(UTC).strftime(pattern)) for time in times]


def stamp(time: datetime) -> str:
    """A time for people, UTC."""
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def lasting(span: timedelta) -> str:
    """How long: days and hours, or hours, minutes and seconds."""
    seconds = max(0, int(span.total_seconds()))
    days, hours = divmod(seconds // 3600, 24)
    return f"{days} d {hours} h" if days else f"{hours}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def draw_time(run: RunRecord, path: Path) -> None:
    """The time axis as PNG."""
    from matplotlib.dates import date2num
    from matplotlib.figure import Figure

    found = running_periods(run)
    picture = Figure(figsize=(10, 1.8), layout="constrained")
    place = picture.subplots()
    colours = {"run": "C0", "open": "C2", "lost": "0.7"}
    for period in found:
        left, right = date2num(period.begin.time), date2num(period.until)
        place.broken_barh([(left, right - left)], (0, 1), color=colours[_kind(period)])
    for row, event in enumerate(run.events, 1):
        if event.kind in STOP_EVENTS:
            place.axvline(date2num(event.time), color="C3")
            if len(run.events) <= MARKED:
                place.annotate(f" {row}", (date2num(event.time), 1.06), color="C3", fontsize=8)
    place.xaxis_date()
    place.set_yticks([])
    place.set_ylim(0, 1.25)
    place.set_title(plain(f"{run.name}: when it was running, UTC; red: a stop"), fontsize=10)
    save(picture, path)
