"""Several processes are one run: the same numbers, one writer, and no hangs."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from cspnet.errors import RecipeError
from cspnet.recipe import load as recipes
from cspnet.run.checkpoint import load_checkpoint
from cspnet.runtime.distributed import Processes
from cspnet.runtime.options import RunOptions
from cspnet.train.adversarial import attack_mask
from cspnet.train.setup import prepare
from cspnet.weights.trained import build_net
from tests.conftest import ROOT, TINY

# A process of a run. PLAN holds the faults to inject, such as a kill after a save.
CHILD = """
import json, os, pathlib, signal, sys, time, torch
torch.set_num_threads(1)
from cspnet import recipe as recipes
from cspnet.cli import main_train
from cspnet.errors import SaveError
from cspnet.run import checkpoint
from cspnet.train import loop
plan = json.loads(os.environ.get("PLAN", "{}"))
rank = int(os.environ.get("RANK", 0))

original = checkpoint.CheckpointFiles.save
def save(self, content, best=False):
    if content["step"] == plan.get("full_at"):
        raise SaveError("the disk is full")
    original(self, content, best)
    if content["step"] == plan.get("die_after"):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.CheckpointFiles.save = save

due = loop.is_save_due
def is_save_due(recipe, step):
    if plan.get("hang") == [rank, step]:
        os.kill(os.getpid(), signal.SIGSTOP)
    if plan.get("term") == [rank, step]:
        os.kill(os.getpid(), signal.SIGTERM)
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT") != "0"
    if plan.get("kill") == [rank, step] and not restarted:
        os.kill(os.getpid(), signal.SIGKILL)
    return due(recipe, step)
loop.is_save_due = is_save_due
if "double" in plan:
    from cspnet.inference.evaluate import Scores
    from cspnet.train import start
    from cspnet.weights.trained import build_net
    from cspnet.train.step import MicroBatch, TrainStep
    load_clean = TrainStep.load_clean
    TrainStep.load_clean = lambda *those: MicroBatch(*(x.double() for x in load_clean(*those)))
    loop.show_samples = lambda *_: None
    start.build_net = lambda recipe, classes: build_net(recipe, classes).double()
    start.init_net = lambda recipe, classes: (build_net(recipe, len(classes)).double(), [])
    torch.Tensor.float = lambda tensor: tensor  # of the logits in the attack
    TrainStep.loss = lambda self, x, t: -(t * x.log_softmax(1)).sum() / self.recipe.batch
    loop.validate = lambda *_: Scores(0, 0, 0, 0, 0, 1)
if "patience" in plan:
    from datetime import timedelta
    from cspnet.runtime import distributed as world
    world.PATIENCE = timedelta(seconds=plan["patience"])
if "root" in plan and rank == 1:
    sys.argv.append("data.root=" + plan["root"])
sys.argv[0] = "cspnet-train"
main_train()
"""
RUN = [
    *TINY,
    *("batch=32", "schedule.steps=5", "optim.learning_rate=0.02", "ema.decay=0.8"),
    *("adversarial.step_size=5", "adversarial.probability=0.5", "schedule.warmup_steps=1"),
]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def started(size, output, *overrides, plan=None, resume=False, options=(), script=CHILD):
    """Start `size` processes as torchrun does."""
    port, processes = free_port(), []
    for rank in range(size):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PLAN": json.dumps(plan or {})}
        command = [sys.executable, "-c", script, "--recipe", "digits", "--output", str(output)]
        command += ["--device", "cpu", *(["--resume"] if resume else []), *options]
        processes.append(
            subprocess.Popen(
                [*command, *RUN, *overrides],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in names.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def ended(processes, timeout=120):
    """Exit codes and stderr of each process."""
    told = [process.communicate(timeout=timeout) for process in processes]
    return [process.returncode for process in processes], [err for _, err in told]


def run(size, output, *overrides, **how):
    codes, told = ended(started(size, output, *overrides, **how))
    assert codes == [0] * size, told
    return load_checkpoint(output / "checkpoints" / "last.pt")


def lines(output):
    text = (output / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["split"] == "train"]


def apart(one, other, select):
    """Relative norm of the difference of the selected tensors, taken together."""
    keys = [key for key in one if select(key)]
    assert keys and one.keys() == other.keys()
    a, b = (torch.cat([x[key].double().flatten() for key in keys]) for x in (one, other))
    return float((a - b).norm() / b.norm())


def is_running(key):
    return "running" in key


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "run"
    return output, run(1, output)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A float64 run of one process whose learning rate moves the weights noticeably."""
    output = tmp_path_factory.mktemp("exact") / "run"
    return output, run(1, output, *EXACT, plan={"double": True})


