"""Numbers going bad, and memory ending: what is skipped, what stops the run, what is told."""

import json
import re

import pytest
import torch
from rich.console import Console

from cspnet import console
from cspnet.data import augment, stream
from cspnet.errors import NonFiniteError, OutOfMemoryError
from cspnet.nets import create
from cspnet.recipe.schedule import learning_rate
from cspnet.run.checkpoint import load_checkpoint
from cspnet.runtime import device
from cspnet.runtime.options import RunOptions
from cspnet.train import loop, start, step
from cspnet.train import reporter as metrics_module
from cspnet.train import state as states
from cspnet.train.diagnose import first_non_finite_layer
from cspnet.train.optim import EMA
from cspnet.train.state import TrainState, checkpoint_content
from cspnet.train.step import TrainStep
from tests.helpers import SuddenDeath, last, metrics, numbers, run, same


def spoil(monkeypatch, *steps, by=float("inf")):
    """Make the loss of some steps infinite, counted from 0 and across resumes."""
    original, load, current = TrainStep.loss, TrainStep.load, []

    def watch(self, groups, state, part):
        current[:] = [state.step]
        return load(self, groups, state, part)

    def loss(self, logits, targets):
        return original(self, logits, targets) * (by if current[0] in steps else 1.0)

    monkeypatch.setattr(TrainStep, "load", watch)
    monkeypatch.setattr(TrainStep, "loss", loss)


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def scaled(monkeypatch, request):
    """Loss scaling on the CPU, with or without torch's fused kernel as used on CUDA."""
    monkeypatch.setattr(device.Precision, "scales_loss", True)
    build = start.build_optimizer

    def fused(net, optim):
        optimizer = build(net, optim)
        if request.param:
            optimizer._step_supports_amp_scaling = True
            for group in optimizer.param_groups:
                group["fused"] = True
        return optimizer

    monkeypatch.setattr(start, "build_optimizer", fused)


def test_a_skipped_step_advances_neither_schedule_nor_ema(tiny, tmp_path, monkeypatch, scaled):
    recipe = tiny("schedule.steps=6", "schedule.warmup_steps=2")
    spoil(monkeypatch, 3)
    saved = []
    save = loop.save

    def watch(work, state, *rest, **options):
        content = checkpoint_content(work.identity, state)
        content["state_dict_ema"] = clones(state.ema.tensors)
        saved.append({**content, "state_dict": clones(state.net.state_dict())})
        save(work, state, *rest, **options)

    monkeypatch.setattr(loop, "save", watch)
    run(recipe, tmp_path / "run")
    by_step = {content["step"]: content for content in saved}
    weights = [name for name in by_step[3]["state_dict"] if "running" not in name]
    for name in weights:
        assert torch.equal(by_step[3]["state_dict"][name], by_step[4]["state_dict"][name]), name
        assert not torch.equal(by_step[4]["state_dict"][name], by_step[5]["state_dict"][name])
    assert same(by_step[3]["state_dict_ema"], by_step[4]["state_dict_ema"])
    assert [by_step[step]["updates"] for step in range(1, 7)] == [1, 2, 3, 3, 4, 5]
    lines = [line for line in metrics(tmp_path / "run") if line["split"] == "train"]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert [line["loss"] is None for line in lines] == [step == 3 for step in range(6)]
    scales = [line["loss_scale"] for line in lines]
    assert scales[3:] == [scales[0] / 2] * 3
    rates = [learning_rate(update, recipe) for update in (1, 2, 3, 4, 4, 5)]
    assert [line["lr"] for line in lines] == pytest.approx(rates, rel=1e-6)


def clones(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items() if "num_" not in name}


