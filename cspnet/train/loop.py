"""The training loop, in order of time."""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial

from rich.console import Console

from cspnet.console import RunOutput
from cspnet.data.loader import Batch, training_groups
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
from cspnet.recipe.schedule import is_log_due, is_save_due, is_validation_due
from cspnet.recipe.schema import Recipe
from cspnet.report.preview import render_sheet, write_png
from cspnet.run.folder import RunFolder
from cspnet.run.lock import RunLock
from cspnet.runtime.device import setup_device
from cspnet.runtime.distributed import find_processes, is_process_group_error, process_group
from cspnet.runtime.options import RunOptions
from cspnet.runtime.signals import StopRequest
from cspnet.sources.data_root import display_names
from cspnet.text import end_sentence
from cspnet.train.compile import prepare_step
from cspnet.train.diagnose import LossGuard, explain_errors, first_line, is_finite, non_finite_error
from cspnet.train.failure import crash_error, save_if_consistent
from cspnet.train.reporter import Reporter
from cspnet.train.setup import Run, log_event, prepare
from cspnet.train.start import start
from cspnet.train.state import TrainState, checkpoint_content
from cspnet.train.step import TrainStep
from cspnet.train.unreadable import UnreadableImages


def train(recipe: Recipe, options: RunOptions, console: Console | RunOutput) -> Scores | None:
    """Train to the end of the schedule; return the scores of the last validation.

    None if the run was complete before. Raises StoppedError after a signal or at the time limit,
    with the state saved. A held output is released once no user error is possible any more.
    """
    stop = StopRequest(options.max_hours)
    processes = find_processes()
    output = console if isinstance(console, RunOutput) else RunOutput(console)
    if not processes.is_main:
        output = RunOutput(Console(quiet=True))
    with process_group(processes, setup_device(options.device, processes)), RunLock() as lock:
        folder = RunFolder(options.output)
        processes.on_main(partial(claim_folder, folder, options.resume, lock))
        try:
            run = prepare(recipe, options, output, processes)
            state = start(run, lock)
        except CspnetError:
            output.release(only="red")  # a damaged checkpoint may be the cause
            raise
        if processes.is_main:
            output.open_log(folder.log_file)
        output.release()
        try:
            with recorded_end(run, state):
                return train_loop(run, state, stop)
        finally:
            output.close_log()


def claim_folder(folder: RunFolder, resume: bool, lock: RunLock) -> None:
    """Check the run folder; lock it if it holds a run, before anything else is loaded."""
    folder.require_usable(resume)
    if folder.is_run():
        lock.take(folder.path)


@contextmanager
def recorded_end(run: Run, state: TrainState) -> Iterator[None]:
    """Record how the block ends; save if an error leaves a consistent state."""
    try:
        yield
    except StoppedError as error:
        log_event(run, state, "stop", [first_line(error)])
        run.output.log(str(error))
        raise
    except CspnetError as error:
        if isinstance(error, DataError):
            save_if_consistent(run, state)
        log_event(run, state, "fail", [first_line(error)])
        run.output.log(f"error: {error}")
        raise
    except Exception as error:
        if run.processes.size > 1 and is_process_group_error(error):
            lost = "another process of the run has ended or hangs"
            log_event(run, state, "fail", [lost])
            run.output.log(f"error: {lost}")
            raise  # `process_group` turns it into a message
        crash = crash_error(run, state, error)
        run.output.log(f"error: {crash}")
        raise crash from None
    except KeyboardInterrupt:
        left = "aborted by a second Ctrl-C, without a save"
        log_event(run, state, "fail", [left])
        run.output.print(left, style="red")
        raise
    log_event(run, state, "done")


def train_loop(
    run: Run, state: TrainState, stop: StopRequest, step: TrainStep | None = None
) -> Scores | None:
    """Train from the step that the state is at; `step` is that of `prepare_step` by default."""
    recipe, processes, monitor = run.recipe, run.processes, worker_monitor(run, stop)
    step = step or prepare_step(run, state)
    unreadable, guard = unreadable_images(run), LossGuard(state)
    scores, last_step = None, recipe.schedule.steps
    with (
        stop,
        Reporter(run, state, unreadable, monitor) as reporter,
        closing(open_groups(run, state.step, monitor)) as groups,
        explain_errors(recipe, state, step.groups_at_once),
        save_if_workers_lost(run, state, reporter),
    ):
        if state.step == 0 and processes.is_main:
            show_samples(run, step, reporter)
        while True:
            # --- every evaluate.every steps: validate, then save together with the score
            if is_validation_due(recipe, state.step) and state.validated_step < state.step:
                scores = validate(run, state, stop, reporter, monitor)
                is_best = scores.top1 > state.best_top1
                reporter.validation(scores, is_best)
                requested = processes.agree(stop.requested)
                save(run, state, reporter, requested, scores.top1 if is_best else None, True)
            if state.step == last_step:
                return scores

            # --- one optimizer step
            lr = state.set_learning_rate(recipe)
            micro_batches = []  # all attacked before a forward pass updates the running statistics
            for group_range in step.micro_batches:
                with reporter.waiting_for_data():
                    loaded = [next(groups) for _ in group_range]
                unreadable.check(loaded)
                micro_batches.append(step.load(loaded, state, group_range))
            with state.inconsistent():
                state.note_loss(step.forward_backward(micro_batches, state.scaler))
                state.apply_update()
            reporter.step()

            # --- every log_every steps: read the loss, for which the host waits for the device
            if is_log_due(recipe, state.step):
                unreadable.exchange()
                loss = state.take_mean_loss()
                if not guard.accepts(loss):
                    raise divergence_error(run, state)
                reporter.log(loss, lr)
                unreadable.require_few()

            # --- save if due, or if a stop is requested
            requested = processes.agree(stop.requested)  # once, since a signal may come at any time
            save_due = is_save_due(recipe, state.step) or is_validation_due(recipe, state.step)
            if requested or save_due:
                save(run, state, reporter, requested)
                reporter.restart_clock()
            if requested and state.step < last_step:
                raise stop_error(requested, state, recipe)


