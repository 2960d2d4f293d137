"""Recipes: everything that changes the numbers of a run, and nothing else.

`load` reads a YAML file and dotted overrides into a frozen `Recipe` (cspnet/recipe/schema.py), or raises
one RecipeError that lists every problem found.
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

from cspnet.errors import RecipeError
from cspnet.recipe.aliases import alias_hint, leaf_name, spell
from cspnet.recipe.schema import IDLE, OFF, STAGE_COUNTS, TIMM_PREFIX, Recipe

OVERRIDE = "override: "  # begins the problems of the command line; those of a file, its path


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested dictionaries or dataclasses, leaves only."""
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
    return sorted({path.stem for folder in _homes() for path in folder.glob("*.yaml")})


def _homes() -> list[Path]:
    """Folders of built-in recipes: in the installed package, or next to it in a clone."""
    package = Path(__file__).resolve().parent.parent
    return [path for path in (package / "recipes", package.parent / "recipes") if path.is_dir()]


def find_recipe(name: str) -> Path:
    """Path of a recipe given by path, or by the name of a shipped one, with or without `.yaml`."""
    names = [name] if name.endswith((".yaml", ".yml")) else [name, f"{name}.yaml"]
    for folder in [Path(), *_homes()]:
        for candidate in names:
            path = folder / candidate
            if path.is_file():
                return path
    if name and Path(name).is_dir():
        raise RecipeError(f"the recipe {name} is a folder: give a .yaml file, or a shipped name")
    known = builtin_recipes()
    near = difflib.get_close_matches(Path(name).stem, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise RecipeError(
        f"there is no recipe {name!r}, neither as a file nor among the shipped ones.{hint}\n"
        f"  shipped: {', '.join(known)}"
    )


def load_recipe(path: Path | None, overrides: list[str], root: str | None = None) -> Recipe:
    """The recipe of a YAML file (None: the defaults) with `section.key=value` overrides applied.

    `root` is a data root as the user typed it, which no YAML is to interpret. Raises RecipeError
    with one line for every problem: unknown keys, types, ranges, combinations.
    """
    problems: list[str] = []
    in_file = list(flatten(_read(path))) if path else []
    on_line = list(_parse(overrides, problems))
    if root is not None:
        on_line.append(("data.root", root.replace("${", "\\${")))
    config = OmegaConf.structured(Recipe)
    for section in ("", *(name for name, node in config.items() if isinstance(node, DictConfig))):
        # Frozen dataclasses make frozen nodes; only the result is to be frozen.
        OmegaConf.set_readonly(config[section] if section else config, False)
    _merge(config, in_file, f"{path}: ", problems)
    file_recipe = _build(config, []) if not problems else None
    _merge(config, on_line, OVERRIDE, problems)
    recipe = _build(config, problems)
    if recipe is not None:
        problems += _out_of_range(recipe)
        problems += _contradictions(recipe)
    if recipe is not None and file_recipe is not None:
        # An override may idle what the file says, but nothing may be idle in its own company.
        problems += _idle(file_recipe, [key for key, _ in in_file], f"{path}: ")
        problems += _idle(recipe, [key for key, _ in on_line], OVERRIDE)
    if problems:
        text = "".join(f"\n  - {problem}" for problem in dict.fromkeys(problems))
        raise RecipeError(f"the recipe cannot be used:{text}")
    return recipe


def recipe_from_yaml(text: str) -> Recipe:
    """The recipe that `to_text` wrote; RecipeError where this version's schema differs."""
    try:
        stored = OmegaConf.create(
            decode_binary_paths(OmegaConf.to_container(OmegaConf.create(text)))
        )
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), stored))
    except (YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"the stored recipe is not of this version: {error}") from None


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML: every field that has an effect.

    A path that is not UTF-8 becomes `!!binary`, since YAML has no other place for its bytes.
    """
    content = asdict(recipe)
    values = dict(flatten(recipe))
    for key in values:
        section, _, leaf = key.rpartition(".")
        idle = key in IDLE and IDLE[key](recipe)
        if idle or (key in OFF and values[key] == OFF[key]):
            del (content[section] if section else content)[leaf]
        elif section and isinstance(values[key], str):
            # A path as it was typed, in which nothing is to be interpolated.
            text = values[key].replace("${", "\\${")
            content[section][leaf] = text if _is_unicode(text) else os.fsencode(text)
    return OmegaConf.to_yaml(OmegaConf.create(content))


def _is_unicode(text: str) -> bool:
    """Whether a string can be encoded: it has no bytes that were not UTF-8."""
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


def decode_binary_paths(node: Any) -> Any:
    """What YAML gives, with paths in `!!binary` as the strings that `to_text` had."""
    if isinstance(node, dict):
        return {key: decode_binary_paths(value) for key, value in node.items()}
    return os.fsdecode(node) if isinstance(node, bytes) else node


def _read(path: Path) -> dict:
    try:
        content = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {error}") from None
    if content == {}:
        raise RecipeError(f"{path} is empty: a recipe holds `key: value` lines")
    if not isinstance(content, DictConfig):
        raise RecipeError(f"{path} must hold `key: value` lines, not a {type(content).__name__}")
    return decode_binary_paths(OmegaConf.to_container(content))


def _parse(overrides: list[str], problems: list[str]) -> Iterator[tuple[str, Any]]:
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            problems.append(f"override {text!r} is not of the form section.key=value")
            continue
        if not _is_unicode(value):  # a path of other bytes than UTF-8, which YAML cannot read
            yield key, value.replace("${", "\\${")
            continue
        try:
            # One key at a time, and only the value through YAML: `key=` alone means an empty one.
            yield from flatten(OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={value}"])))
        except (YAMLError, OmegaConfBaseException) as error:
            problems.append(f"override {text!r}: {str(error).splitlines()[0]}")


def _merge(
    config: DictConfig, pairs: list[tuple[str, Any]], origin: str, problems: list[str]
) -> None:
    """Sets each pair in `config`; what cannot be set becomes a line in `problems`."""
    known = [key for key, _ in flatten(Recipe())]
    sections = {key.rpartition(".")[0] for key in known}
    for key, value in pairs:
        if key in sections - {""}:
            text = alias_hint(key, spell(value)) if origin == OVERRIDE else ""
            problems.append(
                f"{origin}{key} is a section: give {key}.KEY, not a value of its own"
                + (f"; {text}" if text else "")
            )
        elif key not in known:
            given = spell(value) if origin == OVERRIDE else None
            problems.append(f"{origin}unknown key {key!r}{_instead(key, given, known)}")
        else:
            try:
                OmegaConf.update(config, key, value)
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0]
                if value is None:
                    reason = "needs a value"
                elif "TupleConfig" in reason and key in ("data.mean", "data.std"):
                    reason = f"needs three numbers, {key}=[R,G,B]"
                elif "TupleConfig" in reason:
                    reason = f"needs two numbers, {key}=[LOW,HIGH]"
                elif isinstance(value, float) and value.is_integer():
                    reason += f": write {int(value)}"
                problems.append(f"{origin}{key}: {reason}")


def _instead(key: str, given: str | None, known: list[str]) -> str:
    """What an unknown key most likely stands for; `given` is its value in an override."""
    if text := alias_hint(key, given):
        return f"; {text}"
    near = nearest(key, known)
    if near:
        meant = " or ".join(f"'{k}'" if given is None else f"'{k}={given}'" for k in near)
        return f". Did you mean {meant}?"
    section = key.rpartition(".")[0]
    here = [k for k in known if section and k.startswith(f"{section}.")]
    return f". Known there: {', '.join(here)}." if here else ""


def nearest(key: str, known: list[str]) -> list[str]:
    """The known keys that a misspelt one may stand for: of the same last part, or spelt alike."""
    same_leaf = [k for k in known if leaf_name(k) == leaf_name(key)]
    near = same_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        by_leaf = {leaf_name(k): k for k in known}
        close = difflib.get_close_matches(leaf_name(key), by_leaf, n=1, cutoff=0.7)
        near = [by_leaf[name] for name in close]
    return near


def _build(config: DictConfig, problems: list[str]) -> Recipe | None:
    """The frozen dataclasses; None where an interpolation fails."""
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        problems.append(f"{error.full_key}: {str(error).splitlines()[0]}")
        return None


def _out_of_range(recipe: Recipe) -> list[str]:
    problems = []

    def visit(node: Any, prefix: str) -> None:
        for entry in fields(node):
            key, value = prefix + entry.name, getattr(node, entry.name)
            if is_dataclass(value):
                visit(value, f"{key}.")
            elif "range" in entry.metadata:
                low, high = entry.metadata["range"]
                values = value if isinstance(value, tuple) else (value,)
                if value is not None and not all(low <= v <= high for v in values):  # NaN too
                    problems.append(f"{key} is {value}, must be {_spell(low, high)}")
                elif "unordered" not in entry.metadata and list(values) != sorted(values):
                    problems.append(f"{key} is {value}: the smaller bound comes first")

    visit(recipe, "")
    classes = recipe.model.classes
    if classes != "auto" and classes < 2:
        problems.append(f"model.classes is {classes}, must be at least 2 or auto")
    return problems


def _spell(low: float, high: float) -> str:
    return f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"


def _contradictions(recipe: Recipe) -> list[str]:
    problems = []
    problems += _model_problems(recipe)
    batch, group, mix = recipe.batch, recipe.group, recipe.mix
    if min(batch, group) > 1 and batch % group:  # below, they are out of range
        fits = [n for n in range(2, batch + 1) if batch % n == 0]
        nearest = min(fits, key=lambda n: abs(n - group))
        problems.append(
            f"batch ({batch}) is not a multiple of group ({group}): "
            f"try group={nearest} or batch={max(1, round(batch / group)) * group}"
        )
    if recipe.data.image_size % 32:
        size = max(32, round(recipe.data.image_size / 32) * 32)
        problems.append(
            f"data.image_size ({recipe.data.image_size}) must be a multiple of 32: try {size}"
        )
    if recipe.data.normalize == "custom" and None in (recipe.data.mean, recipe.data.std):
        problems.append("data.normalize=custom needs data.mean=[R,G,B] and data.std=[R,G,B]")
    first = recipe.data.start_image_size
    if first is not None and (first % 32 or first >= recipe.data.image_size):
        problems.append(
            f"data.start_image_size ({first}) must be a multiple of 32 below data.image_size "
            f"({recipe.data.image_size})"
        )
    if mix.probability > 0:
        if not (mix.cutmix or mix.mosaic):
            problems.append(
                "mix.probability is above 0, but mix.cutmix and mix.mosaic are off: "
                "set mix.probability=0 or switch one on"
            )
        if mix.mosaic and group < 4:
            problems.append(f"mix.mosaic takes four images from a group, group is {group}")
        if mix.probability < 1 and mix.images_per_draw > 0 and group % mix.images_per_draw:
            problems.append(
                f"group ({group}) is not a multiple of mix.images_per_draw ({mix.images_per_draw})"
            )
    if recipe.adversarial.step_size > 0:
        steps, warmup = recipe.schedule.steps, recipe.schedule.warmup_steps
        if recipe.adversarial.probability == 0:
            problems.append("adversarial.step_size has no effect: adversarial.probability is 0")
        if warmup >= steps - 1:
            problems.append(
                f"adversarial.step_size has no effect: no step of {steps:,} follows the warm-up "
                f"({warmup:,})"
            )
    return problems


def _model_problems(recipe: Recipe) -> list[str]:
    problems, model = [], recipe.model
    ours = model.name in STAGE_COUNTS
    if not ours and (not model.name.startswith(TIMM_PREFIX) or model.name == TIMM_PREFIX):
        near = difflib.get_close_matches(model.name, STAGE_COUNTS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        problems.append(
            f"model.name is {model.name!r}, must be one of {', '.join(STAGE_COUNTS)}, "
            f"or {TIMM_PREFIX}NAME for one of timm's nets.{hint}"
        )
    if model.freeze_stages and not model.init_from:
        problems.append(
            "model.freeze_stages keeps random numbers: give model.init_from, or leave model.freeze_stages out"
        )
    if model.freeze_stages and model.name.startswith(TIMM_PREFIX):
        problems.append(f"model.freeze_stages is for cspnet's own nets: {', '.join(STAGE_COUNTS)}")
    elif ours and model.freeze_stages > STAGE_COUNTS[model.name]:
        problems.append(
            f"model.freeze_stages is {model.freeze_stages}, {model.name} has {STAGE_COUNTS[model.name]} stages"
        )
    if recipe.optim.backbone_lr is not None and recipe.optim.learning_rate == 0:
        problems.append("optim.backbone_lr needs an optim.learning_rate above 0 beside it")
    return problems


def _idle(recipe: Recipe, given: list[str], origin: str) -> list[str]:
    return [
        f"{origin}{key} has no effect, since {IDLE[key](recipe)}: leave it out"
        for key in given
        if key in IDLE and IDLE[key](recipe)
    ]
