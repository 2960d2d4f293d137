"""Signals and time limits: exit codes, and the state that is saved."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from cspnet.errors import StoppedError
from cspnet.run.checkpoint import CheckpointFiles
from tests.conftest import HIDDEN, ROOT, TINY
from tests.helpers import TRAIN_COMMAND, begin, last, metrics, numbers, run, same


def wait_for_lines(child, output, count):
    record = output / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (record.exists() and record.read_text().count("\n") >= count):
        assert time.monotonic() < deadline and child.poll() is None, child.stderr.read()
        time.sleep(0.01)


# test_loop.py sends each of them to a run in its own process.
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGUSR1, signal.SIGINT)),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_training_saves_and_exits_75(tmp_path, number):
    child = begin(tmp_path / "run", "schedule.steps=400", "save_every=1000", workers=2)
    wait_for_lines(child, tmp_path / "run", 2)
    os.killpg(child.pid, number)  # as a terminal and Slurm send it: to the workers too
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 75 and f"{number.name}: saved at step" in errors
    assert "Traceback" not in output + errors and "DataLoader" not in errors
    assert last(tmp_path / "run")["step"] >= 2
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)  # no worker is left


def test_a_closed_terminal_loses_nothing(tmp_path):
    """The kernel sends SIGHUP to the processes of a terminal; later writes to it fail.

    The child waits after step 2 until the terminal is closed.
    """
    ours, theirs = os.openpty()
    script = (
        "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "import cspnet.train.state as state, time; original = state.learning_rate\n"
        "def rate(update, recipe):\n"
        "    if update == 3:\n"
        "        time.sleep(0.5)\n"
        "    return original(update, recipe)\n"
        "state.learning_rate = rate\n" + TRAIN_COMMAND
    )
    arguments = ["--recipe", "digits", "--output", str(tmp_path / "run"), "-j", "1", *TINY]
    child = subprocess.Popen(
        [sys.executable, "-c", script, *arguments, "schedule.steps=400", "save_every=1000"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    record = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (record.exists() and record.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline and child.poll() is None
        os.read(ours, 65536)
    os.close(ours)
    assert child.wait(timeout=60) == 75
    assert last(tmp_path / "run")["step"] >= 2
    assert "SIGHUP: saved at step" in (tmp_path / "run" / "train.log").read_text()


def test_sigterm_during_a_save_does_not_interrupt_it(tiny, undisturbed, tmp_path, monkeypatch):
    original = CheckpointFiles.save

    def save(checkpoints, content, best=False):
        if content["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        original(checkpoints, content, best)

    with (
        monkeypatch.context() as patch,
        pytest.raises(StoppedError, match="SIGTERM: saved at step"),
    ):
        patch.setattr(CheckpointFiles, "save", save)
        run(tiny(), tmp_path / "cut")
    assert last(tmp_path / "cut")["step"] == 4  # the wish is read after the next step
    run(tiny(), tmp_path / "cut", resume=True)
    expected = undisturbed(tiny())
    assert same(last(tmp_path / "cut")["state_dict"], last(expected)["state_dict"])
    assert numbers(metrics(tmp_path / "cut")) == numbers(metrics(expected))


def test_the_loop_of_the_documentation_ends_a_run_by_time_limits(tmp_path):
    """Each round makes at least one step and exits with 75; the next one resumes."""
    text = (ROOT / "docs" / "resuming.md").read_text()
    (script,) = re.findall(r"```sh\n(until cspnet-train .*?)```", text, re.DOTALL)
    command = f'{sys.executable} -c "{TRAIN_COMMAND}" {" ".join(TINY)} schedule.steps=2 -j 0'
    script = script.replace(
        "cspnet-train --recipe cspdarknet53-omega --data data/imagenet", command
    )
    script = script.replace("until", "until echo round &&").replace(
        "--max-hours 8", "--max-hours 0.00001 --recipe digits"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("round\n") == 2
    assert done.stderr.count("--max-hours 1e-05: saved at step") == 1
    steps = [x["step"] for x in metrics(tmp_path / "runs" / "csp") if x["split"] == "train"]
    assert steps == [1, 2]


def test_nothing_is_written_outside_the_run_folder(tmp_path):
    """Except for an empty temporary folder that torch creates when imported."""
    places = {name: tmp_path / name for name in ("home", "here", "temporary")}
    for place in places.values():
        place.mkdir()
    environment = {
        **{"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(places["home"])},
        "TMPDIR": str(places["temporary"]),
    } | HIDDEN
    arguments = ["--recipe", "digits", "--output", str(tmp_path / "run"), *TINY]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_COMMAND, *arguments, "schedule.steps=2", "-j", "1"],
        cwd=places["here"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    left = {str(path.relative_to(tmp_path)) for p in places.values() for path in p.rglob("*")}
    assert not {name for name in left if not name.startswith("temporary/torchinductor_")}
