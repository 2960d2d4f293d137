"""The commands of training: `train` and, before it, `preview`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cspnet.cli.options import (
    ClassOrder,
    DataRoot,
    Device,
    Labels,
    Overrides,
    RecipeName,
    Workers,
    complete_recompute,
    is_rank_zero,
    max_restarts,
    warning_console,
)
from cspnet.errors import RecipeError
from cspnet.run.folder import RunFolder
from cspnet.shell import command_line

if TYPE_CHECKING:
    from cspnet.inference.evaluate import Scores
    from cspnet.recipe.schema import Recipe

Output = Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/RECIPE")]
MicroBatch = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="Images per forward pass, a multiple of `group`; auto: as many as fit into memory.",
        show_default="auto on a GPU, else one group",
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the network with torch.compile.",
        show_default="on a GPU",
    ),
]
Recompute = Annotated[
    str,
    typer.Option(
        help="Activations to recompute in the backward pass, to save memory: none, light, full.",
        autocompletion=complete_recompute,
    ),
]


def train_command(
    overrides: Overrides = None,
    recipe: Annotated[str | None, RecipeName] = None,
    data: DataRoot = None,
    output: Output = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue what is in the run folder.")
    ] = False,
    device: Device = "auto",
    workers: Workers = None,
    micro_batch: MicroBatch = None,
    compile: Compile = None,
    recompute: Recompute = "none",
    max_hours: Annotated[
        float | None,
        typer.Option(min=0, help="Save and exit with 75 after so long.", show_default="none"),
    ] = None,
    stop_on_full_disk: Annotated[
        bool, typer.Option("--stop-on-full-disk", help="Exit with 75 when the disk is full.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Resume although the settings differ.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Tell only what is wrong, and the end.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and exit.")
    ] = False,
) -> None:
    """Train by a recipe: cspnet-train --recipe cspdarknet53-omega --data DIR [KEY=VALUE ...]"""
    from cspnet.console import tolerate_lost_output
    from cspnet.recipe import load as recipes

    if not dry_run:
        tolerate_lost_output()
    if max_restarts() and not resume:
        raise RecipeError("torchrun's --max-restarts needs --resume, to go on with the run")
    if recipe is not None:
        path = recipes.find_recipe(recipe)
    elif resume and output and RunFolder(output).is_run():
        path = RunFolder(output).recipe_file
        given = any(override.startswith("data.root=") for override in overrides or [])
        if data is None and not given:
            data = RunFolder(output).recorded_data_root()
    elif resume and output:
        what = "is not a run folder: it has no recipe.yaml" if output.is_dir() else "is no folder"
        raise RecipeError(
            f"--output {output} {what}. Give the folder of an earlier run, or --recipe NAME to "
            "start one"
        )
    else:
        raise RecipeError(
            "no recipe: give --recipe NAME (or --resume with the --output of an earlier run)"
        )
    resolved = recipes.load_recipe(path, overrides or [], data)
    text = f"# resolved recipe, from {path}\n{recipes.recipe_to_yaml(resolved)}"
    if dry_run:
        if is_rank_zero():
            print(text)
        return

    from rich.console import Console

    from cspnet.console import RunOutput
    from cspnet.runtime.options import RunOptions
    from cspnet.train.loop import train as run
    from cspnet.train.micro_batch import parse_micro_batch

    options = RunOptions(
        output=output or Path("runs") / path.stem,
        resume=resume,
        device=device,
        workers=workers,
        micro_batch=parse_micro_batch(micro_batch),
        recompute=recompute,
        compile=compile,
        max_hours=max_hours,
        force=force,
        recipe_file=path,
        stop_on_full_disk=stop_on_full_disk,
    )
    console = Console(soft_wrap=True, markup=False, highlight=False)
    run_output = RunOutput(warning_console() if quiet else console)
    run_output.hold()  # an error that is found while the run is set up is printed alone
    run_output.print(text)
    scores = run(resolved, options, run_output)
    if is_rank_zero():
        for line in _done(resolved, options.output, scores):
            print(line)


def _done(recipe: "Recipe", output: Path, scores: "Scores | None") -> list[str]:
    """The result of a run that is complete, and what to do with it."""
    best = RunFolder(output).best_checkpoint
    evaluate = command_line("cspnet-eval", "--checkpoint", best, "--data", recipe.data.root)
    return [
        f"done; last validation: top-1 {scores.top1:.2f} %" if scores else "done",
        *["best.pt is the best of several validations, selected on the same images"]
        * (recipe.schedule.steps > recipe.evaluate.every),
        f"evaluate: {evaluate}",
        f"a page about it: {command_line('cspnet', 'report', output)}",
    ]


def preview_command(
    recipe: Annotated[str, RecipeName],
    overrides: Overrides = None,
    data: DataRoot = None,
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("preview.png"),
    step: Annotated[int, typer.Option(min=0, help="Optimizer step to show.")] = 0,
    checkpoint: Annotated[
        str | None, typer.Option(help="Weights for the attack; fresh ones otherwise.")
    ] = None,
    device: Device = "auto",
    labels: Labels = None,
    class_order: ClassOrder = None,
) -> None:
    """Draw what the net gets: cspnet preview --recipe cspdarknet53-omega --data DIR

    The very images of the step's first group, each with its label mixture; rows before and after
    the attack, where the recipe has one; and the schedules, in a second picture beside it.
    """
    from rich.console import Console

    from cspnet.recipe import load as recipes
    from cspnet.report.files import require_png
    from cspnet.report.preview import render_sheet, save_schedule, write_png
    from cspnet.runtime.options import RunOptions
    from cspnet.sources.data_root import display_names, require_classes
    from cspnet.train.setup import prepare
    from cspnet.train.step import TrainStep
    from cspnet.weights.load import init_net, load_weights, resolve_class_names

    path = recipes.find_recipe(recipe)
    resolved = recipes.load_recipe(path, overrides or [], data)
    require_png(output)
    if step >= resolved.schedule.steps:
        raise RecipeError(f"--step {step:,}: the last one is {resolved.schedule.steps - 1:,}")
    options = RunOptions(output.parent, device=device, workers=0)
    run = prepare(resolved, options, Console(quiet=True), list_data=False)
    classes = run.train_set.classes
    if checkpoint:
        trained = load_weights(checkpoint, labels=labels)
        trained = resolve_class_names(trained, classes, checkpoint, class_order)
        require_classes(run.train_set, trained.classes or [], resolved.data.root)
        net = trained.net
    else:
        net, told = init_net(resolved, classes)
    page = render_sheet(
        *TrainStep(run, net.to(run.hardware.device)).augmented_batch(step),
        display_names(classes),
        resolved.loss.label_smoothing,
        f"{path.stem}, step {step:,}, group 0: what the net gets"
        + (
            ""
            if checkpoint or resolved.model.init_from
            else "; the attack by fresh weights, which hardly know where to push"
        )
        * bool(resolved.adversarial.step_size),
    )
    schedule = output.with_name(f"{output.stem}-schedule.png")
    try:
        write_png(output, page)
        save_schedule(resolved, schedule)
    except OSError as error:
        raise RecipeError(f"--output {output} cannot be written: {error.strerror}") from None
    for remark in trained.remarks if checkpoint else told:
        print(remark)
    print(f"{output} and {schedule} written")
