"""Progress of a run: metrics.jsonl, TensorBoard and the terminal.

It only reports; the training loop fetches batches and decides whether the run continues.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from cspnet.data.supervision import WorkerMonitor
from cspnet.errors import SaveError
from cspnet.inference.confusion import to_markdown, worst_pairs
from cspnet.inference.evaluate import Scores
from cspnet.recipe.eta import find_bottleneck, format_duration, format_eta, seconds_left
from cspnet.run.metrics_log import MetricsLog, last_line
from cspnet.runtime.cpu import available_cores
from cspnet.runtime.memory import peak_memory_gb
from cspnet.sources.data_root import display_names
from cspnet.text import end_sentence
from cspnet.train.setup import Run
from cspnet.train.state import TrainState
from cspnet.train.tensorboard_log import TensorBoardLog
from cspnet.train.unreadable import UnreadableImages

LONG = 14 * 86_400  # seconds left beyond which the expected end is printed as a warning


class Reporter:
    """Writes and prints the metrics of a run from the step on that the state is at.

    In processes other than the main one, it writes no files. Times between two log lines do not
    include validations and saves: `restart_clock` follows these.
    """

    def __init__(
        self, run: Run, state: TrainState, unreadable: UnreadableImages, monitor: WorkerMonitor
    ):
        self._run, self._state, self._output = run, state, run.output
        self._unreadable, self._monitor = unreadable, monitor
        self._lines_logged = 0  # by this process
        is_main, path = run.processes.is_main, run.folder.metrics_file
        self._record = MetricsLog(path if is_main else None, state.step, state.validated_step)
        # If the validation of the current step is still to come, TensorBoard's events of this step
        # are purged, too, and its training metrics are written again.
        pending = state.validated_step < state.step
        self._board = TensorBoardLog(
            run.folder.tensorboard_folder if is_main else None,
            state.step + (not pending),
            lambda text: run.output.print(text, style="red"),
        )
        line = last_line(path) if pending and is_main else None
        if line and line["step"] == state.step:
            self._board.train(line)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=run.output.console,
            transient=True,
            disable=not run.output.is_terminal,
        )
        total = run.recipe.schedule.steps
        self._task = self._bar.add_task("train", total=total, completed=state.step, numbers="")
        self.restart_clock()

    def __enter__(self) -> "Reporter":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._board.close()
        self._record.close()
        if self._monitor.deaths:
            self._output.print(
                f"dataloader workers died {self._monitor.deaths} times", style="yellow"
            )
        if names := self._unreadable.names:
            self._output.print(
                f"unreadable images so far: {len(names):,}, listed in "
                f"{self._unreadable.shown_path}",
                style="yellow",
            )

    def restart_clock(self) -> None:
        """Start a new interval for the throughput."""
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time of the block as a wait for the dataloader."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def step(self) -> None:
        """Count an optimizer step."""
        self._steps += 1
        self._bar.update(self._task, completed=self._state.step)

    def log(self, loss: float, lr: float | torch.Tensor) -> None:
        """Write and print the metrics of the steps since the last call; `loss` is their mean."""
        metrics = self._measure(loss, float(lr))
        left = seconds_left(self._run.recipe, self._state.step, metrics["images_per_second"])
        self._write("train", metrics)
        self._board.train({"step": self._state.step, **metrics})
        self._print_progress(loss, metrics, left)
        self._monitor.reset()
        self._lines_logged += 1
        if self._lines_logged == 2:  # the first interval is slower than all others
            self._print_outlook(metrics, left)
        if not math.isfinite(loss):
            self._output.print(f"the loss at step {self._state.step:,} is {loss}", style="red")
        self.restart_clock()

    def _measure(self, loss: float, lr: float) -> dict:
        """The metrics of the current interval."""
        state, seconds = self._state, time.perf_counter() - self._since
        return {
            "loss": loss if math.isfinite(loss) else None,
            "lr": lr,
            "images_per_second": self._steps * self._run.recipe.batch / seconds,
            "data_wait": self._waited / seconds,
            "memory_gb": peak_memory_gb(),
            "loss_scale": state.scaler.get_scale(),
            "skipped": state.step - int(state.updates),
            "unreadable": len(self._unreadable.names),
        }

    def _print_progress(self, loss: float, metrics: dict, left: float) -> None:
        """Print a line; on a terminal it is part of the progress bar."""
        numbers = (
            f"step {self._state.step:,}  epoch {self._epoch:.2f}  loss {loss:.4f}  "
            f"lr {metrics['lr']:.2e}  {metrics['images_per_second']:,.0f} images/s  "
            f"{format_duration(left)} left"
        )
        self._bar.update(self._task, numbers=numbers)
        if self._output.is_terminal:
            self._output.log(numbers)
        else:
            self._output.print(numbers)

    def _print_outlook(self, metrics: dict, left: float) -> None:
        """Print the expected end and the bottleneck, once the throughput is known."""
        hardware = self._run.hardware
        own_cores = max(1, available_cores() // self._run.processes.local_size)
        bottleneck, advice = find_bottleneck(
            metrics["data_wait"], hardware.workers, own_cores, hardware.device.type
        )
        self._output.print(
            f"expected end: {format_eta(left)} (in {format_duration(left)}, without validations)",
            style="red" if left > LONG else None,
        )
        self._output.print(
            f"peak memory {metrics['memory_gb']:.1f} GB; bottleneck: {bottleneck}"
            + f": {advice}" * bottleneck.startswith("the dataloader")
        )

    def save_failed(self, error: SaveError) -> None:
        """Print that a save failed, after which the run continues."""
        self._output.print(
            f"NOT SAVED at step {self._state.step:,}: {end_sentence(error)} The run continues and "
            "tries again at the next save. Check the disk and free some space.",
            style="bold red",
        )

    def validation(self, scores: Scores, is_best: bool) -> None:
        """Write and print the scores of a validation."""
        state = self._state
        metrics = {
            "top1": scores.top1,
            "top5": scores.top5,
            "loss": scores.loss,
            "images": scores.images,
            "memory_gb": peak_memory_gb(),
        }
        self._write("val", metrics)
        confused = ""
        if scores.confusion is not None and scores.top1 < 100 and self._run.processes.is_main:
            names = display_names(self._run.train_set.classes)
            confused = to_markdown(worst_pairs(scores.confusion, names))
        self._board.validation(metrics, state.step, confused)
        weights = " (EMA weights)" if state.ema else ""
        self._output.print(
            f"validation at step {state.step:,}: top-1 {scores.top1:.2f} %  "
            f"top-5 {scores.top5:.2f} %  loss {scores.loss:.4f}  "
            f"{scores.images:,} images{weights}{'  best so far' if is_best else ''}"
        )
        if scores.unreadable:
            self._output.print(
                f"{scores.unreadable} validation images are unreadable and were evaluated as black",
                style="red",
            )
        self.restart_clock()

    def image(self, name: str, page: np.ndarray) -> None:
        """Add an image, uint8 RGB [H, W, 3], to TensorBoard."""
        self._board.image(name, page, self._state.step)

    def flush(self) -> None:
        """Write metrics.jsonl to the disk, so that it never lags a checkpoint. SaveError."""
        self._record.flush()

    @property
    def _epoch(self) -> float:
        return self._run.identity.epoch(self._state.step)

    def _write(self, split: str, metrics: dict) -> None:
        step = self._state.step
        self._record.write({"step": step, "epoch": self._epoch, "split": split, **metrics})
