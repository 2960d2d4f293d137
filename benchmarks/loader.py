"""Dataloaders of cspnet, timm and torchvision: crops per second from the same files.

    python benchmarks/loader.py --data data/imagenet [--workers 2 --seconds 6 --rounds 4]

Each pipeline ends with a batch in the main process: decoded, cropped, flipped and ready for the
device. Each window starts new workers and is timed once the prefetched batches are used up. The
order of the pipelines is random in each round, and the first round is dropped. The CPU time per
crop, of all processes, depends less on other programs than the throughput does.
"""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import timm.data
import torch
import torchvision.io
from harness import (
    RepeatedSource,
    Windows,
    argument_parser,
    interleave,
    new_record,
    open_folder,
    write_record,
)
from torchvision.transforms import v2

from cspnet.data.loader import evaluation_batches, training_groups
from cspnet.images import decode
from cspnet.recipe.load import find_recipe, load_recipe
from cspnet.recipe.schema import Evaluate
from cspnet.sources.folder import Folder

ENDLESS = 100_000  # images, by repetition: no epoch ends within a window
CROP_PCT = 0.887  # timm's default for cspdarknet53
CPU = torch.device("cpu")
AHEAD = 12  # batches before a window; more than any pipeline prefetches

Batches = Callable[[int], Iterator]  # from a number of workers; a batch is (images, labels, ...)


@dataclass(frozen=True)
class Pipeline:
    description: str
    batches: Batches


class Window(NamedTuple):
    rate: float  # crops/s
    cpu_ms: float  # per crop, of all processes


class TensorDataset(torch.utils.data.Dataset):
    """torchvision's way: libjpeg-turbo decodes into a tensor, transforms of tensors follow."""

    def __init__(self, source: Folder, transform: v2.Transform):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        index %= len(self.source)
        data = torchvision.io.read_file(self.source.name(index))
        image = torchvision.io.decode_jpeg(data, torchvision.io.ImageReadMode.RGB)
        return self.transform(image), int(self.source.labels[index])


def cspnet_training(source: Folder, batch: int, size: int, *overrides: str) -> Batches:
    sizes = [f"batch={4 * batch}", f"group={batch}", f"data.image_size={size}"]
    recipe = load_recipe(find_recipe("cspdarknet53-omega"), [*sizes, *overrides])
    return lambda workers: training_groups(source, recipe, 0, workers, pin=False)


def cspnet_validation(source: Folder, batch: int, size: int, how: Evaluate) -> Batches:
    repeated = RepeatedSource(source, ENDLESS)
    return lambda workers: evaluation_batches(repeated, batch, size, how, workers, pin=False)


