"""How long, how much memory, what holds it up: from a few real steps on this machine.

The steps are those of `loop.run`, on the recipe's own data, in a folder that is removed afterwards:
what is measured is what a run does, its record, pictures and saves included. Only the numbers of a
schedule are changed, none of which costs time.
"""

import contextlib
import io
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from cspnet.data.loader import prefetch_factor, training_groups
from cspnet.errors import PartialResultError, StoppedError
from cspnet.files import nearest_existing_directory
from cspnet.plan.forecast import attacked_share
from cspnet.recipe.eta import find_bottleneck
from cspnet.recipe.schema import Recipe
from cspnet.run.checkpoint import CheckpointFiles
from cspnet.runtime.cpu import available_cores
from cspnet.runtime.device import RunOptions, StopRequest
from cspnet.sources.data_root import Source
from cspnet.train.loop import train_loop
from cspnet.train.reporter import memory_gb
from cspnet.train.setup import Run, prepare, start

PILOT = 5  # steps that tell how many there is time for
MOST = 400  # steps of a trial
ACCELERATED = re.compile(r"NOT COMPILED|compiled, tested|\d+ groups of .* at once")  # `accelerate`


@dataclass(frozen=True)
class TrialTimes:
    """What some steps of one kind took; GB are 10^9 bytes, the peak of the process so far."""

    steps: int  # that were measured
    seconds: float  # a step, with its wait
    data_wait: float  # share of that
    memory_gb: float
    validation_gb: float  # with the saves around it
    validation_rate: float  # images/s
    save_seconds: float
    setup_seconds: float  # before the first step: kernels, the first pictures
    checkpoint_gb: float
    kernels: list[str]

    @property
    def alone(self) -> float:
        """Seconds of a step without the wait for images."""
        return self.seconds * (1 - self.data_wait)


@dataclass(frozen=True)
class Plan:
    """What a run needs. Seconds, images/s, and GB of 10^9 bytes."""

    device: str
    precision: str
    workers: int
    kernels: list[str]  # what a run says of compiling, and of the passes that it found
    memory_gb: dict[str, float]  # peak up to: training, attack, validation
    available_gb: float  # of the device, or of the machine
    net_rate: float  # images/s of the net alone, at the full size
    loader_rate: float
    both_rate: float
    data_wait: float
    bottleneck: str
    advice: str
    step_seconds: dict[int, float]  # by side of the images
    attack_seconds: float  # that a step takes longer when all of its groups are attacked
    validation_seconds: float
    save_seconds: float
    setup_seconds: float
    seconds: float  # of the whole run
    checkpoint_gb: float
    checkpoints: int  # at once on the disk
    free_gb: float

    def to_dict(self) -> dict:
        return asdict(self)


class First:
    """The first images of a source."""

    def __init__(self, source: Source, count: int):
        self._source, self._count = source, min(count, len(source))
        self.classes, self.labels = source.classes, source.labels[: self._count]
        self.read, self.name = source.read, source.name

    def __len__(self) -> int:
        return self._count


class _Timed(CheckpointFiles):
    """Notes how long each save takes."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.seconds: list[float] = []

    def save(self, content: dict, best: bool = False) -> None:
        start = time.perf_counter()
        super().save(content, best)
        self.seconds.append(time.perf_counter() - start)


def measure_plan(
    recipe: Recipe,
    place: RunOptions,
    seconds: float = 20.0,
    tell: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Measures for about `seconds` in each size of images, and in the attack.

    `tell` gets what is being measured. Raises what a run raises before its first step; OutOfMemory;
    Incomplete where a signal breaks it off.
    """
    begun = _since_start()
    job = prepare(recipe, place, Console(quiet=True))
    attack_seconds, trials = 0.0, {}
    with StopRequest() as stop:
        try:
            for size, _ in reversed(list(recipe.stages())):
                tell(f"steps of {recipe.batch} images, {size}×{size}")
                trials[size] = _trial(recipe, place, size, seconds, False, stop)
            full = trials[recipe.data.image_size]
            memory = {"training": full.memory_gb, "validation": full.validation_gb}
            if recipe.adversarial.step_size:
                tell("steps with the attack")
                attack = _trial(recipe, place, recipe.data.image_size, seconds, True, stop)
                attack_seconds = attack.alone - full.alone
                memory["attack"] = attack.memory_gb
            tell("the loader alone")
            loader_rate = _loader_rate(job, min(seconds, 5.0), stop)
        except StoppedError:
            raise PartialResultError(
                "broken off: nothing is planned, and nothing left behind"
            ) from None
    return _put_together(recipe, job, place, trials, attack_seconds, memory, loader_rate, begun)


def _trial(
    recipe: Recipe, place: RunOptions, size: int, seconds: float, attack: bool, stop: StopRequest
) -> TrialTimes:
    """Steps for about so many seconds; a pilot says how many these are."""
    pilot = _run(_short(recipe, size, PILOT, attack), place, stop, 2 * recipe.batch)
    steps = min(MOST, int(seconds / pilot.seconds))
    if steps <= PILOT:
        return pilot
    images = max(2 * recipe.batch, int(pilot.validation_rate * seconds / 2))
    full = _run(_short(recipe, size, steps, attack), place, stop, images)
    return replace(full, setup_seconds=pilot.setup_seconds)  # the first one, with all it loads


