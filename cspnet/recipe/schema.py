"""The schema of a recipe: each field with its meaning, its range and its only default.

docs/recipe-sources.md gives the source of each value in the recipes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

DIGITS = "digits"  # the value of data.root that selects the embedded data set
# The networks of cspnet and their numbers of stages. Names that start with TIMM_PREFIX are timm's.
STAGE_COUNTS = {"cspdarknet53": 5, "darknet53": 5, "cspresnet50": 4, "cspresnext50": 4}
TIMM_PREFIX = "timm/"


class Need(NamedTuple):
    """A condition on another field, without which a field has no effect."""

    key: str
    test: Callable[[Any], bool] = bool

    def unmet(self, recipe: "Recipe") -> str:
        """Why the condition is not met, such as "mix.cutmix is off"; empty if it is met."""
        value: Any = recipe
        for name in self.key.split("."):
            value = getattr(value, name)
        if self.test(value):
            return ""
        if value in (None, ""):
            return f"{self.key} is not given"
        if isinstance(value, float):
            return f"{self.key} is {value:g}"
        return f"{self.key} is off" if value is False else f"{self.key} is {value}"


def _is(wanted: Any) -> Callable[[Any], bool]:
    return lambda value: value == wanted


_OWN_NETWORK = Need("model.name", lambda name: not name.startswith(TIMM_PREFIX))
_MIXING = Need("mix.probability")
_ATTACK = Need("adversarial.step_size")


def option(default: Any, *, needs: tuple[Need, ...] = (), off: bool = False) -> Any:
    """A field of a recipe.

    It has no effect unless all `needs` are met. With `off`, the default disables the feature, and
    a complete recipe may omit the field.
    """
    return field(default=default, metadata={"needs": needs, "off": off})


def ranged(
    default: Any,
    low: float,
    high: float = float("inf"),
    *,
    needs: tuple[Need, ...] = (),
    off: bool = False,
) -> Any:
    """An `option` with values in [low, high], or None; the two values of a pair must ascend."""
    return field(default=default, metadata={"range": (low, high), "needs": needs, "off": off})


def rgb(low: float, high: float, *, needs: tuple[Need, ...]) -> Any:
    """An `option` with one value in [low, high] for each of R, G and B; None by default."""
    metadata = {"range": (low, high), "unordered": True, "needs": needs, "off": False}
    return field(default=None, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Model:
    # A key of STAGE_COUNTS, or timm/NAME.
    name: str = "cspdarknet53"
    # "auto" uses the classes of the training folder; a number must match them.
    classes: int | Literal["auto"] = "auto"
    activation: Literal["mish", "leaky"] = option("mish", needs=(_OWN_NETWORK,))
    # Slope of leaky ReLU for x < 0: 0.1 in Darknet, 0.01 in timm.
    leaky_slope: float = ranged(
        0.1, 0, 1, needs=(_OWN_NETWORK, Need("model.activation", _is("leaky")))
    )
    # Multiplies every channel count.
    width: float = ranged(1.0, 0.05, 4, needs=(_OWN_NETWORK,))
    norm_eps: float = ranged(1e-5, 1e-9, 1, needs=(_OWN_NETWORK,))
    # Weight of a new group in the running statistics of BatchNorm (torch's `momentum`).
    norm_momentum: float = ranged(0.01, 1e-6, 1, needs=(_OWN_NETWORK,))
    # Initial weights: any file that `--checkpoint` accepts, or timm:NAME. The classifier is loaded
    # only if its classes are those of the training set.
    init_from: str | None = option(None, off=True)
    # Class order of initial weights without class names. "auto" loads the classifier if the
    # natural order of the folder names (timm's) equals the sorted order, and raises an error if
    # they differ; "fresh" does not load it.
    class_order: Literal["auto", "natural", "sorted", "fresh"] = option(
        "auto", needs=(Need("model.init_from"),), off=True
    )
    # Freeze the weights and running statistics of the stem and of this many stages; 0: none.
    freeze_stages: int = ranged(0, 0, 5, off=True)


@dataclass(frozen=True, kw_only=True)
class Data:
    # A folder with train/ and val/, each with one folder per class; or "digits".
    root: str = "data/imagenet"
    # Side of the network's square input, in pixels.
    image_size: int = ranged(256, 32, 1024)
    # Side at the start of the run. It grows in increments of 32 pixels, each for the same number
    # of steps, and reaches `image_size` at this fraction of the schedule.
    start_image_size: int | None = ranged(None, 32, 1024, off=True)
    full_size_from: float = ranged(
        0.8, 0, 1, needs=(Need("data.start_image_size", lambda size: size is not None),)
    )
    # "none" keeps RGB in [0, 1]; "imagenet" subtracts the ImageNet mean and divides by the standard
    # deviation; "custom" does the same with `mean` and `std` of R, G and B in [0, 1].
    normalize: Literal["none", "imagenet", "custom"] = "none"
    mean: tuple[float, float, float] | None = rgb(
        -10, 10, needs=(Need("data.normalize", _is("custom")),)
    )
    std: tuple[float, float, float] | None = rgb(
        1e-4, 1000, needs=(Need("data.normalize", _is("custom")),)
    )
    # Stop the run if more than this fraction of the training images is unreadable.
    max_unreadable: float = ranged(0.01, 0, 1)
    # Decode a JPEG at half or a quarter of its size if the augmentation shrinks it at least that
    # much. Faster for large photos; same geometry, but with averaged pixels where the default warp
    # skips some.
    reduced_decode: bool = option(False, off=True)


@dataclass(frozen=True, kw_only=True)
class Augment:
    # Resize the shorter side of the image to a length in this range, in units of the image size.
    scale: tuple[float, float] = ranged((0.5, 1.75), 0.1, 10)
    # Change the aspect ratio by a factor between this and its inverse.
    aspect: float = ranged(0.75, 0.05, 1)
    # Maximum rotation in either direction, in degrees.
    rotation: float = ranged(7.0, 0, 180)
    # Probability of a horizontal flip.
    flip: float = ranged(0.5, 0, 1)
    # Maximum hue shift in either direction, as a fraction of the colour circle.
    hue: float = ranged(0.1, 0, 0.5)
    # Multiply saturation and value (brightness) by a factor between this and its inverse.
    saturation: float = ranged(0.75, 0.05, 1)
    value: float = ranged(0.75, 0.05, 1)


@dataclass(frozen=True, kw_only=True)
class Mix:
    # Probability that an image is mixed with others of its group, by CutMix or by Mosaic; with
    # equal probability if both are on.
    probability: float = ranged(0.5, 0, 1)
    cutmix: bool = option(True, needs=(_MIXING,))
    mosaic: bool = option(True, needs=(_MIXING,))
    # Number of consecutive images that share one draw of `probability`.
    images_per_draw: int = ranged(
        4, 1, needs=(_MIXING, Need("mix.probability", lambda probability: probability != 1))
    )
    # Ranges of the sides of CutMix's box and of Mosaic's dividing lines, in units of the image
    # size.
    cutmix_side: tuple[float, float] = ranged((0.3, 0.8), 0, 1, needs=(_MIXING, Need("mix.cutmix")))
    mosaic_split: tuple[float, float] = ranged(
        (0.2, 0.8), 0, 1, needs=(_MIXING, Need("mix.mosaic"))
    )


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    # Step size of the attack at the end of the schedule (Darknet's adversarial_lr). It grows
    # linearly with the step; 0 disables self-adversarial training.
    step_size: float = ranged(0.0, 0, 1000)
    # Probability that a group is attacked, after the warm-up.
    probability: float = ranged(0.5, 0, 1, needs=(_ATTACK,))
    # "suppress" lowers all logits, as Darknet does; "mislead" raises the loss (cspnet's variant).
    objective: Literal["suppress", "mislead"] = option("suppress", needs=(_ATTACK,))


@dataclass(frozen=True, kw_only=True)
class Loss:
    # Target 1 - label_smoothing for the true class, label_smoothing / (classes - 1) for the others.
    label_smoothing: float = ranged(0.1, 0, 0.99)


@dataclass(frozen=True, kw_only=True)
class Optim:
    learning_rate: float = ranged(0.1, 0, 100)
    momentum: float = ranged(0.9, 0, 0.9999)
    # Applied only to the weights of convolutions and of the classifier.
    weight_decay: float = ranged(5e-4, 0, 1)
    # Peak learning rate of everything except the classifier, which uses `learning_rate`.
    backbone_lr: float | None = ranged(None, 0, 100, off=True)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    # Optimizer steps of the whole run.
    steps: int = ranged(1_200_000, 1)
    warmup_steps: int = ranged(1000, 0)
    # Exponent of the warm-up and of the decay.
    power: float = ranged(4.0, 0, 20)


@dataclass(frozen=True, kw_only=True)
class Averaging:
    # Decay per step of the exponential moving average (EMA) of the weights; 0 disables it.
    decay: float = ranged(0.0, 0, 0.999999)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    # Steps between validations; the last step is always followed by one.
    every: int = ranged(10_000, 1)
    # Resize the shorter side to image_size / crop_pct, then take the central square.
    crop_pct: float = ranged(1.0, 0.1, 1)
    # "antialias" and "bicubic" are PIL's and timm's bilinear and bicubic, both antialiased;
    # "align_corners" is Darknet's: bilinear, corner-aligned, without antialiasing.
    interpolation: Literal["antialias", "bicubic", "align_corners"] = "align_corners"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    seed: int = ranged(0, 0, 2**63 - 1)
    # Images per optimizer step, and per group. A group is the ghost batch: the unit of BatchNorm
    # statistics and of mixing.
    batch: int = ranged(128, 2)
    group: int = ranged(32, 2)
    # "auto": bf16 from compute capability 8.0 on; fp16 on 7.x with tensor cores; fp32 on other GPUs
    # (such as the GTX 16 series) and on a CPU.
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    # Steps between two lines of metrics, and between two saves.
    log_every: int = ranged(50, 1)
    save_every: int = ranged(1000, 1)
    # Steps between two archived checkpoints, which are kept in addition to last.pt and best.pt (0:
    # none), and the number of archived checkpoints to keep.
    archive_every: int = ranged(0, 0, off=True)
    archive_keep: int = ranged(3, 1, needs=(Need("archive_every"),))
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    mix: Mix = field(default_factory=Mix)
    adversarial: Adversarial = field(default_factory=Adversarial)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    ema: Averaging = field(default_factory=Averaging)
    evaluate: Evaluate = field(default_factory=Evaluate)

    @property
    def groups(self) -> int:
        """Number of groups in an optimizer step."""
        return self.batch // self.group

    def size_at(self, step: int) -> int:
        """Side of the training images in a step, in pixels."""
        start, full = self.data.start_image_size, self.data.image_size
        growth_steps = self.data.full_size_from * self.schedule.steps
        if start is None or step >= growth_steps:
            return full
        increments = (full - start) // 32
        progress = step / growth_steps
        return start + 32 * min(increments, int(progress * increments))

    def size_stages(self, first: int = 0) -> Iterator[tuple[int, int]]:
        """Image sizes in pixels from step `first` on, each with its number of steps."""
        steps = self.schedule.steps
        while first < steps:
            size = self.size_at(first)
            low, high = first, steps  # bisect for the end of this size
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self.size_at(middle) == size else (low, middle)
            yield size, high - first
            first = high

    def full_size_steps(self, first: int = 0) -> float:
        """Pixels of all steps from step `first` on, as an equivalent number of full-size steps."""
        return sum(
            steps * (size / self.data.image_size) ** 2 for size, steps in self.size_stages(first)
        )


@cache
def _metadata() -> dict[str, Any]:
    """Metadata of the fields by dotted key; fields without any are left out."""
    metadata: dict[str, Any] = {}
    for entry in fields(Recipe):
        section = entry.default_factory
        if is_dataclass(section):
            metadata.update(
                {f"{entry.name}.{leaf.name}": leaf.metadata for leaf in fields(section)}
            )
        else:
            metadata[entry.name] = entry.metadata
    return {key: values for key, values in metadata.items() if values}


def no_effect(recipe: Recipe, key: str) -> str:
    """Why a field has no effect in a recipe; empty if it has one. `key` is dotted."""
    needs = _metadata().get(key, {}).get("needs", ())
    return next((reason for need in needs if (reason := need.unmet(recipe))), "")


def is_off(key: str, value: Any) -> bool:
    """Whether a value disables an optional feature, so that a recipe may omit the field."""
    metadata = _metadata().get(key, {})
    return bool(metadata.get("off")) and value == _default(key)


def _default(key: str) -> Any:
    value: Any = Recipe()
    for name in key.split("."):
        value = getattr(value, name)
    return value
