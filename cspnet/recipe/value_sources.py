"""Where the values of a recipe come from: comments of its file, command line, or defaults."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cspnet.recipe.load import decode_binary_paths, flatten, recipe_to_yaml
from cspnet.recipe.schema import Recipe


class RecipeEntry(NamedTuple):
    """A value in the YAML text of a recipe."""

    line: int  # of its key, from 0
    value: Any
    comment: str  # at the end of the value's line; "" if there is none


def recipe_entries(text: str) -> dict[str, RecipeEntry]:
    """The values of a recipe in YAML by dotted key. Raises yaml.YAMLError."""
    lines = text.splitlines()
    entries: dict[str, RecipeEntry] = {}

    def visit(node: yaml.MappingNode, prefix: str) -> None:
        for key, value in node.value:
            if isinstance(value, yaml.MappingNode):
                visit(value, f"{prefix}{key.value}.")
                continue
            # A block list or a block text ends where the next key starts, or after the last line,
            # so it has no comment of its own.
            if isinstance(value, yaml.ScalarNode):
                has_comment = value.style not in ("|", ">")
            else:
                has_comment = value.flow_style
            rest = lines[value.end_mark.line][value.end_mark.column :] if has_comment else ""
            content = yaml.safe_load(yaml.serialize(value))
            comment = rest.partition("#")[2].strip()
            entries[f"{prefix}{key.value}"] = RecipeEntry(key.start_mark.line, content, comment)

    tree = yaml.compose(text, Loader=yaml.SafeLoader)
    if isinstance(tree, yaml.MappingNode):
        visit(tree, "")
    return entries


def recipe_sources(
    recipe: Recipe, file: Path, earlier: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """The content of recipe-sources.json: the file, and the source of each value by dotted key.

    A source is the comment in `file` ("" if it has none), "default", or "command line". `earlier`
    is the content that an earlier start has written: if `file` is the run's own recipe.yaml, which
    has no comments, it takes their place. None if the sources are not known.
    """
    try:
        entries = recipe_entries(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    origin = str(file.absolute())
    comments: object = {key: entry.comment for key, entry in entries.items()}
    if earlier is not None:
        origin, comments = str(earlier.get("file", "")), earlier.get("values")
    if not isinstance(comments, dict):
        return None
    defaults = dict(flatten(Recipe()))
    values = {}
    for key, value in flatten(decode_binary_paths(yaml.safe_load(recipe_to_yaml(recipe)))):
        if key in entries and _is_same(entries[key].value, value):
            values[key] = str(comments.get(key, ""))
        elif key in entries:
            values[key] = f"command line; {entries[key].value} in the file"
        else:
            values[key] = "default" if _is_same(defaults.get(key), value) else "command line"
    return {"file": origin, "values": values}


def _is_same(one: object, other: object) -> bool:
    """Whether two YAML values are equal. YAML reads 1e-5 as text; a list may be a tuple."""
    try:
        return _numbers(one) == _numbers(other)
    except (TypeError, ValueError):
        return one == other


def _numbers(value: Any) -> list[float]:
    return [float(item) for item in (value if isinstance(value, list | tuple) else [value])]
