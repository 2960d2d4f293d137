"""Options and output helpers shared by several commands."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cspnet.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from cspnet.recipe.schema import Data
    from cspnet.runtime.device import Precision
    from cspnet.weights.trained import Trained


def complete_recipe(incomplete: str) -> list[str]:
    """Complete names of built-in recipes and recipe files in the folder being typed."""
    from cspnet.recipe.load import builtin_recipes

    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    files = [*folder.glob("*.yaml"), *folder.glob("*.yml")]
    subfolders = [f"{path}/" for path in folder.glob("*") if path.is_dir() and "/" in incomplete]
    names = [*builtin_recipes(), *sorted(map(str, files)), *sorted(subfolders)]
    return [name for name in names if name.startswith(incomplete)]


def complete_data(incomplete: str) -> list[str]:
    """Complete names of the data sets that `cspnet prepare` can download."""
    from cspnet.sources.messages import DOWNLOADABLE

    return [name for name in DOWNLOADABLE if name.startswith(incomplete)]


RecipeName = typer.Option(
    "--recipe",
    "-r",
    "-c",
    help="Recipe file, or the name of a built-in recipe.",
    autocompletion=complete_recipe,
)
Checkpoint = Annotated[
    str,
    typer.Option(
        help="Weights: .pt of a run, .safetensors, .pth, .weights with its .cfg, a folder in "
        "Hugging Face Hub layout, or timm:NAME.",
        show_default=False,
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        help="Class names, one per line in class order, for weights that have none.",
        show_default=False,
    ),
]
ClassOrder = Annotated[
    Literal["natural", "sorted"] | None,
    typer.Option(
        help="Class order of weights without class names: natural (2 before 10, as in timm) or "
        "sorted (by code point, as in torchvision).",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Recipe overrides.", show_default=False),
]
DataOption = Annotated[
    str | None,
    typer.Option(help="Folder with train/ and val/, or `digits`. Sets data.root."),
]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.")]
Workers = Annotated[
    int | None,
    typer.Option("--workers", "-j", help="Number of dataloader workers.", show_default="auto"),
]
WorkerProcesses = Annotated[
    int | None,
    typer.Option("--workers", "-j", help="Number of worker processes.", show_default="auto"),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Batch size.", show_default="from the recipe")
]


def plain_console(**options: Any) -> "Console":
    """A console that prints text unchanged: no markup, highlighting, emoji or line breaks."""
    from rich.console import Console

    return Console(soft_wrap=True, markup=False, highlight=False, emoji=False, **options)


@contextmanager
def progress_bar(console: "Console", description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on a terminal. Yields a function of (items done, total)."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def warning_console() -> "Console":
    """The console of --quiet. It prints only styled text, which is what warnings are."""
    from rich.console import Console

    class WarningConsole(Console):
        def print(self, *objects, style=None, **options) -> None:
            if style:
                super().print(*objects, style=style, **options)

    # force_terminal=False also disables the progress bar.
    return WarningConsole(soft_wrap=True, markup=False, highlight=False, force_terminal=False)


def is_rank_zero() -> bool:
    """Whether this is the only process, or rank 0 of a torchrun job."""
    return os.environ.get("RANK", "0") == "0"


def max_restarts() -> int:
    """How often torchrun restarts its processes after a non-zero exit code (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))


def describe_network(trained: "Trained", precision: "Precision") -> list[str]:
    """Lines that describe a network, its weights and its preprocessing."""
    recipe, how = trained.recipe, trained.recipe.evaluate
    return [
        *trained.remarks,
        f"{recipe.model.name}, step {trained.step:,}, "
        f"{'EMA' if trained.averaged else 'raw'} weights; preprocessing: "
        f"{recipe.data.image_size}x{recipe.data.image_size}, crop_pct {how.crop_pct:g}, "
        f"interpolation {how.interpolation}, "
        f"normalize {describe_normalization(recipe.data)}; {precision.name}",
    ]


def describe_normalization(data: "Data") -> str:
    """Mean and standard deviation in words."""
    if data.normalize != "custom" or data.mean is None or data.std is None:
        return data.normalize
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (data.mean, data.std))
    return f"mean ({mean}) std ({std})"


def require_writable(option: str, file: Path | None) -> None:
    """Raise RecipeError unless the file given by an option can be written."""
    if file and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise RecipeError(f"{option} {file}: must be a file in an existing folder")
    if file and str(file) != "-":
        target = file if file.exists() else file.absolute().parent
        if not os.access(target, os.W_OK):
            raise RecipeError(f"{option} {file} cannot be written: no permission for {target}")


def write_text(file: Path, text: str) -> None:
    """Write UTF-8 text to a file, or to stdout for `-`. Raises RecipeError."""
    if str(file) == "-":
        print(text, end="")
        return
    try:
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise RecipeError(f"{file} cannot be written: {error.strerror}") from None
