"""What a recipe would need on a card that is not here: counted and computed, a prediction.

Memory: what an eager pass keeps of each image is counted (cspnet/plan/activations.py), what a compiled
one keeps is a share of the convolutions' outputs; the rest is known sizes. Speed: a roofline. Each
convolution takes the longer of its arithmetic and its traffic; what lies between them moves bytes
only. tests/test_plan.py holds the floors to those that were worked out by hand.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from cspnet.errors import RecipeError
from cspnet.plan.activations import ConvCost, conv_costs, eager_activation_bytes
from cspnet.recipe.schema import TIMM_PREFIX, Recipe
from cspnet.train.adversarial import attack_mask
from cspnet.train.setup import sizes_of_passes
from cspnet.weights.load import create_from_recipe


@dataclass(frozen=True)
class Card:
    """A GPU as its maker describes it."""

    name: str
    memory_gb: float
    processors: int  # SMs
    clock_ghz: float  # boost, of the reference card
    flops: int  # of a processor's tensor cores in a cycle: fp16 summed up in fp32, dense
    gb_per_s: float
    precision: str
    source: str

    @property
    def tflops(self) -> float:
        return self.processors * self.clock_ghz * self.flops / 1000


# GeForce sums up in fp32 at half of its tensor cores' rate, from Turing on.
_TURING = "NVIDIA Turing GPU Architecture whitepaper (WP-09183-001), tables of its appendices"
_AMPERE = "NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A"
CARDS = {
    "rtx2070": Card("GeForce RTX 2070", 8, 36, 1.620, 512, 448, "fp16", _TURING),
    "rtx2080": Card("GeForce RTX 2080", 8, 46, 1.710, 512, 448, "fp16", _TURING),
    "rtx2080ti": Card("GeForce RTX 2080 Ti", 11, 68, 1.545, 512, 616, "fp16", _TURING),
    "t4": Card("T4", 16, 40, 1.590, 1024, 320, "fp16", _TURING),
    "rtx3080": Card("GeForce RTX 3080", 10, 68, 1.710, 512, 760, "bf16", _AMPERE),
    "rtx3090": Card("GeForce RTX 3090", 24, 82, 1.695, 512, 936, "bf16", _AMPERE),
    "rtx4090": Card(
        "GeForce RTX 4090", 24, 128, 2.520, 512, 1008, "bf16", "NVIDIA Ada whitepaper, appendix A"
    ),
    "a100": Card("A100 80 GB SXM", 80, 108, 1.410, 2048, 2039, "bf16", "A100 data sheet, 2021"),
    "h100": Card("H100 80 GB SXM", 80, 132, 1.830, 4096, 3350, "bf16", "H100 data sheet, 2023"),
}
# Passes over a convolution's output in memory that a training step makes beside the convolutions:
# BatchNorm, Mish, residuals, concatenation, and their gradients, in kernels fused by Inductor.
BETWEEN = 8.5
# What a compiled net keeps for the backward pass, as a share of its convolutions' outputs, by
# preset of --memory: counted for cspdarknet53 with Mish by benchmarks/memory.py.
KEPT = {"fast": 1.916, "fit": 1.012, "tiny": 0.563}
# Shares of a card's peaks that good kernels reach, and of the rate so computed that whole steps
# have reached: on an RTX 3090 timm's net 0.95, ResNet-50 on Turing cards 0.72.
ARITHMETIC, TRAFFIC, REACHED = 0.75, 0.88, (0.72, 0.95)
USABLE = 0.925  # of a card's memory: its context and cuDNN's handles take the rest
WORKSPACE_GB = 0.35  # of cuDNN, and the gradients of activations on their way


@dataclass(frozen=True)
class Forecast:
    """Per image at the full size, unless it says otherwise; MB and GB are powers of ten."""

    card: Card
    saved_mb: dict[str, float]  # for the backward pass: compiled and eager
    fixed_gb: float  # weights, gradients, momentum, averages, 16-bit copies, workspace
    fits: dict[str, int]  # groups at once, the same; 0 where not even one does
    at_most: float  # images/s, by the card's peaks
    expected: tuple[float, float]  # images/s
    checkpoint_gb: float
    seconds: tuple[float, float]  # of the whole run, without validations


def find_card(name: str) -> Card:
    """A card by what people call it: rtx2070, "RTX 2070", 2070. Raises RecipeError."""
    wanted = "".join(sign for sign in name.lower() if sign.isalnum())
    for short in ("nvidia", "geforce", "rtx"):
        wanted = wanted.removeprefix(short)
    for key, card in CARDS.items():
        if wanted and key.removeprefix("rtx") == wanted:
            return card
    raise RecipeError(f"--gpu {name}: there are figures for {', '.join(CARDS)}")


def forecast(recipe: Recipe, card: Card, classes: int, memory: str = "fast") -> Forecast:
    """Raises RecipeError for nets of timm's, of which nothing is known before they run, and for a
    precision other than the card's."""
    if recipe.model.name.startswith(TIMM_PREFIX):
        raise RecipeError(f"model.name={recipe.model.name}: --gpu knows the nets of cspnet only")
    if recipe.precision not in ("auto", card.precision):
        raise RecipeError(
            f"precision is {recipe.precision}: of {card.name} the figures are for {card.precision}"
        )
    size, group = recipe.data.image_size, recipe.group

    def build() -> nn.Module:
        net = create_from_recipe(recipe, classes)
        if recipe.model.freeze_stages:
            net.freeze(recipe.model.freeze_stages)
        return net

    layers = conv_costs(build, group, size)
    outputs = 2 * sum(layer.outputs for layer in layers if layer.trained)  # bytes, in 16 bits
    saved = {
        "compiled": KEPT[memory] * outputs / 1e6,
        "eager": eager_activation_bytes(build, group, size) / 1e6,
    }
    with torch.device("meta"):
        parameters = list(build().parameters())
    weights = sum(p.numel() for p in parameters)
    momentum = sum(p.numel() for p in parameters if p.requires_grad)  # and the gradients
    stored = 4 * ((1 + bool(recipe.ema.decay)) * weights + momentum)
    fixed = (stored + 4 * momentum + 2 * weights) / 1e9 + WORKSPACE_GB
    room = USABLE * card.memory_gb - fixed
    fits = {
        name: next((k for k in sizes_of_passes(recipe.groups) if k * group * mb / 1000 <= room), 0)
        for name, mb in saved.items()
    }
    at_most = _rate(layers, card, 1, 1)
    practical = _rate(layers, card, ARITHMETIC, TRAFFIC)
    expected = tuple(share * practical for share in REACHED)
    work = relative_work(recipe)
    seconds = tuple(recipe.batch * work / rate for rate in reversed(expected))
    return Forecast(card, saved, fixed, fits, at_most, expected, stored / 1e9, seconds)


