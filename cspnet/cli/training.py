"""The commands of training: `train` and, before it, `preview`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cspnet.cli.options import (
    ClassOrder,
    DataOption,
    Device,
    Labels,
    Overrides,
    RecipeName,
    Workers,
    is_rank_zero,
    max_restarts,
    plain_console,
    warning_console,
)
from cspnet.errors import RecipeError
from cspnet.run.folder import RunFolder
from cspnet.shell import command_line

if TYPE_CHECKING:
    from cspnet.inference.evaluate import Scores
    from cspnet.nets.network import Network
    from cspnet.recipe.schema import Recipe
    from cspnet.runtime.options import RunOptions
    from cspnet.train.setup import Run

Output = Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/RECIPE")]
MicroBatchOption = Annotated[
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
    Literal["none", "light", "full"],
    typer.Option(help="Activations to recompute in the backward pass, to save memory."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in the run folder, if there is one.")
]
MaxHours = Annotated[
    float | None,
    typer.Option(min=0, help="Save and exit with code 75 after this time.", show_default="none"),
]
StopOnFullDisk = Annotated[
    bool,
    typer.Option(
        "--stop-on-full-disk", help="Exit with code 75 if a save fails because the disk is full."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Resume even if the settings differ.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print only warnings, errors and the result.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved recipe and exit; write no files.")
]


def train_command(
    overrides: Overrides = None,
    recipe: Annotated[str | None, RecipeName] = None,
    data: DataOption = None,
    output: Output = None,
    resume: Resume = False,
    device: Device = "auto",
    workers: Workers = None,
    micro_batch: MicroBatchOption = None,
    compile: Compile = None,
    recompute: Recompute = "none",
    max_hours: MaxHours = None,
    stop_on_full_disk: StopOnFullDisk = False,
    force: Force = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
) -> None:
    """Train from a recipe: cspnet-train --recipe cspdarknet53-omega --data DIR [KEY=VALUE ...]"""
    from cspnet.console import tolerate_lost_output
    from cspnet.recipe.load import load_recipe, recipe_to_yaml

    if not dry_run:
        tolerate_lost_output()
    if max_restarts() and not resume:
        raise RecipeError("torchrun's --max-restarts needs --resume, to continue the run")
    file, data = _find_recipe(recipe, overrides or [], data, output, resume)
    resolved = load_recipe(file, overrides or [], data)
    text = f"# resolved recipe, from {file}\n{recipe_to_yaml(resolved)}"
    if dry_run:
        if is_rank_zero():
            print(text)
        return

    from cspnet.runtime.options import RunOptions
    from cspnet.train.micro_batch import parse_micro_batch

    options = RunOptions(
        output=output or Path("runs") / file.stem,
        resume=resume,
        device=device,
        workers=workers,
        micro_batch=parse_micro_batch(micro_batch),
        recompute=recompute,
        compile=compile,
        max_hours=max_hours,
        force=force,
        recipe_file=file,
        stop_on_full_disk=stop_on_full_disk,
    )
    _train(resolved, options, text, quiet)


def _find_recipe(
    name: str | None, overrides: list[str], data: str | None, output: Path | None, resume: bool
) -> tuple[Path, str | None]:
    """The recipe file, and the data root to set: that of --data, or of the run to resume."""
    from cspnet.recipe.load import find_recipe

    if name is not None:
        return find_recipe(name), data
    if not resume or output is None:
        raise RecipeError(
            "no recipe: give --recipe NAME (or --resume with the --output of an earlier run)"
        )
    folder = RunFolder(output)
    if not folder.is_run():
        reason = "is not a run folder: it has no recipe.yaml"
        raise RecipeError(
            f"--output {output} {reason if output.is_dir() else 'does not exist'}. Give the folder "
            "of an earlier run, or --recipe NAME to start one"
        )
    if data is None and not any(override.startswith("data.root=") for override in overrides):
        data = folder.recorded_data_root()
    return folder.recipe_file, data


def _train(recipe: "Recipe", options: "RunOptions", header: str, quiet: bool) -> None:
    """Train, and print the recipe before and the result after."""
    from cspnet.console import RunOutput
    from cspnet.train.loop import train

    console = plain_console()
    output = RunOutput(warning_console() if quiet else console)
    output.hold()  # so that an error during the setup of the run is printed alone
    output.print(header)
    scores = train(recipe, options, output)
    if is_rank_zero():
        for line in _result_lines(recipe, options.output, scores):
            print(line)


def _result_lines(recipe: "Recipe", output: Path, scores: "Scores | None") -> list[str]:
    """The result of a complete run, and the next commands."""
    best = RunFolder(output).best_checkpoint
    evaluate = command_line("cspnet-eval", "--checkpoint", best, "--data", recipe.data.root)
    return [
        f"done; last validation: top-1 {scores.top1:.2f} %" if scores else "done",
        *["best.pt is the best of several validations, selected on the same images"]
        * (recipe.schedule.steps > recipe.evaluate.every),
        f"evaluate: {evaluate}",
        f"report: {command_line('cspnet', 'report', output)}",
    ]


def preview_command(
    recipe: Annotated[str, RecipeName],
    overrides: Overrides = None,
    data: DataOption = None,
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("preview.png"),
    step: Annotated[int, typer.Option(min=0, help="Optimizer step to show.")] = 0,
    checkpoint: Annotated[
        str | None, typer.Option(help="Weights for the attack; untrained ones by default.")
    ] = None,
    device: Device = "auto",
    labels: Labels = None,
    class_order: ClassOrder = None,
) -> None:
    """Draw training images: cspnet preview --recipe cspdarknet53-omega --data DIR

    Draw the images of the first group of a step, each with its mixed label, before and after the
    attack if the recipe has one. Draw the schedules in a second picture in the same folder.
    """
    from rich.console import Console

    from cspnet.recipe.load import find_recipe, load_recipe
    from cspnet.report.files import require_png
    from cspnet.report.preview import render_sheet, save_schedule, write_png
    from cspnet.runtime.options import RunOptions
    from cspnet.sources.data_root import display_names
    from cspnet.train.setup import prepare
    from cspnet.train.step import TrainStep

    file = find_recipe(recipe)
    resolved = load_recipe(file, overrides or [], data)
    require_png(output)
    if step >= resolved.schedule.steps:
        raise RecipeError(f"--step {step:,}: the last one is {resolved.schedule.steps - 1:,}")
    options = RunOptions(output.parent, device=device, workers=0)
    run = prepare(resolved, options, Console(quiet=True), list_data=False)
    net, remarks = _preview_network(run, checkpoint, labels, class_order)
    title = f"{file.stem}, step {step:,}, group 0"
    if resolved.adversarial.step_size and not (checkpoint or resolved.model.init_from):
        title += "; attack with untrained weights, which has little effect"
    page = render_sheet(
        *TrainStep(run, net.to(run.hardware.device)).augmented_batch(step),
        display_names(run.train_set.classes),
        resolved.loss.label_smoothing,
        title,
    )
    schedule = output.with_name(f"{output.stem}-schedule.png")
    try:
        write_png(output, page)
        save_schedule(resolved, schedule)
    except OSError as error:
        raise RecipeError(f"--output {output} cannot be written: {error.strerror}") from None
    for remark in remarks:
        print(remark)
    print(f"{output} and {schedule} written")


def _preview_network(
    run: "Run",
    checkpoint: str | None,
    labels: Path | None,
    class_order: Literal["natural", "sorted"] | None,
) -> "tuple[Network, list[str]]":
    """The network of a checkpoint, or a new one for the recipe; and remarks about its weights."""
    from cspnet.sources.data_root import require_classes
    from cspnet.weights.labels import resolve_class_names
    from cspnet.weights.load import init_net, load_weights

    classes = run.train_set.classes
    if checkpoint is None:
        return init_net(run.recipe, classes)
    trained = load_weights(checkpoint, labels=labels)
    trained = resolve_class_names(trained, classes, checkpoint, class_order)
    require_classes(run.train_set, trained.classes or [], run.recipe.data.root)
    return trained.net, trained.remarks
