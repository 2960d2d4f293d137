"""Writes the report on a run: the page, and its figures as PNG beside it."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cspnet.errors import RecipeError
from cspnet.files import replace_bytes
from cspnet.report import charts, timeline
from cspnet.report.classes import MAX_MATRIX, class_scores, plot_confusion, plot_worst_classes
from cspnet.report.drawing import save_png
from cspnet.report.evaluation import Evaluation
from cspnet.report.mistakes import plot_mistakes
from cspnet.report.page import render
from cspnet.run.reader import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = (*charts.NAMES, timeline.NAME, "confusion", "worst-classes", "mistakes")


def require_output_folder(folder: Path) -> None:
    """Raises RecipeError unless the report can be written to the folder, which may be missing."""
    parent = folder.absolute().parent
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"--output {folder}: is a file; give a folder")
    if not parent.is_dir():
        raise RecipeError(f"--output {folder}: the folder {parent} does not exist")
    if not os.access(folder if folder.is_dir() else parent, os.W_OK | os.X_OK):
        raise RecipeError(f"--output {folder}: no write permission; give another folder")


def publish(
    run: RunRecord, evaluation: Evaluation | None, remarks: list[str], folder: Path
) -> Path:
    """Writes report.html and its PNG files, each atomically; returns the path of the page.

    Deletes PNG files of an earlier report that this report does not have. Raises RecipeError.
    """
    marks = charts.resume_steps(run)
    chart_drawings = [charts.draw_chart(chart, marks) for chart in charts.run_charts(run)]
    timeline_drawing = timeline.draw_timeline(run)
    figures = {drawing.name: drawing.figure for drawing in chart_drawings}
    if timeline_drawing:
        figures[timeline_drawing.name] = timeline_drawing.figure
    if evaluation:
        figures |= _plot_evaluation(evaluation)
    page = render(
        run, chart_drawings, timeline_drawing, evaluation, remarks, datetime.now(UTC)
    ).encode("utf-8", "replace")  # file names may hold bytes that are not UTF-8
    try:
        folder.mkdir(exist_ok=True)
        for name in PICTURES:
            path = folder / f"{name}.png"
            if name in figures:
                save_png(figures[name], path)
            else:
                path.unlink(missing_ok=True)
        replace_bytes(folder / "report.html", page)
    except OSError as error:
        raise RecipeError(f"cannot write the report to {folder}: {error.strerror}") from None
    return folder / "report.html"


def _plot_evaluation(evaluation: Evaluation) -> "dict[str, Figure]":
    confusion, names = evaluation.confusion, evaluation.names
    figures = {}
    if len(names) <= MAX_MATRIX:
        figures["confusion"] = plot_confusion(confusion, names)
    else:
        scores = class_scores(confusion, names)
        figures["worst-classes"] = plot_worst_classes(scores, confusion)
    if evaluation.mistakes:
        figures["mistakes"] = plot_mistakes(evaluation.mistakes, evaluation.pictures, names)
    return figures
