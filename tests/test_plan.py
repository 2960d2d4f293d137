"""What a run will need: the arithmetic against counting, the measuring on a small run."""

import json
import os
import signal
import threading
import time

import pytest
import torch

from cspnet.errors import PartialResultError, RecipeError
from cspnet.nets import create
from cspnet.plan import forecast
from cspnet.plan.activations import conv_costs
from cspnet.plan.measure import count_validations_and_saves, measure_plan
from cspnet.recipe import load as recipes
from cspnet.recipe.eta import find_bottleneck, format_duration
from cspnet.recipe.schedule import is_save_due, is_validation_due
from cspnet.runtime.options import RunOptions
from cspnet.sources.folder import Digits
from cspnet.train.adversarial import attack_mask


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.start_image_size=32", "data.image_size=96", "schedule.steps=101"],
        [
            "data.start_image_size=32",
            "data.image_size=64",
            "data.full_size_from=0",
            "schedule.steps=50",
        ],
        ["save_every=7", "archive_every=20", "evaluate.every=11", "schedule.steps=107"],
        ["adversarial.step_size=2", "adversarial.probability=0.3", "schedule.steps=500"],
    ],
)
def test_what_a_schedule_holds_is_counted_right(tiny, overrides):
    recipe = tiny(*overrides)
    steps = range(recipe.schedule.steps)
    sizes = [recipe.size_at(step) for step in steps]
    assert list(recipe.size_stages()) == [(s, sizes.count(s)) for s in dict.fromkeys(sizes)]
    coins = [attack_mask(recipe, step, range(recipe.groups)).mean() for step in steps]
    assert forecast.attacked_share(recipe) == pytest.approx(sum(coins) / len(coins))

    saves, validations = 0, 0
    for step in range(1, recipe.schedule.steps + 1):
        saves += is_save_due(recipe, step) or is_validation_due(recipe, step)
        validations += is_validation_due(recipe, step)
        saves += is_validation_due(recipe, step)
    assert count_validations_and_saves(recipe) == (validations, saves)


def test_the_roofline_is_that_of_the_layers():
    """6.533 G multiply-adds and 16.81 M outputs an image; the floors that were worked out by hand,
    layer by layer: 487 images/s on an RTX 2070, 3,207 on an A100."""
    layers = conv_costs(lambda: create("cspdarknet53"), 2, 256)
    assert len(layers) == 67
    assert sum(layer.macs for layer in layers) == pytest.approx(6.533e9, rel=1e-3)
    assert sum(layer.outputs for layer in layers) == pytest.approx(16.81e6, rel=1e-3)
    for key, images in (("rtx2070", 487), ("rtx3090", 1093), ("a100", 3207), ("h100", 6142)):
        rate = forecast._rate(layers, forecast.CARDS[key], 1, 1)
        assert rate == pytest.approx(images, rel=0.01)


def test_cards_go_by_what_people_call_them():
    for name in ("rtx2070", "RTX 2070", "2070", "GeForce RTX 2070", "nvidia-geforce-rtx-2070"):
        assert forecast.find_card(name) is forecast.CARDS["rtx2070"]
    assert forecast.find_card("2080 Ti").name == "GeForce RTX 2080 Ti"
    for name in ("rtx", "", "2070 super", "gtx1080"):
        with pytest.raises(RecipeError, match="must be one of rtx2070, rtx2080"):
            forecast.find_card(name)
    # Peaks that the makers state: fp16 summed up in fp32, dense.
    stated = {"rtx2070": 29.9, "rtx2080ti": 53.8, "rtx3090": 71, "rtx4090": 165.2, "h100": 989}
    for key, tflops in stated.items():
        assert forecast.CARDS[key].tflops == pytest.approx(tflops, rel=0.005)


def test_a_prediction_adds_up(tiny):
    recipe = tiny("batch=16", "group=4", "ema.decay=0.9", "schedule.steps=1000")
    card = forecast.CARDS["rtx2070"]
    found = forecast.forecast(recipe, card, 10)
    parameters = sum(
        p.numel() for p in create("cspdarknet53", classes=10, width=0.125).parameters()
    )
    assert found.fixed_gb == pytest.approx(18 * parameters / 1e9 + forecast.WORKSPACE_GB)
    assert found.checkpoint_gb == pytest.approx(12 * parameters / 1e9)
    assert found.fits == {"compiled": 4, "eager": 4}
    assert found.saved_mb["compiled"] < found.saved_mb["eager"]
    low, high = found.expected
    assert low < high < found.at_most
    assert found.seconds == pytest.approx((16_000 / high, 16_000 / low))
    small = forecast.Card("none", 0.3, 1, 1.0, 1, 1.0, "fp16", "")
    assert forecast.forecast(recipe, small, 10).fits == {"compiled": 0, "eager": 0}
    with pytest.raises(RecipeError, match="--gpu supports only fp16 for GeForce RTX 2070"):
        forecast.forecast(tiny("precision=bf16"), card, 10)
    with pytest.raises(RecipeError, match="only cspnet's own networks"):
        forecast.forecast(recipes.load_recipe(None, ["model.name=timm/resnet18"]), card, 10)


