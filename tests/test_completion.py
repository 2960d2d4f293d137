"""What a shell completes, asked as the shell asks: by environment variables."""

import os
import subprocess
import sys

import pytest

from cspnet.recipe import load as recipes


def complete(name: str, words: str, cwd) -> list[str]:
    """What bash would offer for a command line whose last word is being typed."""
    variable = f"_{name.replace('-', '_').upper()}_COMPLETE"
    call = f"""
import sys
from cspnet import cli
sys.argv = ["{name}"]
try:
    cli.main{name.removeprefix("cspnet").replace("-", "_")}()
finally:
    assert "torch" not in sys.modules, "a completion that waits for torch is none"
"""
    count = len(words.split(" ")) - 1
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={"PATH": os.defpath, variable: "complete_bash", "COMP_WORDS": words}
        | {"COMP_CWORD": str(count)},
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


def test_commands_are_completed(tmp_path):
    assert complete("cspnet", "cspnet pre", tmp_path) == ["predict", "prepare", "preview"]
    assert "--resume" in complete("cspnet-train", "cspnet-train --re", tmp_path)


def test_recipes_are_completed_by_name_and_as_files(tmp_path):
    assert complete("cspnet", "cspnet train --recipe ", tmp_path) == recipes.builtin_recipes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "cspmine.yaml").touch()
    (tmp_path / "mine" / "one.yaml").touch()
    found = complete("cspnet-train", "cspnet-train --recipe csp", tmp_path)
    assert "cspmine.yaml" in found and "cspdarknet53-omega" in found and "digits" not in found
    assert complete("cspnet", "cspnet preview -r mine/", tmp_path) == ["mine/one.yaml"]


@pytest.mark.parametrize(
    "words, told",
    [
        ("cspnet-train --recompute ", ["none", "light", "full"]),
        ("cspnet-train --recompute f", ["full"]),
        ("cspnet prepare imagenet", ["imagenet", "imagenette"]),
    ],
)
def test_words_of_options_are_completed(words, told, tmp_path):
    assert complete(words.split()[0], words, tmp_path) == told


def test_a_script_for_bash_is_printed(command, monkeypatch):
    # Otherwise the parent processes must include a shell.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = command("main", "--show-completion", "bash")
    assert done.returncode == 0 and "COMP_WORDS" in done.stdout
