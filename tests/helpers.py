"""Helpers of several test modules."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from rich.console import Console
from torch import nn

from cspnet import cli
from cspnet.recipe import load as recipes
from cspnet.recipe.load import load_recipe
from cspnet.run.checkpoint import load_checkpoint
from cspnet.runtime.options import RunOptions
from cspnet.train import loop
from cspnet.weights.trained import Trained, build_net

# Options of a recipe that reads small groups of small images.
SMALL_GROUPS = ["data.image_size=32", "batch=8", "group=4", "mix.images_per_draw=2"]
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}  # no GPU


ROOT = Path(__file__).parent.parent
CLASSES = ["apple", "bear", "cat"]  # of the fixture `folder`


# A network that trains in milliseconds per step, with mixing and EMA.
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


def call(line: str) -> int:
    """Run a command line in this process; returns the exit code."""
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
    """A smooth, colourful image, RGB uint8 [height, width, 3]; noise would hide a shift."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


# Trains with a recipe given as text and kills itself once the given step has been saved.
TRAIN_AND_DIE = """
import os, pathlib, signal, sys, torch
torch.set_num_threads(1)
from rich.console import Console
from cspnet.recipe.load import recipe_from_yaml
from cspnet.run import checkpoint
from cspnet.runtime.options import RunOptions
from cspnet.train import loop
text, output, workers, die_after = sys.argv[1:]
original = checkpoint.CheckpointFiles.save
def save(self, content, best=False):
    original(self, content, best)
    if content["step"] == int(die_after):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.CheckpointFiles.save = save
options = RunOptions(pathlib.Path(output), resume=True, device="cpu", workers=int(workers))
loop.train(recipe_from_yaml(text), options, Console(quiet=True))
"""


def in_process(recipe, output, workers=0, die_after=-1):
    arguments = [recipes.recipe_to_yaml(recipe), str(output), str(workers), str(die_after)]
    return subprocess.run([sys.executable, "-c", TRAIN_AND_DIE, *arguments], timeout=120).returncode


def run(recipe, output, **options):
    """Train on the CPU without output; returns the scores of the last validation."""
    options = RunOptions(output, device="cpu", **{"workers": 0, **options})
    return loop.train(recipe, options, Console(quiet=True))


def last(output):
    return load_checkpoint(output / "checkpoints" / "last.pt")


def history(output):
    return [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]


def same(a, b):
    """Whether nested dictionaries, lists, tensors and numbers are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def numbers(lines):
    """Metrics without times and memory."""
    clock = ("images_per_second", "data_wait", "memory_gb")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


class SuddenDeath(BaseException):
    """Ends a run as SIGKILL does: no exception handler saves anything."""


def die_at(monkeypatch, owner, name, call, error=SuddenDeath):
    """Make the given call of a function or method of `owner` raise."""
    original, calls = getattr(owner, name), []

    def die(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise error("on purpose")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, die)


# A shell starts background jobs with SIGINT ignored, and their children inherit that.
TRAIN_COMMAND = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from cspnet.cli import main_train; sys.argv[0] = 'cspnet-train'; main_train()"
)


def begin(output, *overrides, workers=0, **options):
    """Start a training process, in its own session."""
    arguments = ["--recipe", "digits", "--output", str(output), "--resume", "-j", str(workers)]
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN_COMMAND, *arguments, *TINY, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def trained(*overrides, classes=10, live=True):
    """A network whose BatchNorm statistics and classifier distinguish images."""
    recipe = load_recipe(None, ["data.image_size=64", "model.width=0.25", "seed=5", *overrides])
    net = build_net(recipe, classes)
    if live:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for module in net.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = 0.3
            for seed in range(6):
                net.train()(torch.rand(32, 3, 64, 64, generator=generator) * (seed + 1) / 6)
            net.head.fc.weight *= 8
            net.head.fc.bias.normal_(generator=generator)
    names = [f"class {number:02}" for number in range(classes)]
    return Trained(net.eval(), recipe, names, 70, True, 70 * 128)


def views(count=20):
    """Images as the network gets them: float [N, 3, 64, 64] in [0, 1]."""
    pictures = [picture(seed, 64, 64) for seed in range(count)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def run_lines(remarks):
    """Execute the Python lines that an export prints; returns the names they define."""
    start = next(i for i, remark in enumerate(remarks) if remark.startswith("import "))
    defined = {}
    exec("\n".join(remarks[start:]), defined)
    return defined


def live(net: nn.Module) -> nn.Module:
    """Give each BatchNorm random affine parameters and the statistics of a batch."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    nn.init.uniform_(net.head.fc.bias, -0.1, 0.1)
    with torch.no_grad():
        net.train()(torch.randn(8, 3, 64, 64))
    return net.eval()


def small(*overrides):
    return load_recipe(
        None, ["data.image_size=64", "batch=8", "group=4", "schedule.steps=20", *overrides]
    )


def content(batch):
    return batch.images.numpy().tobytes(), batch.labels.tolist(), batch.mask.tolist(), *batch[3:]


def make_flat(root):
    """Move the images of val/ out of their class folders."""
    for file in list((root / "val").rglob("*.jpg")):
        file.rename(root / "val" / f"{file.parent.name}_{file.name}")
    for name in CLASSES:
        (root / "val" / name).rmdir()


def make_flat_in_one_folder(root):
    """Move the images of val/ to val/images/."""
    make_flat(root)
    (root / "val").rename(root / "images")
    (root / "val").mkdir()
    (root / "images").rename(root / "val" / "images")


def make_tiny_imagenet(root):
    """Lay val/ out as Tiny-ImageNet's archive does."""
    make_flat_in_one_folder(root)
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01443537\t0\t32\t44\t62\n")


def make_kaggle(root):
    """Move the data root to ILSVRC/Data/CLS-LOC, as in Kaggle's archive."""
    inner = root / "ILSVRC" / "Data" / "CLS-LOC"
    inner.mkdir(parents=True)
    for part in ("train", "val"):
        (root / part).rename(inner / part)
