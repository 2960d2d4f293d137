"""Stopping a run between two steps, after a signal or a time limit."""

import contextlib
import math
import signal
import time
from typing import Any


class StopRequest(contextlib.AbstractContextManager):
    """Turns signals and a time limit into a request that the training loop polls.

    Handles SIGINT, SIGTERM, SIGHUP (terminal closed or connection lost) and SIGUSR1, by which Slurm
    announces its time limit. A second SIGINT raises KeyboardInterrupt at once. The time limit of
    `hours` counts from the construction of this object.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, hours: float | None = None):
        self.signal: str | None = None  # name of the first signal received
        self._hours = hours
        self._previous: list[dict[signal.Signals, Any]] = []  # handlers to restore, by `with` block
        self._deadline = math.inf if hours is None else time.monotonic() + 3600 * hours

    @property
    def requested(self) -> str | None:
        """Why the run should stop: the name of a signal or the time limit; None to continue."""
        if self.signal is None and time.monotonic() >= self._deadline:
            return f"--max-hours {self._hours:g}"
        return self.signal

    def request(self, reason: str) -> None:
        """Request a stop after the current step for a reason other than a signal."""
        self.signal = self.signal or reason

    def __enter__(self) -> "StopRequest":
        # Signals that the parent ignores (nohup, background job of a shell) stay ignored.
        handled = [n for n in self.SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        self._previous.append({number: signal.signal(number, self._handle) for number in handled})
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.pop().items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
