"""Setting up a run: everything that can be checked before the first step."""

import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

import cspnet
from cspnet.console import RunOutput
from cspnet.errors import DataError, RecipeError
from cspnet.recipe.schema import DIGITS, Recipe
from cspnet.run.checkpoint import CheckpointFiles
from cspnet.run.folder import RunFolder
from cspnet.runtime.device import Hardware, choose_precision, choose_workers, setup_device
from cspnet.runtime.distributed import SINGLE_PROCESS, Processes
from cspnet.runtime.options import ACTIVATION_BUDGETS, RunOptions
from cspnet.sources.data_root import open_parts
from cspnet.sources.listing import Listing
from cspnet.sources.protocol import Source
from cspnet.train.identity import DatasetIdentity, RunIdentity
from cspnet.train.micro_batch import choose_groups_at_once
from cspnet.train.state import TrainState


@dataclass(frozen=True)
class Run:
    """What the setup of a run found; it does not change while the run trains."""

    recipe: Recipe
    options: RunOptions
    hardware: Hardware
    processes: Processes
    groups: range  # of each step, that this process computes
    identity: RunIdentity
    train_set: Source
    val_set: Source
    output: RunOutput
    folder: RunFolder
    checkpoints: CheckpointFiles

    @property
    def compiles(self) -> bool:
        """Whether the network is to be compiled."""
        return compiles(self.options, self.hardware.device)


def compiles(options: RunOptions, device: torch.device) -> bool:
    """Whether a run compiles its network: by default on a GPU."""
    return device.type == "cuda" if options.compile is None else options.compile


def prepare(
    recipe: Recipe,
    options: RunOptions,
    output: Console | RunOutput,
    processes: Processes = SINGLE_PROCESS,
    *,
    list_data: bool = True,
    checkpoints: CheckpointFiles | None = None,
    select_val: Callable[[Source], Source] = lambda source: source,
) -> Run:
    """Check everything that can be checked before the first step. Writes no files.

    `list_data` computes the digest of the data set, which reads the size of each file; only resumes
    and several processes compare it. `checkpoints` and `select_val` replace the checkpoints and the
    validation set. Raises a CspnetError that says what to change.
    """
    if isinstance(output, Console):
        output = RunOutput(output)
    device = setup_device(options.device, processes)
    precision = choose_precision(recipe.precision, device)
    if recipe.groups % processes.size:
        sizes = [str(n) for n in range(1, recipe.groups + 1) if recipe.groups % n == 0]
        raise RecipeError(
            f"{processes.size} processes cannot share the {recipe.groups} groups of a step evenly "
            f"(batch={recipe.batch}, group={recipe.group}): start {' or '.join(sizes)}"
        )
    groups = processes.own_groups(recipe.groups)
    _check_memory_options(recipe, options, device, len(groups))
    train_set, val_set = open_parts(recipe.data.root)
    classes = train_set.classes
    if recipe.model.classes not in ("auto", len(classes)):
        raise RecipeError(
            f"model.classes is {recipe.model.classes}, but {recipe.data.root} has "
            f"{len(classes)} classes"
        )
    if len(classes) < 2:
        raise RecipeError(f"{recipe.data.root} has only one class; training needs at least two")
    folder = RunFolder(options.output)
    return Run(
        recipe=recipe,
        options=options,
        hardware=Hardware(device, precision, choose_workers(options.workers, device, processes)),
        processes=processes,
        groups=groups,
        identity=RunIdentity(
            recipe=recipe,
            classes=classes,
            images=len(train_set),
            dataset=_dataset(recipe, train_set, val_set, list_data),
            precision=precision.name,
            precision_reason=precision.reason,
        ),
        train_set=train_set,
        val_set=select_val(val_set),
        output=output,
        folder=folder,
        checkpoints=checkpoints
        or CheckpointFiles(folder.checkpoint_folder, recipe.archive_every, recipe.archive_keep),
    )


def _check_memory_options(
    recipe: Recipe, options: RunOptions, device: torch.device, groups: int
) -> None:
    """Raise RecipeError if --recompute or --micro-batch is invalid, or has no effect."""
    if options.recompute not in ACTIVATION_BUDGETS:
        raise RecipeError(
            f"--recompute {options.recompute}: must be {', '.join(ACTIVATION_BUDGETS)}"
        )
    if options.recompute != "none" and not compiles(options, device):
        raise RecipeError(
            f"--recompute {options.recompute} has no effect, because the network is not compiled: "
            "add --compile"
        )
    choose_groups_at_once(options, recipe, groups, device.type == "cuda")


def _dataset(recipe: Recipe, train_set: Source, val_set: Source, listed: bool) -> DatasetIdentity:
    """The data set for comparison; in every process, so that none waits for a slow disk."""
    root = absolute_root(recipe.data.root)
    if not listed:
        return DatasetIdentity(root)
    try:
        return DatasetIdentity(root, Listing.of(train_set), Listing.of(val_set))
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None


def absolute_root(root: str) -> str:
    """The data root as an absolute path."""
    return root if root == DIGITS else os.path.abspath(os.path.expanduser(root))


def environment(run: Run) -> dict:
    """What the run ran with, for env.json."""
    gpu = (
        torch.cuda.get_device_name(run.hardware.device)
        if run.hardware.device.type == "cuda"
        else None
    )
    return {
        "command": sys.argv,
        "directory": os.getcwd(),
        "data_root": absolute_root(run.recipe.data.root),
        "host": platform.node(),
        "cspnet": cspnet.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(run.hardware.device),
        "gpu": gpu,
        "precision": run.hardware.precision.name,
        "precision_reason": run.hardware.precision.reason,
        "workers": run.hardware.workers,
        "micro_batch": run.options.micro_batch or "default",
        "compile": run.compiles,
        "recompute": run.options.recompute,
        "processes": run.processes.size,
        "threads": torch.get_num_threads(),
    }


def log_event(run: Run, state: TrainState, event: str, remarks: Sequence[str] = ()) -> None:
    """Append an event of the run to history.jsonl, in the main process only."""
    if run.processes.is_main:
        device, size = str(run.hardware.device), run.processes.size
        run.folder.log_event(event, state.step, device, size, remarks)