def test_frozen_layers_keep_nothing_and_are_passed_once(tiny):
    """At 256² the stem and two stages have 10.75 M of the net's 16.81 M outputs."""
    whole = recipes.load_recipe(None, [])
    frozen = recipes.load_recipe(None, ["model.init_from=w.pt", "model.freeze_stages=2"])
    card = forecast.CARDS["rtx2070"]
    before, after = (forecast.forecast(recipe, card, 1000) for recipe in (whole, frozen))
    share = after.saved_mb["compiled"] / before.saved_mb["compiled"]
    assert 0.2 < share < 0.5
    assert after.saved_mb["eager"] / before.saved_mb["eager"] == pytest.approx(share, rel=0.15)
    assert before.at_most < after.at_most < 3 * before.at_most
    assert after.checkpoint_gb < before.checkpoint_gb


def test_a_plan_measures_and_leaves_nothing_behind(tiny, tmp_path):
    recipe = tiny(
        *(
            "schedule.steps=1000",
            "data.start_image_size=32",
            "data.image_size=64",
            "evaluate.every=300",
        ),
        *("adversarial.step_size=1", "save_every=200"),
    )
    told = []
    found = measure_plan(recipe, RunOptions(tmp_path / "runs" / "new"), 0.2, told.append)
    assert list(tmp_path.iterdir()) == []
    assert told == [
        *("steps of 16 images, 64×64", "steps of 16 images, 32×32"),
        *("steps with the attack", "the dataloader alone"),
    ]
    assert set(found.step_seconds) == {32, 64} and found.attack_seconds
    share = forecast.attacked_share(recipe)
    steps = sum(n * found.step_seconds[size] for size, n in recipe.size_stages())
    assert found.seconds == pytest.approx(
        found.setup_seconds
        + steps
        + (800 * (32 / 64) ** 2 + 200) * share * found.attack_seconds
        + 4 * found.validation_seconds
        + (7 + 4) * found.save_seconds  # at 200, 300, 400, 600, 800, 900, 1000; after validations
    )
    assert found.both_rate == pytest.approx(16 / found.step_seconds[64])
    assert found.net_rate >= found.both_rate and found.loader_rate > 0
    memory = found.memory_gb
    assert 0.1 < memory["training"] <= memory["validation"] <= memory["attack"] < 24
    assert json.loads(json.dumps(found.to_dict()))["device"] == "cpu"


def test_a_slow_loader_is_named_and_a_fast_one_is_not(tiny, tmp_path, monkeypatch):
    recipe = tiny("schedule.steps=1000")
    found = measure_plan(recipe, RunOptions(tmp_path / "run"), 0.2)
    assert found.bottleneck.startswith("the net")
    read = Digits.read
    monkeypatch.setattr(Digits, "read", lambda *given: (time.sleep(0.05), read(*given))[1])
    found = measure_plan(recipe, RunOptions(tmp_path / "run"), 0.2)
    assert found.bottleneck.startswith("the dataloader; ")
    assert found.data_wait > 0.5 and found.loader_rate < 20
    assert "cspnet pack" in found.advice


def test_a_plan_tells_of_a_net_that_could_not_be_compiled(tiny, tmp_path, monkeypatch):
    def compile(function, **_):
        raise RuntimeError("no C compiler found")

    monkeypatch.setattr(torch, "compile", compile)
    options = RunOptions(
        tmp_path / "run", device="cpu", workers=0, compile=True, micro_batch="auto"
    )
    measured = measure_plan(tiny("schedule.steps=10"), options, 0.2)
    assert measured.micro_batch == 16
    micro_batch, failure = measured.network
    assert micro_batch.startswith("micro-batch 16 images (2 × group of 8), 1 per step")
    assert failure.startswith("NOT COMPILED: torch.compile failed (no C compiler found)")


def test_a_signal_breaks_a_plan_off_and_leaves_nothing_behind(tiny, tmp_path):
    recipe = tiny("schedule.steps=100000")
    timer = threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(PartialResultError, match="interrupted"):
        measure_plan(recipe, RunOptions(tmp_path / "run"), 60)
    assert list(tmp_path.iterdir()) == []


def test_advice_fits_the_place():
    assert find_bottleneck(0.05, 2, 8, "cuda")[0].startswith("the net")
    assert find_bottleneck(0.4, 2, 8, "cuda")[1].startswith("use --workers 8")
    assert "--workers" not in find_bottleneck(0.4, 8, 8, "cuda")[1]
    assert "--workers" not in find_bottleneck(0.4, 0, 8, "cpu")[1]


def test_durations_for_people():
    spelt = [format_duration(s) for s in (0, 9.99, 59.9, 60, 3599, 86_399, 86_400, 1e6)]
    expected = "0.0 s, 10.0 s, 59.9 s, 0:01:00, 0:59:59, 23:59:59, 1d 00h, 11d 13h"
    assert ", ".join(spelt) == expected


def test_the_command_prints_a_table_and_writes_json(tmp_path, command):
    done = command(
        *("main", "plan", "--recipe", "digits", "--gpu", "RTX 2070", "--json", tmp_path / "p.json"),
        *("model.width=0.125", "data.image_size=32"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("prediction for an NVIDIA GeForce RTX 2070 (8 GB, fp16, 29.9")
    assert json.loads((tmp_path / "p.json").read_text())["card"]["gb_per_s"] == 448
    done = command("main", "plan", "--recipe", "digits", "--gpu", "voodoo2", cwd=tmp_path)
    assert done.returncode == 2 and "must be one of" in done.stderr
    done = command(
        *("main", "plan", "--recipe", "digits", "--seconds", "1", "--json", "-"),
        *("model.width=0.125", "schedule.steps=40"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checkpoints"] == 4
    assert not (tmp_path / "runs").exists()