def test_a_resume_after_a_skipped_step_is_exact(tiny, tmp_path, monkeypatch, scaled):
    recipe = tiny("schedule.steps=6", "save_every=2", "log_every=2")
    spoil(monkeypatch, 1, 4)
    run(recipe, tmp_path / "whole")
    draw = augment.sample_params

    def die(*arguments):
        if arguments[1] == 5:
            raise SuddenDeath
        return draw(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(step, "sample_params", die)
        with pytest.raises(SuddenDeath):
            run(recipe, tmp_path / "cut")
    assert last(tmp_path / "cut")["step"] == 4
    run(recipe, tmp_path / "cut", resume=True)
    whole, cut = last(tmp_path / "whole"), last(tmp_path / "cut")
    assert whole["updates"] == 4
    for part in ("state_dict", "state_dict_ema", "optimizer", "scaler", "updates"):
        assert same(whole[part], cut[part]), part
    assert numbers(metrics(tmp_path / "cut")) == numbers(metrics(tmp_path / "whole"))


def test_the_ema_on_the_device_equals_the_ema_on_the_host():
    torch.manual_seed(0)
    net = create("darknet53", classes=3, width=0.125)
    host, device = EMA(net, 0.9), EMA(net, 0.9)
    for update in range(1, 30):
        for weight in net.parameters():
            weight.data += torch.randn_like(weight)
        host.update(update)
        device.update(torch.tensor(float(update), dtype=torch.float64), torch.tensor(1.0))
    for name, tensor in host.tensors.items():
        torch.testing.assert_close(device.tensors[name], tensor, rtol=1e-5, atol=1e-6)


def test_repeated_non_finite_losses_end_a_run_with_loss_scaling(
    tiny, tmp_path, monkeypatch, scaled
):
    spoil(monkeypatch, 2, 3, 4)
    with pytest.raises(NonFiniteError, match="the loss is not finite at step 5"):
        run(tiny("save_every=100"), tmp_path / "run")


def test_the_error_of_a_non_finite_loss(tiny, folder, tmp_path, monkeypatch):
    recipe = tiny(f"data.root={folder}", "model.classes=3", "log_every=6", "save_every=2")
    spoil(monkeypatch, 4, by=float("nan"))
    with pytest.raises(NonFiniteError) as caught:
        run(recipe, tmp_path / "run")
    told = json.loads((tmp_path / "run" / "not-finite.json").read_text())
    assert told["step"] == 5 and "at step 5" in str(caught.value)
    assert told["first_not_finite"] == "stem.conv1.conv.weight"
    assert told["first_not_finite_by_last_checkpoint"] == "nothing"
    positions = [entry["position"] for entry in told["images"]]
    assert positions == list(range(64, 80))
    index = stream.index_at(recipe.seed, 64, 36)
    assert told["images"][0]["index"] == index and told["images"][0]["file"].endswith(".jpg")
    assert last(tmp_path / "run")["step"] == 4


def test_a_diverged_checkpoint_is_not_recommended(tiny, tmp_path, monkeypatch):
    """Its weights are finite, but so large that its output is not."""
    original = TrainState.apply_update

    def diverge(state):
        original(state)
        if state.step == 2:
            state.optimizer.param_groups[0]["params"][0].data.mul_(1e38)

    monkeypatch.setattr(TrainState, "apply_update", diverge)
    with pytest.raises(NonFiniteError) as caught:
        run(tiny("save_every=2", "log_every=5"), tmp_path / "run")
    message = str(caught.value)
    assert last(tmp_path / "run")["step"] == 2  # saved, since all its numbers are finite
    assert "last.pt of step 2. It had diverged already" in message and "good" not in message


@pytest.mark.parametrize("steps, red", [(400_000, False), (40_000_000, True)])
def test_the_expected_end_is_printed_in_red_beyond_14_days(tiny, tmp_path, monkeypatch, steps, red):
    styles = {}
    monkeypatch.setattr(
        console.RunOutput, "print", lambda _, text, style=None: styles.update({text: style})
    )
    # 16 images a step at 160 images/s: ten steps a second, so 11 hours or 46 days.
    clock = iter(range(10_000))
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: next(clock) / 10)
    monkeypatch.setattr(metrics_module, "find_bottleneck", lambda *_: ("the network", ""))

    def stop_at_3(update, recipe):
        if update == 4:
            raise KeyboardInterrupt
        return learning_rate(update, recipe)

    monkeypatch.setattr(states, "learning_rate", stop_at_3)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(f"schedule.steps={steps}", "save_every=1000000"), tmp_path / "run")
    (line,) = (text for text in styles if text.startswith("expected end: "))
    assert (styles[line] == "red") is red
    assert re.fullmatch(
        r"expected end: \d{4}-\d\d-\d\d \d\d:\d\d \(in .*, without validations\)", line
    )


def test_non_finite_weights_are_never_saved(tiny, tmp_path, monkeypatch):
    """The last loss was finite, its update was not; a validation would follow."""
    original = TrainState.apply_update

    def overflow(state):
        original(state)
        if state.step == 4:
            state.optimizer.param_groups[0]["params"][5].data[0] = float("inf")

    monkeypatch.setattr(TrainState, "apply_update", overflow)
    with pytest.raises(NonFiniteError, match="weights are not finite after the update at step 4"):
        run(tiny("evaluate.every=2", "save_every=2"), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    for path in folder.glob("*.pt"):
        content = load_checkpoint(path)
        assert content["step"] == 2
        assert all(t.isfinite().all() for t in content["state_dict"].values())


def test_the_first_non_finite_layer_is_named():
    net = create("cspdarknet53", classes=3, width=0.125).eval()
    images = torch.rand(2, 3, 64, 64)
    assert first_non_finite_layer(net, lambda: net(images)) is None
    net.stages[3].blocks[1].conv2.bn.running_var[0] = float("nan")
    net.head.fc.weight.data[0] = float("nan")
    found = first_non_finite_layer(net, lambda: net(images))
    assert found == "stages.3.blocks.1.conv2.bn.running_var"
    net.stages[1].conv_transition.bn.bias.data.fill_(1e3)
    net.stages[2].conv_down.conv.weight.data.fill_(3e38)
    found = first_non_finite_layer(net, lambda: net(images))
    assert found == "the output of stages.2.conv_down.conv"
    images[0, 0, 0, 0] = float("nan")
    assert first_non_finite_layer(net, lambda: net(images)) == "the output of stem.conv1.conv"


@pytest.mark.parametrize(
    "micro_batch, told", [(16, "--micro-batch 8 (now 16 images)"), (8, "data.image_size=32")]
)
def test_out_of_memory_suggests_a_remedy(tiny, tmp_path, monkeypatch, micro_batch, told):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(TrainStep, "forward", full)
    with pytest.raises(OutOfMemoryError) as caught:
        run(tiny("data.image_size=64"), tmp_path / "run", micro_batch=micro_batch)
    assert told in str(caught.value) and "Tried to allocate 2.00 GiB" in str(caught.value)
    assert caught.value.exit_code == 1


def test_force_resumes_with_other_settings_and_is_recorded(tiny, tmp_path):
    run(tiny("schedule.steps=3"), tmp_path / "run")
    console = Console(record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    other = tiny("schedule.steps=4", "loss.label_smoothing=0.2")
    options = RunOptions(tmp_path / "run", resume=True, device="cpu", workers=0, force=True)
    loop.train(other, options, console)
    assert "forced: loss.label_smoothing was 0.1, is now 0.2" in console.export_text()
    lines = [json.loads(x) for x in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "done", "resume", "done"]
    assert "forced: loss.label_smoothing was 0.1, is now 0.2" in lines[2]["remarks"]
    assert [line["step"] for line in lines] == [0, 3, 3, 4]
    assert last(tmp_path / "run")["step"] == 4
