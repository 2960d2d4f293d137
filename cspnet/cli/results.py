"""The commands of a trained net: `eval`, `predict`, `export`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cspnet.cli.options import (
    Batch,
    Checkpoint,
    ClassOrder,
    Device,
    Labels,
    Workers,
    facts,
    require_folder,
    write_text,
)
from cspnet.console import survive_lost_output, write_raw_names
from cspnet.display import printable
from cspnet.errors import Incomplete, RecipeError
from cspnet.schema import DIGITS


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
    labels: Labels = None,
    class_order: ClassOrder = None,
) -> None:
    """Top-1 and top-5 of a checkpoint: cspnet-eval --checkpoint best.pt --data data/imagenet/val"""
    from rich.console import Console
    from rich.progress import Progress

    from cspnet.data.sources import existing, open_validation
    from cspnet.evaluate import evaluate as score
    from cspnet.train.runtime import find_device, find_workers, precision_to_look
    from cspnet.train.world import find_world, joined
    from cspnet.trained import name_classes, open_trained

    if json_file:
        survive_lost_output()  # the file is what was asked for
    world = find_world()
    where = find_device(device, world)
    workers = find_workers(workers, where, world)
    require_folder("--json", json_file)
    if data != DIGITS:
        give = f"Give one with --data DIR; --data {DIGITS} needs none"
        existing(data, give)  # before a net is loaded for nothing
    trained = open_trained(checkpoint, labels=labels)
    recipe = trained.recipe
    # Inferred names give way to an order that the user knows.
    known = None if class_order and trained.inferred else trained.classes
    source = open_validation(data, known, trained.net.classes)
    trained = name_classes(trained, source.classes, checkpoint, class_order)
    precision = precision_to_look(recipe.precision, where)
    console = Console(soft_wrap=True, markup=False, highlight=False, quiet=not world.first)
    for line in facts(trained, precision):
        console.print(f"{printable(checkpoint)}: {line}")
    with (
        joined(world, where),
        Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("images", total=len(source))
        scores = score(
            trained.net.to(where),
            source,
            recipe,
            precision,
            workers,
            batch,
            progress=lambda images: bar.update(task, completed=images),
            world=world,
        )
    console.print(
        f"top-1 {scores.top1:.2f} %  top-5 {scores.top5:.2f} %  loss {scores.loss:.4f}  "
        f"{scores.images:,} images  {scores.images_per_second:,.0f} images/s"
    )
    if scores.unreadable:
        console.print(f"{scores.unreadable} images are unreadable, count as black", style="red")
    if json_file and world.first:
        content = {"checkpoint": str(checkpoint), "data": data, **scores.to_dict()}
        write_text(json_file, json.dumps(content, indent=2) + "\n")


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
    labels: Labels = None,
) -> None:
    """What is in these images? cspnet predict photo.jpg --checkpoint best.pt

    Results go to stdout, all else to stderr. Images that cannot be read are named there, and the
    exit code is then 1; those of the others are predicted.
    """
    from cspnet.data.sources import Files, find_images

    require_folder("--json", json_file)
    require_folder("--csv", csv_file)
    if json_file and json_file == csv_file:
        raise RecipeError(f"--json and --csv both go to {json_file}: name two files")
    files = Files(find_images(images))

    from rich.console import Console
    from rich.progress import Progress

    from cspnet.predict import predict as look_at
    from cspnet.predict import to_csv, to_json, to_table
    from cspnet.train.runtime import find_device, find_workers, precision_to_look
    from cspnet.trained import open_trained

    where = find_device(device)
    workers = find_workers(workers, where)
    trained = open_trained(checkpoint, labels=labels)
    precision = precision_to_look(trained.recipe.precision, where)
    trained.net.to(where)
    notes = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)
    shown = printable(checkpoint)
    for line in facts(trained, precision):
        notes.print(f"{shown}: {line}")
    if trained.classes is None:
        notes.print(
            f"{shown}: no class names; classes are shown by index. --labels FILE names them"
        )
    predictions = []
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as bar:
        found = look_at(trained, files, precision, workers, top, batch)
        for prediction in bar.track(found, total=len(files)):
            predictions.append(prediction)
            if prediction.error is not None:
                notes.print(printable(f"{prediction.file}: {prediction.error}"), style="red")
    write_raw_names()
    if json_file:
        write_text(json_file, to_json(predictions))
    if csv_file:
        write_text(csv_file, to_csv(predictions))
    if not (json_file or csv_file):
        # As wide as it comes: nothing is cut off, in a narrow terminal nor in a pipe.
        console = Console(soft_wrap=True, markup=False, highlight=False, width=100_000)
        console.print(to_table(predictions))
    unreadable = sum(prediction.error is not None for prediction in predictions)
    if unreadable:
        raise Incomplete(f"{unreadable} of {len(files)} images could not be read")


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
    labels: Labels = None,
) -> None:
    """Write a net for others: cspnet export --checkpoint best.pt --to cspdarknet53.weights"""
    from cspnet.export import export as write_net
    from cspnet.export import require_target
    from cspnet.trained import open_trained

    require_target(to, pyramid, cut)
    trained = open_trained(checkpoint, labels=labels)
    which = "the averaged weights" if trained.averaged else "the weights"
    remarks = [*trained.remarks, *write_net(trained, to, pyramid, cut)]
    print(f"{printable(str(to))}: {which} of {trained.net.name}, step {trained.step:,}")
    for remark in remarks:
        print(f"  {remark}")
