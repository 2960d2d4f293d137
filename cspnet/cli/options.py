"""What several commands share: options, and how results are told and written."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from cspnet.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from cspnet.train.runtime import Precision
    from cspnet.trained import Trained


def complete_recipe(incomplete: str) -> list[str]:
    """Names of shipped recipes, and recipe files in the folder that is being typed."""
    from cspnet.recipe import shipped

    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    found = [*folder.glob("*.yaml"), *folder.glob("*.yml")]
    below = [f"{path}/" for path in folder.glob("*") if path.is_dir() and "/" in incomplete]
    names = [*shipped(), *sorted(map(str, found)), *sorted(below)]
    return [name for name in names if name.startswith(incomplete)]


def complete_memory(incomplete: str) -> list[str]:
    """What `--memory` takes."""
    return [name for name in ("fast", "fit", "tiny") if name.startswith(incomplete)]


def complete_data(incomplete: str) -> list[str]:
    """The data sets that `cspnet data` knows."""
    from cspnet.data.layout import KNOWN

    return [name for name in KNOWN if name.startswith(incomplete)]


RecipeName = typer.Option(
    "--recipe",
    "-r",
    "-c",
    help="Recipe: a path, or the name of a shipped one.",
    autocompletion=complete_recipe,
)
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


class Held:
    """A text stream that keeps what is written to it until `release`.

    So an error that is found while a command is set up comes before any other output, and alone.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._kept: list[str] | None = []

    def write(self, text: str) -> int:
        """Keeps the text, or hands it on once the stream is released."""
        if self._kept is None:
            return self._stream.write(text)
        self._kept.append(text)
        return len(text)

    def flush(self) -> None:
        if self._kept is None:
            self._stream.flush()

    def release(self) -> None:
        """Writes what was kept; from now on nothing is."""
        kept, self._kept = self._kept, None
        self._stream.write("".join(kept or []))
        self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)  # encoding, isatty, fileno


def remarks_only(file: TextIO) -> "Console":
    """A console for --quiet: it prints what has a colour, which is what may be wrong."""
    from rich.console import Console

    class Remarks(Console):
        def print(self, *objects, style=None, **options) -> None:
            if style:
                super().print(*objects, style=style, **options)

    # No terminal, so that no progress bar is drawn.
    return Remarks(file=file, soft_wrap=True, markup=False, highlight=False, force_terminal=False)


def is_first() -> bool:
    """Whether this process is the only one, or the first of those that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def restarts() -> int:
    """How often torchrun starts its processes again where one ends with another code than 0."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))


def facts(trained: "Trained", precision: "Precision") -> list[str]:
    """What a net is, and how its images are prepared, in lines for people."""
    recipe, how = trained.recipe, trained.recipe.evaluate
    return [
        *trained.remarks,
        f"{recipe.model.name}, step {trained.step:,}, "
        f"{'averaged' if trained.averaged else 'raw'} weights; as it was trained for: "
        f"view {recipe.data.size}x{recipe.data.size}, crop {how.crop:g}, resize {how.resize}, "
        f"normalize {recipe.data.normalize}; {precision.name}",
    ]


def require_folder(option: str, file: Path | None) -> None:
    """Raises RecipeError unless the file of an option can be in its folder."""
    if file and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise RecipeError(f"{option} {file}: must be a file in a folder that exists")


def write_text(file: Path, text: str) -> None:
    """Writes UTF-8 to a file, or text to stdout for `-`."""
    if str(file) == "-":
        print(text, end="")
        return
    try:
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise RecipeError(f"{file} cannot be written: {error.strerror}") from None
