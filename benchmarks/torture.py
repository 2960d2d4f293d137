"""Kills a training at random moments and compares its end, bit for bit, with an undisturbed one.

    OMP_NUM_THREADS=1 python benchmarks/torture.py [--kills 100 --runs 4 --steps 80 --seed 0]

Every life is a `cspnet-train --resume` in a process of its own, on a CPU, with two workers, mixing,
averaging, the attack, validations and archives; SIGKILL goes to that process and to no other. It
comes in the start-up, among the steps, in a validation, or in a save: there when the half-written
file shows, after some bytes of it, or before or after some call that touches a file. After each
kill every checkpoint must be whole and the record not behind it; at the end no process of the run
may be left. What SIGKILL does not do is lose what the kernel has not written yet: a power cut is
not in this.
"""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from harness import argument_parser, new_record, write_record

from cspnet.errors import CheckpointError
from cspnet.recipe.load import recipe_from_yaml
from cspnet.run.checkpoint import CheckpointFiles, has_valid_checksum, load_checkpoint

ROOT = Path(__file__).parent.parent
EVERY = 5  # steps between validations
# A deck, so that a run of few kills has all kinds too.
DECK = ("start", "step", "step", "validation", "appears", "torn", "call", "call")
PATIENCE = 120  # seconds without a line in the log: the child hangs

# The child. Its plan: none; death at the n-th call that touches a matching file; or in the n-th
# checkpoint, once a share of its bytes is written.
CHILD = """
import json, os, pathlib, signal, sys
from cspnet.cli import main_train

plan = json.loads(sys.argv.pop(1))
sys.argv[0] = "cspnet-train"
main = os.getpid()

def die(place):
    os.write(2, f"killed: {place}\\n".encode())
    os.kill(main, signal.SIGKILL)

def watch(module, name, file_of):
    original = getattr(module, name)
    def call(*arguments, **options):
        file = os.path.abspath(file_of(arguments))
        place = f"{name} {os.path.basename(file)}"
        if os.getpid() != main or not file.startswith(plan["folder"]) or plan["match"] not in place:
            return original(*arguments, **options)
        plan["call"] -= 1
        due = plan["call"] == 0
        if due and plan["moment"] == "before":
            die(f"before {place}")
        if due and name == "write_text":
            open(arguments[0], "w").close()
            die(f"in {place}")
        try:
            return original(*arguments, **options)
        finally:
            if due:
                die(f"after {place}")
    setattr(module, name, call)

if "call" in plan:
    watch(os, "fsync", lambda arguments: os.readlink(f"/proc/self/fd/{arguments[0]}"))
    for name in ("link", "replace", "unlink"):
        watch(os, name, lambda arguments: arguments[-1])
    watch(pathlib.Path, "write_text", lambda arguments: arguments[0])

if "torn" in plan:
    from cspnet.run import checkpoint

    class Torn:
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
                die("within .last.pt.tmp")
            self.left -= len(data)
            return self.file.write(data)

    def opened(path, mode):
        plan["torn"] -= "w" in mode
        return Torn(open(path, mode)) if "w" in mode and plan["torn"] == 0 else open(path, mode)
    checkpoint.open = opened

main_train()
"""


def recipe(steps: int, seed: int) -> list[str]:
    """Overrides of the digits' recipe: a tiny net, with all that has a state or random numbers.

    Odd seeds save and log every other step, so that a kill costs a step that was done and logged.
    """
    return [
        *("batch=16", "group=8", "model.width=0.125", "model.norm_momentum=0.1"),
        *(f"schedule.steps={steps}", "schedule.warmup_steps=3", "optim.learning_rate=0.02"),
        *("mix.probability=0.5", "ema.decay=0.8", "adversarial.step_size=5"),
        *(f"evaluate.every={EVERY}", "archive_every=4", "archive_keep=2"),
        *(f"save_every={1 + seed % 2}", f"log_every={1 + seed % 2}", f"seed={seed}"),
    ]


