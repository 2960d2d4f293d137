"""Comparison of runs: progress and scores, the differences of their recipes, and their curves."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from cspnet.errors import RecipeError
from cspnet.report.charts import HEADROOM, format_axes, smooth, thin
from cspnet.report.drawing import new_figure, save_png
from cspnet.run.reader import RunRecord, read_run
from cspnet.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABSENT = "–"  # a field that has no effect in a run and is left out of its recipe.yaml
HEADER = ("run", "steps", "best top-1", "last top-1", "last loss", "images/s", "device")
COLOURS = 10  # of matplotlib's default cycle; further runs differ by line style


def read_runs(folders: list[Path]) -> list[RunRecord]:
    """The runs in the folders. Raises RecipeError for fewer than two, a duplicate or no run."""
    if len(folders) < 2:
        raise RecipeError("compare needs at least two run folders")
    seen: dict[Path, Path] = {}
    for folder in folders:
        first = seen.setdefault(folder.resolve(), folder)
        if first is not folder:
            alias = f", also as {first}" * (first != folder)
            raise RecipeError(f"{folder} is given twice{alias}")
    return [read_run(folder) for folder in folders]


def run_names(runs: list[RunRecord]) -> list[str]:
    """The shortest unique ends of the folders' paths."""
    parts = [run.folder.path.resolve().parts for run in runs]
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return [os.sep.join(part[-length:]) for part in parts]


def overview_table(runs: list[RunRecord]) -> Table:
    """Progress and scores, one row per run."""
    rows = [_overview_row(name, run) for name, run in zip(run_names(runs), runs, strict=True)]
    return _table(HEADER, rows, right=range(1, 6))


def _overview_row(name: str, run: RunRecord) -> list[str]:
    training, validation, best = run.training, run.validation, run.best
    top1 = validation["top1"][np.isfinite(validation["top1"])]
    loss = training["loss"][np.isfinite(training["loss"])]
    speed = training["images_per_second"]
    speed = speed[np.isfinite(speed)]
    step = int(validation["step"][best]) if best is not None else 0
    return [
        name,
        f"{run.step:,} of {run.steps:,}",
        f"{validation['top1'][best]:.2f} % ({step:,})" if best is not None else ABSENT,
        f"{top1[-1]:.2f} %" if len(top1) else ABSENT,
        f"{loss[-1]:.4f}" if len(loss) else ABSENT,
        f"{np.median(speed):,.0f}" if len(speed) else ABSENT,
        run.device,
    ]


def recipe_differences(runs: list[RunRecord]) -> dict[str, list[Any]]:
    """The fields in which the recipes differ, by dotted key: one value per run, or ABSENT."""
    keys = dict.fromkeys(key for run in runs for key in run.fields)
    values = {key: [run.fields.get(key, ABSENT) for run in runs] for key in keys}
    return {key: each for key, each in values.items() if any(v != each[0] for v in each)}


def differences_table(runs: list[RunRecord]) -> Table | None:
    """A table of `recipe_differences`; None if the recipes are equal."""
    differences = recipe_differences(runs)
    if not differences:
        return None
    rows = [[key, *(str(value) for value in values)] for key, values in differences.items()]
    return _table(("recipe", *run_names(runs)), rows)


def _table(header: Sequence[str], rows: list[list[str]], right: Iterable[int] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column, title in enumerate(header):
        table.add_column(Text(title), justify="right" if column in right else "left", no_wrap=True)
    for row in rows:
        # Text objects: rich would interpret a str as markup or as the name of an emoji.
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def plot_comparison(runs: list[RunRecord]) -> "Figure":
    """Validation top-1 and training loss of the runs over the optimizer steps."""
    with new_figure(9, 7.5) as figure:
        accuracy, losses = figure.subplots(2, sharex=True)
        high_losses = []
        for number, (name, run) in enumerate(zip(run_names(runs), runs, strict=True)):
            label = f" {printable(name)}"  # matplotlib hides labels that begin with "_"
            colour = f"C{number % COLOURS}"
            style = ("-", "--", ":")[number // COLOURS % 3]
            steps, values = thin(run.validation["step"], run.validation["top1"])
            accuracy.plot(steps, values, style, color=colour, marker="o", markersize=3, label=label)
            steps, values = thin(run.training["step"], run.training["loss"])
            reach = len(steps) // 40
            if reach:
                losses.plot(steps, values, style, color=colour, alpha=0.2, linewidth=0.8)
            if len(values):
                losses.plot(steps, smooth(values, reach), style, color=colour, label=label)
                high_losses.append(float(np.percentile(values, 99)))
        accuracy.set_title("Validation top-1 (%)")
        losses.set_title("Training loss (nats)")
        losses.set_xlabel("optimizer step")
        losses.set_xlim(left=0)
        if high_losses:  # a run that diverged must not flatten the others
            limit = HEADROOM * float(np.median(high_losses))
            losses.set_ylim(top=min(losses.get_ylim()[1], limit))
        for axes in (accuracy, losses):
            format_axes(axes)
        accuracy.legend(loc="best")
    return figure


def save_comparison(runs: list[RunRecord], path: Path) -> None:
    """Writes the figure of `plot_comparison` as PNG. Raises RecipeError."""
    try:
        save_png(plot_comparison(runs), path)
    except OSError as error:
        raise RecipeError(f"cannot write {path}: {error.strerror}") from None
