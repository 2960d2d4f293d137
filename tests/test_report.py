"""The report on a run: its content against a slow recount, and that the page is self-contained."""

import json
import os
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch
from matplotlib.dates import date2num
from rich.console import Console

from cspnet.cli.reports import report_command
from cspnet.data.loader import EvalBatches
from cspnet.errors import CheckpointError, DataError, RecipeError
from cspnet.inference.evaluate import Scores
from cspnet.recipe import load as recipes
from cspnet.recipe.value_sources import recipe_entries
from cspnet.report import charts, classes
from cspnet.report import evaluation as evaluation_module
from cspnet.report.drawing import save_png, to_svg
from cspnet.report.evaluation import Evaluation, evaluate_run
from cspnet.report.mistakes import MAX_MISTAKES, Mistake, TopMistakes, format_percent, network_view
from cspnet.report.page import render
from cspnet.report.publish import PICTURES, publish, require_output_folder
from cspnet.report.style import DARK, LIGHT
from cspnet.report.timeline import draw_timeline
from cspnet.run.reader import read_run, running_periods
from cspnet.runtime.options import RunOptions
from cspnet.sources.data_root import open_validation
from cspnet.train.loop import train
from cspnet.weights.load import load_weights
from tests.conftest import ROOT, TINY, picture

NASTY = '<b>&"'
RUN_FIGURES = [name for name in charts.NAMES if name != "loss-scale"] + ["timeline"]
NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)


class Page(HTMLParser):
    """A parsed page: its external resources, sections and text."""

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
    """A run on three classes, one of which has HTML in its name."""
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
def evaluated(trained):
    run = read_run(trained)
    evaluation, remarks = evaluate_run(run, device="cpu")
    assert remarks == []
    return run, evaluation


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the run without checkpoints, which a test may damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("recipe.yaml", "env.json", "metrics.jsonl", "history.jsonl"):
        (folder / name).write_bytes((trained / name).read_bytes())
    return folder


def page_of(folder, evaluation=None, remarks=()):
    run = read_run(folder)
    return render_page(run, evaluation, remarks)


def render_page(run, evaluation=None, remarks=()):
    drawings = [charts.draw_chart(c, charts.resume_steps(run)) for c in charts.run_charts(run)]
    return render(run, drawings, draw_timeline(run), evaluation, list(remarks), NOW)


def test_report_writes_one_self_contained_page(trained, command, tmp_path):
    out = tmp_path / "out"
    done = command("main", "report", trained, "--device", "cpu", "--output", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out / "report.html")
    names = {
        "report.html",
        *(f"{name}.png" for name in RUN_FIGURES),
        "confusion.png",
        "mistakes.png",
    }
    assert {path.name for path in out.iterdir()} == names
    for name in names - {"report.html"}:
        assert cv2.imread(str(out / name)).shape[0] > 100
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert (
        page.outside == []
        and "://" not in text
        and not re.search(r"url\([^#]", text)
        and "@import" not in text
    )
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert list(page.sections) == [
        *(
            "summary",
            "curves",
            "history",
            "confusion",
            "mistakes",
            "classes",
            "recipe",
            "environment",
        )
    ]
    assert read_run(trained).fields["loss.label_smoothing"] == 0.1
    assert "smoothed labels: it cannot reach 0 and is not comparable" in page.sections["curves"]
    assert NASTY in page.sections["classes"] and NASTY in page.sections["confusion"]
    assert NASTY not in text and "&lt;b&gt;&amp;&quot;" in text
    assert any(NASTY in title for title in page.titles)


def test_the_numbers_are_those_of_a_slow_recount(evaluated):
    run, evaluation = evaluated
    trained = load_weights(str(run.folder.best_checkpoint))
    source = open_validation(evaluation.data, trained.classes)
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
            assert np.array_equal(network_view(source, index, recipe), image[0].numpy())
    assert (evaluation.scores.confusion == counted).all() and evaluation.step == trained.step
    assert evaluation.names == ['<b>&"', "apple", "cat"] and len(wrong) == len(evaluation.mistakes)
    for mistake, (share, index, true, taken) in zip(
        evaluation.mistakes, sorted(wrong, key=lambda w: (-w[0], w[1])), strict=True
    ):
        assert (mistake.true, mistake.predicted) == (true, taken)
        assert mistake.probability == pytest.approx(share, abs=1e-4)
        assert np.array_equal(
            evaluation.pictures[evaluation.mistakes.index(mistake)],
            network_view(source, index, recipe),
        )
    for k, score in enumerate(classes.class_scores(counted, evaluation.names)):
        assert (score.images, score.correct) == (5, counted[k, k])
        beside = {o: counted[k, o] for o in range(3) if o != k}
        assert score.confused_images == max(beside.values())
        if score.confused_images:
            confused = evaluation.names.index(score.confused_with)
            assert beside[confused] == score.confused_images
    page = Page(render_page(run, evaluation))
    assert f"top-1 {evaluation.scores.top1:.2f} %" in page.sections["summary"]
    assert page.tags.count("img") == len(wrong)


