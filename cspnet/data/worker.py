"""Initialization of worker processes."""

import multiprocessing
import os
import signal
import threading


def init_worker(*ignored: signal.Signals) -> None:
    """Ignore signals in this worker process, and exit when its parent exits.

    A worker waits for work on a pipe whose other end it holds open, too, so it would never notice
    that its parent was killed. torch's workers compare their parent's PID with the PID they saw at
    their start. That fails if the parent died before the first check.
    """
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
