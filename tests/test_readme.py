"""Every command of the README, typed as it stands, on a small data set and a small net."""

import re
import shlex
import shutil

import pytest

from tests.conftest import ROOT

SMALL = [
    *("batch=8", "group=4", "data.size=32", "model.width=0.125"),
    *("schedule.steps=2", "schedule.warmup_steps=1"),
]
COMMANDS = {"cspnet": "main", "cspnet-train": "main_train", "cspnet-eval": "main_eval"}


def commands():
    """Lines of the README's indented blocks that call our commands, in order."""
    text = (ROOT / "README.md").read_text()
    return [shlex.split(line) for line in re.findall(r"^ {4}(cspnet\S* .*)$", text, re.MULTILINE)]


def test_every_command_of_the_readme_runs(folder, tmp_path, command):
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    for name in ("imagenet", "mine"):
        (home / "data" / name).symlink_to(folder)
    shutil.copy(folder / "val" / "cat" / "0.jpg", home / "photo.jpg")
    assert len(commands()) >= 5
    for name, *arguments in commands():
        if "--recipe" in arguments:
            arguments += SMALL
        done = command(COMMANDS[name], *arguments, cwd=home)
        assert done.returncode == 0, (arguments, done.stderr)
        run, other = home / "runs" / "cspdarknet53", home / "runs" / "cspdarknet53-omega"
        if run.exists() and not other.exists():
            shutil.copytree(run, other)  # the README's other examples speak of this run
    assert (home / "preview.png").exists() and (home / "csp.weights").exists()


def test_make_targets_of_the_readme_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text())
    assert named and set(named) <= set(targets)


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/architecture.md",
        "docs/data.md",
        "docs/resuming.md",
        "docs/hardware.md",
        "data/README.md",
    ],
)
def test_links_lead_to_files(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{document} links to {target}"
