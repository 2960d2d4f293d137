"""`cspnet check`: a fixture for each finding, and the command."""

import builtins
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from cspnet.datasets import inspect_file
from cspnet.datasets.check import check_dataset, preflight
from cspnet.datasets.contents import DUPLICATE_FINDINGS, FILE_FINDINGS
from cspnet.errors import CspnetError, DataError
from cspnet.sources.data_root import open_training
from cspnet.sources.folder import Digits, Folder
from tests import bombs
from tests.conftest import ROOT, picture


def encoded(kind, image=None, **options):
    file = io.BytesIO()
    (image or Image.fromarray(picture(1))).save(file, kind, **options)
    return file.getvalue()


def kinds_of(report, name=None, severity=None):
    """Kinds of the findings about files of this name, or of all findings."""
    return {
        finding.kind
        for finding in report.findings
        if (name is None or any(Path(file).name == name for file in finding.files))
        and severity in (None, finding.severity)
    }


def finding_of(report, kind):
    (finding,) = (finding for finding in report.findings if finding.kind == kind)
    return finding


def bear(folder):
    return folder / "train" / "bear"


def test_valid_data_set_has_counts_and_no_errors(folder):
    steps = []
    report = check_dataset(str(folder), progress=lambda *step: steps.append(step))
    assert kinds_of(report) == {"few"} and report.count("error") == 0
    train, val = report.splits
    assert train.classes == dict.fromkeys(("apple", "bear", "cat"), 12)
    assert str(val) == "val: 9 images, 3 classes of 3 to 3 images (median 3)"
    assert steps[0] == (0, 45) and steps[-1] == (45, 45)


def with_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


