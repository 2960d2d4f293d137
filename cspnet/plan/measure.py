"""Measuring what a run needs: time, memory and disk, from a few real steps on this machine.

The steps are those of the training loop on the recipe's own data, with metrics, images and saves,
in a temporary folder. Only numbers of the schedule differ, which do not affect the time of a step.
"""

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from rich.console import Console

from cspnet.data.loader import prefetch_factor, training_groups
from cspnet.errors import PartialResultError, StoppedError
from cspnet.files import nearest_existing_directory
from cspnet.plan.forecast import attacked_share
from cspnet.recipe.eta import find_bottleneck
from cspnet.recipe.schedule import count_validations_and_saves
from cspnet.recipe.schema import Recipe
from cspnet.run.checkpoint import CheckpointFiles
from cspnet.run.folder import RunFolder
from cspnet.runtime.cpu import available_cores
from cspnet.runtime.memory import available_memory_gb, peak_memory_gb
from cspnet.runtime.options import RunOptions
from cspnet.runtime.signals import StopRequest
from cspnet.sources.protocol import Source
from cspnet.train.compile import prepare_step
from cspnet.train.loop import train_loop
from cspnet.train.setup import Run, prepare
from cspnet.train.start import start
from cspnet.train.step import StepNotes

PILOT_STEPS = 5  # of the first trial, which determines the number of steps of the second
MAX_STEPS = 400  # of a trial


@dataclass(frozen=True)
class TrialTimes:
    """Measurements of some steps of one kind; GB are 10^9 bytes, the peak of the process so far."""

    steps: int  # measured
    seconds: float  # per step, including the wait for data
    data_wait: float  # fraction of that
    memory_gb: float
    validation_gb: float  # including the saves before and after it
    validation_rate: float  # images/s
    save_seconds: float
    setup_seconds: float  # before the first step: compilation, sample images
    checkpoint_gb: float
    notes: StepNotes

    @property
    def compute_seconds(self) -> float:
        """Seconds per step without the wait for data."""
        return self.seconds * (1 - self.data_wait)


@dataclass(frozen=True)
class Plan:
    """What a run needs. Seconds, images/s, and GB of 10^9 bytes."""

    device: str
    precision: str
    workers: int
    micro_batch: int  # images
    network: list[str]  # what a run prints about its micro-batch and its compilation
    memory_gb: dict[str, float]  # peak up to: training, attack, validation
    available_gb: float  # of the device, or of the machine
    net_rate: float  # images/s of the network alone, at the full image size
    loader_rate: float
    both_rate: float
    data_wait: float
    bottleneck: str
    advice: str
    step_seconds: dict[int, float]  # by image size
    attack_seconds: float  # additional time of a step with all groups attacked
    validation_seconds: float
    save_seconds: float
    setup_seconds: float
    seconds: float  # of the whole run
    checkpoint_gb: float
    checkpoints: int  # on the disk at once
    free_gb: float

    def to_dict(self) -> dict:
        return asdict(self)


class FirstImages:
    """The first images of a source."""

    def __init__(self, source: Source, count: int):
        self._source, self._count = source, min(count, len(source))
        self.classes, self.labels = source.classes, source.labels[: self._count]
        self.read, self.name = source.read, source.name

    def __len__(self) -> int:
        return self._count

    def listing(self) -> Iterator[tuple[str, int]]:
        return islice(self._source.listing(), self._count)


class _TimedCheckpoints(CheckpointFiles):
    """Checkpoints that record the duration of each save."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.seconds: list[float] = []

    def save(self, content: dict, best: bool = False) -> None:
        start = time.perf_counter()
        super().save(content, best)
        self.seconds.append(time.perf_counter() - start)


def measure_plan(
    recipe: Recipe,
    options: RunOptions,
    seconds: float = 20.0,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Measure for about `seconds` in each image size, and with the attack.

    `on_progress` is called with what is measured next. Raises what a run raises before its first
    step, OutOfMemoryError, and PartialResultError after a signal.
    """
    startup_seconds = _seconds_since_process_start()
    run = prepare(recipe, options, Console(quiet=True), list_data=False)
    attack_seconds, trials = 0.0, {}
    with StopRequest() as stop:
        try:
            for size, _ in reversed(list(recipe.size_stages())):
                on_progress(f"steps of {recipe.batch} images, {size}×{size}")
                trials[size] = _measure_steps(recipe, options, size, seconds, False, stop)
            full = trials[recipe.data.image_size]
            memory = {"training": full.memory_gb, "validation": full.validation_gb}
            if recipe.adversarial.step_size:
                on_progress("steps with the attack")
                attack = _measure_steps(
                    recipe, options, recipe.data.image_size, seconds, True, stop
                )
                attack_seconds = attack.compute_seconds - full.compute_seconds
                memory["attack"] = attack.memory_gb
            on_progress("the dataloader alone")
            loader_rate = _loader_rate(run, min(seconds, 5.0), stop)
        except StoppedError:
            raise PartialResultError(
                "interrupted: the plan is incomplete; all temporary files were removed"
            ) from None
    return _combine(run, trials, attack_seconds, memory, loader_rate, startup_seconds)


def _measure_steps(
    recipe: Recipe,
    options: RunOptions,
    size: int,
    seconds: float,
    attack: bool,
    stop: StopRequest,
) -> TrialTimes:
    """Run steps for about `seconds`; a short trial determines their number."""
    pilot = _train(_shortened(recipe, size, PILOT_STEPS, attack), options, stop, 2 * recipe.batch)
    steps = min(MAX_STEPS, int(seconds / pilot.seconds))
    if steps <= PILOT_STEPS:
        return pilot
    images = max(2 * recipe.batch, int(pilot.validation_rate * seconds / 2))
    trial = _train(_shortened(recipe, size, steps, attack), options, stop, images)
    return replace(trial, setup_seconds=pilot.setup_seconds)  # as of a new process


