"""Checkpoints against crashes, full disks, torn and flipped files, and files with code in them."""

import os
import pickle

import pytest
import torch

from cspnet.errors import CheckpointError, SaveError
from cspnet.run import checkpoint
from cspnet.run.checkpoint import CheckpointFiles, load_checkpoint, write_checkpoint


def content(step):
    return {
        "format": checkpoint.FORMAT,
        "recipe": "batch: 8\n",
        "classes": ["a", "b"],
        "step": step,
        "state_dict": {"w": torch.arange(1000.0) + step},
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps(*paths):
    return [load_checkpoint(path)["step"] for path in paths]


def test_last_previous_and_best(tmp_path):
    files = CheckpointFiles(tmp_path / "c")
    files.save(content(1))
    assert names(files.folder) == ["last.pt"]
    files.save(content(2), best=True)
    files.save(content(3))
    assert [load_checkpoint(p)["step"] for p in (files.last, files.previous, files.best)] == [
        3,
        2,
        2,
    ]
    assert os.path.samefile(files.previous, files.best), "one file with two names"
    assert torch.equal(load_checkpoint(files.last)["state_dict"]["w"], torch.arange(1000.0) + 3)
    assert names(files.folder) == ["best.pt", "last.pt", "previous.pt"]


def test_archives_are_kept_and_pruned(tmp_path):
    files = CheckpointFiles(tmp_path, archive_every=10, archive_keep=2)
    (tmp_path / "step-mine.pt").write_bytes(b"not one of ours to prune")
    for step in range(5, 46, 5):
        files.save(content(step))
    assert [path.name for path in files.archives()] == ["step-0000030.pt", "step-0000040.pt"]
    assert load_checkpoint(files.archives()[0])["step"] == 30
    assert (tmp_path / "step-mine.pt").exists()


def test_torch_and_timm_read_a_sealed_file(tmp_path):
    from timm.models import load_state_dict

    write_checkpoint(content(1), tmp_path / "last.pt")
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1
    assert torch.equal(load_state_dict(tmp_path / "last.pt")["w"], torch.arange(1000.0) + 1)


@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
def test_a_failed_save_leaves_all_files_whole(tmp_path, monkeypatch, call):
    files = CheckpointFiles(tmp_path)
    for step in (1, 2):
        files.save(content(step), best=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, call, full)
        patch.setattr(checkpoint.shutil, "copyfile", full)
        with pytest.raises(SaveError, match="No space left on device"):
            files.save(content(3))
    assert names(tmp_path) == ["best.pt", "last.pt", "previous.pt"]
    assert load_checkpoint(files.last)["step"] == 2
    files.save(content(4))
    assert [load_checkpoint(p)["step"] for p in (files.last, files.previous)] == [4, 2]


def test_where_there_are_no_hard_links_files_are_copied(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(checkpoint.os, "link", none)
    files = CheckpointFiles(tmp_path)
    for step in (1, 2):
        files.save(content(step), best=True)
    assert [load_checkpoint(p)["step"] for p in (files.last, files.previous, files.best)] == [
        2,
        1,
        2,
    ]
    assert names(tmp_path) == ["best.pt", "last.pt", "previous.pt"]


def test_too_little_room_is_seen_before_anything_is_written(tmp_path):
    files = CheckpointFiles(tmp_path)
    files.save(content(1))
    files.size = 1 << 60
    assert files.missing_bytes() > 1 << 60
    with pytest.raises(SaveError, match=r"No space left: .* MB free"):
        files.save(content(2))
    assert load_checkpoint(files.last)["step"] == 1
    files.size = 1000
    assert files.missing_bytes() < 0


@pytest.mark.parametrize("sixteenths", range(16))
def test_a_truncated_file_is_never_loaded(tmp_path, sixteenths):
    files = CheckpointFiles(tmp_path)
    for step in (1, 2):
        files.save(content(step))
    data = files.last.read_bytes()
    files.last.write_bytes(data[: len(data) * sixteenths // 16])
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        load_checkpoint(files.last)
    found, (problem, said) = files.newest()
    assert found["step"] == 1 and "last.pt is truncated" in problem
    assert "previous.pt, step 1" in said


def test_a_flipped_byte_is_never_loaded(tmp_path):
    """Anywhere: in tensors, in the archive's padding and directory, in the checksum itself."""
    path = tmp_path / "last.pt"
    write_checkpoint(content(1), path)
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(data), (150,), generator=generator).tolist()
    for place in [*places, *range(len(data) - 100, len(data), 2)]:
        torn = bytearray(data)
        torn[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        path.write_bytes(torn)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_a_damaged_last_does_not_become_the_previous_one(tmp_path):
    files = CheckpointFiles(tmp_path)
    for step in (1, 2):
        files.save(content(step))
    files.last.write_bytes(b"")
    again = CheckpointFiles(tmp_path)
    assert again.newest()[0]["step"] == 1
    again.save(content(3))
    assert [load_checkpoint(p)["step"] for p in (files.last, files.previous)] == [3, 1]
    again.save(content(4))
    assert [load_checkpoint(p)["step"] for p in (files.last, files.previous)] == [4, 3]


def test_the_newest_good_one_is_taken_and_none_is_said(tmp_path):
    files = CheckpointFiles(tmp_path, archive_every=2, archive_keep=9)
    assert files.newest() == (None, [])
    for step in (1, 2, 3, 4, 5):
        files.save(content(step), best=step == 1)
    for path in (files.last, files.previous):  # step 4 is an archive too: the same damaged file
        path.write_bytes(path.read_bytes()[:-1])
    found, remarks = files.newest()
    assert found["step"] == 2 and "step-0000002.pt" in remarks[-1]
    assert len(remarks) == 4, "each file that is not whole is named"
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="the run has no valid checkpoint"):
        files.newest()


def test_a_pickle_is_never_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"state_dict": Evil()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    write_checkpoint({**content(1), "state_dict": Evil()}, tmp_path / "sealed.pt")
    for name, told in (("a", "refused"), ("b", "not a checkpoint"), ("sealed", "refused")):
        with pytest.raises(CheckpointError, match=told):
            load_checkpoint(tmp_path / f"{name}.pt")
    assert not (tmp_path / "executed").exists()


def test_what_is_no_checkpoint_of_ours(tmp_path):
    torch.save({"w": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of cspnet"):
        load_checkpoint(tmp_path / "other.pt")
    torch.save(content(1), tmp_path / "unsealed.pt")
    with pytest.raises(CheckpointError, match="its checksum is missing"):
        load_checkpoint(tmp_path / "unsealed.pt")
    write_checkpoint({**content(1), "format": 99}, tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match="has checkpoint format 99"):
        load_checkpoint(tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match=r"does not exist; found there: .*newer.pt"):
        load_checkpoint(tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(tmp_path)


def test_a_run_of_another_version_gets_one_message(tmp_path):
    files = CheckpointFiles(tmp_path)
    for step in (1, 2):
        files.save({**content(step), "format": 3, "cspnet": "0.1.0"}, best=True)
    with pytest.raises(CheckpointError) as caught:
        CheckpointFiles(tmp_path).newest()
    assert str(caught.value) == (
        f"{files.last} has checkpoint format 3, and this version of cspnet reads format 4: use "
        "cspnet 0.1.0, which wrote it"
    )
