"""Recipes: everything that affects the numerical results of a run, and nothing else.

`load_recipe` reads a YAML file and dotted overrides into a frozen `Recipe`, or raises a single
RecipeError that lists every problem.
"""

import difflib
import os
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import cspnet
from cspnet.errors import RecipeError
from cspnet.recipe.aliases import alias_hint, format_value, leaf_name, renamed, renamed_leaves
from cspnet.recipe.checks import check_effects, check_recipe
from cspnet.recipe.schema import Recipe, is_off, no_effect
from cspnet.text import did_you_mean

# Prefix of problems with the command line; the prefix of problems with a file is its path.
OVERRIDE = "override: "


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of the leaves of nested dictionaries or dataclasses."""
    if is_dataclass(node):
        items = [(f.name, getattr(node, f.name)) for f in fields(node)]
    else:
        items = [(str(key), value) for key, value in node.items()]
    for key, value in items:
        if is_dataclass(value) or isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted({path.stem for folder in _recipe_folders() for path in folder.glob("*.yaml")})


def _recipe_folders() -> list[Path]:
    """Folders of the built-in recipes: inside the installed package, or next to it in a clone."""
    package = Path(cspnet.__path__[0]).resolve()
    candidates = (package / "recipes", package.parent / "recipes")
    return [folder for folder in candidates if folder.is_dir()]


def find_recipe(name: str) -> Path:
    """Path of a recipe, given by path or by the name of a built-in one, with or without `.yaml`."""
    names = [name] if name.endswith((".yaml", ".yml")) else [name, f"{name}.yaml"]
    for folder in [Path(), *_recipe_folders()]:
        for candidate in names:
            path = folder / candidate
            if path.is_file():
                return path
    if name and Path(name).is_dir():
        raise RecipeError(f"the recipe {name} is a folder: give a .yaml file or a built-in name")
    known = builtin_recipes()
    raise RecipeError(
        f"recipe {name!r} is neither a file nor the name of a built-in recipe."
        f"{did_you_mean(Path(name).stem, known)}\n  built in: {', '.join(known)}"
    )


def load_recipe(path: Path | None, overrides: list[str], root: str | None = None) -> Recipe:
    """The recipe in a YAML file (None: the defaults) with `section.key=value` overrides applied.

    `root` overrides data.root and is used verbatim, not parsed as YAML. Raises RecipeError with one
    line for every problem: unknown keys, types, ranges, contradictions.
    """
    problems: list[str] = []
    file_pairs = list(flatten(_read(path))) if path else []
    override_pairs = list(_parse(overrides, problems))
    if root is not None:
        override_pairs.append(("data.root", root.replace("${", "\\${")))
    config = OmegaConf.structured(Recipe)
    for section in ("", *(name for name, node in config.items() if isinstance(node, DictConfig))):
        # Frozen dataclasses become read-only nodes; here only the result must be frozen.
        OmegaConf.set_readonly(config[section] if section else config, False)
    _merge(config, file_pairs, f"{path}: ", problems)
    file_recipe = _build(config, []) if not problems else None
    _merge(config, override_pairs, OVERRIDE, problems)
    recipe = _build(config, problems)
    if recipe is not None:
        problems += check_recipe(recipe)
    if recipe is not None and file_recipe is not None:
        # An override may make a field of the file ineffective; but within the file, and within the
        # overrides, every field must have an effect.
        problems += check_effects(file_recipe, [key for key, _ in file_pairs], f"{path}: ")
        problems += check_effects(recipe, [key for key, _ in override_pairs], OVERRIDE)
    if problems or recipe is None:
        text = "".join(f"\n  - {problem}" for problem in dict.fromkeys(problems))
        raise RecipeError(f"the recipe cannot be used:{text}")
    return recipe


def recipe_from_yaml(text: str) -> Recipe:
    """The recipe that `recipe_to_yaml` wrote.

    Raises RecipeError if its keys or types are those of another version of cspnet.
    """
    try:
        stored = OmegaConf.create(
            decode_binary_paths(OmegaConf.to_container(OmegaConf.create(text)))
        )
        if not isinstance(stored, DictConfig):
            raise RecipeError("the stored recipe is not a mapping")
        old = [key for key, _ in flatten(OmegaConf.to_container(stored)) if key in renamed()]
        if old:
            raise RecipeError(
                f"the stored recipe is of another version: {_renamed_text(old[0])}. Use the "
                "version of cspnet that wrote it"
            )
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), stored))
    except (YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"the stored recipe is of another version: {error}") from None
    assert isinstance(recipe, Recipe)
    return recipe


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML: every field that has an effect.

    A path that is not valid UTF-8 becomes `!!binary`, since YAML text cannot represent its bytes.
    """
    content = asdict(recipe)
    for key, value in flatten(recipe):
        section, _, leaf = key.rpartition(".")
        if no_effect(recipe, key) or is_off(key, value):
            del (content[section] if section else content)[leaf]
        elif section and isinstance(value, str):
            text = value.replace("${", "\\${")  # a path may contain this; it is no interpolation
            content[section][leaf] = text if _is_unicode(text) else os.fsencode(text)
    return OmegaConf.to_yaml(OmegaConf.create(content))


