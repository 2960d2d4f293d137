"""Hang-ups, closed pipes and killed dataloader workers at random moments of a training.

    OMP_NUM_THREADS=1 python benchmarks/interruptions.py [--each 20 --runs 4 --steps 60 --seed 0]

Each run is interrupted several times by one kind and compared at its end, bit for bit, with an
uninterrupted run. A hang-up (SIGHUP to the process group) must end the process with exit code 75
and the last finished step saved; `--resume` continues. A closed stdout and a killed worker must not
end it. torture.py kills the main process.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness import ROOT, argument_parser, new_record, write_record
from killable import (
    TIMEOUT,
    TrainingProcess,
    digits_overrides,
    running_processes,
    saved_step,
    training_arguments,
)
from run_folders import run_differences

from cspnet.run.folder import RunFolder

KINDS = ("hangup", "pipe", "worker")
# nohup, and a shell for its background jobs, start processes that ignore some signals.
CHILD = (
    "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    "from cspnet.cli import main_train; sys.argv[0] = 'cspnet-train'; main_train()"
)


class PipedTraining:
    """A `cspnet-train --resume` in a session of its own, whose stdout is a pipe."""

    def __init__(self, folder: Path, overrides: list[str]):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *training_arguments(folder, overrides)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        os.set_blocking(self.process.stdout.fileno(), False)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def steps(self) -> list[int]:
        """Steps in metrics.jsonl, of this process and of earlier ones."""
        file = RunFolder(self.folder).metrics_file
        if not file.exists():
            return []
        complete = [line for line in file.read_text().splitlines(True) if line.endswith("\n")]
        lines = map(json.loads, complete)
        return [line["step"] for line in lines if line["split"] == "train"]

    def _drain_until(self, condition: Callable[[], bool]) -> None:
        """Read stdout, so that the process never blocks on it, until the condition or its end."""
        end = time.monotonic() + TIMEOUT
        while self.is_running and not condition():
            if time.monotonic() > end:
                self.process.kill()
                raise TimeoutError(f"the process hangs: {self.folder}")
            if not self.process.stdout.closed:
                self.process.stdout.read()
            time.sleep(0.005)

    def wait_for_steps(self, count: int) -> bool:
        """Wait for `count` more steps in metrics.jsonl; False if the process has ended."""
        first = len(self.steps())
        self._drain_until(lambda: len(self.steps()) >= first + count)
        return self.is_running

    def wait(self) -> int:
        """The exit code, once the process has ended."""
        self._drain_until(lambda: False)
        self.process.stdout.close()
        return self.process.returncode

    def workers(self) -> list[int]:
        """Process IDs of the dataloader workers."""
        children: list[int] = []
        for file in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            children += map(int, file.read_text().split())
        return children


def interrupt(training: PipedTraining, kind: str, rng: random.Random, failures: list[str]) -> bool:
    """Interrupt a training once; False if it was too late for that."""
    if not training.is_running:
        return False
    if kind == "hangup":
        os.killpg(training.process.pid, signal.SIGHUP)
        code = training.wait()
        if code == 0:  # that was after the last step
            return False
        saved, logged = saved_step(training.folder), max(training.steps(), default=0)
        if code != 75 or saved != logged:
            failures.append(f"exit code {code}, saved step {saved}, last logged step {logged}")
    elif kind == "pipe":
        if training.process.stdout.closed:
            return False
        training.process.stdout.close()
    else:
        try:
            os.kill(rng.choice(training.workers()), signal.SIGKILL)
        except (IndexError, ProcessLookupError):  # the workers of a validation have just ended
            return False
    return True


def train_and_interrupt(
    training: PipedTraining,
    kind: str,
    count: int,
    steps: int,
    rng: random.Random,
    failures: list[str],
) -> int:
    """Interrupt a process up to `count` times; return the number of interruptions.

    A process survives killed workers, so it is interrupted again; a hang-up ends it.
    """
    done = 0
    while done < count:
        left = steps - len(training.steps())
        if not training.wait_for_steps(rng.randint(1, max(1, 2 * left // (count - done + 1)))):
            break
        time.sleep(rng.uniform(0, 0.2))  # to somewhere within a step, a validation or a save
        done += interrupt(training, kind, rng, failures)
        if kind == "hangup" and not training.is_running:
            break
        if kind == "pipe" and training.process.stdout.closed:
            if training.wait_for_steps(2):  # it must continue; end it for the next closed pipe
                training.process.send_signal(signal.SIGTERM)
            break
    return done


def run_with_interruptions(folder: Path, kind: str, count: int, steps: int, seed: int) -> dict:
    """Train a run with `count` interruptions; compare it with an uninterrupted one."""
    rng = random.Random(seed)
    overrides = [*digits_overrides(steps, 0), f"seed={seed}"]  # saves and logs every step
    uninterrupted, interrupted = folder / f"uninterrupted-{seed}", folder / f"{kind}-{seed}"
    if not uninterrupted.exists() and TrainingProcess(uninterrupted, overrides).wait():
        raise RuntimeError(f"the uninterrupted run failed: {uninterrupted}.log")
    failures: list[str] = []
    groups: set[int] = set()
    done, starts, code = 0, 0, None
    while code != 0 and starts <= 2 * count + 2:
        training = PipedTraining(interrupted, overrides)
        groups.add(training.process.pid)
        starts += 1
        done += train_and_interrupt(training, kind, count - done, steps, rng, failures)
        code = training.wait()
        if code not in (0, 75):
            failures.append(f"exit code {code}")
            break
    failures += [f"process {process} still runs" for process in running_processes(groups)]
    if code == 0:
        failures += run_differences(uninterrupted, interrupted)
    else:
        failures.append("the run did not complete")
    return {"kind": kind, "seed": seed, "count": done, "starts": starts, "failures": failures}


def main() -> None:
    parser = argument_parser(__doc__, device=False)
    parser.add_argument("--each", type=int, default=20, help="interruptions of each kind")
    parser.add_argument("--runs", type=int, default=4, help="of each kind")
    parser.add_argument("--steps", type=int, default=60, help="per run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    runs: list[dict] = []
    per_run = -(-options.each // options.runs)
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds:
            total, seed = 0, options.seed
            while total < options.each:
                count = min(per_run, options.each - total)
                run = run_with_interruptions(Path(folder), kind, count, options.steps, seed)
                runs.append(run)
                total, seed = total + run["count"], seed + 1
                print(
                    f"{kind:8} run {run['seed']}: {run['count']:3} interruptions, "
                    f"{run['starts']} starts, " + ("; ".join(run["failures"]) or "bit-identical"),
                    flush=True,
                )
            print(f"{kind}: {total} interruptions", flush=True)
    write_record(options.json, new_record(options) | {"runs": runs})
    sys.exit(any(run["failures"] for run in runs))


if __name__ == "__main__":
    main()
