"""Hang-ups, closed pipes and killed dataloader workers at random moments of a training.

    OMP_NUM_THREADS=1 python benchmarks/interruptions.py [--each 20 --runs 4 --steps 60 --seed 0]

Each run is interrupted several times by one kind and compared at its end, bit for bit, with an
undisturbed run. A hang-up (SIGHUP to the process group) must end the process with exit code 75 and
the last finished step saved; `--resume` continues. A closed stdout and a killed worker must not end
it. torture.py has the kills of the main process.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import argument_parser, new_record, write_record
from torture import PATIENCE, ROOT, Life, differences, processes, recipe, saved_step

KINDS = ("hangup", "pipe", "worker")
# nohup, and a shell for its background jobs, start processes with signals ignored.
TRAIN = (
    "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    "from cspnet.cli import main_train; sys.argv[0] = 'cspnet-train'; main_train()"
)


class Training:
    """A `cspnet-train --resume` in a session of its own, whose stdout is a pipe."""

    def __init__(self, folder: Path, overrides: list[str]):
        self.folder = folder
        arguments = ["--recipe", "digits", "--output", str(folder.absolute()), "--resume"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRAIN, *arguments, *("--device", "cpu", "-j", "2"), *overrides],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        os.set_blocking(self.process.stdout.fileno(), False)

    def steps(self) -> list[int]:
        """Steps that are in the record, of this process and of those before it."""
        record = self.folder / "metrics.jsonl"
        if not record.exists():
            return []
        lines = [
            json.loads(line)
            for line in record.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        return [line["step"] for line in lines if line["split"] == "train"]

    def wait_for_steps(self, more: int) -> bool:
        """Until so many steps are recorded after the present ones; whether the process lives."""
        first = len(self.steps())
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None and len(self.steps()) < first + more:
            if time.monotonic() > end:
                self.process.kill()
                raise TimeoutError(f"nothing happens in {self.folder}")
            if not self.process.stdout.closed:
                self.process.stdout.read()  # nothing blocks it
            time.sleep(0.005)
        return self.process.poll() is None

    def wait(self) -> int:
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            if time.monotonic() > end:
                self.process.kill()
                raise TimeoutError(f"it does not end: {self.folder}")
            if not self.process.stdout.closed:
                self.process.stdout.read()
            time.sleep(0.005)
        self.process.stdout.close()
        return self.process.returncode

    def workers(self) -> list[int]:
        """Processes of the dataloader."""
        found = []
        for task in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            found += map(int, task.read_text().split())
        return found


def interrupt(training: Training, kind: str, wrong: list[str]) -> bool:
    """One interruption; whether it took place while the process was running."""
    if training.process.poll() is not None:
        return False
    if kind == "hangup":
        os.killpg(training.process.pid, signal.SIGHUP)
        code, done = training.wait(), training.steps()
        if code == 0:  # it had just made its last step
            return False
        saved = saved_step(training.folder)
        if code != 75 or saved != max(done, default=0):
            wrong.append(f"exit code {code}, saved step {saved}, last recorded {done[-1:]}")
    if kind == "pipe":
        if training.process.stdout.closed:
            return False
        training.process.stdout.close()
    if kind == "worker":
        workers = training.workers()
        if not workers:
            return False
        try:
            os.kill(random.choice(workers), signal.SIGKILL)
        except ProcessLookupError:  # it ended by itself, after a validation
            return False
    return True


def disturb(folder: Path, kind: str, count: int, steps: int, seed: int) -> dict:
    """One run with `count` interruptions, and the undisturbed one beside it."""
    draw = random.Random(seed)
    random.seed(seed)
    overrides = [*recipe(steps, 0), f"seed={seed}"]  # saves and records every step
    whole, cut = folder / f"whole-{seed}", folder / f"{kind}-{seed}"
    if not whole.exists() and Life(whole, overrides).process.wait(PATIENCE):
        raise RuntimeError(f"the undisturbed run failed: {whole}.log")
    wrong: list[str] = []
    groups, happened, starts, code = set(), 0, 0, None
    while code != 0 and starts <= 2 * count + 2:
        training = Training(cut, overrides)
        groups.add(training.process.pid)
        starts += 1
        # Workers are killed several times in a process, the others end it.
        while happened < count:
            left = steps - len(training.steps())
            more = draw.randint(1, max(1, 2 * left // (count - happened + 1)))
            if not training.wait_for_steps(more):
                break
            time.sleep(draw.uniform(0, 0.2))  # somewhere within a step, a validation or a save
            happened += interrupt(training, kind, wrong)
            if kind == "hangup" and training.process.poll() is not None:
                break
            if kind == "pipe" and training.process.stdout.closed:
                # One a process: this one must continue without its output, and is then stopped.
                if not training.wait_for_steps(2):
                    break
                training.process.send_signal(signal.SIGTERM)
                break
        code = training.wait()
        if code not in (0, 75):
            wrong.append(f"exit code {code}")
            break
    wrong += [f"process {number} is left" for number in processes(groups)]
    wrong += differences(whole, cut) if code == 0 else ["it did not come to its end"]
    return {"kind": kind, "seed": seed, "count": happened, "starts": starts, "wrong": wrong}


def main() -> None:
    parser = argument_parser(__doc__, device=False)
    parser.add_argument("--each", type=int, default=20, help="interruptions of each kind")
    parser.add_argument("--runs", type=int, default=4, help="of each kind")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.kinds:
            total, seed = 0, arguments.seed
            while total < arguments.each:
                share = -(-arguments.each // arguments.runs)
                found = disturb(
                    Path(folder), kind, min(share, arguments.each - total), arguments.steps, seed
                )
                results.append(found)
                total, seed = total + found["count"], seed + 1
                print(
                    f"{kind:8} run {found['seed']}: {found['count']:3} interruptions, "
                    f"{found['starts']} starts, "
                    + ("; ".join(found["wrong"]) if found["wrong"] else "bit-equal"),
                    flush=True,
                )
            print(f"{kind}: {total} interruptions", flush=True)
    write_record(arguments.json, new_record(arguments) | {"runs": results})
    sys.exit(any(found["wrong"] for found in results))


if __name__ == "__main__":
    main()
