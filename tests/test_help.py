"""Help in any encoding, and output whose errors come first."""

import io
import os
import subprocess
import sys

import pytest

from cspnet import cli
from tests.conftest import HIDDEN, call

COMMANDS = ["cspnet", "cspnet-train", "cspnet-eval", *(f"cspnet {name}" for name in cli.COMMANDS)]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_help_in_any_encoding(command, encoding, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # no name is cut off, with an ellipsis
    output, errors = (io.TextIOWrapper(io.BytesIO(), encoding, "strict") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", errors)
    assert call(f"{command} --help") == 0
    output.flush()
    text = output.buffer.getvalue().decode(encoding)
    assert "Usage: " in text and "--help" in text
    assert "\\u" not in text, "help is written in ASCII"


def test_a_message_in_an_encoding_that_lacks_its_characters(monkeypatch):
    errors = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    monkeypatch.setattr(sys, "stderr", errors)
    assert call("cspnet-train --recipe digits --data photo_é") == 2
    errors.flush()
    assert b"photo_\\xe9 does not exist" in errors.buffer.getvalue()


def test_help_of_a_process_whose_locale_is_ascii():
    call_ = "import sys; from cspnet.cli import main_train; sys.argv = ['t', '-h']; main_train()"
    ascii_ = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", call_],
        env={"PATH": "/usr/bin:/bin"} | HIDDEN | ascii_,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"--recipe" in done.stdout and done.stderr == b""
