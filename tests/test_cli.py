"""The commands as a user types them, the first ones in new processes."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

import cspnet
from cspnet.run.checkpoint import load_checkpoint
from tests.conftest import ROOT, TINY


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of the tiny digits recipe, trained through the command line."""
    base = tmp_path_factory.mktemp("trained")
    call = "from cspnet.cli import main_train as m; m()"
    arguments = ["--recipe", "digits", "--output", "run", "--device", "cpu", *TINY]
    done = subprocess.run(
        [sys.executable, "-c", call, *arguments], cwd=base, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return base / "run", done.stdout


def test_training_prints_the_recipe_and_the_next_commands(trained):
    run, output = trained
    assert "activation: mish" in output and "validation at step 7: top-1" in output
    assert "fp32 (the device is a CPU)" in output
    disk = re.search(r"at most (\d+) checkpoints of ([\d,]+) MB at a time", output)
    count, megabytes = disk.groups()
    saved = list((run / "checkpoints").iterdir())
    assert int(count) > len(saved), "and one being written"
    assert int(megabytes) == round(saved[0].stat().st_size / 1e6)
    assert "cspnet-eval --checkpoint run/checkpoints/best.pt --data digits" in output


def test_eval_prints_the_top1_of_the_last_validation(trained, process, tmp_path):
    run, _ = trained
    done = process(
        "main_eval",
        *("--checkpoint", run / "checkpoints" / "last.pt"),
        *("--data", "digits", "--json", tmp_path / "scores.json", "--workers", 1),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["split"] == "val"
    assert f"top-1 {last['top1']:.2f} %" in done.stdout
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["top1"] == last["top1"] and scores["images"] == 359
    assert scores["loss"] == pytest.approx(last["loss"], rel=1e-6)


def test_umbrella_command_is_the_same(process, command, tmp_path):
    done = process("main", "train", "--recipe", "digits", "--dry-run", "batch=128", cwd=tmp_path)
    assert done.returncode == 0 and "batch: 128" in done.stdout
    assert not list(tmp_path.iterdir()), "--dry-run writes nothing"
    assert "train" in (help_ := command("main", "--help").stdout) and "eval" in help_


def test_the_version_includes_what_a_bug_report_needs(command):
    done = command("main", "--version")
    assert done.returncode == 0
    assert done.stdout.startswith(f"cspnet {cspnet.__version__} (torch {torch.__version__}")


def test_resume_needs_only_the_folder(trained, command, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    done = command("main_train", "--output", "run", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 7, complete" in done.stdout


def test_train_py_runs_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-r", "digits", "--dry-run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "size: 32" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--recipe", "digitz"], "Did you mean 'digits'"),
        (["--recipe", "no/such.yaml"], "recipe 'no/such.yaml' is neither a file nor"),
        (["-r", "digits", "optim.learning_rte=1"], "Did you mean 'optim.learning_rate=1'"),
        (["-r", "cifar10", "--data", "nowhere"], "data folder nowhere does not exist"),
        (["-r", "digits", "--device", "gpu"], "must be auto, cpu, cuda or cuda:N"),
        (["-r", "digits", "--device", "cuda:99"], "CUDA devices on this machine"),
        (["-r", "digits", "--workers", "-1"], "--workers -1"),
        (["-r", "digits", "--micro-batch", "5"], "a multiple of"),
        (["-r", "digits", "--micro-batch", "0"], "a multiple of"),
        (["-r", "digits", "--output", "file/run"], "cannot be written: Not a directory"),
        (["-r", "digits", "--data", ""], "has no folder train/"),
        (["-r", "digits", "precision=fp16", "--device", "cpu"], "precision is fp16"),
        (["-r", "digits", "--output", "file"], "is a file: give a folder"),
        (["--resume"], "no recipe: give --recipe NAME"),
        (["-r", "digits", "--learning-rate", "1"], "recipe field: optim.learning_rate=1"),
    ],
)
def test_wrong_use_of_train(command, tmp_path, arguments, message):
    (tmp_path / "file").write_text("precious")
    done = command("main_train", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    printed = re.sub(r"[\s│]+", " ", done.stderr)
    assert message in printed and "Traceback" not in done.stderr
    assert done.stdout == ""
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "precious"


def test_wrong_use_of_eval(command, trained, folder, tmp_path):
    best = trained[0] / "checkpoints" / "best.pt"
    torn = tmp_path / "torn.pt"
    torn.write_bytes(best.read_bytes()[:-1000])
    for checkpoint, data, message in (
        (tmp_path / "none.pt", "digits", "does not exist"),
        (torn, "digits", "truncated, damaged, or not a checkpoint"),
        (best, "nowhere", "does not exist"),
        (best, folder, "lacks 10 classes (0, 1, 2, 3, 4 …); it has 3 classes (apple, bear, cat)"),
    ):
        done = command("main_eval", "--checkpoint", checkpoint, "--data", data)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def test_a_truncated_checkpoint_is_neither_resumed_nor_overwritten(command, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    files = sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))
    for path in files:
        path.unlink()
        path.write_bytes(b"torn")
    done = command("main_train", "--output", "run", "--resume", cwd=tmp_path)
    assert done.returncode == 2 and "the run has no valid checkpoint" in done.stderr
    assert all(f"{path.name} is truncated" in done.stderr for path in files)
    assert all(path.read_bytes() == b"torn" for path in files)


def test_a_truncated_last_checkpoint_is_reported_and_the_previous_used(command, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    (tmp_path / "run" / "checkpoints" / "best.pt").unlink()
    last.unlink()
    last.write_bytes(b"torn")
    done = command("main_train", "--output", "run", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "last.pt is truncated" in done.stdout and "previous.pt, step" in done.stdout


def test_the_checkpoint_is_plain_and_timm_reads_it(trained):
    import timm

    path = trained[0] / "checkpoints" / "best.pt"
    saved = torch.load(path, weights_only=True)

    def plain(node):
        if isinstance(node, dict):
            return all(plain(k) and plain(v) for k, v in node.items())
        if isinstance(node, list | tuple):
            return all(plain(v) for v in node)
        return node is None or type(node) in (torch.Tensor, int, float, str, bool)

    assert plain(saved)
    from timm.models import load_state_dict

    weights = load_state_dict(str(path), use_ema=True)
    assert torch.equal(weights["head.fc.weight"], saved["state_dict_ema"]["head.fc.weight"])
    assert timm.create_model("cspdarknet53", act_layer="mish").state_dict().keys() == weights.keys()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_run_immediately(tmp_path):
    """Exit code 130, no traceback, the last checkpoint unchanged, no remaining worker."""
    call = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from cspnet.cli import main_train
from cspnet.train import state
original = state.learning_rate
def twice(update, recipe):
    for _ in range(2 if update == 3 else 0):
        os.kill(os.getpid(), signal.SIGINT)
        os.getpid()  # lets Python run the handler
    return original(update, recipe)
state.learning_rate = twice
main_train()
"""
    arguments = ["--recipe", "digits", "--output", "run", "--device", "cpu", "-j", "1", *TINY]
    child = subprocess.Popen(
        [sys.executable, "-c", call, *arguments],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    errors = child.communicate(timeout=120)[1]
    assert child.returncode == 130, errors
    assert "Traceback" not in errors
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 2
    deadline = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(child.pid, 0)
            time.sleep(0.05)
