"""Every figure that wants a GPU, in one go of less than nine minutes, as one JSON file.

    python benchmarks/gpu.py --out results --data data/imagenet [--minutes 9]

`--data` names photos for what needs files: a data root, some hundred images will do. Each part is a
process of its own with a limit: one that fails leaves the others their time. On a machine without a
GPU the same parts run at a small size, which shows that they run.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent


def parts(gpu: bool, data: str | None) -> list[tuple[str, list[str], int]]:
    """Name, arguments and limit in seconds of each part; the most important ones first."""
    tiny = [] if gpu else ["--size", "64", "--batch", "8", "--group", "4", "--steps", "1"]
    tiny += [] if gpu else ["--warmup", "1", "--windows", "2"]
    step = [str(HERE / "step.py"), *tiny]
    compiled = ["--variants", "ours-compiled"]
    capped = ["--precision", "fp16", "--memory", "fit", "--cap-gb", "7.4"] if gpu else []
    small = [] if gpu else ["data.size=32", "model.width=0.25"]
    rounding = ["--rates", "1.6e-8", "--precision", "fp32", "fp16" if gpu else "bf16"]
    with_files = [
        ("parity", [str(HERE / "parity.py"), "--data", str(data), *small, *rounding], 180),
        ("end-to-end", [str(HERE / "end_to_end.py"), "--data", str(data), *small], 90),
        (
            "validate",
            [str(HERE / "validate.py"), "--data", str(data)]
            + ([] if gpu else ["--size", "64", "--images", "32", "--rounds", "1"]),
            60,
        ),
    ]
    return [
        ("step-eager", [*step, "--variants", "ours", "timm"], 80),
        ("step-compiled", [*step, *compiled, "timm-compiled"], 200),
        ("step-8gb", [*step, *(compiled if gpu else ["--variants", "ours"]), *capped], 120),
        *(with_files if data else []),
        ("infer", [str(HERE / "infer.py"), *([] if gpu else ["--cases", "64x1", "64x4"])], 60),
        ("memory", [str(HERE / "memory.py")], 180),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--data", help="data root with some hundred photos")
    parser.add_argument("--only", nargs="+", help="names of parts")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.is_available()
    end = time.monotonic() + 60 * options.minutes
    content = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or "CPU",
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "parts": {},
    }
    for name, arguments, limit in parts(gpu, options.data):
        if options.only and name not in options.only:
            continue
        file = options.out / f"{name}.json"
        # A CPU compiles and runs even the small sizes slower than a GPU the large ones.
        left = int(min(limit if gpu else 3 * limit, end - time.monotonic()))
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
        (options.out / "gpu.json").write_text(json.dumps(content, indent=2) + "\n")
    failed = [name for name, part in content["parts"].items() if "error" in part]
    print(f"{options.out / 'gpu.json'} written" + f"; failed: {', '.join(failed)}" * bool(failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
