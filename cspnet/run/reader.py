"""What a run folder tells: its record, starts and stops, recipe and environment.

Read with tolerance: a run may be going on, its last line half written, its machine have crashed.
"""

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cspnet.errors import RecipeError
from cspnet.recipe.load import decode_binary_paths, flatten

TRAINING = ("step", "loss", "lr", "images_per_second", "data_wait", "loss_scale", "skipped")
VALIDATION = ("step", "top1", "top5", "loss", "images")
START_EVENTS, STOP_EVENTS = ("start", "resume"), ("stop", "fail", "crash")
END_EVENTS = (*STOP_EVENTS, "done")


@dataclass(frozen=True)
class Event:
    """A line of history.jsonl: when the run started, stopped, went on, was done."""

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
    end: Event | None  # None: nothing tells its end; it goes on, or was killed
    last: bool  # of the run's


@dataclass(frozen=True)
class RunRecord:
    """All that a run folder tells but the weights."""

    folder: Path
    recipe: str  # the text of recipe.yaml
    fields: dict[str, Any]  # of it, by dotted key
    environment: dict[str, Any]
    training: dict[str, np.ndarray]  # float64 [lines] by the name of the number; NaN: none
    validation: dict[str, np.ndarray]
    events: list[Event]
    unread: int  # lines of the record and history that are no such thing
    written: datetime | None  # when the record was written last

    @property
    def name(self) -> str:
        return self.folder.absolute().name

    @property
    def steps(self) -> int:
        """Of the schedule; 0: unknown."""
        steps = self.fields.get("schedule.steps")
        return steps if isinstance(steps, int) else 0

    @property
    def step(self) -> int:
        """The last step that the record or the history knows of."""
        known = [int(part["step"][-1]) for part in self.parts if len(part["step"])]
        return max([*known, *(event.step for event in self.events[-1:])], default=0)

    @property
    def parts(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        return self.training, self.validation

    @property
    def best(self) -> int | None:
        """The place of the best validation; the first of equals, as the run keeps it."""
        top1 = self.validation["top1"]
        return int(np.nanargmax(top1)) if np.isfinite(top1).any() else None

    @property
    def selected(self) -> bool:
        """Whether the best validation was selected from several: its top-1 is then optimistic."""
        return int(np.isfinite(self.validation["top1"]).sum()) > 1

    @property
    def device(self) -> str:
        return str(self.environment.get("gpu") or self.environment.get("device") or "unknown")


def read_run(folder: Path) -> RunRecord:
    """The run in a folder. RecipeError where it is none, or cannot be read."""
    stored = folder / "recipe.yaml"
    if not folder.is_dir():
        raise RecipeError(f"{folder} is not a folder: name that of a run (--output of its train)")
    if not stored.is_file():
        raise RecipeError(f"{folder} is not a run folder: it has no recipe.yaml")
    try:
        recipe = stored.read_text(encoding="utf-8", errors="replace")
        content = yaml.safe_load(recipe)
        if not isinstance(content, dict):
            raise RecipeError(f"{stored} holds no recipe")
        unread: list[str] = []
        record = folder / "metrics.jsonl"
        training, validation = _columns(_lines(record, unread), unread)
        return RunRecord(
            folder=folder,
            recipe=recipe,
            fields=dict(flatten(decode_binary_paths(content))),
            environment=_environment(folder / "env.json"),
            training=training,
            validation=validation,
            events=list(_events(_lines(folder / "history.jsonl", unread), unread)),
            unread=len(unread),
            written=(
                datetime.fromtimestamp(record.stat().st_mtime, UTC) if record.is_file() else None
            ),
        )
    except yaml.YAMLError as error:
        raise RecipeError(f"{stored} cannot be read: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise RecipeError(f"the run in {folder} cannot be read: {error}") from None


def _lines(path: Path, unread: list[str]) -> Iterator[dict]:
    """The objects of a file, one a line; what is none goes to `unread`."""
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
            elif line.endswith("\n"):  # a last line without an end is still being written
                unread.append(line)


def _columns(lines: Iterator[dict], unread: list[str]) -> tuple[dict, dict]:
    """The numbers of training and of validation in the order of steps, one array a name."""
    # Arrays, as a million lines of a long run would be gigabytes of dictionaries.
    parts = {
        "train": {name: array("d") for name in TRAINING},
        "val": {name: array("d") for name in VALIDATION},
    }
    for line in lines:
        step, split = line.get("step"), line.get("split")
        if split not in ("train", "val") or not _is_number(step):
            unread.append(str(line))
            continue
        for name, column in parts[split].items():
            value = line.get(name)
            column.append(value if _is_number(value) else math.nan)
    columns = []
    for part in parts.values():
        arrays = {name: np.array(column, dtype=np.float64) for name, column in part.items()}
        order = np.argsort(arrays["step"], kind="stable")
        columns.append({name: values[order] for name, values in arrays.items()})
    return columns[0], columns[1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) < 1e300


def _events(lines: Iterator[dict], unread: list[str]) -> Iterator[Event]:
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
            unread.append(str(line))


def _environment(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def running_periods(run: RunRecord) -> list[Period]:
    """When the run was running. A kill leaves no line: then, until the next start at most."""
    found = []
    for number, event in enumerate(run.events):
        if event.kind not in START_EVENTS:
            continue
        after = run.events[number + 1] if number + 1 < len(run.events) else None
        until = after.time if after else max(run.written or event.time, event.time)
        end = after if after and after.kind in END_EVENTS else None
        found.append(Period(event, until, end, last=after is None or end is run.events[-1]))
    return found
