"""The comparison of runs: their scores, and the differences of their recipes only."""

import json

import cv2
import pytest

from cspnet.errors import RecipeError
from cspnet.recipe import load as recipes
from cspnet.report.compare import (
    ABSENT,
    differences_table,
    overview_table,
    read_runs,
    recipe_differences,
    run_names,
)
from tests.conftest import ROOT


@pytest.fixture
def runs(tmp_path):
    """Makes run folders without checkpoints, each with overrides of the digits recipe."""

    def build(**overrides: list[str]):
        folders = []
        for number, (name, own) in enumerate(overrides.items()):
            folder = tmp_path / name.replace("_", "/")
            folder.mkdir(parents=True)
            recipe = recipes.load_recipe(ROOT / "recipes" / "digits.yaml", own)
            (folder / "recipe.yaml").write_text(recipes.recipe_to_yaml(recipe))
            (folder / "env.json").write_text(json.dumps({"device": "cpu", "gpu": None}))
            lines = [
                {"step": step, "split": "train", "loss": 2 - step / 100, "images_per_second": step}
                for step in range(10, 110, 10)
            ]
            for step, top1 in ((50, 80.0 + number), (70, 80.0 + number), (100, 70.0)):
                lines.append({"step": step, "split": "val", "top1": top1, "loss": 1.0})
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "metrics.jsonl").write_text(text + '{"torn')
            folders.append(folder)
        return folders

    return build


def test_only_differences_are_listed(runs):
    records = read_runs(
        runs(plain=[], fast=["optim.learning_rate=0.2", "mix.probability=0"], same=[])
    )
    assert recipe_differences(records) == {
        "mix.probability": [0.25, 0.0, 0.25],
        # Without mixing these have no effect, and are not in the recipe.
        "mix.cutmix": [True, ABSENT, True],
        "mix.mosaic": [True, ABSENT, True],
        "mix.images_per_draw": [4, ABSENT, 4],
        "mix.cutmix_side": [[0.3, 0.8], ABSENT, [0.3, 0.8]],
        "mix.mosaic_split": [[0.2, 0.8], ABSENT, [0.2, 0.8]],
        "optim.learning_rate": [0.1, 0.2, 0.1],
    }
    assert differences_table([records[0], records[2]]) is None
    assert overview_table(records).row_count == 3


def test_compare_prints_tables_and_draws_a_picture(runs, command, tmp_path):
    folders = runs(one=[], two=["augment.rotation=5"])
    done = command("main", "compare", *folders, "--output", tmp_path / "both.png")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    cells = ["100", "of", "600", "80.00", "%", "(50)", "70.00", "%", "1.0000", "55", "cpu"]
    assert ["one", *cells] in rows and ["augment.rotation", "10.0", "5.0"] in rows
    assert "batch" not in done.stdout and done.stdout.splitlines()[-1].endswith("both.png written")
    assert cv2.imread(str(tmp_path / "both.png")).shape[0] > 300
    again = command("main", "compare", *folders, "--output", tmp_path / "both.png")
    assert again.returncode == 0, "a PNG may be replaced"


def test_runs_that_cannot_be_compared_give_one_message(runs, command, tmp_path):
    one, two = runs(one=[], two=[])
    (tmp_path / "empty").mkdir()
    (tmp_path / "fake.png").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    for folders, message in (
        ([one], "at least two run folders"),
        ([one, two, tmp_path / "none" / ".." / "one"], "is given twice"),
        ([one, tmp_path / "nowhere"], "is not a folder"),
        ([one, tmp_path / "empty"], "is not a run folder"),
    ):
        with pytest.raises(RecipeError, match=message):
            read_runs(folders)
    for out, message in (
        ("fake.png", "exists and is not a PNG file"),
        ("folder.png", "must be a .png file"),
        ("x.jpg", "must be a .png file"),
    ):
        done = command("main", "compare", one, two, "--output", out, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stdout == "" and "Traceback" not in done.stderr
    assert (tmp_path / "fake.png").read_text() == "not a picture"
    assert not (tmp_path / "x.jpg").exists()


def test_runs_with_equal_names_get_unique_ones(runs):
    assert run_names(read_runs(runs(a_run=[], b_run=[]))) == ["a/run", "b/run"]
    assert run_names(read_runs(runs(c=[], d=[]))) == ["c", "d"]


def test_an_empty_log_has_no_numbers(runs, command, tmp_path):
    one, two = runs(one=[], two=[])
    (two / "metrics.jsonl").write_text("")
    (two / "env.json").unlink()
    done = command("main", "compare", one, two, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ["two", "0", "of", "600", "–", "–", "–", "–", "unknown"] in [
        line.split() for line in done.stdout.splitlines()
    ]
    assert "The recipes are the same." in done.stdout and (tmp_path / "compare.png").is_file()
