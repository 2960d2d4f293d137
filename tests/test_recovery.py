"""A run after something went wrong: exceptions, other data, other directories, dead workers."""

from pathlib import Path

import pytest

from cspnet.errors import CheckpointError, Crash, DataError
from cspnet.train.checkpoint import load
from tests.conftest import TINY
from tests.test_loop import die_at, history, last, metrics, numbers, run, same


@pytest.mark.parametrize(
    "name, call, saved",
    [
        ("to_device", 5, 2),  # of the third step, before a forward pass
        ("cross_entropy", 5, 0),  # within it: the running statistics have moved
        ("validate", 1, 6),
    ],
)
def test_an_unexpected_exception_saves_what_is_consistent(
    tiny, tmp_path, monkeypatch, name, call, saved
):
    recipe = tiny("save_every=1000", "evaluate.every=6", "schedule.steps=8")
    run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        # The sample page of the first step calls it once more.
        die_at(patch, name, call + (name == "to_device"), MemoryError)
        with pytest.raises(Crash, match=r"unexpected MemoryError: on purpose") as crash:
            run(recipe, tmp_path / "cut")
    assert (f"saved at step {saved}" in str(crash.value)) == (saved > 0)
    assert (tmp_path / "cut/checkpoints/last.pt").exists() == (saved > 0)
    event = history(tmp_path / "cut")[-1]
    assert event["event"] == "crash" and event["remarks"][0] == "MemoryError: on purpose"
    traceback = Path(event["remarks"][1]).read_text()
    assert "Traceback (most recent call last)" in traceback and "in die\n" in traceback
    assert "unexpected MemoryError" in (tmp_path / "cut/train.log").read_text()
    run(recipe, tmp_path / "cut", resume=True)
    assert numbers(metrics(tmp_path / "cut")) == numbers(metrics(tmp_path / "whole"))
    assert same(last(tmp_path / "cut")["state_dict"], last(tmp_path / "whole")["state_dict"])


def test_too_many_unreadable_images_lose_no_step(tiny, folder, tmp_path):
    for path in (folder / "train" / "cat").glob("*.jpg"):
        path.write_bytes(b"")
    recipe = tiny(*data_of(folder), "save_every=1000", "schedule.steps=30")
    with pytest.raises(DataError, match=r"data\.max_unreadable"):
        run(recipe, tmp_path / "run")
    assert history(tmp_path / "run")[-1]["event"] == "fail"
    logged = [line["step"] for line in metrics(tmp_path / "run")]
    assert not logged or last(tmp_path / "run")["step"] == logged[-1]


def data_of(folder):
    return f"data.root={folder}", "model.classes=auto"


def swap(folder, split="train"):
    """Exchanges the images of two class folders: names, counts and labels stay the same."""
    (folder / split / "apple").rename(folder / "x")
    (folder / split / "bear").rename(folder / split / "apple")
    (folder / "x").rename(folder / split / "bear")


def move(folder):
    (folder / "train/apple/0.jpg").rename(folder / "train/bear/00.jpg")


@pytest.mark.parametrize(
    "change, expected",
    [
        (swap, "train: the images of class bear are in class apple now"),
        (lambda folder: swap(folder, "val"), "val: the images of class bear are in class apple"),
        (lambda folder: (folder / "train/cat/0.jpg").unlink(), "train had 36 images, has 35 now"),
        (lambda folder: (folder / "val/cat/0.jpg").unlink(), "val had 9 images, has 8 now"),
        (move, "train: images were moved between classes"),
    ],
)
def test_a_resume_refuses_other_labels(tiny, folder, tmp_path, change, expected):
    recipe = tiny(*data_of(folder))
    run(recipe, tmp_path / "run")
    before = last(tmp_path / "run")
    change(folder)
    with pytest.raises(CheckpointError, match=expected):
        run(recipe, tmp_path / "run", resume=True)
    assert same(last(tmp_path / "run"), before)
    recipe = tiny(*data_of(folder), "schedule.steps=8")
    run(recipe, tmp_path / "run", resume=True, force=True)
    assert any(expected in remark for remark in history(tmp_path / "run")[-2]["remarks"])
    run(recipe, tmp_path / "run", resume=True)  # what was forced once is the run's own now


def test_a_resume_reports_other_files_and_another_place(tiny, folder, tmp_path):
    run(tiny(*data_of(folder)), tmp_path / "run")
    with open(folder / "train/cat/0.jpg", "ab") as file:
        file.write(b"more")
    moved = folder.rename(folder.with_name("moved"))
    run(tiny(*data_of(moved), "schedule.steps=8"), tmp_path / "run", resume=True)
    remarks = "\n".join(history(tmp_path / "run")[-2]["remarks"])
    assert "train: files have other names or sizes in 1 class (cat)" in remarks
    assert f"data.root was {folder}, is now {moved}" in remarks


def test_a_run_folder_is_enough_from_any_directory(folder, tmp_path, command):
    """The recipe names the data relative to the directory in which the run was started."""
    small = [*TINY, "model.classes=auto", "schedule.steps=2"]
    where = {"cwd": folder.parent}
    done = command(
        "main_train", "-r", "digits", "--data", "data", *small, "--output", "run", **where
    )
    assert done.returncode == 0, done.stderr
    run, other = folder.parent / "run", tmp_path / "elsewhere"
    (other / "data").mkdir(parents=True)  # a folder of that name, with other content
    more = ("schedule.steps=3", "--quiet")
    done = command("main_train", "--resume", "--output", run, *more, cwd=other)
    assert done.returncode == 0, done.stderr
    assert load(run / "checkpoints/last.pt")["step"] == 3
    done = command("main", "report", run, cwd=other)
    assert done.returncode == 0 and "9 images" in done.stdout, done.stdout + done.stderr
    # Without a checkpoint yet, too.
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    done = command("main_train", "--resume", "--output", run, *more, cwd=other)
    assert done.returncode == 0, done.stderr
