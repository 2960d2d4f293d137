"""Training gives the numbers that it gave before: a change of the algorithm is noticed.

Other tests compare runs of the present code with each other, so they pass when all runs change.
"""

import json
import shlex

import pytest

from tests import golden
from tests.conftest import call

# Measured against this CPU with AVX-512: with AVX2 or SSE4.1 (ATEN_CPU_CAPABILITY and
# ONEDNN_MAX_CPU_ISA), or two processes, the metrics differ by at most 3e-7 and the digests by 6e-5
# of the norm. All runs have one thread. Faults that are noticed: 1 % in momentum, learning rate,
# label smoothing, BatchNorm's momentum or the EMA's decay, 3 % in the attack's step size, its sign,
# the order of the groups. A weight decay off by 2 % is not: it moves the digests by 3e-4.
METRICS, DIGESTS = 1e-5, 5e-4


@pytest.fixture(scope="module")
def expected():
    return json.loads(golden.STORED.read_text())


def train_here(output, *options):
    command = ["cspnet-train", "--recipe", "digits", "--output", str(output), "--device", "cpu"]
    assert call(shlex.join([*command, *options, *golden.RECIPE])) == 0


def check(output, expected):
    result = golden.summary(output)
    assert len(result["metrics"]) == len(expected["metrics"])
    for line, stored in zip(result["metrics"], expected["metrics"], strict=True):
        assert line.keys() == stored.keys()
        for key, value in stored.items():
            wanted = pytest.approx(value, rel=METRICS) if isinstance(value, float) else value
            assert line[key] == wanted, (stored["step"], key)
    assert result["best_step"] == expected["best_step"]
    assert result["tensors"].keys() == expected["tensors"].keys()
    for key, (norm, product) in expected["tensors"].items():
        tolerance = DIGESTS * norm + 1e-12
        assert result["tensors"][key] == pytest.approx([norm, product], rel=0, abs=tolerance), key


def test_one_process(tmp_path, expected):
    train_here(tmp_path / "run")
    check(tmp_path / "run", expected)


def test_two_processes(tmp_path, expected):
    golden.train(golden.ROOT, tmp_path / "run", golden.RECIPE, processes=2)
    check(tmp_path / "run", expected)


def test_a_killed_and_resumed_run(tmp_path, expected):
    output = tmp_path / "run"
    golden.train(golden.ROOT, output, golden.RECIPE, kill_after=golden.KILL_AFTER)
    assert golden.metrics(output)[-1]["step"] == golden.KILL_AFTER
    train_here(output, "--resume")
    check(output, expected)