def _rate(layers: list[ConvCost], card: Card, arithmetic: float, traffic: float) -> float:
    """Images/s of a compiled training step, at shares of the card's peaks."""
    flops, bytes_ = card.tflops * 1e12 * arithmetic, card.gb_per_s * 1e9 * traffic
    seconds = 0.0
    for macs, inputs, outputs, trained in layers:
        # Forward, gradient of the input, gradient of the weights; a multiply-add is two operations,
        # an element two bytes.
        passes = 3 if trained else 1
        seconds += passes * max(2 * macs / flops, 2 * (inputs + outputs) / bytes_)
        seconds += passes / 3 * BETWEEN * 2 * outputs / bytes_
    return 1 / seconds


def attacked_share(recipe: Recipe, samples: int = 4000) -> float:
    """Of the run's groups, those that are attacked: counted in steps evenly spread over it."""
    if not recipe.adversarial.step_size:
        return 0.0
    last = recipe.schedule.steps - 1
    steps = np.unique(np.linspace(0, last, samples).astype(int))
    return float(np.mean([attack_mask(recipe, int(s), range(recipe.groups)).mean() for s in steps]))


def relative_work(recipe: Recipe) -> float:
    """Of all steps, in steps at the full size without an attack; by pixels.

    An attack is a pass forward and one back to the images, two thirds of a training pass.
    """
    return recipe.work() * (1 + 2 / 3 * attacked_share(recipe))
