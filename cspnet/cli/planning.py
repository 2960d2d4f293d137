"""The commands `plan`, for before a run, and `status`, for during it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cspnet.cli.options import (
    DataOption,
    Device,
    Overrides,
    RecipeName,
    Workers,
    plain_console,
    require_writable,
    write_text,
)
from cspnet.cli.training import Compile, MicroBatchOption, Output, Recompute
from cspnet.errors import RecipeError

if TYPE_CHECKING:
    from cspnet.plan.forecast import Forecast
    from cspnet.plan.measure import Plan
    from cspnet.recipe.schema import Recipe
    from cspnet.runtime.options import RunOptions


def plan_command(
    recipe: Annotated[str, RecipeName],
    overrides: Overrides = None,
    data: DataOption = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Predict for a GPU that is not available: rtx2070, rtx3090, h100, ..."),
    ] = None,
    output: Output = None,
    device: Device = "auto",
    workers: Workers = None,
    micro_batch: MicroBatchOption = None,
    compile: Compile = None,
    recompute: Recompute = "none",
    seconds: Annotated[
        float, typer.Option(min=1, help="Seconds to measure each kind of step.")
    ] = 20.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file; - is stdout.")
    ] = None,
) -> None:
    """Measure memory, time and bottleneck of a run: cspnet plan --recipe cspdarknet53-omega

    Run some steps on this machine, in a temporary folder. With --gpu, predict instead from
    counted bytes and the data sheet of the card, without data and without running a step.
    """
    from cspnet.recipe.load import find_recipe, load_recipe

    require_writable("--json", json_file)
    file = find_recipe(recipe)
    resolved = load_recipe(file, overrides or [], data)
    if gpu:
        _require_not_given(
            {
                "--output": output,
                "--workers": workers,
                "--micro-batch": micro_batch,
                "--compile": compile,
                "--device": None if device == "auto" else device,
            }
        )
        content, lines = _predict(resolved, gpu, recompute)
    else:
        from cspnet.runtime.options import RunOptions
        from cspnet.train.micro_batch import parse_micro_batch

        options = RunOptions(
            output=output or Path("runs") / file.stem,
            device=device,
            workers=workers,
            micro_batch=parse_micro_batch(micro_batch),
            recompute=recompute,
            compile=compile,
        )
        content, lines = _measure(resolved, options, seconds)
    if str(json_file) != "-":
        print("\n".join(lines))
    if json_file:
        write_text(json_file, json.dumps(content, indent=2) + "\n")


def _require_not_given(options: dict[str, Any]) -> None:
    """Raise RecipeError if options are given that have no effect with --gpu."""
    given = [option for option, value in options.items() if value is not None]
    if given:
        raise RecipeError(f"--gpu predicts without running anything: omit {', '.join(given)}")


def _measure(recipe: "Recipe", options: "RunOptions", seconds: float) -> tuple[dict, list[str]]:
    """A measurement on this machine: its figures, and as text."""
    from cspnet.plan.measure import measure_plan

    stderr = plain_console(stderr=True)
    plan = measure_plan(
        recipe, options, seconds, lambda what: stderr.print(f"measuring: {what}", style="dim")
    )
    return plan.to_dict(), _plan_lines(recipe, plan, options.output)


def status_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
) -> None:
    """Show the progress of a run: cspnet status runs/cspdarknet53-omega

    Print step, throughput, time left, best top-1 and last save, from the run folder alone. The exit
    code is 0 if the run is running or complete, 75 if it was stopped after a save, and 1 if it
    failed or its process is gone.
    """
    from cspnet.report.status import describe_run, status_exit_code
    from cspnet.run.reader import read_run

    record = read_run(run)
    print("\n".join(describe_run(record)))
    raise typer.Exit(status_exit_code(record))


def _plan_lines(recipe: "Recipe", plan: "Plan", output: Path) -> list[str]:
    """The plan as text."""
    from cspnet.recipe.eta import format_duration, format_eta
    from cspnet.recipe.schedule import count_validations_and_saves

    owner = "machine" if plan.device == "cpu" else "device"
    peaks = ", ".join(f"{kind} {gb:.2f} GB" for kind, gb in plan.memory_gb.items())
    validations, saves = count_validations_and_saves(recipe)
    steps = ", ".join(f"{seconds:.3g} s at {s}×{s}" for s, seconds in plan.step_seconds.items())
    attack = f"; up to {plan.attack_seconds:.3g} s more with the attack" * bool(plan.attack_seconds)
    disk_gb = plan.checkpoints * plan.checkpoint_gb
    shortage = "" if disk_gb < plan.free_gb else ": NOT ENOUGH SPACE"
    return [
        f"measured on {plan.device}, {plan.precision}, {plan.workers} workers",
        *(f"network     {line}" for line in plan.network),
        f"peak memory {peaks}; the {owner} has {plan.available_gb:.1f} GB",
        f"throughput  {plan.both_rate:,.1f} images/s; network alone {plan.net_rate:,.1f}, "
        f"dataloader alone {plan.loader_rate:,.1f}",
        f"bottleneck  {plan.bottleneck}; {plan.advice}",
        f"step        {recipe.batch} images, {steps}{attack}",
        f"run         {recipe.schedule.steps:,} steps; validations: {validations:,} of "
        f"{format_duration(plan.validation_seconds)}; saves: {saves:,} of "
        f"{format_duration(plan.save_seconds)}; total {format_duration(plan.seconds)}, until "
        f"{format_eta(plan.seconds)} if started now",
        f"disk        up to {plan.checkpoints} checkpoints of {1000 * plan.checkpoint_gb:,.0f} MB, "
        f"{disk_gb:.1f} GB; {plan.free_gb:,.0f} GB free at {output}{shortage}",
    ]


def _predict(recipe: "Recipe", gpu: str, recompute: str) -> tuple[dict, list[str]]:
    """A prediction for a GPU that is not available: its figures, and as text."""
    from dataclasses import asdict

    from cspnet.plan.forecast import find_card, forecast

    card = find_card(gpu)
    classes = recipe.model.classes if isinstance(recipe.model.classes, int) else 1000
    prediction: Forecast = forecast(recipe, card, classes, recompute)
    return asdict(prediction), _prediction_lines(recipe, prediction, classes, recompute)


def _prediction_lines(
    recipe: "Recipe", prediction: "Forecast", classes: int, recompute: str
) -> list[str]:
    """The prediction as text."""
    from cspnet.recipe.eta import format_duration

    card, size = prediction.card, recipe.data.image_size
    low, high = prediction.expected
    shortest, longest = (format_duration(seconds) for seconds in prediction.seconds)
    modes = {"compiled": f"compiled, --recompute {recompute}", "eager": "eager, --no-compile"}
    activations = [
        f"{modes[mode]}: {mb:.1f} MB per image, "
        + (
            f"micro-batches of up to {prediction.fits[mode] * recipe.group} images"
            if prediction.fits[mode]
            else f"NOT EVEN ONE GROUP of {recipe.group} images fits"
        )
        for mode, mb in prediction.saved_mb.items()
    ]
    assumed = ", assumed: model.classes=N sets it" * (recipe.model.classes == "auto")
    return [
        f"prediction for an NVIDIA {card.name} ({card.memory_gb:g} GB, {card.precision}, "
        f"{card.tflops:.1f} TFLOP/s, {card.gb_per_s:g} GB/s), not a measurement",
        f"activations at {size}×{size}, {'; '.join(activations)}",
        f"memory      {prediction.fixed_gb:.2f} GB for weights, gradients, momentum"
        + ", EMA" * bool(recipe.ema.decay)
        + f" and workspace, with {classes:,} classes{assumed}",
        f"throughput  {low:,.0f} to {high:,.0f} images/s, compiled; limit by the data sheet "
        f"{prediction.at_most:,.0f}",
        f"run         {recipe.schedule.steps:,} steps of {recipe.batch} images: {shortest} to "
        f"{longest}, without validations, if the dataloader keeps up",
        f"disk        {1000 * prediction.checkpoint_gb:,.0f} MB per checkpoint",
        f"source      {card.source}",
    ]
