"""Killed dataloader workers, and systems that cannot start workers."""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import time

import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from cspnet.data import supervision
from cspnet.data.loader import evaluation_batches, training_groups
from cspnet.data.supervision import WorkerMonitor
from cspnet.datasets import inspect_file
from cspnet.errors import StoppedError, WorkersFailedError
from cspnet.recipe.schema import Evaluate
from cspnet.sources.data_root import open_training
from cspnet.train import loop
from cspnet.train.state import TrainState
from cspnet.train.step import TrainStep
from tests.helpers import content, history, last, metrics, numbers, run, same, small


@pytest.fixture(autouse=True)
def no_garbage():
    """Caught exceptions keep the memory of their loaders alive."""
    yield
    gc.collect()


@pytest.fixture
def source(folder):
    return open_training(str(folder))


def kill(worker):
    """Kill a worker and wait until it is dead."""
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)


def groups_of(source, monitor, workers=2, steps=8):
    recipe = small(f"schedule.steps={steps}")
    return contextlib.closing(training_groups(source, recipe, 0, workers, False, monitor=monitor))


def test_killed_workers_do_not_change_batches(source):
    with groups_of(source, None, workers=0) as groups:
        expected = [content(batch) for batch in groups]
    lines = []
    monitor = WorkerMonitor(lines.append)
    loaded = []
    with groups_of(source, monitor) as groups:
        for number, batch in enumerate(groups):
            loaded.append(content(batch))
            if number in (0, 5, 6):
                monitor.reset()  # each in a separate log interval
                kill(multiprocessing.active_children()[number % 2])
    assert loaded == expected
    assert monitor.deaths == len(lines) == 3
    assert "was killed by SIGKILL" in lines[0]
    assert "(3 deaths so far)" in lines[2]
    assert multiprocessing.active_children() == []


def test_worker_death_is_reported_only_while_waiting_for_a_batch(source):
    """torch would raise in its SIGCHLD handler, in the middle of a step or save."""
    monitor = WorkerMonitor(lambda line: None)
    with groups_of(source, monitor) as groups:
        next(groups)
        for worker in multiprocessing.active_children():
            kill(worker)
        end = time.monotonic() + 0.05
        while time.monotonic() < end:  # the handler would run between two of these
            pass
        assert monitor.deaths == 0
        assert len(list(groups)) > 0 and monitor.deaths == 1


def test_third_death_ends_the_run(source):
    monitor = WorkerMonitor(lambda line: None)
    with (
        groups_of(source, monitor, steps=40) as groups,
        pytest.raises(WorkersFailedError, match="3 times"),
    ):
        for _ in groups:
            for worker in multiprocessing.active_children():
                kill(worker)
    assert multiprocessing.active_children() == []


def test_requested_stop_lets_the_step_finish(source):
    """As with several ranks, which can only stop together after a step."""
    reasons = []
    monitor = WorkerMonitor(lambda line: None, reasons.append)
    count = 0
    with groups_of(source, monitor, steps=40) as groups:
        for _ in groups:
            count += 1
            if len(reasons) == 1:
                break
            for worker in multiprocessing.active_children():
                kill(worker)
    assert count >= 3 and "3 times" in reasons[0]


