"""The status of a run, read from its folder: works from any terminal while the run is running."""

import platform
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from cspnet.errors import RecipeError
from cspnet.recipe.eta import format_duration, format_eta, seconds_left
from cspnet.recipe.load import recipe_from_yaml
from cspnet.recipe.schema import Recipe
from cspnet.run.lock import is_locked
from cspnet.run.reader import END_EVENTS, RunRecord
from cspnet.shell import command_line
from cspnet.text import printable

RECENT_LINES = 10  # log lines that the current throughput is averaged over
SILENCE = timedelta(minutes=10)  # without a log line; longer than most log intervals and saves
SILENT_INTERVALS = 3  # log intervals without a line, if these take longer than SILENCE


def describe_run(run: RunRecord, now: datetime | None = None) -> list[str]:
    """The status in lines for the terminal: state, progress, throughput, scores, last save.

    A run whose process was killed is reported as dead immediately, without a timeout.
    """
    now = now or datetime.now(UTC)
    recipe = _read_recipe(run)
    state = _state(run, recipe, now)
    steps = run.training["step"]
    fraction = f" of {run.steps:,} ({run.step / run.steps:.1%})" if run.steps else ""
    loss = f"loss {run.training['loss'][-1]:.4f}" if len(steps) else "nothing logged yet"
    return [
        f"{printable(str(run.folder))}: {_describe_state(run, state, now)}",
        f"step        {run.step:,}{fraction}, {loss}",
        *_throughput_lines(run, recipe, state),
        *_score_lines(run),
        f"last save   {_last_save(run.folder.last_checkpoint, now)}",
    ]


def _throughput_lines(run: RunRecord, recipe: Recipe | None, state: str) -> list[str]:
    speeds = run.training["images_per_second"][-RECENT_LINES:]
    speeds = speeds[np.isfinite(speeds) & (speeds > 0)]
    if not len(speeds):
        return []
    # Each line stands for the same number of images, hence the harmonic mean.
    speed = len(speeds) / float(np.sum(1 / speeds))
    waiting = float(np.nanmean(run.training["data_wait"][-RECENT_LINES:]))
    eta = ""
    if recipe and run.step < run.steps:
        seconds = seconds_left(recipe, run.step, speed)
        eta = f"; {format_duration(seconds)} left without validations"
        eta += f", expected end {format_eta(seconds)}" * (state == "running")
    return [
        f"throughput  {speed:,.0f} images/s, {waiting:.0%} of the time spent waiting for data{eta}"
    ]


def _score_lines(run: RunRecord) -> list[str]:
    if run.best is None:
        return []
    top1, steps = run.validation["top1"], run.validation["step"]
    best = f"{top1[run.best]:.2f} % at step {steps[run.best]:,.0f}, selected on the same images"
    return [
        f"top-1       last validation {top1[-1]:.2f} % at step {steps[-1]:,.0f}"
        + f"; best {best}" * run.selected
    ]


def status_exit_code(run: RunRecord, now: datetime | None = None) -> int:
    """0: running or complete. 75: stopped after a save; --resume continues. 1: dead or failed."""
    now = now or datetime.now(UTC)
    state = _state(run, _read_recipe(run), now)
    return {"running": 0, "done": 0, "stop": 75}.get(state, 1)


def _state(run: RunRecord, recipe: Recipe | None, now: datetime) -> str:
    """One of running, silent, dead, none, or the kind of the last event.

    The lock of the run folder decides. It is not visible on some network file systems and for a
    process on another machine. Then a run counts as running while metrics.jsonl keeps growing.
    """
    locked = is_locked(run.folder.path)
    if locked:
        return "running"
    if not run.events or run.events[-1].kind in END_EVENTS:
        return run.events[-1].kind if run.events else "none"
    on_this_host = run.events[-1].host in ("", platform.node())
    if locked is False and on_this_host:
        return "dead"
    return "running" if _is_logging(run, recipe, now) else "silent"


def _is_logging(run: RunRecord, recipe: Recipe | None, now: datetime) -> bool:
    """Whether the last log line is recent for the run's throughput."""
    allowed, speeds = SILENCE, run.training["images_per_second"][-1:]
    if recipe and len(speeds) and speeds[0] > 0:
        interval = recipe.log_every * recipe.batch / float(speeds[0])
        allowed = max(allowed, SILENT_INTERVALS * timedelta(seconds=interval))
    return now - _last_update(run) < allowed


def _last_update(run: RunRecord) -> datetime:
    return max(run.written or run.events[-1].time, run.events[-1].time)


def _read_recipe(run: RunRecord) -> Recipe | None:
    """The recipe of the run; None if this version of cspnet cannot read it."""
    try:
        return recipe_from_yaml(run.recipe)
    except RecipeError:
        return None


def _describe_state(run: RunRecord, state: str, now: datetime) -> str:
    if state == "none":
        return "never started: there is no history.jsonl"
    if not run.events or (state == "running" and run.events[-1].kind in END_EVENTS):
        return "starting"
    last = run.events[-1]
    silence = max(0.0, (now - _last_update(run)).total_seconds())
    update = f"last update {format_duration(silence)} ago"
    if state == "running":
        return f"running since {_local(last.time)} on {run.device}, {update}"
    if state == "done":
        return f"complete since {_local(last.time)}"
    resume = command_line("cspnet-train", "--resume", "--output", run.folder.path)
    if state == "silent":
        host = f" on {last.host}" * bool(last.host)
        return (
            f"NO RECENT UPDATE: {update}, and the lock of the folder is not visible from here. If "
            f"no process{host} is training in it, resume: {resume}"
        )
    if state == "dead":
        return f"DEAD: the process was killed or the machine went down; {update}. Resume: {resume}"
    verb = {"stop": "stopped", "fail": "FAILED", "crash": "CRASHED"}[state]
    reason = f": {last.remarks[0].rstrip('.')}" if last.remarks else ""
    return f"{verb} at {_local(last.time)}{reason}. Resume: {resume}"


def _last_save(file: Path, now: datetime) -> str:
    try:
        status = file.stat()
    except OSError:
        return "none yet"
    age = max(0.0, (now - datetime.fromtimestamp(status.st_mtime, UTC)).total_seconds())
    megabytes = status.st_size / 1e6
    return f"{format_duration(age)} ago, {megabytes:,.0f} MB, {printable(str(file))}"


def _local(time: datetime) -> str:
    return f"{time.astimezone():%Y-%m-%d %H:%M}"
