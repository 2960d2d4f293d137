"""The commands. A command is a function; its errors end here, as one message and an exit code.

torch is imported inside the commands: `--help` answers at once.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cspnet.errors import CspnetError, RecipeError, Stopped

Checkpoint = Annotated[
    str,
    typer.Option(
        help="Weights: .pt of a run, .safetensors, .pth, .weights with its .cfg, or timm:NAME.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...", help="Overrides of the recipe.", show_default=False
    ),
]
DataRoot = Annotated[
    str | None,
    typer.Option(help="Folder with train/ and val/, or `digits`; same as data.root=DIR."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Workers = Annotated[
    int | None,
    typer.Option("--workers", "-j", help="Processes that decode images.", show_default="auto"),
]


def train(
    overrides: Overrides = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", "-c", help="Recipe: a path, or the name of a shipped one."),
    ] = None,
    data: DataRoot = None,
    output: Annotated[
        Path | None, typer.Option(help="Run folder.", show_default="runs/RECIPE")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue what is in the run folder.")
    ] = False,
    device: Device = "auto",
    workers: Workers = None,
    passes: Annotated[
        int | None, typer.Option(help="Groups through the net at once.", show_default="1")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile the net.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Print the resolved recipe and touch nothing.")
    ] = False,
) -> None:
    """Train by a recipe: cspnet-train --recipe cspdarknet53 --data DIR [schedule.steps=1000 …]"""
    from cspnet import recipe as recipes

    if recipe is not None:
        path = recipes.find(recipe)
    elif resume and output and (output / "recipe.yaml").is_file():
        path = output / "recipe.yaml"  # the run's own
    else:
        raise RecipeError(
            "no recipe: give --recipe NAME (or --resume with the --output of an earlier run)"
        )
    resolved = recipes.load(path, overrides or [], data)
    print(f"# resolved recipe, from {path}\n{recipes.to_text(resolved)}", flush=True)
    if check:
        return

    from rich.console import Console

    from cspnet.train.loop import train as run
    from cspnet.train.runtime import Place

    place = Place(
        output=output or Path("runs") / path.stem,
        resume=resume,
        device=device,
        workers=workers,
        passes=passes,
        compile=compile,
    )
    run(resolved, place, Console(soft_wrap=True, markup=False, highlight=False))
    best = place.output / "checkpoints" / "best.pt"
    print(f"done; evaluate: cspnet-eval --checkpoint {best} --data {resolved.data.root}")


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        str, typer.Option(help="Data root or its val folder, or `digits`.", show_default=False)
    ],
    device: Device = "auto",
    workers: Workers = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images at once.", show_default="the recipe's")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the scores to this file.")
    ] = None,
) -> None:
    """Top-1 and top-5 of a checkpoint: cspnet-eval --checkpoint best.pt --data data/imagenet/val"""
    from rich.console import Console
    from rich.progress import Progress

    from cspnet.data.sources import open_validation
    from cspnet.evaluate import evaluate as score
    from cspnet.train.runtime import find_device, find_precision, find_workers
    from cspnet.trained import open_trained

    where = find_device(device)
    if json_file and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise RecipeError(f"--json {json_file}: must be a file in a folder that exists")
    trained = open_trained(checkpoint)
    recipe = trained.recipe
    source = open_validation(data, trained.classes, trained.net.classes)
    precision = find_precision(recipe.precision, where)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    size, how = recipe.data.size, recipe.evaluate
    for remark in trained.remarks:
        console.print(f"{checkpoint}: {remark}")
    console.print(
        f"{checkpoint}: {recipe.model.name}, step {trained.step:,}, "
        f"{'averaged' if trained.averaged else 'raw'} weights; as it was trained for: "
        f"view {size}x{size}, crop {how.crop:g}, resize {how.resize}, "
        f"normalize {recipe.data.normalize}; {precision.name}"
    )
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=len(source))
        scores = score(
            trained.net.to(where),
            source,
            recipe,
            precision,
            find_workers(workers, where),
            batch,
            progress=lambda images: bar.update(task, completed=images),
        )
    console.print(
        f"top-1 {scores.top1:.2f} %  top-5 {scores.top5:.2f} %  loss {scores.loss:.4f}  "
        f"{scores.images:,} images  {scores.images_per_second:,.0f} images/s"
    )
    if scores.unreadable:
        console.print(f"{scores.unreadable} images are unreadable, count as black", style="red")
    if json_file:
        content = {"checkpoint": str(checkpoint), "data": data, **scores.to_dict()}
        json_file.write_text(json.dumps(content, indent=2) + "\n")


def preview(
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", "-c", help="Recipe: a path, or a shipped one's name.")
    ],
    overrides: Overrides = None,
    data: DataRoot = None,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("preview.png"),
    step: Annotated[int, typer.Option(min=0, help="Optimizer step to show.")] = 0,
    checkpoint: Annotated[
        str | None, typer.Option(help="Weights for the attack; fresh ones otherwise.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Draw what the net gets: cspnet preview --recipe cspdarknet53 --data DIR --out preview.png

    The very images of the step's first group, each with its label mixture; rows before and after
    the attack, where the recipe has one; and the schedules, in a second picture beside it.
    """
    from rich.console import Console

    from cspnet import recipe as recipes
    from cspnet.data.sources import display_names, require_classes
    from cspnet.report.preview import draw_schedule, sheet, write_png
    from cspnet.train.job import prepare
    from cspnet.train.loop import look
    from cspnet.train.runtime import Place
    from cspnet.trained import build_net, open_trained

    path = recipes.find(recipe)
    resolved = recipes.load(path, overrides or [], data)
    if out.suffix.lower() != ".png" or not out.absolute().parent.is_dir():
        raise RecipeError(f"--out {out}: must be a .png file in a folder that exists")
    if step >= resolved.schedule.steps:
        raise RecipeError(f"--step {step:,}: the last one is {resolved.schedule.steps - 1:,}")
    job = prepare(resolved, Place(out.parent, device=device, workers=0), Console(quiet=True))
    classes = job.training.classes
    if checkpoint:
        trained = open_trained(checkpoint)
        require_classes(job.training, trained.classes or classes, resolved.data.root)
        net = trained.net
    else:
        net = build_net(resolved, len(classes))
    page = sheet(
        *look(job, net.to(job.device), step),
        display_names(classes),
        resolved.loss.smoothing,
        f"{path.stem}, step {step:,}, group 0: what the net gets"
        + ("" if checkpoint else "; the attack by fresh weights, which hardly know where to push")
        * bool(resolved.adversarial.strength),
    )
    write_png(out, page)
    schedule = out.with_name(f"{out.stem}-schedule.png")
    draw_schedule(resolved, schedule)
    print(f"{out} and {schedule} written")


