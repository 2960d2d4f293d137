"""Kill a training at random moments; compare the result bit for bit with an uninterrupted run.

    OMP_NUM_THREADS=1 python benchmarks/torture.py [--kills 100 --runs 4 --steps 80 --seed 0]

Each `cspnet-train --resume` is a process on a CPU with two dataloader workers, mixing, EMA, the
attack, validations and archives. Its main process receives SIGKILL: during startup, between or
within steps, during a validation, or during a save, there when the temporary file appears, after
some of its bytes, or before or after a call on a file. After each kill, all checkpoints must be
valid and metrics.jsonl must not be behind them; at the end, no process may remain. SIGKILL does not
lose data in the page cache, so power failures are not covered.
"""

import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from harness import argument_parser, new_record, write_record
from killable import (
    EVALUATE_EVERY,
    TrainingProcess,
    digits_overrides,
    running_processes,
    saved_step,
)
from run_folders import run_differences

from cspnet.errors import CheckpointError
from cspnet.recipe.load import recipe_from_yaml
from cspnet.run.checkpoint import has_valid_checksum, load_checkpoint
from cspnet.run.folder import RunFolder

# Dealt like cards, so that a run with few kills has all kinds, too.
DECK = (
    *("startup", "step", "step", "validation"),
    *("temporary file", "partial save", "file call", "file call"),
)
PHASES = ("startup", "step", "validation", "save")


class Reference:
    """The uninterrupted run: seconds of its phases, and the size of a checkpoint in bytes."""

    def __init__(self, folder: Path, steps: int, overrides: list[str]):
        start = time.monotonic()
        training = TrainingProcess(folder, overrides)

        def seconds_until(condition) -> float:
            training.wait_for(condition)
            return time.monotonic() - start

        self.startup = seconds_until(lambda: training.steps())
        first = len(training.steps())
        last_step = seconds_until(lambda: training.steps()[-1] == steps)
        self.step = (last_step - self.startup) / max(1, len(training.steps()) - first)
        self.validation = seconds_until(lambda: training.has_validated(steps)) - last_step
        if training.wait():
            raise RuntimeError(f"the uninterrupted run failed: {training.log}")
        self.total = time.monotonic() - start
        self.size = RunFolder(folder).last_checkpoint.stat().st_size


def train_and_kill(
    folder: Path,
    overrides: list[str],
    kind: str | dict,
    reference: Reference,
    lines: int,
    rng: random.Random,
) -> TrainingProcess:
    """Train until the kill, or until the run is complete.

    A kind is one of DECK, for a random moment after about `lines` lines of the log; or a kill plan.
    Any other kind kills nothing.
    """
    plan, saves = None, 1 + lines
    if isinstance(kind, dict):
        plan = kind
    elif kind == "file call":
        calls = 6 * saves + 3  # six per save, three at the start
        plan = {"call": rng.randint(1, calls), "moment": rng.choice(["before", "after"])}
    elif kind == "partial save":
        plan = {"partial_save": rng.randint(1, saves), "share": rng.random()}
    if plan is not None:
        common = {"match": "", "folder": f"{folder.absolute()}/", "size": reference.size}
        training = TrainingProcess(folder, overrides, {**common, **plan})
        training.wait()
        return training
    training = TrainingProcess(folder, overrides)
    if kind == "startup":
        training.kill_after(rng.uniform(0, reference.startup))
    elif kind == "step":
        training.wait_for(lambda: len(training.steps()) >= max(1, lines))
        training.kill_after(rng.uniform(0, 2 * reference.step))
    elif kind == "validation":
        training.wait_for(
            lambda: any(step % EVALUATE_EVERY == 0 for step in training.steps()[lines:])
        )
        training.kill_after(rng.uniform(0, reference.validation))
    elif kind == "temporary file":
        file = RunFolder(folder).checkpoint_folder / ".last.pt.tmp"
        training.wait_for(lambda: len(training.steps()) >= lines)
        training.wait_for(lambda: modified(file) > training.start_time, interval=0.0002)
        training.kill_after(rng.uniform(0, 0.03))
    return training


