"""The number of usable cores: CPU affinity and cgroup quotas."""

import os

import pytest

from cspnet.runtime import cpu


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A fake machine with 16 cores, /proc/self and cgroups; returns the number of usable cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    process = tmp_path / "proc"
    process.mkdir()

    def cores(mounts, groups, files):
        lines = [
            f"31 23 0:28 {top} {tmp_path / mount_point} rw - {kind} {kind} rw,{options}\n"
            for kind, options, top, mount_point in mounts
        ]
        (process / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda rw\n" + "".join(lines))
        (process / "cgroup").write_text("\n".join(groups) + "\n")
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        return cpu.available_cores(process)

    return cores


V2 = [("cgroup2", "", "/", "fs")]
V1 = [("cgroup", "cpu,cpuacct", "/", "cpu"), ("cgroup", "memory", "/", "memory")]


@pytest.mark.parametrize(
    "quota, cores",
    [
        ("max 100000", 16),
        ("400000 100000", 4),
        ("399999 100000", 3),
        ("50000 100000", 1),
        ("150000 50000", 3),
        ("3200000 100000", 16),
        ("nonsense", 16),
        ("", 16),
        ("100000 0", 16),
    ],
)
def test_cgroup_v2_quota_is_rounded_down_to_at_least_one(system, quota, cores):
    assert system(V2, ["0::/"], {"fs/cpu.max": quota}) == cores


def test_smallest_quota_of_nested_cgroups_applies(system):
    files = {
        "fs/a/cpu.max": "600000 100000",
        "fs/a/b/cpu.max": "max 100000",
        "fs/a/b/c/cpu.max": "900000 100000",
        "fs/other/cpu.max": "100000 100000",
    }
    assert system(V2, ["0::/a/b/c"], files) == 6
    assert system(V2, ["0::/a/b/gone"], {}) == 6
    assert system(V2, ["0::/"], {}) == 16


def test_cgroup_v1_quota_and_period(system):
    files = {"cpu/a/b/cpu.cfs_quota_us": "250000", "cpu/a/b/cpu.cfs_period_us": "100000"}
    files |= {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}
    groups = ["4:cpu,cpuacct:/a/b", "3:memory:/x", "1:name=systemd:/a"]
    assert system(V1, groups, files) == 2
    assert system(V1, ["4:cpu,cpuacct:/a", "3:memory:/a/b"], {}) == 16
    hybrid = [*V1, ("cgroup2", "", "/", "unified")]
    assert system(hybrid, [*groups, "0::/"], {}) == 2


def test_container_without_cgroup_namespace(system):
    """Docker with cgroup v1: the root of the mount is the container's own cgroup."""
    mounts = [("cgroup", "cpu", "/docker/12ab", "cpu")]
    files = {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}
    assert system(mounts, ["4:cpu:/docker/12ab"], files) == 2
    assert system(mounts, ["4:cpu:/docker/12ab/inner"], files) == 2
    assert system(mounts, ["4:cpu:/docker/12abc"], files) == 2
    assert (
        system([("cgroup2", "", "/", "fs")], ["0::/../other"], {"fs/cpu.max": "300000 100000"}) == 3
    )


def test_cpu_affinity_applies_without_cgroups(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    assert cpu.available_cores(tmp_path / "none") == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cpu.available_cores(tmp_path / "none") == os.cpu_count()


def test_mount_paths_with_blanks(system, tmp_path):
    (tmp_path / "with blank").mkdir()
    (tmp_path / "with blank" / "cpu.max").write_text("200000 100000\n")
    assert system([("cgroup2", "", "/", "with\\040blank")], ["0::/"], {}) == 2
