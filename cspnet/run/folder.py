"""The folder of a run: the names and formats of its files. Nothing else writes them."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cspnet.errors import RecipeError
from cspnet.files import TEMPORARY_SUFFIX, replace_text
from cspnet.run.lock import LOCK_NAME
from cspnet.text import escape_line, unescape_line

LAST_NAME, PREVIOUS_NAME, BEST_NAME = "last.pt", "previous.pt", "best.pt"


class RunFolder:
    """A run folder, which may not exist yet.

    Methods that write raise OSError, unless they say otherwise.
    """

    def __init__(self, path: Path):
        self.path = path
        self.recipe_file = path / "recipe.yaml"  # resolved; makes the folder a run folder
        self.recipe_sources_file = path / "recipe-sources.json"  # of each value of the recipe
        self.environment_file = path / "env.json"  # command, machine, versions of the last start
        self.history_file = path / "history.jsonl"  # starts and ends of the run; never truncated
        self.metrics_file = path / "metrics.jsonl"  # by step (cspnet/run/metrics_log.py)
        self.log_file = path / "train.log"  # what the run prints, with the time of day
        self.unreadable_file = path / "unreadable.txt"  # names of training images, one per line
        self.non_finite_file = path / "not-finite.json"  # the first step with NaN or Inf
        self.checkpoint_folder = path / "checkpoints"  # see cspnet/run/checkpoint.py
        self.last_checkpoint = self.checkpoint_folder / LAST_NAME
        self.best_checkpoint = self.checkpoint_folder / BEST_NAME
        self.tensorboard_folder = path / "tb"
        self.sample_image = path / "preview" / "step-0000000.png"  # the first training images
        self.report_folder = path / "report"  # where `cspnet report` writes by default

    def __str__(self) -> str:
        return str(self.path)

    # --- checks

    def is_run(self) -> bool:
        return self.recipe_file.is_file()

    def holds_files(self) -> bool:
        """Whether the folder holds more than what an interrupted start leaves."""
        leftovers = (LOCK_NAME, self.recipe_sources_file.name)
        return self.path.is_dir() and any(
            path.suffix != TEMPORARY_SUFFIX and path.name not in leftovers
            for path in self.path.iterdir()
        )

    def require_usable(self, resume: bool) -> None:
        """Raises RecipeError if a run cannot use the folder, or would overwrite its content."""
        if self.path.exists() and not self.path.is_dir():
            raise RecipeError(f"--output {self} is a file: give a folder")
        if self.path.is_dir() and not os.access(self.path, os.R_OK | os.W_OK | os.X_OK):
            raise RecipeError(f"--output {self} is not readable and writable: give another folder")
        if not resume and self.holds_files():
            raise RecipeError(
                f"the run folder {self} is not empty: continue its run with --resume, or give "
                "another folder with --output"
            )

    # --- start of a run

    def write_start(
        self, recipe: str, environment: Mapping[str, Any], sources: Mapping[str, Any] | None = None
    ) -> None:
        """Writes the recipe (YAML), the environment and, if known, the sources of the recipe."""
        # recipe.yaml makes it a run folder, which is resumed without the original recipe file.
        if sources is not None:
            replace_text(self.recipe_sources_file, json.dumps(sources, indent=2) + "\n")
        replace_text(self.recipe_file, recipe)
        replace_text(self.environment_file, json.dumps(environment, indent=2) + "\n")

    def read_environment(self) -> dict[str, Any]:
        """The environment of the last start; empty if it cannot be read."""
        return _read_object(self.environment_file)

    def read_recipe_sources(self) -> dict[str, Any]:
        """The sources of the recipe; empty if they are unknown."""
        return _read_object(self.recipe_sources_file)

    def recorded_data_root(self) -> str | None:
        """The absolute path of the run's data root; None if unknown.

        The recipe's own data.root may be relative to the directory that the run was started in.
        """
        root = self.read_environment().get("data_root")
        return root if isinstance(root, str) else None

    # --- events and failures

    def log_event(
        self, event: str, step: int, device: str, processes: int, remarks: Sequence[str] = ()
    ) -> None:
        """Appends a line to history.jsonl; does nothing on a full disk.

        `event` is start, resume, done, stop (saved, exit code 75), fail or crash.
        """
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "event": event,
            "step": step,
            "device": device,
            "processes": processes,
            "host": platform.node(),
            "remarks": list(remarks),
        }
        with suppress(OSError), open(self.history_file, "a") as file:
            file.write(json.dumps(line) + "\n")

    def crash_file(self, step: int, rank: int = 0) -> Path:
        """The crash report of a rank."""
        return self.path / (f"crash-{step:07}" + f"-rank{rank}" * bool(rank) + ".txt")

    def write_crash_report(
        self, step: int, rank: int, environment: Mapping[str, Any] | None, traceback: str
    ) -> None:
        """Writes the time, the environment if it is known, and the traceback to a crash file."""
        lines = [f"{datetime.now(UTC).isoformat(timespec='seconds')} step {step}"]
        if environment is not None:
            lines.append(json.dumps(environment))
        text = "\n".join([*lines, traceback])
        self.crash_file(step, rank).write_text(text, "utf-8", "backslashreplace")

    def write_non_finite(self, content: Mapping[str, Any]) -> None:
        """Writes the batch of the first step with NaN or Inf."""
        replace_text(self.non_finite_file, json.dumps(content, indent=1) + "\n")

    # --- unreadable images: a file name may be any bytes

    def read_unreadable(self) -> set[str]:
        """Names of the unreadable training images found so far; empty if there is no list."""
        if not self.unreadable_file.exists():
            return set()
        text = self.unreadable_file.read_text("utf-8", "surrogateescape")
        return {unescape_line(line) for line in text.split("\n") if line}

    def append_unreadable(self, name: str) -> None:
        with open(self.unreadable_file, "a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{escape_line(name)}\n")


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
