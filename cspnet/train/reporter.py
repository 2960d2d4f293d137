"""What a run tells while it runs: the record, and its views on the terminal and TensorBoard.

The device is asked for numbers here only, every `log_every` steps.
"""

import math
import os
import resource
import sys
import time
from contextlib import suppress

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from cspnet.console import RunOutput
from cspnet.data.loader import Batch
from cspnet.data.supervision import WorkerMonitor
from cspnet.errors import DataError, SaveError
from cspnet.inference.confusion import to_markdown, worst_pairs
from cspnet.inference.evaluate import Scores
from cspnet.recipe.eta import find_bottleneck, format_duration, format_eta, seconds_left
from cspnet.run.folder import RunFolder
from cspnet.run.metrics_log import MetricsLog, last_line
from cspnet.runtime.cpu import available_cores
from cspnet.runtime.distributed import SINGLE_PROCESS, Processes
from cspnet.sources.data_root import Source, display_names
from cspnet.text import end_sentence, printable
from cspnet.train.state import TrainState
from cspnet.train.tensorboard_log import TensorBoardLog

LONG = 14 * 86_400  # seconds left from which the expected end is printed as a warning
BAD_SHARE = 0.5  # of a group: beyond it the data set is at fault, not an image


class Reporter:
    """Tells a run's metrics as they come; cuts back what lies after the step it starts from.

    Of several processes the first one writes and speaks; the others give it what they alone know.
    """

    def __init__(
        self,
        folder: RunFolder,
        state: TrainState,
        source: Source,
        console: RunOutput,
        world: Processes = SINGLE_PROCESS,
        workers: int = 0,
        monitor: WorkerMonitor | None = None,
    ):
        self.folder, self.state, self.source, self.console = folder, state, source, console
        self._world, self._workers = world, workers
        self._monitor = monitor or WorkerMonitor()
        self._shown_list = printable(str(folder.unreadable_file))
        self.unreadable = folder.read_unreadable()  # of all starts
        self._met: set[str] = set()  # those of this start: what was repaired is no longer met
        self._news: list[str] = []  # unreadable images that only this process knows of
        self.first_step = state.step  # from which this process started
        self._bad_windows = 0
        self._windows = 0  # of this start
        path = folder.metrics_file
        self._record = MetricsLog(path if world.first else None, state.step, state.validated)
        # Events of the last step are purged too where its validation is still to come, and those of
        # training are written again from the record.
        pending = state.validated < state.step
        self._board = TensorBoardLog(
            folder.tensorboard_folder if world.first else None,
            state.step + (not pending),
            lambda text: console.print(text, style="red"),
        )
        line = last_line(path) if pending and world.first else None
        if line and line["step"] == state.step:
            self._board.train(line)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console.console,
            transient=True,
            disable=not console.is_terminal,
        )
        total = state.recipe.schedule.steps
        self._task = self._bar.add_task("train", total=total, completed=state.step, numbers="")
        self.restart_clock()

    def __enter__(self) -> "Reporter":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()
        self._board.close()
        self._record.close()
        if self._monitor.deaths:
            self.console.print(
                f"dataloader workers died {self._monitor.deaths} times",
                style="yellow",
            )
        if self.unreadable:
            self.console.print(
                f"unreadable images so far: {len(self.unreadable):,}, listed in {self._shown_list}",
                style="yellow",
            )

    def restart_clock(self) -> None:
        """Validation and saving do not count in images/s."""
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def fetch(self, groups) -> Batch:
        """The next group of the loader; the wait for it is measured, what it lacks is told."""
        start = time.perf_counter()
        group = next(groups)
        self._waited += time.perf_counter() - start
        self._tell_unreadable(group)
        return group

    def step(self, rate: float | torch.Tensor) -> bool:
        """After each optimizer step. Every `log_every` steps the loss is read and written.

        False where it has not been finite for longer than loss scaling can account for.
        """
        state = self.state
        state.loss_steps += 1
        self._steps += 1
        self._bar.update(self._task, completed=state.step)
        if state.step % state.recipe.log_every and state.step != state.recipe.schedule.steps:
            return True
        self._hear_of_unreadable()
        loss = self._read_loss()
        if math.isfinite(loss):
            self._bad_windows = 0
        else:
            self._bad_windows += 1
            if self._bad_windows >= self._patience():
                return False
            state.bad_step.fill_(-1)
        state.loss_sum.zero_()
        state.loss_steps = 0
        seconds = time.perf_counter() - self._since
        speed = self._steps * state.recipe.batch / seconds
        left = seconds_left(state.recipe, state.step, speed)
        metrics = {
            "loss": loss if math.isfinite(loss) else None,
            "lr": float(rate),
            "images_per_second": speed,
            "data_wait": self._waited / seconds,
            "memory_gb": memory_gb(),
            "loss_scale": state.scaler.get_scale(),
            "skipped": state.step - int(state.updates),
            "unreadable": len(self.unreadable),
        }
        self._write("train", metrics)
        self._board.train({"step": state.step, **metrics})
        self._require_readable()  # after the line: the run may end here, and resume with the next
        numbers = (
            f"step {state.step:,}  epoch {state.epoch:.2f}  loss {loss:.4f}  lr {float(rate):.2e}  "
            f"{speed:,.0f} images/s  {format_duration(left)} left"
        )
        self._bar.update(self._task, numbers=numbers)
        if self.console.is_terminal:
            self.console.log(numbers)
        else:
            self.console.print(numbers)
        self._monitor.reset()
        self._windows += 1
        if self._windows == 2:  # the first one is slower than all others
            self._tell_outlook(metrics, left)
        if not math.isfinite(loss):
            self.console.print(f"the loss at step {state.step:,} is {loss}", style="red")
        self.restart_clock()
        return True

    def _tell_outlook(self, metrics: dict, left: float) -> None:
        """Once, as soon as a run's speed can be told: `cspnet plan` in short."""
        device = self.state.loss_sum.device.type
        own = max(1, available_cores() // self._world.local_size)
        what, remedy = find_bottleneck(metrics["data_wait"], self._workers, own, device)
        self.console.print(
            f"expected end: {format_eta(left)} (in {format_duration(left)}, validation not included)",
            style="red" if left > LONG else None,
        )
        self.console.print(
            f"{metrics['memory_gb']:.1f} GB of memory; held up by {what}"
            + f" ({remedy})" * what.startswith("the loader")
        )

    def unsaved(self, error: SaveError) -> None:
        """After a save that failed, and that the run goes on without."""
        self.console.print(
            f"NOT SAVED at step {self.state.step:,}: {end_sentence(error)} The run continues and "
            "tries again at the next save: check the disk, free some space.",
            style="bold red",
        )

    def _read_loss(self) -> float:
        """Mean loss since the last line. The host waits for the device here, and only here."""
        return float(self.state.loss_sum) / self.state.loss_steps

    def _patience(self) -> int:
        """Windows with a loss that is not finite before the run ends: loss scaling skips steps."""
        return 3 if self.state.scaler.is_enabled() else 1

    def validation(self, scores: Scores, best: bool) -> None:
        """After a validation."""
        state = self.state
        metrics = {
            "top1": scores.top1,
            "top5": scores.top5,
            "loss": scores.loss,
            "images": scores.images,
            "memory_gb": memory_gb(),
        }
        self._write("val", metrics)
        confused = ""
        if scores.confusion is not None and scores.top1 < 100 and self._world.first:
            names = display_names(self.source.classes)
            confused = to_markdown(worst_pairs(scores.confusion, names))
        self._board.validation(metrics, state.step, confused)
        averaged = " (averaged weights)" if state.average else ""
        self.console.print(
            f"validation at step {state.step:,}: top-1 {scores.top1:.2f} %  "
            f"top-5 {scores.top5:.2f} %  loss {scores.loss:.4f}  "
            f"{scores.images:,} images{averaged}{'  best so far' if best else ''}"
        )
        if scores.unreadable:
            self.console.print(
                f"{scores.unreadable} validation images are unreadable and count as black ones",
                style="red",
            )
        self.restart_clock()

    def picture(self, name: str, page: np.ndarray) -> None:
        """A picture, uint8 RGB [H, W, 3], for TensorBoard."""
        self._board.picture(name, page, self.state.step)

    def _write(self, split: str, metrics: dict) -> None:
        state = self.state
        self._record.write({"step": state.step, "epoch": state.epoch, "split": split, **metrics})

    def flush(self) -> None:
        """Brings the record to the disk: it is never behind a checkpoint. Raises SaveError."""
        self._record.flush()

    def _tell_unreadable(self, group: Batch) -> None:
        for index in group.unreadable:
            self._note_unreadable(self.source.name(index))
        if group.replaced > BAD_SHARE * len(group.labels):
            raise DataError(
                f"{group.replaced} unreadable images in one group of {len(group.labels)}, "
                f"such as {printable(self.source.name(group.unreadable[0]))}. They are listed in "
                f"{self._shown_list}; repair the files under their names, then --resume."
            )
        self._require_readable()

    def _hear_of_unreadable(self) -> None:
        """Takes over what the other processes have met since the last line."""
        for names in self._world.gather(self._news):
            for name in names:
                self._note_unreadable(name)
        self._news.clear()

    def _note_unreadable(self, name: str) -> None:
        # The data root may be relative now, and absolute after a resume from another directory.
        name = os.path.abspath(name)
        if name in self._met:
            return
        self._met.add(name)
        self._news.append(name)
        if name not in self.unreadable:
            self.unreadable.add(name)
            if self._world.first:
                with suppress(OSError):
                    self.folder.append_unreadable(name)
        if len(self._met) <= 3:
            self.console.print(
                f"unreadable image, the next one stands in for it: {printable(name)}",
                style="yellow",
            )

    def _require_readable(self) -> None:
        most = self.state.recipe.data.max_unreadable
        if len(self._met) > most * len(self.source):
            raise DataError(
                f"{len(self._met):,} of {len(self.source):,} training images are unreadable "
                f"so far, more than data.max_unreadable={most:g} of them. They are listed in "
                f"{self._shown_list}; repair the files under their names, or allow more, then "
                "--resume."
            )


def memory_gb() -> float:
    """Peak so far, 10^9 bytes: of device memory that torch has reserved, or of the process."""
    if torch.cuda.is_initialized():  # a GPU may be there and not be used
        return torch.cuda.max_memory_reserved() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
