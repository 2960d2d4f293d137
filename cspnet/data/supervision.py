"""Dataloader workers that die are replaced; where none can be started, the main process decodes.

torch notices a dead worker by SIGCHLD and raises in whatever code runs at that moment, which may be
the middle of an optimizer step or of a save. Here the exception is held back until the main process
waits for a batch: the only place where workers can be replaced without losing anything.
"""

import contextlib
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

from torch.utils.data import DataLoader

from cspnet.errors import WorkersFailedError

MOST_DEATHS = 3  # of workers, before `reset` is called
SHUTDOWN_SECONDS = 12  # longer than twice the interval at which torch's threads look around
TORCHS_WORDS = "DataLoader worker (pid"  # how its own message of a dead worker begins


class WorkerMonitor:
    """Reports and counts the deaths of dataloader workers.

    `report` gets a line for each event. The third death since the last `reset` calls `give_up` with
    the reason, which raises WorkersLost unless another function is given.
    """

    def __init__(
        self,
        report: Callable[[str], None] | None = None,
        give_up: Callable[[str], None] | None = None,
    ):
        self.deaths = 0  # in all
        self._recent = 0  # since the last reset
        self._report = report or _report_to_stderr
        self._give_up = give_up or _raise_workers_lost

    def reset(self) -> None:
        """Begins a new interval for the count."""
        self._recent = 0

    def died(self, reason: str) -> None:
        """A worker died; returns where the workers are to be started again."""
        self.deaths += 1
        self._recent += 1
        if self._recent >= MOST_DEATHS:
            self._give_up(
                f"dataloader workers died {self._recent} times in a short time, the last one: "
                f"{reason}. If the machine is short of memory, use fewer --workers"
            )
        if self._recent >= 3 * MOST_DEATHS:  # `give_up` only asks for a stop
            _raise_workers_lost(reason)
        self._report(
            f"{reason}; the workers are started again at the same position, nothing is lost "
            f"({self.deaths} so far)"
        )

    def unavailable(self, reason: str) -> None:
        """No worker can be started."""
        self._report(
            f"no dataloader worker can be started ({reason}): the main process decodes the images, "
            "which is slower. In a container, check /dev/shm (docker run --shm-size=1g)"
        )


def _report_to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _raise_workers_lost(reason: str) -> None:
    raise WorkersFailedError(reason)


def supervised(
    make: Callable[[int, bool], DataLoader], total: int, workers: int, monitor: WorkerMonitor
) -> Generator[Any, None, None]:
    """The items of a DataLoader, 0 … total - 1, whatever happens to its workers.

    `make(start, with_workers)` returns a DataLoader of the items from `start` on. Closing the
    generator ends the workers.
    """
    done = 0
    while done < total:
        iterator = death = None
        try:
            iterator = _start(make(done, workers > 0))
            while done < total:
                item = _next(iterator)
                done += 1
                yield item
                del item  # its memory is used again once nobody holds it
        except OSError as error:
            if iterator is not None:
                raise
            # No semaphores, no room for them, or no memory for a process.
            monitor.unavailable(error.strerror or str(error))
            workers = 0
        except RuntimeError as error:
            if iterator is None and "can't start new thread" in str(error):
                monitor.unavailable(str(error))
                workers = 0
                continue
            if not isinstance(error, _WorkerDied) and not str(error).startswith(TORCHS_WORDS):
                raise
            death = _death(iterator) or str(error).partition("\n")[0].rstrip(". ")
        finally:
            _end(iterator, death is not None)
            del iterator
        if death:  # outside of the handler: its traceback would keep the iterator's memory
            monitor.died(death)


def _start(loader: DataLoader) -> Iterator:
    """An iterator of the loader, which ends its workers if it cannot start all. OSError."""
    before = set(multiprocessing.active_children())
    try:
        iterator = iter(loader)
    except (OSError, RuntimeError) as error:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
            process.join()
        # torch's half-made iterator, which the traceback keeps alive, prints errors as it goes.
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        error.__traceback__ = None
        sys.unraisablehook = hook
        raise
    _open.append(iterator)
    _hold_back_sigchld()
    return iterator


def _end(iterator: Iterator | None, after_death: bool = False) -> None:
    """Ends the workers of an iterator.

    A worker that died may have left half a message in the queue, for whose rest torch's pin-memory
    thread waits for ever, and torch for that thread: after a death this is not waited for.
    """
    # Left to the interpreter's exit, they would be sent SIGTERM, which they ignore.
    _open[:] = [other for other in _open if other is not iterator]
    processes = getattr(iterator, "_workers", [])
    if not processes:
        return
    if after_death:
        for process in processes:
            process.kill()
            process.join()
        shutdown = threading.Thread(target=iterator._shutdown_workers, daemon=True)
        shutdown.start()
        shutdown.join(SHUTDOWN_SECONDS)
        if shutdown.is_alive():
            iterator._worker_result_queue.cancel_join_thread()  # nor does the process's exit wait
        return
    with contextlib.suppress(RuntimeError):  # a death meanwhile
        iterator._shutdown_workers()
    for process in processes:
        if process.is_alive():  # it hangs: perhaps at a lock that a dead one holds
            process.kill()


_open: list[Iterator] = []


def end_all() -> None:
    """Ends the workers of every iterator that was never closed."""
    for iterator in list(_open):
        _end(iterator)


_awaited: Iterator | None = None  # the iterator whose next item the main thread waits for


class _WorkerDied(RuntimeError):
    """A worker of the awaited iterator has ended otherwise than by itself."""


def _next(iterator: Iterator) -> Any:
    """The iterator's next item. Raises _WorkerDied."""
    global _awaited
    if threading.current_thread() is not threading.main_thread():
        return next(iterator)  # torch looks at its workers every few seconds
    _awaited = iterator
    try:
        _require_alive(iterator)
        return next(iterator)
    finally:
        _awaited = None


def _require_alive(iterator: Iterator) -> None:
    if death := _death(iterator):
        raise _WorkerDied(death)


def _death(iterator: Iterator) -> str | None:
    """How a worker of the iterator has died; None where none has."""
    for process in getattr(iterator, "_workers", []):
        code = process.exitcode  # None: it is alive; 0: it ended after its last batch
        if code:
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
            )
            return f"dataloader worker (pid {process.pid}) {how}"
    return None


def _hold_back_sigchld() -> None:
    """Takes SIGCHLD from torch: its handler raises in whatever code runs at that moment."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, _on_sigchld)


def _on_sigchld(number: int, frame: Any) -> None:
    if _awaited is not None:
        _require_alive(_awaited)
