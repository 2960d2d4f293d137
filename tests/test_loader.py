"""Shared buffers of batches: reused, but never while their images are referenced."""

import contextlib
import gc
import multiprocessing
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cspnet.data.loader import EvalBatches, TrainGroups, evaluation_batches, training_groups
from cspnet.data.shared_memory import SharedBuffers, SlotRequest
from cspnet.images import decode
from cspnet.recipe.schema import Evaluate
from cspnet.sources import data_root
from cspnet.sources.folder import Files
from tests.conftest import ROOT
from tests.helpers import content, small


@pytest.fixture
def source(folder):
    return data_root.open_training(str(folder))


def both(source, recipe, workers):
    """Training groups, then evaluation batches."""
    yield from training_groups(source, recipe, 0, workers, False)
    yield from evaluation_batches(source, 8, 64, Evaluate(), workers, False)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.start_image_size=32", "data.full_size_from=0.5"],
        ["data.reduced_decode=true", "data.image_size=32"],
    ],
)
def test_held_batches_are_not_overwritten(source, overrides):
    """With more batches held than slots, one and two workers, and changing image sizes."""
    with open(source.name(3), "wb"):
        pass  # unreadable
    recipe = small(*overrides)
    expected = [content(batch) for batch in both(source, recipe, 0)]
    assert any(unreadable for *_, unreadable in expected)
    for workers in (1, 2):
        held = list(both(source, recipe, workers))
        assert len({batch.images.data_ptr() for batch in held}) == len(held)
        assert [content(batch) for batch in held] == expected


def test_groups_have_the_image_size_of_their_step(source):
    recipe = small("data.start_image_size=32", "data.full_size_from=0.5")
    sides = [group.images.shape[1] for group in training_groups(source, recipe, 0, 1, False)]
    assert sides == [32] * 20 + [64] * 20
    assert small("data.start_image_size=32", "data.full_size_from=0").size_at(0) == 64


def test_a_view_keeps_its_batch_alive(source):
    groups = training_groups(source, small(), 0, 1, False)
    rows = [next(groups).images[3, :, 5].numpy() for _ in range(40)]
    plain = training_groups(source, small(), 0, 0, False)
    assert all((row == next(plain).images[3, :, 5].numpy()).all() for row in rows)


def test_buffers_are_reused_and_freed(source):
    addresses = [group.images.data_ptr() for group in training_groups(source, small(), 0, 2, False)]
    assert (
        len(addresses) == 40 and len(set(addresses)) <= 8
    )  # the groups of two steps, and those in use
    groups = training_groups(source, small(), 0, 1, False)
    kept = next(groups)
    before = content(kept)
    assert len(SharedBuffers.pools) == 1
    groups.close()
    del groups
    gc.collect()
    assert not SharedBuffers.pools and content(kept) == before
    assert not multiprocessing.active_children()


def test_images_are_not_pickled(source):
    groups = TrainGroups(source, small())
    groups.buffers = SharedBuffers(2, 4 * 64 * 64 * 3)
    data = pickle.dumps(groups[SlotRequest((0, 0), groups.buffers.acquire())])
    assert len(data) < 2000
    assert content(pickle.loads(data)) == content(groups[0, 0])


def test_previous_content_of_a_slot_is_overwritten(source):
    """Padding and unreadable images are black."""
    with open(source.name(33), "wb"):
        pass
    batches = EvalBatches(source, 16, 64, Evaluate())
    batches.buffers = SharedBuffers(1, 16 * 64 * 64 * 3)
    batches.buffers.memory.fill_(255)
    batch = pickle.loads(pickle.dumps(batches[SlotRequest(2, batches.buffers.acquire())]))
    assert batch.mask.tolist() == [True] * 4 + [False] * 12 and batch.unreadable == [33]
    black = [not image.any() for image in batch.images]
    assert black == [False, True, False, False] + [True] * 12


