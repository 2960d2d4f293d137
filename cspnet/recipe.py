"""The recipe: everything that changes the numbers of a run, and nothing else.

The dataclasses are the schema and the only home of a default. `load` reads a YAML file and dotted
overrides into a frozen `Recipe`, or raises one RecipeError that lists every problem found.
The sources of the default values are in docs/recipe-sources.md.
"""

import difflib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cspnet.errors import RecipeError

DIGITS = "digits"  # the name, in place of a folder, of the embedded data set
# Nets of ours and the number of their stages; what begins with TIMM is one of timm's.
STAGES = {"cspdarknet53": 5, "darknet53": 5, "cspresnet50": 4, "cspresnext50": 4}
TIMM = "timm/"


def within(default: Any, low: float, high: float = float("inf")) -> Any:
    """A field with values in [low, high], or None; the two of a pair in ascending order."""
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True, kw_only=True)
class Model:
    # A key of STAGES, or timm/NAME.
    name: str = "cspdarknet53"
    # "auto" takes the classes of the training folder; a number must agree with them.
    classes: int | Literal["auto"] = "auto"
    activation: Literal["mish", "leaky"] = "mish"
    # Slope of the leaky rectifier for x < 0: 0.1 in Darknet, 0.01 in timm.
    leaky_slope: float = within(0.1, 0, 1)
    # Multiplies every channel count.
    width: float = within(1.0, 0.05, 4)
    norm_eps: float = within(1e-5, 1e-9, 1)
    # Share of a new group in BatchNorm's running averages (torch's `momentum`).
    norm_momentum: float = within(0.01, 1e-6, 1)
    # Weights to start from: any file that `--checkpoint` takes, or timm:NAME. The classifier is
    # taken over only where its classes are those of the training set.
    weights: str | None = None
    # The stem and so many first stages keep their weights and running statistics; 0: none does.
    freeze: int = within(0, 0, 5)


@dataclass(frozen=True, kw_only=True)
class Data:
    # A folder with train/ and val/, each with a folder per class; or "digits".
    root: str = "data/imagenet"
    # Side of the square that the net sees, pixels.
    size: int = within(256, 32, 1024)
    # "none" leaves RGB in [0, 1]; "imagenet" subtracts the mean, divides by the standard deviation.
    normalize: Literal["none", "imagenet"] = "none"


@dataclass(frozen=True, kw_only=True)
class Augment:
    # Range of the length, in units of `data.size`, to which the image's shorter side is resized.
    resize: tuple[float, float] = within((0.5, 1.75), 0.1, 10)
    # Aspect ratio is changed by a factor between this and its inverse.
    aspect: float = within(0.75, 0.05, 1)
    # Rotation in either direction, degrees.
    angle: float = within(7.0, 0, 180)
    # Probability of a horizontal flip.
    flip: float = within(0.5, 0, 1)
    # Hue is shifted by at most this share of the colour circle, in either direction.
    hue: float = within(0.1, 0, 0.5)
    # Saturation and value are multiplied by a factor between this and its inverse.
    saturation: float = within(0.75, 0.05, 1)
    value: float = within(0.75, 0.05, 1)


@dataclass(frozen=True, kw_only=True)
class Mix:
    # Probability that an image is mixed with others of its group; then by CutMix or by Mosaic, with
    # equal chance where both are on.
    probability: float = within(0.5, 0, 1)
    cutmix: bool = True
    mosaic: bool = True
    # Consecutive images that share one draw of `probability`.
    share: int = within(4, 1)
    # Range of the sides of CutMix's box, and of Mosaic's dividing lines, in units of `data.size`.
    cutmix_side: tuple[float, float] = within((0.3, 0.8), 0, 1)
    mosaic_split: tuple[float, float] = within((0.2, 0.8), 0, 1)


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    # Step size of the attack at the end of the schedule, towards which it grows with the step;
    # 0 switches self-adversarial training off. Darknet's adversarial_lr.
    strength: float = within(0.0, 0, 1000)
    # Probability that a group is attacked, after the warm-up.
    probability: float = within(0.5, 0, 1)
    # "nothing" lowers what the net believes in, as Darknet; "label" raises the loss, ours.
    target: Literal["nothing", "label"] = "nothing"


@dataclass(frozen=True, kw_only=True)
class Loss:
    # The true class has the target 1 - smoothing, each other one smoothing / (classes - 1).
    smoothing: float = within(0.1, 0, 0.99)