def worker_monitor(run: Run, stop: StopRequest) -> WorkerMonitor:
    """The supervision of the dataloader workers.

    One of several processes cannot end a step alone, so there lost workers request a stop of all.
    """
    is_alone = run.processes.size == 1
    report = partial(run.output.print, style="yellow") if run.processes.is_main else None
    return WorkerMonitor(report, None if is_alone else stop.request)


def unreadable_images(run: Run) -> UnreadableImages:
    """The unreadable images that the run has met until now."""
    max_share = run.recipe.data.max_unreadable
    return UnreadableImages(run.folder, run.train_set, max_share, run.output, run.processes)


def open_groups(run: Run, step: int, monitor: WorkerMonitor) -> Generator[Batch]:
    """The groups of this process from step `step` on, in order."""
    pin = run.hardware.device.type == "cuda"
    return training_groups(
        run.train_set, run.recipe, step, run.hardware.workers, pin, run.groups, monitor
    )


@contextmanager
def save_if_workers_lost(run: Run, state: TrainState, reporter: Reporter) -> Iterator[None]:
    """Turn WorkersFailedError into StoppedError with the state saved; a restart may help.

    If this process has not completed a step, every restart would fail in the same way, so the error
    is raised again. So it is with several processes, since one of them cannot save alone.
    """
    first_step = state.step
    try:
        yield
    except WorkersFailedError as error:
        if run.processes.size > 1 or state.step == first_step:
            raise WorkersFailedError(
                f"{end_sentence(error)} It happens with the images of step {state.step + 1:,} or "
                "of one of the next steps"
            ) from None
        if state.saved_step < state.step:
            save(run, state, reporter, str(error))
        raise stop_error(str(error), state, run.recipe) from None


def save(
    run: Run,
    state: TrainState,
    reporter: Reporter,
    requested: str | None,
    best_top1: float | None = None,
    validated: bool = False,
) -> None:
    """Save the state, also as the best one if `best_top1` is given; never one with NaN or Inf.

    `validated` marks the current step as validated; until that is saved, a resumed run validates it
    again. A full disk only skips the save, unless the run ends here, a stop was `requested`, or
    --stop-on-full-disk is given.
    """
    if not is_finite(state) or (int(state.bad_step) >= 0 and not state.scaler.is_enabled()):
        raise divergence_error(run, state)
    before = state.best_top1, state.validated_step
    if best_top1 is not None:
        state.best_top1 = best_top1
    if validated:
        state.validated_step = state.step

    def write() -> None:
        reporter.flush()
        content = checkpoint_content(run.identity, state)
        run.checkpoints.save(content, best=best_top1 is not None)

    try:
        run.processes.on_main(write)
        state.saved_step = state.step
    except SaveError as error:
        state.best_top1 = before[0]  # that of best.pt
        if requested or state.step == run.recipe.schedule.steps:
            raise
        if run.options.stop_on_full_disk:
            raise StoppedError(
                f"{error}\n--stop-on-full-disk: free some space, then --resume"
            ) from None
        reporter.save_failed(error)
    except BaseException:
        state.best_top1, state.validated_step = before
        raise


def divergence_error(run: Run, state: TrainState) -> NonFiniteError:
    """The error to raise for non-finite values, with a diagnosis by the main process."""
    state.consistent = False  # the diagnosis loads the weights of the last checkpoint
    replay = TrainStep(run, state.net).replay_step
    return run.processes.on_main(
        lambda: non_finite_error(state, run.recipe, run.train_set, run.folder, replay)
    )


def stop_error(reason: str, state: TrainState, recipe: Recipe) -> StoppedError:
    """The error to raise after a save on request."""
    return StoppedError(
        f"{reason}: saved at step {state.step:,} of {recipe.schedule.steps:,}; "
        "the same command with --resume continues from there"
    )


def validate(
    run: Run, state: TrainState, stop: StopRequest, reporter: Reporter, monitor: WorkerMonitor
) -> Scores:
    """Scores of the EMA weights, or of the raw ones if the run has no EMA.

    A signal interrupts it: the state was saved before, or is saved now if the disk was full then,
    and a resumed run validates first. The time limit does not: one that is shorter than a
    validation would let no run finish.
    """

    def check_signal(_: int) -> None:
        if requested := run.processes.agree(stop.signal):
            if state.saved_step < state.step:
                state.net.train()
                save(run, state, reporter, requested)
            raise stop_error(requested, state, run.recipe)

    return evaluate_network(
        state.net,
        run.val_set,
        run.recipe,
        run.hardware.precision,
        run.hardware.workers,
        weights=state.ema.tensors if state.ema else None,
        progress=check_signal,
        processes=run.processes,
        monitor=monitor,
    )


def show_samples(run: Run, step: TrainStep, reporter: Reporter) -> None:
    """Render the images of the first group as a page, for the run folder and TensorBoard."""
    names = display_names(run.train_set.classes)
    title = "step 0, group 0"
    page = render_sheet(
        *TrainStep(run, step.net).augmented_batch(0), names, run.recipe.loss.label_smoothing, title
    )
    with suppress(OSError):  # on a full disk
        write_png(run.folder.sample_image, page)
    reporter.image("train/images", page)