EXACT = ("data.image_size=64", "optim.learning_rate=0.1")


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_equal_one(exact, tmp_path, size):
    """Weights, running statistics, averages and losses; the attack is on.

    In float64: rounding in float32, whose order is another one, is blown up at this rate.
    """
    output, one = exact
    recipe = recipes.recipe_from_yaml(one["recipe"])
    coins = [attack_mask(recipe, step, range(4)) for step in range(5)]
    assert any(c.any() for c in coins) and not all(c.all() for c in coins)
    several = run(size, tmp_path / "run", *EXACT, plan={"double": True})
    fresh = build_net(recipe, 10).state_dict()
    assert apart(one["state_dict"], fresh, lambda k: k.endswith("conv.weight")) > 0.01
    assert apart(several["state_dict"], one["state_dict"], lambda k: not is_running(k)) < 1e-5
    assert apart(several["state_dict"], one["state_dict"], is_running) < 1e-6
    assert apart(several["state_dict_ema"], one["state_dict_ema"], lambda k: True) < 1e-5
    for ours, theirs in zip(lines(tmp_path / "run"), lines(output), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_the_groups_of_a_step_are_assigned_once():
    for size in (1, 2, 4):
        dealt = [group for rank in range(size) for group in Processes(rank, size).own_groups(4)]
        assert dealt == [0, 1, 2, 3]


def test_the_number_of_processes_may_change_between_resumes(alone, tmp_path):
    """Killed after steps 2 and 4, and resumed with another number of processes each time."""
    output, one = alone
    for size, dies in ((1, 2), (2, 4)):
        processes = started(size, tmp_path / "run", plan={"die_after": dies}, resume=True)
        codes, told = ended(processes)
        assert codes[0] == -signal.SIGKILL
        assert codes[1:] == [1] * (size - 1), told
        assert all("cannot reach the others" in err for err in told[1:])
        assert all("Traceback" not in err for err in told[1:])
    again = run(1, tmp_path / "run", resume=True)
    assert apart(again["state_dict"], one["state_dict"], lambda k: True) < 1e-4
    found = lines(tmp_path / "run")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5]
    for ours, theirs in zip(found, lines(output), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_stops_all(tmp_path):
    codes, told = ended(started(2, tmp_path / "run", plan={"term": [1, 2]}))
    assert codes == [75, 75], told
    # It arrived after the processes had agreed in step 2.
    assert "SIGTERM: saved at step 3" in told[0] and told[1] == ""
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 3


@pytest.mark.slow
def test_a_hanging_process_ends_the_others_without_loss(tmp_path):
    """Stopped during a step, as by a driver that hangs. The timeout is shortened to seconds."""
    processes = started(2, tmp_path / "run", plan={"hang": [1, 2], "patience": 15})
    first, hanging = processes
    try:
        _, told = first.communicate(timeout=100)
        assert hanging.poll() is None
    finally:
        hanging.kill()
        hanging.communicate()
    assert first.returncode == 1, told
    assert "cannot reach the others: one has ended, or has not responded" in told
    assert "Traceback" not in told
    assert (
        load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 2
    )  # whence a run goes on


@pytest.mark.slow
def test_a_full_disk_in_rank_0_does_not_stop_the_run(tmp_path):
    codes, told = ended(started(2, tmp_path / "run", plan={"full_at": 2}))
    assert codes == [0, 0], told
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 5


@pytest.mark.parametrize(
    "size, micro_batch, message",
    [
        (3, None, "3 processes cannot share the 4 groups of a step evenly"),
        (2, 24, "each process computes 2 groups per step"),
    ],
)
def test_worlds_that_do_not_fit_are_refused(tiny, tmp_path, size, micro_batch, message):
    options = RunOptions(tmp_path / "run", device="cpu", micro_batch=micro_batch)
    with pytest.raises(RecipeError, match=message):
        prepare(tiny("batch=32"), options, Console(quiet=True), Processes(0, size))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_refusal_is_printed_by_the_first_process_alone(tmp_path):
    codes, told = ended(started(3, tmp_path / "run"))
    assert codes == [2] * 3
    assert "3 processes cannot share" in told[0] and "Traceback" not in "".join(told)
    assert told[1:] == [""] * 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_with_different_data_are_refused(tmp_path, folder):
    smaller = tmp_path / "smaller"
    for file in sorted((folder).rglob("*.jpg"))[:-1]:
        copy = smaller / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    overrides = (f"data.root={folder}", "model.classes=3", "data.normalize=imagenet")
    codes, told = ended(started(2, tmp_path / "run", *overrides, plan={"root": str(smaller)}))
    assert codes == [2, 2] and "the processes see different data" in told[0], told


def test_an_incomplete_torchrun_environment_is_refused(tmp_path, command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    done = command("main_train", "--recipe", "digits", "--output", tmp_path / "run")
    assert done.returncode == 2 and "torchrun --nproc-per-node" in done.stderr


EVALUATE = """
import sys
from cspnet.cli import main_eval
arguments = sys.argv[sys.argv.index("--output") + 1]
sys.argv = ["cspnet-eval", "--checkpoint", arguments + "/checkpoints/last.pt", "--data", "digits"]
sys.argv += ["--batch", "50", "--device", "cpu", "--json", arguments + "/scores.json"]
main_eval()
"""


@pytest.mark.slow
def test_an_evaluation_counts_each_image_once_with_any_number_of_processes(alone):
    """359 images in 8 batches, with one process and with three."""
    output, _ = alone
    scores = []
    for size in (1, 3):
        codes, told = ended(started(size, output, script=EVALUATE))
        assert codes == [0] * size, told
        scores.append(json.loads((output / "scores.json").read_text()))
    for found in scores[1:]:
        for key in ("images", "top1", "top5", "unreadable"):
            assert found[key] == scores[0][key], key
        assert found["loss"] == pytest.approx(scores[0]["loss"], rel=1e-12)
    assert scores[0]["images"] == 359


@pytest.mark.slow
def test_torchrun_on_two_nodes_survives_a_killed_process(tmp_path):
    """One of two processes is killed; both restart and end bit-identical."""
    undisturbed = run(2, tmp_path / "undisturbed")
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    endpoint = f"127.0.0.1:{free_port()}"
    agents = [
        subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nnodes=2",
                    "--node-rank",
                    str(n),
                ),
                *("--nproc-per-node=1", "--max-restarts=2", "--rdzv-backend=c10d"),
                *("--rdzv-endpoint", endpoint, "--rdzv-id=run", "--monitor-interval=0.2"),
                *("--local-addr=127.0.0.1", str(script)),
                *("--recipe", "digits", "--output", str(tmp_path / "run"), "--device", "cpu"),
                *("--resume", *RUN),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "PLAN": json.dumps({"kill": [1, 3]}),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(2)
    ]
    told = [agent.communicate(timeout=150)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(told)
    history = [json.loads(x) for x in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    events = [line["event"] for line in history]
    assert events[0] == "start" and "resume" in events and events[-1] == "done"
    last = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert apart(last["state_dict"], undisturbed["state_dict"], lambda k: True) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5]
