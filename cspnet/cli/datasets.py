"""The commands for data sets: `prepare`, `check`, `index`, `pack`."""

import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from cspnet.cli.options import (
    WorkerProcesses,
    complete_data,
    plain_console,
    progress_bar,
    require_writable,
    write_text,
)
from cspnet.errors import RecipeError
from cspnet.shell import command_line
from cspnet.text import printable


def prepare_command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="imagenet, imagenette or cifar10.",
            show_default=False,
            autocompletion=complete_data,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Data root to create.", show_default="data/NAME")
    ] = None,
    archives: Annotated[
        Path | None, typer.Option(help="Folder of the archives.", show_default="same as --output")
    ] = None,
) -> None:
    """Prepare a known data set as class folders: cspnet prepare imagenet --archives ~/Downloads

    Unpack ImageNet from its three official archives, which require an account at image-net.org.
    Download imagenette and cifar10 if necessary. After an interruption, run the same command again
    to resume.
    """
    from cspnet.datasets.download import prepare_dataset

    output = Path("data") / name if output is None else output
    with progress_bar(plain_console(stderr=True), name) as progress:
        created = prepare_dataset(
            name, output, archives, lambda line: print(line, flush=True), progress
        )
    state = "are ready" if created else "exist already"
    next_command = command_line("cspnet", "check", output)
    print(f"{printable(str(output))}: train/ and val/ {state}. Check them: {next_command}")


def check_command(
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
        typer.Option("--json", help="Write the full report to this file; - is stdout."),
    ] = None,
    workers: WorkerProcesses = None,
) -> None:
    """Check a data set for errors: cspnet check data/imagenet

    Count the images per class, compare the classes of train/ and val/, read every file, and find
    duplicates. The exit code is 1 if there are errors and 2 if the path is wrong.
    """
    from cspnet.datasets.check import check_dataset

    require_writable("--json", json_file)
    with progress_bar(plain_console(stderr=True), "files") as progress:
        report = check_dataset(data, _worker_count(workers), progress)
    if json_file:
        write_text(json_file, json.dumps(report.to_dict(), indent=2) + "\n")
    if str(json_file) != "-":
        _print_lines(report.lines())
    if report.count("error"):
        raise typer.Exit(1)


def index_command(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Data root with tar files, or a single folder of tar files.",
            show_default=False,
        ),
    ],
) -> None:
    """Index the images in tar files: cspnet index data/packed

    Read all tar headers, save the index next to the tar files, and report every problem. Training
    never writes to its data; without a current index it builds one in memory at each start. The
    exit code is 1 if there are errors in a tar file and 2 if the path is wrong.
    """
    from cspnet.errors import DataError
    from cspnet.sources.data_root import DataRoot, require_classes
    from cspnet.sources.names import TRAINING
    from cspnet.sources.parquet import ParquetSet
    from cspnet.sources.tar_members import TarError
    from cspnet.sources.tar_set import TarSet, TarSource

    lines: list[tuple[str, str]] = []
    sources: list[TarSource] = []
    for name, location in DataRoot(
        data, "Give a data root or a folder of tar files"
    ).splits.items():
        if not isinstance(location, TarSet):
            kind = "parquet files" if isinstance(location, ParquetSet) else "class folders"
            lines.append(("", f"{name}: {kind}, which need no index"))
            continue
        try:
            with progress_bar(plain_console(stderr=True), "tar files") as progress:
                source = TarSource(location, save=True, rebuild=True, progress=progress)
        except TarError as error:
            lines += [("error", f"error: {name}: {problem}") for problem in error.problems]
            continue
        sources.append(source)
        counts = f"{len(source):,} images, {len(source.classes):,} classes"
        lines.append(("", f"{name}: {len(location.files):,} tar files, {counts}; {location.index}"))
    if len(sources) == 2:
        try:
            require_classes(sources[1], sources[0].classes, data, TRAINING)
        except DataError as error:
            lines.append(("error", f"error: {error}"))
    _print_lines(lines)
    if any(severity == "error" for severity, _ in lines):
        raise typer.Exit(1)


def pack_command(
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="Data root; it is not changed.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option(help="New folder for the packed data set.", show_default=False)
    ],
    short_side: Annotated[
        int, typer.Option(min=32, help="Maximum length of the shorter side, in pixels.")
    ] = 320,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality.")] = 92,
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of a tar file, in MB.")] = 256,
    workers: WorkerProcesses = None,
) -> None:
    """Resize a data set once, into tar files: cspnet pack data/imagenet --output data/packed

    Keep the order of the images, so that training sees the same stream. Copy smaller images byte
    for byte; the others lose detail permanently. After an interruption, run the same command again
    to resume. The exit code is 1 if images are unreadable; they are listed and skipped.
    """
    from cspnet.datasets.pack import pack_dataset, pack_summary
    from cspnet.datasets.pack_journal import PackSettings

    settings = PackSettings(short_side, quality, shard_mb)
    with progress_bar(plain_console(stderr=True), "images") as progress:
        splits = pack_dataset(data, output, settings, _worker_count(workers), progress)
    _print_lines(pack_summary(splits, settings))
    if any(shard.unreadable for shards in splits.values() for shard in shards):
        raise typer.Exit(1)


def _worker_count(workers: int | None) -> int:
    """The requested number of workers, by default one per core, at most 16."""
    if workers is not None and workers < 0:
        raise RecipeError(f"--workers {workers}: must be 0 (none) or more")
    from cspnet.runtime.cpu import available_cores

    return min(16, available_cores()) if workers is None else workers


def _print_lines(lines: Iterable[tuple[str, str]]) -> None:
    """Print (severity, line) pairs in the colour of their severity, with names escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # encodings other than UTF-8
    console = plain_console()
    styles = {"error": "red", "warning": "yellow"}
    for severity, line in lines:
        console.print(printable(line), style=styles.get(severity))