def test_batches_without_space_in_shared_memory(source, monkeypatch):
    """As in a container with a small /dev/shm, which holds neither buffers nor tensors."""

    def no_room(*_):
        raise RuntimeError("unable to allocate shared memory(shm)")

    expected = [content(batch) for batch in both(source, small(), 0)]
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", no_room)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", no_room)
    with pytest.raises(RuntimeError, match="unable to allocate"):
        SharedBuffers(1, 1)
    assert [content(batch) for batch in both(source, small(), 2)] == expected


def test_evaluation_of_an_empty_source():
    assert list(evaluation_batches(Files([]), 8, 64, Evaluate(), 2, False)) == []


@pytest.mark.parametrize("scaled", [True, False])
def test_each_sample_is_decoded_once(source, monkeypatch, scaled):
    """In training, with mixing, with and without reduced decoding."""
    recipe = small(f"data.reduced_decode={scaled}", "mix.probability=1", "data.image_size=32")
    decoded = []
    original = decode.cv2.imdecode
    monkeypatch.setattr(
        decode.cv2, "imdecode", lambda *given: (decoded.append(given[1]), original(*given))[1]
    )
    groups = TrainGroups(source, recipe)
    for step in range(6):
        groups[step, 0]
    assert len(decoded) == 6 * 4 and (len(set(decoded)) > 1) is scaled
    list(evaluation_batches(source, 8, 64, Evaluate(), 0, False))
    assert len(decoded) == 6 * 4 + 36


def held_by_a_worker():
    """Memory of the only worker in bytes, including its share of shared pages (PSS)."""
    (worker,) = multiprocessing.active_children()
    rollup = Path(f"/proc/{worker.pid}/smaps_rollup").read_text()
    return 1024 * next(int(line.split()[1]) for line in rollup.splitlines() if line[:4] == "Pss:")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux reports it")
def test_worker_memory_does_not_grow(source):
    """For 560 images, decoded pixels take 8 MB, views 7 MB, files 1 MB."""
    recipe = small("schedule.steps=100")
    with contextlib.closing(training_groups(source, recipe, 0, 1, False)) as groups:
        for _ in range(36):
            next(groups)
        before = held_by_a_worker()
        for _ in range(140):
            next(groups)
        assert held_by_a_worker() - before < 2 * 2**20


def test_labels_and_masks_are_tensors(source):
    batch = next(training_groups(source, small(), 0, 1, False))
    assert (batch.labels.dtype, batch.mask.dtype) == (torch.int64, torch.bool)
    assert batch.images.shape == (4, 64, 64, 3) and batch.images.dtype == torch.uint8


@pytest.mark.gpu
def test_pinned_batches_are_identical(source):
    expected = [content(batch) for batch in training_groups(source, small(), 0, 0, False)]
    pinned = list(training_groups(source, small(), 0, 2, True))
    assert all(batch.images.is_pinned() and batch.labels.is_pinned() for batch in pinned)
    assert [content(batch) for batch in pinned] == expected


@pytest.mark.slow
def test_process_with_unclosed_generator_exits(tmp_path):
    """Its workers ignore the SIGTERM that the interpreter sends before it waits for them."""
    script = """
import builtins, pathlib
from cspnet.data.loader import training_groups
from cspnet.sources.data_root import open_training
from tests.helpers import small
groups = training_groups(open_training("digits"), small(), 0, 1, False)
next(groups)
builtins.kept = groups
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
def test_worker_whose_parent_died_during_fork_exits(tmp_path):
    """torch would take the process that adopted the worker for its parent."""
    script = """
import os, pathlib, signal, sys, time
from cspnet.data.loader import training_groups
from cspnet.sources.data_root import open_training
from tests.helpers import small
source = open_training("digits")
def in_the_child():
    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(0.5)
os.register_at_fork(
    after_in_child=in_the_child,
    after_in_parent=lambda: (time.sleep(0.2), os.kill(os.getpid(), signal.SIGKILL)),
)
next(training_groups(source, small(), 0, 1, False))
"""
    note = tmp_path / "pid"
    done = subprocess.run([sys.executable, "-c", script, note], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    worker = Path(f"/proc/{note.read_text()}")
    for _ in range(200):
        if not worker.exists():
            return
        time.sleep(0.1)
    raise AssertionError("an orphan")