def test_the_most_confident_errors_are_found_whatever_the_batches():
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
        collector = TopMistakes()
        for first in range(0, 500, batch):
            collector(first, logits[first : first + batch], labels[first : first + batch])
        mistakes = collector.mistakes
        assert [mistake.index for mistake in mistakes] == order[:MAX_MISTAKES]
        assert all(m.true == int(labels[m.index]) != m.predicted for m in mistakes)
    assert TopMistakes().mistakes == []
    percents = [format_percent(p) for p in (1 - 1e-9, 0.5, 1.0)]
    assert percents == ["99.99 %", "50 %", "100 %"]


def test_damaged_logs_are_read_as_far_as_possible(copy):
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
    assert "4 malformed lines" in page_of(copy)
    for name in ("env.json", "history.jsonl", "metrics.jsonl"):
        (copy / name).unlink()
    text = Page(page_of(copy)).text
    assert "No step logged yet" in text and "no history.jsonl" in text
    assert "There is no env.json" in text
    assert publish(read_run(copy), None, [], copy / "report").is_file()


def test_a_report_names_what_is_missing_and_has_the_rest(copy, trained, tmp_path):
    run = read_run(copy)
    evaluation, remarks = evaluate_run(run, device="cpu")
    assert evaluation is None and "has no checkpoint yet" in remarks[0]
    (copy / "report").mkdir()
    (copy / "report" / "mistakes.png").write_text("of the report before")
    page = Page(publish(run, None, remarks, copy / "report").read_text())
    assert "has no checkpoint yet" in page.text and "curves" in page.sections
    assert "mistakes" not in page.sections
    assert {p.name for p in (copy / "report").iterdir()} == {
        "report.html",
        *(f"{name}.png" for name in RUN_FIGURES),
    }
    for missing in ("best", str(tmp_path / "none.pt")):
        with pytest.raises(CheckpointError, match="does not exist"):
            evaluate_run(run, checkpoint=missing, device="cpu")

    (copy / "checkpoints").mkdir()
    (copy / "checkpoints" / "best.pt").write_bytes(b"torn")
    os.link(trained / "checkpoints" / "last.pt", copy / "checkpoints" / "last.pt")
    evaluation, remarks = evaluate_run(run, device="cpu")
    assert evaluation.checkpoint.endswith("last.pt") and "best.pt" in remarks[0]
    with pytest.raises(DataError, match="does not exist"):
        evaluate_run(run, data=str(tmp_path / "nowhere"), device="cpu")
    data = Path(evaluation.data)
    data.rename(data.with_name("away"))
    try:
        gone, remarks = evaluate_run(run, device="cpu")
        assert gone is None and "Give their location with --data DIR." in remarks[-1]
        other, _ = evaluate_run(run, data=str(data.with_name("away")), device="cpu")
        assert (other.scores.confusion == evaluation.scores.confusion).all()
    finally:
        data.with_name("away").rename(data)


def test_a_folder_that_is_not_a_run_is_refused(command, tmp_path, copy):
    (tmp_path / "file").write_text("mine")
    for name, message in (("file", "is a file; give a folder"), ("no/such", "does not exist")):
        with pytest.raises(RecipeError, match=message):
            require_output_folder(tmp_path / name)
    for folder, message in (("nowhere", "is not a folder"), (".", "it has no recipe.yaml")):
        done = command("main", "report", tmp_path / folder)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
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
    evaluation = Evaluation(
        *("best.pt", 1_200_000, False, "data"),
        Scores(70.0, 90.0, 1.0, 50_000, 0, 1.0, confusion),
        names,
        [Mistake(i, i, i + 1, 0.9) for i in range(MAX_MISTAKES)],
        pictures,
    )
    text = page_of(copy, evaluation)
    assert len(text.encode()) < 3_000_000
    page = Page(text)
    assert "confusion" not in page.sections and names[777] in page.sections["classes"]
    assert "The log has 100,000 lines" in page.sections["curves"]
    low = min(range(1000), key=lambda k: confusion[k, k] / confusion[k].sum())
    assert names[low] in page.sections["worst"]
    publish(read_run(copy), evaluation, [], copy / "report")
    assert cv2.imread(str(copy / "report" / "worst-classes.png")).shape[1] > 500