@pytest.fixture
def no_semaphores(monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(multiprocessing.context.BaseContext, "Queue", refuse)
    monkeypatch.setattr(multiprocessing.context.BaseContext, "Lock", refuse)


def test_main_process_decodes_without_semaphores(source, no_semaphores, capfd):
    """As in a container whose /dev/shm is full or read-only."""
    with groups_of(source, None, workers=0) as groups:
        expected = [content(batch) for batch in groups]
    lines = []
    with groups_of(source, WorkerMonitor(lines.append)) as groups:
        assert [content(batch) for batch in groups] == expected
    (line,) = lines
    assert "No space left on device" in line and "/dev/shm" in line
    batches = evaluation_batches(source, 8, 32, Evaluate(), 2, False)
    assert sum(int(batch.mask.sum()) for batch in batches) == len(source)
    errors = capfd.readouterr().err
    assert errors.count("cannot start dataloader workers") == 1 and "Traceback" not in errors


def test_check_reads_in_the_main_process_without_semaphores(source, no_semaphores, capfd):
    chunks = [chunk for *_, chunk in inspect_file.inspect_sources([source], 2)]
    inspections = [inspection for chunk in chunks for inspection in chunk]
    assert len(inspections) == len(source) and all(each.digest for each in inspections)
    assert "cannot start worker processes (No space left" in capfd.readouterr().err


def test_run_with_killed_workers_equals_the_undisturbed_run(
    tiny, undisturbed, tmp_path, monkeypatch
):
    recipe = tiny("schedule.steps=9", "evaluate.every=4")
    expected = undisturbed(recipe)
    original = TrainState.apply_update

    def killing(state):
        original(state)
        if state.step in (3, 6):
            kill(multiprocessing.active_children()[0])

    monkeypatch.setattr(TrainState, "apply_update", killing)
    run(recipe, tmp_path / "cut", workers=2)
    assert same(last(tmp_path / "cut")["state_dict"], last(expected)["state_dict"])
    assert numbers(metrics(tmp_path / "cut")) == numbers(metrics(expected))
    log = (tmp_path / "cut" / "train.log").read_text()
    assert log.count("restarting the workers") == 2
    assert "dataloader workers died 2 times" in log


def test_workers_that_keep_dying_end_the_run_after_a_save(tiny, undisturbed, tmp_path, monkeypatch):
    """Within one log interval. Only the interrupted step is lost."""
    recipe = tiny("schedule.steps=9", "log_every=100", "save_every=1000")
    expected = undisturbed(recipe)
    original = TrainStep.load

    def killing(self, groups, state, group_range):
        if state.step >= 3:
            for worker in multiprocessing.active_children():
                kill(worker)
        return original(self, groups, state, group_range)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "load", killing)
        with pytest.raises(StoppedError, match=r"died 3 times .* saved at step") as stopped:
            run(recipe, tmp_path / "cut", workers=2)
    assert stopped.value.exit_code == 75
    assert last(tmp_path / "cut")["step"] >= 4 and history(tmp_path / "cut")[-1]["event"] == "stop"
    run(recipe, tmp_path / "cut", resume=True)
    assert same(last(tmp_path / "cut")["state_dict"], last(expected)["state_dict"])


def test_workers_that_die_at_start_do_not_request_a_restart(tiny, tmp_path, monkeypatch):
    """Otherwise an `until` loop would retry an image that kills its decoder forever."""
    original = training_groups

    def killing(*arguments):
        for batch in original(*arguments):
            for worker in multiprocessing.active_children():
                kill(worker)
            yield batch

    monkeypatch.setattr(loop, "training_groups", killing)
    recipe = tiny("schedule.steps=30", "log_every=100", "save_every=2", "group=4")
    with pytest.raises(WorkersFailedError, match=r"3 times .* images of step 1 or of one"):
        run(recipe, tmp_path / "other", workers=2)
    assert history(tmp_path / "other")[-1]["event"] == "fail"


def test_partial_pipe_message_does_not_block_the_restart(source, monkeypatch):
    """torch's pin-memory thread waits for the rest of it, and its shutdown waits for the thread."""
    monkeypatch.setattr(supervision, "SHUTDOWN_TIMEOUT", 0.2)
    release = threading.Event()
    monkeypatch.setattr(
        _MultiProcessingDataLoaderIter, "_shutdown_workers", lambda _: release.wait()
    )
    monitor = WorkerMonitor(lambda line: None)
    count = 0
    with groups_of(source, monitor) as groups:
        for number, _ in enumerate(groups):
            count += 1
            if number == 2:
                kill(multiprocessing.active_children()[0])
            if number == 5:
                break
        assert monitor.deaths == 1 and count == 6
        release.set()
