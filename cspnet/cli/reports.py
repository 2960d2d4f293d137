"""The commands on runs as a whole: `report` and `compare`."""

from pathlib import Path
from typing import Annotated

import typer

from cspnet.cli.options import Device, Workers
from cspnet.text import printable


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
            help="Weights to evaluate: best or last of the run, or a file.",
            show_default="best, else last",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to.", show_default="RUN/report")
    ] = None,
    device: Device = "auto",
    workers: Workers = None,
    record_only: Annotated[
        bool, typer.Option("--record-only", help="Evaluate nothing: the curves and the history.")
    ] = False,
) -> None:
    """All about a run on one page: cspnet report runs/cspdarknet53-omega

    The page, report.html, needs no network and no other file; PNGs of its pictures lie beside it. A
    run may be going on. It is evaluated once on its validation images; without these, or without a
    checkpoint, the report is made from the record.
    """
    from rich.console import Console
    from rich.progress import Progress

    from cspnet.run.reader import read_run

    found = read_run(run)

    from cspnet.report.evaluation import evaluate_run, selection_note
    from cspnet.report.publish import publish, require_place

    folder = out or found.folder.report_folder
    require_place(folder)
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    verdict, remarks = None, ["Only the record was asked for: nothing was evaluated."]
    if not record_only:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("images")
            verdict, remarks = evaluate_run(
                *(found, data, checkpoint, device, workers),
                lambda done, images: bar.update(task, completed=done, total=images),
            )
    for remark in remarks:
        console.print(remark, style="yellow")
    if verdict:
        scores = verdict.scores
        console.print(
            f"{printable(verdict.checkpoint)}, step {verdict.step:,}: top-1 {scores.top1:.2f} %  "
            f"top-5 {scores.top5:.2f} %  loss {scores.loss:.4f}  {scores.images:,} images"
        )
        if told := selection_note(found, verdict):
            console.print(told)
    print(printable(str(publish(found, verdict, remarks, folder))))


def compare_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("compare.png"),
) -> None:
    """Runs beside each other: cspnet compare runs/cspdarknet53-omega runs/cspdarknet53-sat

    How far and how good each is, the fields in which their recipes differ, and their curves in one
    picture.
    """
    from rich.console import Console

    from cspnet.report.compare import differing, draw, overview, read_runs
    from cspnet.report.files import require_png

    require_png(out)
    found = read_runs(runs)
    # As wide as it comes: nothing is cut off, in a narrow terminal nor in a pipe.
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False, width=100_000)
    console.print(overview(found))
    if any(run.selected for run in found):
        console.print(
            "best top-1: the best of a run's validations, selected on the images that it is "
            "reported on; the last one was not selected"
        )
    console.print()
    different = differing(found)
    console.print(different if different else "The recipes are the same.")
    draw(found, out)
    print(f"\n{out} written")