def test_curves_are_means_over_spans_of_steps():
    steps = np.arange(1.0, 10_001)
    values = np.where(steps % 7 == 0, np.nan, steps**2)
    thinned, means = charts.thin(steps, values, 100)
    assert len(thinned) == 100 and (np.diff(thinned) > 0).all()
    first = values[:100][np.isfinite(values[:100])]
    assert means[0] == pytest.approx(first.mean(), rel=0.05)
    again, same = charts.thin(steps[:50], values[:50], 100)
    assert np.array_equal(same, values[:50][np.isfinite(values[:50])]) and len(again) == len(same)
    rough = np.random.default_rng(0).normal(size=50)
    near = [min(i, 49 - i, 3) for i in range(50)]
    slow = [rough[i - n : i + n + 1].mean() for i, n in enumerate(near)]
    assert charts.smooth(rough, 3) == pytest.approx(slow)


def svg_of(chart, marks=()):
    """The drawing of a chart and its parsed SVG."""
    drawing = charts.draw_chart(chart, list(marks))
    return drawing, ElementTree.fromstring(to_svg(drawing))


def a_chart(values, steps=None, **changes):
    steps = np.arange(1.0, len(values) + 1) if steps is None else steps
    curves = [charts.Curve("x", steps, np.array(values), 0)]
    chart = charts.Chart("loss", "Loss", curves, int(steps[-1]))
    return replace(chart, **changes)


def path_points(path):
    """The corners of an SVG path."""
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.get("d"))]
    return np.array(numbers).reshape(-1, 2)


def lines_of(svg, colour):
    """The paths of curves in a colour of the theme; markers and the legend are not among them."""
    paths = [path for path in svg.iter("path") if f"stroke: var(--{colour})" in path.get("style")]
    return [path_points(path) for path in paths if path.get("clip-path")]


def test_charts_of_percentages_start_at_zero(copy):
    by_name = {chart.name: chart for chart in charts.run_charts(read_run(copy))}
    for name in ("accuracy", "data-wait"):
        assert svg_of(by_name[name])[0].figure.axes[0].get_ylim()[0] == 0
    for values in ([0.0, 0.0], [76.0, 76.5], [50.0, 50.0]):
        chart = a_chart(values, from_zero=True)
        drawing, svg = svg_of(chart)
        low, high = drawing.figure.axes[0].get_ylim()
        assert low == 0 and high > max(values)
        assert "0" in [text.text for text in svg.iter("text")]


def test_an_svg_shows_the_values_of_the_curve():
    """Its corners are the values on linear axes from the first step to the last."""
    values = np.array([3.0, 1.0, 2.0, 0.5])
    chart = a_chart(values, np.array([0.0, 10.0, 50.0, 100.0]))
    _, svg = svg_of(chart, [25, 75])
    (points,) = lines_of(svg, "c0")
    x, y = points.T
    assert (x - x[0]) / (x[-1] - x[0]) == pytest.approx([0, 0.1, 0.5, 1], abs=1e-3)
    assert (y - y.max()) / (y.min() - y.max()) == pytest.approx([1, 0.2, 0.6, 0], abs=1e-3)
    dotted = [p for p in lines_of(svg, "dim") if np.ptp(p[:, 0]) == 0]
    assert [(p[0, 0] - x[0]) / (x[-1] - x[0]) for p in dotted] == pytest.approx([0.25, 0.75], 1e-2)
    texts = [text.text for text in svg.iter("text")]
    assert {"Loss", "optimizer step", "0", "100", "x: 0.5"} <= set(texts)
    assert svg.find("title").text == "Loss"
    assert svg.find("desc").text == "Steps 0 to 100: x from 3 to 0.5."
    assert svg.get("aria-labelledby").split() == [
        svg.find(tag).get("id") for tag in ("title", "desc")
    ]


