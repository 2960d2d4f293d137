"""Every command of the documents, typed as it stands, on a small data set and a small net."""

import contextlib
import re
import shlex
import shutil
from pathlib import Path

import cv2
import pytest

from tests.conftest import ROOT, call, picture

SMALL = [
    *("batch=8", "group=4", "data.image_size=32", "model.width=0.125"),
    *("schedule.steps=2", "schedule.warmup_steps=1"),
]
DOCUMENTS = ["README.md", "data/README.md"]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
# Commands that cannot be run here as they stand, and why.
EXCEPT = {
    "cspnet prepare imagenet": "wants the archives; tests/test_fetch.py has small ones",
    "cspnet prepare cifar10": "wants the network; tests/test_fetch.py",
    "cspnet prepare imagenette": "wants the network; tests/test_fetch.py",
    "cspnet-train --recipe cspdarknet53-omega --data data/imagenet --device cuda": "wants a GPU",
    "cspnet-train --recipe cspdarknet53-omega --data data/imagenet --device cuda --resume": "too",
    "cspnet index data/packed": "wants tar files that `cspnet pack` has just made",
}

# Options of other programs.
ELSEWHERE = {
    *("--install-completion", "--local-dir", "--repo-type", "--index-url"),
    *("--nproc-per-node", "--max-restarts", "--no-python", "--dereference", "--hard-dereference"),
    *("--shm-size", "--now", "--lr"),
}


def commands(document: str) -> list[str]:
    """Lines of a document's indented and fenced blocks that call our commands, in order."""
    text = (ROOT / document).read_text().replace("\\\n", " ")
    fenced = "\n".join(re.findall(r"^```(?:sh|bash)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = re.findall(r"^ {4}(.*)$", text, re.MULTILINE) + fenced.splitlines()
    return [line.strip() for line in lines if re.match(r"cspnet(-train|-eval)? ", line)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with the data sets that the documents speak of, and a trained run."""
    home = tmp_path_factory.mktemp("home")
    for split, count in (("train", 8), ("val", 1)):
        for number, name in enumerate(("apple", "bear", "cat")):
            folder = home / "data" / "imagenet" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                file = str(folder / f"{split}{i}.jpg")
                cv2.imwrite(file, picture(100 * number + 50 * (split == "val") + i))
    (home / "data" / "mine").symlink_to(home / "data" / "imagenet")
    (home / "DIR").symlink_to(home / "data" / "imagenet")
    cv2.imwrite(str(home / "photo.jpg"), picture(0))
    with contextlib.chdir(home):
        line = "cspnet-train --recipe cspdarknet53-omega --data data/imagenet --output trained"
        assert call(shlex.join([*line.split(), *SMALL])) == 0
    return home


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if commands(name)])
def test_every_command_runs(document, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    for made in (*home.glob("runs"), *home.glob("data/packed")):
        shutil.rmtree(made)
    lent = set()
    for line in commands(document):
        if line in EXCEPT:
            continue
        # A run that the document speaks of, and that none of its commands has trained.
        trains = line.startswith("cspnet-train") and "--recipe" in line
        named = re.findall(r"runs/[\w-]+" + r"(?=/)" * trains, line)
        for name in named:
            if not Path(name).exists():
                shutil.copytree("trained", name)
                lent.add(name)
        if trains:
            for name in lent - set(named):
                shutil.rmtree(name)
                lent.remove(name)
        if "--recipe" in line:
            # timm's nets have one width, and a preview takes no step.
            unfit = ("model.width",) * ("timm/" in line) + ("schedule.",) * ("preview" in line)
            small = [setting for setting in SMALL if not setting.startswith(unfit)]
            small += ["--seconds=1"] * line.startswith("cspnet plan")
            line = shlex.join([*shlex.split(line, comments=True), *small])
        assert call(line) == 0, f"{line}\n{capsys.readouterr().err}"


def test_exceptions_are_still_in_the_documents():
    everything = {line for document in DOCUMENTS for line in commands(document)}
    assert set(EXCEPT) <= everything, set(EXCEPT) - everything
    assert len(commands("README.md")) >= 8


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:^ {4}|`)make ([a-z-]+)", (ROOT / document).read_text(), re.MULTILINE)
    assert set(named) <= set(targets)
    assert named or document != "README.md"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{document} links to {target}"


def test_options_that_the_documents_name_exist():
    """`--option` in a document is one of ours, of a benchmark's, or of a program it speaks of."""
    folders = (ROOT / "cspnet" / "cli", ROOT / "benchmarks")
    source = "".join(path.read_text() for folder in folders for path in folder.glob("*.py"))
    known = {*re.findall(r"--[a-z][\w-]*", source), "--compile", "--no-compile"}
    # Those that typer names by their parameters.
    known |= {"--" + n.replace("_", "-") for n in re.findall(r"^    (\w+): ", source, re.MULTILINE)}
    for document in DOCUMENTS:
        code = re.findall(r"`([^`\n]+)`", (ROOT / document).read_text())
        named = {option for text in code for option in re.findall(r"(?<!\S)--[a-z][\w-]*", text)}
        assert named <= known | ELSEWHERE, (document, named - known - ELSEWHERE)
