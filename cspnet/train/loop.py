"""The training loop, in the order of time."""

from contextlib import closing, suppress
from functools import partial

import torch
from rich.console import Console
from torch import nn

from cspnet.console import RunOutput
from cspnet.data.loader import TrainGroups, training_groups
from cspnet.data.supervision import WorkerMonitor
from cspnet.errors import (
    CspnetError,
    DataError,
    NonFiniteError,
    SaveError,
    StoppedError,
    WorkersFailedError,
)
from cspnet.inference.evaluate import Scores, evaluate_network
from cspnet.recipe.schema import Recipe
from cspnet.report.preview import render_sheet, write_png
from cspnet.run.folder import RunFolder
from cspnet.run.lock import RunLock
from cspnet.runtime.device import RunOptions, StopRequest, setup_device
from cspnet.runtime.distributed import (
    RunningStats,
    find_processes,
    gradient_sync,
    is_process_group_error,
    process_group,
)
from cspnet.sources.data_root import display_names
from cspnet.text import end_sentence
from cspnet.train.adversarial import attack, attack_step_size
from cspnet.train.compile import accelerate, compiling_told
from cspnet.train.diagnose import explain_out_of_memory, is_finite, non_finite_error, note_loss
from cspnet.train.failure import crash_error, save_if_consistent
from cspnet.train.optim import apply_update as update
from cspnet.train.optim import learning_rate
from cspnet.train.reporter import Reporter
from cspnet.train.setup import Run, log_event, prepare, start
from cspnet.train.state import TrainState
from cspnet.train.step import at_most, attack_some, cross_entropy, forward, one_pass, to_device


def train(recipe: Recipe, place: RunOptions, console: Console | RunOutput) -> Scores | None:
    """Trains to the end of the schedule; returns the last validation's scores.

    None where the run was complete before. Raises Stopped after a signal or at the time limit, with
    the state saved. An output that holds its lines is released when all that the user may have got
    wrong was checked.
    """
    stop = StopRequest(place.max_hours)
    world = find_processes()
    output = console if isinstance(console, RunOutput) else RunOutput(console)
    if not world.first:
        output = RunOutput(Console(quiet=True))
    with process_group(world, setup_device(place.device, world)), RunLock() as lock:
        folder = RunFolder(place.output)
        world.by_first(lambda: reserve(folder, place, lock))
        try:
            job = prepare(recipe, place, output, world)
            state = start(job, lock)
        except CspnetError:
            output.release(only="red")  # a damaged checkpoint may be the reason
            raise
        if world.first:
            output.open_log(folder.log_file)
        output.release()
        try:
            scores = train_loop(job, state, stop)
        except StoppedError as error:
            log_event(job, state, "stop", [first_line(error)])
            output.log(str(error))
            raise
        except CspnetError as error:
            if isinstance(error, DataError):
                save_if_consistent(job, state)
            log_event(job, state, "fail", [first_line(error)])
            output.log(f"error: {error}")
            raise
        except Exception as error:
            if world.size > 1 and is_process_group_error(error):
                lost = "another process of the run has ended, or hangs"
                log_event(job, state, "fail", [lost])
                output.log(f"error: {lost}")
                raise  # `joined` says what happened
            crash = crash_error(job, state, error)
            output.log(f"error: {crash}")
            raise crash from None
        except KeyboardInterrupt:
            left = "left at once, without a save, by a second Ctrl-C"
            log_event(job, state, "fail", [left])
            output.print(left, style="red")
            raise
        finally:
            output.close_log()
        log_event(job, state, "done")
        return scores


