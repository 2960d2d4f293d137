"""The report on a run as one HTML page that needs nothing beside it: no script, no network."""

import base64
import shlex
from datetime import datetime, timedelta
from itertools import pairwise

import numpy as np

from cspnet.inference.confusion import worst_pairs
from cspnet.recipe_comments import recipe_entries
from cspnet.report.classes import (
    DEEP,
    MATRIX,
    ClassScore,
    class_scores,
    more_alike,
    shares,
    worst,
)
from cspnet.report.curves import MARKED, Chart, shortened
from cspnet.report.evaluation import Evaluation, selection_note
from cspnet.report.figures import escape, figure, lasting, stamp, time_axis
from cspnet.report.mistakes import percent, to_jpeg
from cspnet.report.style import STYLE
from cspnet.run.reader import STOP_EVENTS, RunRecord, running_periods

ROWS = 2000  # of the table of classes, at most: the worst
# Whatever a name might smuggle in: nothing is fetched, nothing is run.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(
    run: RunRecord,
    drawn: list[Chart],
    verdict: Evaluation | None,
    remarks: list[str],
    made: datetime,
) -> str:
    """The page; `remarks` say what is missing and how to get it."""
    parts = [
        ("curves", "Curves", _curves(run, drawn)),
        ("time", "Time", _time(run)),
    ]
    if verdict:
        scores = class_scores(verdict.scores.confusion, verdict.names)
        if len(scores) <= MATRIX:
            parts.append(("confusion", "Confusion", _matrix(verdict)))
        else:
            parts.append(("worst", "Worst classes", _worst(verdict, scores)))
        parts.append(("mistakes", "Surest mistakes", _mistakes(verdict)))
        parts.append(("classes", "Classes", _classes(scores)))
    parts += [
        ("recipe", "Recipe", _recipe(run)),
        ("environment", "Environment", _environment(run)),
    ]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in parts)
    sections = "\n".join(
        f'<section id="{key}"><h2>{title}</h2>\n{content}</section>'
        for key, title, content in parts
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
<p>{escape(str(run.fields.get("model.name", "")))} · report of {stamp(made)} UTC</p></header>
<nav>{links}</nav>
<main>
{f'<aside id="missing">{missing}</aside>' if missing else ""}
<section id="summary"><h2>Summary</h2>
{_summary(run, verdict)}</section>
{sections}
</main>
</body>
</html>
"""


def table(head: list[str], rows: list[list[str]], numbers: tuple[int, ...] = ()) -> str:
    """Cells are HTML; the columns of `numbers` are set right."""
    kinds = ["<td class=n>" if column in numbers else "<td>" for column in range(len(head))]
    body = "\n".join(
        "<tr>" + "".join(kind + cell for kind, cell in zip(kinds, row, strict=True)) for row in rows
    )
    heads = "".join(
        f"<th{' class=n' if column in numbers else ''}>{escape(title)}"
        for column, title in enumerate(head)
    )
    return f'<div class="scroll"><table><thead><tr>{heads}<tbody>\n{body}</table></div>'


def _summary(run: RunRecord, verdict: Evaluation | None) -> str:
    training, validation = run.training, run.validation
    cards = [("state", state(run)), ("steps done", f"{run.step:,} of {run.steps:,}")]
    if run.best is not None:
        last = int(validation["step"][-1])
        cards.append(("last top-1", f"{validation['top1'][-1]:.2f} % at step {last:,}"))
        step = int(validation["step"][run.best])
        best = f"{validation['top1'][run.best]:.2f} % at step {step:,}"
        cards.append(("best top-1", best + ", selected on the same images" * run.selected))
    for title, name, form in (
        ("last training loss", "loss", "{:.4f}"),
        ("median speed", "images_per_second", "{:,.0f} images/s"),
    ):
        values = training[name][np.isfinite(training[name])]
        if len(values):
            value = values[-1] if name == "loss" else np.median(values)
            cards.append((title, form.format(value)))
    cards.append(("device", run.device))
    if found := running_periods(run):
        spent = sum((period.until - period.begin.time for period in found), timedelta())
        killed = any(period.end is None and not period.last for period in found)
        cards.append(("running for", "at most " * killed + lasting(spent)))
    text = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in cards)
    text = f"<dl>{text}</dl>"
    if verdict:
        scores = verdict.scores
        text += (
            f"<p>Evaluated for this report: {escape(verdict.checkpoint)}, step {verdict.step:,}, "
            f"{'averaged' if verdict.averaged else 'raw'} weights, on {escape(verdict.data)}: "
            f"<b>top-1 {scores.top1:.2f} %</b>, top-5 {scores.top5:.2f} %, loss "
            f"{scores.loss:.4f}, {scores.images:,} images. {escape(selection_note(run, verdict))}</p>"
        )
    return text


def state(run: RunRecord) -> str:
    """How the run stands, in a few words."""
    last = run.events[-1].kind if run.events else ""
    if last == "done":
        return "done"
    if last in STOP_EVENTS:
        what = {"stop": "stopped", "fail": "failed", "crash": "crashed"}[last]
        return f"{what} at step {run.events[-1].step:,}"
    return "running, or killed: no stop is noted" if last else "unknown: there is no history.jsonl"


def stops(run: RunRecord) -> list[int]:
    """The steps at which the run went on after a stop or a kill; none where they are too many."""
    steps = sorted({event.step for event in run.events if event.kind == "resume"})
    return steps if len(steps) <= MARKED else []


def _curves(run: RunRecord, drawn: list[Chart]) -> str:
    if not drawn:
        return (
            "<p>No step is on record yet: metrics.jsonl gets a line every "
            f"log_every={escape(str(run.fields.get('log_every', '?')))} steps.</p>"
        )
    notes_ = [shortened(run)]
    if marks := stops(run):
        notes_.append("Dotted: where the run went on after a stop.")
    if run.unread:
        notes_.append(f"{run.unread:,} lines could not be read and are left out.")
    text = escape(" ".join(filter(None, notes_)))
    figures = "\n".join(figure(chart, marks) for chart in drawn)
    return f'<p>{text}</p><div class="charts">{figures}</div>'


def _time(run: RunRecord) -> str:
    if not run.events:
        return "<p>There is no history.jsonl: nobody noted when the run started and stopped.</p>"
    rows = []
    for number, (before, event) in enumerate(pairwise([None, *run.events]), 1):
        since = lasting(event.time - before.time) if before else ""
        device = event.device + (f" × {event.processes}" if event.processes > 1 else "")
        remarks = " ".join(event.remarks)
        if before and before.kind in ("start", "resume") and event.kind in ("start", "resume"):
            remarks = f"No stop was noted before: the run was killed. {remarks}"
        cells = (stamp(event.time), event.kind, f"{event.step:,}", since, device, remarks)
        rows.append([str(number), *map(escape, cells)])
    head = ["", "UTC", "event", "step", "after", "device", "remarks"]
    told = table(head, rows, numbers=(0, 3, 4))
    if len(rows) > 50:
        told = f"<details><summary>{len(rows):,} starts and stops</summary>{told}</details>"
    return time_axis(run) + told


def _matrix(verdict: Evaluation) -> str:
    confusion, names = verdict.scores.confusion, verdict.names
    parts, most = shares(confusion)
    rows = []
    for row, name in enumerate(names):
        cells = []
        for column, count in enumerate(confusion[row].tolist()):
            part = parts[row, column] if row == column else parts[row, column] / (most or 1)
            kind = ("right" if row == column else "wrong") + (" deep" if part > DEEP else "")
            told = escape(f"{name} taken for {names[column]}: {count:,} images")
            cells.append(
                f'<td class="{kind}" style="--p:{part:.2f}" title="{told}">{count:,}'
                if count
                else "<td>"
            )
        rows.append(f'<tr><th title="{escape(name)}">{escape(name)}{"".join(cells)}')
    head = "".join(f'<th title="{escape(name)}"><span>{escape(name)}</span>' for name in names)
    return (
        "<p>Images of a class (row) by the class that they were taken for (column). Blue: right, "
        "by the share of the class; orange: mistaken, the deepest the largest such share"
        f' ({100 * most:.3g} %).</p><div class="pair">'
        f'<div class="scroll"><table class="matrix"><thead><tr><td>{head}<tbody>\n'
        + "\n".join(rows)
        + f"</table></div><div>{_pairs(verdict)}</div></div>"
    )


def _pairs(verdict: Evaluation) -> str:
    rows = [
        [escape(pair.true), escape(pair.taken_for), f"{pair.images:,} of {pair.of:,}"]
        for pair in worst_pairs(verdict.scores.confusion, verdict.names)
    ]
    if not rows:
        return "<p>No image was mistaken.</p>"
    return "<h3>Confused most</h3>" + table(["class", "taken for", "images"], rows, (2,))


def _worst(verdict: Evaluation, scores: list[ClassScore]) -> str:
    low = worst(scores)
    rows = [
        [
            escape(score.name),
            f'<meter min="0" max="100" value="{score.top1:.1f}"></meter> {score.top1:.1f} %',
            f"{score.images:,}",
            _taken(score),
        ]
        for score in low
    ]
    head = ["class", "top-1", "images", "most often taken for"]
    return (
        f"<p>Of {len(scores):,} classes, those with the lowest top-1{_alike(scores, low)}.</p>"
        f'<div class="pair"><div>{table(head, rows, (1, 2))}</div>'
        f"<div>{_pairs(verdict)}</div></div>"
    )


def _alike(scores: list[ClassScore], low: list[ClassScore]) -> str:
    """That the list of the worst classes is cut within classes of equal top-1; else nothing."""
    more = more_alike(scores, low)
    return f", and {more:,} more with the same top-1 ({low[-1].top1:.4g} %)" if more else ""


def _taken(score: ClassScore) -> str:
    return f"{escape(score.taken_for)} <small>{score.taken:,}</small>" if score.taken else ""


def _mistakes(verdict: Evaluation) -> str:
    if not verdict.mistakes:
        return "<p>No image was mistaken.</p>"
    tiles = []
    for mistake, picture in zip(verdict.mistakes, verdict.pictures, strict=True):
        true, taken = escape(verdict.names[mistake.true]), escape(verdict.names[mistake.taken_for])
        data = base64.b64encode(to_jpeg(picture)).decode()
        coarse = ' class="coarse"' if len(picture) < 128 else ""
        tiles.append(
            f'<figure><img{coarse} alt="{true}" src="data:image/jpeg;base64,{data}">'
            f"<figcaption><b>{true}</b><br>taken for <b>{taken}</b>, "
            f"{percent(mistake.probability)}</figcaption></figure>"
        )
    return (
        "<p>The images, as the net sees them, that got the highest probability for a wrong class: "
        "its blind spots, and the labels that are wrong themselves.</p>"
        f'<div class="tiles">{"".join(tiles)}</div>'
    )


def _classes(scores: list[ClassScore]) -> str:
    shown, note = scores, ""
    if len(scores) > ROWS:
        shown = worst(scores, ROWS)
        note = f"The worst {ROWS:,} of {len(scores):,} classes{_alike(scores, shown)}."
    rows = [
        [escape(score.name), f"{score.images:,}", f"{score.top1:.1f}", _taken(score)]
        for score in shown
    ]
    told = table(["class", "images", "top-1, %", "most often taken for"], rows, (1, 2))
    opened = " open" if len(scores) <= MATRIX else ""
    return (
        f"<details{opened}><summary>{len(shown):,} classes</summary><p>{note}</p>{told}</details>"
    )


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
    return "<p>At its last start.</p>" + table(["", ""], rows)
