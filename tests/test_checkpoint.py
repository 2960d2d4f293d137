import os
import pickle

import pytest
import torch

from cspnet.errors import CheckpointError, SaveError
from cspnet.train import checkpoint

CONTENT = {
    "format": checkpoint.FORMAT,
    "recipe": "batch: 8\n",
    "classes": ["a", "b"],
    "state_dict": {"w": torch.arange(1000.0)},
}


def test_round_trip_and_best_is_the_same_file(tmp_path):
    path, best = tmp_path / "c" / "last.pt", tmp_path / "c" / "best.pt"
    checkpoint.save(CONTENT, path, best)
    assert os.path.samefile(path, best)
    checkpoint.save({**CONTENT, "classes": ["c"]}, path)
    assert checkpoint.load(path)["classes"] == ["c"]
    assert checkpoint.load(best)["classes"] == ["a", "b"]
    assert torch.equal(checkpoint.load(best)["state_dict"]["w"], torch.arange(1000.0))
    assert sorted(p.name for p in path.parent.iterdir()) == ["best.pt", "last.pt"]


def test_a_failed_save_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(CONTENT, path)
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(SaveError, match="No space left on device"):
        checkpoint.save({**CONTENT, "classes": []}, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("sixteenths", range(16))
def test_a_truncated_file_is_refused(tmp_path, sixteenths):
    path = tmp_path / "last.pt"
    checkpoint.save(CONTENT, path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * sixteenths // 16])
    with pytest.raises(CheckpointError, match="truncated, damaged, or not a checkpoint"):
        checkpoint.load(path)


def test_a_pickle_is_never_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save(Evil(), tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(CheckpointError):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_what_is_no_checkpoint_of_ours(tmp_path):
    torch.save({"w": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of cspnet"):
        checkpoint.load(tmp_path / "other.pt")
    torch.save({**CONTENT, "format": 99}, tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match="has format 99"):
        checkpoint.load(tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match=r"does not exist; found there: .*newer.pt"):
        checkpoint.load(tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        checkpoint.load(tmp_path)