class Life:
    """A process that trains in `folder`, and the lines that it logs."""

    def __init__(self, folder: Path, overrides: list[str], plan: dict | None = None):
        self.log = folder.with_name(folder.name + ".log")
        self.began = time.time()
        with open(self.log, "ab") as log:
            self._from = log.tell()
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", CHILD, json.dumps(plan or {}), "--recipe", "digits"),
                    *("--output", str(folder.absolute()), "--resume"),
                    *("--device", "cpu", "--workers", "2", *overrides),
                ],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # by whose number the workers are found again
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def lines(self) -> list[str]:
        """Complete lines of the log since this process began."""
        with open(self.log, "rb") as file:
            file.seek(self._from)
            return file.read().decode(errors="replace").split("\n")[:-1]

    def steps(self) -> list[int]:
        """The steps that it logged."""
        return [int(line.split()[1]) for line in self.lines() if line.startswith("step ")]

    def has_validated(self, step: int) -> bool:
        return any(line.startswith(f"validation at step {step:,}:") for line in self.lines())

    def wait(self, condition, interval: float = 0.002) -> bool:
        """Whether the condition came true before the process ended."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            if condition():
                return True
            if time.monotonic() > deadline:
                self.process.kill()
                raise TimeoutError(f"nothing happens: {self.log}")
            time.sleep(interval)
        return False

    def kill_after(self, seconds: float) -> None:
        """SIGKILL to the main process alone; it may have ended by then."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            time.sleep(min(0.002, seconds))
        self.process.kill()
        self.process.wait()


class Times:
    """Seconds of the undisturbed run's parts, over which kills are spread, and a file's size."""

    def __init__(self, folder: Path, steps: int, overrides: list[str]):
        start = time.monotonic()
        life = Life(folder, overrides)

        def until(condition) -> float:
            life.wait(condition)
            return time.monotonic() - start

        self.start = until(lambda: life.steps())
        first = len(life.steps())
        before = until(lambda: life.steps()[-1] == steps)
        self.step = (before - self.start) / max(1, len(life.steps()) - first)
        self.validation = until(lambda: life.has_validated(steps)) - before
        if life.process.wait(PATIENCE):
            raise RuntimeError(f"the undisturbed run failed: {life.log}")
        self.whole = time.monotonic() - start
        self.size = (folder / "checkpoints" / "last.pt").stat().st_size


def live(
    folder: Path,
    overrides: list[str],
    kind: str | dict,
    times: Times,
    lines: int,
    draw: random.Random,
) -> Life:
    """One life, to its end by a kill of that kind or to the end of the run.

    A kind is one of DECK, placed at random after about that many lines of the log, or a plan of
    CHILD's.
    """
    plan, saves = None, 1 + lines
    if isinstance(kind, dict):
        plan = kind
    elif kind == "call":
        calls = 6 * saves + 3  # of a save, and of the start
        plan = {"call": draw.randint(1, calls), "moment": draw.choice(["before", "after"])}
    elif kind == "torn":
        plan = {"torn": draw.randint(1, saves), "share": draw.random()}
    plan = plan and {"match": "", "folder": f"{folder.absolute()}/", "size": times.size, **plan}
    life = Life(folder, overrides, plan)
    if plan:
        life.process.wait(PATIENCE)
    elif kind == "start":
        life.kill_after(draw.uniform(0, times.start))
    elif kind == "step":
        life.wait(lambda: len(life.steps()) >= max(1, lines))
        life.kill_after(draw.uniform(0, 2 * times.step))
    elif kind == "validation":
        life.wait(lambda: any(step % EVERY == 0 for step in life.steps()[lines:]))
        life.kill_after(draw.uniform(0, times.validation))
    elif kind == "appears":
        file = folder / "checkpoints" / ".last.pt.tmp"
        life.wait(lambda: len(life.steps()) >= lines)
        life.wait(lambda: modified(file) > life.began, interval=0.0002)
        life.kill_after(draw.uniform(0, 0.03))
    return life


