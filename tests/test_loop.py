"""The training loop: bit-exact resumes, and micro-batches that do not change results."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from cspnet.errors import CheckpointError, DataError, NonFiniteError, RecipeError, StoppedError
from cspnet.inference.evaluate import Scores, evaluate_network
from cspnet.recipe import load as recipes
from cspnet.run.checkpoint import load_checkpoint
from cspnet.runtime.device import Precision, inference_precision
from cspnet.runtime.options import RunOptions
from cspnet.sources.data_root import open_validation
from cspnet.train import loop, setup
from cspnet.train import start as start_module
from cspnet.train import state as states
from cspnet.train import step as train_step
from cspnet.train.adversarial import attack_mask
from cspnet.train.optim import build_optimizer
from cspnet.train.start import start
from cspnet.train.step import TrainStep
from cspnet.weights.trained import build_net
from tests.helpers import (
    SuddenDeath,
    die_at,
    in_process,
    last,
    metrics,
    numbers,
    run,
    same,
)


def test_a_killed_and_resumed_run_is_bit_identical(tiny, folder, tmp_path):
    """36 images, batches of 16: the kill after step 2 comes in the first epoch, the resumed run
    crosses its end, with other workers than the whole one. Mixing and averaging are on."""
    recipe = tiny(
        *(f"data.root={folder}", "model.classes=3", "data.normalize=imagenet"),
        *("adversarial.step_size=5", "schedule.warmup_steps=1"),
    )
    assert recipe.ema.decay and recipe.mix.mosaic
    assert any(attack_mask(recipe, step, range(2)).any() for step in range(3, 7))
    run(recipe, tmp_path / "whole")
    assert in_process(recipe, tmp_path / "cut", workers=2, die_after=2) == -signal.SIGKILL
    assert last(tmp_path / "cut")["step"] == 2
    run(recipe, tmp_path / "cut", workers=2, resume=True)
    whole, cut = last(tmp_path / "whole"), last(tmp_path / "cut")
    assert whole["step"] == 7 and whole["epoch"] > 3
    for part in ("state_dict", "state_dict_ema", "optimizer", "best_top1", "step"):
        assert same(whole[part], cut[part]), part
    assert any(t.abs().sum() for t in torch.utils._pytree.tree_leaves(whole["optimizer"]["state"]))
    assert numbers(metrics(tmp_path / "cut")) == numbers(metrics(tmp_path / "whole"))


def test_the_loss_average_of_a_log_line_survives_a_resume(tiny, undisturbed, tmp_path, monkeypatch):
    """The loss of a line is the mean since the previous line, even across a crash."""
    recipe = tiny("log_every=3", "schedule.steps=6")
    expected = undisturbed(recipe)
    with monkeypatch.context() as patch:
        die_at(patch, TrainStep, "forward_backward", 3)
        with pytest.raises(SuddenDeath):
            run(recipe, tmp_path / "cut")
    run(recipe, tmp_path / "cut", resume=True)
    assert numbers(metrics(tmp_path / "cut")) == numbers(metrics(expected))


@pytest.mark.parametrize(
    "owner, name, call",
    [
        # In step 6: lines up to 5 are written, the last save is at 3.
        (TrainStep, "forward_backward", 6),
        (loop, "validate", 2),  # at step 6, after its save
        (loop, "save", 4),  # with the first validation's line written, before last.pt and best.pt
    ],
)
def test_a_killed_run_leaves_no_trace_in_metrics_and_events(
    tiny, undisturbed, tmp_path, monkeypatch, owner, name, call
):
    """Wherever the kill happens, a resume gives the same lines, events and weights."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny("save_every=3", "evaluate.every=3", "schedule.steps=8")
    expected = undisturbed(recipe)
    with monkeypatch.context() as patch:
        die_at(patch, owner, name, call)
        with pytest.raises(SuddenDeath):
            run(recipe, tmp_path / "cut")
    run(recipe, tmp_path / "cut", resume=True)
    assert numbers(metrics(tmp_path / "cut")) == numbers(metrics(expected))
    for part in ("state_dict", "state_dict_ema", "best_top1"):
        assert same(last(tmp_path / "cut")[part], last(expected)[part]), part
    best = [
        load_checkpoint(folder / "checkpoints" / "best.pt")
        for folder in (tmp_path / "cut", expected)
    ]
    assert best[0]["step"] == best[1]["step"] and same(*(b["state_dict"] for b in best))
    events = EventAccumulator(str(tmp_path / "cut" / "tb"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 9))
    assert [e.step for e in events.Scalars("val/top1")] == [3, 6, 8]


