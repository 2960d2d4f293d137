"""Atomic replacement of files, and the rule that nothing else in the package does it."""

import os
import re
import stat

import pytest

from cspnet.files import nearest_existing_directory, replace_bytes, replace_file, replace_text
from cspnet.run.folder import RunFolder
from tests.conftest import ROOT

PACKAGE = ROOT / "cspnet"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_with_the_permissions_of_the_umask(tmp_path, durable):
    file = tmp_path / "file"
    before = os.umask(0o027)
    try:
        replace_text(file, "ä", durable=durable)
    finally:
        os.umask(before)
    assert file.read_bytes() == "ä".encode() and stat.S_IMODE(file.stat().st_mode) == 0o640
    replace_bytes(file, b"new", durable=durable)
    assert file.read_bytes() == b"new" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_no_temporary_one(tmp_path, error):
    file = tmp_path / "file"
    file.write_bytes(b"old")

    def write(path):
        path.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        replace_file(file, write)
    assert file.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_leftover_temporary_file_is_not_written_into(tmp_path):
    """It may be a hard link to another file that is still needed."""
    (tmp_path / "best").write_bytes(b"best")
    os.link(tmp_path / "best", tmp_path / ".last.tmp")
    replace_bytes(tmp_path / "last", b"last")
    assert (tmp_path / "best").read_bytes() == b"best"
    assert names(tmp_path) == ["best", "last"]


def test_processes_that_replace_the_same_file_use_different_temporary_files(tmp_path):
    used = []

    def write(path):
        used.append(path.name)
        path.write_bytes(b"")

    replace_file(tmp_path / "file", write, concurrent=True)
    replace_file(tmp_path / "file", write)
    assert used == [f".file.{os.getpid()}.tmp", ".file.tmp"]


def test_durable_replacement_syncs_the_file_before_and_the_directory_after(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.replace

    def noted_fsync(descriptor):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or rename(*paths))
    replace_text(tmp_path / "file", "", durable=True)
    assert calls == [".file.tmp", "replace", tmp_path.name]


def test_the_nearest_existing_directory(tmp_path):
    assert nearest_existing_directory(tmp_path) == tmp_path
    assert nearest_existing_directory(tmp_path / "a" / "b") == tmp_path


def test_only_one_module_renames_files():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "files.py" or path.parent != PACKAGE:
            assert not re.search(r"os\.(replace|rename)\(", path.read_text()), path


def test_only_the_run_package_names_the_files_of_a_run():
    """In paths; messages for the user may mention them."""
    folder = RunFolder(PACKAGE)
    file_names = {path.name for path in vars(folder).values()} - {PACKAGE.name, "report"}
    assert {"recipe.yaml", "env.json", "metrics.jsonl", "last.pt", "checkpoints"} <= file_names
    alternatives = "|".join(map(re.escape, file_names))
    pattern = re.compile(rf"""/ ["']({alternatives})["']""")
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "run":
            assert not pattern.search(path.read_text()), path
