"""What several commands share: options, and how results are told and written."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cspnet.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from cspnet.recipe.schema import Data
    from cspnet.runtime.device import Precision
    from cspnet.weights.load import Trained


def complete_recipe(incomplete: str) -> list[str]:
    """Names of shipped recipes, and recipe files in the folder that is being typed."""
    from cspnet.recipe.load import builtin_recipes

    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    found = [*folder.glob("*.yaml"), *folder.glob("*.yml")]
    below = [f"{path}/" for path in folder.glob("*") if path.is_dir() and "/" in incomplete]
    names = [*builtin_recipes(), *sorted(map(str, found)), *sorted(below)]
    return [name for name in names if name.startswith(incomplete)]


def complete_memory(incomplete: str) -> list[str]:
    """What `--memory` takes."""
    return [name for name in ("fast", "fit", "tiny") if name.startswith(incomplete)]


def complete_data(incomplete: str) -> list[str]:
    """The data sets that `cspnet data` knows."""
    from cspnet.sources.messages import DOWNLOADABLE

    return [name for name in DOWNLOADABLE if name.startswith(incomplete)]


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
        help="Weights: .pt of a run, .safetensors, .pth, .weights with its .cfg, a folder of the "
        "Hub's layout, or timm:NAME.",
        show_default=False,
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        help="Class names of weights that have none: a file with one a line, in class order.",
        show_default=False,
    ),
]
ClassOrder = Annotated[
    Literal["natural", "sorted"] | None,
    typer.Option(
        help="Class order of weights without class names: natural (2 before 10), as timm's, or "
        "sorted by code point.",
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
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Images at once.", show_default="the recipe's")
]


def warning_console() -> "Console":
    """A console for --quiet: it prints what has a colour, which is what may be wrong."""
    from rich.console import Console

    class Remarks(Console):
        def print(self, *objects, style=None, **options) -> None:
            if style:
                super().print(*objects, style=style, **options)

    # No terminal, so that no progress bar is drawn.
    return Remarks(soft_wrap=True, markup=False, highlight=False, force_terminal=False)


def is_rank_zero() -> bool:
    """Whether this process is the only one, or the first of those that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def max_restarts() -> int:
    """How often torchrun starts its processes again where one ends with another code than 0."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))


def describe_network(trained: "Trained", precision: "Precision") -> list[str]:
    """What a net is, and how its images are prepared, in lines for people."""
    recipe, how = trained.recipe, trained.recipe.evaluate
    return [
        *trained.remarks,
        f"{recipe.model.name}, step {trained.step:,}, "
        f"{'averaged' if trained.averaged else 'raw'} weights; as it was trained for: "
        f"view {recipe.data.image_size}x{recipe.data.image_size}, crop {how.crop_pct:g}, resize {how.interpolation}, "
        f"normalize {describe_normalization(recipe.data)}; {precision.name}",
    ]


def describe_normalization(data: "Data") -> str:
    """How images are normalised, in a few words."""
    if data.normalize != "custom":
        return data.normalize
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (data.mean, data.std))
    return f"mean ({mean}) std ({std})"


def require_writable(option: str, file: Path | None) -> None:
    """Raises RecipeError unless the file of an option can be in its folder."""
    if file and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise RecipeError(f"{option} {file}: must be a file in a folder that exists")
    if file and str(file) != "-":
        place = file if file.exists() else file.absolute().parent
        if not os.access(place, os.W_OK):
            raise RecipeError(f"{option} {file} cannot be written: no permission for {place}")


def write_text(file: Path, text: str) -> None:
    """Writes UTF-8 to a file, or text to stdout for `-`."""
    if str(file) == "-":
        print(text, end="")
        return
    try:
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise RecipeError(f"{file} cannot be written: {error.strerror}") from None
