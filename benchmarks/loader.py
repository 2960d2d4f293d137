"""Loading ours, timm's and torchvision's way: finished crops a second from the same files.

    python benchmarks/loader.py --data data/imagenet [--workers 2 --seconds 6 --rounds 4]

Each pipeline ends with a batch in the main process, decoded, cropped and flipped, ready to go to a
device. Windows of all pipelines follow each other in random order, round by round; each starts its
workers anew and is timed once what they had made ahead is used up, and the first round is dropped.
Ratios are of windows of one round. Beside the clock stands the processor time of all processes for
a crop, which other programs on the machine disturb far less.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import timm.data
import torch
import torchvision.io
from common import about, write
from torchvision.transforms import v2

from cspnet.data.loader import evaluation_batches, training_groups
from cspnet.images import decode
from cspnet.recipe import load as recipes
from cspnet.recipe.schema import Evaluate
from cspnet.sources.data_root import DataRoot
from cspnet.sources.folder import Folder

ENDLESS = 100_000  # images, by repetition: no pipeline comes to the end of an epoch in a window
CROP = 0.887  # timm's for cspdarknet53
OURS = "ours"
CPU = torch.device("cpu")
AHEAD = 12  # batches before a window begins: more than any pipeline makes ahead


@dataclass
class Pipeline:
    name: str
    does: str
    batches: Callable[[int], Iterator]  # by the number of workers; labels are a batch's second part
    rates: list[float] = field(default_factory=list)  # crops/s, a window each
    costs: list[float] = field(default_factory=list)  # ms of processor time for a crop


class Repeated:
    """A source of ours, again and again."""

    def __init__(self, source: Folder):
        self.source, self.classes = source, source.classes
        self.labels = np.resize(source.labels, ENDLESS)

    def __len__(self) -> int:
        return ENDLESS

    def read(self, index: int) -> tuple[bytes, int]:
        return self.source.read(index % len(self.source))

    def name(self, index: int) -> str:
        return self.source.name(index % len(self.source))


class Tensors(torch.utils.data.Dataset):
    """torchvision's way: libjpeg-turbo into a tensor, transforms of tensors."""

    def __init__(self, source: Folder, transform):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        index %= len(self.source)
        data = torchvision.io.read_file(self.source.name(index))
        image = torchvision.io.decode_jpeg(data, torchvision.io.ImageReadMode.RGB)
        return self.transform(image), int(self.source.labels[index])


def ours(source: Folder, batch: int, size: int, *overrides: str) -> Callable[[int], Iterator]:
    small = [f"batch={4 * batch}", f"group={batch}", f"data.image_size={size}", *overrides]
    recipe = recipes.load_recipe(recipes.find_recipe("cspdarknet53-omega"), small)
    return lambda workers: training_groups(source, recipe, 0, workers, pin=False)


def ours_for_validation(source, batch: int, size: int, how: Evaluate) -> Callable[[int], Iterator]:
    return lambda workers: evaluation_batches(Repeated(source), batch, size, how, workers, False)


def timms(
    folder: Path, batch: int, size: int, train: bool, on_device: bool = False, **options
) -> Callable[[int], Iterator]:
    """timm's loader; without its last stage, which makes normalised floats on the device."""

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
        yield from loader if on_device else loader.loader

    return batches


def torchvisions(
    source: Folder, batch: int, train: bool, transform: v2.Transform
) -> Callable[[int], Iterator]:
    def batches(workers: int) -> Iterator:
        yield from torch.utils.data.DataLoader(
            Tensors(source, transform), batch, shuffle=train, num_workers=workers
        )

    return batches