def test_a_non_finite_loss_stops_the_run_before_a_save(tiny, tmp_path, monkeypatch):
    recipe = tiny("save_every=1", "log_every=5")
    original = TrainStep.loss

    def explode(self, logits, targets):
        step = (
            load_checkpoint(tmp_path / "run/checkpoints/last.pt")["step"]
            if (tmp_path / "run/checkpoints/last.pt").exists()
            else 0
        )
        return original(self, logits, targets) * (float("nan") if step == 2 else 1)

    monkeypatch.setattr(TrainStep, "loss", explode)
    with pytest.raises(
        NonFiniteError, match=r"not finite at step 3.*The last checkpoint is .*last\.pt of step 2"
    ):
        run(recipe, tmp_path / "run")
    saved = last(tmp_path / "run")
    assert saved["step"] == 2 and saved["state_dict"]["head.fc.weight"].isfinite().all()


def test_a_skipped_first_step_leaves_momentum_initialized(tiny):
    """The fused kernel never clears a momentum that it did not write."""
    net = build_net(tiny(), 10)
    fused = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    fused.state.update(build_optimizer(net, tiny().optim).state)
    scaler = torch.amp.GradScaler("cpu")
    for overflow in (True, False):
        for p in net.parameters():
            p.grad = torch.full_like(p, float("inf") if overflow else 1.0)
        scaler.scale(torch.ones(()))
        scaler.step(fused)
        scaler.update()
    for p in net.parameters():
        assert fused.state[p]["momentum_buffer"].abs().max() < 10


def test_restoring_keeps_the_optimizer_kernel_of_the_device(tiny, finished_run, tmp_path):
    options = RunOptions(tmp_path / "run", resume=True, device="cpu")
    prepared = setup.prepare(tiny(), options, Console(quiet=True))
    state = start(prepared)
    for group in state.optimizer.param_groups:
        group["fused"] = True
    state.restore(last(tmp_path / "run"), prepared.identity)
    assert all(group["fused"] for group in state.optimizer.param_groups)


def test_only_the_selected_groups_are_attacked(tiny, tmp_path, monkeypatch):
    """In the loop: exactly the images of the selected groups change."""
    recipe = tiny("adversarial.step_size=1000", "schedule.warmup_steps=0", "batch=32")
    seen = []
    original = TrainStep.load

    def watch(self, groups, state, part):
        clean = self.load_clean(groups, state.step, part)
        loaded = original(self, groups, state, part)
        assert torch.equal(loaded.targets, clean.targets)
        for position, group in enumerate(part):
            rows = slice(8 * position, 8 * position + 8)
            moved = not torch.equal(loaded.images[rows], clean.images[rows])
            seen.append((moved, bool(attack_mask(recipe, state.step, range(group, group + 1))[0])))
        return loaded

    monkeypatch.setattr(TrainStep, "load", watch)
    for micro_batch in (8, 32):
        run(recipe, tmp_path / str(micro_batch), micro_batch=micro_batch)
    assert {True, False} == {moved for moved, _ in seen}
    assert all(not moved or due for moved, due in seen)
    late = seen[8 : len(seen) // 2]  # the first steps' nets hardly know where to push
    assert sum(due and not moved for moved, due in late) == 0


@pytest.mark.parametrize("mistake", ["foreign", "no-last", "other-recipe"])
def test_resume_refuses_a_folder_of_something_else(tiny, undisturbed, tmp_path, mistake):
    folder = tmp_path / "run"
    if mistake == "foreign":
        folder.mkdir()
        (folder / "thesis.tex").write_text("precious")
    else:
        shutil.copytree(undisturbed(tiny("evaluate.every=2")), folder)
        (folder / "checkpoints" / "last.pt").unlink()
        if mistake == "other-recipe":
            (folder / "checkpoints" / "best.pt").unlink()
            (folder / "checkpoints" / "previous.pt").unlink()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError):
        run(tiny("seed=1"), folder, resume=True)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_signal_interrupts_validation_which_a_resume_repeats(tiny, undisturbed, tmp_path):
    recipe = tiny("evaluate.every=3", "schedule.steps=4")
    expected = undisturbed(recipe)
    original = loop.evaluate_network

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate_network", interrupted)
        with pytest.raises(StoppedError, match="saved at step 3 of 4"):
            run(recipe, tmp_path / "cut")
    run(recipe, tmp_path / "cut", resume=True)
    assert numbers(metrics(tmp_path / "cut")) == numbers(metrics(expected))


