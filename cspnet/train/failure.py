"""What a run does when an unexpected exception ends it: saves its state, and reports the crash."""

import sys
import traceback
from contextlib import suppress

from cspnet.errors import CrashError
from cspnet.train.diagnose import is_finite
from cspnet.train.setup import Run, environment, log_event
from cspnet.train.state import TrainState, checkpoint_content


def save_if_consistent(run: Run, state: TrainState) -> bool:
    """Saves the state of a failed run if it is that of a complete step, without NaN or Inf.

    Never raises, since the failure may affect the save, too. Returns whether the state was saved.
    """
    if not (run.processes.is_main and state.consistent):
        return False
    with suppress(Exception):
        loss_was_bad = int(state.bad_step) >= 0 and not state.scaler.is_enabled()
        if is_finite(state) and not loss_was_bad:
            run.checkpoints.save(checkpoint_content(run.identity, state))
            return True
    return False


def crash_error(run: Run, state: TrainState, error: Exception) -> CrashError:
    """The error to raise for an unexpected exception, whose traceback is written to a file.

    Saves the state if it is consistent.
    """
    saved = "the last checkpoint is unchanged"
    if save_if_consistent(run, state):
        saved = f"saved at step {state.step:,}"
    file = run.folder.crash_file(state.step, run.processes.rank)
    where = f"The traceback is in {file}"
    text = "".join(traceback.format_exception(error))
    description = None
    with suppress(Exception):  # a broken driver
        description = environment(run)
    try:
        run.folder.write_crash_report(state.step, run.processes.rank, description, text)
    except OSError:  # a full disk, which may have caused the exception
        run.output.log(text)
        print(text, file=sys.stderr)
        where = "The traceback is on stderr"
    summary = _summary(error)
    log_event(run, state, "crash", [summary, str(file)])
    return CrashError(
        f"unexpected {summary} (step {state.step + 1:,}); {saved}. {where}. "
        "The same command with --resume continues the run; please report the traceback"
    )


def _summary(error: Exception) -> str:
    """The type and one line of an exception."""
    lines = str(error).strip().splitlines() or [""]
    # In a dataloader worker's exception, the last line is that of the original one.
    line = lines[-1] if lines[0].startswith("Caught ") else lines[0]
    return type(error).__name__ + f": {line[:200]}" * bool(line)