def _shortened(recipe: Recipe, size: int, steps: int, attack: bool) -> Recipe:
    """The recipe for some steps of the same kind; all or none of their groups are attacked."""
    return replace(
        recipe,
        log_every=1,
        save_every=10 * steps,
        archive_every=0,
        data=replace(recipe.data, image_size=size, start_image_size=None),
        schedule=replace(recipe.schedule, steps=steps, warmup_steps=0),
        evaluate=replace(recipe.evaluate, every=10 * steps),
        adversarial=replace(recipe.adversarial, probability=float(attack)),
    )


@contextlib.contextmanager
def _temporary_folder(output: Path) -> Iterator[Path]:
    """A folder on the disk of the run folder if that is writable, removed at the end."""
    above = nearest_existing_directory(output.absolute().parent)
    if not os.access(above, os.W_OK):
        above = Path(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=above) as folder:
        yield Path(folder)


def _train(recipe: Recipe, options: RunOptions, stop: StopRequest, val_images: int) -> TrialTimes:
    """Train by the recipe in a temporary folder; validate on the first `val_images` images."""
    with _temporary_folder(options.output) as folder:
        started = time.perf_counter()
        options = replace(options, output=folder / "run", resume=False)
        saves = _TimedCheckpoints(RunFolder(options.output).checkpoint_folder)
        run = prepare(
            recipe,
            options,
            Console(quiet=True),
            list_data=False,
            checkpoints=saves,
            select_val=lambda source: FirstImages(source, val_images),
        )
        state = start(run)
        step = prepare_step(run, state)
        scores = train_loop(run, state, stop, step)
        assert scores is not None
        total = time.perf_counter() - started
        peak_gb = peak_memory_gb()  # including the last save
        lines = [json.loads(line) for line in run.folder.metrics_file.read_text().splitlines()]
        checkpoint_gb = saves.last.stat().st_size / 1e9
    lines = [line for line in lines if line["split"] == "train"]
    durations = [recipe.batch / line["images_per_second"] for line in lines]
    # The images of the first steps are prefetched, and caches are empty.
    settled = slice(min(3, len(lines) - 2), None)
    waits = [line["data_wait"] * t for line, t in zip(lines, durations, strict=True)][settled]
    return TrialTimes(
        steps=len(waits),
        seconds=statistics.mean(durations[settled]),
        data_wait=sum(waits) / sum(durations[settled]),
        memory_gb=lines[-1]["memory_gb"],
        validation_gb=peak_gb,
        validation_rate=scores.images_per_second,
        save_seconds=statistics.mean(saves.seconds),
        setup_seconds=total - sum(durations) - scores.seconds - sum(saves.seconds),
        checkpoint_gb=checkpoint_gb,
        notes=step.notes,
    )


def _loader_rate(run: Run, seconds: float, stop: StopRequest) -> float:
    """Throughput of the dataloader alone, images/s."""
    workers, on_gpu = run.hardware.workers, run.hardware.device.type == "cuda"
    recipe = replace(
        run.recipe,
        data=replace(run.recipe.data, start_image_size=None),
        schedule=replace(run.recipe.schedule, steps=10**9),  # no end within the measurement
    )
    stream = training_groups(run.train_set, recipe, 0, workers, on_gpu)
    with contextlib.closing(stream) as groups:
        for _ in range(1 + workers * prefetch_factor(recipe.groups, workers)):
            next(groups)  # prefetched
        start, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < seconds or not count:
            next(groups)
            count += 1
            if stop.signal:
                raise StoppedError(stop.signal)
    return recipe.group * count / passed


def _combine(
    run: Run,
    trials: dict[int, TrialTimes],
    attack_seconds: float,
    memory: dict[str, float],
    loader_rate: float,
    startup_seconds: float,
) -> Plan:
    """The plan of the whole run, from its numbers of steps, validations and saves."""
    recipe, hardware = run.recipe, run.hardware
    full = trials[recipe.data.image_size]
    bottleneck, advice = find_bottleneck(
        full.data_wait, hardware.workers, available_cores(), hardware.device.type
    )
    validation_seconds = len(run.val_set) / full.validation_rate
    setup = startup_seconds + full.setup_seconds
    steps = sum(count * trials[size].seconds for size, count in recipe.size_stages())
    steps += (
        recipe.full_size_steps() * attacked_share(recipe) * attack_seconds
    )  # as measured at the full size
    validations, saves = count_validations_and_saves(recipe)
    return Plan(
        device=str(hardware.device),
        precision=f"{hardware.precision.name} ({hardware.precision.reason})",
        workers=hardware.workers,
        micro_batch=full.notes.micro_batch,
        network=full.notes.lines(),
        memory_gb=memory,
        available_gb=available_memory_gb(hardware.device),
        net_rate=recipe.batch / full.compute_seconds,
        loader_rate=loader_rate,
        both_rate=recipe.batch / full.seconds,
        data_wait=full.data_wait,
        bottleneck=bottleneck,
        advice=advice,
        step_seconds={size: trial.seconds for size, trial in trials.items()},
        attack_seconds=attack_seconds,
        validation_seconds=validation_seconds,
        save_seconds=full.save_seconds,
        setup_seconds=setup,
        seconds=setup + steps + validations * validation_seconds + saves * full.save_seconds,
        checkpoint_gb=full.checkpoint_gb,
        checkpoints=run.checkpoints.max_files,
        free_gb=run.checkpoints.free_bytes() / 1e9,
    )


def _seconds_since_process_start() -> float:
    """Seconds since the start of this process, including imports; 0 if /proc is not available."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
