"""The report on a run: what is on the page, against counting by hand; what it needs: nothing."""

import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from rich.console import Console

from cspnet.cli.reports import report_command
from cspnet.data.loader import EvalBatches
from cspnet.errors import CheckpointError, DataError, RecipeError
from cspnet.inference.evaluate import Scores
from cspnet.recipe import load as recipes
from cspnet.recipe_comments import recipe_entries
from cspnet.report import classes, curves, figures
from cspnet.report import evaluation as verdicts
from cspnet.report.evaluation import Evaluation, evaluate_run
from cspnet.report.mistakes import MAX_MISTAKES, Mistake, TopMistakes, percent, view
from cspnet.report.page import render
from cspnet.report.publish import publish, require_place
from cspnet.run.reader import read_run, running_periods
from cspnet.runtime.device import RunOptions
from cspnet.sources.data_root import open_validation
from cspnet.train.loop import train
from cspnet.weights.load import load_weights
from tests.conftest import ROOT, TINY, picture

NASTY = '<b>&"'
NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)


class Page(HTMLParser):
    """A page taken apart: what it would fetch, its sections, its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.outside, self.sections, self.text = [], [], {}, ""
        self.titles, self._open, self._section = [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag == "section":
            self._section = attrs["id"]
            self.sections[self._section] = ""
        self.titles.append(attrs.get("title", ""))
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            value = attrs.get(name)
            if value is not None and not value.startswith(("data:image/jpeg;", "#")):
                self.outside.append(value)
        self.outside += [name for name in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text += data
        if self._section:
            self.sections[self._section] += data + " "


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three classes, one with a name that is HTML, stopped and resumed; its data."""
    base = tmp_path_factory.mktemp("report")
    for split, count in (("train", 8), ("val", 5)):
        for number, name in enumerate(("apple", NASTY, "cat")):
            folder = base / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = picture(100 * number + 50 * (split == "val") + i)[:, :, ::-1]
                cv2.imwrite(str(folder / f"{i}.jpg"), pixels)
    recipe = recipes.load_recipe(
        ROOT / "recipes" / "digits.yaml",
        [*TINY, "model.classes=3", "evaluate.every=2", "schedule.steps=4", "save_every=2"],
        str(base / "data"),
    )
    train(recipe, RunOptions(base / "run", device="cpu", workers=0), Console(quiet=True))
    return base / "run"


@pytest.fixture(scope="module")
def judged(trained):
    run = read_run(trained)
    verdict, remarks = evaluate_run(run, device="cpu")
    assert remarks == []
    return run, verdict


