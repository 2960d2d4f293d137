"""Where a run stands, from its folder alone: another terminal may ask while it goes on."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from cspnet import recipe as recipes
from cspnet.errors import RecipeError
from cspnet.report.history import ENDS, Run
from cspnet.report.outlook import seconds_left, spell, when
from cspnet.schema import Recipe

LINES = 10  # of the record, from which its present speed is told
SILENCE = timedelta(minutes=10)  # without a line: longer than most windows and saves
WINDOWS = 3  # of the record that may be silent, where they are longer


def describe(run: Run, now: datetime | None = None) -> list[str]:
    """The state of a run in lines for people: what it does, how far it is, its best, its last save.

    Nothing in the folder says whether its process lives: a run that has not written for long may
    have been killed, or validate.
    """
    now = now or datetime.now(UTC)
    recipe = _recipe(run)
    running = _is_running(run, recipe, now)
    lines = [f"{run.folder}: {_doing(run, running, now)}"]
    steps = run.training["step"]
    share = f" of {run.steps:,} ({run.step / run.steps:.1%})" if run.steps else ""
    loss = f", loss {run.training['loss'][-1]:.4f}" if len(steps) else ", none logged yet"
    lines.append(f"step        {run.step:,}{share}{loss}")
    speeds = run.training["images_per_second"][-LINES:]
    speeds = speeds[np.isfinite(speeds) & (speeds > 0)]
    if len(speeds):
        speed = len(speeds) / float(np.sum(1 / speeds))  # of equal numbers of images
        wait = float(np.nanmean(run.training["data_wait"][-LINES:]))
        left = ""
        if recipe and run.step < run.steps:
            seconds = seconds_left(recipe, run.step, speed)
            left = f"; {spell(seconds)} left, validations aside"
            left += f", done at {when(seconds)}" * running
        lines.append(
            f"speed       {speed:,.0f} images/s, {wait:.0%} of the time waiting for images{left}"
        )
    top1 = run.validation["top1"]
    if run.best is not None:
        at = run.validation["step"]
        best = f"{top1[run.best]:.2f} % at step {at[run.best]:,.0f}, selected on the same images"
        lines.append(
            f"top-1       last validation {top1[-1]:.2f} % at step {at[-1]:,.0f}"
            + f"; best {best}" * run.selected
        )
    lines.append(f"last save   {_last_save(run.folder / 'checkpoints' / 'last.pt', now)}")
    return lines


def _is_running(run: Run, recipe: Recipe | None, now: datetime) -> bool:
    """Whether it began, did not end, and was heard of lately."""
    if not run.events or run.events[-1].kind in ENDS:
        return False
    silence, speeds = SILENCE, run.training["images_per_second"][-1:]
    if recipe and len(speeds) and speeds[0] > 0:
        window = recipe.log_every * recipe.batch / float(speeds[0])
        silence = max(silence, WINDOWS * timedelta(seconds=window))
    return now - max(run.written or run.events[-1].time, run.events[-1].time) < silence


def _recipe(run: Run) -> Recipe | None:
    """Of the run; None where this cspnet cannot read it."""
    try:
        return recipes.from_text(run.recipe)
    except RecipeError:
        return None


def _doing(run: Run, running: bool, now: datetime) -> str:
    if not run.events:
        return "begun by nobody"
    last = run.events[-1]
    if last.kind == "done":
        return f"complete since {_local(last.time)}"
    if last.kind == "stop":
        why = f": {last.remarks[0]}" if last.remarks else ""
        return f"stopped at {_local(last.time)}{why}"
    heard = max(run.written or last.time, last.time)
    ago = f"heard of {spell((now - heard).total_seconds())} ago"
    if running:
        return f"running since {_local(last.time)} on {run.device}, {ago}"
    return f"silent, {ago}: killed, or in a long validation. --resume goes on with a killed run"


def _last_save(file: Path, now: datetime) -> str:
    try:
        status = file.stat()
    except OSError:
        return "none yet"
    ago = (now - datetime.fromtimestamp(status.st_mtime, UTC)).total_seconds()
    return f"{spell(max(0.0, ago))} ago, {status.st_size / 1e6:,.0f} MB, {file}"


def _local(time: datetime) -> str:
    return f"{time.astimezone():%Y-%m-%d %H:%M}"
