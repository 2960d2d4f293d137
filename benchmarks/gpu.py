"""Every figure that wants a GPU, in one go: in nine minutes on a fast one, as one JSON file.

    python benchmarks/gpu.py --out results --data data/imagenet [--minutes 9]

`--data` names photos for what needs files: a data root, some hundred images will do. Each part is a
process of its own with a limit: one that fails leaves the others their time, and one that is cut
off what it had written. A card of less than 40 GB gets 27 minutes, one of less than 12 GB batches
of 32 in place of 128; a machine without a GPU the same parts at a small size, which shows that they
run.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import about, write

HERE = Path(__file__).parent
ROOT = HERE.parent


def parts(gpu: bool, roomy: bool, data: str | None) -> list[tuple[str, list[str], int]]:
    """Name, arguments and limit in seconds of each part; the most important ones first."""
    step, end_to_end, validate, parity, infer = (
        [str(HERE / f"{name}.py")] for name in ("step", "end_to_end", "validate", "parity", "infer")
    )
    rounding = ["--rates", "1.6e-8", "--paths", "compiled", "--precision"]
    if gpu:
        batch = [] if roomy else ["--batch", "32"]
        capped = ["--precision", "fp16", "--recompute", "light", "--cap-gb", "7.4"]
        end_to_end += ["--window", "10"]
        validate += ["--images", "4000", "--rounds", "2"]
        parity += [*([] if roomy else ["batch=64", "group=16"]), *rounding, "fp16"]
        infer += ["--seconds", "0.5"]
    else:
        batch = ["--size", "64", "--batch", "8", "--group", "4", "--steps", "1"]
        batch += ["--warmup", "1", "--windows", "2"]
        capped = []
        end_to_end += ["data.image_size=32", "model.width=0.25"]
        validate += ["--size", "64", "--images", "32", "--rounds", "1"]
        parity += ["data.image_size=64", "model.width=0.25", *rounding, "bf16"]
        infer += ["--cases", "64x1", "64x4"]
    eager, compiled, both = ["ours", "timm"], ["ours-compiled"], ["ours-compiled", "timm-compiled"]
    root = ["--data", str(data)]
    with_files = [
        ("end-to-end", [*end_to_end, *root], 120),
        ("validate", [*validate, *root], 60),
        ("parity", [*parity, *root], 180),
    ]
    return [
        ("step-eager", [*step, *batch, "--variants", *eager], 60),
        ("step-compiled", [*step, *batch, "--variants", *both], 150),
        # The whole batch at once, which is what the cap is about.
        ("step-8gb", [*step, *(capped or batch), "--variants", *compiled], 100),
        *(with_files[:2] if data else []),
        ("infer", infer, 50),
        *(with_files[2:] if data else []),
        ("step-autotune", [*step, *batch, "--autotune", "--variants", *both], 60),
        ("memory", [str(HERE / "memory.py")], 180),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--minutes", type=float, help="9 on a GPU of 40 GB or more, else 27")
    parser.add_argument("--data", help="data root with some hundred photos")
    parser.add_argument("--only", nargs="+", help="names of parts")
    options = parser.parse_args()
    options.out = options.out.resolve()  # the parts run in the repository
    options.data = options.data and str(Path(options.data).resolve())
    options.out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else 0
    large = memory > 40e9  # and as fast as such cards are
    options.minutes = options.minutes or (9 if large else 27)
    end = time.monotonic() + 60 * options.minutes
    content = about(options) | {"parts": {}}
    for name, arguments, limit in parts(gpu, memory > 12e9, options.data):
        if options.only and name not in options.only:
            continue
        file = options.out / f"{name}.json"
        # A CPU compiles and runs even the small sizes slower than a large GPU the large ones.
        slower = 1 if large else 3 if gpu else 5
        left = int(min(slower * limit, end - time.monotonic()))
        if left < 5:
            content["parts"][name] = {"error": "no time left"}
            continue
        print(f"--- {name}, at most {left} s", flush=True)
        file.unlink(missing_ok=True)
        start = time.monotonic()
        try:
            command = [sys.executable, *arguments, "--json", str(file)]
            code = subprocess.run(command, cwd=ROOT, timeout=left).returncode
            error = f"exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            error = f"stopped after {left} s"
        part = json.loads(file.read_text()) if file.exists() else {}
        seconds = round(time.monotonic() - start, 1)
        content["parts"][name] = {**part, "seconds": seconds, **({"error": error} if error else {})}
        write(options.out / "gpu.json", content)
    failed = [name for name, part in content["parts"].items() if "error" in part]
    print(f"{options.out / 'gpu.json'} written" + f"; failed: {', '.join(failed)}" * bool(failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
