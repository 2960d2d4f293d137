"""The self-test of the compiler, and the memory probe, before the first step."""

import functools
from dataclasses import replace

import pytest
import torch
import torch._dynamo
import torch._functorch.config
from rich.console import Console

from cspnet.errors import CspnetError, OutOfMemoryError, RecipeError
from cspnet.nets import csp
from cspnet.runtime.options import RunOptions
from cspnet.train import compile, loop, setup
from cspnet.train.start import start
from cspnet.train.step import TrainStep
from tests.helpers import last, metrics, run, same


@pytest.fixture(autouse=True)
def compiler_as_it_was():
    """Restore the global settings of torch that compilation changes."""
    budget = torch._functorch.config.activation_memory_budget
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._functorch.config.activation_memory_budget = budget
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


@pytest.fixture
def console():
    return Console(record=True, file=open("/dev/null", "w"), width=500)


@pytest.fixture
def aot(monkeypatch):
    """The compiler without code generation: traced, partitioned, run by eager kernels."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()


def trained(recipe, folder, console, **options):
    options = RunOptions(folder, device="cpu", workers=0, **options)
    return loop.train(recipe, options, console)


def test_a_compiled_run_has_the_losses_of_an_eager_run(tiny, tmp_path, console, aot, monkeypatch):
    # Every kind of layer once: more blocks are the same code, and a longer wait for its tracing.
    plan = csp.ARCHITECTURES["cspdarknet53"]
    shallow = replace(plan, stages=tuple(replace(stage, depth=1) for stage in plan.stages))
    monkeypatch.setitem(csp.ARCHITECTURES, "cspdarknet53", shallow)
    # At a low rate: a high one magnifies the last bits within a few steps.
    attacked = ["adversarial.step_size=5", "schedule.warmup_steps=1", "optim.learning_rate=0.001"]
    recipe = tiny("schedule.steps=4", "data.image_size=64", "model.width=0.25", *attacked)
    run(recipe, tmp_path / "eager")
    trained(recipe, tmp_path / "fast", console, compile=True, recompute="light")
    text = console.export_text()
    assert "compiled; self-test passed: gradient off by" in text, text
    assert torch._functorch.config.activation_memory_budget == 0.6
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("eager", "fast")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    "fault, told",
    [
        ("wrong", "differs from eager mode"),
        ("wrong for several groups", "differs from eager mode"),
        ("wrong for one group", "differs from eager mode"),
        ("wrong statistics", "statistics off by"),
        ("no statistics", "statistics off by inf"),
        ("raises", "no C compiler found"),
        ("raises afterwards", "no C compiler found"),
    ],
)
def test_a_faulty_compiler_is_reported_and_not_used(
    tiny, undisturbed, tmp_path, console, monkeypatch, fault, told
):
    def compile(function, **_):
        def faulty(images, *others):
            if fault == "raises":
                raise RuntimeError("no C compiler found\nand so on")
            result = function(images, *others)
            if not isinstance(function, torch.nn.Module):
                return result
            if fault == "raises afterwards":
                raise RuntimeError("no C compiler found")
            if fault == "wrong statistics":
                next(b for n, b in function.named_buffers() if "running_mean" in n).mul_(1.5)
                return result
            if fault == "no statistics":
                *_, variance = (b for n, b in function.named_buffers() if "running_var" in n)
                variance.fill_(float("nan"))
                return result
            several = "several groups" if len(images) > recipe.group else "one group"
            return result * (1.5 if fault in ("wrong", f"wrong for {several}") else 1)

        return faulty

    monkeypatch.setattr(torch, "compile", compile)
    recipe = tiny("schedule.steps=3", "batch=24")  # micro-batches of two groups and of one
    trained(recipe, tmp_path / "fast", console, compile=True, micro_batch=16)
    text = console.export_text()
    assert "NOT COMPILED" in text and told in text
    monkeypatch.undo()
    eager = undisturbed(recipe, micro_batch=16)
    assert same(last(tmp_path / "fast")["state_dict"], last(eager)["state_dict"])


def test_a_compiler_failure_during_the_run_explains_how_to_continue(
    tiny, tmp_path, console, monkeypatch
):
    """At the size of the run's end it works, at an earlier one it does not."""

    class Faulty(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, images):
            if images.shape[-1] == 64:
                raise torch._dynamo.exc.InternalTorchDynamoError("no kernel\nand so on")
            return self.net(images)

    def compile(function, **_):
        return Faulty(function) if isinstance(function, torch.nn.Module) else function

    monkeypatch.setattr(torch, "compile", compile)
    growing = ["data.start_image_size=32", "data.image_size=96", "data.full_size_from=0.6"]
    recipe = tiny("schedule.steps=5", *growing)
    assert [recipe.size_at(step) for step in range(5)] == [32, 32, 64, 96, 96]
    with pytest.raises(CspnetError, match=r"failed in step 3 \(no kernel\): .*--no-compile"):
        trained(recipe, tmp_path / "run", console, compile=True)
    assert "self-test passed" in console.export_text()
    run(recipe, tmp_path / "run", resume=True)
    assert last(tmp_path / "run")["step"] == 5


def prepared(recipe, folder, console, **options):
    work = setup.prepare(recipe, RunOptions(folder, device="cpu", workers=0, **options), console)
    return work, start(work)


