import contextlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from cspnet import cli
from cspnet.recipe import load as recipes

HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}  # no GPU
ROOT = Path(__file__).parent.parent
# Small nets on few cores: threads would wait for each other longer than they work.
torch.set_num_threads(1)

# A net that trains in milliseconds a step; mixing and averaging are on.
TINY = [
    "batch=16",
    "group=8",
    "model.width=0.125",
    "model.norm_momentum=0.1",
    "schedule.steps=7",
    "schedule.warmup_steps=3",
    "log_every=1",
    "save_every=1",
    "evaluate.every=1000",
    "mix.probability=0.5",
]


@pytest.fixture
def tiny():
    """A recipe from the digits' one, made tiny, with further overrides."""

    def build(*overrides: str) -> recipes.Recipe:
        return recipes.load_recipe(ROOT / "recipes" / "digits.yaml", [*TINY, *overrides])

    return build


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs a command of the package in this process; what it printed, and its exit code."""
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
    """The same in a process of its own, as a user would: seconds more, to import torch."""

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


def call(line: str) -> int:
    """Runs a command line in this process; its exit code."""
    name, *arguments = shlex.split(line)
    mains = {"cspnet": cli.main, "cspnet-train": cli.main_train, "cspnet-eval": cli.main_eval}
    before = sys.argv
    sys.argv = [name, *arguments]
    try:
        mains[name]()
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before
    return 0


def picture(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """A smooth, colourful picture, RGB uint8 [height, width, 3]; noise would hide a shift."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


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


# Processes that wait for each other, and the longest tests, first: at the end they would keep one
# core idle.
EARLY = ("test_world.py", "test_signals.py", "test_torture.py", "test_fast.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in EARLY)


def pytest_configure(config):
    """Without `-m gpu` no test sees a GPU: what `--device auto` means is the same everywhere."""
    if "gpu" not in (config.option.markexpr or "") or "not gpu" in config.option.markexpr:
        os.environ.update(HIDDEN)