def test_an_svg_marks_each_point_with_a_hover_text():
    chart = a_chart([1.0, 40.0, 1234.0, 56789.0], ceiling=50_000)
    chart = replace(chart, curves=[replace(chart.curves[0], kind="dots")])
    _, svg = svg_of(chart)
    titles = [use.find("title").text for use in svg.iter("use") if use.find("title") is not None]
    assert titles == [
        "x 1 at step 1",
        "x 40 at step 2",
        "x 1,234 at step 3",
        "x 56.79k at step 4",
    ]


def test_an_svg_is_deterministic_self_contained_and_follows_dark_mode():
    chart = a_chart(np.linspace(0.123456789, 5, 600), title="Loss $x_{")
    _, svg = svg_of(chart)
    texts = [to_svg(charts.draw_chart(chart, [3])) for _ in range(2)]
    assert texts[0] == texts[1] and len(texts[0]) < 20_000
    assert "Loss $x_{" in texts[0] and "://" not in texts[0] and "xmlns" not in texts[0]
    assert not re.search(r"#[0-9a-f]{6}", texts[0]), "a colour without a variable"
    assert set(re.findall(r"var\(--(\w+)\)", texts[0])) <= set(LIGHT)
    assert LIGHT.keys() == DARK.keys() and len(set(LIGHT.values())) == len(LIGHT)
    tags = {element.tag for element in svg.iter()}
    assert not {"style", "script", "image", "metadata"} & tags


def test_ticks_are_round_and_few():
    for last_step, high, steps in (
        (600, 0.1, {"0", "200", "400", "600"}),
        (1_200_000, 13_000, {"0", "250k", "500k", "750k", "1M"}),
    ):
        chart = a_chart([0.0, high], np.array([1.0, last_step]), from_zero=True)
        axes = svg_of(chart)[0].figure.axes[0]
        ticks = [t.get_text() for t in axes.get_xticklabels() if t.get_position()[0] <= last_step]
        assert set(ticks) == steps
        marks = [y for y in axes.get_yticks() if 0 <= y <= axes.get_ylim()[1]]
        assert 2 <= len(marks) <= 6
    for low, high in ((-3e-5, 7e-5), (2.31, 2.33), (0, 8e6)):
        axes = svg_of(a_chart([low, high]))[0].figure.axes[0]
        ticks = [t.get_text() for t in axes.get_yticklabels()]
        assert len(set(ticks)) == len(ticks) >= 2 and max(map(len, ticks)) <= 8


def test_ids_of_a_page_are_unique_and_refer_to_each_other(evaluated):
    run, evaluation = evaluated
    text = render_page(run, evaluation)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == len(RUN_FIGURES)
    for svg in svgs:
        own = set(re.findall(r'\bid="([^"]+)"', svg))
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= own
    assert text == render_page(run, evaluation)
    assert set(RUN_FIGURES) <= set(PICTURES)


def test_ties_among_the_worst_classes_are_stated(copy):
    """40 classes: 3 with 0 %, 30 with 50 %, 7 with 100 %; 20 are shown."""
    rights = [0] * 3 + [1] * 30 + [2] * 7
    confusion = np.zeros((40, 40), np.int64)
    for k, right in enumerate(rights):
        confusion[k, k] = right
        confusion[k, (k + 1) % 40] += 2 - right
    names = [f"class {k}" for k in range(40)]
    scores = classes.class_scores(confusion, names)
    low = classes.worst_classes(scores)
    assert len(low) == 20 and classes.count_ties(scores, low) == 13
    assert classes.count_ties(scores[:3], classes.worst_classes(scores[:3])) == 0
    assert classes.count_ties([], []) == 0
    totals = Scores(1.0, 1.0, 1.0, 80, 0, 1.0, confusion)
    page = Page(page_of(copy, Evaluation("best.pt", 1, False, "data", totals, names, [], [])))
    assert "of all 40 classes, and 13 more with the same top-1 (50 %)." in page.sections["worst"]

    none = replace(totals, confusion=np.zeros_like(confusion))  # no class has an image
    page = Page(page_of(copy, Evaluation("best.pt", 1, False, "data", none, names, [], [])))
    assert "of all 40 classes." in page.sections["worst"]

    figure = classes.plot_worst_classes(scores, confusion)
    nothing = np.array([[0, 4], [4, 0]])
    other = classes.plot_worst_classes(classes.class_scores(nothing, ["a", "b"]), nothing)
    bars, counts = figure.axes
    assert "13 more with the same top-1 (50 %)" in bars.get_title(loc="left")
    assert "more" not in other.axes[0].get_title(loc="left")
    for axes in (bars, counts, *other.axes):
        assert axes.get_xlim()[0] == 0 < axes.get_xlim()[1]


