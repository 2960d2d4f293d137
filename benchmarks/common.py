"""What the benchmarks share: where and when it was, and the file that says so."""

import contextlib
import json
import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("cspnet", "torch", "torchvision", "timm", "pillow", "opencv-python-headless", "numpy")


def machine() -> str:
    """The GPU's name, where there is one, and the processor's with the number of its cores."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    name = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{gpu}{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str | None]:
    """Of Python and the packages; None for one that runs from its sources."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def about(arguments) -> dict:
    """Date, machine, versions and arguments of a benchmark."""
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": versions(),
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
    }


def write(file: Path | None, record: dict) -> None:
    """Writes the record as JSON, if there is a file to write it to."""
    if file:
        file.write_text(json.dumps(record, indent=2) + "\n")
