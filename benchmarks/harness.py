"""What all benchmarks share: arguments, interleaved timing, tables and the JSON record.

Speeds drift by tens of percent on a shared machine. So variants are timed in turns, window by
window, and compared within a round: `interleave` returns every window, and the tables print medians
with their range.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from cspnet.recipe.schema import Recipe
from cspnet.runtime.options import RunOptions
from cspnet.sources.data_root import DataRoot
from cspnet.sources.folder import Folder
from cspnet.train.setup import Run, prepare

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cspnet", "torch", "torchvision", "timm", "pillow", "opencv-python-headless", "numpy")


def argument_parser(
    doc: str,
    *,
    device: bool = True,
    precision: tuple[str, ...] = (),
    data: bool = False,
    json: bool = True,
) -> argparse.ArgumentParser:
    """A parser with the requested ones of --device, --precision, --data (required) and --json."""
    parser = argparse.ArgumentParser(
        description=doc.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    if data:
        parser.add_argument("--data", required=True, help="folder with train/ and val/")
    if device:
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    if precision:
        parser.add_argument("--precision", default="auto", choices=("auto", *precision))
    if json:
        parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser


def use_defaults(options: argparse.Namespace, small: bool, **values: tuple[Any, Any]) -> None:
    """Set options that were not given to the first value on a small machine, else the second."""
    for name, (on_cpu, on_gpu) in values.items():
        if getattr(options, name) is None:
            setattr(options, name, on_cpu if small else on_gpu)


@dataclass
class Windows:
    """The timed windows of one variant, in the order of the rounds."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def spread(self, digits: int = 2) -> str:
        """Range of the windows, `low–high`."""
        return f"{min(self.values):.{digits}f}–{max(self.values):.{digits}f}"

    def ratios_to(self, reference: "Windows") -> "Windows":
        """Ratio to another variant's window of the same round."""
        pairs = zip(self.values, reference.values, strict=True)
        return Windows([ours / theirs for ours, theirs in pairs])

    def inverse(self) -> "Windows":
        return Windows([1 / value for value in self.values])


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    dropped: int = 0,
    shuffle: bool = False,
    after_round: Callable[[dict[str, list[Any]]], None] = lambda results: None,
) -> dict[str, list[Any]]:
    """Call every variant once per round; return its results by name.

    The first `dropped` rounds are a warm-up. `shuffle` draws the order of each round anew, so that
    no variant always follows the same one. `after_round` receives the results so far.
    """
    results: dict[str, list[Any]] = {name: [] for name in variants}
    for number in range(dropped + rounds):
        names = list(variants)
        for name in random.sample(names, len(names)) if shuffle else names:
            result = variants[name]()
            if number >= dropped:
                results[name].append(result)
        after_round(results)
    return results


def print_table(results: Mapping[str, Windows], unit: str, reference: str) -> None:
    """Median, range and ratio to the reference variant, one line per variant."""
    for name, windows in results.items():
        ratio = windows.ratios_to(results[reference])
        print(
            f"{name:20} {windows.median:9.2f} {unit} ({windows.spread()})  "
            f"{ratio.median:5.2f} of {reference} ({ratio.spread()})"
        )


def open_folder(root: str, split: str) -> Folder:
    """The images of `train` or `val` in a data root, which may be the val folder itself.

    ValueError if they are not in class folders, the only format that all trainers read.
    """
    location = DataRoot(root).train if split == "train" else DataRoot(root).val
    if not isinstance(location, Path):
        raise ValueError(f"--data {root}: this benchmark needs class folders")
    return Folder(location)


class RepeatedSource:
    """The images of a source, repeated or cut to `count`."""

    def __init__(self, source, count: int):
        self._source, self._count = source, count
        self.classes, self.labels = source.classes, np.resize(source.labels, count)

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> tuple[bytes, int]:
        return self._source.read(index % len(self._source))

    def name(self, index: int) -> str:
        return self._source.name(index % len(self._source))


@contextlib.contextmanager
def temporary_run(recipe: Recipe, **options: Any) -> Iterator[Run]:
    """Set up a run in a temporary folder, with a validation set of one image.

    `options` are those of RunOptions, apart from the folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield prepare(
            recipe,
            RunOptions(Path(folder) / "run", **options),
            Console(quiet=True),
            list_data=False,
            select_val=lambda source: RepeatedSource(source, 1),
        )


def training_metrics(run: Run) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl about training steps."""
    lines = map(json.loads, run.folder.metrics_file.read_text().splitlines())
    return [line for line in lines if line["split"] == "train"]


def synchronizer(device: torch.device) -> Callable[[], None]:
    """A function that waits for the device, to be called before reading the clock."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def machine() -> str:
    """Name of the GPU, if there is one, and of the CPU with its number of cores."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    name = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{gpu}{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages; None for one that is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


def new_record(options: argparse.Namespace) -> dict[str, Any]:
    """Date, machine, versions and arguments of a benchmark."""
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": versions(),
        "arguments": {key: str(value) for key, value in vars(options).items()},
    }


def write_record(file: Path | None, record: dict[str, Any]) -> None:
    """Write the record as JSON, if a file was given."""
    if file:
        file.write_text(json.dumps(record, indent=2) + "\n")
