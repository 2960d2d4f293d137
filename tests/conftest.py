import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch

from cspnet.recipe import load as recipes
from tests.helpers import HIDDEN, ROOT, TINY, call, picture, run

# Small nets on few cores: threads would wait for each other longer than they work.
torch.set_num_threads(1)


@pytest.fixture
def tiny():
    """The digits recipe, made tiny, with further overrides."""

    def build(*overrides: str) -> recipes.Recipe:
        return recipes.load_recipe(ROOT / "recipes" / "digits.yaml", [*TINY, *overrides])

    return build


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Runs without an incident: each recipe is trained once, and shared by all test processes.

    Returns the run folder, which must not be changed.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def train(recipe: recipes.Recipe, **options):
        key = hashlib.sha256(f"{recipes.recipe_to_yaml(recipe)}{options}".encode()).hexdigest()[:16]
        folder = shared / "undisturbed" / key
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "done").exists():
                shutil.rmtree(folder / "run", ignore_errors=True)  # of an attempt that failed
                run(recipe, folder / "run", **options)
                (folder / "done").touch()
        return folder / "run"

    return train


@pytest.fixture
def finished_run(undisturbed, tiny, tmp_path):
    """A copy of a finished run of the tiny recipe, in tmp_path/run."""
    return Path(shutil.copytree(undisturbed(tiny()), tmp_path / "run"))


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a command of the package in this process; returns its output and exit code."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(name: str, *arguments, cwd=".") -> subprocess.CompletedProcess:
        names = {"main": "cspnet", "main_train": "cspnet-train", "main_eval": "cspnet-eval"}
        capsys.readouterr()
        with contextlib.chdir(cwd):
            code = call(shlex.join([names[name], *map(str, arguments)]))
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


@pytest.fixture
def process():
    """Run a command in a new process, as a user does: importing torch takes seconds."""

    def run(name: str, *arguments, cwd=None, timeout=120, **options) -> subprocess.CompletedProcess:
        call = f"import sys; from cspnet.cli import {name}; sys.argv[0] = '{name}'; {name}()"
        return subprocess.run(
            [sys.executable, "-c", call, *map(str, arguments)],
            cwd=cwd,
            timeout=timeout,
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
            | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
            | HIDDEN,
            **options,
        )

    return run


@pytest.fixture
def folder(tmp_path):
    """A data root with three classes of JPEGs: 12 for training and 3 for validation each."""
    root = tmp_path / "data"
    for split, count in (("train", 12), ("val", 3)):
        for number, name in enumerate(("apple", "bear", "cat")):
            target = root / split / name
            target.mkdir(parents=True)
            for i in range(count):
                image = picture(100 * number + 50 * (split == "val") + i)[:, :, ::-1]
                cv2.imwrite(str(target / f"{i}.jpg"), image)
    return root


# The longest tests start first: at the end they would leave one core idle.
EARLY = ("test_golden.py", "test_world.py", "test_signals.py", "test_torture.py", "test_fast.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in EARLY)


def pytest_configure(config):
    """Hide GPUs unless `-m gpu` is given, so that `--device auto` is the same everywhere."""
    if "gpu" not in (config.option.markexpr or "") or "not gpu" in config.option.markexpr:
        os.environ.update(HIDDEN)
