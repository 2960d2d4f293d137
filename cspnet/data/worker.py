"""Processes that decode: how many there may be, and what each does first.

It leaves signals to the main one, and ends with it.
"""

import multiprocessing
import os
import signal
import threading


def cores() -> int:
    """Cores that this process may use; of those that there are only Linux tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def begin(*ignored: signal.Signals) -> None:
    """Makes this process a worker, which only its main process ends, by whatever end of its own.

    A worker waits for work on a pipe that it holds open itself, so it would outlive a kill of the
    main process for ever. torch's workers compare the number of their parent with the one that they
    started with; where the kill came before they looked, that is already the wrong one.
    """
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