def relative(a, b, chosen):
    """Norm of the difference of two state dicts over that of the first; and the worst tensor's."""
    pairs = [
        (a[name].double(), b[name].double())
        for name in a
        if a[name].is_floating_point() and chosen(name)
    ]
    squares = [((x - y).square().sum(), x.square().sum()) for x, y in pairs]
    together = sum(d for d, _ in squares) / sum(n for _, n in squares)
    return float(together.sqrt()), float(max(d / n for d, n in squares).sqrt())


def micro_batches_compared(recipe, folder):
    """Runs with micro-batches of 3 and 4 groups of 8 against one with single groups."""
    runs = {}
    for groups in (1, 3, 4):
        run(recipe, folder / str(groups), micro_batch=8 * groups)
        runs[groups] = last(folder / str(groups))
    start = build_net(recipe, 10).state_dict()
    moved = relative(start, runs[1]["state_dict"], lambda name: name.endswith("conv.weight"))[1]
    for groups in (3, 4):  # 3: a micro-batch of three groups, and one of the fourth
        weights, statistics = (
            relative(runs[1]["state_dict"], runs[groups]["state_dict"], chosen)
            for chosen in (lambda name: "running" not in name, lambda name: "running" in name)
        )
        yield weights, statistics, moved


def test_one_micro_batch_of_four_groups_equals_four_of_one(tiny, tmp_path, monkeypatch):
    """Shares of the loss, gradients, order of statistics, attacks; in float64, at a rate that moves
    weights.

    In float32 the last bits differ with the shape of a convolution, and a net over four pixels a
    group magnifies that: the next test.
    """
    build, normalize = build_net, train_step.normalize
    double = lambda recipe, classes: (build(recipe, len(classes)).double(), [])  # noqa: E731
    monkeypatch.setattr(start_module, "init_net", double)
    monkeypatch.setattr(
        train_step, "normalize", lambda images, kind: normalize(images, kind).double()
    )

    def loss(self, logits, targets):
        return -(targets.double() * logits.log_softmax(1)).sum() / recipe.batch

    monkeypatch.setattr(TrainStep, "loss", loss)
    monkeypatch.setattr(loop, "validate", lambda *_: Scores(0, 0, 0, 0, 0, 1))
    attack = ("adversarial.step_size=5", "adversarial.probability=0.5", "schedule.warmup_steps=1")
    recipe = tiny("batch=32", "data.image_size=64", "schedule.steps=5", *attack)
    for weights, statistics, moved in micro_batches_compared(recipe, tmp_path):
        assert moved > 0.05
        assert weights[1] < 1e-5 and statistics[1] < 1e-6


def test_micro_batches_in_float32_differ_by_rounding(tiny, tmp_path):
    """With the published warm-up: its first five rates leave the weights where they are, so that
    rounding is not magnified, and each BatchNorm sees the same groups."""
    recipe = tiny(
        "batch=32",
        "data.image_size=64",
        "schedule.steps=5",
        "schedule.power=4",
        "schedule.warmup_steps=1000",
    )
    for weights, statistics, _ in micro_batches_compared(recipe, tmp_path):
        assert weights[0] < 1e-5 and statistics[0] < 1e-6


