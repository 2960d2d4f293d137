"""The commands `plan`, before a run, and `status`, during it."""

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
from cspnet.cli.training import Compile, MicroBatch, Output, Recompute
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
        typer.Option(help="Predict for a GPU that is not available: rtx2070, rtx3090, h100 ..."),
    ] = None,
    output: Output = None,
    device: Device = "auto",
    workers: Workers = None,
    micro_batch: MicroBatch = None,
    compile: Compile = None,
    recompute: Recompute = "none",
    seconds: Annotated[
        float, typer.Option(min=1, help="Duration of the measurement, for each kind of step.")
    ] = 20.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file; - for stdout.")
    ] = None,
) -> None:
    """Measure memory, time and bottleneck of a run: cspnet plan --recipe cspdarknet53-omega

    Runs some steps on this machine, in a temporary folder. With --gpu, predicts from counted bytes
    and the card's data sheet instead, without data and without running any step.
    """
    from cspnet.recipe import load as recipes

    require_writable("--json", json_file)
    path = recipes.find_recipe(recipe)
    resolved = recipes.load_recipe(path, overrides or [], data)
    if gpu:
        given = {
            "--output": output,
            "--workers": workers,
            "--micro-batch": micro_batch,
            "--compile": compile,
        }
        unused = [option for option, value in given.items() if value is not None]
        unused += ["--device"] * (device != "auto")
        if unused:
            raise RecipeError(f"--gpu predicts, and runs nothing: leave out {', '.join(unused)}")
        content, lines = _predict(resolved, gpu, recompute)
    else:
        from rich.console import Console

        from cspnet.plan.measure import measure_plan as measure
        from cspnet.runtime.options import RunOptions
        from cspnet.train.micro_batch import parse_micro_batch

        options = RunOptions(
            output=output or Path("runs") / path.stem,
            device=device,
            workers=workers,
            micro_batch=parse_micro_batch(micro_batch),
            recompute=recompute,
            compile=compile,
        )
        notes = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
        measured = measure(
            resolved, options, seconds, lambda what: notes.print(f"measuring: {what}", style="dim")
        )
        content, lines = measured.to_dict(), _measured(resolved, measured, options.output)
    if str(json_file) != "-":
        print("\n".join(lines))
    if json_file:
        write_text(json_file, json.dumps(content, indent=2) + "\n")


def status_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
) -> None:
    """Show the progress of a run: cspnet status runs/cspdarknet53-omega

    Prints step, throughput, time left, best top-1 and last save; reads only the run folder.
    Exits with 0 if the run is running or complete, with 75 if it was stopped after a save, with 1
    if it failed or its process has ended.
    """
    from cspnet.report.status import describe_run, status_exit_code
    from cspnet.run.reader import read_run

    record = read_run(run)
    print("\n".join(describe_run(record)))
    raise typer.Exit(status_exit_code(record))


def _measured(recipe: "Recipe", plan: "Plan", output: Path) -> list[str]:
    """The plan as text."""
    from cspnet.recipe.eta import format_duration, format_eta
    from cspnet.recipe.schedule import count_validations_and_saves

    owner = "machine" if plan.device == "cpu" else "device"
    peaks = "; ".join(f"{gb:.2f} GB with {kind}" for kind, gb in plan.memory_gb.items())
    validations, saves = count_validations_and_saves(recipe)
    steps = ", ".join(f"{seconds:.3g} s at {s}×{s}" for s, seconds in plan.step_seconds.items())
    attack = f"; the attack adds up to {plan.attack_seconds:.3g} s" * bool(plan.attack_seconds)
    disk = plan.checkpoints * plan.checkpoint_gb
    short = "" if disk < plan.free_gb else ": TOO LITTLE ROOM"
    return [
        f"measured on {plan.device}, {plan.precision}, {plan.workers} workers",
        *(f"kernels     {line}" for line in plan.kernels),
        f"memory      {peaks.replace('training', 'training steps')}; the {owner} has "
        f"{plan.available_gb:.1f} GB",
        f"images/s    the network alone {plan.net_rate:,.1f}, the loader alone "
        f"{plan.loader_rate:,.1f}, both {plan.both_rate:,.1f}",
        f"bottleneck  {plan.bottleneck}; {plan.advice}",
        f"a step      {recipe.batch} images: {steps}{attack}",
        f"the run     {recipe.schedule.steps:,} steps, {validations:,} validations of "
        f"{format_duration(plan.validation_seconds)}, {saves:,} saves of "
        f"{format_duration(plan.save_seconds)}: "
        f"{format_duration(plan.seconds)}; if started now, done at {format_eta(plan.seconds)}",
        f"disk        {plan.checkpoints} checkpoints of {1000 * plan.checkpoint_gb:,.0f} MB at "
        f"once, {disk:.1f} GB; {plan.free_gb:,.0f} GB are free at {output}{short}",
    ]


def _predict(recipe: "Recipe", gpu: str, recompute: str) -> tuple[dict, list[str]]:
    """A prediction for a GPU that is not available: its figures, and as text."""
    from dataclasses import asdict

    from cspnet.plan.forecast import find_card, forecast
    from cspnet.recipe.eta import format_duration
    from cspnet.runtime.options import ACTIVATION_BUDGETS

    card = find_card(gpu)
    if recompute not in ACTIVATION_BUDGETS:
        raise RecipeError(f"--recompute {recompute}: must be {', '.join(ACTIVATION_BUDGETS)}")
    known = recipe.model.classes != "auto"
    classes = recipe.model.classes if isinstance(recipe.model.classes, int) else 1000
    prediction: Forecast = forecast(recipe, card, classes, recompute)
    size, low, high = recipe.data.image_size, *prediction.expected
    names = {"compiled": f"compiled, --recompute {recompute}", "eager": "eager, --no-compile"}
    fits = [
        f"{names[mode]} {mb:.1f} MB per image: "
        + (
            f"{prediction.fits[mode]} of {recipe.groups} groups"
            if prediction.fits[mode]
            else "no group"
        )
        + " at once"
        + (", counted" if mode == "eager" else "")
        for mode, mb in prediction.saved_mb.items()
    ]
    lines = [
        f"A PREDICTION for an NVIDIA {card.name} ({card.memory_gb:g} GB, {card.precision}, "
        f"{card.tflops:.1f} TFLOP/s, {card.gb_per_s:g} GB/s); nothing ran on it",
        f"activations {'; '.join(fits)} at {size}×{size}",
        f"memory      {prediction.fixed_gb:.2f} GB in addition: weights, gradients, momentum"
        + ", EMA" * bool(recipe.ema.decay)
        + f", workspace; {classes:,} classes"
        + ", assumed: set model.classes=N for another number" * (not known),
        f"images/s    {low:,.0f} to {high:,.0f} by the network, compiled; at most "
        f"{prediction.at_most:,.0f} by the data sheet",
        f"the run     {recipe.schedule.steps:,} steps of {recipe.batch}: "
        f"{format_duration(prediction.seconds[0])} to {format_duration(prediction.seconds[1])}, "
        "if the loader keeps up, without validations",
        f"disk        checkpoints of {1000 * prediction.checkpoint_gb:,.0f} MB",
        f"card        {card.source}",
    ]
    return asdict(prediction), lines
