"""Where the values of a run's recipe come from: the comments of the file that it was started by."""

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from cspnet.errors import RecipeError
from cspnet.recipe.load import find_recipe
from cspnet.run.reader import RunRecord

OPTIONS = ("--recipe", "-r", "-c")
SHIPPED = "cspdarknet53"  # one of the shipped recipes; the others lie beside it
MAX_DIFFERENCES = (
    8  # values in which a recipe may differ from the one that it was made from, for a guess
)


class RecipeValue(NamedTuple):
    """A value of a recipe in YAML."""

    line: int  # of its key, from 0
    value: Any
    comment: str  # behind it; "": none


def find_recipe_file(run: RunRecord) -> Path | None:
    """The recipe file that the run was started from, by its command or the folder's name.

    None where there is none: a run is often read on another machine, and a resumed one names none.
    """
    words = run.environment.get("command")
    words = [str(word) for word in words] if isinstance(words, list) else []
    named = [after for word, after in pairwise(words) if word in OPTIONS]
    named += [word.partition("=")[2] for word in words if word.startswith("--recipe=")]
    for name in (*named, run.name):
        try:
            return find_recipe(name)
        except (RecipeError, OSError, ValueError):
            continue
    return None


def parse_notes(text: str) -> dict[str, RecipeValue]:
    """The values of a recipe in YAML by dotted key. yaml.YAMLError."""
    lines, found = text.splitlines(), {}

    def visit(node: yaml.Node, prefix: str) -> None:
        for key, value in node.value:
            if isinstance(value, yaml.MappingNode):
                visit(value, f"{prefix}{key.value}.")
                continue
            # A list of lines ends where the next key begins: no comment is its own.
            own = isinstance(value, yaml.ScalarNode) or value.flow_style
            rest = lines[value.end_mark.line][value.end_mark.column :] if own else ""
            content = yaml.safe_load(yaml.serialize(value))
            comment = rest.partition("#")[2].strip()
            found[f"{prefix}{key.value}"] = RecipeValue(key.start_mark.line, content, comment)

    tree = yaml.compose(text, Loader=yaml.SafeLoader)
    if isinstance(tree, yaml.MappingNode):
        visit(tree, "")
    return found


def value_sources(run: RunRecord) -> tuple[Path | None, dict[str, str], bool]:
    """The recipe file that the run comes from, and where each of its values comes from.

    A value that is not the file's is the run's own. False: the file is not known, but is the
    shipped one that is most like the run's recipe.
    """
    path = find_recipe_file(run)
    known, named = _read(path) if path else {}, True
    if not known:
        path, known = _nearest(run)
        named = False
    if not known:
        return None, {}, False
    told = {}
    for key, value in run.fields.items():
        if key not in known:
            told[key] = "not in that file: a default, or this run's own"
        elif _same(known[key].value, value):
            told[key] = known[key].comment
        else:
            told[key] = f"this run's own; {known[key].value} there"
    return path, told, named


def _read(path: Path) -> dict[str, RecipeValue]:
    try:
        return parse_notes(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}


def _nearest(run: RunRecord) -> tuple[Path | None, dict[str, RecipeValue]]:
    """The shipped recipe with the fewest values that are not the run's, if they are few."""
    best, found = MAX_DIFFERENCES + 1, (None, {})
    for path in sorted(find_recipe(SHIPPED).parent.glob("*.yaml")):
        known = _read(path)
        if "model.name" not in known or known["model.name"].value != run.fields.get("model.name"):
            continue
        other = sum(
            key not in known or not _same(known[key].value, value)
            for key, value in run.fields.items()
        )
        if other < best:
            best, found = other, (path, known)
    return found


def _same(one: Any, other: Any) -> bool:
    """Whether two values of YAML are one: it takes 1e-5 for text, and a list may be a tuple."""
    try:
        return [float(x) for x in np.ravel(one)] == [float(x) for x in np.ravel(other)]
    except (TypeError, ValueError):
        return one == other
