"""Commands for a trained network: `eval`, `predict`, `export`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cspnet.cli.options import (
    BatchSize,
    Checkpoint,
    ClassOrder,
    Device,
    Labels,
    Workers,
    describe_network,
    plain_console,
    progress_bar,
    require_writable,
    write_text,
)
from cspnet.console import allow_raw_bytes_on_stdout, tolerate_lost_output
from cspnet.errors import PartialResultError, RecipeError
from cspnet.recipe.schema import DIGITS
from cspnet.text import printable

if TYPE_CHECKING:
    from rich.console import Console

    from cspnet.inference.evaluate import Scores
    from cspnet.inference.predict import Prediction


def eval_command(
    checkpoint: Checkpoint,
    data: Annotated[
        str, typer.Option(help="Data root, its val folder, or `digits`.", show_default=False)
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
    """Report top-1 and top-5 accuracy: cspnet-eval --checkpoint best.pt --data data/imagenet/val"""
    from cspnet.inference.evaluate import evaluate_network
    from cspnet.runtime.device import choose_workers, inference_precision, setup_device
    from cspnet.runtime.distributed import find_processes, process_group
    from cspnet.sources.data_root import open_validation, require_data_folder
    from cspnet.weights.labels import resolve_class_names
    from cspnet.weights.load import load_weights

    if json_file:
        tolerate_lost_output()  # the scores are still written to the file
    processes = find_processes()
    torch_device = setup_device(device, processes)
    workers = choose_workers(workers, torch_device, processes)
    require_writable("--json", json_file)
    if data != DIGITS:
        give = f"Give one with --data DIR; --data {DIGITS} needs none"
        require_data_folder(data, give)  # fail before the weights are loaded
    trained = load_weights(checkpoint, labels=labels)
    # --class-order overrides class names that were only inferred.
    known = None if class_order and trained.inferred else trained.classes
    source = open_validation(data, known, trained.net.classes)
    trained = resolve_class_names(trained, source.classes, checkpoint, class_order)
    precision = inference_precision(trained.recipe.precision, torch_device)
    console = plain_console(quiet=not processes.is_main)
    for line in describe_network(trained, precision):
        console.print(f"{printable(checkpoint)}: {line}")
    with (
        process_group(processes, torch_device),
        progress_bar(console, "images") as progress,
    ):
        scores = evaluate_network(
            trained.net.to(torch_device),
            source,
            trained.recipe,
            precision,
            workers,
            batch,
            progress=lambda done: progress(done, len(source)),
            processes=processes,
        )
    _print_scores(scores, console)
    if json_file and processes.is_main:
        content = {"checkpoint": str(checkpoint), "data": data, **scores.to_dict()}
        write_text(json_file, json.dumps(content, indent=2) + "\n")


def _print_scores(scores: "Scores", console: "Console") -> None:
    console.print(
        f"top-1 {scores.top1:.2f} %  top-5 {scores.top5:.2f} %  loss {scores.loss:.4f}  "
        f"{scores.images:,} images  {scores.images_per_second:,.0f} images/s"
    )
    if scores.unreadable:
        console.print(
            f"{scores.unreadable} images are unreadable and were evaluated as black", style="red"
        )


def predict_command(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES",
            help="Image files, or folders to search for images.",
            show_default=False,
        ),
    ],
    checkpoint: Checkpoint,
    top: Annotated[int, typer.Option(min=1, help="Number of classes per image.")] = 5,
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
    """Classify images: cspnet predict photo.jpg --checkpoint best.pt

    Results go to stdout, messages to stderr. Images that cannot be read are listed on stderr, and
    the exit code is 1; all other images are classified.
    """
    from cspnet.sources.folder import Files, find_images

    require_writable("--json", json_file)
    require_writable("--csv", csv_file)
    if json_file and json_file == csv_file:
        raise RecipeError(f"--json and --csv name the same file {json_file}: use two files")
    files = Files(find_images(images))

    from cspnet.inference.predict import predict_files
    from cspnet.runtime.device import choose_workers, inference_precision, setup_device
    from cspnet.weights.load import load_weights

    torch_device = setup_device(device)
    workers = choose_workers(workers, torch_device)
    trained = load_weights(checkpoint, labels=labels)
    precision = inference_precision(trained.recipe.precision, torch_device)
    trained.net.to(torch_device)
    stderr = plain_console(stderr=True)
    shown = printable(checkpoint)
    for line in describe_network(trained, precision):
        stderr.print(f"{shown}: {line}")
    if trained.classes is None:
        stderr.print(
            f"{shown}: no class names, showing class indices. Name them with --labels FILE"
        )
    results = predict_files(trained, files, precision, workers, top, batch)
    predictions = _collect(results, len(files), stderr)
    _write_predictions(predictions, json_file, csv_file)
    unreadable = sum(prediction.error is not None for prediction in predictions)
    if unreadable:
        raise PartialResultError(f"{unreadable} of {len(files)} images could not be read")


def _collect(results: "Iterable[Prediction]", total: int, stderr: "Console") -> "list[Prediction]":
    """All predictions, with a progress bar; errors are printed as they occur."""
    predictions = []
    with progress_bar(stderr, "images") as progress:
        for prediction in results:
            predictions.append(prediction)
            progress(len(predictions), total)
            if prediction.error is not None:
                stderr.print(printable(f"{prediction.file}: {prediction.error}"), style="red")
    return predictions


def _write_predictions(
    predictions: "list[Prediction]", json_file: Path | None, csv_file: Path | None
) -> None:
    """Write predictions to the given files, or as a table to stdout."""
    from cspnet.inference.predict import (
        predictions_to_csv,
        predictions_to_json,
        predictions_to_table,
    )

    allow_raw_bytes_on_stdout()
    if json_file:
        write_text(json_file, predictions_to_json(predictions))
    if csv_file:
        write_text(csv_file, predictions_to_csv(predictions))
    if not (json_file or csv_file):
        # Unlimited width: rich must not truncate cells in a narrow terminal or a pipe.
        plain_console(width=100_000).print(predictions_to_table(predictions))


def export_command(
    checkpoint: Checkpoint,
    output: Annotated[
        Path,
        typer.Option(help="Output file: .safetensors, .onnx or .weights.", show_default=False),
    ],
    pyramid: Annotated[
        bool,
        typer.Option("--pyramid", help="Export the three feature maps of a detector (.onnx only)."),
    ] = False,
    first_layers: Annotated[
        int | None,
        typer.Option(help="Export only the first N layers (.weights only).", metavar="N"),
    ] = None,
    labels: Labels = None,
) -> None:
    """Export weights: cspnet export --checkpoint best.pt --output cspdarknet53.weights"""
    from cspnet.weights.export import check_export_target, export_network
    from cspnet.weights.load import load_weights

    check_export_target(output, pyramid, first_layers)
    trained = load_weights(checkpoint, labels=labels)
    weights = "EMA weights" if trained.averaged else "weights"
    remarks = [*trained.remarks, *export_network(trained, output, pyramid, first_layers)]
    print(f"{printable(str(output))}: {weights} of {trained.net.name}, step {trained.step:,}")
    for remark in remarks:
        print(f"  {remark}")
