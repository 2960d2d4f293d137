"""Throughput of a run with its dataloader, relative to the same run fed from memory.

    python benchmarks/end_to_end.py --data data/imagenet [--recipe cspdarknet53-omega --json FILE]

One run of the real training loop whose stream of groups alternates: a window of steps from the
dataloader, then a window of steps that reuse one decoded group. If workers prefetch, an additional
window from the dataloader, which is not measured, uses up what they prefetched during the window
from memory. A line of metrics covers one window; the first window of each kind is dropped. A ratio
of 1 means that reading, decoding and copying cost the run nothing.
"""

from collections.abc import Generator
from contextlib import closing
from unittest import mock

from harness import (
    Windows,
    argument_parser,
    new_record,
    temporary_run,
    training_metrics,
    use_defaults,
    write_record,
)

from cspnet.data.loader import Batch, TrainGroups, prefetch_factor, training_groups
from cspnet.recipe.load import find_recipe, load_recipe
from cspnet.runtime.device import choose_workers, setup_device
from cspnet.runtime.signals import StopRequest
from cspnet.train import loop
from cspnet.train.start import start


def alternating_groups(window: int, loader_windows: int):
    """A replacement for `training_groups` with windows of `window` steps.

    `loader_windows` windows come from the dataloader, then one repeats a single group.
    """

    def groups(source, recipe, step: int, workers: int, pin: bool, *others) -> Generator[Batch]:
        prefetched = workers * prefetch_factor(recipe.groups, workers)
        if prefetched > window * recipe.groups:
            raise ValueError(
                f"--window {window}: must be longer than the {prefetched} groups that {workers} "
                "workers prefetch"
            )
        repeated = TrainGroups(source, recipe)[0, 0]
        if pin:
            images, labels = repeated.images.pin_memory(), repeated.labels.pin_memory()
            repeated = repeated._replace(images=images, labels=labels)
        with closing(training_groups(source, recipe, step, workers, pin, *others)) as loaded:
            while True:
                for _ in range(loader_windows * window * recipe.groups):
                    yield next(loaded)
                for _ in range(window * recipe.groups):
                    yield repeated

    return groups


def main() -> None:
    parser = argument_parser(__doc__, data=True)
    parser.add_argument("--recipe", default="cspdarknet53-omega")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--window", type=int, help="steps per window: 2 on a CPU, else 50")
    parser.add_argument("--windows", type=int, default=4, help="of each kind, after the first")
    parser.add_argument("overrides", nargs="*", help="of the recipe")
    options = parser.parse_args()
    on_cpu = setup_device(options.device).type == "cpu"
    use_defaults(options, on_cpu, window=(2, 50))
    loader_windows = 2 if choose_workers(options.workers, setup_device(options.device)) else 1
    period = loader_windows + 1
    steps = period * options.window * (options.windows + 1)
    recipe = load_recipe(
        find_recipe(options.recipe),
        [
            *(["batch=16", "group=8"] if on_cpu else []),
            *(f"log_every={options.window}", f"schedule.steps={steps}"),
            *("save_every=1000000", "evaluate.every=1000000", *options.overrides),
        ],
        options.data,
    )
    record = new_record(options)
    groups = alternating_groups(options.window, loader_windows)
    with (
        temporary_run(recipe, device=options.device, workers=options.workers) as run,
        mock.patch.object(loop, "training_groups", groups),
    ):
        loop.train_loop(run, start(run), StopRequest())
        lines = training_metrics(run)
    measured = {
        "loader": lines[2 * loader_windows :: period],
        "memory": lines[2 * loader_windows + 1 :: period],
    }
    speeds = {
        kind: Windows([line["images_per_second"] for line in kind_lines])
        for kind, kind_lines in measured.items()
    }
    ratios = speeds["loader"].ratios_to(speeds["memory"])
    data_wait = Windows([line["data_wait"] for line in measured["loader"]]).median
    for kind, windows in speeds.items():
        print(f"from the {kind}: {windows.median:.2f} images/s ({windows.spread()})")
    print(
        f"ratio of neighbouring windows {ratios.median:.3f} ({ratios.spread(3)}); "
        f"{100 * data_wait:.1f} % of the time spent waiting for data"
    )
    record |= {
        "images_per_second": {kind: windows.values for kind, windows in speeds.items()},
        "ratios": ratios.values,
        "data_wait": data_wait,
    }
    write_record(options.json, record)


if __name__ == "__main__":
    main()