def test_a_step_equals_a_plain_reference(tiny, tmp_path):
    """Compare the loop with a plain forward, backward and SGD, group by group."""
    from cspnet.data import augment
    from cspnet.data.loader import TrainGroups
    from cspnet.recipe.schedule import learning_rate
    from cspnet.sources.folder import Digits

    recipe = tiny("schedule.steps=3", "schedule.warmup_steps=0", "ema.decay=0")
    run(recipe, tmp_path / "run")
    net = build_net(recipe, 10)
    source = Digits(train=True)
    velocity = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for step in range(3):
        net.zero_grad()
        for group in range(recipe.groups):
            batch = TrainGroups(source, recipe)[step, group]
            draws = augment.sample_params(recipe, step, range(group, group + 1))
            images, targets = augment.augment(batch.images, batch.labels, draws, recipe, 10)
            loss = -(targets * net(images).log_softmax(1)).sum() / recipe.batch
            loss.backward()
        rate = learning_rate(step + 1, recipe)
        with torch.no_grad():
            for name, p in net.named_parameters():
                decay = recipe.optim.weight_decay if p.ndim > 1 else 0.0
                velocity[name] = 0.9 * velocity[name] + p.grad + decay * p
                p -= rate * velocity[name]
    trained = last(tmp_path / "run")["state_dict"]
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_exits_with_75(tiny, tmp_path, monkeypatch, number):
    recipe = tiny()
    original = states.learning_rate

    def interrupt(update, recipe):
        if update == 2:
            os.kill(os.getpid(), signal.Signals[number])
        return original(update, recipe)

    monkeypatch.setattr(states, "learning_rate", interrupt)
    # Whoever runs the suite in the background has it ignore SIGINT, and so would the loop.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(StoppedError, match=f"{number}: saved at step 2 of 7") as stopped:
        run(recipe, tmp_path / "run")
    assert stopped.value.exit_code == 75
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_validation_and_best(tiny, tmp_path):
    """best.pt is the best validation in metrics.jsonl, and evaluates to that score."""
    recipe = tiny("evaluate.every=2", "schedule.steps=7", "save_every=100")
    final = run(recipe, tmp_path / "run")
    lines = [line for line in metrics(tmp_path / "run") if line["split"] == "val"]
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    best = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")
    top1 = [line["top1"] for line in lines]
    assert best["best_top1"] == max(top1) == top1[[2, 4, 6, 7].index(best["step"])]
    assert final.top1 == top1[-1] and final.images == 359
    validation = open_validation(
        "digits", load_checkpoint(tmp_path / "run/checkpoints/last.pt")["classes"]
    )
    net = build_net(recipe, 10)
    net.load_state_dict(last(tmp_path / "run")["state_dict_ema"])
    again = evaluate_network(net, validation, recipe, Precision("fp32", ""), workers=2, batch=7)
    assert (again.top1, again.top5, again.images) == (final.top1, final.top5, final.images)
    assert net.training


