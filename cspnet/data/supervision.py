"""Restart dataloader workers that die; without workers, decode in the main process.

torch detects a dead worker through SIGCHLD and raises an exception in the code that is running,
such as an optimizer step or a save. Here the exception is deferred until the main process waits for
a batch. Only there can workers be restarted without losing anything.
"""

import contextlib
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from cspnet.errors import WorkersFailedError

MAX_DEATHS = 3  # deaths of workers between two calls of `reset` that make the monitor give up
SHUTDOWN_TIMEOUT = 12  # seconds, more than twice the polling interval of torch's threads
TORCH_DEATH_MESSAGE = "DataLoader worker (pid"  # prefix of torch's own error about a dead worker


class WorkerMonitor:
    """Counts and reports the deaths of dataloader workers.

    `report` receives one line per event. `give_up` receives the reason when MAX_DEATHS workers have
    died since the last `reset`; by default it raises WorkersFailedError.
    """

    def __init__(
        self,
        report: Callable[[str], None] | None = None,
        give_up: Callable[[str], None] | None = None,
    ):
        self.deaths = 0  # in total
        self._recent_deaths = 0  # since the last reset
        self._report = report or _report_to_stderr
        self._give_up = give_up or _raise_workers_failed

    def reset(self) -> None:
        """Start a new interval for the limit on deaths."""
        self._recent_deaths = 0

    def worker_died(self, reason: str) -> None:
        """Record a death. Returns if the workers should be restarted; otherwise see `give_up`."""
        self.deaths += 1
        self._recent_deaths += 1
        if self._recent_deaths >= MAX_DEATHS:
            self._give_up(
                f"dataloader workers died {self._recent_deaths} times in a short time. Last death: "
                f"{reason}. If memory is low, reduce --workers"
            )
        if self._recent_deaths >= 3 * MAX_DEATHS:  # a `give_up` that returns only requests a stop
            _raise_workers_failed(reason)
        self._report(
            f"{reason}; restarting the workers at the same position, no data is lost "
            f"({self.deaths} deaths so far)"
        )

    def workers_unavailable(self, reason: str) -> None:
        """Report that no worker can be started."""
        self._report(
            f"cannot start dataloader workers ({reason}): the main process decodes the images, "
            "which is slower. In a container, check the size of /dev/shm (docker run --shm-size=1g)"
        )


def _report_to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _raise_workers_failed(reason: str) -> None:
    raise WorkersFailedError(reason)


def supervised_items(
    make_loader: Callable[[int, bool], DataLoader],
    total: int,
    workers: int,
    monitor: WorkerMonitor,
) -> Generator[Any, None, None]:
    """Items 0 … total - 1 of a DataLoader, across deaths of its workers.

    `make_loader(start, with_workers)` returns a DataLoader of the items from `start` on. Closing
    the generator shuts down the workers.
    """
    done = 0
    while done < total:
        iterator: _BaseDataLoaderIter | None = None
        death: str | None = None
        try:
            iterator = _start(make_loader(done, workers > 0))
            while done < total:
                item = _next(iterator)
                done += 1
                yield item
                del item  # so that its buffer can be reused
        except OSError as error:
            if iterator is not None:
                raise
            # Semaphores are missing or /dev/shm is full, or there is no memory for a process.
            monitor.workers_unavailable(error.strerror or str(error))
            workers = 0
        except RuntimeError as error:
            if iterator is None and "can't start new thread" in str(error):
                monitor.workers_unavailable(str(error))
                workers = 0
                continue
            if not isinstance(error, _WorkerDied) and not str(error).startswith(
                TORCH_DEATH_MESSAGE
            ):
                raise
            death = _death(iterator) or str(error).partition("\n")[0].rstrip(". ")
        finally:
            _shut_down(iterator, death is not None)
            del iterator
        if death:  # outside the handler, whose traceback would keep the iterator's memory alive
            monitor.worker_died(death)


def _start(loader: DataLoader) -> _BaseDataLoaderIter:
    """Start iterating over a loader. If a worker cannot be started, end the others and re-raise."""
    before = set(multiprocessing.active_children())
    try:
        iterator = iter(loader)
    except (OSError, RuntimeError) as error:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
            process.join()
        # Dropping the traceback deletes torch's incomplete iterator, which prints errors then.
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        error.__traceback__ = None
        sys.unraisablehook = hook
        raise
    _open_iterators.append(iterator)
    _take_over_sigchld()
    return iterator


def _workers(iterator: _BaseDataLoaderIter | None) -> Sequence[BaseProcess]:
    return iterator._workers if isinstance(iterator, _MultiProcessingDataLoaderIter) else []


def _shut_down(iterator: _BaseDataLoaderIter | None, after_death: bool = False) -> None:
    """End the workers of an iterator.

    A worker that died may have left an incomplete message in the queue. torch's pin-memory thread
    then waits forever for the rest, and torch's shutdown for that thread. So after a death this
    waits SHUTDOWN_TIMEOUT seconds at most.
    """
    _open_iterators[:] = [other for other in _open_iterators if other is not iterator]
    if not isinstance(iterator, _MultiProcessingDataLoaderIter) or not iterator._workers:
        return
    if after_death:
        for process in iterator._workers:
            process.kill()
            process.join()
        shutdown = threading.Thread(target=iterator._shutdown_workers, daemon=True)
        shutdown.start()
        shutdown.join(SHUTDOWN_TIMEOUT)
        if shutdown.is_alive():
            iterator._worker_result_queue.cancel_join_thread()  # do not block at exit either
        return
    processes = iterator._workers
    with contextlib.suppress(RuntimeError):  # a worker died in the meantime
        iterator._shutdown_workers()
    for process in processes:
        if process.is_alive():  # it hangs, perhaps at a lock that a dead worker holds
            process.kill()


# Iterators with running workers. The interpreter's exit would send the workers SIGTERM, which they
# ignore, and wait for them forever.
_open_iterators: list[_BaseDataLoaderIter] = []


def shut_down_all() -> None:
    """End the workers of all iterators that were never closed."""
    for iterator in list(_open_iterators):
        _shut_down(iterator)


# The iterator whose next item the main thread waits for.
_awaited: _BaseDataLoaderIter | None = None


class _WorkerDied(RuntimeError):
    """A worker of the awaited iterator died."""


def _next(iterator: _BaseDataLoaderIter) -> Any:
    """The iterator's next item. Raises _WorkerDied."""
    global _awaited
    if threading.current_thread() is not threading.main_thread():
        return next(iterator)  # without signals: torch polls its workers every few seconds
    _awaited = iterator
    try:
        _require_alive(iterator)
        return next(iterator)
    finally:
        _awaited = None


def _require_alive(iterator: _BaseDataLoaderIter) -> None:
    if death := _death(iterator):
        raise _WorkerDied(death)


def _death(iterator: _BaseDataLoaderIter | None) -> str | None:
    """How a worker of the iterator died, or None if none has."""
    for process in _workers(iterator):
        code = process.exitcode  # None: alive; 0: finished after its last batch
        if code:
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
            )
            return f"dataloader worker (pid {process.pid}) {how}"
    return None


def _take_over_sigchld() -> None:
    """Replace torch's SIGCHLD handler, which raises an exception at an arbitrary point."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, _on_sigchld)


def _on_sigchld(number: int, frame: Any) -> None:
    if _awaited is not None:
        _require_alive(_awaited)
