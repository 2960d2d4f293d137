"""Setting up a run: what can be found wrong before the first step, and the state it starts from."""

import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import nn

import cspnet
from cspnet.data.sources import Source, open_training, open_validation
from cspnet.errors import CheckpointError, RecipeError
from cspnet.nets import create
from cspnet.recipe import Recipe, from_text, to_text
from cspnet.train.checkpoint import TrainState, load
from cspnet.train.optim import Average, build_optimizer
from cspnet.train.runtime import (
    Place,
    Precision,
    find_device,
    find_precision,
    find_workers,
)


@dataclass(frozen=True)
class Job:
    """All that a run needs and that stays as it is while it runs."""

    recipe: Recipe
    folder: Path
    device: torch.device
    precision: Precision
    workers: int
    passes: list[range]  # the groups of a step that go through the net at once
    training: Source
    validation: Source
    console: Console


def prepare(recipe: Recipe, place: Place, console: Console) -> Job:
    """Everything that can be found wrong before the first step is found here. Writes nothing."""
    device = find_device(place.device)
    precision = find_precision(recipe.precision, device)
    at_once = place.passes or 1
    if not 1 <= at_once <= recipe.groups:
        raise RecipeError(
            f"--passes {at_once}: a step has {recipe.groups} groups, so give 1 to {recipe.groups}"
        )
    training = open_training(recipe.data.root)
    validation = open_validation(recipe.data.root, training.classes)
    asked = recipe.model.classes
    if asked not in ("auto", len(training.classes)):
        raise RecipeError(
            f"model.classes is {asked}, but {recipe.data.root} has {len(training.classes)} classes"
        )
    if len(training.classes) < 2:
        raise RecipeError(f"{recipe.data.root} has one class only; training needs two")
    return Job(
        recipe=recipe,
        folder=place.output,
        device=device,
        precision=precision,
        workers=find_workers(place.workers, device),
        passes=[
            range(first, min(first + at_once, recipe.groups))
            for first in range(0, recipe.groups, at_once)
        ],
        training=training,
        validation=validation,
        console=console,
    )


def check_folder(place: Place) -> None:
    """Raises RecipeError where the run folder is a file, or holds what this run would overwrite."""
    folder = place.output
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"--output {folder} is a file: name a folder")
    if not place.resume and folder.is_dir() and any(folder.iterdir()):
        raise RecipeError(
            f"the run folder {folder} is not empty: --resume continues the run in it, "
            "--output names another folder"
        )


def build_net(recipe: Recipe, classes: int) -> nn.Module:
    """The net of a recipe with fresh weights, float32, channels-last, on the CPU.

    The weights are a function of the seed, whatever the device.
    """
    model = recipe.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        net = create(
            model.name,
            classes=classes,
            activation=model.activation,
            leaky_slope=model.leaky_slope,
            width=model.width,
            norm_eps=model.norm_eps,
            norm_momentum=model.norm_momentum,
            group=recipe.group,
        )
    return net.to(memory_format=torch.channels_last)


class Trained(NamedTuple):
    """A net as a checkpoint has it, on the CPU."""

    net: nn.Module
    recipe: Recipe
    classes: list[str]
    step: int
    averaged: bool  # the weights are the moving average


def load_net(path: Path) -> Trained:
    """The net of a checkpoint, with the averaged weights where the run kept them."""
    saved = load(path)
    recipe = from_text(saved["recipe"])
    net = build_net(recipe, len(saved["classes"]))
    averaged = saved["state_dict_ema"] is not None
    net.load_state_dict(saved["state_dict_ema" if averaged else "state_dict"])
    return Trained(net, recipe, saved["classes"], saved["step"], averaged)


def start(job: Job) -> TrainState:
    """A fresh state, or the one in the run folder; the first files of the run are written."""
    recipe, console = job.recipe, job.console
    net = build_net(recipe, len(job.training.classes)).to(job.device)
    state = TrainState(
        net=net,
        optimizer=build_optimizer(net, recipe.optim),
        scaler=torch.amp.GradScaler(job.device.type, enabled=job.precision.scales_loss),
        average=Average(net, recipe.average.decay) if recipe.average.decay else None,
        recipe=recipe,
        classes=job.training.classes,
        images=len(job.training),
        precision=job.precision.name,
        loss_sum=torch.zeros((), device=job.device),
    )
    last = job.folder / "checkpoints" / "last.pt"
    if last.exists():
        for remark in state.restore(load(last)):
            console.print(f"[yellow]{remark}[/yellow]", highlight=False)
        done = "complete" if state.step >= recipe.schedule.steps else "goes on"
        console.print(f"resumed from {last}: step {state.step:,}, {done}", highlight=False)
    elif job.folder.is_dir() and (job.folder / "metrics.jsonl").exists():
        console.print(f"{job.folder} has no checkpoint yet: the run starts anew", highlight=False)
    if state.step > recipe.schedule.steps:
        raise CheckpointError(
            f"{last} is at step {state.step:,}, past schedule.steps={recipe.schedule.steps:,}"
        )
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "recipe.yaml").write_text(to_text(recipe))
    (job.folder / "env.json").write_text(json.dumps(environment(job), indent=2) + "\n")
    console.print(
        f"{recipe.model.name}: {sum(p.numel() for p in net.parameters()):,} parameters; "
        f"{len(job.training):,} training and {len(job.validation):,} validation images, "
        f"{len(job.training.classes):,} classes\n"
        f"device {job.device}, {job.precision.name} ({job.precision.reason}), "
        f"{job.workers} workers, {len(job.passes)} passes per step; run folder {job.folder}",
        highlight=False,
    )
    return state


def environment(job: Job) -> dict:
    """What the run ran with, for env.json."""
    gpu = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else None
    return {
        "command": sys.argv,
        "cspnet": cspnet.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(job.device),
        "gpu": gpu,
        "precision": job.precision.name,
        "precision_reason": job.precision.reason,
        "workers": job.workers,
        "threads": torch.get_num_threads(),
    }
