"""Where a run stands, from its folder alone: another terminal may ask while it goes on."""

import platform
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from cspnet.errors import RecipeError
from cspnet.recipe import load as recipes
from cspnet.recipe.eta import format_duration, format_eta, seconds_left
from cspnet.recipe.schema import Recipe
from cspnet.run.lock import is_locked
from cspnet.run.reader import END_EVENTS, RunRecord
from cspnet.shell import command_line
from cspnet.text import printable

LINES = 10  # of the record, from which its present speed is told
SILENCE = timedelta(minutes=10)  # without a line: longer than most windows and saves
WINDOWS = 3  # of the record that may be silent, where they are longer


def describe_run(run: RunRecord, now: datetime | None = None) -> list[str]:
    """The state of a run in lines for people: what it does, how far it is, its best, its last save.

    A run that ended without a word, by SIGKILL or with its machine, is reported as dead at once.
    """
    now = now or datetime.now(UTC)
    recipe = _recipe(run)
    state = _state(run, recipe, now)
    lines = [f"{printable(str(run.folder))}: {_doing(run, state, now)}"]
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
            left = f"; {format_duration(seconds)} left, validations aside"
            left += f", done at {format_eta(seconds)}" * (state == "running")
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
    lines.append(f"last save   {_last_save(run.folder.last_checkpoint, now)}")
    return lines


def status_exit_code(run: RunRecord, now: datetime | None = None) -> int:
    """0: running or complete. 75: stopped after a save, --resume continues. 1: dead or failed."""
    now = now or datetime.now(UTC)
    state = _state(run, _recipe(run), now)
    return {"running": 0, "done": 0, "stop": 75}.get(state, 1)


def _state(run: RunRecord, recipe: Recipe | None, now: datetime) -> str:
    """running, dead, or the kind of the last event. The lock of the run folder decides.

    It says nothing on some network drives, nor of a process on another machine. There a run counts
    as running as long as its record grows.
    """
    locked = is_locked(run.folder.path)
    if locked:
        return "running"
    if not run.events or run.events[-1].kind in END_EVENTS:
        return run.events[-1].kind if run.events else "none"
    here = run.events[-1].host in ("", platform.node())
    if locked is False and here:
        return "dead"
    return "running" if _writes(run, recipe, now) else "silent"


def _writes(run: RunRecord, recipe: Recipe | None, now: datetime) -> bool:
    """Whether the run wrote to its record lately."""
    silence, speeds = SILENCE, run.training["images_per_second"][-1:]
    if recipe and len(speeds) and speeds[0] > 0:
        window = recipe.log_every * recipe.batch / float(speeds[0])
        silence = max(silence, WINDOWS * timedelta(seconds=window))
    return now - _last_sign(run) < silence


def _last_sign(run: RunRecord) -> datetime:
    return max(run.written or run.events[-1].time, run.events[-1].time)


def _recipe(run: RunRecord) -> Recipe | None:
    """Of the run; None where this cspnet cannot read it."""
    try:
        return recipes.recipe_from_yaml(run.recipe)
    except RecipeError:
        return None


def _doing(run: RunRecord, state: str, now: datetime) -> str:
    if state == "none":
        return "not started: there is no history.jsonl"
    if not run.events or (state == "running" and run.events[-1].kind in END_EVENTS):
        return "starting"
    last = run.events[-1]
    silence = max(0.0, (now - _last_sign(run)).total_seconds())
    ago = f"last written to {format_duration(silence)} ago"
    if state == "running":
        return f"running since {_local(last.time)} on {run.device}, {ago}"
    if state == "done":
        return f"complete since {_local(last.time)}"
    resume = f"Continue: {command_line('cspnet-train', '--resume', '--output', run.folder.path)}"
    if state == "silent":
        host = f" on {last.host}" * bool(last.host)
        return (
            f"NO SIGN OF LIFE: {ago}, and the lock of the folder cannot be seen from here. If no "
            f"process{host} trains in it: {resume.removeprefix('Continue: ')}"
        )
    if state == "dead":
        return f"DEAD: its process was killed, or the machine went down; {ago}. {resume}"
    what = {"stop": "stopped", "fail": "FAILED", "crash": "CRASHED"}[state]
    why = f": {last.remarks[0].rstrip('.')}" if last.remarks else ""
    return f"{what} at {_local(last.time)}{why}. {resume}"


def _last_save(file: Path, now: datetime) -> str:
    try:
        status = file.stat()
    except OSError:
        return "none yet"
    ago = (now - datetime.fromtimestamp(status.st_mtime, UTC)).total_seconds()
    return f"{format_duration(max(0.0, ago))} ago, {status.st_size / 1e6:,.0f} MB, {printable(str(file))}"


def _local(time: datetime) -> str:
    return f"{time.astimezone():%Y-%m-%d %H:%M}"