def of_training(root: str, batch: int, size: int) -> list[Pipeline]:
    folder = DataRoot(root).train_folder
    source = Folder(folder)
    flip = "RandomResizedCrop, flip"
    tensors = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    return [
        Pipeline(
            OURS,
            "OpenCV, recipe omega: scale, aspect, rotation, crop, flip in one warp → uint8",
            ours(source, batch, size),
        ),
        Pipeline(
            "ours, reduced_decode",
            "the same, JPEGs reduced by libjpeg where the view shrinks them by 2 or more → uint8",
            ours(source, batch, size, "data.reduced_decode=true"),
        ),
        Pipeline(
            "timm",
            f"timm's defaults: PIL, {flip}, colour jitter 0.4 → uint8",
            timms(folder, batch, size, True),
        ),
        Pipeline(
            "timm, no jitter",
            f"PIL, {flip} → uint8: as ours, which leaves colour to the device",
            timms(folder, batch, size, True, color_jitter=None),
        ),
        Pipeline(
            "timm, to the end",
            "timm's defaults and its last stage here on the CPU → normalised float32",
            timms(folder, batch, size, True, on_device=True),
        ),
        Pipeline(
            "torchvision v2",
            f"decode_jpeg, {flip} of tensors → uint8",
            torchvisions(source, batch, True, tensors),
        ),
    ]


def of_validation(root: str, batch: int, size: int) -> list[Pipeline]:
    folder = DataRoot(root).val_folder
    source = Folder(folder)
    view = f"shorter side to {int(size / CROP)}, antialiased, central {size}²"
    tensors = v2.Compose([v2.Resize(int(size / CROP), antialias=True), v2.CenterCrop(size)])
    antialias = Evaluate(crop_pct=CROP, interpolation="antialias")
    return [
        Pipeline(
            OURS,
            f"OpenCV, torch's resize; {view} → uint8",
            ours_for_validation(source, batch, size, antialias),
        ),
        Pipeline(
            "ours, Darknet's view",
            f"OpenCV; shorter side to {size}, corner-aligned, central {size}² → uint8",
            ours_for_validation(source, batch, size, Evaluate()),
        ),
        Pipeline(
            "timm",
            f"PIL; {view} → uint8",
            timms(folder, batch, size, False, crop_pct=CROP, interpolation="bilinear"),
        ),
        Pipeline(
            "torchvision v2",
            f"decode_jpeg; {view} → uint8",
            torchvisions(source, batch, False, tensors),
        ),
    ]


def window(pipeline: Pipeline, workers: int, seconds: float) -> None:
    """Times a pipeline of its own workers, once it is under way."""
    with contextlib.closing(pipeline.batches(workers)) as batches:
        for _ in islice(batches, AHEAD):
            pass
        crops = 0
        before, start = processor_seconds(), time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            crops += len(next(batches)[1])
        spent = processor_seconds() - before
    pipeline.rates.append(crops / passed)
    pipeline.costs.append(1000 * spent / crops)


