"""A run after something went wrong: exceptions, other data, other directories, dead workers."""

import os
import signal
from pathlib import Path

import pytest

from cspnet.errors import CheckpointError, CrashError, DataError, SaveError, StoppedError
from cspnet.run import checkpoint
from cspnet.run.checkpoint import CheckpointFiles, load_checkpoint
from cspnet.run.lock import RunLock
from cspnet.train import loop
from cspnet.train.step import TrainStep
from tests.conftest import TINY
from tests.helpers import die_at, history, in_process, last, metrics, numbers, run, same


@pytest.mark.parametrize(
    "owner, name, call, saved",
    [
        (TrainStep, "load", 5, 2),  # of the third step, before a forward pass
        (TrainStep, "loss", 5, 0),  # within it: the running statistics have moved
        (loop, "validate", 1, 6),
    ],
)
def test_an_unexpected_exception_saves_a_consistent_state(
    tiny, undisturbed, tmp_path, monkeypatch, owner, name, call, saved
):
    recipe = tiny("save_every=1000", "evaluate.every=6", "schedule.steps=8")
    expected = undisturbed(recipe)
    with monkeypatch.context() as patch:
        die_at(patch, owner, name, call, MemoryError)
        with pytest.raises(CrashError, match=r"unexpected MemoryError: on purpose") as crash:
            run(recipe, tmp_path / "cut")
    assert (f"saved at step {saved}" in str(crash.value)) == (saved > 0)
    assert (tmp_path / "cut/checkpoints/last.pt").exists() == (saved > 0)
    event = history(tmp_path / "cut")[-1]
    assert event["event"] == "crash" and event["remarks"][0] == "MemoryError: on purpose"
    traceback = Path(event["remarks"][1]).read_text()
    assert "Traceback (most recent call last)" in traceback and "in die\n" in traceback
    assert "unexpected MemoryError" in (tmp_path / "cut/train.log").read_text()
    run(recipe, tmp_path / "cut", resume=True)
    assert numbers(metrics(tmp_path / "cut")) == numbers(metrics(expected))
    assert same(last(tmp_path / "cut")["state_dict"], last(expected)["state_dict"])


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
    """Swap the images of two class folders: names, counts and labels stay the same."""
    (folder / split / "apple").rename(folder / "x")
    (folder / split / "bear").rename(folder / split / "apple")
    (folder / "x").rename(folder / split / "bear")


def move(folder):
    (folder / "train/apple/0.jpg").rename(folder / "train/bear/00.jpg")


