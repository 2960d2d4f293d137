"""Starting a run: the state of its first step or of its last checkpoint, and its first files."""

import platform
from typing import Any

import torch

from cspnet.datasets.check import preflight
from cspnet.errors import CheckpointError, RecipeError
from cspnet.nets.network import Network
from cspnet.recipe.load import recipe_to_yaml
from cspnet.recipe.value_sources import recipe_sources
from cspnet.run.lock import RunLock
from cspnet.train.identity import changed_fields
from cspnet.train.optim import EMA, build_optimizer
from cspnet.train.setup import Run, environment, log_event
from cspnet.train.state import TrainState
from cspnet.weights.load import init_net
from cspnet.weights.trained import build_net


def start(run: Run, lock: RunLock | None = None) -> TrainState:
    """A new state, or that of the last checkpoint in the run folder.

    The main process takes the `lock` and writes the first files of the run; the others receive its
    state. Raises RecipeError if the processes see different data.
    """
    _require_same_everywhere(run)
    state: TrainState | None = None

    def begin() -> None:
        nonlocal state
        state = _begin(run, lock)

    run.processes.on_main(begin)
    if state is None:  # not the main process
        state = _new_state(run, build_net(run.recipe, len(run.train_set.classes)))
        state.load_state_dict(run.processes.broadcast_state(None))
    elif run.processes.size > 1:
        run.processes.broadcast_state(state.state_dict())
    return state


def _require_same_everywhere(run: Run) -> None:
    """Raise RecipeError unless all processes have the same data and precision."""
    identity = run.identity
    properties: dict[str, Any] = {
        "classes": len(identity.classes),
        "names of classes": identity.classes,
        "training images": len(run.train_set),
        "validation images": len(run.val_set),
        "names and sizes of training images": identity.dataset.train.contents,
        "names and sizes of validation images": identity.dataset.val.contents,
        "precision": identity.precision,
    }
    reports = run.processes.gather((platform.node(), properties))
    main_host, expected = reports[0]
    for rank, (host, actual) in enumerate(reports):
        for name, value in actual.items():
            main_value = expected[name]
            if value == main_value:
                continue
            if isinstance(value, list):  # the first difference
                pairs = zip(main_value, value, strict=False)
                main_value, value = next(pair for pair in pairs if pair[0] != pair[1])
            raise RecipeError(
                f"the processes see different data: {name} {main_value} in process 0 (on "
                f"{main_host}), {value} in process {rank} (on {host})"
            )


def _begin(run: Run, lock: RunLock | None) -> TrainState:
    """The state in the main process, once the run folder is ready."""
    saved, remarks = run.checkpoints.newest()
    for remark in remarks:
        run.output.print(remark, style="red")
    if saved:  # it holds the weights, so model.init_from is not read again
        net = build_net(run.recipe, len(run.train_set.classes))
    else:
        net, net_remarks = init_net(run.recipe, run.train_set.classes)
        for remark in net_remarks:
            run.output.print(remark)
    state = _new_state(run, net)
    if saved:
        remarks += _resume(run, state, saved)
    else:
        _require_same_run(run)
    last_step = run.recipe.schedule.steps
    if state.step > last_step:
        raise CheckpointError(
            f"{run.folder} is at step {state.step:,}, past schedule.steps={last_step:,}"
        )
    run.checkpoints.size = state.nbytes
    if lock and run.folder.path.is_dir():
        lock.take(run.folder.path)
    run.checkpoints.remove_temporary()  # the partial file of a killed save does not count as used
    run.checkpoints.require_space()
    _write_first_files(run, state, lock, "resume" if saved else "start", remarks)
    for remark in preflight(run.train_set, run.val_set):
        run.output.print(remark, style="yellow")
    _print_summary(run, state.net)
    return state