def reserve(folder: RunFolder, place: RunOptions, lock: RunLock) -> None:
    """Checks the run folder and, if it holds a run, locks it, before anything slow is done."""
    folder.require_usable(place.resume)
    if folder.is_run():
        lock.take(folder.path)


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def train_loop(job: Run, state: TrainState, stop: StopRequest) -> Scores | None:
    """The steps that are left, one by one."""
    recipe, world = job.recipe, job.world
    net, last = state.net, recipe.schedule.steps
    report_worker = partial(job.console.print, style="yellow") if world.first else None
    # Of several processes one alone cannot end the step: all of them stop after it.
    monitor = WorkerMonitor(report_worker, None if world.size == 1 else stop.request)
    # The first sum on the device: what it takes of its memory is gone before passes are tried.
    world.sum_(torch.zeros(1, device=job.device))
    if state.step < last:
        state.consistent = False  # a failure may leave the weights of a trial
        job, net = accelerate(
            job,
            state,
            lambda job, net, scale: one_pass(job, state, net, scale=scale),
            lambda job, net: at_most(job, state, net),
        )
        state.consistent = True
    scores = None
    stream = training_groups(
        *(job.training, recipe, state.step, job.workers, job.device.type == "cuda"),
        *(job.groups, monitor),
    )
    together, statistics = (
        world.together(net, job.device),
        RunningStats(world, net, len(job.groups)),
    )
    with (
        stop,
        Reporter(
            job.folder, state, job.training, job.console, world, job.workers, monitor
        ) as report,
        closing(stream) as groups,
        compiling_told(state),
        explain_out_of_memory(
            len(job.passes[0]), state
        ),  # inside: what a compiler says of memory is its
    ):
        if state.step == 0 and world.first:
            show_samples(job, state.net, report)
        while True:
            if is_validation_due(state) and state.validated < state.step:
                scores = validate(job, state, stop, report, monitor)
                best = scores.top1 > state.best_top1
                report.validation(scores, best)
                asked = world.agree(stop.requested)
                save(job, state, report, asked, scores.top1 if best else None, validated=True)
            if state.step == last:
                return scores

            rate = learning_rate(state.updates + 1, recipe)
            for parameters in state.optimizer.param_groups:
                parameters["lr"] = rate * parameters["share"]
            batch, losses = [], []
            for part in job.passes:
                try:
                    loaded = [report.fetch(groups) for _ in part]
                except WorkersFailedError as error:
                    raise workers_lost(error, job, state, report) from None
                images, targets = to_device(job, loaded, state.step, part)
                # All attacks come first: the passes move the running statistics that these use.
                images = attack_some(job, state, net, images, targets, part)
                batch.append((images, targets))
            state.consistent = False
            for number, (images, targets) in enumerate(batch, 1):
                with gradient_sync(number == len(batch), together):
                    loss = cross_entropy(forward(job, together, images), targets) / recipe.batch
                    state.scaler.scale(loss).backward()
                losses.append(loss.detach())
            note_loss(state, statistics.settle(sum(losses)))
            applied = update(state.optimizer, state.scaler)
            state.step += 1
            state.updates += 1 if applied is None else applied
            if state.average:
                state.average.update(state.updates, applied)
            state.consistent = True
            if not report.step(rate):
                raise broken(job, state)

            asked = world.agree(stop.requested)  # read once: a signal may come at any time
            if asked or is_save_due(state) or is_validation_due(state):
                save(job, state, report, asked)
                report.restart_clock()
            if asked and state.step < last:
                raise stopped(asked, state)


def workers_lost(
    error: WorkersFailedError, job: Run, state: TrainState, report: Reporter
) -> CspnetError:
    """The error to raise when dataloader workers keep dying: Stopped, with the state saved.

    The error itself where no step was done since the start: starting again would lead to the same,
    over and over. And in one of several processes, which cannot save alone.
    """
    if job.world.size > 1 or state.step == report.first_step:
        step = f"step {state.step + 1:,} or one of the next"
        return WorkersFailedError(f"{end_sentence(error)} It happens with the images of {step}")
    if state.saved < state.step:
        save(job, state, report, str(error))
    return stopped(str(error), state)


