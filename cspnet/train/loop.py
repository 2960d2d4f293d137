"""The training loop, in the order of time, and the setting-up before it."""

import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

import cspnet
from cspnet.data.augment import augment, draw, normalize
from cspnet.data.loader import Groups, training_groups
from cspnet.data.sources import Source, open_training, open_validation
from cspnet.errors import CheckpointError, RecipeError, Stopped
from cspnet.evaluate import Scores, evaluate
from cspnet.nets import create
from cspnet.recipe import Recipe, to_text
from cspnet.report.metrics import Report
from cspnet.report.preview import sheet, write_png
from cspnet.train.adversarial import attack, attacked, strength
from cspnet.train.checkpoint import TrainState, load, save
from cspnet.train.optim import Average, build_optimizer, learning_rate
from cspnet.train.runtime import (
    Place,
    Precision,
    Stop,
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


def train(recipe: Recipe, place: Place, console: Console) -> Scores | None:
    """Trains to the end of the schedule; returns the last validation's scores.

    None where the run was complete before. Raises Stopped after a signal, with the state saved.
    """
    job = prepare(recipe, place, console)
    state = start(job)
    net = torch.compile(state.net) if place.compile else state.net
    scores = None
    last = recipe.schedule.steps
    with Stop() as stop, Report(job.folder, state, job.training, console) as report:
        groups = training_groups(
            job.training, recipe, state.step, job.workers, job.device.type == "cuda"
        )
        if state.step == 0:
            show_samples(job, report)
        while state.step < last:
            rate = learning_rate(state.step + 1, recipe)
            for parameters in state.optimizer.param_groups:
                parameters["lr"] = rate
            for part in job.passes:
                loaded = [report.fetch(groups) for _ in part]
                images, targets = to_device(job, loaded, state.step, part)
                images = attack_some(job, state, net, images, targets, part)
                loss = cross_entropy(forward(job, net, images), targets) / recipe.batch
                state.scaler.scale(loss).backward()
                state.loss_sum += loss.detach()
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.loss_steps += 1
            if state.average:
                state.average.update(state.step)
            report.step(rate)

            best = False
            if state.step % recipe.evaluate.every == 0 or state.step == last:
                scores = validate(job, state)
                best = scores.top1 > state.best_top1
                state.best_top1 = max(state.best_top1, scores.top1)
                report.validation(scores, best)
            if best or stop.requested or state.step % recipe.save_every == 0 or state.step == last:
                folder = job.folder / "checkpoints"
                save(state.to_dict(), folder / "last.pt", folder / "best.pt" if best else None)
            if stop.requested and state.step < last:
                raise Stopped(
                    f"{stop.requested}: saved at step {state.step:,} of {last:,}; "
                    "the same command with --resume goes on from there"
                )
    return scores


def prepare(recipe: Recipe, place: Place, console: Console) -> Job:
    """Everything that can be found wrong before the first step is found here. Writes nothing."""
    device = find_device(place.device)
    precision = find_precision(recipe.precision, device)
    at_once = place.passes or 1
    if not 1 <= at_once <= recipe.groups:
        raise RecipeError(
            f"--passes {at_once}: a step has {recipe.groups} groups, so give 1 to {recipe.groups}"
        )
    folder = place.output
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"--output {folder} is a file: name a folder")
    if not place.resume and folder.is_dir() and any(folder.iterdir()):
        raise RecipeError(
            f"the run folder {folder} is not empty: --resume continues the run in it, "
            "--output names another folder"
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
        folder=folder,
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


def to_device(job: Job, groups: list, step: int, part: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Augmented images in [0, 1] and soft targets of some groups of a step, on the device."""
    images, labels = (
        torch.cat([getattr(group, name).to(job.device, non_blocking=True) for group in groups])
        for name in ("images", "labels")
    )
    draws = draw(job.recipe, step, part).to(job.device)
    return augment(images, labels, draws, job.recipe, len(job.training.classes))


def forward(job: Job, net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits [B, K] of images in [0, 1], in the run's precision."""
    with job.precision.autocast(job.device):
        return net(normalize(images, job.recipe.data.normalize))


def attack_some(
    job: Job, state: TrainState, net: nn.Module, images, targets, part: range
) -> torch.Tensor:
    """The images of a pass, those of the attacked groups changed by the net against itself."""
    recipe = job.recipe
    chosen = attacked(recipe, state.step, part)
    if not chosen.any():
        return images
    chosen = torch.from_numpy(np.flatnonzero(np.repeat(chosen, recipe.group))).to(job.device)
    changed = attack(
        lambda seen: forward(job, net, seen),
        state.net,
        images[chosen],
        targets[chosen] if recipe.adversarial.target == "label" else None,
        strength(state.step, recipe),
        state.scaler.scale(torch.ones((), device=job.device)),
    )
    return images.index_copy(0, chosen, changed)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over the images of the cross-entropy with soft targets [B, K], in float32."""
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def validate(job: Job, state: TrainState) -> Scores:
    """Scores of the weights that a user would take: the averaged ones where the run has them."""
    weights = state.average.tensors if state.average else None
    return evaluate(
        state.net, job.validation, job.recipe, job.precision, job.workers, weights=weights
    )


def show_samples(job: Job, report: Report) -> None:
    """One page of the very images that the first step is trained on."""
    part = job.passes[0]
    groups = [Groups(job.training, job.recipe)[0, group] for group in part]
    images, _ = to_device(job, groups, 0, part)
    page = sheet(images[:32])
    write_png(job.folder / "preview" / "step-0000000.png", page)
    report.picture("train/images", page)