def test_a_finished_run_is_not_trained_again(tiny, finished_run, tmp_path):
    before = (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes()
    assert run(tiny(), tmp_path / "run", resume=True) is None
    assert (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes() == before


def test_a_run_folder_is_never_overwritten(tiny, finished_run, tmp_path):
    with pytest.raises(RecipeError, match=r"not empty.*--resume"):
        run(tiny(), tmp_path / "run")


def test_resume_refuses_other_settings_but_allows_more_steps(tiny, finished_run, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        run(tiny("seed=1", "loss.label_smoothing=0.2"), tmp_path / "run", resume=True)
    assert "seed was 0, is now 1" in str(caught.value)
    assert "loss.label_smoothing was 0.1, is now 0.2" in str(caught.value)
    kept = recipes.load_recipe(tmp_path / "run" / "recipe.yaml", [])
    assert kept == tiny(), "a refused resume leaves the run folder as it was"
    run(tiny("schedule.steps=9", "log_every=2"), tmp_path / "run", resume=True)
    assert last(tmp_path / "run")["step"] == 9


def test_a_wrong_class_count_is_refused(tiny, tmp_path):
    with pytest.raises(RecipeError, match=r"model\.classes is 7, but digits has 10"):
        run(tiny("model.classes=7"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unreadable_images_are_listed_and_too_many_stop_the_run(tiny, folder, tmp_path):

    torn = folder / "train" / "bear" / "3.jpg"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:20])
    allowed = [f"data.root={folder}", "model.classes=auto", "data.max_unreadable=1"]
    recipe = tiny(*allowed)
    with pytest.raises(DataError, match=r"1 of 36 .* more than data\.max_unreadable=0\.01"):
        run(tiny(*allowed[:2]), tmp_path / "strict")
    torn.write_bytes(whole)
    run(tiny(*allowed[:2]), tmp_path / "strict", resume=True)
    assert metrics(tmp_path / "strict")[-1]["step"] == recipe.schedule.steps, "repaired, it goes on"
    torn.write_bytes(whole[:20])
    run(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "unreadable.txt").read_text().splitlines() == [str(torn)]
    for path in (folder / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="unreadable images in one group of 8"):
        run(recipe, tmp_path / "other")


def test_an_unreadable_file_may_have_any_name(tiny, folder, tmp_path):
    torn = folder / "train" / "bear" / os.fsdecode(b"caf\xe9.jpg")
    (folder / "train" / "bear" / "3.jpg").rename(torn)
    torn.write_bytes(b"")
    recipe = tiny(f"data.root={folder}", "model.classes=auto", "data.max_unreadable=1")
    console = Console(record=True, width=500, file=open(os.devnull, "w"))  # noqa: SIM115
    loop.train(recipe, RunOptions(tmp_path / "run", device="cpu", workers=0), console)
    assert (tmp_path / "run" / "unreadable.txt").read_bytes() == os.fsencode(torn) + b"\n"
    assert "caf\\udce9.jpg" in console.export_text()


def test_two_processes_do_not_train_in_one_folder(tiny, finished_run):
    folder = finished_run
    hold = "import pathlib, sys; from cspnet.run.lock import RunLock; c = RunLock(); "
    hold += "c.take(pathlib.Path(sys.argv[1])); print('taken', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"taken\n"
        before = (folder / "history.jsonl").read_text()
        with pytest.raises(RecipeError, match="another process trains in"):
            run(tiny(), folder, resume=True)
        assert (folder / "history.jsonl").read_text() == before
        other.kill()
    assert run(tiny(), folder, resume=True) is None, "complete, and free again"


def test_the_run_folder_has_the_documented_files(tiny, finished_run, tmp_path):
    names = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*")}
    for name in ("recipe.yaml", "env.json", "metrics.jsonl", "checkpoints/last.pt", "tb"):
        assert name in names
    assert "preview/step-0000000.png" in names
    assert not [name for name in names if name.endswith(".tmp")]
    line = metrics(tmp_path / "run")[0]
    assert {"step", "epoch", "split", "loss", "lr", "images_per_second", "data_wait"} <= set(line)


def test_tensorboard_has_the_values_of_metrics(tiny, finished_run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tb"))
    events.Reload()
    tags = events.Tags()
    wanted = {"train/loss", "train/lr", "val/top1", "val/top5", "perf/images_per_second"}
    assert wanted | {"amp/loss_scale"} <= set(tags["scalars"])
    losses = {e.step: e.value for e in events.Scalars("train/loss")}
    record = [line for line in metrics(tmp_path / "run") if line["split"] == "train"]
    assert losses == pytest.approx({line["step"]: line["loss"] for line in record})
    assert tags["images"] == ["train/images"]
    assert tags["tensors"] == ["val/confused/text_summary"]


def test_bf16_trains_and_keeps_float32_state(tiny, tmp_path):
    run(tiny("precision=bf16"), tmp_path / "run")
    saved = last(tmp_path / "run")
    assert saved["precision"] == "bf16"
    floats = [t for t in saved["state_dict"].values() if t.is_floating_point()]
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in floats)


@pytest.mark.parametrize("capability, slow", [("AVX2", True), ("AVX512", False)])
def test_bf16_on_a_cpu_without_support_warns(tiny, tmp_path, monkeypatch, capability, slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    console = Console(record=True, width=500)
    start(setup.prepare(tiny("precision=bf16"), RunOptions(tmp_path / "run"), console))
    told = console.export_text()
    assert "bf16 (requested" in told and ("fp32 is ten times as fast" in told) == slow


def test_a_network_trained_in_fp16_can_be_evaluated_on_a_cpu():
    found = inference_precision("fp16", torch.device("cpu"))
    assert found.name == "fp32" and found.reason.endswith("trained in fp16")
    assert inference_precision("bf16", torch.device("cpu")).name == "bf16"


def test_the_seed_determines_the_initial_weights(tiny):
    a, b, c = (build_net(tiny(f"seed={seed}"), 10).state_dict() for seed in (0, 0, 1))
    assert same(a, b) and not same(a, c)
