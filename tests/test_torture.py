"""Kills at the most critical moments; `benchmarks/torture.py` adds random ones."""

import importlib
import random

import pytest

from tests.conftest import ROOT

HARDEST = [
    # After the first validation: best.pt is the new file, last.pt still the old one. Then during
    # the first write that follows.
    {"call": 6, "match": "replace last.pt", "moment": "before"},
    {"partial_save": 1, "share": 0.5},
]
KILLS = [
    {"call": 1, "match": "recipe", "moment": "after"},  # the first file of the first start
    *HARDEST,
    "validation",
    "temporary file",
]


@pytest.mark.slow
def test_kills_leave_no_trace(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    torture = importlib.import_module("torture")
    result = torture.torture(tmp_path, steps=12, seed=0, kinds=KILLS, rng=random.Random(0))
    assert result["failures"] == []
    assert len(result["kills"]) == len(KILLS) and result["phases"]["save"] >= 2, result["kills"]
