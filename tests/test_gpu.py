"""What only a CUDA device can show; `make test-gpu`."""

import itertools

import pytest
import torch
from rich.console import Console

from cspnet.run.checkpoint import load_checkpoint
from cspnet.runtime.options import RunOptions
from cspnet.train import loop, state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def run(recipe, output, **options):
    return loop.train(recipe, RunOptions(output, device="cuda", **options), Console(quiet=True))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_the_host_waits_for_no_step(tiny, tmp_path, monkeypatch, precision):
    """Steps 3 to 6, the attack's among them, without one synchronising call."""
    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bf16")
    original, calls = state.learning_rate, itertools.count(1)

    def watch(update, recipe):  # the update is a tensor, at which a look would make the host wait
        torch.cuda.set_sync_debug_mode("error" if 3 <= next(calls) < 7 else "default")
        return original(update, recipe)

    monkeypatch.setattr(state, "learning_rate", watch)
    recipe = tiny(
        *(f"precision={precision}", "log_every=100", "save_every=100", "schedule.steps=8"),
        *("adversarial.step_size=1", "adversarial.probability=1", "schedule.warmup_steps=1"),
    )
    try:
        run(recipe, tmp_path / "run", workers=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fp16_with_loss_scaling_stays_finite_and_float32_at_rest(tiny, tmp_path):
    run(tiny("precision=fp16", "schedule.steps=30"), tmp_path / "run", workers=0)
    saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert saved["precision"] == "fp16" and saved["scaler"]["scale"] > 0
    for tensors in (saved["state_dict"], *saved["optimizer"]["state"].values()):
        for tensor in tensors.values():
            assert not tensor.is_floating_point() or tensor.dtype == torch.float32
            assert tensor.isfinite().all()


def test_a_run_started_on_the_cpu_goes_on_here(tiny, tmp_path):
    recipe = tiny("precision=fp32", "schedule.steps=4", "evaluate.every=2")
    options = RunOptions(tmp_path / "run", device="cpu", workers=0)
    loop.train(recipe, options, Console(quiet=True))
    longer = tiny("precision=fp32", "schedule.steps=8", "evaluate.every=2")
    run(longer, tmp_path / "run", resume=True, workers=0)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 8
