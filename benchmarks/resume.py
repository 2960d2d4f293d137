"""Time from process start to the end of the first step: fresh runs and resumed runs.

    OMP_NUM_THREADS=1 python benchmarks/resume.py [--images 100000000 --rounds 7 --json FILE]

The embedded digits and a tiny network on a CPU with two workers, so that the time to the first step
dominates. The checkpoint of an early step (`near`) is also rewritten with a step number --images
later (`far`). Kinds are interleaved. Then the images decoded until the end of the first step are
counted once per kind, including those that workers prefetch.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import ROOT, argument_parser, new_record, write_record

from cspnet.run.checkpoint import load_checkpoint, write_checkpoint

BATCH, GROUP = 16, 8
KINDS = ("fresh", "near", "far")

# The training command. With a file name, each process appends the groups that it decodes.
CHILD = """
import os, sys
from cspnet.cli import main_train

notes = sys.argv.pop(1)
sys.argv[0] = "cspnet-train"
if notes:
    from cspnet.data import stream
    group_positions = stream.group_positions  # called once per decoded group
    def noted(step, group, *sizes):
        with open(notes, "a") as file:
            file.write(f"{step} {group}\\n")
        return group_positions(step, group, *sizes)
    stream.group_positions = noted
main_train()
"""


def train(folder: Path, images: int, workers: int, notes: str = "") -> subprocess.Popen:
    """Start `cspnet-train --resume` of a run over twice that many images."""
    never = images  # more steps than the run has
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
    """Wait for the first step that the process logs; return its number."""
    output = []
    for line in process.stdout:
        if line.startswith("step "):
            return int(line.split()[1].replace(",", ""))
        output.append(line)
    raise RuntimeError("the process ended before its first step:\n" + "".join(output[-5:]))


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.stdout.close()  # its workers keep it open for some seconds
    process.wait()


def prepare(folder: Path, images: int) -> dict[str, Path]:
    """Run folders to resume: one saved at its first step, one with a rewritten step number."""
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
    """Seconds until the end of the first step, and its number. Kills the process."""
    start = time.perf_counter()
    process = train(folder, images, workers)
    step = first_step(process)
    seconds = time.perf_counter() - start
    kill(process)
    return seconds, step


def decoded(folder: Path, images: int, workers: int) -> dict[str, int]:
    """Images decoded until the end of the first step, by the step that they belong to."""
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
    parser = argument_parser(__doc__, device=False)
    parser.add_argument("--images", type=int, default=100_000_000, help="before the resumed step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    images = options.images
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folders = prepare(folder, images)
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        first: dict[str, int] = {}
        for number in range(options.rounds):
            # Rotate the order, so that no kind always follows the same one.
            for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
                run = folders.get(kind, folder / f"fresh-{number}")
                taken, first[kind] = measure(run, images, options.workers)
                seconds[kind].append(taken)
        counts = {
            kind: {
                str(workers): decoded(
                    folders.get(kind, folder / f"fresh-w{workers}"), images, workers
                )
                for workers in (0, options.workers)
            }
            for kind in KINDS
        }
    if first["far"] != images // BATCH + 1:
        raise RuntimeError(f"the run resumed at step {first['far']}")
    print("kind   first step  median   min .. max    decoded before, for, after that step")
    for kind in KINDS:
        counted = "; ".join(
            f"{n['before']}, {n['of_the_step']}, {n['ahead']} (workers {workers})"
            for workers, n in counts[kind].items()
        )
        print(
            f"{kind:5} {first[kind]:11,} {statistics.median(seconds[kind]):6.2f} s "
            f"{min(seconds[kind]):5.2f} .. {max(seconds[kind]):4.2f}   {counted}"
        )
    record = new_record(options) | {
        "seconds": seconds,
        "median": {kind: statistics.median(values) for kind, values in seconds.items()},
        "first_step": first,
        "decoded": counts,
    }
    write_record(options.json, record)


if __name__ == "__main__":
    main()