def timm_batches(
    folder: Path, batch: int, size: int, train: bool, normalized: bool = False, **options
) -> Batches:
    """timm's loader, without its last stage unless `normalized`, which returns float32."""

    def batches(workers: int) -> Iterator:
        dataset = timm.data.ImageDataset(str(folder))
        dataset.reader.samples *= -(-ENDLESS // len(dataset.reader.samples))
        loader = timm.data.create_loader(
            dataset,
            (3, size, size),
            batch,
            is_training=train,
            num_workers=workers,
            persistent_workers=False,
            device=CPU,
            **options,
        )
        yield from loader if normalized else loader.loader

    return batches


def torchvision_batches(
    source: Folder, batch: int, train: bool, transform: v2.Transform
) -> Batches:
    def batches(workers: int) -> Iterator:
        yield from torch.utils.data.DataLoader(
            TensorDataset(source, transform), batch, shuffle=train, num_workers=workers
        )

    return batches


def training_pipelines(root: str, batch: int, size: int) -> dict[str, Pipeline]:
    """Pipelines by name; cspnet's is the first."""
    source = open_folder(root, "train")
    folder = source.root
    crop = "RandomResizedCrop, flip"
    transform = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    return {
        "cspnet": Pipeline(
            "OpenCV, recipe omega: scale, aspect, rotation, crop, flip in one warp → uint8",
            cspnet_training(source, batch, size),
        ),
        "cspnet, reduced decode": Pipeline(
            "the same with data.reduced_decode=true → uint8",
            cspnet_training(source, batch, size, "data.reduced_decode=true"),
        ),
        "timm": Pipeline(
            f"timm's defaults: PIL, {crop}, colour jitter 0.4 → uint8",
            timm_batches(folder, batch, size, True),
        ),
        "timm, no jitter": Pipeline(
            f"PIL, {crop} → uint8; comparable to cspnet, which changes colours on the device",
            timm_batches(folder, batch, size, True, color_jitter=None),
        ),
        "timm, normalized": Pipeline(
            "timm's defaults and its last stage on the CPU → normalized float32",
            timm_batches(folder, batch, size, True, normalized=True),
        ),
        "torchvision v2": Pipeline(
            f"decode_jpeg, {crop} of tensors → uint8",
            torchvision_batches(source, batch, True, transform),
        ),
    }


def validation_pipelines(root: str, batch: int, size: int) -> dict[str, Pipeline]:
    """Pipelines by name; cspnet's is the first."""
    source = open_folder(root, "val")
    folder = source.root
    resized = int(size / CROP_PCT)
    view = f"shorter side to {resized}, antialiased, central {size}²"
    transform = v2.Compose([v2.Resize(resized, antialias=True), v2.CenterCrop(size)])
    antialiased = Evaluate(crop_pct=CROP_PCT, interpolation="antialias")
    timm_view = {"crop_pct": CROP_PCT, "interpolation": "bilinear"}
    return {
        "cspnet": Pipeline(
            f"OpenCV, torch's resize; {view} → uint8",
            cspnet_validation(source, batch, size, antialiased),
        ),
        "cspnet, Darknet's view": Pipeline(
            f"OpenCV; shorter side to {size}, corner-aligned, central {size}² → uint8",
            cspnet_validation(source, batch, size, Evaluate()),
        ),
        "timm": Pipeline(
            f"PIL; {view} → uint8", timm_batches(folder, batch, size, False, **timm_view)
        ),
        "torchvision v2": Pipeline(
            f"decode_jpeg; {view} → uint8", torchvision_batches(source, batch, False, transform)
        ),
    }


def time_window(pipeline: Pipeline, workers: int, seconds: float) -> Window:
    """Time a pipeline with new workers, after the batches that they prefetch."""
    with contextlib.closing(pipeline.batches(workers)) as batches:
        for _ in islice(batches, AHEAD):
            pass
        crops, cpu, start = 0, cpu_seconds(), time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            crops += len(next(batches)[1])
        cpu = cpu_seconds() - cpu
    return Window(crops / elapsed, 1000 * cpu / crops)


def cpu_seconds() -> float:
    """CPU time of this process and its workers until now."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system time
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def decodes_per_crop(pipeline: Pipeline) -> float:
    """Images decoded per crop, counted in this process."""
    functions = ((decode.cv2, "imdecode"), (PIL.Image, "open"), (torchvision.io, "decode_jpeg"))
    count = 0

    def counted(function: Callable) -> Callable:
        def call(*arguments, **options):
            nonlocal count
            count += 1
            return function(*arguments, **options)

        return call

    originals = [getattr(module, name) for module, name in functions]
    try:
        for (module, name), original in zip(functions, originals, strict=True):
            setattr(module, name, counted(original))
        with contextlib.closing(pipeline.batches(0)) as batches:
            next(batches)  # includes what is decoded ahead
            count = 0
            crops = sum(len(batch[1]) for batch in islice(batches, 4))
    finally:
        for (module, name), original in zip(functions, originals, strict=True):
            setattr(module, name, original)
    return count / crops


def worker_memory(
    source: Folder, batch: int, size: int, workers: int, epochs: int
) -> list[list[float]]:
    """Memory of each worker of cspnet after each epoch: PSS in MB, which divides shared pages."""
    memory = []
    with contextlib.closing(cspnet_training(source, batch, size)(workers)) as batches:
        for _ in range(epochs):
            for _ in islice(batches, -(-len(source) // batch)):
                pass
            memory.append([pss_mb(child.pid) for child in multiprocessing.active_children()])
    return memory


def pss_mb(process: int | None) -> float:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def summarize(pipelines: dict[str, Pipeline], windows: dict[str, list[Window]]) -> list[dict]:
    """Print a line per pipeline; return the figures."""
    rates = {name: Windows([window.rate for window in windows[name]]) for name in pipelines}
    costs = {name: Windows([window.cpu_ms for window in windows[name]]) for name in pipelines}
    records = []
    print(f"{'':24}{'crops/s':>8} {'range':>13} {'CPU ms':>7} {'decodes':>8}   cspnet vs. it: CPU")
    for name, pipeline in pipelines.items():
        faster = rates["cspnet"].ratios_to(rates[name])
        cheaper = costs[name].ratios_to(costs["cspnet"])
        record = {
            "name": name,
            "description": pipeline.description,
            "crops_per_second": rates[name].values,
            "cpu_ms_per_crop": costs[name].values,
            "decodes_per_crop": decodes_per_crop(pipeline),
            "cspnet_times_faster": faster.values,
            "cspnet_times_less_cpu": cheaper.values,
        }
        records.append(record)
        print(
            f"{name:24}{rates[name].median:8.0f} {rates[name].spread(0):>13} "
            f"{costs[name].median:7.2f} {record['decodes_per_crop']:8.2f}   "
            f"{faster.median:.2f}× ({faster.spread()}), {cheaper.median:.2f}×"
        )
    for name, pipeline in pipelines.items():
        print(f"  {name}: {pipeline.description}")
    return records


def main() -> None:
    parser = argument_parser(__doc__, device=False, data=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=6, help="length of a window")
    parser.add_argument("--rounds", type=int, default=4, help="after one dropped round")
    parser.add_argument("--epochs", type=int, default=5, help="after which memory is measured")
    options = parser.parse_args()
    root, batch, size, workers = options.data, options.batch, options.size, options.workers
    record = new_record(options)
    print(f"{record['machine']}; {workers} workers, batch {batch}, {size}²; load {record['load']}")
    for kind, pipelines in (
        ("training", training_pipelines(root, batch, size)),
        ("validation", validation_pipelines(root, batch, size)),
    ):
        variants = {
            name: lambda pipeline=pipeline: time_window(pipeline, workers, options.seconds)
            for name, pipeline in pipelines.items()
        }
        windows = interleave(variants, options.rounds, dropped=1, shuffle=True)
        print(f"\n{kind}, medians of {options.rounds} windows")
        record[kind] = summarize(pipelines, windows)
    source = open_folder(root, "train")
    record["workers_mb"] = worker_memory(source, batch, size, workers, options.epochs)
    print(f"\nmemory of cspnet's workers after each epoch of {len(source):,} images, MB (PSS):")
    for memory in record["workers_mb"]:
        print("  " + "  ".join(f"{megabytes:.1f}" for megabytes in memory))
    record["load_after"] = round(os.getloadavg()[0], 2)
    print(f"load average before and after: {record['load']}, {record['load_after']}")
    write_record(options.json, record)


if __name__ == "__main__":
    main()