def modified(file: Path) -> float:
    """Time of the last modification; 0 if the file does not exist."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def phase_of_kill(training: TrainingProcess, folder: Path) -> str:
    """The phase in which the kill happened, from what it left."""
    steps, kill = training.steps(), training.last_kill()
    checkpoints = RunFolder(folder).checkpoint_folder
    if any(modified(file) > training.start_time for file in checkpoints.glob(".*.tmp")):
        return "save"
    # After the renames of a save, or in metrics.jsonl, with which a save begins.
    if kill and kill.endswith((".pt", ".pt.tmp", "metrics.jsonl", "checkpoints")):
        return "save"
    if not steps:
        return "startup"
    try:
        last = load_checkpoint(RunFolder(folder).last_checkpoint)
    except CheckpointError:
        return "step"
    due = last["step"] % EVALUATE_EVERY == 0 and last["validated"] < last["step"]
    return "validation" if due and steps[-1] == last["step"] else "step"


def damage(folder: Path) -> list[str]:
    """What no kill may leave: damaged checkpoints, or metrics.jsonl behind last.pt."""
    run = RunFolder(folder)
    files = sorted(run.checkpoint_folder.glob("[!.]*.pt"))
    lines = [f"{file.name} is damaged" for file in files if not has_valid_checksum(file)]
    if not lines and files:
        last = load_checkpoint(run.last_checkpoint)
        log_every = recipe_from_yaml(last["recipe"]).log_every
        logged_step = last["step"] // log_every * log_every
        if logged_step and f'{{"step": {logged_step},' not in run.metrics_file.read_text():
            lines.append("metrics.jsonl is behind last.pt")
    return lines


def torture(
    folder: Path, steps: int, seed: int, kinds: list[str | dict], rng: random.Random
) -> dict:
    """Kill a run once for each of `kinds`; compare it with an uninterrupted one."""
    overrides = digits_overrides(steps, seed)
    uninterrupted, interrupted = folder / f"uninterrupted-{seed}", folder / f"interrupted-{seed}"
    reference = Reference(uninterrupted, steps, overrides)
    start = time.monotonic()
    kills: list[dict] = []
    failures: list[str] = []
    groups: set[int] = set()
    remaining, exit_code = list(kinds), None
    while exit_code != 0:
        kind = remaining.pop(0) if remaining else "none"
        step = saved_step(interrupted)
        mean_lines = (steps - step) / (len(remaining) + 2) / (1 + seed % 2)  # until the next kill
        lines = round(rng.uniform(0, 1.5 * mean_lines))
        training = train_and_kill(interrupted, overrides, kind, reference, lines, rng)
        groups.add(training.process.pid)
        exit_code = training.wait()
        if exit_code not in (0, -signal.SIGKILL):
            failures.append(
                f"exit code {exit_code} after {len(kills)} kills: {training.lines()[-1]}"
            )
            break
        if exit_code:
            kills.append(
                {
                    "kind": kind,
                    "phase": phase_of_kill(training, interrupted),
                    "call": training.last_kill(),
                    "first_step": step,
                    "last_logged_step": max(training.steps(), default=step),
                }
            )
            failures += [f"after kill {len(kills)}: {line}" for line in damage(interrupted)]
    seconds = time.monotonic() - start
    deadline = time.monotonic() + 30
    while (running := running_processes(groups)) and time.monotonic() < deadline:
        time.sleep(0.1)
    failures += [f"process {process} still runs" for process in running]
    if exit_code == 0:
        failures += run_differences(uninterrupted, interrupted)
    phases = Counter(kill["phase"] for kill in kills)
    return {
        "seed": seed,
        "kills": kills,
        "phases": {phase: phases[phase] for phase in PHASES},
        "resumes": len(groups) - 1,
        "steps": steps,
        "seconds": seconds,
        "uninterrupted_seconds": reference.total,
        "running_processes": len(running),
        "failures": failures,
    }


def deal(count: int, rng: random.Random) -> list[str]:
    """Kinds of kills in random order; each deck is used up before the next one begins."""
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += rng.sample(DECK, len(DECK))
    return kinds[:count]


def main() -> None:
    parser = argument_parser(__doc__, device=False)
    parser.add_argument("--kills", type=int, default=100, help="of all runs together")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=80, help="per run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for the runs; temporary by default")
    options = parser.parse_args()
    if options.steps < 20:
        parser.error("--steps: must be at least 20")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        runs: list[dict] = []
        print("run  kills  startup  step  validation  save  resumes  seconds  uninterrupted  equal")
        while (left := options.kills - sum(len(run["kills"]) for run in runs)) > 0:
            seed = options.seed + len(runs)
            rng = random.Random(seed)
            # A run can end before its last kill; later runs, or an additional one, make up for it.
            kinds = deal(-(-left // max(1, options.runs - len(runs))), rng)
            run = torture(folder, options.steps, seed, kinds, rng)
            runs.append(run)
            phases = run["phases"]
            print(
                f"{seed:3} {len(run['kills']):6} {phases['startup']:8} {phases['step']:5} "
                f"{phases['validation']:11} {phases['save']:5} {run['resumes']:8} "
                f"{run['seconds']:8.0f} {run['uninterrupted_seconds']:14.0f}  "
                + ("NO: " + "; ".join(run["failures"]) if run["failures"] else "yes"),
                flush=True,
            )
    total = sum((Counter(run["phases"]) for run in runs), Counter())
    equal = sum(not run["failures"] for run in runs)
    print(
        f"{sum(len(run['kills']) for run in runs)} kills, {total['save']} during saves, "
        f"{total['validation']} during validations; {equal} of {len(runs)} runs equal"
    )
    write_record(options.json, new_record(options) | {"runs": runs})
    sys.exit(equal < len(runs))


if __name__ == "__main__":
    main()
