"""The recipe's schema: each field with its meaning, its range, and its only default.

The sources of the values are in docs/recipe-sources.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

DIGITS = "digits"  # the name, in place of a folder, of the embedded data set
# Nets of ours and the number of their stages; what begins with TIMM is one of timm's.
STAGE_COUNTS = {"cspdarknet53": 5, "darknet53": 5, "cspresnet50": 4, "cspresnext50": 4}
TIMM_PREFIX = "timm/"


def within(default: Any, low: float, high: float = float("inf")) -> Any:
    """A field with values in [low, high], or None; the two of a pair in ascending order."""
    return field(default=default, metadata={"range": (low, high)})


def triple(low: float, high: float) -> Any:
    """A field with a value in [low, high] for each of R, G and B, or None, which is its default."""
    return field(default=None, metadata={"range": (low, high), "unordered": True})


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
    init_from: str | None = None
    # The class order of weights that come without class names. "auto" takes the classifier over
    # where the natural order of the folder names (timm's) and the sorted one are the same, and
    # refuses where they differ; "fresh" does not take it over.
    class_order: Literal["auto", "natural", "sorted", "fresh"] = "auto"
    # The stem and so many first stages keep their weights and running statistics; 0: none does.
    freeze_stages: int = within(0, 0, 5)


@dataclass(frozen=True, kw_only=True)
class Data:
    # A folder with train/ and val/, each with a folder per class; or "digits".
    root: str = "data/imagenet"
    # Side of the square that the net sees, pixels.
    image_size: int = within(256, 32, 1024)
    # Side at the start of the run, which grows by 32 pixels at a time, for equal numbers of steps,
    # until it is `size` from this share of the schedule on.
    start_image_size: int | None = within(None, 32, 1024)
    full_size_from: float = within(0.8, 0, 1)
    # "none" leaves RGB in [0, 1]; "imagenet" subtracts the mean, divides by the standard deviation;
    # "custom" does so with `mean` and `std`, of R, G and B in [0, 1].
    normalize: Literal["none", "imagenet", "custom"] = "none"
    mean: tuple[float, float, float] | None = triple(-10, 10)
    std: tuple[float, float, float] | None = triple(1e-4, 1000)
    # The run stops where more than this share of the training images has turned out unreadable.
    max_unreadable: float = within(0.01, 0, 1)
    # Decode a JPEG at half or a quarter of its size where its view is so much smaller anyway: less
    # work for large photos, the same geometry, averages of pixels where the plain warp skips some.
    reduced_decode: bool = False


@dataclass(frozen=True, kw_only=True)
class Augment:
    # Range of the length, in units of `data.image_size`, to which the image's shorter side is resized.
    scale: tuple[float, float] = within((0.5, 1.75), 0.1, 10)
    # Aspect ratio is changed by a factor between this and its inverse.
    aspect: float = within(0.75, 0.05, 1)
    # Rotation in either direction, degrees.
    rotation: float = within(7.0, 0, 180)
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
    images_per_draw: int = within(4, 1)
    # Range of the sides of CutMix's box, and of Mosaic's dividing lines, in units of `data.image_size`.
    cutmix_side: tuple[float, float] = within((0.3, 0.8), 0, 1)
    mosaic_split: tuple[float, float] = within((0.2, 0.8), 0, 1)


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    # Step size of the attack at the end of the schedule, towards which it grows with the step;
    # 0 switches self-adversarial training off. Darknet's adversarial_lr.
    step_size: float = within(0.0, 0, 1000)
    # Probability that a group is attacked, after the warm-up.
    probability: float = within(0.5, 0, 1)
    # "nothing" lowers what the net believes in, as Darknet; "label" raises the loss, ours.
    objective: Literal["suppress", "mislead"] = "suppress"


@dataclass(frozen=True, kw_only=True)
class Loss:
    # The true class has the target 1 - smoothing, each other one smoothing / (classes - 1).
    label_smoothing: float = within(0.1, 0, 0.99)


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
class Averaging:
    # Decay per step of the exponential moving average of the weights; 0 keeps none.
    decay: float = within(0.0, 0, 0.999999)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    # Steps between validations; one more follows the last step.
    every: int = within(10_000, 1)
    # The image's shorter side becomes size / crop, then the central square is taken.
    crop_pct: float = within(1.0, 0.1, 1)
    # "antialias" is PIL's and timm's bilinear, "bicubic" their bicubic, which is antialiased too;
    # "align_corners" is Darknet's: bilinear, corner-aligned, and without antialiasing.
    interpolation: Literal["antialias", "bicubic", "align_corners"] = "align_corners"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    seed: int = within(0, 0, 2**63 - 1)
    # Images of an optimizer step, and of a group: BatchNorm and mixing never look past a group.
    batch: int = within(128, 2)
    group: int = within(32, 2)
    # "auto": bf16 from compute capability 8.0 on, fp16 on 7.x, fp32 below, on Turing cards without
    # tensor cores (GTX 16) and on a CPU.
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    # Steps between two lines of metrics, and between two saves.
    log_every: int = within(50, 1)
    save_every: int = within(1000, 1)
    # Steps between two checkpoints that are kept beside last.pt and best.pt, 0 for none; and how
    # many of them, the newest.
    archive_every: int = within(0, 0)
    archive_keep: int = within(3, 1)
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
        """Groups in an optimizer step."""
        return self.batch // self.group

    def size_at(self, step: int) -> int:
        """Side of the training images in a step, pixels."""
        first, last = self.data.start_image_size, self.data.image_size
        growing = self.data.full_size_from * self.schedule.steps
        if first is None or step >= growing:
            return last
        stages = (last - first) // 32  # before the last one
        done = step / growing
        return first + 32 * min(stages, int(done * stages))

    def stages(self, first: int = 0) -> Iterator[tuple[int, int]]:
        """Sides of the training images from step `first` on, pixels, each with its steps."""
        steps = self.schedule.steps
        while first < steps:
            size = self.size_at(first)
            low, high = first, steps  # the last step of that size lies in between
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self.size_at(middle) == size else (low, middle)
            yield size, high - first
            first = high

    def work(self, first: int = 0) -> float:
        """Of all steps from step `first` on, in steps at the full size, by pixels."""
        return sum(steps * (size / self.data.image_size) ** 2 for size, steps in self.stages(first))


def _foreign(recipe: Recipe) -> str:
    return "model.name is one of timm's" if recipe.model.name.startswith(TIMM_PREFIX) else ""


def _fixed_mean(recipe: Recipe) -> str:
    kind = recipe.data.normalize
    return "" if kind == "custom" else f"data.normalize is {kind}"


def _unmixed(recipe: Recipe) -> str:
    return "mix.probability is 0" if recipe.mix.probability == 0 else ""


def _unattacked(recipe: Recipe) -> str:
    return "adversarial.step_size is 0" if recipe.adversarial.step_size == 0 else ""


# Why a field has no effect in a recipe; empty where it has one.
IDLE = {
    "archive_keep": lambda r: "" if r.archive_every else "archive_every is 0",
    "data.full_size_from": lambda r: (
        "data.start_image_size is not given" * (r.data.start_image_size is None)
    ),
    "data.mean": _fixed_mean,
    "data.std": _fixed_mean,
    "model.class_order": lambda r: "" if r.model.init_from else "model.init_from is not given",
    "model.activation": _foreign,
    "model.leaky_slope": lambda r: (
        _foreign(r) or ("" if r.model.activation == "leaky" else "model.activation is mish")
    ),
    "model.width": _foreign,
    "model.norm_eps": _foreign,
    "model.norm_momentum": _foreign,
    "mix.cutmix": _unmixed,
    "mix.mosaic": _unmixed,
    "mix.images_per_draw": lambda r: (
        _unmixed(r) or ("mix.probability is 1" * (r.mix.probability == 1))
    ),
    "mix.cutmix_side": lambda r: _unmixed(r) or ("" if r.mix.cutmix else "mix.cutmix is off"),
    "mix.mosaic_split": lambda r: _unmixed(r) or ("" if r.mix.mosaic else "mix.mosaic is off"),
    "adversarial.probability": _unattacked,
    "adversarial.objective": _unattacked,
}
# Fields that ask for nothing at this value: a recipe need not give them.
OFF = {
    "archive_every": 0,
    "data.start_image_size": None,
    "data.reduced_decode": False,
    "model.init_from": None,
    "model.class_order": "auto",
    "model.freeze_stages": 0,
    "optim.backbone_lr": None,
}
