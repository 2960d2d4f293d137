"""Prediction of memory and throughput on a GPU that is not available, without running anything.

Memory: the activations that eager mode saves are counted; those of compiled mode are a fraction of
the convolutions' outputs; everything else has a known size. Throughput: a roofline model. Each
convolution takes the longer of its arithmetic and its memory traffic; the operations between them
are limited by memory traffic. tests/test_plan.py checks the bounds against manual calculations.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from cspnet.errors import RecipeError
from cspnet.plan.activations import ConvCost, conv_costs, eager_activation_bytes
from cspnet.recipe.schema import TIMM_PREFIX, Recipe
from cspnet.train.adversarial import attack_mask
from cspnet.train.micro_batch import candidate_sizes
from cspnet.weights.trained import create_from_recipe


@dataclass(frozen=True)
class Card:
    """A GPU according to its data sheet."""

    name: str
    memory_gb: float
    processors: int  # SMs
    clock_ghz: float  # boost clock of the reference card
    flops: int  # per SM and cycle on tensor cores: dense fp16 with fp32 accumulation
    gb_per_s: float
    precision: str
    source: str

    @property
    def tflops(self) -> float:
        return self.processors * self.clock_ghz * self.flops / 1000


# From Turing on, GeForce cards accumulate in fp32 at half the rate of their tensor cores.
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
# Reads and writes of a convolution's output in a training step, outside of convolutions:
# BatchNorm, Mish, residuals, concatenation and their gradients, in kernels fused by Inductor.
BETWEEN = 8.5
# What a compiled network keeps for the backward pass relative to its convolutions' outputs, by
# value of --recompute: counted for cspdarknet53 with Mish by benchmarks/memory.py.
KEPT = {"none": 1.916, "light": 1.012, "full": 0.563}
# Fractions of a card's peak rates that good kernels reach; fractions of the resulting throughput
# that whole steps have reached: 0.95 by timm's network on an RTX 3090, 0.72 by ResNet-50 on Turing
# cards.
ARITHMETIC, TRAFFIC, REACHED = 0.75, 0.88, (0.72, 0.95)
USABLE = 0.925  # fraction of a card's memory; CUDA context and cuDNN handles take the rest
WORKSPACE_GB = 0.35  # of cuDNN, and gradients of activations


@dataclass(frozen=True)
class Forecast:
    """Per image at the full image size, unless noted; MB and GB are powers of ten."""

    card: Card
    saved_mb: dict[str, float]  # activations kept for the backward pass: "compiled" and "eager"
    fixed_gb: float  # weights, gradients, momentum, EMA, 16-bit copies, workspace
    fits: dict[str, int]  # groups per micro-batch, by the same keys; 0 if not even one fits
    at_most: float  # images/s, by the peaks of the card
    expected: tuple[float, float]  # images/s
    checkpoint_gb: float
    seconds: tuple[float, float]  # of the whole run, without validations


def find_card(name: str) -> Card:
    """A card by its usual names: rtx2070, "RTX 2070", 2070. Raises RecipeError."""
    wanted = "".join(sign for sign in name.lower() if sign.isalnum())
    for short in ("nvidia", "geforce", "rtx"):
        wanted = wanted.removeprefix(short)
    for key, card in CARDS.items():
        if wanted and key.removeprefix("rtx") == wanted:
            return card
    raise RecipeError(f"--gpu {name}: unknown; must be one of {', '.join(CARDS)}")


def forecast(recipe: Recipe, card: Card, classes: int, recompute: str = "none") -> Forecast:
    """Predict a run on a card.

    Raises RecipeError for timm's networks, whose activations are unknown before they run, and for
    a precision other than that of the card.
    """
    if recipe.model.name.startswith(TIMM_PREFIX):
        raise RecipeError(
            f"model.name={recipe.model.name}: --gpu supports only cspnet's own networks"
        )
    if recipe.precision not in ("auto", card.precision):
        raise RecipeError(
            f"precision={recipe.precision}: --gpu supports only {card.precision} for {card.name}"
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
        "compiled": KEPT[recompute] * outputs / 1e6,
        "eager": eager_activation_bytes(build, group, size) / 1e6,
    }
    with torch.device("meta"):
        parameters = list(build().parameters())
    weights = sum(p.numel() for p in parameters)
    momentum = sum(p.numel() for p in parameters if p.requires_grad)  # as many gradients
    stored = 4 * ((1 + bool(recipe.ema.decay)) * weights + momentum)
    fixed = (stored + 4 * momentum + 2 * weights) / 1e9 + WORKSPACE_GB
    room = USABLE * card.memory_gb - fixed
    fits = {
        name: next((k for k in candidate_sizes(recipe.groups) if k * group * mb / 1000 <= room), 0)
        for name, mb in saved.items()
    }
    at_most = _rate(layers, card, 1, 1)
    practical = _rate(layers, card, ARITHMETIC, TRAFFIC)
    low, high = (fraction * practical for fraction in REACHED)
    work = relative_work(recipe)
    seconds = recipe.batch * work / high, recipe.batch * work / low
    return Forecast(card, saved, fixed, fits, at_most, (low, high), stored / 1e9, seconds)


def _rate(layers: list[ConvCost], card: Card, arithmetic: float, traffic: float) -> float:
    """Images/s of a compiled training step at these fractions of the card's peaks."""
    flops, bytes_ = card.tflops * 1e12 * arithmetic, card.gb_per_s * 1e9 * traffic
    seconds = 0.0
    for macs, inputs, outputs, trained in layers:
        # Forward, gradient of the input, gradient of the weights. A multiply-add is two operations,
        # an element is two bytes.
        passes = 3 if trained else 1
        seconds += passes * max(2 * macs / flops, 2 * (inputs + outputs) / bytes_)
        seconds += passes / 3 * BETWEEN * 2 * outputs / bytes_
    return 1 / seconds


def attacked_share(recipe: Recipe, samples: int = 4000) -> float:
    """Fraction of a run's groups that are attacked, by `samples` steps spread over the run."""
    if not recipe.adversarial.step_size:
        return 0.0
    last = recipe.schedule.steps - 1
    steps = np.unique(np.linspace(0, last, samples).astype(int))
    return float(np.mean([attack_mask(recipe, int(s), range(recipe.groups)).mean() for s in steps]))


def relative_work(recipe: Recipe) -> float:
    """Work of the whole run, in steps at the full image size without an attack; by pixels.

    An attack is a forward pass and a backward pass to the images, two thirds of a training step.
    """
    return recipe.full_size_steps() * (1 + 2 / 3 * attacked_share(recipe))