def processor_seconds() -> float:
    """Of this process and of its workers, so far."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # in user mode, in the kernel
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure(pipelines: list[Pipeline], workers: int, seconds: float, rounds: int) -> None:
    """Rounds of a window each, in random order; the first round is dropped."""
    for number in range(rounds + 1):
        for pipeline in random.sample(pipelines, len(pipelines)):
            window(pipeline, workers, seconds)
        if not number:
            for pipeline in pipelines:
                pipeline.rates.clear(), pipeline.costs.clear()


def decodes(pipeline: Pipeline) -> float:
    """Images decoded for a crop, counted in this process."""
    places = ((decode.cv2, "imdecode"), (PIL.Image, "open"), (torchvision.io, "decode_jpeg"))
    counted = 0

    def counting(function: Callable) -> Callable:
        def call(*arguments, **options):
            nonlocal counted
            counted += 1
            return function(*arguments, **options)

        return call

    originals = [getattr(*place) for place in places]
    try:
        for place, original in zip(places, originals, strict=True):
            setattr(*place, counting(original))
        with contextlib.closing(pipeline.batches(0)) as batches:
            next(batches)  # what is made ahead of it does not count
            counted = 0
            crops = sum(len(loaded[1]) for loaded in islice(batches, 4))
    finally:
        for place, original in zip(places, originals, strict=True):
            setattr(*place, original)
    return counted / crops


def growth(source: Folder, batch: int, size: int, workers: int, epochs: int) -> list[list[float]]:
    """MB that each worker of ours holds by itself after each epoch; shared pages count in part."""
    with contextlib.closing(ours(source, batch, size)(workers)) as batches:
        held = []
        for _ in range(epochs):
            for _ in islice(batches, -(-len(source) // batch)):
                pass
            rollups = [
                Path(f"/proc/{child.pid}/smaps_rollup").read_text()
                for child in multiprocessing.active_children()
            ]
            pss = [next(r for r in text.splitlines() if r[:4] == "Pss:") for text in rollups]
            held.append([int(line.split()[1]) / 1024 for line in pss])
    return held


def table(title: str, pipelines: list[Pipeline]) -> list[dict]:
    """Prints the medians of each pipeline and what ours is to it; the same as records."""
    records = []
    print(f"\n{title}")
    print(f"{'':22}{'crops/s':>8} {'min–max':>13} {'CPU ms':>7} {'decodes':>8}   ours to it: CPU")
    for pipeline in pipelines:
        first = pipelines[0]
        ratios = [a / b for a, b in zip(first.rates, pipeline.rates, strict=True)]
        cheaper = [b / a for a, b in zip(first.costs, pipeline.costs, strict=True)]
        record = {
            "name": pipeline.name,
            "does": pipeline.does,
            "crops_per_second": pipeline.rates,
            "cpu_ms_per_crop": pipeline.costs,
            "decodes_per_crop": decodes(pipeline),
            "ours_times_faster": ratios,
            "ours_times_less_cpu": cheaper,
        }
        records.append(record)
        rate, cost = statistics.median(pipeline.rates), statistics.median(pipeline.costs)
        spread = f"{min(pipeline.rates):.0f}–{max(pipeline.rates):.0f}"
        print(
            f"{pipeline.name:22}{rate:8.0f} {spread:>13} {cost:7.2f} "
            f"{record['decodes_per_crop']:8.2f}   {statistics.median(ratios):.2f}× "
            f"({min(ratios):.2f}–{max(ratios):.2f}), {statistics.median(cheaper):.2f}×"
        )
    for pipeline in pipelines:
        print(f"  {pipeline.name}: {pipeline.does}")
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with train/ and val/")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32, help="images that are handed over at once")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=6, help="of a window")
    parser.add_argument("--rounds", type=int, default=4, help="beside the first, which is dropped")
    parser.add_argument(
        "--epochs", type=int, default=5, help="in which the workers' memory is read"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    root, batch, size, workers = (
        *(arguments.data, arguments.batch),
        *(arguments.size, arguments.workers),
    )
    load = os.getloadavg()
    record = about(arguments)
    print(
        f"{record['machine']}; {workers} workers, batches of {batch}, {size}²; load {load[0]:.1f}"
    )
    for kind, pipelines in (
        ("training", of_training(root, batch, size)),
        ("validation", of_validation(root, batch, size)),
    ):
        measure(pipelines, workers, arguments.seconds, arguments.rounds)
        record[kind] = table(f"{kind}, medians of {arguments.rounds} windows", pipelines)
    source = Folder(DataRoot(root).train_folder)
    record["workers_mb"] = growth(source, batch, size, workers, arguments.epochs)
    print(f"\nmemory of our workers after each epoch of {len(source):,} images, MB (PSS):")
    for held in record["workers_mb"]:
        print("  " + "  ".join(f"{megabytes:.1f}" for megabytes in held))
    record["load_before_and_after"] = [load, os.getloadavg()]
    print(f"load of the machine, before and after: {load[0]:.1f}, {os.getloadavg()[0]:.1f}")
    write(arguments.json, record)


if __name__ == "__main__":
    main()