def save(
    job: Run,
    state: TrainState,
    report: Reporter,
    asked: str | None,
    best_top1: float | None = None,
    validated: bool = False,
) -> None:
    """Saves the state, as the best one too where it is; never one with NaN or Inf.

    `validated`: the validation of this step is done. It counts from the save on: a run that ends
    before it validates again. A disk that is full pauses the saving, unless the run ends here, was
    `asked` to, or has --stop-when-full.
    """
    if not is_finite(state) or (int(state.bad_step) >= 0 and not state.scaler.is_enabled()):
        raise broken(job, state)
    before = state.best_top1, state.validated
    if best_top1 is not None:
        state.best_top1 = best_top1
    if validated:
        state.validated = state.step

    def write() -> None:
        report.flush()
        job.checkpoints.save(state.to_dict(), best=best_top1 is not None)

    try:
        job.world.by_first(write)
        state.saved = state.step
    except SaveError as error:
        state.best_top1 = before[0]  # that of the file
        if asked or state.step == job.recipe.schedule.steps:
            raise
        if job.place.stop_when_full:
            raise StoppedError(
                f"{error}\n--stop-when-full: free some space, then --resume"
            ) from None
        report.unsaved(error)
    except BaseException:
        state.best_top1, state.validated = before
        raise


def broken(job: Run, state: TrainState) -> NonFiniteError:
    """What is not finite; the first process looks at the images of that step once more."""
    state.consistent = False  # the weights of the last save are loaded, to compare

    def again(step: int) -> torch.Tensor:
        groups = TrainGroups(job.training, job.recipe)
        batch = [groups[step, group] for group in range(job.recipe.groups)]
        images, _ = to_device(job, batch, step, range(job.recipe.groups))
        return forward(job, state.net, images)

    return job.world.by_first(lambda: non_finite_error(state, job.training, job.folder, again))


def is_save_due(state: TrainState) -> bool:
    """Whether the steps done so far are to be saved, to last.pt or as an archive."""
    recipe = state.recipe
    every = (recipe.save_every, recipe.archive_every)
    return any(steps and state.step % steps == 0 for steps in every)


def is_validation_due(state: TrainState) -> bool:
    """Whether a validation follows the steps done so far: every so often, and after the last."""
    schedule, every = state.recipe.schedule, state.recipe.evaluate.every
    return state.step > 0 and (state.step % every == 0 or state.step == schedule.steps)


def stopped(asked: str, state: TrainState) -> StoppedError:
    return StoppedError(
        f"{asked}: saved at step {state.step:,} of {state.recipe.schedule.steps:,}; "
        "the same command with --resume goes on from there"
    )


def validate(
    job: Run, state: TrainState, stop: StopRequest, report: Reporter, monitor: WorkerMonitor
) -> Scores:
    """Scores of the weights that a user would take: the averaged ones where the run has them.

    A signal breaks it off: the state was saved before (if the disk had room; else it is now), and a
    resumed run validates first. A time limit does not: one that is shorter than a validation would
    let no run end.
    """

    def heed(_: int) -> None:
        if asked := job.world.agree(stop.signal):
            if state.saved < state.step:
                state.net.train()
                save(job, state, report, asked)
            raise stopped(asked, state)

    weights = state.average.tensors if state.average else None
    try:
        return evaluate_network(
            state.net,
            job.validation,
            job.recipe,
            job.precision,
            job.workers,
            weights=weights,
            progress=heed,
            world=job.world,
            monitor=monitor,
        )
    except WorkersFailedError as error:
        raise workers_lost(error, job, state, report) from None


def look(
    job: Run, net: nn.Module, step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What the first group of a step brings: images, soft targets, and the images after the attack.

    The attack is that of the step, or of the schedule's end where the step has none; None where the
    recipe has none.
    """
    recipe = job.recipe
    part = range(1)
    images, targets = to_device(job, [TrainGroups(job.training, recipe)[step, 0]], step, part)
    if not recipe.adversarial.step_size:
        return images, targets, None
    changed = attack(
        lambda seen: forward(job, net, seen),
        net,
        images,
        targets if recipe.adversarial.objective == "mislead" else None,
        attack_step_size(step, recipe) or recipe.adversarial.step_size,
        1024.0 if job.precision.scales_loss else 1.0,
    )
    return images, targets, changed


def show_samples(job: Run, net: nn.Module, report: Reporter) -> None:
    """One page of the very images that the first group of the run is trained on."""
    recipe = job.recipe
    names = display_names(job.training.classes)
    page = render_sheet(*look(job, net, 0), names, recipe.loss.label_smoothing, "step 0, group 0")
    with suppress(OSError):  # a full disk; TensorBoard may have it
        write_png(job.folder.sample_image, page)
    report.picture("train/images", page)
