"""The commands on whole runs: `report` and `compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cspnet.cli.options import Device, Workers, plain_console, progress_bar
from cspnet.text import printable

if TYPE_CHECKING:
    from rich.console import Console

    from cspnet.report.evaluation import Evaluation
    from cspnet.run.reader import RunRecord


def report_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(
            help="Data root or its val folder, or `digits`.", show_default="the recipe's data.root"
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint to evaluate: best or last of the run, or a file.",
            show_default="best, else last",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to.", show_default="RUN/report")
    ] = None,
    device: Device = "auto",
    workers: Workers = None,
    no_evaluate: Annotated[
        bool, typer.Option("--no-evaluate", help="Skip the evaluation: curves and history only.")
    ] = False,
) -> None:
    """Write a report on a run: cspnet report runs/cspdarknet53-omega

    Write report.html, a self-contained page, and its figures as PNG files. The run may be in
    progress. Evaluate its checkpoint once on the validation images; if the checkpoint or the images
    are unavailable, report the logs only.
    """
    from cspnet.run.reader import read_run

    # Before torch is imported: a wrong folder is reported at once.
    record = read_run(run)

    from cspnet.report.publish import publish, require_output_folder

    folder = output or record.folder.report_folder
    require_output_folder(folder)
    console = plain_console()
    if no_evaluate:
        evaluation, remarks = None, ["Not evaluated: --no-evaluate was given."]
    else:
        evaluation, remarks = _evaluate(console, record, data, checkpoint, device, workers)
    for remark in remarks:
        console.print(remark, style="yellow")
    if evaluation:
        _print_scores(console, record, evaluation)
    print(printable(str(publish(record, evaluation, remarks, folder))))


def _evaluate(
    console: "Console",
    record: "RunRecord",
    data: str | None,
    checkpoint: str | None,
    device: str,
    workers: int | None,
) -> "tuple[Evaluation | None, list[str]]":
    """Evaluate with a progress bar; return the evaluation, if possible, and remarks."""
    from cspnet.report.evaluation import evaluate_run

    with progress_bar(console, "images") as progress:
        return evaluate_run(record, data, checkpoint, device, workers, progress)


def _print_scores(console: "Console", record: "RunRecord", evaluation: "Evaluation") -> None:
    from cspnet.report.evaluation import selection_note

    scores = evaluation.scores
    console.print(
        f"{printable(evaluation.checkpoint)}, step {evaluation.step:,}: top-1 {scores.top1:.2f} %  "
        f"top-5 {scores.top5:.2f} %  loss {scores.loss:.4f}  {scores.images:,} images"
    )
    if note := selection_note(record, evaluation):
        console.print(note)


def compare_command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN RUN...", help="Run folders.", show_default=False),
    ],
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("compare.png"),
) -> None:
    """Compare runs: cspnet compare runs/cspdarknet53-omega runs/cspdarknet53-sat

    Print the progress and scores of each run and the differences of their recipes, and draw their
    curves in one picture.
    """
    from cspnet.report.compare import (
        differences_table,
        overview_table,
        read_runs,
        save_comparison,
    )
    from cspnet.report.files import require_png

    require_png(output)
    records = read_runs(runs)
    console = plain_console(width=100_000)  # no table is truncated, in a narrow terminal or a pipe
    console.print(overview_table(records))
    if any(record.selected for record in records):
        console.print(
            "best top-1: the best of several validations, selected on the same images, so it is "
            "optimistic; the last top-1 is not selected"
        )
    console.print()
    console.print(differences_table(records) or "The recipes are the same.")
    save_comparison(records, output)
    print(f"\n{printable(str(output))} written")
