"""`cspnet pack`: same order, all or nothing, source unchanged."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from cspnet.data.loader import TrainGroups
from cspnet.datasets import pack as packing
from cspnet.datasets import pack_journal
from cspnet.datasets.pack import limit_short_side, pack_dataset
from cspnet.datasets.pack_journal import PackSettings
from cspnet.errors import CspnetError, DataError
from cspnet.images.decode import UnreadableError, decode
from cspnet.recipe.load import load_recipe
from cspnet.sources import data_root
from tests.conftest import ROOT, picture
from tests.helpers import SMALL_GROUPS

# Images of 80×60 are scaled. One MB per tar file is more than any test writes.
SMALL = PackSettings(short_side=40, quality=90, shard_mb=1)


def encoded(kind, image=None, **options):
    file = io.BytesIO()
    (image or Image.fromarray(picture(1))).save(file, kind, **options)
    return file.getvalue()


def small_shards(monkeypatch, most=20_000):
    """Limit tar files to kilobytes, so that each split has several."""
    add = packing._TarWriter.size.fget
    monkeypatch.setattr(packing._TarWriter, "size", property(lambda tar: add(tar) + 10**6 - most))


def snapshot(root):
    """The contents of all files below a folder."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(Path(root).rglob("*"))
        if path.is_file() and path.name != "index.cspnet"
    }


def times(root):
    return {str(path): path.stat().st_mtime_ns for path in sorted(Path(root).rglob("*"))}


def samples(file):
    """The samples of a tar file as webdataset groups them (tariterators.base_plus_ext)."""
    groups: dict[str, dict[str, bytes]] = {}
    with tarfile.open(file) as tar:
        for member in tar:
            key, field = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member.name).groups()
            assert member.isreg() and field not in groups.get(key, {})
            groups.setdefault(key, {})[field] = tar.extractfile(member).read()
    return groups


