"""The commands. A command is a function; its errors end here, as one message and an exit code.

torch is imported inside the commands: `--help` answers at once.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cspnet.errors import CspnetError, Incomplete, RecipeError, Stopped

if TYPE_CHECKING:
    from cspnet.train.runtime import Precision
    from cspnet.trained import Trained

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
Batch = Annotated[
    int | None, typer.Option(min=1, help="Images at once.", show_default="the recipe's")
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
    batch: Batch = None,
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
    from cspnet.trained import open_trained, require_order

    where = find_device(device)
    _require_folder("--json", json_file)
    trained = open_trained(checkpoint)
    recipe = trained.recipe
    require_order(trained, checkpoint)
    source = open_validation(data, trained.classes, trained.net.classes)
    precision = find_precision(recipe.precision, where)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    for line in _facts(trained, precision):
        console.print(f"{checkpoint}: {line}")
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


def predict(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES",
            help="Files, and folders to search for images.",
            show_default=False,
        ),
    ],
    checkpoint: Checkpoint,
    top: Annotated[int, typer.Option(min=1, help="Classes to name per image.")] = 5,
    device: Device = "auto",
    workers: Workers = None,
    batch: Batch = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write JSON to this file; - is stdout.")
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write CSV to this file; - is stdout.")
    ] = None,
) -> None:
    """What is in these images? cspnet predict photo.jpg --checkpoint best.pt

    Results go to stdout, all else to stderr. Images that cannot be read are named there, and the
    exit code is then 1; those of the others are predicted.
    """
    from cspnet.data.sources import Files, find_images

    _require_folder("--json", json_file)
    _require_folder("--csv", csv_file)
    if json_file and json_file == csv_file:
        raise RecipeError(f"--json and --csv both go to {json_file}: name two files")
    files = Files(find_images(images))

    from rich.console import Console
    from rich.progress import Progress

    from cspnet.predict import predict as look_at
    from cspnet.predict import to_csv, to_json, to_table
    from cspnet.train.runtime import find_device, find_precision, find_workers
    from cspnet.trained import open_trained

    where = find_device(device)
    workers = find_workers(workers, where)
    trained = open_trained(checkpoint)
    precision = find_precision(trained.recipe.precision, where)
    trained.net.to(where)
    notes = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)
    for line in _facts(trained, precision):
        notes.print(f"{checkpoint}: {line}")
    predictions = []
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as bar:
        found = look_at(trained, files, precision, workers, top, batch)
        for prediction in bar.track(found, total=len(files)):
            predictions.append(prediction)
            if prediction.error is not None:
                notes.print(f"{prediction.file}: {prediction.error}", style="red")
    sys.stdout.reconfigure(errors="surrogateescape")  # a file's name may be any bytes
    if json_file:
        _write(json_file, to_json(predictions))
    if csv_file:
        _write(csv_file, to_csv(predictions))
    if not (json_file or csv_file):
        # As wide as it comes: nothing is cut off, in a narrow terminal nor in a pipe.
        console = Console(soft_wrap=True, markup=False, highlight=False, width=100_000)
        console.print(to_table(predictions))
    unreadable = sum(prediction.error is not None for prediction in predictions)
    if unreadable:
        raise Incomplete(f"{unreadable} of {len(files)} images could not be read")


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
    from cspnet.trained import open_trained, starting_net

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
        net, _ = starting_net(resolved, classes)
    page = sheet(
        *look(job, net.to(job.device), step),
        display_names(classes),
        resolved.loss.smoothing,
        f"{path.stem}, step {step:,}, group 0: what the net gets"
        + (
            ""
            if checkpoint or resolved.model.weights
            else "; the attack by fresh weights, which hardly know where to push"
        )
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


def _facts(trained: "Trained", precision: "Precision") -> list[str]:
    """What a net is, and how its images are prepared, in lines for people."""
    recipe, how = trained.recipe, trained.recipe.evaluate
    return [
        *trained.remarks,
        f"{recipe.model.name}, step {trained.step:,}, "
        f"{'averaged' if trained.averaged else 'raw'} weights; as it was trained for: "
        f"view {recipe.data.size}x{recipe.data.size}, crop {how.crop:g}, resize {how.resize}, "
        f"normalize {recipe.data.normalize}; {precision.name}",
    ]


def _require_folder(option: str, file: Path | None) -> None:
    """Raises RecipeError unless the file of an option can be in its folder."""
    if file and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise RecipeError(f"{option} {file}: must be a file in a folder that exists")


def _write(file: Path, text: str) -> None:
    """Writes UTF-8 to a file, or text to stdout for `-`."""
    if str(file) == "-":
        print(text, end="")
        return
    try:
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise RecipeError(f"{file} cannot be written: {error.strerror}") from None


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
    _run(
        _app(
            ("train", train),
            ("eval", evaluate),
            ("predict", predict),
            ("preview", preview),
            ("export", export),
        )
    )


def main_train() -> None:
    """The command `cspnet-train`."""
    _run(_app(("train", train)))


def main_eval() -> None:
    """The command `cspnet-eval`."""
    _run(_app(("eval", evaluate)))
