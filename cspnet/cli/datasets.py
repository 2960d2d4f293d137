"""The commands of a data set: `data`, `check`, `index`, `pack`."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from cspnet.cli.options import Workers, complete_data, require_writable, write_text
from cspnet.errors import RecipeError
from cspnet.shell import command_line
from cspnet.text import printable


def prepare_command(
    name: Annotated[
        str,
        typer.Argument(
            help="imagenet, imagenette or cifar10.",
            show_default=False,
            autocompletion=complete_data,
        ),
    ],
    to: Annotated[
        Path | None, typer.Option(help="Data root to make.", show_default="data/NAME")
    ] = None,
    archives: Annotated[
        Path | None, typer.Option(help="Folder of the archives.", show_default="that of --to")
    ] = None,
) -> None:
    """Puts a known data set into class folders. cspnet data imagenet --archives ~/Downloads

    ImageNet is unpacked from its three official archives, which image-net.org gives to those with
    an account; the two small ones are downloaded where they are not there yet. Interrupted, it goes
    on with the same command.
    """
    from cspnet.datasets.download import fetch

    to = Path("data") / name if to is None else to
    with _progress(name) as progress:
        new = fetch(name, to, archives, lambda line: print(line, flush=True), progress)
    state = "ready" if new else "there already, nothing to do"
    look = command_line("cspnet", "check", to)
    print(f"{printable(str(to))}: train/ and val/ are {state}; look at it: {look}")


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
        typer.Option("--json", help="Write the whole report to this file; - is stdout."),
    ] = None,
    workers: Workers = None,
) -> None:
    """Is this data set what you think it is? cspnet check data/imagenet

    Counts the classes, compares those of train/ and val/, reads every file, and looks for pictures
    that lie there twice. The exit code is 1 where something is wrong, 2 where the path is.
    """
    from cspnet.datasets.check import check_dataset as look_through

    require_writable("--json", json_file)
    with _progress("files") as progress:
        report = look_through(data, _processes(workers), progress)
    if json_file:
        write_text(json_file, json.dumps(report.to_dict(), indent=2) + "\n")
    if str(json_file) != "-":
        _print(report.lines())
    if report.count("error"):
        raise typer.Exit(1)


def index_command(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Data root with tar files for parts, or a single folder of tar files.",
            show_default=False,
        ),
    ],
) -> None:
    """Reads the headers of tar files, and saves where their images lie. cspnet index data/packed

    Training, which writes nothing beside its data, makes the same index in memory at each start
    where it is missing or old. This one is always made anew, and names all that is wrong. The exit
    code is 1 where something in a tar file is wrong, 2 where the path is.
    """
    from cspnet.errors import DataError
    from cspnet.sources.data_root import places, require_classes
    from cspnet.sources.names import TRAINING
    from cspnet.sources.parquet import ParquetSet
    from cspnet.sources.tar_members import TarError
    from cspnet.sources.tar_set import TarSet, TarSource

    lines, sources, wrong = [], [], False
    for name, place in places(data, "Give a data root or a folder of tar files").items():
        if not isinstance(place, TarSet):
            kind = "parquet files" if isinstance(place, ParquetSet) else "class folders"
            lines.append(("", f"{name}: {kind}, which need no index"))
            continue
        try:
            with _progress("tar files") as progress:
                source = TarSource(place, save=True, again=True, progress=progress)
        except TarError as error:
            wrong = True
            lines += [("error", f"error: {name}: {problem}") for problem in error.problems]
            continue
        sources.append(source)
        counts = f"images {len(source):,}, classes {len(source.classes):,}"
        lines.append(("", f"{name}: tar files {len(place.files):,}, {counts}; {place.index}"))
    if len(sources) == 2:
        try:
            require_classes(sources[1], sources[0].classes, data, TRAINING)
        except DataError as error:
            wrong = True
            lines.append(("error", f"error: {error}"))
    _print(lines)
    if wrong:
        raise typer.Exit(1)


def pack_command(
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="Data root; it stays as it is.", show_default=False),
    ],
    to: Annotated[Path, typer.Option(help="New folder for the packed set.", show_default=False)],
    short: Annotated[int, typer.Option(min=32, help="Pixels of the shorter side.")] = 320,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of the JPEGs.")] = 92,
    shard_mb: Annotated[int, typer.Option(min=1, help="MB of a tar file.")] = 256,
    labels: Annotated[
        str,
        typer.Option(metavar="index_command|name", help="What a .cls holds: class index, or name."),
    ] = "index",
    workers: Workers = None,
) -> None:
    """Scales a data set down once, into tar files. cspnet pack data/imagenet --to data/packed

    They keep their order, so that training sees the same stream. Smaller images are copied byte for
    byte; the others lose detail for good. Interrupted, it goes on with the same command. The exit
    code is 1 where images could not be read: they are named and left out.
    """
    from cspnet.datasets.pack import Settings, summary
    from cspnet.datasets.pack import pack as pack_parts

    if labels not in ("name", "index"):
        raise RecipeError(f"--labels {labels}: must be name or index")
    settings = Settings(short, quality, shard_mb, labels)
    with _progress("images") as progress:
        parts = pack_parts(data, to, settings, _processes(workers), progress)
    _print(summary(parts, settings))
    if any(shard.unreadable for shards in parts.values() for shard in shards):
        raise typer.Exit(1)


def _processes(workers: int | None) -> int:
    """How many are asked for, or as many as there are cores."""
    if workers is not None and workers < 0:
        raise RecipeError(f"--workers {workers}: must be 0 (none) or more")
    from cspnet.data.worker import cores

    return min(16, cores()) if workers is None else workers


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; what it yields is told how many are done, and of how many."""
    from rich.console import Console
    from rich.progress import Progress

    notes = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(lines: Iterable[tuple[str, str]]) -> None:
    """Prints lines, each with the severity of what it is about; names in them are escaped."""
    from rich.console import Console

    sys.stdout.reconfigure(errors="backslashreplace")  # an encoding other than UTF-8
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    styles = {"error": "red", "warning": "yellow"}
    for severity, line in lines:
        console.print(printable(line), style=styles.get(severity))
