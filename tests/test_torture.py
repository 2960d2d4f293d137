"""Kills at the worst moments; `benchmarks/torture.py` has a hundred of them."""

import importlib.util
import random

from tests.conftest import ROOT

KILLS = [
    {"call": 1, "match": "recipe", "moment": "after"},  # amid the first file of the first start
    # After the first validation: best.pt is the new file, last.pt still the old one. Then amid the
    # first write that follows.
    {"call": 6, "match": "replace last.pt", "moment": "before"},
    {"torn": 1, "share": 0.5},
    "validation",
    "appears",
]


def test_five_kills_leave_no_trace(tmp_path):
    spec = importlib.util.spec_from_file_location("torture", ROOT / "benchmarks" / "torture.py")
    torture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(torture)
    found = torture.torture(tmp_path, steps=12, seed=0, kinds=KILLS, draw=random.Random(0))
    assert found["wrong"] == []
    assert found["kills"] == 5 and found["places"]["save"] >= 2, found["each"]
