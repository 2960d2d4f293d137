"""Runs beside each other: how far, how good, in what their recipes differ, and their curves."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from cspnet.errors import RecipeError
from cspnet.files import replace_file
from cspnet.report.curves import HEADROOM, number, plain, save, smooth, thin
from cspnet.run.reader import RunRecord, read_run
from cspnet.text import printable

ABSENT = "–"  # a field without effect in a run, which its recipe.yaml leaves out
HEAD = ("run", "steps", "best top-1", "last top-1", "last loss", "images/s", "device")


def read_runs(folders: list[Path]) -> list[RunRecord]:
    """The runs in two or more folders; RecipeError for fewer, one twice, or one that is none."""
    if len(folders) < 2:
        raise RecipeError("compare takes two run folders at least")
    seen: dict[Path, Path] = {}
    for folder in folders:
        other = seen.setdefault(folder.resolve(), folder)
        if other is not folder:
            raise RecipeError(f"{folder} is given twice" + f", as {other}" * (other != folder))
    return [read_run(folder) for folder in folders]


def run_names(runs: list[RunRecord]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    parts = [run.folder.path.resolve().parts for run in runs]
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return [os.sep.join(part[-length:]) for part in parts]


def overview(runs: list[RunRecord]) -> Table:
    """How far and how good each run is, a row a run."""
    return _table(
        HEAD,
        [_row(name, run) for name, run in zip(run_names(runs), runs, strict=True)],
        range(1, 6),
    )


def _row(name: str, run: RunRecord) -> list[str]:
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


def differences(runs: list[RunRecord]) -> dict[str, list[Any]]:
    """The fields in which the recipes differ, by dotted key: a value a run, ABSENT for none."""
    keys = dict.fromkeys(key for run in runs for key in run.fields)
    values = {key: [run.fields.get(key, ABSENT) for run in runs] for key in keys}
    return {key: each for key, each in values.items() if any(v != each[0] for v in each)}


def differing(runs: list[RunRecord]) -> Table | None:
    """The same for people; None where the recipes are alike."""
    found = differences(runs)
    if not found:
        return None
    rows = [[key, *(str(value) for value in values)] for key, values in found.items()]
    return _table(("recipe", *run_names(runs)), rows, ())


def _table(head, rows: list[list[str]], right) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column, title in enumerate(head):
        justify = "right" if column in right else "left"
        table.add_column(Text(title), justify=justify, no_wrap=True)
    for row in rows:
        # Text, for a str may be taken for markup or an emoji's name.
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def draw(runs: list[RunRecord], path: Path) -> None:
    """Validation top-1 and training loss of the runs over the steps, as PNG. RecipeError."""
    from matplotlib.figure import Figure  # a second to import

    figure = Figure(figsize=(10, 8.5), layout="constrained")
    accuracy, losses = figure.subplots(2, sharex=True)
    tops = []
    for place, (name, run) in enumerate(zip(run_names(runs), runs, strict=True)):
        # Ten colours; an eleventh run has the first one's again, dashed.
        label = f" {plain(name)}"  # matplotlib hides one that begins with an underscore
        look = {"color": f"C{place % 10}", "linestyle": ("-", "--", ":")[place // 10 % 3]}
        steps, values = thin(run.validation["step"], run.validation["top1"])
        accuracy.plot(steps, values, marker="o", markersize=3, label=label, **look)
        steps, values = thin(run.training["step"], run.training["loss"])
        reach = len(steps) // 40
        if reach:
            losses.plot(steps, values, alpha=0.2, **look)
        if len(values):
            losses.plot(steps, smooth(values, reach), label=label, **look)
            tops.append(float(np.percentile(values, 99)))
    accuracy.set_ylabel("validation top-1, %")
    losses.set_ylabel("training loss, nats")
    losses.set_xlabel("optimizer step")
    if tops:  # a run that blew up leaves room for the others
        losses.set_ylim(top=min(losses.get_ylim()[1], HEADROOM * float(np.median(tops))))
    for axes in (accuracy, losses):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter(lambda value, _: number(value))
    accuracy.legend(fontsize=8)
    try:
        replace_file(path, lambda temporary: save(figure, temporary))
    except OSError as error:
        raise RecipeError(f"{path} cannot be written: {error.strerror}") from None