def _short(recipe: Recipe, size: int, steps: int, attack: bool) -> Recipe:
    """The recipe for some steps, all alike; none or all of their groups are attacked."""
    never = 10 * steps
    return replace(
        recipe,
        log_every=1,
        save_every=never,
        archive_every=0,
        data=replace(recipe.data, image_size=size, start_image_size=None),
        schedule=replace(recipe.schedule, steps=steps, warmup_steps=0),
        evaluate=replace(recipe.evaluate, every=never),
        adversarial=replace(recipe.adversarial, probability=float(attack)),
    )


def _run(recipe: Recipe, place: RunOptions, stop: StopRequest, images: int) -> TrialTimes:
    """A run of its own in a folder beside the real one, as far as that can be written.

    It validates on the first `images` images.
    """
    above = nearest_existing_directory(place.output.absolute().parent)
    if not os.access(above, os.W_OK):
        above = Path(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=above) as folder:
        begun = time.perf_counter()
        output = Path(folder) / "run"
        told = io.StringIO()
        place = replace(place, output=output, resume=False)
        job = prepare(recipe, place, _plain(told))
        saves = _Timed(job.folder.checkpoint_folder)
        job = replace(job, checkpoints=saves, validation=First(job.validation, images))
        scores = train_loop(job, start(job, listed=False), stop)
        kernels = [line for line in told.getvalue().splitlines() if ACCELERATED.match(line)]
        whole = time.perf_counter() - begun
        peak_gb = memory_gb()  # with the last save
        record = job.folder.metrics_file.read_text().splitlines()
        lines = [json.loads(line) for line in record[:-1]]  # the last one is the validation's
        checkpoint_gb = saves.last.stat().st_size / 1e9
    spent = [recipe.batch / line["images_per_second"] for line in lines]
    # What was loaded ahead of the first steps comes for nothing, and they find caches empty.
    settled = slice(min(3, len(lines) - 2), None)
    waits = [line["data_wait"] * t for line, t in zip(lines, spent, strict=True)][settled]
    return TrialTimes(
        steps=len(waits),
        seconds=statistics.mean(spent[settled]),
        data_wait=sum(waits) / sum(spent[settled]),
        memory_gb=lines[-1]["memory_gb"],
        validation_gb=peak_gb,
        validation_rate=scores.images_per_second,
        save_seconds=statistics.mean(saves.seconds),
        setup_seconds=whole - sum(spent) - scores.seconds - sum(saves.seconds),
        checkpoint_gb=checkpoint_gb,
        kernels=kernels,
    )


def _plain(file: io.StringIO) -> Console:
    """A console whose lines come out as they are, whatever the environment says of terminals."""
    return Console(
        file=file,
        width=10_000,
        markup=False,
        highlight=False,
        color_system=None,
        force_terminal=False,
    )


def _loader_rate(job: Run, seconds: float, stop: StopRequest) -> float:
    """Images/s of the loader with nobody beside it."""
    recipe = replace(
        job.recipe,
        data=replace(job.recipe.data, start_image_size=None),
        schedule=replace(job.recipe.schedule, steps=10**9),  # no end that it could come to
    )
    stream = training_groups(job.training, recipe, 0, job.workers, job.device.type == "cuda")
    with contextlib.closing(stream) as groups:
        for _ in range(1 + job.workers * prefetch_factor(recipe.groups, job.workers)):
            next(groups)  # what is made ahead
        start, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < seconds or not count:
            next(groups)
            count += 1
            if stop.signal:
                raise StoppedError(stop.signal)
    return recipe.group * count / passed


def _put_together(
    recipe: Recipe,
    job: Run,
    place: RunOptions,
    trials: dict[int, TrialTimes],
    attack_seconds: float,
    memory: dict[str, float],
    loader_rate: float,
    begun: float,
) -> Plan:
    full = trials[recipe.data.image_size]
    bottleneck, advice = find_bottleneck(
        full.data_wait, job.workers, available_cores(), job.device.type
    )
    validation_seconds = len(job.validation) / full.validation_rate
    setup = begun + full.setup_seconds
    steps = sum(count * trials[size].seconds for size, count in recipe.stages())
    steps += recipe.work() * attacked_share(recipe) * attack_seconds  # measured at the full size
    validations, saves = count_validations_and_saves(recipe)
    return Plan(
        device=str(job.device),
        precision=f"{job.precision.name} ({job.precision.reason})",
        workers=job.workers,
        kernels=full.kernels,
        memory_gb=memory,
        available_gb=_available_gb(job),
        net_rate=recipe.batch / full.alone,
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
        checkpoints=job.checkpoints.max_files,
        free_gb=job.checkpoints.free_bytes() / 1e9,
    )


def count_validations_and_saves(recipe: Recipe) -> tuple[int, int]:
    """How often a run validates, and how often it saves."""
    last, every = recipe.schedule.steps, recipe.evaluate.every
    validations = {*range(every, last + 1, every), last}
    saves = set(validations)  # once before each, and once after it
    for often in (recipe.save_every, recipe.archive_every):
        saves.update(range(often, last + 1, often) if often else ())
    return len(validations), len(saves) + len(validations)


def _available_gb(job: Run) -> float:
    """Memory of the device; of the machine, for a CPU."""
    if job.device.type == "cuda":
        return torch.cuda.get_device_properties(job.device).total_memory / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _since_start() -> float:
    """Seconds since this process began, with its imports; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        up = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    return up - int(fields[19]) / os.sysconf("SC_CLK_TCK")
