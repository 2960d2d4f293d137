"""File and class names of any bytes: escaped where printed, preserved where used."""

import io
import json
import os
import tarfile

import cv2
import numpy as np
import pytest
import torch
from rich.console import Console

from cspnet.datasets.check import check_dataset, preflight
from cspnet.errors import DataError, RecipeError
from cspnet.inference.confusion import Pair, to_markdown
from cspnet.recipe import load as recipes
from cspnet.report import classes, preview
from cspnet.report.evaluation import evaluate_run
from cspnet.report.publish import publish
from cspnet.run.checkpoint import load_checkpoint
from cspnet.run.reader import read_run
from cspnet.runtime.options import RunOptions
from cspnet.sources import data_root, tar_set
from cspnet.text import end_sentence, escape_line, printable, unescape_line
from cspnet.train.loop import train
from tests.conftest import picture

LATIN = os.fsdecode(b"p\xeache")
TWO_LINES = "apple\n2"
RED = "\x1b[31mred"
ODD = sorted([LATIN, TWO_LINES, RED])


@pytest.fixture
def odd(tmp_path):
    """A data root and classes whose names are not valid text."""
    root = tmp_path / os.fsdecode(b"donn\xe9es\x1b")
    for split, count in (("train", 8), ("val", 3)):
        for number, name in enumerate(ODD):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = picture(100 * number + 50 * (split == "val") + i)[:, :, ::-1]
                (folder / f"{i}.jpg").write_bytes(cv2.imencode(".jpg", image)[1].tobytes())
    return root


def test_only_unprintable_characters_are_escaped():
    assert printable("bear, 猫, é, $HOME") == "bear, 猫, é, $HOME"
    assert printable(f"{LATIN} {TWO_LINES} {RED}") == "p\\udceache apple\\n2 \\x1b[31mred"
    assert printable("a\nb\x07", keep="\n") == "a\nb\\x07"
    for text in (LATIN, TWO_LINES, RED, "\u202e", "\x85"):
        assert printable(text).isprintable() and printable(printable(text)) == printable(text)
    assert str(DataError(TWO_LINES)) == "apple\\n2" and str(RecipeError("a\n\x1b")) == "a\n\\x1b"


def test_every_name_takes_exactly_one_line():
    for name in (*ODD, "a\\n", "a\\\nb", "\r\n", "\\", "\\\\r", "c:\\new"):
        assert unescape_line(escape_line(name)) == name
        assert not {"\n", "\r"} & set(escape_line(name))


def test_sentence_ends_with_one_full_stop():
    ended = ("a.", "a!", "a …")
    assert [end_sentence(text) for text in ended] == list(ended)
    assert end_sentence(OSError("no room")) == "no room."


def test_run_with_class_names_and_root_of_any_bytes(odd, tiny, tmp_path):
    """From preview to report. The checkpoint contains the names of the folders."""
    overrides = ["model.classes=auto", "evaluate.every=2", "schedule.steps=4"]
    recipe = tiny(f"data.root={odd}", *overrides)
    assert recipe.data.root == str(odd)
    run = tmp_path / "run"
    shown = io.StringIO()
    console = Console(file=shown, width=400, soft_wrap=True, markup=False, highlight=False)
    train(recipe, RunOptions(run, device="cpu", workers=0), console)
    stored = load_checkpoint(run / "checkpoints" / "last.pt")
    assert stored["classes"] == ODD
    assert recipes.recipe_from_yaml(stored["recipe"]) == recipe
    assert recipes.recipe_from_yaml((run / "recipe.yaml").read_text(encoding="utf-8")) == recipe
    assert (run / "preview" / "step-0000000.png").is_file() and list((run / "tb").iterdir())
    for name in ("history.jsonl", "env.json", "metrics.jsonl"):
        (run / name).read_bytes().decode("ascii")
    assert train(recipe, RunOptions(run, device="cpu", workers=0, resume=True), console) is None
    opened = read_run(run)
    verdict, remarks = evaluate_run(opened, device="cpu")
    assert not remarks and verdict.names == [printable(name) for name in ODD]
    page = publish(opened, verdict, remarks, tmp_path / "report").read_text(encoding="utf-8")
    assert "p\\udceache" in page and "apple\\n2" in page and "\x1b" not in page
    names = {p.name for p in (tmp_path / "report").iterdir()}
    assert {"confusion.png", "report.html"} <= names


def test_recipe_preserves_a_root_of_any_bytes(tmp_path):
    for root in (os.fsdecode(b"donn\xe9es/${x}"), "two\nlines", "caf\u00e9", "${x}", "~/a b"):
        recipe = recipes.load_recipe(None, [], root)
        text = recipes.recipe_to_yaml(recipe)
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        assert recipes.recipe_from_yaml(text) == recipe
        assert recipes.load_recipe(tmp_path / "recipe.yaml", []) == recipe
        assert recipe.data.root == root
    typed = os.fsdecode(b"donn\xe9es")
    assert recipes.load_recipe(None, [f"data.root={typed}"]).data.root == typed


