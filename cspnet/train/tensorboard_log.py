"""TensorBoard events of a run. They repeat metrics.jsonl, so a full disk may end them."""

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
    """Writes events to a folder, and hides earlier ones from `purge_step` on.

    If they cannot be written, `warn` is called once, and the run continues. Without a folder,
    nothing is written.
    """

    def __init__(self, folder: Path | None, purge_step: int, warn: Callable[[str], None]):
        self._warn = warn
        self._writer: SummaryWriter | None = None
        # The writer's thread would print a traceback if the disk is full.
        self._hook, threading.excepthook = threading.excepthook, self._on_thread_error
        with self._guarded():
            if folder is not None:
                self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def train(self, metrics: dict) -> None:
        """Add training metrics as scalars."""
        self._scalars({TAGS[k]: v for k, v in metrics.items() if k in TAGS}, metrics["step"])

    def validation(self, metrics: dict, step: int, confused: str = "") -> None:
        """Add validation metrics as scalars, and the most confused classes as Markdown."""
        self._scalars({f"val/{key}": metrics[key] for key in ("top1", "top5", "loss")}, step)
        with self._guarded():
            if self._writer:
                if confused:
                    self._writer.add_text("val/confused", confused, step)
                self._writer.flush()

    def image(self, name: str, page: np.ndarray, step: int) -> None:
        """Add an image, uint8 RGB [H, W, 3]."""
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
            reason = getattr(error, "strerror", "the path is not UTF-8")
            self._warn(
                f"TensorBoard events cannot be written ({reason}) and are off until the next "
                "start; metrics.jsonl has all metrics"
            )

    def _on_thread_error(self, event: threading.ExceptHookArgs) -> None:
        if not issubclass(event.exc_type, OSError):
            self._hook(event)
