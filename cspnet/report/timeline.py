"""The timeline of a run: when it was running, and where it stopped."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cspnet.report.charts import MAX_MARKS
from cspnet.report.drawing import Drawing, new_figure
from cspnet.report.style import LIGHT
from cspnet.run.reader import STOP_EVENTS, Period, RunRecord, running_periods
from cspnet.text import printable

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

NAME = "timeline"
TITLE = "When the run was running (UTC)"
LABEL_GAP = 0.015  # least distance of two numbers of stops, as a fraction of the time axis
# Of ticks, if they are years, months, days, hours, minutes, seconds.
TICK_FORMATS = ["%Y", "%b", "%d %b", "%H:%M", "%H:%M", "%H:%M:%S"]
# Kind of a period: colour, height of its bar, label in the legend, note below the figure.
KINDS = {
    "running": ("c0", 1.0, "running", ""),
    "open": ("c2", 1.0, "no end recorded", "Without a recorded end, up to the last log line."),
    "killed": ("dim", 0.35, "killed", "Killed: at an unknown time before the next start."),
}
STOP_LABEL = "stop, numbered as in the table"


def draw_timeline(run: RunRecord) -> Drawing | None:
    """Draws the periods in which the run was running, and its stops; None without a history."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
    from matplotlib.lines import Line2D

    running = running_periods(run)
    if not running:
        return None
    begin = min(period.begin.time for period in running)
    end = max(*(period.until for period in running), begin + timedelta(seconds=1))
    tooltips = {}
    with new_figure(8.5, 1.7) as figure:
        axes = figure.subplots()
        figure.suptitle(TITLE, x=0.01, ha="left")
        shown: dict[str, Artist] = {}  # artists in the legend by label
        notes: dict[str, None] = {}  # an ordered set
        for number, period in enumerate(running):
            colour, height, label, note = KINDS[_kind(period)]
            left, right = date2num(period.begin.time), date2num(period.until)
            (bar,) = axes.barh(0, right - left, height, left, color=LIGHT[colour])
            bar.set_gid(f"period-{number}")
            tooltips[f"period-{number}"] = [_period_text(period)]
            shown[label] = bar
            notes[note] = None
        margin = (end - begin) / 100
        for gid, text in _draw_stops(axes, run, (end - begin) * LABEL_GAP).items():
            tooltips[gid] = [text]
            shown[STOP_LABEL] = Line2D([], [], color=LIGHT["flag"], marker="v", markersize=4)
        locator = AutoDateLocator(minticks=3, maxticks=7, tz=UTC)
        axes.set_xlim(date2num(begin - margin), date2num(end + margin))
        axes.set_ylim(-0.5, 1.25)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, UTC, TICK_FORMATS))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        figure.legend(shown.values(), shown, loc="outside lower left", ncols=4, columnspacing=1.4)
    description = (
        f"{len(running)} periods of running between {format_time(begin)} and "
        f"{format_time(end)} UTC."
    )
    note = " ".join(filter(None, notes))
    return Drawing(NAME, figure, TITLE, description, note, tooltips)


def _draw_stops(axes: "Axes", run: RunRecord, gap: timedelta) -> dict[str, str]:
    """Marks the stops; returns their hover texts by gid."""
    from matplotlib.dates import date2num

    texts = {}
    labelled: datetime | None = None
    for number, event in enumerate(run.events, 1):
        if event.kind not in STOP_EVENTS:
            continue
        time = date2num(event.time)
        (line,) = axes.plot(
            [time, time], [-0.5, 0.75], color=LIGHT["flag"], marker="v", markevery=[1], markersize=5
        )
        line.set_gid(f"stop-{number}")
        texts[f"stop-{number}"] = f"{format_time(event.time)}: {' '.join(event.remarks)}"
        crowded = labelled is not None and event.time - labelled < gap
        if len(run.events) <= MAX_MARKS and not crowded:
            axes.text(time, 0.9, str(number), color=LIGHT["flag"], ha="center", va="bottom")
            labelled = event.time
    return texts


def _kind(period: Period) -> str:
    if period.end:
        return "running"
    return "open" if period.last else "killed"


def _period_text(period: Period) -> str:
    text = f"{format_time(period.begin.time)} to {format_time(period.until)}, "
    text += f"from step {period.begin.step:,}"
    return printable(text + (f" to {period.end.step:,}" if period.end else ""))


def format_time(time: datetime) -> str:
    """A time in UTC, to the second."""
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