def modified(file: Path) -> float:
    """Time of the last change; 0 where there is no such file."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def place_of_death(life: Life, folder: Path) -> str:
    """Where the kill came: start, step, save or validation, by what it left."""
    lines, steps = life.lines(), life.steps()
    told = [line for line in lines if line.startswith("killed: ")]
    files = folder / "checkpoints"
    if any(modified(file) > life.began for file in files.glob(".*.tmp")):
        return "save"
    if told and told[-1].endswith((".pt", ".pt.tmp", "metrics.jsonl", "checkpoints")):
        return "save"  # the renames had happened; or the record's turn, which comes first
    if not steps:
        return "start"
    try:
        last = load_checkpoint(files / "last.pt")
    except CheckpointError:
        return "step"
    due = last["step"] % EVERY == 0 and last["validated"] < last["step"]
    return "validation" if due and steps[-1] == last["step"] else "step"


def harm(folder: Path) -> list[str]:
    """What no moment may leave: a checkpoint that is not whole, a record that is behind last.pt."""
    files = sorted((folder / "checkpoints").glob("[!.]*.pt"))
    found = [f"{file.name} is torn" for file in files if not has_valid_checksum(file)]
    if not found and files:
        last = load_checkpoint(folder / "checkpoints" / "last.pt")
        every = recipe_from_yaml(last["recipe"]).log_every
        record = (folder / "metrics.jsonl").read_text()
        if last["step"] >= every and f'{{"step": {last["step"] // every * every},' not in record:
            found.append("the record is behind last.pt")
    return found


def saved_step(folder: Path) -> int:
    """Step of last.pt; 0 where there is none, or none that is whole."""
    try:
        return load_checkpoint(folder / "checkpoints" / "last.pt")["step"]
    except CheckpointError:
        return 0


def processes(groups: set[int]) -> list[int]:
    """Processes of these process groups that have not ended. Linux only."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has ended just now
        if int(group) in groups and state != "Z":
            found.append(int(stat.parent.name))
    return found


def same(a: object, b: object) -> bool:
    """Bit-equality of nested dictionaries, lists, tensors and plain values."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def content(checkpoint: Path) -> dict:
    """A checkpoint without the optimizer's rate, which is set anew before each step."""
    found = load_checkpoint(checkpoint)
    for group in found["optimizer"]["param_groups"]:
        del group["lr"]
    return found


def numbers(folder: Path) -> list[dict]:
    """The record without what a clock says."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    clock = ("images_per_second", "data_wait", "memory_gb")
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's points of loss and top-1. ValueError where steps do not rise strictly."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each restart
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    points = {}
    for tag in ("train/loss", "val/top1"):
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        if any(after[0] <= before[0] for before, after in pairwise(found)):
            raise ValueError(f"{tag}: {[step for step, _ in found]}")
        points[tag] = dict(found)
    return points


def differences(whole: Path, cut: Path) -> list[str]:
    """What of a run's folder is not as in the other one."""
    found = []
    files = [CheckpointFiles(folder / "checkpoints", 1) for folder in (whole, cut)]
    archives = [[path.name for path in run.archives()] for run in files]
    if archives[0] != archives[1]:
        found.append(f"archives: {archives[0]}, {archives[1]}")
    for name in ("last.pt", "previous.pt", "best.pt", *archives[0]):
        try:
            one, other = (content(run.folder / name) for run in files)
        except CheckpointError as error:
            found.append(str(error))
            continue
        keys = one.keys() | other.keys()
        found += [
            f"{name}: {key}" for key in sorted(keys) if not same(one.get(key), other.get(key))
        ]
    if numbers(whole) != numbers(cut):
        found.append("metrics.jsonl")
    for split in ("train", "val"):
        steps = [line["step"] for line in numbers(cut) if line["split"] == split]
        if steps != sorted(set(steps)):
            found.append(f"metrics.jsonl: the steps of {split} do not rise strictly")
    found += [f"left: {path.name}" for path in cut.rglob("*.tmp")]
    try:
        if curves(whole) != curves(cut):
            found.append("TensorBoard")
    except ValueError as error:
        found.append(f"TensorBoard: {error}")
    return found