def _resume(run: Run, state: TrainState, saved: dict) -> list[str]:
    """Load a checkpoint into the state; return remarks, which are printed, too."""
    remarks = state.restore(saved, run.identity, run.options.force)
    for remark in remarks:
        run.output.print(remark, style="yellow")
    status = "complete" if state.step >= run.recipe.schedule.steps else "continuing"
    run.output.print(f"resumed in {run.folder}: step {state.step:,}, {status}")
    return remarks


def _write_first_files(
    run: Run, state: TrainState, lock: RunLock | None, event: str, remarks: list[str]
) -> None:
    """Create the run folder with its lock, recipe.yaml, env.json and history.jsonl."""
    sources = _recipe_sources(run)
    try:
        run.folder.path.mkdir(parents=True, exist_ok=True)
        if lock:
            lock.take(run.folder.path)
        run.folder.write_start(recipe_to_yaml(run.recipe), environment(run), sources)
        log_event(run, state, event, remarks)
    except OSError as error:
        raise RecipeError(
            f"the run folder {run.folder} cannot be written: {error.strerror}. "
            "Give another folder with --output."
        ) from None


def _recipe_sources(run: Run) -> dict[str, Any] | None:
    """Where the values of the recipe come from; None if unknown."""
    file, folder = run.options.recipe_file, run.folder
    if file is None:
        return None
    is_own = folder.is_run() and file.samefile(folder.recipe_file)
    return recipe_sources(run.recipe, file, folder.read_recipe_sources() if is_own else None)


def _print_summary(run: Run, net: Network) -> None:
    """Print what the run trains, on what, and where."""
    hardware, checkpoints, processes = run.hardware, run.checkpoints, run.processes
    run.output.print(
        f"{run.recipe.model.name}: {_parameters(net)}; "
        f"{len(run.train_set):,} training and {len(run.val_set):,} validation images, "
        f"{len(run.train_set.classes):,} classes\n"
        f"device {hardware.device}, {hardware.precision.name} ({hardware.precision.reason}), "
        f"{hardware.workers} workers, run folder {run.folder}, "
        f"data root {run.identity.dataset.root}\n"
        f"at most {checkpoints.max_files} checkpoints of {checkpoints.size / 1e6:,.0f} MB at a "
        f"time, {checkpoints.free_bytes() / 1e9:,.0f} GB free"
    )
    if processes.size > 1:
        run.output.print(
            f"{processes.size} processes, {processes.local_size} on this machine; "
            f"each computes {len(run.groups)} of the {run.recipe.groups} groups of a step"
        )


def _new_state(run: Run, net: Network) -> TrainState:
    """The state before the first step, on the device."""
    recipe, device, precision = run.recipe, run.hardware.device, run.hardware.precision
    if recipe.model.freeze_stages:
        net.freeze(recipe.model.freeze_stages)
    net = net.to(device)
    state = TrainState(
        net=net,
        optimizer=build_optimizer(net, recipe.optim),
        scaler=torch.amp.GradScaler(device.type, enabled=precision.scales_loss),
        ema=EMA(net, recipe.ema.decay) if recipe.ema.decay else None,
        loss_sum=torch.zeros((), device=device),
        bad_step=torch.tensor(-1, device=device),
    )
    if precision.scales_loss:
        state.updates = torch.zeros((), dtype=torch.float64, device=device)
    return state


def _parameters(net: Network) -> str:
    count = sum(p.numel() for p in net.parameters())
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    return f"{count:,} parameters" + (f", {frozen:,} of them frozen" if frozen else "")


def _require_same_run(run: Run) -> None:
    """Raise CheckpointError unless the folder is empty, or holds this run without a checkpoint."""
    folder = run.folder
    if folder.is_run():
        if changed := changed_fields(folder.recipe_file.read_text(), run.recipe):
            raise CheckpointError(
                f"{folder.recipe_file} is another run's recipe ({', '.join(changed[:3])} differ), "
                "and there is no checkpoint to resume from: give another folder with --output"
            )
        run.output.print(f"{folder} has no checkpoint yet: the run starts from step 0")
    elif folder.holds_files():
        raise CheckpointError(f"{folder} is not a run folder: it has no recipe.yaml")
