"""The commands around a run: `plan` before it, `status` while it runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cspnet.cli.options import (
    DataRoot,
    Device,
    Overrides,
    RecipeName,
    Workers,
    require_writable,
    write_text,
)
from cspnet.cli.training import Compile, Memory, Output, Passes, passes_of
from cspnet.errors import RecipeError

if TYPE_CHECKING:
    from cspnet.plan.forecast import Forecast
    from cspnet.plan.measure import Plan
    from cspnet.recipe.schema import Recipe


def plan_command(
    recipe: Annotated[str, RecipeName],
    overrides: Overrides = None,
    data: DataRoot = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Predict for a card that is not here: rtx2070, rtx3090, h100 ..."),
    ] = None,
    output: Output = None,
    device: Device = "auto",
    workers: Workers = None,
    passes: Passes = None,
    compile: Compile = None,
    memory: Memory = "fast",
    seconds: Annotated[
        float, typer.Option(min=1, help="To measure for, in each kind of step.")
    ] = 20.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file; - is stdout.")
    ] = None,
) -> None:
    """Will it fit, when is it done, what holds it up? cspnet plan --recipe cspdarknet53-omega

    From some real steps on this machine, in a folder that is removed again. With --gpu, a
    prediction from counted bytes and the card's data sheet; no step is run and no data needed.
    """
    from cspnet.recipe import load as recipes

    require_writable("--json", json_file)
    path = recipes.find_recipe(recipe)
    resolved = recipes.load_recipe(path, overrides or [], data)
    if gpu:
        given = {"--output": output, "--workers": workers, "--passes": passes, "--compile": compile}
        idle = [option for option, value in given.items() if value is not None]
        idle += ["--device"] * (device != "auto")
        if idle:
            raise RecipeError(f"--gpu predicts, and runs nothing: leave out {', '.join(idle)}")
        content, lines = _predict(resolved, gpu, memory)
    else:
        from rich.console import Console

        from cspnet.plan.measure import measure_plan as measure
        from cspnet.runtime.device import RunOptions

        place = RunOptions(
            output=output or Path("runs") / path.stem,
            device=device,
            workers=workers,
            passes=passes_of(passes),
            memory=memory,
            compile=compile,
        )
        notes = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
        found = measure(
            resolved, place, seconds, lambda what: notes.print(f"measuring: {what}", style="dim")
        )
        content, lines = found.to_dict(), _measured(resolved, found, place.output)
    if str(json_file) != "-":
        print("\n".join(lines))
    if json_file:
        write_text(json_file, json.dumps(content, indent=2) + "\n")


def status_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
) -> None:
    """How far is it? cspnet status runs/cspdarknet53-omega

    Step, speed, time left, best top-1, last save; it reads the run folder only, from any terminal.
    The exit code is 0 where the run is running or complete, 75 where it was stopped after a save, 1
    where it failed or its process is gone.
    """
    from cspnet.report.status import describe_run, status_exit_code
    from cspnet.run.reader import read_run

    found = read_run(run)
    print("\n".join(describe_run(found)))
    raise typer.Exit(status_exit_code(found))


def _measured(recipe: "Recipe", plan: "Plan", output: Path) -> list[str]:
    """The plan in lines for people."""
    from cspnet.plan.measure import count_validations_and_saves
    from cspnet.recipe.eta import format_duration, format_eta

    where = "of the machine's" if plan.device == "cpu" else "of the device's"
    peaks = "; ".join(f"{gb:.2f} GB with {what}" for what, gb in plan.memory_gb.items())
    validations, saves = count_validations_and_saves(recipe)
    steps = ", ".join(f"{seconds:.3g} s at {s}×{s}" for s, seconds in plan.step_seconds.items())
    attack = f"; the attack adds up to {plan.attack_seconds:.3g} s" * bool(plan.attack_seconds)
    disk = plan.checkpoints * plan.checkpoint_gb
    short = "" if disk < plan.free_gb else ": TOO LITTLE ROOM"
    return [
        f"measured on {plan.device}, {plan.precision}, {plan.workers} workers",
        *(f"kernels     {line}" for line in plan.kernels),
        f"memory      {peaks.replace('training', 'the steps')}, {where} {plan.available_gb:.1f}",
        f"images/s    the net alone {plan.net_rate:,.1f}, the loader alone "
        f"{plan.loader_rate:,.1f}, both {plan.both_rate:,.1f}",
        f"held up by  {plan.bottleneck}; {plan.advice}",
        f"a step      {recipe.batch} images: {steps}{attack}",
        f"the run     {recipe.schedule.steps:,} steps, {validations:,} validations of "
        f"{format_duration(plan.validation_seconds)}, {saves:,} saves of {format_duration(plan.save_seconds)}: "
        f"{format_duration(plan.seconds)}; begun now, done at {format_eta(plan.seconds)}",
        f"disk        {plan.checkpoints} checkpoints of {1000 * plan.checkpoint_gb:,.0f} MB at "
        f"once, {disk:.1f} GB; {plan.free_gb:,.0f} GB are free at {output}{short}",
    ]


def _predict(recipe: "Recipe", gpu: str, memory: str) -> tuple[dict, list[str]]:
    """What is known of a card that is not here: the figures, and lines for people."""
    from dataclasses import asdict

    from cspnet.plan.forecast import find_card, forecast
    from cspnet.recipe.eta import format_duration
    from cspnet.runtime.device import ACTIVATION_BUDGETS

    card = find_card(gpu)
    if memory not in ACTIVATION_BUDGETS:
        raise RecipeError(f"--memory {memory}: must be {', '.join(ACTIVATION_BUDGETS)}")
    known = isinstance(recipe.model.classes, int)
    classes = recipe.model.classes if known else 1000
    found: Forecast = forecast(recipe, card, classes, memory)
    size, low, high = recipe.data.image_size, *found.expected
    names = {"compiled": f"compiled, --memory {memory}", "eager": "eager, --no-compile"}
    fits = [
        f"{names[mode]} {mb:.1f} MB an image: "
        + (f"{found.fits[mode]} of {recipe.groups} groups" if found.fits[mode] else "no group")
        + " at once"
        + (", counted" if mode == "eager" else "")
        for mode, mb in found.saved_mb.items()
    ]
    lines = [
        f"A PREDICTION for an NVIDIA {card.name} ({card.memory_gb:g} GB, {card.precision}, "
        f"{card.tflops:.1f} TFLOP/s, {card.gb_per_s:g} GB/s); nothing was run on one",
        f"kept        {'; '.join(fits)} at {size}×{size}",
        f"memory      {found.fixed_gb:.2f} GB beside that: weights, gradients, momentum"
        + ", averages" * bool(recipe.ema.decay)
        + f", workspace; {classes:,} classes"
        + ", assumed: model.classes=N names another number" * (not known),
        f"images/s    {low:,.0f} to {high:,.0f} of the net, compiled; by the data sheet at most "
        f"{found.at_most:,.0f}",
        f"the run     {recipe.schedule.steps:,} steps of {recipe.batch}: "
        f"{format_duration(found.seconds[0])} to {format_duration(found.seconds[1])}, if the loader keeps up; "
        "validations come on top",
        f"disk        checkpoints of {1000 * found.checkpoint_gb:,.0f} MB",
        f"card        {card.source}",
    ]
    return asdict(found), lines