def torture(folder: Path, steps: int, seed: int, kinds: list, draw: random.Random) -> dict:
    """One run, killed once for each of `kinds`, and the undisturbed one beside it, in `folder`."""
    overrides = recipe(steps, seed)
    whole, cut = folder / f"whole-{seed}", folder / f"cut-{seed}"
    times = Times(whole, steps, overrides)
    start = time.monotonic()
    kills: list[dict] = []
    wrong: list[str] = []
    groups: set[int] = set()
    queue, code = list(kinds), None
    while code != 0:
        kind = queue.pop(0) if queue else "none"
        done = saved_step(cut)
        share = (steps - done) / (len(queue) + 2) / (1 + seed % 2)  # of the lines still to come
        life = live(cut, overrides, kind, times, round(draw.uniform(0, 1.5 * share)), draw)
        groups.add(life.process.pid)
        code = life.process.wait(PATIENCE)
        if code not in (0, -signal.SIGKILL):
            wrong.append(f"exit code {code} after {len(kills)} kills: {life.lines()[-1]}")
            break
        if code:
            told = [line[8:] for line in life.lines() if line.startswith("killed: ")]
            kills.append(
                {
                    "kind": kind,
                    "place": place_of_death(life, cut),
                    "call": told[-1] if told else None,
                    "from": done,
                    "logged": max(life.steps(), default=done),
                }
            )
            wrong += [f"after kill {len(kills)}: {what}" for what in harm(cut)]
    seconds = time.monotonic() - start
    deadline = time.monotonic() + 30
    while (left := processes(groups)) and time.monotonic() < deadline:
        time.sleep(0.1)
    wrong += [f"process {number} is left" for number in left]
    if code == 0:
        wrong += differences(whole, cut)
    places = Counter(kill["place"] for kill in kills)
    return {
        "seed": seed,
        "kills": len(kills),
        "places": {place: places[place] for place in ("start", "step", "validation", "save")},
        "resumes": len(groups) - 1,
        "steps": steps,
        "seconds": seconds,
        "undisturbed_seconds": times.whole,
        "workers_left": len(left),
        "equal": not wrong,
        "wrong": wrong,
        "each": kills,
    }


def deal(count: int, draw: random.Random) -> list[str]:
    """Kinds of kills in random order, each deck used up before the next one begins."""
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += draw.sample(DECK, len(DECK))
    return kinds[:count]


def main() -> None:
    parser = argument_parser(__doc__, device=False)
    parser.add_argument("--kills", type=int, default=100, help="in all")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=80, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for the runs; kept")
    arguments = parser.parse_args()
    if arguments.steps < 20:
        parser.error("--steps: at least 20")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results: list[dict] = []
        print("run  kills  start  step  validation  save  resumes  seconds  undisturbed  equal")
        while (left := arguments.kills - sum(run["kills"] for run in results)) > 0:
            seed = arguments.seed + len(results)
            draw = random.Random(seed)
            # A run may end before its last kill; the others, or one more, make up for it.
            kinds = deal(-(-left // max(1, arguments.runs - len(results))), draw)
            run = torture(folder, arguments.steps, seed, kinds, draw)
            results.append(run)
            places = run["places"]
            print(
                f"{seed:3} {run['kills']:6} {places['start']:6} {places['step']:5} "
                f"{places['validation']:11} {places['save']:5} {run['resumes']:8} "
                f"{run['seconds']:8.0f} {run['undisturbed_seconds']:12.0f}  "
                f"{'yes' if run['equal'] else 'NO: ' + '; '.join(run['wrong'])}",
                flush=True,
            )
    total = sum((Counter(run["places"]) for run in results), Counter())
    equal = sum(run["equal"] for run in results)
    print(
        f"{sum(run['kills'] for run in results)} kills, {total['save']} in saves, "
        f"{total['validation']} in validations; {equal} of {len(results)} runs equal"
    )
    write_record(arguments.json, new_record(arguments) | {"runs": results})
    sys.exit(equal < len(results))


if __name__ == "__main__":
    main()
