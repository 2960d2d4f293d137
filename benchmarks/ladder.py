"""Ablation on a small data set: each recipe with the same number of steps and several seeds.

    python benchmarks/ladder.py --data data/cifar10 --steps 800 --seeds 3 --jobs 2

Each run is an ordinary single-threaded `cspnet-train` in runs/ladder/. A second call resumes the
runs. Prints the top-1 of the last validation and writes runs/ladder/ladder.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import argument_parser, new_record, write_record

RUNGS = ("plain", "gamma", "omega", "sat")


def overrides(options: argparse.Namespace, seed: int) -> list[str]:
    """Overrides that shrink the published recipes, the same for all."""
    return [
        f"data.image_size={options.size}",
        f"model.width={options.width}",
        f"schedule.steps={options.steps}",
        f"schedule.warmup_steps={options.steps // 10}",
        f"evaluate.every={options.steps}",
        "save_every=100",
        "log_every=20",
        f"seed={seed}",
    ]


def run(rung: str, seed: int, options: argparse.Namespace) -> None:
    folder = options.output / f"{rung}-{seed}"
    command = [
        *(sys.executable, "-c", "from cspnet.cli import main_train as m; m()"),
        *("--recipe", f"cspdarknet53-{rung}", "--data", options.data, "--output", str(folder)),
        *("--resume", "--device", options.device, "--workers", str(options.workers)),
        *overrides(options, seed),
    ]
    threads = {"OMP_NUM_THREADS": "1"} if options.device == "cpu" else {}
    options.output.mkdir(parents=True, exist_ok=True)
    with open(options.output / f"{rung}-{seed}.log", "a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, **threads})


def last_top1(folder: Path) -> float:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "val"][-1]["top1"]


def main() -> None:
    parser = argument_parser(__doc__, device=False, data=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs")
    parser.add_argument("--output", type=Path, default=Path("runs/ladder"))
    options = parser.parse_args()
    # Seed by seed, so that an unfinished ablation already compares all recipes.
    tasks = [(rung, seed) for seed in range(options.seeds) for rung in RUNGS]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda task: run(*task, options), tasks))
    table = {}
    for rung in RUNGS:
        top1 = [last_top1(options.output / f"{rung}-{s}") for s in range(options.seeds)]
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        table[rung] = {"top1": top1, "mean": statistics.mean(top1), "stdev": spread}
        print(f"{rung:6} {statistics.mean(top1):6.2f} ± {spread:.2f} %   {top1}")
    record = new_record(options) | {"rungs": table}
    write_record(options.json or options.output / "ladder.json", record)


if __name__ == "__main__":
    main()
