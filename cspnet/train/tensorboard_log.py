"""TensorBoard's view of a run. Where the disk will not take it, the record has all of it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

TAGS = {
    "loss": "train/loss",
    "lr": "train/lr",
    "images_per_second": "perf/images_per_second",
    "data_wait": "perf/data_wait",
    "loss_scale": "amp/loss_scale",
    "skipped": "amp/skipped",
}


class TensorBoardLog:
    """Events in a folder, older ones from `purge_step` on hidden; `tell` gets why they end.

    Without a folder, there are none.
    """

    def __init__(self, folder: Path | None, purge_step: int, tell: Callable[[str], None]):
        self._tell = tell
        self._writer: SummaryWriter | None = None
        # The writer's thread would print a traceback when the disk is full.
        self._hook, threading.excepthook = threading.excepthook, self._hear
        with self._guarded():
            if folder is not None:
                self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def train(self, metrics: dict) -> None:
        """A line of training as scalars."""
        self._scalars({TAGS[k]: v for k, v in metrics.items() if k in TAGS}, metrics["step"])

    def validation(self, metrics: dict, step: int, confused: str = "") -> None:
        """A line of validation as scalars, and what it confused most, as Markdown."""
        self._scalars({f"val/{key}": metrics[key] for key in ("top1", "top5", "loss")}, step)
        with self._guarded():
            if self._writer:
                if confused:
                    self._writer.add_text("val/confused", confused, step)
                self._writer.flush()

    def picture(self, name: str, page: np.ndarray, step: int) -> None:
        """A picture, uint8 RGB [H, W, 3]."""
        with self._guarded():
            if self._writer:
                self._writer.add_image(name, page, step, dataformats="HWC")

    def close(self) -> None:
        with suppress(OSError):
            if self._writer:
                self._writer.close()
        threading.excepthook = self._hook

    def _scalars(self, values: dict[str, float | None], step: int) -> None:
        with self._guarded():
            for tag, value in values.items():
                if self._writer and value is not None:
                    self._writer.add_scalar(tag, value, step)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UnicodeError) as error:
            self._writer = None
            why = getattr(error, "strerror", "its path is not UTF-8")
            self._tell(
                f"TensorBoard's events cannot be written ({why}): none until the next start; "
                "metrics.jsonl has them all"
            )

    def _hear(self, event: threading.ExceptHookArgs) -> None:
        if not issubclass(event.exc_type, OSError):
            self._hook(event)
