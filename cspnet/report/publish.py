"""Writes the report on a run: the page, and the pictures beside it."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from cspnet.errors import RecipeError
from cspnet.files import replace_file
from cspnet.report import classes, curves, figures, mistakes
from cspnet.report.evaluation import Evaluation
from cspnet.report.page import render, stops
from cspnet.run.reader import RunRecord


def require_place(folder: Path) -> None:
    """Raises RecipeError unless a report can be written to the folder, which is made if need be."""
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"--out {folder} is a file: name a folder")
    if not folder.absolute().parent.is_dir():
        raise RecipeError(f"--out {folder}: the folder {folder.parent} does not exist")
    near = folder if folder.is_dir() else folder.absolute().parent
    if not os.access(near, os.W_OK | os.X_OK):
        raise RecipeError(f"{near} cannot be written to: name another folder with --out")


def publish(run: RunRecord, verdict: Evaluation | None, remarks: list[str], folder: Path) -> Path:
    """Writes report.html and its PNGs, each whole or as it was before; the page's path.

    Pictures of an earlier report that this one has not are deleted. RecipeError.
    """
    drawn = curves.charts(run)
    pictures: dict[str, Callable[[Path], None] | None] = dict.fromkeys(
        ("curves.png", "time.png", "confusion.png", "worst-classes.png", "mistakes.png")
    )
    if drawn:
        pictures["curves.png"] = lambda path: curves.draw(run, drawn, stops(run), path)
    if run.events:
        pictures["time.png"] = lambda path: figures.draw_time(run, path)
    if verdict:
        confusion, names = verdict.scores.confusion, verdict.names
        if len(names) <= classes.MATRIX:
            pictures["confusion.png"] = lambda path: classes.draw_matrix(confusion, names, path)
        else:
            scores = classes.class_scores(confusion, names)
            pictures["worst-classes.png"] = lambda path: classes.draw_worst(scores, confusion, path)
        if verdict.mistakes:
            pictures["mistakes.png"] = lambda path: mistakes.draw(
                verdict.mistakes, verdict.pictures, names, path
            )
    # A name of a file may be any bytes, which UTF-8 has no place for.
    page = render(run, drawn, verdict, remarks, datetime.now(UTC)).encode("utf-8", "replace")
    try:
        folder.mkdir(exist_ok=True)
        for name, draw in pictures.items():
            if draw:
                replace_file(folder / name, draw)
            else:
                (folder / name).unlink(missing_ok=True)
        replace_file(folder / "report.html", lambda path: path.write_bytes(page))
    except OSError as error:
        raise RecipeError(f"the report cannot be written to {folder}: {error.strerror}") from None
    return folder / "report.html"
