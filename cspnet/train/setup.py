"""Setting up a run: what can be found wrong before the first step, and the state it starts from."""

import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

import cspnet
from cspnet.console import RunOutput
from cspnet.data.augment import augment
from cspnet.datasets.check import preflight
from cspnet.errors import CheckpointError, DataError, RecipeError
from cspnet.recipe.load import recipe_to_yaml
from cspnet.recipe.schema import DIGITS, TIMM_PREFIX, Recipe
from cspnet.recipe.value_sources import recipe_sources
from cspnet.run.checkpoint import CheckpointFiles
from cspnet.run.folder import RunFolder
from cspnet.run.lock import RunLock
from cspnet.runtime.device import (
    ACTIVATION_BUDGETS,
    Precision,
    RunOptions,
    choose_precision,
    choose_workers,
    setup_device,
)
from cspnet.runtime.distributed import SINGLE_PROCESS, Processes
from cspnet.sources.data_root import Source, open_parts
from cspnet.sources.listing import Listing
from cspnet.train.optim import EMA, build_optimizer
from cspnet.train.state import DatasetIdentity, TrainState, changed_fields
from cspnet.weights.load import build_net, init_net


@dataclass(frozen=True)
class Run:
    """All that a run needs and that stays as it is while it runs."""

    recipe: Recipe
    folder: RunFolder
    device: torch.device
    precision: Precision
    workers: int
    world: Processes
    groups: range  # of a step, that this process takes
    passes: list[range]  # those of them that go through the net at once
    fit: bool  # as many of them as the device has memory for, to be found out
    compile: bool
    training: Source
    validation: Source
    console: RunOutput
    checkpoints: CheckpointFiles
    place: RunOptions
    augment: Callable = augment


def prepare(
    recipe: Recipe,
    place: RunOptions,
    console: Console | RunOutput,
    world: Processes = SINGLE_PROCESS,
) -> Run:
    """Everything that can be found wrong before the first step is found here. Writes nothing."""
    if isinstance(console, Console):
        console = RunOutput(console)
    device = setup_device(place.device, world)
    precision = choose_precision(recipe.precision, device)
    if recipe.groups % world.size:
        worlds = [str(n) for n in range(1, recipe.groups + 1) if recipe.groups % n == 0]
        raise RecipeError(
            f"{world.size} processes cannot share the {recipe.groups} groups of a step evenly "
            f"(batch={recipe.batch}, group={recipe.group}): start {' or '.join(worlds)}"
        )
    groups = world.share_of(recipe.groups)
    on_gpu = device.type == "cuda"
    foreign = recipe.model.name.startswith(TIMM_PREFIX)
    compile = on_gpu if place.compile is None else place.compile
    if place.memory not in ACTIVATION_BUDGETS:
        raise RecipeError(f"--memory {place.memory}: must be {', '.join(ACTIVATION_BUDGETS)}")
    if place.memory != "fast" and not compile:
        raise RecipeError(
            f"--memory {place.memory} has no effect: the net is not compiled. Add --compile"
        )
    at_once = 1 if place.passes in (None, "auto") else place.passes
    if at_once > 1 and foreign:
        raise RecipeError(
            f"--passes {at_once}: BatchNorm of timm's nets takes in a whole pass; the recipe's "
            "groups need --passes 1"
        )
    if not 1 <= at_once <= len(groups):
        of_it = "" if world.size == 1 else f" for each of {world.size} processes"
        raise RecipeError(
            f"--passes {at_once}: a step has {len(groups)} groups{of_it}, "
            f"so give 1 to {len(groups)}"
        )
    training, validation = open_parts(recipe.data.root)
    asked = recipe.model.classes
    if asked not in ("auto", len(training.classes)):
        raise RecipeError(
            f"model.classes is {asked}, but {recipe.data.root} has {len(training.classes)} classes"
        )
    if len(training.classes) < 2:
        raise RecipeError(f"{recipe.data.root} has one class only; training needs two")
    folder = RunFolder(place.output)
    return Run(
        recipe=recipe,
        folder=folder,
        device=device,
        precision=precision,
        workers=choose_workers(place.workers, device, world),
        world=world,
        groups=groups,
        passes=passes_of(groups, at_once),
        fit=not foreign and (place.passes == "auto" or (place.passes is None and on_gpu)),
        compile=compile,
        training=training,
        validation=validation,
        console=console,
        checkpoints=CheckpointFiles(
            folder.checkpoint_folder, recipe.archive_every, recipe.archive_keep
        ),
        place=place,
    )


