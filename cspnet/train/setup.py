"""Setting up a run: what can be found wrong before the first step, and the state it starts from."""

import json
import os
import platform
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console

import cspnet
from cspnet.console import RunOutput
from cspnet.data.augment import augment
from cspnet.datasets.check import preflight
from cspnet.errors import CheckpointError, CrashError, DataError, RecipeError
from cspnet.recipe.load import recipe_to_yaml
from cspnet.recipe.schema import DIGITS, TIMM_PREFIX, Recipe
from cspnet.run.checkpoint import CheckpointFiles
from cspnet.run.lock import LOCK_NAME as LOCK
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
from cspnet.train.diagnose import is_finite
from cspnet.train.optim import EMA, build_optimizer
from cspnet.train.state import DatasetIdentity, TrainState, changed_fields
from cspnet.weights.load import build_net, init_net


@dataclass(frozen=True)
class Run:
    """All that a run needs and that stays as it is while it runs."""

    recipe: Recipe
    folder: Path
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
    return Run(
        recipe=recipe,
        folder=place.output,
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
            place.output / "checkpoints", recipe.archive_every, recipe.archive_keep
        ),
        place=place,
    )


def sizes_of_passes(groups: int) -> list[int]:
    """So many groups at once that a step has 1, 2, 3 … passes, most first: of 4 groups 4, 2, 1."""
    return sorted({-(-groups // passes) for passes in range(1, groups + 1)}, reverse=True)


def passes_of(groups: range, at_once: int) -> list[range]:
    """The groups in passes of `at_once`; the last one may have fewer."""
    return [groups[first : first + at_once] for first in range(0, len(groups), at_once)]


def check_folder(place: RunOptions) -> None:
    """Raises RecipeError where the run folder is a file, or holds what this run would overwrite."""
    folder = place.output
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"--output {folder} is a file: name a folder")
    if folder.is_dir() and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise RecipeError(f"--output {folder} cannot be read and written: name another folder")
    if not place.resume and folder.is_dir() and _holds_files(folder):
        raise RecipeError(
            f"the run folder {folder} is not empty: --resume continues the run in it, "
            "--output names another folder"
        )


def _holds_files(folder: Path) -> bool:
    """Whether there is more in it than what a start leaves that was broken off."""
    return any(path.suffix != ".tmp" and path.name != LOCK for path in folder.iterdir())


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
        _require_own(job)
    if state.step > recipe.schedule.steps:
        raise CheckpointError(
            f"{job.folder} is at step {state.step:,}, past schedule.steps={recipe.schedule.steps:,}"
        )
    job.checkpoints.size = state.size
    if lock and job.folder.is_dir():
        lock.take(job.folder)
    job.checkpoints.clean()  # what a killed save has left does not count as used
    _require_room(job)
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        if lock:
            lock.take(job.folder)
        replace_text(job.folder / "recipe.yaml", recipe_to_yaml(recipe))
        replace_text(job.folder / "env.json", json.dumps(environment(job), indent=2) + "\n")
        record(job, state, "resume" if saved else "start", remarks)
    except OSError as error:
        raise RecipeError(
            f"the run folder {job.folder} cannot be written: {error.strerror}. "
            "Name another with --output."
        ) from None
    for remark in preflight(job.training, job.validation):
        console.print(remark, style="yellow")
    console.print(
        f"{recipe.model.name}: {_parameters(net)}; "
        f"{len(job.training):,} training and {len(job.validation):,} validation images, "
        f"{len(classes):,} classes\n"
        f"device {job.device}, {job.precision.name} ({job.precision.reason}), "
        f"{job.workers} workers, run folder {job.folder}, data root {state.dataset.root}\n"
        f"at most {job.checkpoints.most} checkpoints of {job.checkpoints.size / 1e6:,.0f} MB at "
        f"once, {job.checkpoints.free() / 1e9:,.0f} GB free"
    )
    if job.world.size > 1:
        console.print(
            f"{job.world.size} processes, {job.world.local_size} on this machine, "
            f"{len(job.groups)} of the {recipe.groups} groups of a step each"
        )
    return state


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


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that a kill leaves the old one or the new one. OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def record(job: Run, state: TrainState, event: str, remarks: list[str] | None = None) -> None:
    """Adds a line to history.jsonl, which is never cut back: when the run started and ended.

    `event` is start, resume, done, stop (saved, exit code 75), fail or crash. On a full disk there
    is no line.
    """
    if not job.world.first:
        return
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "event": event,
        "step": state.step,
        "device": str(job.device),
        "processes": job.world.size,
        "host": platform.node(),
        "remarks": remarks or [],
    }
    with suppress(OSError), open(job.folder / "history.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def crashed(job: Run, state: TrainState, error: Exception) -> CrashError:
    """The error to raise after an unexpected exception, whose traceback goes to a file.

    The state is saved where it is that of a whole step and has no NaN or Inf.
    """
    saved = "the last checkpoint is as it was"
    if save_consistent(job, state):
        saved = f"saved at step {state.step:,}"
    report = "".join(traceback.format_exception(error))
    name = f"crash-{state.step:07}" + f"-rank{job.world.rank}" * (not job.world.first)
    file = job.folder / f"{name}.txt"
    where = f"The traceback is in {file}"
    try:
        file.write_text(_crash_report(job, state, report), "utf-8", "backslashreplace")
    except OSError:  # a full disk may be the reason of all
        job.console.log(report)
        print(report, file=sys.stderr)
        where = "The traceback is on stderr"
    # The last line of an exception that was raised in a dataloader worker is the exception itself.
    lines = str(error).strip().splitlines() or [""]
    line = lines[-1] if lines[0].startswith("Caught ") else lines[0]
    what = type(error).__name__ + f": {line[:200]}" * bool(line)
    record(job, state, "crash", [what, str(file)])
    return CrashError(
        f"unexpected {what} (step {state.step + 1:,}); {saved}. {where}. "
        "The same command with --resume continues the run; please report the traceback"
    )


def _crash_report(job: Run, state: TrainState, report: str) -> str:
    """The traceback with what is known of the run; a broken driver may tell nothing."""
    lines = [f"{datetime.now(UTC).isoformat(timespec='seconds')} step {state.step}"]
    with suppress(Exception):
        lines.append(json.dumps(environment(job)))
    return "\n".join([*lines, report])


def save_consistent(job: Run, state: TrainState) -> bool:
    """Saves the state of a run that has failed, if it is that of a whole step, without NaN or Inf.

    Whatever broke the run may break this as well: it raises nothing.
    """
    if not (job.world.first and state.consistent):
        return False
    with suppress(Exception):
        noted = int(state.bad_step) >= 0 and not state.scaler.is_enabled()
        if is_finite(state) and not noted:
            job.checkpoints.save(state.to_dict())
            return True
    return False


def _require_room(job: Run) -> None:
    """Raises RecipeError where the disk has too little room for the run's checkpoints."""
    short = job.checkpoints.shortage()
    if short > 0:
        size = job.checkpoints.size
        raise RecipeError(
            f"the disk of {job.folder} lacks {short / 1e6:,.0f} MB for the run's checkpoints, "
            f"{size / 1e6:,.0f} MB each: last, previous, best, one being written"
            + (f", {job.recipe.archive_keep} archives" if job.recipe.archive_every else "")
            + ". Free some, or name a folder on another disk with --output."
        )


def _require_own(job: Run) -> None:
    """Raises CheckpointError unless the folder is empty, or this run's before its first save."""
    stored = job.folder / "recipe.yaml"
    if stored.exists():
        if changed := changed_fields(stored.read_text(), job.recipe):
            raise CheckpointError(
                f"{stored} is another run's recipe ({', '.join(changed[:3])} differ), and there "
                "is no checkpoint to resume from: name another folder"
            )
        job.console.print(f"{job.folder} has no checkpoint yet: the run starts anew")
    elif job.folder.is_dir() and _holds_files(job.folder):
        raise CheckpointError(f"{job.folder} is not a run folder: it has no recipe.yaml")


def environment(job: Run) -> dict:
    """What the run ran with, for env.json."""
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