@pytest.fixture
def copy(trained, tmp_path):
    """The run without its weights, to be spoilt."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("recipe.yaml", "env.json", "metrics.jsonl", "history.jsonl"):
        (folder / name).write_bytes((trained / name).read_bytes())
    return folder


def page_of(folder, verdict=None, remarks=()):
    run = read_run(folder)
    return render(run, curves.charts(run), verdict, list(remarks), NOW)


def test_report_writes_one_page_that_needs_nothing(trained, command, tmp_path):
    out = tmp_path / "there"
    done = command("main", "report", trained, "--device", "cpu", "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out / "report.html")
    names = {"report.html", "curves.png", "time.png", "confusion.png", "mistakes.png"}
    assert {path.name for path in out.iterdir()} == names
    for name in names - {"report.html"}:
        assert cv2.imread(str(out / name)).shape[0] > 100
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.outside == [] and "://" not in text and "url(" not in text and "@import" not in text
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert list(page.sections) == [
        *("summary", "curves", "time", "confusion", "mistakes", "classes", "recipe", "environment")
    ]
    assert read_run(trained).fields["loss.label_smoothing"] == 0.1
    assert "smoothed labels, which cannot all be met" in page.sections["curves"]
    assert NASTY in page.sections["classes"] and NASTY in page.sections["confusion"]
    assert NASTY not in text and "&lt;b&gt;&amp;&quot;" in text
    assert any(NASTY in title for title in page.titles)


def test_the_numbers_are_those_of_a_slow_recount(judged):
    run, verdict = judged
    trained = load_weights(str(run.folder.best_checkpoint))
    source = open_validation(verdict.data, trained.classes)
    net, recipe = trained.net.eval(), trained.recipe
    counted, wrong = np.zeros((3, 3), int), []
    for index in range(15):
        image = torch.empty(1, 32, 32, 3, dtype=torch.uint8)
        EvalBatches(source, 1, 32, recipe.evaluate).load(index, image)
        with torch.no_grad():
            shares = net(image.permute(0, 3, 1, 2).float() / 255).double().softmax(1)[0]
        true, taken = int(source.labels[index]), int(shares.argmax())
        counted[true, taken] += 1
        if true != taken:
            wrong.append((float(shares[taken]), index, true, taken))
            assert np.array_equal(view(source, index, recipe), image[0].numpy())
    assert (verdict.scores.confusion == counted).all() and verdict.step == trained.step
    assert verdict.names == ['<b>&"', "apple", "cat"] and len(wrong) == len(verdict.mistakes)
    for mistake, (share, index, true, taken) in zip(
        verdict.mistakes, sorted(wrong, key=lambda w: (-w[0], w[1])), strict=True
    ):
        assert (mistake.true, mistake.taken_for) == (true, taken)
        assert mistake.probability == pytest.approx(share, abs=1e-4)
        assert np.array_equal(
            verdict.pictures[verdict.mistakes.index(mistake)], view(source, index, recipe)
        )
    for k, score in enumerate(classes.class_scores(counted, verdict.names)):
        assert (score.images, score.right) == (5, counted[k, k])
        beside = {o: counted[k, o] for o in range(3) if o != k}
        assert score.taken == max(beside.values())
        assert not score.taken or beside[verdict.names.index(score.taken_for)] == score.taken
    page = Page(render(run, curves.charts(run), verdict, [], NOW))
    assert f"top-1 {verdict.scores.top1:.2f} %" in page.sections["summary"]
    assert page.tags.count("img") == len(wrong)


def test_the_surest_mistakes_are_found_whatever_the_batches():
    torch.manual_seed(0)
    logits = 3 * torch.randn(500, 7)
    logits[100:110] = logits[100]  # equal ones: the order of the images decides
    labels = torch.randint(0, 7, (500,))
    labels[100:110] = (logits[100].argmax() + 1) % 7
    logits[100:110] *= 5
    shares = logits.double().softmax(1)
    wrong = [i for i in range(500) if int(shares[i].argmax()) != int(labels[i])]
    order = sorted(wrong, key=lambda i: (-float(shares[i].max()), i))
    for batch in (1, 64, 500):
        surest = TopMistakes()
        for first in range(0, 500, batch):
            surest(first, logits[first : first + batch], labels[first : first + batch])
        found = surest.mistakes()
        assert [mistake.index for mistake in found] == order[:MAX_MISTAKES]
        assert all(m.true == int(labels[m.index]) != m.taken_for for m in found)
    assert TopMistakes().mistakes() == []
    assert percent(1 - 1e-9) == "99.99 %" and percent(0.5) == "50 %" and percent(1.0) == "100 %"


def test_a_torn_record_is_read_as_far_as_it_goes(copy):
    whole = read_run(copy)
    with open(copy / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 99, "split": "val"}\n{"split": "train"}\nnull\n\xff\xfe\n')
        file.write(b'{"step": 100, "split": "train", "loss": NaN, "lr": null}\n{"step": 10')
    with open(copy / "history.jsonl", "ab") as file:
        file.write(b'{"time": "yesterday", "event": "stop", "step": 3}\n{"time": "2026')
    run = read_run(copy)
    assert run.unread == 4 and run.step == whole.step + 96
    assert len(run.training["step"]) == len(whole.training["step"]) + 1
    assert len(run.events) == len(whole.events) and run.best == whole.best
    assert "4 lines could not be read" in page_of(copy)
    for name in ("env.json", "history.jsonl", "metrics.jsonl"):
        (copy / name).unlink()
    text = Page(page_of(copy)).text
    assert "No step is on record yet" in text and "no history.jsonl" in text
    assert "There is no env.json" in text
    assert publish(read_run(copy), None, [], copy / "report").is_file()


def test_what_is_missing_is_said_and_the_rest_is_there(copy, trained, tmp_path):
    run = read_run(copy)
    verdict, remarks = evaluate_run(run, device="cpu")
    assert verdict is None and "has no checkpoint yet" in remarks[0]
    (copy / "report").mkdir()
    (copy / "report" / "mistakes.png").write_text("of the report before")
    page = Page(publish(run, None, remarks, copy / "report").read_text())
    assert "has no checkpoint yet" in page.text and "curves" in page.sections
    assert "mistakes" not in page.sections
    assert {p.name for p in (copy / "report").iterdir()} == {
        "report.html",
        "curves.png",
        "time.png",
    }
    for missing in ("best", str(tmp_path / "none.pt")):
        with pytest.raises(CheckpointError, match="does not exist"):
            evaluate_run(run, checkpoint=missing, device="cpu")

    (copy / "checkpoints").mkdir()
    (copy / "checkpoints" / "best.pt").write_bytes(b"torn")
    os.link(trained / "checkpoints" / "last.pt", copy / "checkpoints" / "last.pt")
    verdict, remarks = evaluate_run(run, device="cpu")
    assert verdict.checkpoint.endswith("last.pt") and "best.pt" in remarks[0]
    with pytest.raises(DataError, match="does not exist"):
        evaluate_run(run, data=str(tmp_path / "nowhere"), device="cpu")
    data = Path(verdict.data)
    data.rename(data.with_name("away"))
    try:
        gone, remarks = evaluate_run(run, device="cpu")
        assert gone is None and "--data DIR says where they are" in remarks[-1]
        found, _ = evaluate_run(run, data=str(data.with_name("away")), device="cpu")
        assert (found.scores.confusion == verdict.scores.confusion).all()
    finally:
        data.with_name("away").rename(data)


def test_a_folder_that_is_no_run_is_refused(command, tmp_path, copy):
    (tmp_path / "file").write_text("mine")
    for place, told in (("file", "is a file: name a folder"), ("no/such", "does not exist")):
        with pytest.raises(RecipeError, match=told):
            require_place(tmp_path / place)
    for folder, told in (("nowhere", "is not a folder"), (".", "it has no recipe.yaml")):
        done = command("main", "report", tmp_path / folder)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "mine"
    (copy / "recipe.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match=r"recipe\.yaml cannot be read"):
        read_run(copy)


def test_a_thousand_classes_and_a_long_record_stay_small(copy):
    rng = np.random.default_rng(0)
    with open(copy / "metrics.jsonl", "w") as file:
        for i in range(1, 100_001):
            file.write(
                f'{{"step": {12 * i}, "split": "train", "loss": {7 / i**0.1}, "lr": {1 / i}, '
                f'"images_per_second": {300 + i % 7}, "data_wait": 0.01, "loss_scale": {i}}}\n'
            )
            if i % 200 == 0:
                scores = {"top1": i / 2000, "top5": 60.0, "loss": 2.0}
                file.write(json.dumps({"step": 12 * i, "split": "val", **scores}) + "\n")
    confusion = rng.integers(0, 2, (1000, 1000))
    np.fill_diagonal(confusion, rng.integers(0, 600, 1000))
    names = [f"a rather long name of a class, number {k} (n{k:08})" for k in range(1000)]
    pictures = list(
        rng.integers(0, 256, (MAX_MISTAKES, 256, 256, 3), dtype=np.uint8)
    )  # the worst of JPEG
    verdict = Evaluation(
        *("best.pt", 1_200_000, False, "data"),
        Scores(70.0, 90.0, 1.0, 50_000, 0, 1.0, confusion),
        names,
        [Mistake(i, i, i + 1, 0.9) for i in range(MAX_MISTAKES)],
        pictures,
    )
    text = page_of(copy, verdict)
    assert len(text.encode()) < 3_000_000
    page = Page(text)
    assert "confusion" not in page.sections and names[777] in page.sections["classes"]
    assert "The record has 100,000 lines" in page.sections["curves"]
    low = min(range(1000), key=lambda k: confusion[k, k] / confusion[k].sum())
    assert names[low] in page.sections["worst"]
    classes.draw_worst(classes.class_scores(confusion, names), confusion, copy / "worst.png")
    assert cv2.imread(str(copy / "worst.png")).shape[1] > 500


def test_curves_are_means_over_spans_of_steps():
    steps = np.arange(1.0, 10_001)
    values = np.where(steps % 7 == 0, np.nan, steps**2)
    thinned, means = curves.thin(steps, values, 100)
    assert len(thinned) == 100 and (np.diff(thinned) > 0).all()
    first = values[:100][np.isfinite(values[:100])]
    assert means[0] == pytest.approx(first.mean(), rel=0.05)
    again, same = curves.thin(steps[:50], values[:50], 100)
    assert np.array_equal(same, values[:50][np.isfinite(values[:50])]) and len(again) == len(same)
    rough = np.random.default_rng(0).normal(size=50)
    near = [min(i, 49 - i, 3) for i in range(50)]
    slow = [rough[i - n : i + n + 1].mean() for i, n in enumerate(near)]
    assert curves.smooth(rough, 3) == pytest.approx(slow)
    for low, high in ((0.0, 1.0), (-3e-5, 7e-5), (2.31, 2.33), (0, 8e6)):
        marks = curves.ticks(low, high)
        assert 2 <= len(marks) <= 5 and low <= marks[0] and marks[-1] <= high


def test_charts_of_percentages_start_at_zero(trained, copy):
    run = read_run(copy)
    drawn = {chart.title: chart for chart in curves.charts(run)}
    for title in ("validation, % of the images right", "waiting for images, % of the time"):
        assert curves.extent(drawn[title])[2] == 0
    steps = np.array([1.0, 2.0])
    for values in ([0.0, 0.0], [76.0, 76.5], [50.0, 50.0]):
        chart = curves.Chart("x", [curves.Curve("x", steps, np.array(values), 0)], 2, "", True)
        _, _, low, high = curves.extent(chart)
        assert low == 0 and high > max(values)
        assert "bottom:0.00%" in figures.figure(chart, [])


def test_ties_among_the_worst_classes_are_stated(copy, monkeypatch):
    """40 classes: 3 with 0 %, 30 with 50 %, 7 with 100 %; 20 are shown."""
    rights = [0] * 3 + [1] * 30 + [2] * 7
    confusion = np.zeros((40, 40), np.int64)
    for k, right in enumerate(rights):
        confusion[k, k] = right
        confusion[k, (k + 1) % 40] += 2 - right
    names = [f"class {k}" for k in range(40)]
    scores = classes.class_scores(confusion, names)
    low = classes.worst(scores)
    assert len(low) == 20 and classes.more_alike(scores, low) == 13
    assert classes.more_alike(scores[:3], classes.worst(scores[:3])) == 0
    assert classes.more_alike([], []) == 0
    totals = Scores(1.0, 1.0, 1.0, 80, 0, 1.0, confusion)
    page = Page(page_of(copy, Evaluation("best.pt", 1, False, "data", totals, names, [], [])))
    assert "lowest top-1, and 13 more with the same top-1 (50 %)." in page.sections["worst"]

    none = replace(totals, confusion=np.zeros_like(confusion))  # no class has an image
    page = Page(page_of(copy, Evaluation("best.pt", 1, False, "data", none, names, [], [])))
    assert "lowest top-1." in page.sections["worst"]

    drawn = []
    monkeypatch.setattr(classes, "save", lambda figure, path: drawn.append(figure))
    classes.draw_worst(scores, confusion, copy / "worst.png")
    nothing = np.array([[0, 4], [4, 0]])
    classes.draw_worst(classes.class_scores(nothing, ["a", "b"]), nothing, copy / "worst.png")
    bars, counts = drawn[0].axes
    assert "and 13 more with the same top-1" in bars.get_title()
    assert "more" not in drawn[1].axes[0].get_title()
    for axes in (bars, counts, *drawn[1].axes):
        assert axes.get_xlim()[0] == 0 < axes.get_xlim()[1]


def test_the_time_axis_tells_stops_and_kills(copy):
    lines = [
        ("00:00", "start", 0, []),
        ("01:00", "stop", 40, ["SIGTERM: saved"]),
        ("02:00", "resume", 40, []),
        ("05:00", "resume", 60, ["<i>careful</i>"]),
        ("06:00", "done", 90, []),
    ]
    with open(copy / "history.jsonl", "w") as file:
        for time, event, step, remarks in lines:
            time = f"2026-05-04T{time}:00+00:00"
            line = {"time": time, "event": event, "step": step, "remarks": remarks}
            file.write(json.dumps(line) + "\n")
    run = read_run(copy)
    found = running_periods(run)
    assert [(p.begin.step, p.end and p.end.step, p.last) for p in found] == [
        (0, 40, False),
        (40, None, False),
        (60, 90, True),
    ]
    assert found[1].until == found[2].begin.time
    axis = figures.time_axis(run)
    assert 'class="lost" style="left:33.333%;width:50.000%"' in axis
    assert axis.count("<b ") == 1 and 'left:16.667%" title="2026-05-04 01:00:00: SIGTERM' in axis
    page = Page(page_of(copy))
    assert "at most" in page.sections["summary"], "a kill has no time"
    assert "No stop was noted before: the run was killed. <i>careful</i>" in page.sections["time"]
    assert page.sections["summary"].split()[:3] == ["Summary", "state", "done"]
    running = replace(run, events=run.events[:4], written=run.events[3].time + timedelta(hours=2))
    assert (
        running_periods(running)[-1].until == running.written
        and running_periods(running)[-1].end is None
    )


def test_recipe_entries_hold_values_and_comments():
    entries = recipe_entries((ROOT / "recipes" / "cspdarknet53.yaml").read_text())
    assert entries["group"].comment == "cfg: subdivisions=4, BatchNorm sees 128 / 4 images"
    assert entries["optim.weight_decay"].value == 5e-4


def test_the_report_shows_the_source_of_each_value(tmp_path, command):
    file = tmp_path / "mine.yaml"
    text = (ROOT / "recipes" / "digits.yaml").read_text()
    file.write_text(text.replace("log_every: 20", "log_every: 1  # often").replace("seed: 0\n", ""))
    small = [word for word in TINY if not word.startswith("log_every")]
    arguments = ("--output", tmp_path / "run", "--device", "cpu")
    done = command("main_train", "--recipe", file, *arguments, *small)
    assert done.returncode == 0, done.stderr
    run = read_run(tmp_path / "run")
    assert run.recipe_file == str(file)
    assert run.recipe_sources["log_every"] == "often"
    assert run.recipe_sources["batch"] == "command line; 64 in the file"
    assert run.recipe_sources["seed"] == "default"
    page = Page(publish(run, None, [], tmp_path / "out").read_text()).sections["recipe"]
    assert "often" in page and "command line; 64 in the file" in page
    # A resumed run keeps what its first start has recorded.
    done = command("main_train", "--resume", *arguments, "schedule.steps=8")
    assert done.returncode == 0, done.stderr
    resumed = read_run(tmp_path / "run")
    assert resumed.recipe_file == str(file)
    assert resumed.recipe_sources.pop("schedule.steps") == "command line; 7 in the file"
    run.recipe_sources.pop("schedule.steps")
    assert resumed.recipe_sources == run.recipe_sources


def test_a_run_without_recorded_sources_has_a_report(copy):
    (copy / "recipe-sources.json").unlink(missing_ok=True)
    (copy / "recipe.yaml").write_text("model: {name: other}\nbatch: 3\n")
    assert read_run(copy).recipe_sources == {}
    assert "batch: 3" in Page(page_of(copy)).sections["recipe"]


def test_any_name_can_be_drawn_and_a_synset_keeps_its_id(tmp_path, copy):
    assert classes.class_labels(["n01440764", "cat"], ["tench", "cat"]) == [
        "tench (n01440764)",
        "cat",
    ]
    names = ["$x_{", "\udcff", "two\nlines", "猫", "_hidden", NASTY]
    confusion = np.arange(36).reshape(6, 6)
    pictures = [np.zeros((32, 32, 3), np.uint8)]
    scores = Scores(1.0, 1.0, 1.0, 630, 0, 1.0, confusion)
    mistakes = [Mistake(0, 0, 1, 0.5)]
    verdict = Evaluation("best.pt", 1, False, "data", scores, names, mistakes, pictures)
    page = publish(read_run(copy), verdict, [], tmp_path / "out").read_text(encoding="utf-8")
    assert "猫" in page and "two\nlines" in page
    classes.draw_worst(classes.class_scores(confusion, names), confusion, tmp_path / "worst.png")
    nothing = np.zeros((2, 2), np.int64)
    assert classes.worst(classes.class_scores(nothing, ["a", "b"])) == []
    assert classes.shares(nothing)[1] == 0


def test_the_record_alone_and_a_full_device(copy, trained, capsys, monkeypatch):
    report_command(copy, record_only=True)
    told = capsys.readouterr().out.splitlines()
    assert "nothing was evaluated" in told[0] and told[-1] == str(copy / "report" / "report.html")
    assert "nothing was evaluated" in Page((copy / "report" / "report.html").read_text()).text

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(verdicts, "evaluate_network", full)
    verdict, remarks = evaluate_run(read_run(trained), device="cpu")
    assert verdict is None and "--device cpu" in remarks[0]


def test_a_full_disk_leaves_the_report_before(copy, monkeypatch):
    run = read_run(copy)
    before = publish(run, None, [], copy / "report").read_bytes()

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RecipeError, match=r"cannot be written to .*No space left"):
        publish(run, None, ["another"], copy / "report")
    assert (copy / "report" / "report.html").read_bytes() == before
    assert not list((copy / "report").glob(".*"))