@pytest.fixture
def no_compiler(monkeypatch):
    """A compiler that returns the function, wrapped: the network is another object."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *given: function(*given))


def test_gradients_too_large_for_fp16_are_compared_at_a_lower_scale(
    tiny, tmp_path, console, no_compiler
):
    """The first loss scale is too large for many a network: the run skips such steps. The compiled
    network has the gradients of all groups at once, the eager one group by group."""
    work, state = prepared(tiny(), tmp_path / "run", console, compile=True)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scales = []

    class Overflowing(TrainStep):
        def trial(self, part, scale=1.0, with_attack=False):
            scales.append(scale)
            loss = super().trial(part, scale, with_attack)
            if scale > (2**12 if self.network is self.net else 2**8):
                next(self.net.parameters()).grad.fill_(float("inf"))
            return loss

    step = compile.prepare_step(work, state, Overflowing)
    assert step.notes.gradient_error and "self-test passed" in console.export_text()
    assert scales == [2**16, 2**16, 2**12, 2**12, 2**8, 2**8]
    assert state.scaler.get_scale() == 2**16


def test_a_comparison_that_does_not_fit_on_the_device_uses_host_memory(
    tiny, tmp_path, console, no_compiler
):
    work, state = prepared(tiny(), tmp_path / "run", console, compile=True, micro_batch=16)
    tried = []

    class Large(TrainStep):
        def trial(self, part, scale=1.0, with_attack=False):
            tried.append(len(part))
            loss = super().trial(part, scale, with_attack)
            if len(tried) == 2:  # the gradients of the first group are there
                raise torch.OutOfMemoryError("too much")
            return loss

    step = compile.prepare_step(work, state, Large)
    assert step.notes.gradient_error and "self-test passed" in console.export_text()
    assert tried == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("broken", [{"compiled"}, {"rounded"}, {"compiled", "rounded"}])
def test_non_finite_values_never_agree(broken):
    """Not even with each other: an eager network that overflows proves nothing."""
    sound = compile.Outcome(1.0, [torch.ones(3), torch.ones(2)], [torch.ones(4), torch.ones(4)])
    none = compile.Outcome(1.0, [torch.ones(3), torch.full((2,), float("inf"))], sound.statistics)
    compiled, rounded = (none if name in broken else sound for name in ("compiled", "rounded"))
    exact = compile.Outcome(1.0, [torch.ones(3), torch.ones(2)], sound.statistics)
    assert "gradients off by" in compile.compare(compiled, rounded, exact).failure
    assert compile.compare(sound, sound, exact).failure is None


def test_a_requested_micro_batch_that_does_not_fit_names_a_smaller_one(
    tiny, tmp_path, console, no_compiler
):
    work, state = prepared(tiny(), tmp_path / "run", console, compile=True, micro_batch=16)

    class Large(TrainStep):
        def trial(self, part, scale=1.0, with_attack=False):
            if len(part) == 2:
                raise torch.OutOfMemoryError("too much")
            return super().trial(part, scale, with_attack)

    with pytest.raises(OutOfMemoryError, match=r"too much\n--micro-batch 8 \(now 16 images"):
        compile.prepare_step(work, state, Large)


@pytest.mark.parametrize("room, lengths", [(9, [4]), (3, [2, 2]), (1, [1, 1, 1, 1])])
def test_the_largest_micro_batch_that_fits_is_found_and_leaves_no_trace(
    tiny, tmp_path, console, room, lengths
):
    work, state = prepared(tiny("batch=32"), tmp_path / "run", console, micro_batch="auto")
    before = {name: tensor.clone() for name, tensor in state.net.state_dict().items()}
    tried = []

    class Limited(TrainStep):
        def peak_trial(self, state):
            tried.append(self.groups_at_once)
            super().peak_trial(state)  # moves the running statistics, leaves gradients
            if tried[-1] > room:
                raise torch.OutOfMemoryError("too much")

    step = compile.prepare_step(work, state, Limited)
    assert [len(part) for part in step.micro_batches] == lengths
    assert [group for part in step.micro_batches for group in part] == [0, 1, 2, 3]
    assert step.notes.micro_batch == 8 * lengths[0]
    assert tried[-2:] == [lengths[0]] * 2, "the one that fits was tried twice"
    assert same(dict(state.net.state_dict()), before) and state.net.training
    assert all(weight.grad is None for weight in state.net.parameters())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("too much"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_group_that_does_not_fit_suggests_a_remedy(tiny, tmp_path, console, error):
    work, state = prepared(tiny("batch=32", "data.image_size=64"), tmp_path / "run", console)

    class Full(TrainStep):
        def peak_trial(self, state):
            raise error

    size = r"single group of 8 images of 64×64.*for example data\.image_size=32 "
    with pytest.raises(OutOfMemoryError, match=size + r"\(.*(too much|GET|CUBLAS)"):
        compile.probe_micro_batch(work, state, Full(work, state.net))


def test_an_automatic_micro_batch_gives_the_numbers_of_an_explicit_one(tiny, tmp_path, console):
    recipe = tiny("batch=32", "adversarial.step_size=5", "schedule.warmup_steps=1")
    run(recipe, tmp_path / "told", micro_batch=32)
    trained(recipe, tmp_path / "found", console, micro_batch="auto")
    assert "micro-batch 32 images (4 × group of 8), 1 per step" in console.export_text()
    for part in ("state_dict", "state_dict_ema", "optimizer"):
        assert same(last(tmp_path / "found")[part], last(tmp_path / "told")[part])


def test_presets_without_effect_or_unknown_are_refused(tiny, tmp_path, console):
    for options, told in (
        ({"recompute": "light"}, "has no effect, because the network is not compiled"),
        ({"recompute": "huge", "compile": True}, "must be none, light, full"),
        ({"micro_batch": 72}, "must be a multiple of 8 from 8 to 16"),
        ({"micro_batch": 12}, "must be a multiple of 8 from 8 to 16"),
    ):
        with pytest.raises(RecipeError, match=told):
            prepared(tiny(), tmp_path / "run", console, **options)
