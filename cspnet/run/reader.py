"""Reads a run folder: metrics, starts and ends, recipe and environment.

Tolerates damage: the run may still be writing its last line, or its machine may have crashed.
"""

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import yaml

from cspnet.errors import RecipeError
from cspnet.recipe.load import decode_binary_paths, flatten
from cspnet.run.folder import RunFolder

TRAINING = ("step", "loss", "lr", "images_per_second", "data_wait", "loss_scale", "skipped")
VALIDATION = ("step", "top1", "top5", "loss", "images")
START_EVENTS, STOP_EVENTS = ("start", "resume"), ("stop", "fail", "crash")
END_EVENTS = (*STOP_EVENTS, "done")

MetricColumns = dict[str, np.ndarray]  # float64 [lines] by the name of the metric; NaN: no value


@dataclass(frozen=True)
class Event:
    """A line of history.jsonl: a start or an end of the run."""

    time: datetime
    kind: str  # start, resume; stop (saved), fail, crash; done
    step: int
    device: str
    processes: int
    remarks: list[str]
    host: str = ""  # "": not recorded


@dataclass(frozen=True)
class Period:
    """A time in which the run was running."""

    begin: Event
    until: datetime
    end: Event | None  # None: no end is recorded; the run is still running, or was killed
    last: bool  # of the run


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder, without the checkpoints."""

    folder: RunFolder
    recipe: str  # the text of recipe.yaml
    fields: dict[str, Any]  # its values by dotted key
    environment: dict[str, Any]
    training: MetricColumns
    validation: MetricColumns
    events: list[Event]
    unread: int  # malformed lines of metrics.jsonl and history.jsonl
    written: datetime | None  # when metrics.jsonl was last written
    recipe_file: str = ""  # the file that the recipe was read from; "": unknown
    recipe_sources: dict[str, str] = field(default_factory=dict)  # of its values, by dotted key

    @property
    def name(self) -> str:
        return self.folder.path.absolute().name

    @property
    def steps(self) -> int:
        """schedule.steps; 0 if unknown."""
        steps = self.fields.get("schedule.steps")
        return steps if isinstance(steps, int) else 0

    @property
    def step(self) -> int:
        """The last step in the metrics or the history."""
        last_steps = [int(columns["step"][-1]) for columns in self.parts if len(columns["step"])]
        return max([*last_steps, *(event.step for event in self.events[-1:])], default=0)

    @property
    def parts(self) -> tuple[MetricColumns, MetricColumns]:
        """Metrics of training and of validation."""
        return self.training, self.validation

    @property
    def best(self) -> int | None:
        """Index of the validation with the highest top-1; the first one, as for best.pt."""
        top1 = self.validation["top1"]
        return int(np.nanargmax(top1)) if np.isfinite(top1).any() else None

    @property
    def selected(self) -> bool:
        """Whether the best validation was selected among several: its top-1 is then optimistic."""
        return int(np.isfinite(self.validation["top1"]).sum()) > 1

    @property
    def device(self) -> str:
        return str(self.environment.get("gpu") or self.environment.get("device") or "unknown")


def read_run(path: Path) -> RunRecord:
    """The record of the run in a folder. RecipeError if it is no run folder, or not readable."""
    folder = RunFolder(path)
    if not path.is_dir():
        raise RecipeError(f"{path} is not a folder: give a run folder (--output of cspnet-train)")
    if not folder.is_run():
        raise RecipeError(f"{path} is not a run folder: it has no {folder.recipe_file.name}")
    malformed: list[str] = []
    try:
        recipe = folder.recipe_file.read_text(encoding="utf-8", errors="replace")
        content = yaml.safe_load(recipe)
        if not isinstance(content, dict):
            raise RecipeError(f"{folder.recipe_file} holds no recipe")
        metrics = folder.metrics_file
        training, validation = _columns(_objects(metrics, malformed), malformed)
        events = list(_events(_objects(folder.history_file, malformed), malformed))
        modified = metrics.stat().st_mtime if metrics.is_file() else None
    except yaml.YAMLError as error:
        first_line = str(error).splitlines()[0]
        raise RecipeError(f"{folder.recipe_file} cannot be read: {first_line}") from None
    except OSError as error:
        raise RecipeError(f"the run in {path} cannot be read: {error}") from None
    sources = folder.read_recipe_sources()
    values = sources.get("values")
    return RunRecord(
        folder=folder,
        recipe=recipe,
        fields=dict(flatten(decode_binary_paths(content))),
        environment=folder.read_environment(),
        training=training,
        validation=validation,
        events=events,
        unread=len(malformed),
        written=None if modified is None else datetime.fromtimestamp(modified, UTC),
        recipe_file=str(sources.get("file", "")),
        recipe_sources={str(key): str(text) for key, text in values.items()}
        if isinstance(values, dict)
        else {},
    )


def _objects(path: Path, malformed: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one per line. Other lines are appended to `malformed`."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                content = None
            if isinstance(content, dict):
                yield content
            elif line.endswith("\n"):  # a last line without a newline is still being written
                malformed.append(line)


def _columns(
    lines: Iterator[dict[str, Any]], malformed: list[str]
) -> tuple[MetricColumns, MetricColumns]:
    """The metrics of training and of validation, sorted by step."""
    # Arrays, since dictionaries of the million lines of a long run would take gigabytes.
    splits = {
        "train": {name: array("d") for name in TRAINING},
        "val": {name: array("d") for name in VALIDATION},
    }
    for line in lines:
        step, split = line.get("step"), line.get("split")
        if split not in ("train", "val") or not _is_number(step):
            malformed.append(str(line))
            continue
        for name, column in splits[split].items():
            value = line.get(name)
            column.append(value if _is_number(value) else math.nan)
    training, validation = (_sorted_by_step(columns) for columns in splits.values())
    return training, validation


def _sorted_by_step(columns: dict[str, array]) -> MetricColumns:
    arrays = {name: np.array(column, dtype=np.float64) for name, column in columns.items()}
    order = np.argsort(arrays["step"], kind="stable")
    return {name: values[order] for name, values in arrays.items()}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) < 1e300


def _events(lines: Iterator[dict[str, Any]], malformed: list[str]) -> Iterator[Event]:
    for line in lines:
        try:
            time = datetime.fromisoformat(line["time"])
            yield Event(
                time=time if time.tzinfo else time.replace(tzinfo=UTC),
                kind=str(line["event"]),
                step=int(line["step"]),
                device=str(line.get("device", "")),
                processes=int(line.get("processes", 1)),
                remarks=[str(remark) for remark in line.get("remarks") or []],
                host=str(line.get("host", "")),
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            malformed.append(str(line))


def running_periods(run: RunRecord) -> list[Period]:
    """The times in which the run was running.

    A kill leaves no event. The period then ends at the latest possible time: the next start, or the
    last write to metrics.jsonl.
    """
    periods = []
    for number, event in enumerate(run.events):
        if event.kind not in START_EVENTS:
            continue
        following = run.events[number + 1] if number + 1 < len(run.events) else None
        until = following.time if following else max(run.written or event.time, event.time)
        end = following if following and following.kind in END_EVENTS else None
        is_last = following is None or end is run.events[-1]
        periods.append(Period(event, until, end, last=is_last))
    return periods