@dataclass(frozen=True, kw_only=True)
class Optim:
    learning_rate: float = within(0.1, 0, 100)
    momentum: float = within(0.9, 0, 0.9999)
    # On the weights of convolutions and of the classifier only.
    weight_decay: float = within(5e-4, 0, 1)
    # Peak learning rate of everything but the classifier, which keeps `learning_rate`.
    backbone_lr: float | None = within(None, 0, 100)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    # Optimizer steps of the whole run.
    steps: int = within(1_200_000, 1)
    warmup_steps: int = within(1000, 0)
    # Exponent of the warm-up and of the decay.
    power: float = within(4.0, 0, 20)


@dataclass(frozen=True, kw_only=True)
class Average:
    # Decay per step of the exponential moving average of the weights; 0 keeps none.
    decay: float = within(0.0, 0, 0.999999)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    # Steps between validations; one more follows the last step.
    every: int = within(10_000, 1)
    # The image's shorter side becomes size / crop, then the central square is taken.
    crop: float = within(1.0, 0.1, 1)
    # "antialias" is PIL's and timm's bilinear; "corners" is Darknet's: corner-aligned, and without
    # antialiasing.
    resize: Literal["antialias", "corners"] = "corners"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    seed: int = within(0, 0, 2**63 - 1)
    # Images of an optimizer step, and of a group: BatchNorm and mixing never look past a group.
    batch: int = within(128, 2)
    group: int = within(32, 2)
    # "auto": fp16 on compute capability 7.x, bf16 from 8.0 on, fp32 on a CPU.
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    # Steps between two lines of metrics, and between two saves.
    log_every: int = within(50, 1)
    save_every: int = within(1000, 1)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    mix: Mix = field(default_factory=Mix)
    adversarial: Adversarial = field(default_factory=Adversarial)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    average: Average = field(default_factory=Average)
    evaluate: Evaluate = field(default_factory=Evaluate)

    @property
    def groups(self) -> int:
        """Groups in an optimizer step."""
        return self.batch // self.group


def _foreign(recipe: Recipe) -> str:
    return "model.name is one of timm's" if recipe.model.name.startswith(TIMM) else ""


def _unmixed(recipe: Recipe) -> str:
    return "mix.probability is 0" if recipe.mix.probability == 0 else ""


def _unattacked(recipe: Recipe) -> str:
    return "adversarial.strength is 0" if recipe.adversarial.strength == 0 else ""


# Why a field has no effect in a recipe; empty where it has one.
IDLE = {
    "model.activation": _foreign,
    "model.leaky_slope": lambda r: (
        _foreign(r) or ("" if r.model.activation == "leaky" else "model.activation is mish")
    ),
    "model.width": _foreign,
    "model.norm_eps": _foreign,
    "model.norm_momentum": _foreign,
    "mix.cutmix": _unmixed,
    "mix.mosaic": _unmixed,
    "mix.share": lambda r: _unmixed(r) or ("mix.probability is 1" * (r.mix.probability == 1)),
    "mix.cutmix_side": lambda r: _unmixed(r) or ("" if r.mix.cutmix else "mix.cutmix is off"),
    "mix.mosaic_split": lambda r: _unmixed(r) or ("" if r.mix.mosaic else "mix.mosaic is off"),
    "adversarial.probability": _unattacked,
    "adversarial.target": _unattacked,
}
# Fields that ask for nothing at this value: a recipe need not give them.
OFF = {"model.weights": None, "model.freeze": 0, "optim.backbone_lr": None}


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


def find(name: str) -> Path:
    """Path of a recipe given by path, or by the name of a shipped one, with or without `.yaml`."""
    here = Path(__file__).resolve().parent
    shipped = [folder for folder in (here / "recipes", here.parent / "recipes") if folder.is_dir()]
    names = [name] if name.endswith((".yaml", ".yml")) else [name, f"{name}.yaml"]
    for folder in [Path(), *shipped]:
        for candidate in names:
            path = folder / candidate
            if path.is_file():
                return path
    known = sorted({path.stem for folder in shipped for path in folder.glob("*.yaml")})
    near = difflib.get_close_matches(Path(name).stem, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise RecipeError(
        f"there is no recipe {name!r}, neither as a file nor among the shipped ones.{hint}\n"
        f"  shipped: {', '.join(known)}"
    )


def load(path: Path | None, overrides: list[str], root: str | None = None) -> Recipe:
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
    _merge(config, on_line, "override: ", problems)
    recipe = _build(config, problems)
    if recipe is not None:
        problems += _out_of_range(recipe)
        problems += _contradictions(recipe)
    if recipe is not None and file_recipe is not None:
        # An override may idle what the file says, but nothing may be idle in its own company.
        problems += _idle(file_recipe, [key for key, _ in in_file], f"{path}: ")
        problems += _idle(recipe, [key for key, _ in on_line], "override: ")
    if problems:
        text = "".join(f"\n  - {problem}" for problem in dict.fromkeys(problems))
        raise RecipeError(f"the recipe cannot be used:{text}")
    return recipe


def from_text(text: str) -> Recipe:
    """The recipe that `to_text` wrote; RecipeError where this version's schema differs."""
    try:
        stored = OmegaConf.create(text)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), stored))
    except (YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"the stored recipe is not of this version: {error}") from None