def test_image_is_scaled_by_its_shorter_side_or_left_unchanged():
    data = encoded("JPEG")
    assert limit_short_side(data, 60, 90) is data and limit_short_side(data, 61, 90) is data
    for short in (59, 40, 32):
        small = decode(limit_short_side(data, short, 90))
        assert small.shape == (short, round(80 * short / 60), 3)
        want = cv2.resize(decode(data), small.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(want.astype(int) - small).mean() < 5  # chroma at half resolution
    assert len(limit_short_side(data, 40, 95)) > len(limit_short_side(data, 40, 50))
    ribbon = encoded("PNG", Image.new("RGB", (5000, 50)))
    assert decode(limit_short_side(ribbon, 40, 90)).shape == (40, 4000, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = limit_short_side(encoded("JPEG", exif=exif), 40, 90)
    assert decode(turned).shape == (53, 40, 3) and not Image.open(io.BytesIO(turned)).getexif()
    for bad in (b"", data[:50], encoded("PNG", Image.new("L", (40_000, 1)))):
        with pytest.raises(UnreadableError):
            limit_short_side(bad, 40, 90)


def test_samples_follow_the_webdataset_convention(folder, tmp_path):
    (folder / "train" / "bear" / "a.b.JPEG").write_bytes(encoded("JPEG"))
    (folder / "train" / "bear" / "ü.png").write_bytes(encoded("PNG", Image.new("RGB", (30, 20))))
    report = pack_dataset(str(folder), tmp_path / "out", SMALL)
    plain = data_root.open_training(str(folder))
    packed = samples(tmp_path / "out" / "train" / "000000.tar")
    assert len(packed) == 38 and list(packed) == sorted(packed)
    for index, (key, sample) in enumerate(packed.items()):
        assert re.fullmatch(f"{index:08d}-[A-Za-z0-9_-]*", key)
        assert sample.pop("cls") == str(plain.labels[index]).encode()
        ((kind, data),) = sample.items()
        assert kind == ("png" if plain.name(index).endswith("png") else "jpg")
        original = decode(plain.read(index)[0])
        assert Image.open(io.BytesIO(data)).size[::-1] == (
            (40, 53) if min(original.shape[:2]) > 40 else original.shape[:2]
        )
    assert (tmp_path / "out/train/classes.txt").read_text() == "apple\nbear\ncat\n"
    (shard,) = report["train"]
    assert (shard.encoded, shard.copied, shard.unreadable) == (37, 1, [])
    assert shard.bytes_before == sum(len(plain.read(index)[0]) for index in range(38))


def test_packed_stream_equals_folder_stream(folder, tmp_path, monkeypatch):
    small_shards(monkeypatch)
    before, modified = snapshot(folder), times(folder)
    for name, short in (("copied", 60), ("scaled", 59)):
        pack_dataset(str(folder), tmp_path / name, PackSettings(short, 95, 1))
    assert snapshot(folder) == before and times(folder) == modified
    assert len(list((tmp_path / "copied" / "train").glob("*.tar"))) > 2
    recipe = load_recipe(None, SMALL_GROUPS)
    plain, copied, scaled = (
        TrainGroups(data_root.open_training(str(root)), recipe)
        for root in (folder, tmp_path / "copied", tmp_path / "scaled")
    )
    for step in range(9):
        one, same, other = plain[step, 0], copied[step, 0], scaled[step, 0]
        assert one.images.equal(same.images) and one.labels.equal(same.labels)
        assert one.labels.equal(other.labels)
        difference = (one.images.int() - other.images.int()).abs().float().mean()
        assert 0 < difference < 4, "the same images with nearly the same pixels"
    assert len(data_root.open_validation(str(tmp_path / "scaled"), ["apple", "bear", "cat"])) == 9


def test_documented_script_compares_original_and_packed_images(folder, tmp_path):
    """Run the Python block of docs/data.md unchanged."""
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (home / "data" / "imagenet").symlink_to(folder)
    pack_dataset(str(folder), home / "data" / "packed", SMALL)
    text = (ROOT / "docs" / "data.md").read_text()
    (block,) = re.findall(r"^    python - <<'EOF'\n(.*?)^    EOF$", text, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-"],
        input=textwrap.dedent(block),
        capture_output=True,
        text=True,
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    count, mean, largest = map(float, done.stdout.split())
    assert count == len(data_root.open_training(str(folder))) and 0 < mean <= largest < 64


def test_pack_does_not_depend_on_the_number_of_threads(folder, tmp_path, monkeypatch):
    small_shards(monkeypatch)
    steps = []
    pack_dataset(str(folder), tmp_path / "a", SMALL, 0, lambda *step: steps.append(step))
    pack_dataset(str(folder), tmp_path / "b", SMALL, 3)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert steps == sorted(steps) and steps[0] == (0, 45) and steps[-1] == (45, 45)


def test_packing_tar_files_does_not_modify_them(folder, tmp_path):
    pack_dataset(str(folder), tmp_path / "a", PackSettings(50, 95, 1))
    for file in (tmp_path / "a").rglob("index.cspnet"):
        file.unlink()
    before = times(tmp_path / "a")
    pack_dataset(str(tmp_path / "a"), tmp_path / "b", SMALL)
    assert times(tmp_path / "a") == before
    plain, packed = (data_root.open_training(str(root)) for root in (folder, tmp_path / "b"))
    assert packed.labels.tolist() == plain.labels.tolist()
    assert packed.name(35).endswith(":00000035-00000035-9.jpg")


def test_numeric_class_names_are_written_as_indices(folder, tmp_path):
    for split in ("train", "val"):
        for old, new in (("apple", "10"), ("bear", "2"), ("cat", "0")):
            (folder / split / old).rename(folder / split / new)
    pack_dataset(str(folder), tmp_path / "a", SMALL)
    source = data_root.open_training(str(tmp_path / "a"))
    assert source.classes == ["0", "10", "2"]
    assert source.labels.tolist() == data_root.open_training(str(folder)).labels.tolist()
    labels = [sample["cls"] for sample in samples(tmp_path / "a/val/000000.tar").values()]
    assert labels == [b"0"] * 3 + [b"1"] * 3 + [b"2"] * 3


def test_interrupted_pack_resumes_to_identical_bytes(folder, tmp_path, monkeypatch):
    """Interrupt before and after every rename."""
    small_shards(monkeypatch)
    (folder / "train" / "bear" / "1.jpg").write_bytes(b"")
    report = pack_dataset(str(folder), tmp_path / "whole", SMALL)
    whole = snapshot(tmp_path / "whole")
    replace, out, calls = os.replace, tmp_path / "out", []

    def count(*names, crash=(0, "")):
        calls.append(names)
        if crash == (len(calls), "before"):
            raise KeyboardInterrupt
        replace(*names)
        if crash == (len(calls), "after"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", count)
    pack_dataset(str(folder), out, SMALL)
    crashes = [(n, when) for n in range(1, len(calls) + 1) for when in ("before", "after")]
    assert len(crashes) > 20
    for crash in crashes[:-1]:  # after the last one, the pack is complete
        shutil.rmtree(out)
        calls.clear()
        monkeypatch.setattr(os, "replace", partial(count, crash=crash))
        with pytest.raises(KeyboardInterrupt):
            pack_dataset(str(folder), out, SMALL)
        monkeypatch.setattr(os, "replace", replace)
        if "train" not in os.listdir(out):
            with pytest.raises(DataError, match="has no folder train/"):
                data_root.open_training(str(out))
        assert pack_dataset(str(folder), out, SMALL) == report
        assert snapshot(out) == whole


def test_finished_tar_files_are_not_packed_again(folder, tmp_path, monkeypatch):
    small_shards(monkeypatch)
    done, out = [], tmp_path / "out"

    def count(data, *how, full=10**6):
        done.append(data)
        if len(done) == full:
            raise KeyboardInterrupt
        return limit_short_side(data, *how)

    monkeypatch.setattr(packing, "limit_short_side", lambda *how: count(*how, full=30))
    with pytest.raises(KeyboardInterrupt):
        pack_dataset(str(folder), out, SMALL)
    kept = json.loads((out / "pack.json").read_text())["splits"]["train"][-1]["end"]
    assert kept > 5
    (out / ".train" / "000001.tar").write_bytes(b"x")  # finished tar files are verified
    done.clear()
    monkeypatch.setattr(packing, "limit_short_side", count)
    second = json.loads((out / "pack.json").read_text())["splits"]["train"][1]["start"]
    pack_dataset(str(folder), out, SMALL)
    assert len(done) == 45 - second
    assert len(data_root.open_training(str(out))) == 36


def interrupted(folder, out):
    (out / ".train").mkdir(parents=True)
    sized = {"train": data_root.open_training(str(folder))}
    sized["val"] = data_root.open_validation(str(folder), sized["train"].classes)
    pack_journal.PackJournal(shutil.rmtree(out) or out, SMALL, sized)


def refusals(folder, out):
    """Unsuitable output folders, each with a phrase of the message."""
    out.mkdir()
    (out / "x").touch()
    yield out, SMALL, "is neither empty nor an interrupted pack"
    yield out / "x", SMALL, "is a file. Choose a folder"
    yield folder, SMALL, "must not be inside"
    yield folder / "train" / "packed", SMALL, "must not be inside"
    yield folder.parent, SMALL, "must not be inside"
    (folder.parent / "link").symlink_to(folder / "val")
    yield folder.parent / "link" / "packed", SMALL, "must not be inside"
    interrupted(folder, out)
    yield (
        out,
        PackSettings(48, 90, 1),
        "with --short-side 40. Use the same options",
    )
    (folder / "train" / "apple" / "new.jpg").write_bytes(encoded("JPEG"))
    yield out, SMALL, "an interrupted pack of other images"
    (out / "pack.json").write_text('{"plan": 3}')
    yield out, SMALL, "pack.json is damaged"
    interrupted(folder, out)
    journal = json.loads((out / "pack.json").read_text())
    journal["plan"]["colours"] = 256  # a setting that this version does not know
    (out / "pack.json").write_text(json.dumps(journal))
    yield out, SMALL, "pack.json is damaged or from another version"
    shutil.rmtree(out)
    pack_dataset(str(folder), out, SMALL)
    yield out, SMALL, "contains a finished pack"
    for split in ("train", "val"):
        (folder / split / "bear").rename(folder / split / "be\nar")
    yield folder.parent / "new", SMALL, "classes.txt cannot hold these names"


def test_unsuitable_output_folders_are_refused(folder, tmp_path):
    for out, settings, expected in refusals(folder, tmp_path / "out"):
        before = times(tmp_path)
        with pytest.raises(DataError) as caught:
            pack_dataset(str(folder), out, settings)
        assert expected in str(caught.value) and "\n" not in str(caught.value)
        assert times(tmp_path) == before


def test_pack_resumes_after_a_full_disk(folder, tmp_path, monkeypatch):
    small_shards(monkeypatch)
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CspnetError, match=r"No space left.*Finished tar files are kept") as caught:
        pack_dataset(str(folder), tmp_path / "out", SMALL, workers=2)
    assert caught.value.exit_code == 1
    pack_dataset(str(folder), tmp_path / "out", SMALL)
    assert len(data_root.open_training(str(tmp_path / "out"))) == 36


def test_pack_command_reports_its_result_and_skipped_images(folder, command, tmp_path):
    bear = folder / "train" / "bear"
    (bear / "3.jpg").write_bytes(b"\xff\xd8 torn")
    (bear / "4\x1b.jpg").write_bytes(b"")
    (bear / "5.jpg").unlink()
    (bear / "5.jpg").symlink_to("gone")
    arguments = ("pack", "data", "--output", "out", "--short-side", 40, "-j", 2)
    done = command("main", *arguments, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "train: 34 images in 1 tar files, " in done.stdout and "\x1b" not in done.stdout
    assert "34 resized to a shorter side of 40 pixels (JPEG quality 92), 0 copied" in done.stdout
    assert "pixels of resized images differ from the originals" in done.stdout
    for problem in ("3.jpg: not a readable image", "5.jpg: No such file or directory"):
        assert f"error: train: skipped data/train/bear/{problem}" in done.stdout
    assert done.stdout.count("skipped") == 3
    assert len(data_root.open_training(str(tmp_path / "out"))) == 34
    again = command("main", *arguments, cwd=tmp_path)
    assert again.returncode == 2 and "contains a finished pack" in again.stderr
    for wrong in (("--short-side", 0), ("--quality", 101), ("-j", -1)):
        done = command("main", "pack", "data", "--output", "new", *wrong, cwd=tmp_path)
        assert done.returncode == 2 and not (tmp_path / "new").exists()
    assert "What is lost" in (ROOT / "docs" / "data.md").read_text()
