"""The commands of a trained net: `eval`, `predict`, `export`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cspnet.cli.options import (
    BatchSize,
    Checkpoint,
    ClassOrder,
    Device,
    Labels,
    Workers,
    describe_network,
    require_writable,
    write_text,
)
from cspnet.console import allow_raw_bytes_on_stdout, tolerate_lost_output
from cspnet.errors import PartialResultError, RecipeError
from cspnet.recipe.schema import DIGITS
from cspnet.text import printable


def eval_command(
    checkpoint: Checkpoint,
    data: Annotated[
        str, typer.Option(help="Data root or its val folder, or `digits`.", show_default=False)
    ],
    device: Device = "auto",
    workers: Workers = None,
    batch: BatchSize = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the scores to this file.")
    ] = None,
    labels: Labels = None,
    class_order: ClassOrder = None,
) -> None:
    """Top-1 and top-5 of a checkpoint: cspnet-eval --checkpoint best.pt --data data/imagenet/val"""
    from rich.console import Console
    from rich.progress import Progress

    from cspnet.inference.evaluate import evaluate_network as score
    from cspnet.runtime.device import choose_workers, inference_precision, setup_device
    from cspnet.runtime.distributed import find_processes, process_group
    from cspnet.sources.data_root import open_validation, require_data_folder
    from cspnet.weights.load import load_weights, resolve_class_names

    if json_file:
        tolerate_lost_output()  # the file is what was asked for
    world = find_processes()
    where = setup_device(device, world)
    workers = choose_workers(workers, where, world)
    require_writable("--json", json_file)
    if data != DIGITS:
        give = f"Give one with --data DIR; --data {DIGITS} needs none"
        require_data_folder(data, give)  # before a net is loaded for nothing
    trained = load_weights(checkpoint, labels=labels)
    recipe = trained.recipe
    # Inferred names give way to an order that the user knows.
    known = None if class_order and trained.inferred else trained.classes
    source = open_validation(data, known, trained.net.classes)
    trained = resolve_class_names(trained, source.classes, checkpoint, class_order)
    precision = inference_precision(recipe.precision, where)
    console = Console(soft_wrap=True, markup=False, highlight=False, quiet=not world.first)
    for line in describe_network(trained, precision):
        console.print(f"{printable(checkpoint)}: {line}")
    with (
        process_group(world, where),
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


def predict_command(
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
    batch: BatchSize = None,
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
    from cspnet.sources.data_root import Files, find_images

    require_writable("--json", json_file)
    require_writable("--csv", csv_file)
    if json_file and json_file == csv_file:
        raise RecipeError(f"--json and --csv both go to {json_file}: name two files")
    files = Files(find_images(images))

    from rich.console import Console
    from rich.progress import Progress

    from cspnet.inference.predict import predict_files as look_at
    from cspnet.inference.predict import (
        predictions_to_csv,
        predictions_to_json,
        predictions_to_table,
    )
    from cspnet.runtime.device import choose_workers, inference_precision, setup_device
    from cspnet.weights.load import load_weights

    where = setup_device(device)
    workers = choose_workers(workers, where)
    trained = load_weights(checkpoint, labels=labels)
    precision = inference_precision(trained.recipe.precision, where)
    trained.net.to(where)
    notes = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)
    shown = printable(checkpoint)
    for line in describe_network(trained, precision):
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
    allow_raw_bytes_on_stdout()
    if json_file:
        write_text(json_file, predictions_to_json(predictions))
    if csv_file:
        write_text(csv_file, predictions_to_csv(predictions))
    if not (json_file or csv_file):
        # As wide as it comes: nothing is cut off, in a narrow terminal nor in a pipe.
        console = Console(soft_wrap=True, markup=False, highlight=False, width=100_000)
        console.print(predictions_to_table(predictions))
    unreadable = sum(prediction.error is not None for prediction in predictions)
    if unreadable:
        raise PartialResultError(f"{unreadable} of {len(files)} images could not be read")


def export_command(
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
    from cspnet.weights.export import check_export_target
    from cspnet.weights.export import export_network as write_net
    from cspnet.weights.load import load_weights

    check_export_target(to, pyramid, cut)
    trained = load_weights(checkpoint, labels=labels)
    which = "the averaged weights" if trained.averaged else "the weights"
    remarks = [*trained.remarks, *write_net(trained, to, pyramid, cut)]
    print(f"{printable(str(to))}: {which} of {trained.net.name}, step {trained.step:,}")
    for remark in remarks:
        print(f"  {remark}")