def to_text(recipe: Recipe) -> str:
    """The recipe as YAML: every field that has an effect."""
    content = asdict(recipe)
    values = dict(flatten(recipe))
    for key in values:
        section, _, leaf = key.rpartition(".")
        idle = key in IDLE and IDLE[key](recipe)
        if idle or (key in OFF and values[key] == OFF[key]):
            del content[section][leaf]
        elif section and isinstance(values[key], str):
            # A path as it was typed, in which nothing is to be interpolated.
            content[section][leaf] = values[key].replace("${", "\\${")
    return OmegaConf.to_yaml(OmegaConf.create(content))


def _read(path: Path) -> dict:
    try:
        content = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(content, DictConfig):
        raise RecipeError(f"{path} must hold `key: value` lines, not a {type(content).__name__}")
    return OmegaConf.to_container(content)


def _parse(overrides: list[str], problems: list[str]) -> Iterator[tuple[str, Any]]:
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            problems.append(f"override {text!r} is not of the form section.key=value")
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
            problems.append(f"{origin}{key} is a section: give {key}.KEY, not a value of its own")
        elif key not in known:
            problems.append(f"{origin}unknown key {key!r}.{_nearest(key, known)}")
        else:
            try:
                OmegaConf.update(config, key, value)
            except OmegaConfBaseException as error:
                problems.append(f"{origin}{key}: {str(error).splitlines()[0]}")


def _nearest(key: str, known: list[str]) -> str:
    section, _, leaf = key.rpartition(".")
    same_leaf = [k for k in known if k.rpartition(".")[2] == leaf]
    near = same_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        by_leaf = {k.rpartition(".")[2]: k for k in known}
        near = [by_leaf[m] for m in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)]
    if near:
        return f" Did you mean {near[0]!r}?"
    here = [k for k in known if section and k.startswith(f"{section}.")]
    return f" Known there: {', '.join(here)}." if here else ""


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
                elif list(values) != sorted(values):
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
    if batch % group:
        fits = [n for n in range(2, batch + 1) if batch % n == 0]
        nearest = min(fits, key=lambda n: abs(n - group))
        problems.append(
            f"batch ({batch}) is not a multiple of group ({group}): "
            f"try group={nearest} or batch={max(1, round(batch / group)) * group}"
        )
    if recipe.data.size % 32:
        size = max(32, round(recipe.data.size / 32) * 32)
        problems.append(f"data.size ({recipe.data.size}) must be a multiple of 32: try {size}")
    if mix.probability > 0:
        if not (mix.cutmix or mix.mosaic):
            problems.append(
                "mix.probability is above 0, but mix.cutmix and mix.mosaic are off: "
                "set mix.probability=0 or switch one on"
            )
        if mix.mosaic and group < 4:
            problems.append(f"mix.mosaic takes four images from a group, group is {group}")
        if mix.probability < 1 and group % mix.share:
            problems.append(f"group ({group}) is not a multiple of mix.share ({mix.share})")
    if recipe.adversarial.strength > 0:
        steps, warmup = recipe.schedule.steps, recipe.schedule.warmup_steps
        if recipe.adversarial.probability == 0:
            problems.append("adversarial.strength has no effect: adversarial.probability is 0")
        if warmup >= steps - 1:
            problems.append(
                f"adversarial.strength has no effect: no step of {steps:,} follows the warm-up "
                f"({warmup:,})"
            )
    return problems


def _model_problems(recipe: Recipe) -> list[str]:
    problems, model = [], recipe.model
    ours = model.name in STAGES
    if not ours and (not model.name.startswith(TIMM) or model.name == TIMM):
        near = difflib.get_close_matches(model.name, STAGES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        problems.append(
            f"model.name is {model.name!r}, must be one of {', '.join(STAGES)}, "
            f"or {TIMM}NAME for one of timm's nets.{hint}"
        )
    if model.freeze and not model.weights:
        problems.append(
            "model.freeze keeps random numbers: give model.weights, or leave model.freeze out"
        )
    if model.freeze and model.name.startswith(TIMM):
        problems.append(f"model.freeze is for cspnet's own nets: {', '.join(STAGES)}")
    elif ours and model.freeze > STAGES[model.name]:
        problems.append(
            f"model.freeze is {model.freeze}, {model.name} has {STAGES[model.name]} stages"
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
