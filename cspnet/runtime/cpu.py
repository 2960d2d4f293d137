"""The number of CPU cores that this process may use."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC_SELF = Path("/proc/self")


class _CgroupMount(NamedTuple):
    """A mounted cgroup file system, from /proc/self/mountinfo (proc(5))."""

    kind: str  # cgroup (v1) or cgroup2
    options: list[str]
    root: str  # the cgroup that appears at the mount point
    mount_point: Path


def available_cores(process: Path = PROC_SELF) -> int:
    """Number of cores that this process may use, at least 1.

    This is the size of the CPU affinity mask, or the CPU quota of the container, rounded down, if
    that is smaller. Systems other than Linux expose neither; there all CPUs count. `process` is the
    process's directory in /proc.
    """
    if hasattr(os, "sched_getaffinity"):
        available = len(os.sched_getaffinity(0))
    else:
        available = os.cpu_count() or 1
    return max(1, int(min([available, *_quotas(process)])))


def _quotas(process: Path) -> Iterator[float]:
    """CPU quotas of a process's cgroups and their ancestors, in cores.

    cgroup v2 stores them in cpu.max, v1 in cpu.cfs_quota_us and cpu.cfs_period_us (Linux kernel,
    Documentation/admin-guide/cgroup-v2.rst and Documentation/scheduler/sched-bwc.rst).
    """
    mounts = _cgroup_mounts(process)
    for controllers, path in _cgroups(process):
        for kind, options, root, mount_point in mounts:
            is_v2 = kind == "cgroup2" and not controllers
            is_v1 = kind == "cgroup" and "cpu" in controllers and "cpu" in options
            if not (is_v1 or is_v2):
                continue
            # Without a cgroup namespace both paths are relative to the host's root cgroup.
            below = os.path.relpath(path, root) if path.startswith(root) else path.lstrip("/")
            names = [] if ".." in below.split("/") else Path(below).parts
            for depth in range(len(names), -1, -1):
                yield from _quota(mount_point.joinpath(*names[:depth]))


def _quota(cgroup: Path) -> Iterator[float]:
    """The quota of one cgroup in cores, if it is limited."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota = (cgroup / "cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu.cfs_period_us").read_text()
        if float(quota) > 0:  # unlimited: "max" in v2 (a ValueError), -1 in v1
            yield float(quota) / float(period)


def _cgroups(process: Path) -> list[tuple[list[str], str]]:
    """Controllers and path of each cgroup of a process. For v2 the list of controllers is empty."""
    rows = [line.split(":", 2) for line in _lines(process / "cgroup")]
    return [([c for c in row[1].split(",") if c], row[2]) for row in rows if len(row) == 3]


def _cgroup_mounts(process: Path) -> list[_CgroupMount]:
    mounts = []
    for line in _lines(process / "mountinfo"):
        before, _, after = line.partition(" - ")
        fields, (kind, *rest) = before.split(" "), after.split(" ")
        if kind in ("cgroup", "cgroup2") and len(fields) > 4:
            root, mount_point = (_unescape(name) for name in fields[3:5])
            options = rest[-1].split(",") if rest else []
            mounts.append(_CgroupMount(kind, options, root, Path(mount_point)))
    return mounts


def _unescape(name: str) -> str:
    """A path from mountinfo, where blanks and the like are octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda escape: chr(int(escape[1], 8)), name)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux, or no cgroups
        return []