def test_the_timeline_shows_stops_and_kills(copy):
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
    running = running_periods(run)
    assert [(p.begin.step, p.end and p.end.step, p.last) for p in running] == [
        (0, 40, False),
        (40, None, False),
        (60, 90, True),
    ]
    assert running[1].until == running[2].begin.time
    drawing = draw_timeline(run)
    bars = [(bar.get_x(), bar.get_width()) for bar in drawing.figure.axes[0].patches]
    day = np.array([(0, 1), (2, 3), (5, 1)]) / 24
    first = date2num(run.events[0].time)
    assert np.array(bars) - [first, 0] == pytest.approx(day, abs=1e-6)
    svg = ElementTree.fromstring(to_svg(drawing))
    titles = [group.find("title").text for group in svg.iter() if group.find("title") is not None]
    assert titles == [
        "When the run was running (UTC)",
        "2026-05-04 00:00:00 to 2026-05-04 01:00:00, from step 0 to 40",
        "2026-05-04 02:00:00 to 2026-05-04 05:00:00, from step 40",
        "2026-05-04 05:00:00 to 2026-05-04 06:00:00, from step 60 to 90",
        "2026-05-04 01:00:00: SIGTERM: saved",
    ]
    texts = [text.text for text in svg.iter("text")]
    assert {"2", "02:00", "04:00", "2026-May-04", "running", "killed"} <= set(texts)
    assert "no end recorded" not in texts and "unknown time before the next start" in drawing.note
    page = Page(page_of(copy))
    assert "at most" in page.sections["summary"], "a kill has no time"
    assert (
        "The previous start has no recorded end: the run was killed. <i>careful</i>"
        in (page.sections["history"])
    )
    assert page.sections["summary"].split()[:3] == ["Summary", "state", "done"]
    written = run.events[3].time + timedelta(hours=2)
    unfinished = replace(run, events=run.events[:4], written=written)
    assert running_periods(unfinished)[-1].until == written
    assert running_periods(unfinished)[-1].end is None


def test_recipe_entries_hold_values_and_comments():
    entries = recipe_entries((ROOT / "recipes" / "cspdarknet53.yaml").read_text())
    assert entries["group"].comment == "cfg: subdivisions=4, BatchNorm sees 128 / 4 images"
    assert entries["optim.weight_decay"].value == 5e-4


@pytest.mark.parametrize("indicator", ["|-", ">-"])
def test_a_recipe_may_end_with_a_block_of_text(indicator):
    entries = recipe_entries(f"seed: 1  # ours\ndata:\n  root: {indicator}\n    data/x # 1\n")
    assert [(entry.value, entry.comment) for entry in entries.values()] == [
        (1, "ours"),
        ("data/x # 1", ""),
    ]


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
    evaluation = Evaluation("best.pt", 1, False, "data", scores, names, mistakes, pictures)
    page = publish(read_run(copy), evaluation, [], tmp_path / "out").read_text(encoding="utf-8")
    assert "猫" in page and "two\nlines" in page
    scores = classes.class_scores(confusion, names)
    save_png(classes.plot_worst_classes(scores, confusion), tmp_path / "worst.png")
    nothing = np.zeros((2, 2), np.int64)
    assert classes.worst_classes(classes.class_scores(nothing, ["a", "b"])) == []
    assert classes.row_fractions(nothing)[1] == 0


def test_without_evaluation_and_out_of_memory(copy, trained, capsys, monkeypatch):
    report_command(copy, no_evaluate=True)
    lines = capsys.readouterr().out.splitlines()
    assert "Not evaluated: --no-evaluate" in lines[0] and lines[-1] == str(
        copy / "report" / "report.html"
    )
    assert "Not evaluated" in Page((copy / "report" / "report.html").read_text()).text

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluation_module, "evaluate_network", full)
    evaluation, remarks = evaluate_run(read_run(trained), device="cpu")
    assert evaluation is None and "--device cpu" in remarks[0]


def test_a_full_disk_keeps_the_previous_report(copy, monkeypatch):
    run = read_run(copy)
    before = publish(run, None, [], copy / "report").read_bytes()

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RecipeError, match=r"cannot write the report to .*No space left"):
        publish(run, None, ["another"], copy / "report")
    assert (copy / "report" / "report.html").read_bytes() == before
    assert not list((copy / "report").glob(".*"))
