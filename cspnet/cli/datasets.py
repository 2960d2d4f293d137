"""The commands of a data set: `check`."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cspnet.cli.options import Workers, require_folder, write_text
from cspnet.errors import RecipeError


def check(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Data root, a folder with one folder per class, or `digits`.",
            show_default=False,
        ),
    ],
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the whole report to this file; - is stdout."),
    ] = None,
    workers: Workers = None,
) -> None:
    """Is this data set what you think it is? cspnet check data/imagenet

    Counts the classes, compares those of train/ and val/, reads every file, and looks for pictures
    that lie there twice. The exit code is 1 where something is wrong, 2 where the path is.
    """
    from rich.console import Console
    from rich.progress import Progress

    from cspnet.data.check import check as look_through

    if workers is not None and workers < 0:
        raise RecipeError(f"--workers {workers}: must be 0 (none) or more")
    require_folder("--json", json_file)
    to_stdout = str(json_file) == "-"
    notes = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("files", total=None)
        report = look_through(
            data,
            min(16, len(os.sched_getaffinity(0))) if workers is None else workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if json_file:
        write_text(json_file, json.dumps(report.to_dict(), indent=2) + "\n")
    if not to_stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may be any bytes
        console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
        styles = {"error": "red", "warning": "yellow"}
        for severity, line in report.lines():
            console.print(line, style=styles.get(severity))
    if report.count("error"):
        raise typer.Exit(1)
