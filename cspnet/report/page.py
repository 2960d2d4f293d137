"""The report on a run as one self-contained HTML page: no scripts, no external resources."""

import shlex
from datetime import datetime, timedelta
from itertools import pairwise

import numpy as np

from cspnet.recipe.eta import format_duration
from cspnet.recipe.value_sources import recipe_entries
from cspnet.report.charts import resume_steps, thinning_note
from cspnet.report.drawing import Drawing
from cspnet.report.evaluation import Evaluation, selection_note
from cspnet.report.evaluation_sections import evaluation_sections
from cspnet.report.markup import escape, figure, table
from cspnet.report.style import STYLE
from cspnet.report.timeline import format_time
from cspnet.run.reader import START_EVENTS, STOP_EVENTS, RunRecord, running_periods

MAX_OPEN_EVENTS = 50  # a longer history is collapsed
# A class name can never make the browser load or run anything.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(
    run: RunRecord,
    charts: list[Drawing],
    timeline: Drawing | None,
    evaluation: Evaluation | None,
    remarks: list[str],
    created: datetime,
) -> str:
    """The page. `remarks` say what is missing and how to get it."""
    sections = [
        ("curves", "Curves", _curves(run, charts)),
        ("history", "History", _history(run, timeline)),
    ]
    if evaluation:
        sections += evaluation_sections(evaluation)
    sections += [
        ("recipe", "Recipe", _recipe(run)),
        ("environment", "Environment", _environment(run)),
    ]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    content = "\n".join(
        f'<section id="{key}"><h2>{title}</h2>\n{text}</section>' for key, title, text in sections
    )
    missing = "".join(f"<p>{escape(remark)}</p>" for remark in remarks)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>{escape(run.name)}: report</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(run.name)}</h1>
<p>{escape(str(run.fields.get("model.name", "")))} · created {format_time(created)} UTC</p></header>
<nav>{links}</nav>
<main>
{f'<aside id="missing">{missing}</aside>' if missing else ""}
<section id="summary"><h2>Summary</h2>
{_summary(run)}{_evaluation_summary(run, evaluation) if evaluation else ""}</section>
{content}
</main>
</body>
</html>
"""


def _summary(run: RunRecord) -> str:
    training, validation = run.training, run.validation
    cards = [("state", describe_state(run)), ("steps done", f"{run.step:,} of {run.steps:,}")]
    if run.best is not None:
        last = int(validation["step"][-1])
        cards.append(("last top-1", f"{validation['top1'][-1]:.2f} % at step {last:,}"))
        step = int(validation["step"][run.best])
        best = f"{validation['top1'][run.best]:.2f} % at step {step:,}"
        cards.append(("best top-1", best + ", selected on the same images" * run.selected))
    losses = training["loss"][np.isfinite(training["loss"])]
    if len(losses):
        cards.append(("last training loss", f"{losses[-1]:.4f}"))
    speeds = training["images_per_second"][np.isfinite(training["images_per_second"])]
    if len(speeds):
        cards.append(("median throughput", f"{np.median(speeds):,.0f} images/s"))
    cards.append(("device", run.device))
    if running := running_periods(run):
        total = sum((period.until - period.begin.time for period in running), timedelta())
        # The time of a kill is unknown: it lies between the last start and the next one.
        killed = any(period.end is None and not period.last for period in running)
        cards.append(("running time", "at most " * killed + format_duration(total.total_seconds())))
    entries = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in cards)
    return f"<dl>{entries}</dl>"


def _evaluation_summary(run: RunRecord, evaluation: Evaluation) -> str:
    scores = evaluation.scores
    return (
        f"<p>Evaluated for this report: {escape(evaluation.checkpoint)}, step "
        f"{evaluation.step:,}, {'EMA' if evaluation.averaged else 'raw'} weights, on "
        f"{escape(evaluation.data)}: <b>top-1 {scores.top1:.2f} %</b>, top-5 {scores.top5:.2f} %, "
        f"loss {scores.loss:.4f}, {scores.images:,} images. "
        f"{escape(selection_note(run, evaluation))}</p>"
    )


def describe_state(run: RunRecord) -> str:
    """The state of the run in a few words, from its history."""
    if not run.events:
        return "unknown: there is no history.jsonl"
    last = run.events[-1]
    if last.kind == "done":
        return "done"
    if last.kind in STOP_EVENTS:
        verb = {"stop": "stopped", "fail": "failed", "crash": "crashed"}[last.kind]
        return f"{verb} at step {last.step:,}"
    return "running, or killed: no end is recorded"


def _curves(run: RunRecord, charts: list[Drawing]) -> str:
    if not charts:
        interval = escape(str(run.fields.get("log_every", "?")))
        return f"<p>No step logged yet: metrics.jsonl gets a line every {interval} steps.</p>"
    remarks = [thinning_note(run)]
    if resume_steps(run):
        remarks.append("Dotted lines: the run was resumed from these steps.")
    if run.unread:
        remarks.append(f"{run.unread:,} malformed lines of the logs are left out.")
    figures = "\n".join(figure(chart) for chart in charts)
    return f'<p>{escape(" ".join(filter(None, remarks)))}</p><div class="charts">{figures}</div>'


def _history(run: RunRecord, timeline: Drawing | None) -> str:
    if not run.events:
        return "<p>There is no history.jsonl: starts and stops were not recorded.</p>"
    rows = []
    for number, (previous, event) in enumerate(pairwise([None, *run.events]), 1):
        assert event is not None  # only the first item is None
        elapsed = format_duration((event.time - previous.time).total_seconds()) if previous else ""
        device = event.device + (f" × {event.processes}" if event.processes > 1 else "")
        remarks = " ".join(event.remarks)
        if previous and previous.kind in START_EVENTS and event.kind in START_EVENTS:
            remarks = f"The previous start has no recorded end: the run was killed. {remarks}"
        cells = (format_time(event.time), event.kind, f"{event.step:,}", elapsed, device, remarks)
        rows.append([str(number), *map(escape, cells)])
    header = ["", "UTC", "event", "step", "after", "device", "remarks"]
    events = table(header, rows, numeric=(0, 3, 4))
    if len(rows) > MAX_OPEN_EVENTS:
        summary = f"{len(rows):,} starts and stops"
        events = f"<details><summary>{summary}</summary>{events}</details>"
    return (figure(timeline, "timeline scroll") if timeline else "") + events


def _recipe(run: RunRecord) -> str:
    if not run.recipe_sources:
        return (
            "<p>The resolved recipe. The run folder does not record where its values come from.</p>"
            f'<pre class="recipe"><code>{escape(run.recipe)}</code></pre>'
        )
    keys = {entry.line: key for key, entry in recipe_entries(run.recipe).items()}
    rows = [
        [f"<code>{escape(line)}</code>", escape(run.recipe_sources.get(keys.get(number, ""), ""))]
        for number, line in enumerate(run.recipe.splitlines())
    ]
    return (
        "<p>The resolved recipe, and the source of each value: the comment in "
        f"{escape(run.recipe_file)}, the command line, or the default.</p>"
        f'<div class="recipe">{table(["recipe.yaml", "source"], rows)}</div>'
    )


def _environment(run: RunRecord) -> str:
    if not run.environment:
        return "<p>There is no env.json.</p>"
    rows = []
    for key, value in run.environment.items():
        if isinstance(value, list):
            value = shlex.join(map(str, value))
        rows.append([escape(str(key)), f"<code>{escape(str(value))}</code>"])
    return "<p>Recorded at the last start.</p>" + table(["", ""], rows)