@pytest.mark.parametrize(
    "change, expected",
    [
        (swap, "train: the images of class bear are now in class apple"),
        (
            lambda folder: swap(folder, "val"),
            "val: the images of class bear are now in class apple",
        ),
        (
            lambda folder: (folder / "train/cat/0.jpg").unlink(),
            "train had 36 images and now has 35",
        ),
        (lambda folder: (folder / "val/cat/0.jpg").unlink(), "val had 9 images and now has 8"),
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


def test_a_resume_reports_changed_files_and_a_moved_data_root(tiny, folder, tmp_path):
    run(tiny(*data_of(folder)), tmp_path / "run")
    with open(folder / "train/cat/0.jpg", "ab") as file:
        file.write(b"more")
    moved = folder.rename(folder.with_name("moved"))
    run(tiny(*data_of(moved), "schedule.steps=8"), tmp_path / "run", resume=True)
    remarks = "\n".join(history(tmp_path / "run")[-2]["remarks"])
    assert "train: names or sizes of files changed in 1 class (cat)" in remarks
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
    assert load_checkpoint(run / "checkpoints/last.pt")["step"] == 3
    done = command("main", "report", run, cwd=other)
    assert done.returncode == 0 and "9 images" in done.stdout, done.stdout + done.stderr
    # Without a checkpoint yet, too.
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    done = command("main_train", "--resume", "--output", run, *more, cwd=other)
    assert done.returncode == 0, done.stderr


def test_a_stop_during_validation_saves_what_a_full_disk_refused(
    tiny, undisturbed, tmp_path, monkeypatch
):
    """The save before the validation failed, and the run continued."""
    recipe = tiny("save_every=1000", "evaluate.every=4", "schedule.steps=8")
    expected = undisturbed(recipe)
    original, calls = CheckpointFiles.save, []

    def save(checkpoints, content, best=False):
        calls.append(content["step"])
        if len(calls) == 1:
            raise SaveError("no space left")
        original(checkpoints, content, best)

    def signalled(*arguments, progress, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        progress(1)

    with (
        monkeypatch.context() as patch,
        pytest.raises(StoppedError, match="SIGTERM: saved at step 4"),
    ):
        patch.setattr(CheckpointFiles, "save", save)
        patch.setattr(loop, "evaluate_network", signalled)
        run(recipe, tmp_path / "cut")
    assert calls == [4, 4] and last(tmp_path / "cut")["step"] == 4
    run(recipe, tmp_path / "cut", resume=True)
    assert numbers(metrics(tmp_path / "cut")) == numbers(metrics(expected))


@pytest.mark.parametrize("place", ["report", "write"])
def test_a_crash_after_a_validation_validates_again(
    tiny, undisturbed, tmp_path, monkeypatch, place
):
    """Neither the validation's line nor best.pt may be lost."""
    recipe = tiny("save_every=1000", "evaluate.every=4", "schedule.steps=8")
    expected = undisturbed(recipe)
    original = checkpoint.write_checkpoint

    def write(content, path):
        if content["validated"] == 4 and content["best_top1"] >= 0:
            raise MemoryError("on purpose")
        original(content, path)

    def validation(*_):
        raise MemoryError("on purpose")

    with monkeypatch.context() as patch, pytest.raises(CrashError, match="saved at step 4"):
        if place == "report":
            patch.setattr(loop.Reporter, "validation", validation)
        else:
            patch.setattr(checkpoint, "write_checkpoint", write)
        run(recipe, tmp_path / "cut")
    saved = last(tmp_path / "cut")
    assert saved["validated"] == 0 and saved["best_top1"] == -1
    run(recipe, tmp_path / "cut", resume=True)
    assert numbers(metrics(tmp_path / "cut")) == numbers(metrics(expected))
    ours, theirs = (
        load_checkpoint(folder / "checkpoints/best.pt") for folder in (tmp_path / "cut", expected)
    )
    assert ours["step"] == theirs["step"] and same(ours["state_dict"], theirs["state_dict"])


def test_a_traceback_that_cannot_be_written_goes_to_stderr(tiny, tmp_path, monkeypatch, capsys):
    original = Path.write_text

    def full(path, *arguments, **options):
        if path.name.startswith("crash-"):
            raise OSError(28, "No space left on device")
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    die_at(monkeypatch, TrainStep, "load", 3, MemoryError)
    with pytest.raises(CrashError, match="The traceback is on stderr"):
        run(tiny(), tmp_path / "run")
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    assert "Traceback (most recent call last)" in (tmp_path / "run/train.log").read_text()


def test_other_validation_images_select_best_anew(tiny, folder, tmp_path):
    run(tiny(*data_of(folder)), tmp_path / "run")
    assert last(tmp_path / "run")["best_top1"] >= 0
    with open(folder / "val/cat/0.jpg", "ab") as file:
        file.write(b"more")
    run(tiny(*data_of(folder), "schedule.steps=8"), tmp_path / "run", resume=True)
    remarks = history(tmp_path / "run")[-2]["remarks"]
    assert "the validation images changed: the selection of best.pt starts again" in remarks
    assert load_checkpoint(tmp_path / "run/checkpoints/best.pt")["step"] == 8


def test_the_lock_is_taken_before_anything_is_written(tiny, tmp_path):
    """Two starts of the same new run: the second one finds the lock, and touches nothing."""
    first = RunLock()
    (tmp_path / "run").mkdir()
    with first:
        first.take(tmp_path / "run")
        child = in_process(tiny(), tmp_path / "run")
    assert child != 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    run(tiny(), tmp_path / "run")


def test_before_the_first_save_the_schedule_may_change_and_other_fields_may_not(tiny, tmp_path):
    run(tiny(), tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match=r"another run's recipe \(seed differ\)"):
        run(tiny("seed=7"), tmp_path / "run", resume=True)
    run(tiny("schedule.steps=5"), tmp_path / "run", resume=True)
    assert last(tmp_path / "run")["step"] == 5


def test_a_second_interrupt_is_noted(tiny, tmp_path, monkeypatch):
    die_at(monkeypatch, TrainStep, "load", 3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), tmp_path / "run")
    event = history(tmp_path / "run")[-1]
    assert event["event"] == "fail" and "second Ctrl-C" in event["remarks"][0]


def test_an_unreadable_image_is_counted_once_from_any_directory(folder, tmp_path, command):
    (folder / "train/cat/0.jpg").write_bytes(b"")
    small = [*TINY, "model.classes=auto", "data.max_unreadable=1", "--output", "run"]
    for steps, words in (
        (12, ["-r", "digits", "--data", "data", *small]),
        (24, ["--output", "run"]),
    ):
        words = ["--resume", *words, f"schedule.steps={steps}", "--device", "cpu"]
        done = command("main_train", *words, cwd=folder.parent)
        assert done.returncode == 0, done.stderr
    listed = (folder.parent / "run/unreadable.txt").read_text().splitlines()
    assert listed == [str(folder / "train/cat/0.jpg")]


def test_resume_names_a_folder_that_is_not_a_run(tmp_path, command):
    for folder, what in ((tmp_path, "is not a run folder"), (tmp_path / "none", "does not exist")):
        done = command("main_train", "--resume", "--output", folder)
        assert done.returncode == 2 and f"--output {folder} {what}" in done.stderr
