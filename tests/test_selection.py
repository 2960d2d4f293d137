"""best.pt is selected on the images that its top-1 is reported on; every report of it says so."""

import io
import re
import sys
from dataclasses import replace

import pytest

from cspnet.report.evaluation import evaluate_run, selection_note
from cspnet.run.reader import read_run
from tests.conftest import ROOT, TINY, call

SELECTED = "selected on the same images"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with three validations and a run with one, and their output."""
    base, printed = tmp_path_factory.mktemp("selected"), {}
    for name, every in (("three", 2), ("one", 6)):
        steps = f"schedule.steps=6 schedule.warmup_steps=1 evaluate.every={every}"
        tiny = " ".join(setting for setting in TINY if not setting.startswith(("schedule", "eval")))
        line = f"cspnet-train --recipe digits --device cpu --output {base / name} {tiny} {steps}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", io.StringIO())
            assert call(line) == 0
            printed[name] = sys.stdout.getvalue()
    return base, printed


def last_top1(run):
    return read_run(run).validation["top1"][-1]


def test_training_ends_with_the_last_validation(runs):
    base, printed = runs
    for name in ("three", "one"):
        assert f"done; last validation: top-1 {last_top1(base / name):.2f} %\n" in printed[name]
    assert SELECTED in printed["three"] and SELECTED not in printed["one"]


def test_status_compare_and_report_say_so(runs, command, tmp_path):
    base, _ = runs
    for name, several in (("three", True), ("one", False)):
        run = base / name
        output = command("main", "status", run).stdout
        assert (
            f"last validation {last_top1(run):.2f} %" in output and (SELECTED in output) == several
        )
        output = command(
            "main", "report", run, "--device", "cpu", "--output", tmp_path / name
        ).stdout
        assert ("best.pt is the best of several validations" in output) == several
        page = (tmp_path / name / "report.html").read_text()
        assert (SELECTED in page) == several and ("top-1 is optimistic" in page) == several
    output = command("main", "compare", base / "three", base / "one", cwd=tmp_path).stdout
    assert "best top-1: the best of several validations, selected on the same images" in output


def test_other_weights_and_other_images_were_not_selected(runs):
    run = read_run(runs[0] / "three")
    evaluation, _ = evaluate_run(run, checkpoint="last", device="cpu")
    assert selection_note(run, evaluation) == ""
    evaluation, _ = evaluate_run(run, checkpoint="best", device="cpu")
    assert "top-1 is optimistic" in selection_note(run, evaluation)
    assert selection_note(run, replace(evaluation, data="other")) == ""


def test_the_demo_reports_the_last_validation():
    """The figures that the documents promise are those of the last validation."""
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"cspnet-eval --checkpoint runs/demo/checkpoints/last\.pt", makefile)
    for name in ("README.md", "recipes/digits.yaml", "docs/results.md"):
        text = re.sub(r"[\s#]+", " ", (ROOT / name).read_text())
        assert "last validation" in text, name
    assert "98.05" in (ROOT / "docs" / "results.md").read_text()
