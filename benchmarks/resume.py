"""Time from the start of a process to the end of its first step: resumed far on, and started fresh.

    OMP_NUM_THREADS=1 python benchmarks/resume.py [--images 100000000 --rounds 7 --json FILE]

The embedded digits and a tiny net, on a CPU, with two workers: what is measured is the way to the
first step, not the step. A checkpoint of one of the first steps (`near`) is given the number of a
step that is so many images on, and is sealed again (`far`). Each round has all three in turn. Then,
once each, the images that are decoded up to the end of the first step, those that workers fetch
ahead among them.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

import cspnet
from cspnet.run.checkpoint import load_checkpoint, write_checkpoint

ROOT = Path(__file__).parent.parent
BATCH, GROUP = 16, 8
KINDS = ("fresh", "near", "far")

# The command; with a file to note addresses in, the groups that are decoded, by whichever process.
CHILD = """
import os, sys
from cspnet.cli import main_train

notes = sys.argv.pop(1)
sys.argv[0] = "cspnet-train"
if notes:
    from cspnet.data import stream
    positions = stream.positions  # asked for once by each group that is decoded
    def noted(step, group, *sizes):
        with open(notes, "a") as file:
            file.write(f"{step} {group}\\n")
        return positions(step, group, *sizes)
    stream.positions = noted
main_train()
"""


def train(folder: Path, images: int, workers: int, notes: str = "") -> subprocess.Popen:
    """`cspnet-train --resume` of a run that is twice as long as the way to that image."""
    never = images  # steps: more than the run has up to its first new one
    overrides = [
        *(f"batch={BATCH}", f"group={GROUP}", "model.width=0.125", "mix.probability=0.5"),
        *(f"schedule.steps={2 * images // BATCH}", f"evaluate.every={never}"),
        *("log_every=1", f"save_every={never}"),
    ]
    return subprocess.Popen(
        [
            *(sys.executable, "-c", CHILD, notes, "--recipe", "digits"),
            *("--output", str(folder.absolute()), "--resume"),
            *("--device", "cpu", "--workers", str(workers), *overrides),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def first_step(process: subprocess.Popen) -> int:
    """Waits for the first step that the process logs, and returns its number."""
    told = []
    for line in process.stdout:
        if line.startswith("step "):
            return int(line.split()[1].replace(",", ""))
        told.append(line)
    raise RuntimeError("no step was made:\n" + "".join(told[-5:]))


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.stdout.close()  # its workers have it open too, and end some seconds later
    process.wait()


def prepare(folder: Path, images: int) -> dict[str, Path]:
    """Run folders to resume: one saved at its beginning, one that is said to be far on."""
    folders = {kind: folder / kind for kind in ("near", "far")}
    for kind, run in folders.items():
        process = train(run, images, workers=0)
        first_step(process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        if kind == "far":
            content = load_checkpoint(run / "checkpoints" / "last.pt")
            step = images // BATCH
            content |= {"step": step, "updates": step, "validated": step}
            write_checkpoint(content, run / "checkpoints" / "last.pt")
    return folders


def measure(folder: Path, images: int, workers: int) -> tuple[float, int]:
    """Seconds to the end of the first step, and its number; the process is then killed."""
    start = time.perf_counter()
    process = train(folder, images, workers)
    step = first_step(process)
    seconds = time.perf_counter() - start
    kill(process)
    return seconds, step


def decoded(folder: Path, images: int, workers: int) -> dict[str, int]:
    """Images decoded up to the end of the first step, by whether that step needs them."""
    notes = folder.with_name(f"{folder.name}-{workers}.txt")
    process = train(folder, images, workers, str(notes))
    step = first_step(process) - 1  # addresses count from 0
    kill(process)
    addresses = [int(line.split()[0]) for line in notes.read_text().splitlines()]
    return {
        "before": GROUP * sum(address < step for address in addresses),
        "of_the_step": GROUP * addresses.count(step),
        "ahead": GROUP * sum(address > step for address in addresses),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000_000, help="position of the resume")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    images = arguments.images
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folders = prepare(folder, images)
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        first: dict[str, int] = {}
        for number in range(arguments.rounds):
            # Turned each round, so that none always follows the same one.
            for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
                run = folders.get(kind, folder / f"fresh-{number}")
                taken, first[kind] = measure(run, images, arguments.workers)
                seconds[kind].append(taken)
        counts = {
            kind: {
                str(workers): decoded(
                    folders.get(kind, folder / f"fresh-w{workers}"), images, workers
                )
                for workers in (0, arguments.workers)
            }
            for kind in KINDS
        }
    if first["far"] != images // BATCH + 1:
        raise RuntimeError(f"the resumed run went on at step {first['far']}")
    print("kind   first step  median   min .. max    decoded before, for, after that step")
    for kind in KINDS:
        told = "; ".join(
            f"{n['before']}, {n['of_the_step']}, {n['ahead']} (workers {workers})"
            for workers, n in counts[kind].items()
        )
        print(
            f"{kind:5} {first[kind]:11,} {statistics.median(seconds[kind]):6.2f} s "
            f"{min(seconds[kind]):5.2f} .. {max(seconds[kind]):4.2f}   {told}"
        )
    if arguments.json:
        record = {
            "date": str(date.today()),
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "cspnet": cspnet.__version__,
            "arguments": {key: str(value) for key, value in vars(arguments).items()},
            "seconds": seconds,
            "median": {kind: statistics.median(values) for kind, values in seconds.items()},
            "first_step": first,
            "decoded": counts,
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
