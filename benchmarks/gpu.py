"""All benchmarks that need a GPU, in one call, with one JSON file as the result.

    python benchmarks/gpu.py --output results --data data/imagenet [--minutes 9]

A data root with a few hundred photos is enough for the benchmarks that read files. Each benchmark
is a process with a time limit: if it fails, the others still run, and if it is stopped, the figures
that it has written remain. A GPU with less than 40 GB gets 27 minutes instead of 9, and one with
less than 12 GB batches of 32 instead of 128. Without a GPU all benchmarks run at a small size,
which only shows that they work.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from harness import ROOT, argument_parser, new_record, write_record

HERE = Path(__file__).parent
EAGER, COMPILED = ["cspnet", "timm"], ["cspnet-compiled", "timm-compiled"]


class Job(NamedTuple):
    name: str
    script: str
    arguments: list[str]
    seconds: int  # limit on a GPU of 40 GB or more


def jobs(gpu: bool, large_batch: bool, data: str | None) -> Iterator[Job]:
    """The benchmarks to run, the most important ones first."""
    rounding = ["--rates", "1.6e-8", "--paths", "compiled", "--precisions"]
    if gpu:
        batch = [] if large_batch else ["--batch", "32"]
        capped = ["--precision", "fp16", "--recompute", "light", "--cap-gb", "7.4"]
        end_to_end = ["--window", "10"]
        validate = ["--images", "4000", "--rounds", "2"]
        parity = [*([] if large_batch else ["batch=64", "group=16"]), *rounding, "fp16"]
        infer = ["--seconds", "0.5"]
    else:
        batch = ["--size", "64", "--batch", "8", "--group", "4", "--steps", "1"]
        capped = batch = [*batch, "--warmup", "1", "--windows", "2"]
        end_to_end = ["data.image_size=32", "model.width=0.25"]
        validate = ["--size", "64", "--images", "32", "--rounds", "1"]
        parity = ["data.image_size=64", "model.width=0.25", *rounding, "bf16"]
        infer = ["--cases", "64x1", "64x4"]
    root = ["--data", str(data)]
    yield Job("step-eager", "step.py", [*batch, "--variants", *EAGER], 60)
    yield Job("step-compiled", "step.py", [*batch, "--variants", *COMPILED], 150)
    # The whole batch as one micro-batch, which is what the memory limit is about.
    yield Job("step-8gb", "step.py", [*capped, "--variants", COMPILED[0]], 100)
    if data:
        yield Job("end-to-end", "end_to_end.py", [*end_to_end, *root], 120)
        yield Job("validate", "validate.py", [*validate, *root], 60)
    yield Job("infer", "infer.py", infer, 50)
    if data:
        yield Job("parity", "parity.py", [*parity, *root], 180)
    yield Job("step-autotune", "step.py", [*batch, "--autotune", "--variants", *COMPILED], 60)
    yield Job("memory", "memory.py", [], 180)


def run_job(job: Job, output: Path, seconds: int) -> dict:
    """The record of a benchmark, with its duration and, if it failed, `error`."""
    file = output / f"{job.name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / job.script), *job.arguments, "--json", str(file)]
    start, error = time.monotonic(), None
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=seconds).returncode
        if code:
            error = f"exit code {code}"
    except subprocess.TimeoutExpired:
        error = f"stopped after {seconds} s"
    record = json.loads(file.read_text()) if file.exists() else {}
    record["seconds"] = round(time.monotonic() - start, 1)
    return record | ({"error": error} if error else {})


def main() -> None:
    parser = argument_parser(__doc__, device=False, json=False)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder to write to")
    parser.add_argument("--minutes", type=float, help="9 on a GPU of 40 GB or more, else 27")
    parser.add_argument("--data", help="data root with a few hundred photos")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="benchmarks to run")
    options = parser.parse_args()
    options.output = options.output.resolve()  # the benchmarks run in the repository
    options.data = options.data and str(Path(options.data).resolve())
    options.output.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else 0
    is_large = memory > 40e9
    # Smaller GPUs are slower; a CPU needs longer even for the small sizes.
    slowdown = 1 if is_large else 3 if gpu else 5
    options.minutes = options.minutes or (9 if is_large else 27)
    end = time.monotonic() + 60 * options.minutes
    record = new_record(options) | {"parts": {}}
    for job in jobs(gpu, memory > 12e9, options.data):
        if options.only and job.name not in options.only:
            continue
        seconds = int(min(slowdown * job.seconds, end - time.monotonic()))
        if seconds < 5:
            record["parts"][job.name] = {"error": "no time left"}
            continue
        print(f"--- {job.name}, at most {seconds} s", flush=True)
        record["parts"][job.name] = run_job(job, options.output, seconds)
        write_record(options.output / "gpu.json", record)
    failed = [name for name, part in record["parts"].items() if "error" in part]
    print(
        f"{options.output / 'gpu.json'} written" + f"; failed: {', '.join(failed)}" * bool(failed)
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
