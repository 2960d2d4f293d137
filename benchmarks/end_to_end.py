"""Images/s of a run with its loader over those of the same run fed from memory, interleaved.

    python benchmarks/end_to_end.py --data data/imagenet [--recipe cspdarknet53-omega --json FILE]

One run of the real loop. Its stream of images alternates: a window of steps from the loader, a
window of steps that all take the same decoded group, which costs nothing. Where workers make groups
ahead, a window from the loader comes in between that does not count: it uses up what they made
while nobody asked. The record of the run has a line for each window; the first of each kind is
dropped. The ratio tells what reading, decoding and handing over cost the run; 1 is nothing.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from unittest import mock

from common import about, write
from rich.console import Console

from cspnet.data.loader import Batch, TrainGroups, prefetch_factor, training_groups
from cspnet.recipe import load as recipes
from cspnet.runtime.device import choose_workers, setup_device
from cspnet.runtime.options import RunOptions
from cspnet.train import loop


def alternating(window: int, real_ones: int) -> object:
    """`training_groups` with, after some windows of steps, one of one group again and again."""

    def groups(source, recipe, start: int, workers: int, pin: bool, *how) -> Iterator[Batch]:
        ahead = workers * prefetch_factor(recipe.groups, workers)
        if ahead > window * recipe.groups:
            raise ValueError(
                f"--window {window}: {workers} workers make more groups ahead, {ahead}"
            )
        kept = TrainGroups(source, recipe)[0, 0]
        if pin:
            kept = kept._replace(images=kept.images.pin_memory(), labels=kept.labels.pin_memory())
        with closing(training_groups(source, recipe, start, workers, pin, *how)) as real:
            while True:
                for _ in range(real_ones * window * recipe.groups):
                    yield next(real)
                for _ in range(window * recipe.groups):
                    yield kept

    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--recipe", default="cspdarknet53-omega")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--window", type=int, help="steps; on a GPU 50, else 2")
    parser.add_argument("--windows", type=int, default=4, help="of each kind, beside the first")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="of the recipe")
    options = parser.parse_args()
    device = setup_device(options.device)
    small = device.type == "cpu"
    real_ones = 2 if choose_workers(options.workers, device) else 1
    window = options.window or (2 if small else 50)
    size = ["batch=16", "group=8"] if small else []
    steps = (real_ones + 1) * window * (options.windows + 1)
    given = [f"log_every={window}", f"schedule.steps={steps}", "save_every=1000000"]
    recipe = recipes.load_recipe(
        recipes.find_recipe(options.recipe), [*size, *given, *options.overrides], options.data
    )
    record = about(options)
    with tempfile.TemporaryDirectory() as folder:
        run_options = RunOptions(
            Path(folder) / "run", device=options.device, workers=options.workers
        )
        with (
            mock.patch.object(loop, "training_groups", alternating(window, real_ones)),
            mock.patch.object(loop, "is_validation_due", lambda recipe, step: False),
        ):
            loop.train(recipe, run_options, Console(soft_wrap=True))
        text = (run_options.output / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if line["split"] == "train"]
    kinds = {
        "loader": lines[2 * real_ones :: real_ones + 1],
        "memory": lines[2 * real_ones + 1 :: real_ones + 1],
    }
    speeds = {k: [line["images_per_second"] for line in of_it] for k, of_it in kinds.items()}
    ratios = [a / b for a, b in zip(speeds["loader"], speeds["memory"], strict=True)]
    wait = statistics.median(line["data_wait"] for line in kinds["loader"])
    for kind, windows in speeds.items():
        low, high = min(windows), max(windows)
        print(f"from the {kind}: {statistics.median(windows):.2f} images/s ({low:.2f}–{high:.2f})")
    print(
        f"ratio of neighbouring windows {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f}–{max(ratios):.3f}); {100 * wait:.1f} % of the time waiting for data"
    )
    write(options.json, {**record, "images_per_second": speeds, "ratios": ratios, "wait": wait})


if __name__ == "__main__":
    main()
