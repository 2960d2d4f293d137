"""Kills at the worst moments; `benchmarks/torture.py` has a hundred."""

import importlib.util
import random

import pytest

from tests.conftest import ROOT

HARDEST = [
    # After the first validation: best.pt is the new file, last.pt still the old one. Then amid the
    # first write that follows.
    {"call": 6, "match": "replace last.pt", "moment": "before"},
    {"torn": 1, "share": 0.5},
]
KILLS = [
    {"call": 1, "match": "recipe", "moment": "after"},  # amid the first file of the first start
    *HARDEST,
    "validation",
    "appears",
]


@pytest.mark.parametrize(
    "kills", [HARDEST, pytest.param(KILLS, marks=pytest.mark.slow)], ids=["two", "five"]
)
def test_kills_leave_no_trace(tmp_path, kills):
    spec = importlib.util.spec_from_file_location("torture", ROOT / "benchmarks" / "torture.py")
    torture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(torture)
    found = torture.torture(tmp_path, steps=12, seed=0, kinds=kills, draw=random.Random(0))
    assert found["wrong"] == []
    assert found["kills"] == len(kills) and found["places"]["save"] >= 2, found["each"]