def half(kind):
    data = encoded(kind)
    return data[: len(data) // 2]


FRAMES = {"save_all": True, "append_images": [Image.fromarray(picture(2))]}
DEEP = cv2.imencode(".png", picture(1).astype(np.uint16) * 257)[1].tobytes()
RIBBON = cv2.imencode(".png", np.zeros((1, 40_000), np.uint8))[1].tobytes()
FILES = {
    "0.png": (b"", {"empty"}),
    "1.jpg": (half("JPEG"), {"truncated"}),
    "2.jpg": (encoded("JPEG")[:-2], {"truncated"}),
    "3.png": (half("PNG"), {"truncated"}),
    "4.webp": (half("WEBP"), {"truncated"}),
    "5.bmp": (half("BMP"), {"truncated"}),
    "6.jpg": (b"<html>404</html>" * 50, {"unreadable"}),
    "7.png": (bytes(1000), {"unreadable"}),
    "8.png": (bombs.png(), {"huge"}),
    "9.jpg": (bombs.jpeg(), {"huge"}),
    "a.webp": (bombs.animated_webp(), {"huge"}),
    "b.png": (RIBBON, {"huge"}),
    "c.JPEG": (encoded("PNG"), {"misnamed"}),
    "d.jpg": (encoded("GIF"), {"misnamed"}),
    "e.jpg": (encoded("JPEG", Image.fromarray(picture(1)).convert("CMYK")), {"CMYK"}),
    "f.jpg": (encoded("JPEG", Image.fromarray(picture(1)).convert("L")), {"grey"}),
    "g.png": (encoded("PNG", Image.fromarray(picture(1)).convert("RGBA")), {"alpha"}),
    "h.png": (encoded("PNG", Image.fromarray(picture(1)).convert("P"), transparency=0), {"alpha"}),
    "i.png": (DEEP, {"16 bits"}),
    "j.png": (encoded("PNG", Image.new("I;16", (40, 40))), {"16 bits", "grey"}),
    "k.jpg": (with_orientation(), {"turned"}),
    "l.webp": (encoded("WEBP", **FRAMES), {"frames"}),
    "m.tif": (encoded("TIFF", **FRAMES), {"frames"}),
    "n.bmp": (encoded("BMP", Image.new("RGB", (31, 90))), {"tiny"}),
    "o.ppm": (encoded("PPM"), set()),
    "p.jpg": (encoded("JPEG", progressive=True), set()),
    "q.tif": (encoded("TIFF", Image.new("F", (40, 40))), {"unsupported"}),
    "r.png": (encoded("PNG", Image.new("RGB", (40, 20_040))), {"ribbon"}),
    "s.jpg": (encoded("JPEG", xmp=b'<x tiff:Orientation="6"/>'), {"XMP orientation"}),
    "t.pgm": (b"P5 40 40 100\n" + bytes(1600), {"grey", "few levels"}),
    "u.pgm": (b"P5 40 40 1023\n" + bytes(3200), {"grey", "16 bits"}),
    "v.pgm": (b"P5 40 40 100\n" + bytes(1500), {"truncated"}),
}


@pytest.mark.parametrize("name", FILES)
def test_findings_of_single_files(name):
    data, kinds = FILES[name]
    inspection = inspect_file.inspect_bytes(data, os.path.splitext(name)[1].lower())
    assert {kind for kind, _ in inspection.findings} == kinds
    assert kinds <= set(FILE_FINDINGS)
    wrong = any(FILE_FINDINGS[kind][0] == "error" for kind in kinds)
    assert bool(inspection.digest) != wrong, "undecodable files are not compared"


def test_findings_do_not_depend_on_the_number_of_workers(folder):
    for name, (data, _) in FILES.items():
        (bear(folder) / name).write_bytes(data)
    report = check_dataset(str(folder), workers=0)
    for name, (_, kinds) in FILES.items():
        assert kinds <= kinds_of(report, name)
    assert report.to_dict() == check_dataset(str(folder), workers=2).to_dict()
    kinds = [finding.severity for finding in report.findings]
    assert kinds == sorted(kinds, key=["error", "warning", "note"].index)


def test_links_pipes_and_folders_named_like_images(folder):
    (bear(folder) / "lost.jpg").symlink_to("gone.jpg")
    (folder / "train" / "dog").symlink_to("gone")
    (bear(folder) / "lost.txt").symlink_to("gone.txt")
    os.mkfifo(bear(folder) / "pipe.jpg")  # reading it would block forever
    report = check_dataset(str(folder))
    assert kinds_of(report, "lost.jpg") == kinds_of(report, "dog") == {"broken link"}
    assert kinds_of(report, "lost.txt") == {"broken link"}
    assert kinds_of(report, "pipe.jpg") == {"unopenable"}
    assert report.count("error") == 3


def test_ignored_files(folder):
    for name in ("a.txt", "b.txt", "c.gif", "._0.jpg", "Thumbs", ".DS_Store"):
        (bear(folder) / name).touch()
    (folder / "train" / "loose.png").write_bytes(encoded("PNG"))
    shutil.copytree(folder / "val" / "cat", folder / "train" / ".cat")
    report = check_dataset(str(folder))
    assert kinds_of(report, "loose.png") == {"loose"}
    assert kinds_of(report, "._0.jpg") == kinds_of(report, ".cat") == {"hidden"}
    assert kinds_of(report, "0.jpg") == set(), "hidden copies do not leak"
    others = finding_of(report, "other files")
    assert others.message.endswith("2 × .txt, 1 × .gif, 1 × no suffix")
    assert len(others.files) == 4 and others.severity == "note"


def test_identical_images(folder):
    train, val = folder / "train", folder / "val"
    shutil.copy(train / "apple" / "0.jpg", val / "bear" / "a.jpg")
    shutil.copy(train / "cat" / "1.jpg", train / "bear" / "b.jpg")
    shutil.copy(val / "cat" / "2.jpg", val / "cat" / "c.jpg")
    for name in ("d.jpg", "e.jpg"):  # truncated: not decodable, so not a duplicate
        (train / "cat" / name).write_bytes(half("JPEG"))
    report = check_dataset(str(folder))
    leak, classes, twice = (finding_of(report, kind) for kind in ("leak", "two classes", "twice"))
    assert leak.groups == [[str(train / "apple/0.jpg"), str(val / "bear/a.jpg")]]
    assert classes.groups == [[str(train / "bear/b.jpg"), str(train / "cat/1.jpg")]]
    assert twice.groups == [[str(val / "cat/2.jpg"), str(val / "cat/c.jpg")]]
    assert [f.severity for f in (leak, classes, twice)] == ["error", "warning", "note"]
    assert twice.files == twice.groups[0]


def test_empty_small_single_and_similar_classes(folder):
    train = folder / "train"
    for i in range(15):
        cv2.imwrite(str(train / "apple" / f"new{i}.jpg"), picture(1000 + i))
    (train / "dog").mkdir()
    for label in ("Bear", "ant", "bee", "cow"):
        shutil.copytree(train / "bear", train / label)
    for file in list((train / "cat").iterdir())[1:]:
        file.unlink()
    report = check_dataset(str(train))
    assert [split.name for split in report.splits] == ["train"]
    assert report.splits[0].classes["dog"] == 0
    assert finding_of(report, "empty class").classes == ["dog"]
    assert finding_of(report, "small class").classes == ["cat"]
    assert "median class size (12 images)" in finding_of(report, "small class").message
    assert finding_of(report, "alike").classes == ["Bear", "bear"]
    for label in os.listdir(train):
        if label != "bear":
            shutil.rmtree(train / label)
    assert finding_of(check_dataset(str(folder)), "one class").severity == "error"


def test_splits_that_do_not_match(folder):
    (folder / "val" / "bear").rename(folder / "val" / "Bear")
    differing = finding_of(check_dataset(str(folder)), "classes")
    assert differing.classes == ["Bear", "bear"] and "'Bear' instead of 'bear'" in differing.message
    shutil.rmtree(folder / "val")
    shutil.copytree(folder / "train", folder / "val")
    report = check_dataset(str(folder))
    assert len(finding_of(report, "leak").groups) == 36 and "copies" in kinds_of(
        report, severity="warning"
    )
    shutil.rmtree(folder / "val")
    (folder / "val").symlink_to("train")
    assert {"same files", "leak"} <= kinds_of(check_dataset(str(folder)), severity="error")


def test_unopenable_split_does_not_hide_the_other(folder):
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    (bear(folder) / "0.jpg").write_bytes(b"")
    report = check_dataset(str(folder))
    assert "is empty" in finding_of(report, "layout").message
    assert [split.name for split in report.splits] == ["train"] and "empty" in kinds_of(report)


def test_wrong_path_is_a_usage_error(folder, tmp_path):
    (folder / "train").rename(folder / "Training")
    (folder / "val").rename(folder / "test")
    for path, expected in (
        (tmp_path / "gone", "does not exist"),
        (folder, "Is it Training/?"),
        (tmp_path, "which is a data root|only one folder"),
    ):
        with pytest.raises(DataError, match=expected):
            check_dataset(str(path))


def test_preflight_uses_names_and_sizes_only(folder, monkeypatch):
    def files(*_, **__):
        raise AssertionError("quick reads no file")

    train = open_training(str(folder))
    val = Folder(folder / "val")
    digits = Digits(train=True), Digits(train=False)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", files)
        (few,) = preflight(train, val)
        assert "only 9 images" in few and preflight(*digits) == []
        (same,) = (text for text in preflight(train, train) if "the same folder" in text)
        assert "score is meaningless" in same
        assert any("swapped" in text for text in preflight(val, train))
    shutil.rmtree(folder / "val" / "cat")
    (folder / "val" / "cat").symlink_to(folder / "train" / "cat")
    assert "share the folders of 1 class (cat)" in preflight(train, Folder(folder / "val"))[-1]
    (folder / "val" / "cat").unlink()
    (folder / "val" / "cat").mkdir()
    os.link(folder / "train" / "cat" / "0.jpg", folder / "val" / "cat" / "0.jpg")
    assert "are links to files of train" in preflight(train, Folder(folder / "val"))[-1]


class Deadly(Digits):
    """A source that ends the process that reads it, like a crashing decoder."""

    def read(self, index):
        os._exit(1)


def test_death_of_a_worker_process_is_reported():
    with pytest.raises(CspnetError, match=r"died while reading digits/0.png"):
        list(inspect_file.inspect_sources([Deadly(train=True)], workers=2))


@pytest.mark.parametrize(
    "phrase", [phrase for _, phrase in (FILE_FINDINGS | DUPLICATE_FINDINGS).values()]
)
def test_docs_list_all_findings_about_files(phrase):
    assert phrase in (ROOT / "docs" / "data.md").read_text()


def test_command_prints_examples_and_writes_all_files_to_json(folder, process, tmp_path):
    for i in range(8):
        (bear(folder) / f"{i}.jpg").write_bytes(b"")
    odd = os.fsencode(str(bear(folder))) + b"/\xff\x1b[31m.jpg"
    with open(odd, "wb"):
        pass
    done = process("main", "check", "data", "--json", "all.json", "-j", 0, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "error: train, 9 files: empty" in done.stdout and "\x1b" not in done.stdout
    assert "data/train/bear/4.jpg" in done.stdout and "5.jpg" not in done.stdout
    assert "    … and 4 more" in done.stdout
    report = json.loads((tmp_path / "all.json").read_text())
    (empty,) = (entry for entry in report["findings"] if entry["kind"] == "empty")
    assert len(empty["files"]) == 9 and os.fsencode(empty["files"][-1]).endswith(
        b"\xff\x1b[31m.jpg"
    )
    assert report["errors"] == 1 and report["parts"][1]["classes"]["cat"] == 3
    piped = process("main", "check", "data", "--json", "-", "-j", 0, cwd=tmp_path)
    assert json.loads(piped.stdout) == report and piped.returncode == 1


def test_exit_codes_of_the_command(folder, command, tmp_path):
    done = command("main", "check", "digits", "--workers", 2)
    assert done.returncode == 0, done.stdout
    assert "train: 1,438 images, 10 classes" in done.stdout
    for arguments, expected in (
        ([tmp_path / "gone"], "gone does not exist"),
        ([folder, "--workers", "-1"], "--workers -1"),
        ([folder, "--json", tmp_path / "no" / "x.json"], "--json"),
    ):
        done = command("main", "check", *arguments)
        assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_workers_exit_when_the_main_process_is_killed(tmp_path):
    """They wait on a pipe that they keep open themselves, so they never see its end."""
    script = (
        "import time\n"
        "from cspnet.datasets import inspect_file as examine\n"
        "from cspnet.sources.folder import Digits\n"
        "if __name__ == '__main__':\n"
        "    chunks = examine.inspect_sources([Digits(train=True)], 2)\n"
        "    print(next(chunks)[1], flush=True)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "wait.py").write_text(script)
    process = subprocess.Popen([sys.executable, tmp_path / "wait.py"], stdout=subprocess.PIPE)
    process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.wait()
    for _ in range(100):
        if not any(Path(f"/proc/{child}").exists() for child in children):
            return
        time.sleep(0.1)
    raise AssertionError("orphans")