def test_sheets_and_tables_accept_any_name():
    images = torch.zeros(2, 3, 32, 32)
    page = preview.render_sheet(images, torch.eye(3)[:2], None, ODD, 0.0, f"title {LATIN}\n")
    assert page.dtype == np.uint8
    table = to_markdown([Pair("a|b", TWO_LINES, 1, 2), Pair(LATIN, RED, 1, 2)])
    assert len(table.splitlines()) == 4 and "a\\|b" in table
    assert table.encode("utf-8") and "\x1b" not in table
    assert classes.class_labels(ODD, data_root.display_names(ODD)) == [
        printable(name) for name in ODD
    ]


def test_data_commands_write_no_control_characters(odd, command, tmp_path):
    (odd / "train" / RED / "0.jpg").write_bytes(b"")
    done = command("main", "check", odd, "-j", 0, "--json", tmp_path / "all.json")
    assert done.returncode == 1 and "\\x1b[31mred/0.jpg" in done.stdout
    report = json.loads((tmp_path / "all.json").read_bytes().decode("utf-8"))
    assert os.fsencode(report["data"]) == os.fsencode(odd), "byte for byte"
    assert sorted(report["parts"][0]["classes"]) == ODD
    outputs = [done, command("main", "index", odd)]
    outputs.append(command("main", "pack", odd, "--output", tmp_path / "packed"))
    assert outputs[-1].returncode == 2 and "cannot hold these names" in outputs[-1].stderr
    for done in outputs:
        assert "\x1b" not in done.stdout + done.stderr
        (done.stdout + done.stderr).encode("utf-8")
    (tmp_path / "one").mkdir()
    os.rename(odd / "val" / RED, tmp_path / "one" / RED)
    report = check_dataset(str(tmp_path / "one"))
    assert all("\x1b" not in line and "\n" not in line for _, line in report.lines())
    train_part = data_root.open_training(str(odd))
    assert all(line.isprintable() for line in preflight(train_part, train_part))


def test_labels_in_tar_files_are_preserved_byte_for_byte(tmp_path):
    """Latin-1 labels stay distinct. A replacement character would merge them into one class."""
    (tmp_path / "train").mkdir()
    files = {
        "0.cls": b"p\xeache",
        "1.cls": b"p\xe8che",
        "2.json": json.dumps({"label": os.fsdecode(b"p\xebche")}).encode(),
    }
    with tarfile.open(tmp_path / "train" / "0.tar", "w") as tar:
        for name, data in (files | {f"{key}.jpg": b"x" for key in range(3)}).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = tar_set.TarSource(tar_set.TarSet.in_folder(tmp_path / "train"), save=True)
    assert list(map(os.fsencode, source.classes)) == [b"p\xe8che", b"p\xeache", b"p\xebche"]
    assert tar_set.TarSource(tar_set.TarSet.in_folder(tmp_path / "train")).classes == source.classes
    (tmp_path / "train" / "classes.txt").write_bytes(b"p\xeache\n")
    with pytest.raises(DataError, match=r"classes\.txt is not UTF-8 \(byte 1\)"):
        data_root.open_training(str(tmp_path))


def test_pack_accepts_every_single_line_name(folder, tmp_path, command):
    for split in ("train", "val"):
        (folder / split / "bear").rename(folder / split / "b\u00a0ä\u200dr")
    done = command("main", "pack", folder, "--output", tmp_path / "packed", "--short-side", 64)
    assert done.returncode == 0, done.stderr
    assert data_root.open_training(str(tmp_path / "packed")).classes[1] == "b\u00a0ä\u200dr"


def test_unreadable_list_has_one_line_per_file(odd, tiny, tmp_path):
    """A name with a line break is one entry, is read back as one, and is not listed twice."""
    torn = odd / "train" / TWO_LINES / "back\\slash\r.jpg"
    (odd / "train" / TWO_LINES / "3.jpg").rename(torn)
    torn.write_bytes(b"")
    limits = ["model.classes=auto", "data.max_unreadable=1", "schedule.steps=6"]
    recipe = tiny(f"data.root={odd}", *limits)
    listed = tmp_path / "run" / "unreadable.txt"
    for steps, resume in ((4, False), (6, True)):
        recipe = tiny(f"data.root={odd}", *limits[:2], f"schedule.steps={steps}")
        train(
            recipe,
            RunOptions(tmp_path / "run", device="cpu", workers=0, resume=resume),
            Console(quiet=True),
        )
        (line,) = listed.read_bytes().split(b"\n")[:-1]
        assert unescape_line(os.fsdecode(line)) == str(torn)