def _is_unicode(text: str) -> bool:
    """Whether a string can be encoded, that is, whether its bytes were valid UTF-8."""
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


def decode_binary_paths(node: Any) -> Any:
    """Content of a YAML file with `!!binary` paths as the strings given to `recipe_to_yaml`."""
    if isinstance(node, dict):
        return {key: decode_binary_paths(value) for key, value in node.items()}
    return os.fsdecode(node) if isinstance(node, bytes) else node


def _read(path: Path) -> dict:
    try:
        content = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {error}") from None
    if content == {}:
        raise RecipeError(f"{path} is empty: a recipe consists of `key: value` lines")
    if not isinstance(content, DictConfig):
        raise RecipeError(
            f"{path} must consist of `key: value` lines, but is a {type(content).__name__}"
        )
    return decode_binary_paths(OmegaConf.to_container(content))


def _parse(overrides: list[str], problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of overrides. Those that cannot be parsed are added to `problems`."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            problems.append(f"override {text!r} is not of the form section.key=value")
            continue
        if not _is_unicode(value):  # a path that is not UTF-8, which YAML cannot read
            yield key, value.replace("${", "\\${")
            continue
        try:
            # One key at a time, and only the value through YAML: `key=` alone means an empty one.
            parsed = OmegaConf.from_dotlist([f"{key}={value}"])
            yield from flatten(OmegaConf.to_container(parsed))
        except (YAMLError, OmegaConfBaseException) as error:
            problems.append(f"override {text!r}: {str(error).splitlines()[0]}")


def _merge(
    config: DictConfig, pairs: list[tuple[str, Any]], origin: str, problems: list[str]
) -> None:
    """Set each pair in `config`. Each pair that cannot be set adds a line to `problems`."""
    known = [key for key, _ in flatten(Recipe())]
    sections = {key.rpartition(".")[0] for key in known}
    for key, value in pairs:
        given = format_value(value) if origin == OVERRIDE else None
        if key in renamed():
            problems.append(f"{origin}{_renamed_text(key)}")
        elif key in sections - {""}:
            text = alias_hint(key, given) if given is not None else ""
            problems.append(
                f"{origin}{key} is a section: set its fields, {key}.KEY=VALUE"
                + (f"; {text}" if text else "")
            )
        elif key not in known:
            problems.append(f"{origin}unknown key {key!r}{_suggestion(key, given, known)}")
        else:
            try:
                OmegaConf.update(config, key, value)
            except OmegaConfBaseException as error:
                problems.append(f"{origin}{key}: {_reason(key, value, error)}")


def _reason(key: str, value: Any, error: OmegaConfBaseException) -> str:
    """Why a value has the wrong type, and what to write instead."""
    reason = str(error).splitlines()[0]
    if value is None:
        return "needs a value"
    if "TupleConfig" in reason and key in ("data.mean", "data.std"):
        return f"needs three numbers, {key}=[R,G,B]"
    if "TupleConfig" in reason:
        return f"needs two numbers, {key}=[LOW,HIGH]"
    if isinstance(value, float) and value.is_integer():
        return f"{reason}: write {int(value)}"
    return reason


def _renamed_text(key: str) -> str:
    return f"{key} was renamed {renamed()[key]}"


def _suggestion(key: str, given: str | None, known: list[str]) -> str:
    """What an unknown key most likely means; `given` is its value in an override."""
    if text := alias_hint(key, given):
        return f"; {text}"
    near = _nearest(key, known)
    if near:
        suggestions = " or ".join(f"'{k}'" if given is None else f"'{k}={given}'" for k in near)
        return f". Did you mean {suggestions}?"
    section = key.rpartition(".")[0]
    siblings = [k for k in known if section and k.startswith(f"{section}.")]
    return f". Keys of that section: {', '.join(siblings)}." if siblings else ""


def _nearest(key: str, known: list[str]) -> list[str]:
    """Known keys that an unknown one may mean: with the same last part, or a similar spelling."""
    leaf = leaf_name(key)
    near = [k for k in known if leaf_name(k) == leaf] or renamed_leaves(leaf)
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        by_leaf = {leaf_name(k): k for k in known}
        close = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)
        near = [by_leaf[name] for name in close]
    return near


def _build(config: DictConfig, problems: list[str]) -> Recipe | None:
    """The frozen recipe; None, with a line in `problems`, if an interpolation fails."""
    try:
        recipe = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        problems.append(f"{error.full_key}: {str(error).splitlines()[0]}")
        return None
    assert isinstance(recipe, Recipe)
    return recipe
