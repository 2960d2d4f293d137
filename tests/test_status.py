"""The status of a run, read from its folder alone."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from cspnet.errors import RecipeError
from cspnet.recipe.eta import format_duration
from cspnet.report.status import describe_run, status_exit_code
from cspnet.run.reader import read_run

RECIPE = "batch: 10\ngroup: 10\nlog_every: 10\nschedule: {steps: 1000}\n"
START = datetime(2026, 1, 1, 12, tzinfo=UTC)


def line(step, **changes):
    content = {
        "step": step,
        "split": "train",
        "loss": 2.5,
        "images_per_second": 100,
        "data_wait": 0.25,
    }
    return json.dumps(content | changes)


def event(kind, step, minutes, *remarks):
    time = (START + timedelta(minutes=minutes)).isoformat()
    return json.dumps({"time": time, "event": kind, "step": step, "remarks": remarks})


def a_run(folder, record, history, written=10, recipe=RECIPE):
    import os

    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "metrics.jsonl").write_text("\n".join(record) + "\n")
    (folder / "history.jsonl").write_text("\n".join(history) + "\n")
    at = (START + timedelta(minutes=written)).timestamp()
    os.utime(folder / "metrics.jsonl", (at, at))
    return read_run(folder)


def status_text(run, minutes):
    return "\n".join(describe_run(run, START + timedelta(minutes=minutes)))


def test_a_running_run(tmp_path):
    """Half of the intervals at 50 images/s, half at 100: 66.7 on average over the images."""
    record = [
        line(step, images_per_second=50 + 50 * (step % 20 == 0)) for step in range(10, 510, 10)
    ]
    record.insert(20, line(200, split="val", top1=61.5))
    record.append(line(500, split="val", top1=55.25))
    text = status_text(a_run(tmp_path / "run", record, [event("start", 0, 0)]), 11)
    assert "running since" in text and "last update 0:01:00 ago" in text
    assert "step        500 of 1,000 (50.0%), loss 2.5000" in text
    # 5,000 images are left.
    assert "67 images/s, 25% of the time spent waiting for data; 0:01:15 left" in text
    last = "last validation 55.25 % at step 500"
    assert f"{last}; best 61.50 % at step 200, selected on the same images" in text
    assert "last save   none yet" in text


@pytest.mark.parametrize(
    "history, minutes, expected, code",
    [
        ([event("start", 0, 0)], 60, "NO RECENT UPDATE: last update", 1),
        ([event("start", 0, 0), event("stop", 30, 12, "SIGTERM")], 13, ": SIGTERM. Resume:", 75),
        ([event("start", 0, 0), event("fail", 30, 12, "disk full.")], 13, "FAILED at", 1),
        ([event("start", 0, 0), event("crash", 30, 12, "TypeError")], 13, "CRASHED at", 1),
        ([event("start", 0, 0), event("done", 1000, 12)], 13, "complete since", 0),
        ([event("start", 0, 0), event("stop", 3, 1), event("resume", 3, 9)], 11, "running", 0),
        ([], 1, "never started", 1),
    ],
)
def test_the_state_of_a_run_without_a_lock(tmp_path, history, minutes, expected, code):
    run = a_run(tmp_path / "run", [line(30)], history)
    text = status_text(run, minutes)
    assert expected in text.splitlines()[0] and ".." not in text.splitlines()[0]
    assert ("expected end" in text) == ("running since" in text)
    assert status_exit_code(run, START + timedelta(minutes=minutes)) == code


def test_the_lock_shows_a_dead_run_at_once(tmp_path):
    """A process that holds the lock is killed: the status changes without a timeout."""
    run = a_run(tmp_path / "a run", [line(30)], [event("start", 0, 0)])
    at = START + timedelta(minutes=60)
    hold = (
        "import pathlib, sys; from cspnet.run.lock import RunLock; c = RunLock(); "
        "c.take(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = subprocess.Popen([sys.executable, "-c", hold, str(run.folder)], **pipes)
    assert child.stdout.readline() == b"held\n"
    assert (
        "running since" in status_text(run, 60) and status_exit_code(run, at) == 0
    )  # silent for long, but alive
    child.kill()
    child.wait()
    first = status_text(run, 10.1).splitlines()[0]  # it wrote a moment ago
    assert "DEAD" in first and status_exit_code(run, START + timedelta(minutes=10.1)) == 1
    assert f"cspnet-train --resume --output '{run.folder}'" in first
    child.stdin.close()
    child.stdout.close()


def test_a_slow_run_may_be_silent_between_two_log_lines(tmp_path):
    """100 images per log interval at 0.1 images/s: a line every 17 minutes."""
    record = [line(30, images_per_second=0.1)]
    run = a_run(tmp_path / "run", record, [event("start", 0, 0)])
    assert "running since" in status_text(run, 10 + 49) and "NO RECENT UPDATE" in status_text(
        run, 10 + 51
    )


def test_the_time_left_accounts_for_growing_images(tmp_path):
    """Step 400 uses 96×96 images, steps from 500 on 128×128: 100 steps at the current speed, then
    500 steps of (128 / 96)² times the work."""
    sizes = "data: {start_image_size: 64, image_size: 128, full_size_from: 0.5}\n"
    record = [line(400, images_per_second=500)]
    left = (100 + 500 * (128 / 96) ** 2) * 10 / 500
    run = a_run(tmp_path / "run", record, [event("start", 0, 0)], recipe=RECIPE + sizes)
    assert f"; {format_duration(left)} left" in status_text(run, 11)


def test_before_the_first_line_and_of_another_folder(tmp_path):
    text = status_text(a_run(tmp_path / "run", [], [event("start", 0, 0)], 0), 1)
    assert "step        0 of 1,000 (0.0%), nothing logged yet" in text and "speed" not in text
    with pytest.raises(RecipeError, match="not a run folder"):
        read_run(tmp_path)


def test_a_real_run_is_read_by_the_command(tmp_path, process, command):
    run = tmp_path / "run"
    small = ("schedule.steps=3", "model.width=0.125", "log_every=1")
    done = process("main_train", "--quiet", "--recipe", "digits", "--output", run, *small)
    assert done.returncode == 0 and done.stderr == ""
    score, *rest = done.stdout.splitlines()
    top1 = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["top1"]
    assert score == f"done; last validation: top-1 {top1:.2f} %"
    assert rest == [
        f"evaluate: cspnet-eval --checkpoint {run}/checkpoints/best.pt --data digits",
        f"report: cspnet report {run}",
    ]
    done = command("main", "status", run)
    assert done.returncode == 0, done.stderr
    assert "complete since" in done.stdout and "3 of 3 (100.0%)" in done.stdout
    assert "last.pt" in done.stdout
