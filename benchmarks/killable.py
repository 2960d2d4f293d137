"""Training processes that can be killed at a chosen moment, for torture.py and interruptions.py."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from harness import ROOT

from cspnet.errors import CheckpointError
from cspnet.run.checkpoint import load_checkpoint
from cspnet.run.folder import RunFolder

EVALUATE_EVERY = 5  # steps
TIMEOUT = 120  # seconds without a new line in the log, after which a process counts as hanging

# The training command. Its first argument, the kill plan as JSON, is empty or says when to die: at
# the n-th call on a file whose description contains `match` ("call", "moment"), or in the n-th
# checkpoint after a share of its bytes ("partial_save", "share").
CHILD = """
import json, os, pathlib, signal, sys
from cspnet.cli import main_train

plan = json.loads(sys.argv.pop(1))
sys.argv[0] = "cspnet-train"
main = os.getpid()

def die(where):
    os.write(2, f"killed: {where}\\n".encode())
    os.kill(main, signal.SIGKILL)

def watch(module, name, file_of):
    original = getattr(module, name)
    def call(*arguments, **options):
        file = os.path.abspath(file_of(arguments))
        where = f"{name} {os.path.basename(file)}"
        is_other = os.getpid() != main or not file.startswith(plan["folder"])
        if is_other or plan["match"] not in where:
            return original(*arguments, **options)
        plan["call"] -= 1
        due = plan["call"] == 0
        if due and plan["moment"] == "before":
            die(f"before {where}")
        if due and name == "write_text":
            open(arguments[0], "w").close()
            die(f"during {where}")
        try:
            return original(*arguments, **options)
        finally:
            if due:
                die(f"after {where}")
    setattr(module, name, call)

if "call" in plan:
    watch(os, "fsync", lambda arguments: os.readlink(f"/proc/self/fd/{arguments[0]}"))
    for name in ("link", "replace", "unlink"):
        watch(os, name, lambda arguments: arguments[-1])
    watch(pathlib.Path, "write_text", lambda arguments: arguments[0])

if "partial_save" in plan:
    from cspnet.run import checkpoint

    class PartialFile:
        def __init__(self, file):
            self.file, self.left = file, int(plan["share"] * plan["size"])
        def __getattr__(self, name):
            return getattr(self.file, name)
        def __enter__(self):
            return self
        def __exit__(self, *_):
            self.file.close()
        def write(self, data):
            data = memoryview(data).cast("B")
            if len(data) >= self.left:
                self.file.write(data[:self.left])
                self.file.flush()
                die("during write of .last.pt.tmp")
            self.left -= len(data)
            return self.file.write(data)

    def open_checkpoint(path, mode):
        plan["partial_save"] -= "w" in mode
        file = open(path, mode)
        return PartialFile(file) if "w" in mode and plan["partial_save"] == 0 else file
    checkpoint.open = open_checkpoint

main_train()
"""


def digits_overrides(steps: int, seed: int) -> list[str]:
    """Overrides for a tiny run with everything that has a state or uses random numbers.

    Odd seeds save and log every second step, so that a kill can lose a step that was complete.
    """
    interval = 1 + seed % 2
    return [
        *("batch=16", "group=8", "model.width=0.125", "model.norm_momentum=0.1"),
        *(f"schedule.steps={steps}", "schedule.warmup_steps=3", "optim.learning_rate=0.02"),
        *("mix.probability=0.5", "ema.decay=0.8", "adversarial.step_size=5"),
        *(f"evaluate.every={EVALUATE_EVERY}", "archive_every=4", "archive_keep=2"),
        *(f"save_every={interval}", f"log_every={interval}", f"seed={seed}"),
    ]


def training_arguments(folder: Path, overrides: list[str]) -> list[str]:
    """Arguments of `cspnet-train` to start or resume the run in `folder`."""
    return [
        *("--recipe", "digits", "--output", str(folder.absolute()), "--resume"),
        *("--device", "cpu", "--workers", "2", *overrides),
    ]


class TrainingProcess:
    """A `cspnet-train --resume` in a process group of its own, and the lines that it logs."""

    def __init__(self, folder: Path, overrides: list[str], kill_plan: dict | None = None):
        self.log = folder.with_name(folder.name + ".log")
        self.start_time = time.time()
        with open(self.log, "ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", CHILD, json.dumps(kill_plan or {})),
                    *training_arguments(folder, overrides),
                ],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that its workers can be found
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def lines(self) -> list[str]:
        """Complete lines that this process has logged."""
        with open(self.log, "rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace").split("\n")[:-1]

    def steps(self) -> list[int]:
        """The steps that it has logged."""
        return [int(line.split()[1]) for line in self.lines() if line.startswith("step ")]

    def has_validated(self, step: int) -> bool:
        return any(line.startswith(f"validation at step {step:,}:") for line in self.lines())

    def last_kill(self) -> str | None:
        """Where the kill plan ended the process; None if it did not."""
        kills = [line for line in self.lines() if line.startswith("killed: ")]
        return kills[-1].removeprefix("killed: ") if kills else None

    def wait_for(self, condition: Callable[[], object], interval: float = 0.002) -> bool:
        """Wait for a condition; False if the process ends first. TimeoutError if it hangs."""
        deadline = time.monotonic() + TIMEOUT
        while self.process.poll() is None:
            if condition():
                return True
            if time.monotonic() > deadline:
                self.process.kill()
                raise TimeoutError(f"the process hangs: {self.log}")
            time.sleep(interval)
        return False

    def wait(self) -> int:
        """The exit code, once the process has ended."""
        return self.process.wait(TIMEOUT)

    def kill_after(self, seconds: float) -> None:
        """Send SIGKILL to the main process, unless it ends earlier."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            time.sleep(min(0.002, seconds))
        self.process.kill()
        self.process.wait()


def saved_step(folder: Path) -> int:
    """The step of last.pt; 0 if there is no valid one."""
    try:
        return load_checkpoint(RunFolder(folder).last_checkpoint)["step"]
    except CheckpointError:
        return 0


def running_processes(groups: set[int]) -> list[int]:
    """IDs of the running processes in these process groups. Linux only."""
    processes = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has just ended
        if int(group) in groups and state != "Z":
            processes.append(int(stat.parent.name))
    return processes
