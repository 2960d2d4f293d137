"""Processes that decode: how many there may be, and what each does first.

It leaves signals to the main one, and ends with it.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

SELF = Path("/proc/self")


def cores(process: Path = SELF) -> int:
    """Cores that this process may use, at least one.

    The CPUs of its affinity mask, or fewer where a container has a CPU quota, rounded down. Only
    Linux tells either; elsewhere all CPUs count. `process` is its folder below /proc.
    """
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([own, *_quotas(process)])))


def _quotas(process: Path) -> Iterator[float]:
    """CPU quotas of the cgroups that a process is in, and of those above them, in cores.

    Of cgroup v2 from cpu.max, of v1 from cpu.cfs_quota_us and cpu.cfs_period_us (the kernel's
    Documentation/admin-guide/cgroup-v2.rst, Documentation/scheduler/sched-bwc.rst).
    """
    for controllers, path in _cgroups(process):
        for kind, options, top, mount in _mounts(process):
            v2 = kind == "cgroup2" and not controllers
            if not (v2 or (kind == "cgroup" and "cpu" in controllers and "cpu" in options)):
                continue
            # Without a cgroup namespace the path is that of the host, and so is the mount's top.
            inner = os.path.relpath(path, top) if path.startswith(top) else path.lstrip("/")
            parts = [] if ".." in inner.split("/") else Path(inner).parts
            for depth in range(len(parts), -1, -1):
                yield from _quota(mount.joinpath(*parts[:depth]))


def _quota(group: Path) -> Iterator[float]:
    """The quota of one cgroup, if it has one."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        if float(quota) > 0:  # "max" and -1: none
            yield float(quota) / float(period)


def _cgroups(process: Path) -> list[tuple[list[str], str]]:
    """Controllers and path of each cgroup of a process; v2 has no controllers there."""
    lines = [line.split(":", 2) for line in _lines(process / "cgroup")]
    return [([c for c in parts[1].split(",") if c], parts[2]) for parts in lines if len(parts) == 3]


def _mounts(process: Path) -> list[tuple[str, list[str], str, Path]]:
    """Kind, options, top cgroup and place of each mounted cgroup file system (proc(5))."""
    found = []
    for line in _lines(process / "mountinfo"):
        before, _, after = line.partition(" - ")
        fields, (kind, *rest) = before.split(" "), after.split(" ")
        if kind in ("cgroup", "cgroup2") and len(fields) > 4:
            top, place = (
                re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), name)
                for name in fields[3:5]
            )
            found.append((kind, rest[-1].split(",") if rest else [], top, Path(place)))
    return found


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux, or no cgroups
        return []


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