def sizes_of_passes(groups: int) -> list[int]:
    """So many groups at once that a step has 1, 2, 3 … passes, most first: of 4 groups 4, 2, 1."""
    return sorted({-(-groups // passes) for passes in range(1, groups + 1)}, reverse=True)


def passes_of(groups: range, at_once: int) -> list[range]:
    """The groups in passes of `at_once`; the last one may have fewer."""
    return [groups[first : first + at_once] for first in range(0, len(groups), at_once)]


def start(job: Run, lock: RunLock | None = None, listed: bool = True) -> TrainState:
    """A fresh state, or the one in the run folder; the first files of the run are written.

    By the first process of the world, whose state is then that of all. It takes the `lock` before
    it writes anything. Raises RecipeError where the processes do not see the same data. A trial,
    which nobody resumes, needs no `listed` data set: that asks for the size of every file.
    """
    # By all processes: a slow disk must not make the others wait for the first one.
    dataset = _dataset(job) if listed else DatasetIdentity(absolute_root(job.recipe.data.root))
    _require_same(job, dataset)
    state: TrainState | None = None

    def begin() -> None:
        nonlocal state
        state = _begin(job, dataset, lock)

    job.world.by_first(begin)
    if job.world.size > 1:
        if state is None:
            state = _blank(job, build_net(job.recipe, len(job.training.classes)), dataset)
            state.take(job.world.share(None))
        else:
            job.world.share(state.to_dict())
    return state


def _require_same(job: Run, dataset: DatasetIdentity) -> None:
    seen = {
        "classes": len(job.training.classes),
        "names of classes": job.training.classes,
        "training images": len(job.training),
        "validation images": len(job.validation),
        "names and sizes of training images": dataset.train.contents,
        "names and sizes of validation images": dataset.val.contents,
        "precision": job.precision.name,
    }
    told = job.world.gather((platform.node(), seen))
    for rank, (host, other) in enumerate(told):
        for what, value in other.items():
            if value != told[0][1][what]:
                one, one_host = told[0][1][what], told[0][0]
                if isinstance(value, list):  # the first that differs
                    one, value = next(pair for pair in zip(one, value) if pair[0] != pair[1])  # noqa: B905
                raise RecipeError(
                    f"the processes do not see the same: {what} {one} in the first (on "
                    f"{one_host}), {value} in process {rank} (on {host})"
                )


def _begin(job: Run, dataset: DatasetIdentity, lock: RunLock | None) -> TrainState:
    recipe, console = job.recipe, job.console
    saved, remarks = job.checkpoints.newest()
    for remark in remarks:
        console.print(remark, style="red")
    classes = job.training.classes
    if saved:  # it holds the weights; those that the run began with are not needed
        net = build_net(recipe, len(classes))
    else:
        net, told = init_net(recipe, classes)
        for remark in told:
            console.print(remark)
    state = _blank(job, net, dataset)
    if saved:
        told = state.restore(saved, job.place.force)
        for remark in told:
            console.print(remark, style="yellow")
        done = "complete" if state.step >= recipe.schedule.steps else "goes on"
        console.print(f"resumed in {job.folder}: step {state.step:,}, {done}")
        remarks += told
    else:
        _require_same_run(job)
    if state.step > recipe.schedule.steps:
        raise CheckpointError(
            f"{job.folder} is at step {state.step:,}, past schedule.steps={recipe.schedule.steps:,}"
        )
    job.checkpoints.size = state.size
    if lock and job.folder.path.is_dir():
        lock.take(job.folder.path)
    job.checkpoints.remove_temporary()  # the partial file of a killed save does not count as used
    job.checkpoints.require_space()
    sources = _recipe_sources(job)
    try:
        job.folder.path.mkdir(parents=True, exist_ok=True)
        if lock:
            lock.take(job.folder.path)
        job.folder.write_start(recipe_to_yaml(recipe), environment(job), sources)
        log_event(job, state, "resume" if saved else "start", remarks)
    except OSError as error:
        raise RecipeError(
            f"the run folder {job.folder} cannot be written: {error.strerror}. "
            "Give another folder with --output."
        ) from None
    for remark in preflight(job.training, job.validation):
        console.print(remark, style="yellow")
    console.print(
        f"{recipe.model.name}: {_parameters(net)}; "
        f"{len(job.training):,} training and {len(job.validation):,} validation images, "
        f"{len(classes):,} classes\n"
        f"device {job.device}, {job.precision.name} ({job.precision.reason}), "
        f"{job.workers} workers, run folder {job.folder}, data root {state.dataset.root}\n"
        f"at most {job.checkpoints.max_files} checkpoints of {job.checkpoints.size / 1e6:,.0f} MB "
        f"at a time, {job.checkpoints.free_bytes() / 1e9:,.0f} GB free"
    )
    if job.world.size > 1:
        console.print(
            f"{job.world.size} processes, {job.world.local_size} on this machine, "
            f"{len(job.groups)} of the {recipe.groups} groups of a step each"
        )
    return state


def _recipe_sources(job: Run) -> dict[str, Any] | None:
    """Where the values of the recipe come from; None if unknown."""
    file, folder = job.place.recipe_file, job.folder
    if file is None:
        return None
    is_own = folder.is_run() and file.samefile(folder.recipe_file)
    return recipe_sources(job.recipe, file, folder.read_recipe_sources() if is_own else None)


def _blank(job: Run, net: torch.nn.Module, dataset: DatasetIdentity) -> TrainState:
    """The state of a run before its first step, on the device."""
    recipe = job.recipe
    if recipe.model.freeze_stages:
        net.freeze(recipe.model.freeze_stages)
    net = net.to(job.device)
    state = TrainState(
        net=net,
        optimizer=build_optimizer(net, recipe.optim),
        scaler=torch.amp.GradScaler(job.device.type, enabled=job.precision.scales_loss),
        average=EMA(net, recipe.ema.decay) if recipe.ema.decay else None,
        recipe=recipe,
        classes=job.training.classes,
        images=len(job.training),
        dataset=dataset,
        precision=job.precision.name,
        precision_reason=job.precision.reason,
        loss_sum=torch.zeros((), device=job.device),
        bad_step=torch.tensor(-1, device=job.device),
    )
    if job.precision.scales_loss:
        state.updates = torch.zeros((), dtype=torch.float64, device=job.device)
    return state


def _dataset(job: Run) -> DatasetIdentity:
    """What a resumed run compares, and several processes."""
    root = absolute_root(job.recipe.data.root)
    try:
        return DatasetIdentity(root, Listing.of(job.training), Listing.of(job.validation))
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None


def absolute_root(root: str) -> str:
    """A data root that means the same in every working directory."""
    return root if root == DIGITS else os.path.abspath(os.path.expanduser(root))


def _parameters(net: torch.nn.Module) -> str:
    count = sum(p.numel() for p in net.parameters())
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    return f"{count:,} parameters" + (f", {frozen:,} of them frozen" if frozen else "")


def log_event(job: Run, state: TrainState, event: str, remarks: Sequence[str] = ()) -> None:
    """Appends an event of the run to history.jsonl, on the first process only."""
    if job.world.first:
        job.folder.log_event(event, state.step, str(job.device), job.world.size, remarks)


def _require_same_run(job: Run) -> None:
    """Raises CheckpointError unless the folder is empty, or holds this run with no checkpoint."""
    folder = job.folder
    if folder.is_run():
        if changed := changed_fields(folder.recipe_file.read_text(), job.recipe):
            raise CheckpointError(
                f"{folder.recipe_file} is another run's recipe ({', '.join(changed[:3])} differ), "
                "and there is no checkpoint to resume from: give another folder with --output"
            )
        job.console.print(f"{folder} has no checkpoint yet: the run starts from step 0")
    elif folder.holds_files():
        raise CheckpointError(f"{folder} is not a run folder: it has no {folder.recipe_file.name}")


def environment(job: Run) -> dict:
    """Command, machine, versions and resources of this start, for env.json."""
    gpu = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else None
    return {
        "command": sys.argv,
        "directory": os.getcwd(),
        "data_root": absolute_root(job.recipe.data.root),
        "host": platform.node(),
        "cspnet": cspnet.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(job.device),
        "gpu": gpu,
        "precision": job.precision.name,
        "precision_reason": job.precision.reason,
        "workers": job.workers,
        "processes": job.world.size,
        "threads": torch.get_num_threads(),
    }