def export(
    checkpoint: Checkpoint,
    to: Annotated[
        Path,
        typer.Option(help="File to write: .safetensors, .onnx or .weights.", show_default=False),
    ],
    pyramid: Annotated[
        bool, typer.Option("--pyramid", help=".onnx of the three detector maps, not the logits.")
    ] = False,
    cut: Annotated[
        int | None,
        typer.Option(help=".weights of the first N layers only: a backbone file.", metavar="N"),
    ] = None,
) -> None:
    """Write a net for others: cspnet export --checkpoint best.pt --to cspdarknet53.weights"""
    from cspnet.export import export as write
    from cspnet.trained import open_trained

    trained = open_trained(checkpoint)
    which = "the averaged weights" if trained.averaged else "the weights"
    remarks = [*trained.remarks, *write(trained, to, pyramid, cut)]
    print(f"{to}: {which} of {trained.net.name}, step {trained.step:,}")
    for remark in remarks:
        print(f"  {remark}")


def _app(*commands: tuple[str, object]) -> typer.Typer:
    app = typer.Typer(
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Train CSPDarknet53 by a recipe, and hand on the result.",
    )
    for name, command in commands:
        app.command(name, no_args_is_help=True)(command)
    return app


def _run(app: typer.Typer) -> None:
    """Runs the command line; a CspnetError becomes one message on stderr and its exit code."""
    try:
        app()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except CspnetError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `cspnet … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def main() -> None:
    """The command `cspnet`."""
    _run(_app(("train", train), ("eval", evaluate), ("preview", preview), ("export", export)))


def main_train() -> None:
    """The command `cspnet-train`."""
    _run(_app(("train", train)))


def main_eval() -> None:
    """The command `cspnet-eval`."""
    _run(_app(("eval", evaluate)))
