"""Damaged files of all kinds: the loader counts them and continues."""

import io
import json
import random
import subprocess
import sys

import pytest
from PIL import Image

from cspnet.datasets.check import check_dataset
from cspnet.images.decode import UnreadableError, decode
from cspnet.sources.data_root import open_training
from tests.bombs import BOMBS
from tests.conftest import ROOT, picture

KINDS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "bmp": "BMP", "webp": "WEBP", "tif": "TIFF"}
# An epoch of training and an evaluation. Each process writes its peak memory to a file.
RUN = """
import json, os, pathlib, sys
from cspnet.data import loader
from cspnet.sources.data_root import open_training
from cspnet.recipe.load import load_recipe
from tests.bombs import peak
root, workers = sys.argv[1], int(sys.argv[2])
peaks = pathlib.Path(root, f"peaks-{workers}")
peaks.mkdir()
make = loader.TrainGroups.__getitem__
def weighed(self, address):
    batch = make(self, address)
    (peaks / str(os.getpid())).write_text(str(peak()))
    return batch
loader.TrainGroups.__getitem__ = weighed
source = open_training(root)
steps = -(-len(source) // 8)
small = ["data.image_size=32", "batch=8", "group=4", "mix.images_per_draw=2"]
small.append(f"schedule.steps={steps}")
recipe = load_recipe(None, [f"data.root={root}", *small])
unreadable, groups = set(), 0
for batch in loader.training_groups(source, recipe, 0, workers, False):
    unreadable.update(batch.unreadable)
    groups += 1
black = set()
for batch in loader.evaluation_batches(source, 8, 32, recipe.evaluate, workers, False):
    black.update(batch.unreadable)
(peaks / "main").write_text(str(peak()))
assert black == unreadable
assert groups == 2 * steps and len(list(peaks.iterdir())) == max(1, workers) + 1
print(json.dumps([sorted(unreadable), *sorted(int(file.read_text()) for file in peaks.iterdir())]))
"""


def encoded(rng, kind, height=240, width=320):
    file = io.BytesIO()
    options = {"progressive": True} if kind == "JPEG" and rng.random() < 0.3 else {}
    Image.fromarray(picture(rng.randrange(10**6), height, width)).save(file, kind, **options)
    return file.getvalue()


def flip_bits(rng, data):
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 4, 30])):
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def flip_bits_in_the_header(rng, data):
    return flip_bits(rng, data[:200]) + data[200:]


def truncate(rng, data):
    return data[: rng.choice([0, 1, 3, 20, rng.randrange(len(data)), len(data) - 1])]


def exchange_the_header(rng, data):
    length = rng.choice([4, 16, 64])
    return encoded(rng, rng.choice(list(KINDS.values())), 8, 8)[:length] + data[length:]


def blank(rng, data):
    start = rng.randrange(len(data))
    length = rng.randrange(1, len(data) - start + 1)
    return data[:start] + rng.choice([b"\0", b"\xff"]) * length + data[start + length :]


def noise(rng, data):
    return rng.randbytes(rng.choice([1, 100, 10_000]))


def shift(rng, data):
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.randrange(1, 40)) + data[at:]


def bomb(rng, data):
    return rng.choice(BOMBS)()


DAMAGES = (
    *(flip_bits, flip_bits_in_the_header, truncate, exchange_the_header),
    *(blank, noise, shift, bomb),
)


def mixed(root, images, damaged, seed=0):
    """Create a data root with images in three classes, some of them damaged."""
    rng = random.Random(seed)
    bad = set(rng.sample(range(images), damaged))
    for name in ("apple", "bear", "cat"):
        (root / "train" / name).mkdir(parents=True)
    for index in range(images):
        suffix, kind = rng.choice(list(KINDS.items()))
        data = encoded(rng, kind)
        if index in bad:
            data = rng.choice(DAMAGES)(rng, data)
        (root / "train" / ("apple", "bear", "cat")[index % 3] / f"{index}.{suffix}").write_bytes(
            data
        )
    return root


def epoch(root, workers):
    """Indices of unreadable images, and the peak memory of all processes in MB."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(root), str(workers)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    unreadable, *peaks = json.loads(done.stdout)
    return set(unreadable), peaks


def undecodable(root):
    source = open_training(str(root))
    indices = set()
    for index in range(len(source)):
        try:
            decode(source.read(index)[0])
        except UnreadableError:
            indices.add(index)
    return indices


def goes_on(tmp_path, images, damaged, worker_numbers):
    clean = mixed(tmp_path / "clean", images, 0)
    dirty = mixed(tmp_path / "dirty", images, damaged)
    expected = undecodable(dirty)
    assert damaged / 3 < len(expected) <= damaged
    for workers in worker_numbers:
        unreadable, usual = epoch(clean, workers)
        assert unreadable == set()
        unreadable, peaks = epoch(dirty, workers)
        print(f"{workers} workers: {usual} MB with clean files, {peaks} MB with damaged ones")
        assert unreadable == expected
        for most, allowed in zip(peaks, usual, strict=True):
            assert most <= 1.1 * allowed
    report = check_dataset(str(dirty), max(worker_numbers))
    reported = {file for f in report.findings if f.severity == "error" for file in f.files}
    source = open_training(str(dirty))
    assert {source.name(index) for index in expected} <= reported


def test_loader_survives_damaged_files(tmp_path):
    goes_on(tmp_path, 220, 150, [2])


@pytest.mark.slow
def test_loader_survives_a_thousand_damaged_files(tmp_path):
    goes_on(tmp_path, 1_500, 1_000, [0, 2])
