"""A disk that fills up, a real one of a few megabytes: before a run, in its course, at its end."""

import os
import re
import resource
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from cspnet import cli
from cspnet.recipe import load as recipes
from cspnet.run.checkpoint import FORMAT, CheckpointFiles, load_checkpoint, write_checkpoint
from cspnet.train import loop
from tests.helpers import last, metrics, numbers, run, same

MB = 1 << 20
CHECKPOINT = int(5.2 * MB)  # of the tiny net
KEPT = ("state_dict", "state_dict_ema", "optimizer", "step", "best_top1", "validated")

# A thread's traceback on stderr is one that the user sees.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def set_free(disk: Path, free: int | None) -> None:
    """Leaves so many bytes free on the disk, by a file that fills it; None takes that file away."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    if free is None:
        return
    with open(filler, "wb") as file:
        state = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - free)


@pytest.fixture
def disk(tmp_path):
    """An empty disk of 48 MB, room for nine checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={48 * MB}", "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        made = False
    if not made:
        pytest.skip("no disk can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """`cspnet-train` into disk/run; the disk changes after given steps, before they are saved.

    `{7: 0}` leaves no byte free after step 7, `{7: None}` frees what was filled; a function is
    called. Returns the exit code, stdout and stderr.
    """
    disk = tmp_path / "disk"

    def call(recipe, *options, changes=None):
        text = tmp_path / "recipe.yaml"
        text.write_text(recipes.recipe_to_yaml(recipe))
        ask = loop.is_save_due

        def is_save_due(_, step):
            change = (changes or {}).get(step, ())
            if callable(change):
                change()
            elif change != ():
                set_free(disk, change)
            return ask(recipe, step)

        command = ["cspnet-train", "--recipe", text, "--output", disk / "run", *options]
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(loop, "is_save_due", is_save_due)
            patch.setattr(cli.sys, "argv", [*map(str, command), "--device", "cpu"])
            cli.main_train()
        return end.value.code, *capsys.readouterr()

    return call


def assert_same_end(cut, whole):
    for part in KEPT:
        assert same(last(cut)[part], last(whole)[part]), part
    best = [load_checkpoint(folder / "checkpoints" / "best.pt") for folder in (cut, whole)]
    assert best[0]["step"] == best[1]["step"] and same(*(b["state_dict"] for b in best))
    assert numbers(metrics(cut)) == numbers(metrics(whole))
    assert not [path.name for path in cut.rglob("*.tmp")]


# The half of a checkpoint is refused before it is written; almost a whole one only in the course.
@pytest.mark.parametrize(
    "free",
    [
        pytest.param(0, marks=pytest.mark.slow),
        CHECKPOINT // 2,
        pytest.param(CHECKPOINT - MB // 4, marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_is_full_for_a_while_changes_nothing(tiny, disk, train, undisturbed, free):
    recipe = tiny("evaluate.every=2", "schedule.steps=9", "seed=2")  # its best is the first
    seen = []

    def look():
        for path in sorted((disk / "run" / "checkpoints").iterdir()):
            seen.append((path.name, load_checkpoint(path)["step"]))

    code, told, errors = train(recipe, changes={3: free, 6: look, 7: None})
    assert (code, errors) == (0, "")
    assert seen == [("best.pt", 2), ("last.pt", 2), ("previous.pt", 2)]
    failures = re.findall(r"^NOT SAVED at step (\d): .*\((.*)\)", told, re.MULTILINE)
    assert [step for step, _ in failures] == list("344566")
    assert all(reason.startswith("No space left") for _, reason in failures)
    assert_same_end(disk / "run", undisturbed(recipe))


@pytest.mark.slow
def test_a_best_that_found_the_disk_full_is_not_the_best(tiny, disk, undisturbed, monkeypatch):
    """Its weights are gone: best.pt, and what the later ones are measured by, is the best saved."""
    recipe = tiny("evaluate.every=2", "schedule.steps=9")
    top1 = {x["step"]: x["top1"] for x in metrics(undisturbed(recipe)) if x["split"] == "val"}
    lost = max(top1, key=top1.get)
    kept = max((step for step in top1 if step != lost), key=top1.get)
    validate = loop.validate

    def full(job, state, *rest):
        set_free(disk, 0 if state.step == lost else None)
        return validate(job, state, *rest)

    monkeypatch.setattr(loop, "validate", full)
    run(recipe, disk / "run")
    best = load_checkpoint(disk / "run" / "checkpoints" / "best.pt")
    assert best["step"] == kept
    assert best["best_top1"] == last(disk / "run")["best_top1"] == top1[kept]
    for part in ("state_dict", "state_dict_ema", "optimizer"):
        assert same(last(disk / "run")[part], last(undisturbed(recipe))[part]), part
    assert numbers(metrics(disk / "run")) == numbers(metrics(undisturbed(recipe)))


def test_stop_on_full_disk_exits_75_and_the_resumed_run_ends_as_the_undisturbed(
    tiny, disk, train, undisturbed
):
    code, _, errors = train(tiny(), "--stop-on-full-disk", changes={4: 2 * MB})
    assert code == 75 and last(disk / "run")["step"] == 3
    assert re.search(
        r"No space left: 2 MB free, 5 needed.*\n--stop-on-full-disk: free some", errors
    )
    code, _, errors = train(tiny(), "--resume")
    assert code == 2 and re.fullmatch(r"error: .* lacks \d+ MB .*, 5 MB each: .*\n", errors)
    set_free(disk, None)
    assert train(tiny(), "--resume")[0] == 0
    assert_same_end(disk / "run", undisturbed(tiny()))


@pytest.mark.parametrize("when", ["step", "validation"])
def test_full_at_the_very_last_save(tiny, disk, train, undisturbed, monkeypatch, when):
    """The save after the last step, and the one after the last validation."""
    with monkeypatch.context() as patch:
        if when == "validation":
            validate = loop.validate
            patch.setattr(loop, "validate", lambda *a: set_free(disk, 2 * MB) or validate(*a))
        code, _, errors = train(tiny(), changes={7: 2 * MB} if when == "step" else {})
    assert code == 1
    assert re.fullmatch(r"error: .*last\.pt could not be written \(No space left.*\n", errors)
    assert last(disk / "run")["step"] == (6 if when == "step" else 7)
    assert last(disk / "run")["validated"] == 0
    set_free(disk, None)
    assert train(tiny(), "--resume")[0] == 0
    assert_same_end(disk / "run", undisturbed(tiny()))


def test_too_small_a_disk_is_seen_before_anything_is_written(tiny, disk, train):
    set_free(disk, 15 * MB)
    code, _, errors = train(tiny("archive_every=2", "archive_keep=2"))
    assert code == 2
    assert re.fullmatch(r"error: .* lacks 15 MB .*, 5 MB each: .*, 2 archives\. Free .*\n", errors)
    assert os.listdir(disk) == ["filler"]


def test_a_disk_without_a_byte_for_the_record(tiny, disk, train, undisturbed):
    """Neither metrics.jsonl nor TensorBoard's events can grow; in the end no checkpoint either."""
    recipe = tiny("schedule.steps=24", "save_every=5")
    code, told, errors = train(recipe, changes={2: 0, 20: None, 21: 0})
    assert code == 1 and re.fullmatch(r"error: .*could not be written.*\n", errors)
    assert told.count("TensorBoard events cannot be written") == 1
    assert re.findall(r"NOT SAVED at step (\d+)", told) == ["5", "10", "15"]
    assert last(disk / "run")["step"] == 20
    set_free(disk, None)
    assert train(recipe, "--resume")[0] == 0
    assert_same_end(disk / "run", undisturbed(recipe))


def test_a_disk_that_fills_up_after_the_last_save(tiny, disk, train, monkeypatch):
    whole_run = loop.train_loop

    def fill(job, state, stop):
        scores = whole_run(job, state, stop)
        history = disk / "run" / "history.jsonl"
        with open(history, "a") as file:
            file.write(" " * (-history.stat().st_size % 4096))  # no room in its last block
        set_free(disk, 0)
        return scores

    monkeypatch.setattr(loop, "train_loop", fill)
    code, _, errors = train(tiny())
    assert (code, errors) == (0, "")
    assert last(disk / "run")["validated"] == 7


@pytest.mark.slow
def test_what_a_kill_left_does_not_count_against_the_resume(tiny, disk, train, undisturbed):
    """On a disk with room for the four files of a run, and for not much more."""
    code, _, _ = train(tiny(), "--stop-on-full-disk", changes={4: 0})
    assert code == 75
    set_free(disk, None)
    half_written = disk / "run" / "checkpoints" / ".last.pt.tmp"
    half_written.write_bytes(bytes(CHECKPOINT - MB))
    # For best.pt and the one being written, but for the bytes of that one that are there.
    set_free(disk, 2 * CHECKPOINT - (CHECKPOINT - MB) + MB // 2)
    code, _, errors = train(tiny(), "--resume")
    assert (code, errors) == (0, "")
    assert_same_end(disk / "run", undisturbed(tiny()))


@contextmanager
def limit(size):
    """A size that no file may pass, as `ulimit -f` sets it; pytest's own output is one of them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("options, code", [((), 1), (("--stop-on-full-disk",), 75)])
def test_a_limit_on_the_size_of_a_file(tiny, train, undisturbed, tmp_path, options, code):
    output = tmp_path / "disk" / "run"
    with limit(2 * MB):
        ended, told, errors = train(tiny(), *options)
    assert ended == code
    assert re.search(r"last\.pt could not be written \(File too large\)", errors)
    assert len(re.findall("NOT SAVED at step", told)) == (0 if options else 6)
    assert os.listdir(output / "checkpoints") == []
    assert train(tiny(), "--resume")[0] == 0
    assert_same_end(output, undisturbed(tiny()))


def test_a_limit_that_is_met_leaves_the_earlier_files(tmp_path):
    files = CheckpointFiles(tmp_path)
    content = {"format": FORMAT, "recipe": "", "classes": [], "state_dict": {}}
    files.save({**content, "step": 1})
    with limit(3000), pytest.raises(loop.SaveError, match="File too large"):
        files.save({**content, "step": 2, "filling": "-" * 5000})
    assert load_checkpoint(files.last)["step"] == 1 and os.listdir(tmp_path) == ["last.pt"]
    write_checkpoint({**content, "step": 2}, files.last)
