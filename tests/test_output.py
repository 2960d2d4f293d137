"""Output that nobody reads, that cannot be encoded, or that was never open."""

import io
import os
import re
import subprocess
import sys

import pytest

from cspnet.console import RunOutput, TolerantStream
from tests.conftest import HIDDEN, TINY
from tests.helpers import begin, last, metrics, numbers, same

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **HIDDEN}


def shell(script, name="main_train", **environment):
    """A shell script in which $CSPNET is a command of the package; bash, with pipefail."""
    call = f"import sys; from cspnet.cli import {name}; sys.argv[0] = '{name}'; {name}()"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", script, "bash", sys.executable, "-c", call],
        capture_output=True,
        timeout=120,
        env={**ENVIRONMENT, **environment},
    )


def test_a_run_survives_the_reader_of_its_output(tmp_path):
    steps = ["schedule.steps=12", "save_every=1000"]
    child = begin(tmp_path / "cut", *steps)
    while not child.stdout.readline().startswith("step 2 "):
        pass
    child.stdout.close()  # as `| head` does
    assert child.wait(timeout=60) == 0 and "Traceback" not in child.stderr.read()
    child.stderr.close()
    whole = begin(tmp_path / "whole", *steps)
    output, _ = whole.communicate(timeout=60)
    assert same(last(tmp_path / "cut")["state_dict"], last(tmp_path / "whole")["state_dict"])
    assert numbers(metrics(tmp_path / "cut")) == numbers(metrics(tmp_path / "whole"))
    log = (tmp_path / "cut" / "train.log").read_text()
    assert "standard output cannot be written any more (Broken pipe)" in log
    logged = re.findall(r"^\S+ \S+ step (\d+) ", log, re.MULTILINE)
    assert list(map(int, logged)) == list(range(1, 13))
    assert "validation at step 12" in log and "validation at step 12" in output


def test_quiet_runs_have_a_log_too(tmp_path, command):
    arguments = ("--recipe", "digits", *TINY, "schedule.steps=2", "--output", tmp_path / "run")
    assert command("main_train", *arguments, "--quiet", "--device", "cpu").returncode == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert "step 2 " in log and "parameters" in log
    done = command("main_train", *arguments, "--quiet", "--device", "cpu", "--resume")
    assert done.returncode == 0
    again = (tmp_path / "run" / "train.log").read_text()
    assert again.startswith(log) and "resumed in" in again[len(log) :]


@pytest.mark.parametrize("redirection", [">&- 2>&-", ">/dev/full 2>&1"])
def test_a_run_needs_no_output_at_all(tmp_path, redirection):
    run = tmp_path / "run"
    words = " ".join(["--recipe digits", *TINY, "schedule.steps=2", f"--output {run}"])
    done = shell(f'"$@" {words} --device cpu {redirection}')
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert last(run)["step"] == 2


def test_ascii_output_escapes_what_it_lacks(tmp_path, folder):
    (folder / "train" / "cat" / "0.jpg").rename(folder / "train" / "cat" / "é.jpg")
    (folder / "train" / "cat" / "é.jpg").write_bytes(b"no image")
    words = [*TINY, "model.classes=auto", "data.max_unreadable=1", f"data.root={folder}"]
    script = f'"$@" --recipe digits {" ".join(words)} --output {tmp_path / "run"} --device cpu'
    done = shell(script, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert rb"\xe9.jpg" in done.stdout
    assert "é.jpg" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize(
    "words", ["compare RUN RUN | true", "--help | head -1", "check DATA | true"]
)
def test_commands_end_quietly_when_nobody_reads(tmp_path, folder, words):
    words = words.replace("DATA", str(folder)).replace("RUN", str(tmp_path / "run"))
    done = shell(f'"$@" {words}', name="main")
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr, done.stderr
    assert b"Exception ignored" not in done.stderr


def test_the_stream_of_a_lost_pipe_drops_its_text():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        stream = TolerantStream(file)
        assert not stream.isatty() and stream.lost is None
        for _ in range(3):
            print("text", file=stream, flush=True)
        assert stream.lost == "Broken pipe"


def test_held_output_comes_in_order_once_it_is_released():
    from rich.console import Console

    stream = io.StringIO()
    output = RunOutput(Console(file=stream))
    output.hold()
    output.print("one")
    assert stream.getvalue() == ""
    output.release()
    output.print("two")
    assert stream.getvalue() == "one\ntwo\n"


def test_a_log_that_cannot_be_written_is_no_error(tmp_path):
    from rich.console import Console

    output = RunOutput(Console(quiet=True))
    output.print("before")
    output.open_log(tmp_path / "missing" / "train.log")
    output.print("after")
    output.open_log(tmp_path / "train.log")
    output.close_log()
    assert "before" in (tmp_path / "train.log").read_text()


def test_names_are_the_same_in_every_locale(tmp_path, folder):
    """A class bär is the same bytes, and so the same name, in a locale without UTF-8."""
    for split in ("train", "val"):
        (folder / split / "bear").rename(folder / split / "bär")
    run = tmp_path / "run"
    words = [*TINY, "model.classes=auto", "schedule.steps=2", f"data.root={folder}"]
    done = shell(f'"$@" --recipe digits {" ".join(words)} --output {run} --device cpu')
    assert done.returncode == 0, done.stderr
    words = f"--checkpoint {run}/checkpoints/last.pt --device cpu"
    ascii_ = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shell(f'"$@" {words} --data {folder}/val', name="main_eval", **ascii_)
    assert done.returncode == 0 and b"9 images" in done.stdout, done.stderr
    done = shell(f'"$@" predict {folder}/val/bär {words} --top 1', name="main", **ascii_)
    assert done.returncode == 0 and rb"b\xe4r/" in done.stdout, done.stderr


def test_an_evaluation_for_a_file_needs_no_reader(tmp_path, command, tiny):
    from tests.helpers import run

    run(tiny(), tmp_path / "run")
    words = (
        f"--checkpoint {tmp_path}/run/checkpoints/last.pt --data digits --json {tmp_path}/x.json"
    )
    done = shell(f'"$@" {words} --device cpu | true', name="main_eval")
    assert done.returncode == 0 and (tmp_path / "x.json").exists(), done.stderr
