"""The record of a run (metrics.jsonl) and its views: progress on the terminal, TensorBoard.

The device is asked for numbers here only, every `log_every` steps.
"""

import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from torch.utils.tensorboard import SummaryWriter

from cspnet.data.loader import Batch
from cspnet.data.sources import Source
from cspnet.errors import DataError
from cspnet.evaluate import Scores
from cspnet.train.checkpoint import TrainState

BAD_SHARE = 0.5  # of a group: beyond it the data set is at fault, not an image


class Report:
    """Writes a run's metrics as they come; cuts back what lies after the step it starts from."""

    def __init__(self, folder: Path, state: TrainState, source: Source, console: Console):
        self.folder, self.state, self.source, self.console = folder, state, source, console
        self.unreadable: set[int] = set()
        folder.mkdir(parents=True, exist_ok=True)
        _cut_back(folder / "metrics.jsonl", state.step)
        self._file = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
        self._board = SummaryWriter(str(folder / "tb"), purge_step=state.step + 1)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        total = state.recipe.schedule.steps
        self._task = self._bar.add_task("train", total=total, completed=state.step, numbers="")
        self._restart_clock()

    def __enter__(self) -> "Report":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()
        self._board.close()
        self._file.close()

    def _restart_clock(self) -> None:
        """Validation and saving do not count in images/s."""
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def fetch(self, groups) -> Batch:
        """The next group of the loader; the wait for it is measured, what it lacks is told."""
        start = time.perf_counter()
        group = next(groups)
        self._waited += time.perf_counter() - start
        self._tell_unreadable(group)
        return group

    def step(self, rate: float) -> None:
        """After each optimizer step. Every `log_every` steps the loss is read and written."""
        state = self.state
        self._steps += 1
        self._bar.update(self._task, completed=state.step)
        if state.step % state.recipe.log_every and state.step != state.recipe.schedule.steps:
            return
        loss = float(state.loss_sum) / state.loss_steps  # the host waits here, and only here
        state.loss_sum.zero_()
        state.loss_steps = 0
        seconds = time.perf_counter() - self._since
        speed = self._steps * state.recipe.batch / seconds
        left = (state.recipe.schedule.steps - state.step) * state.recipe.batch / speed
        metrics = {
            "loss": loss,
            "lr": rate,
            "images_per_second": speed,
            "data_wait": self._waited / seconds,
            "memory_gb": _memory_gb(),
            "loss_scale": state.scaler.get_scale(),
        }
        self._write("train", metrics)
        for tag, key in (
            ("train/loss", "loss"),
            ("train/lr", "lr"),
            ("perf/images_per_second", "images_per_second"),
            ("perf/data_wait", "data_wait"),
            ("amp/loss_scale", "loss_scale"),
        ):
            self._board.add_scalar(tag, metrics[key], state.step)
        numbers = (
            f"step {state.step:,}  epoch {state.epoch:.2f}  loss {loss:.4f}  lr {rate:.2e}  "
            f"{speed:,.0f} images/s  {_spell(left)} left"
        )
        self._bar.update(self._task, numbers=numbers)
        if not self.console.is_terminal:
            self.console.print(numbers, highlight=False)
        if not math.isfinite(loss):
            self.console.print(f"[red]the loss at step {state.step:,} is {loss}[/red]")
        self._restart_clock()

    def validation(self, scores: Scores, best: bool) -> None:
        """After a validation."""
        state = self.state
        metrics = {
            "top1": scores.top1,
            "top5": scores.top5,
            "loss": scores.loss,
            "images": scores.images,
        }
        self._write("val", metrics)
        for key in ("top1", "top5", "loss"):
            self._board.add_scalar(f"val/{key}", metrics[key], state.step)
        self._board.flush()
        averaged = " (averaged weights)" if state.average else ""
        self.console.print(
            f"validation at step {state.step:,}: top-1 {scores.top1:.2f} %  "
            f"top-5 {scores.top5:.2f} %  loss {scores.loss:.4f}  "
            f"{scores.images:,} images{averaged}{'  best so far' if best else ''}",
            highlight=False,
        )
        if scores.unreadable:
            self.console.print(f"[red]{scores.unreadable} validation images are unreadable[/red]")
        self._restart_clock()

    def picture(self, name: str, page: np.ndarray) -> None:
        """A picture, uint8 RGB [H, W, 3], for TensorBoard."""
        self._board.add_image(name, page, self.state.step, dataformats="HWC")

    def _write(self, split: str, metrics: dict) -> None:
        state = self.state
        line = {"step": state.step, "epoch": state.epoch, "split": split, **metrics}
        self._file.write(json.dumps(line) + "\n")

    def _tell_unreadable(self, group: Batch) -> None:
        for index in group.unreadable:
            if index in self.unreadable:
                continue
            self.unreadable.add(index)
            name = self.source.name(index)
            with open(self.folder / "unreadable.txt", "a") as file:
                file.write(f"{name}\n")
            if len(self.unreadable) <= 3:
                self.console.print(
                    f"[yellow]unreadable image, another one stands in for it: {name}[/yellow]",
                    highlight=False,
                )
        if len(group.unreadable) > BAD_SHARE * len(group.labels):
            raise DataError(
                f"{len(group.unreadable)} unreadable images in one group of {len(group.labels)}, "
                f"such as {self.source.name(group.unreadable[0])}. They are listed in "
                f"{self.folder / 'unreadable.txt'}; repair the data set, then --resume."
            )


def _cut_back(path: Path, step: int) -> None:
    """Drops the lines after `step`, and a torn last one: the record goes on without a zigzag."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _memory_gb() -> float:
    """Peak of the device memory that torch has reserved, 10^9 bytes; 0 on a CPU."""
    return torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else 0.0


def _spell(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02}h" if days else f"{hours}:{minutes:02}:{seconds:02}"
