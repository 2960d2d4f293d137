"""Checks of a complete recipe: ranges, contradictions, fields without effect.

Each check returns one line for every problem.
"""

from dataclasses import fields, is_dataclass
from typing import Any

from cspnet.recipe.schema import STAGE_COUNTS, TIMM_PREFIX, Recipe, no_effect
from cspnet.text import did_you_mean


def check_recipe(recipe: Recipe) -> list[str]:
    """Problems of a recipe as a whole: values out of range, and values that contradict."""
    return [
        *_out_of_range(recipe),
        *_model_problems(recipe),
        *_batch_problems(recipe),
        *_data_problems(recipe),
        *_mix_problems(recipe),
        *_attack_problems(recipe),
    ]


def check_effects(recipe: Recipe, given: list[str], origin: str) -> list[str]:
    """Problems of the `given` dotted keys: those without effect. Each starts with `origin`."""
    reasons = {key: no_effect(recipe, key) for key in given}
    return [
        f"{origin}{key} has no effect, since {reason}: leave it out"
        for key, reason in reasons.items()
        if reason
    ]


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
                # NaN fails the comparison, too.
                if value is not None and not all(low <= v <= high for v in values):
                    problems.append(f"{key} is {value}, must be {_format_range(low, high)}")
                elif "unordered" not in entry.metadata and list(values) != sorted(values):
                    problems.append(f"{key} is {value}: the smaller bound comes first")

    visit(recipe, "")
    classes = recipe.model.classes
    if classes != "auto" and classes < 2:
        problems.append(f"model.classes is {classes}, must be at least 2 or auto")
    return problems


def _format_range(low: float, high: float) -> str:
    return f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"


def _model_problems(recipe: Recipe) -> list[str]:
    problems, model = [], recipe.model
    own = model.name in STAGE_COUNTS
    if not own and (not model.name.startswith(TIMM_PREFIX) or model.name == TIMM_PREFIX):
        problems.append(
            f"model.name is {model.name!r}, must be one of {', '.join(STAGE_COUNTS)}, "
            f"or {TIMM_PREFIX}NAME for a timm network.{did_you_mean(model.name, STAGE_COUNTS)}"
        )
    if model.freeze_stages and not model.init_from:
        problems.append(
            "model.freeze_stages would freeze random weights: set model.init_from, or leave "
            "model.freeze_stages out"
        )
    if model.freeze_stages and model.name.startswith(TIMM_PREFIX):
        problems.append(f"model.freeze_stages works only with {', '.join(STAGE_COUNTS)}")
    elif own and model.freeze_stages > STAGE_COUNTS[model.name]:
        problems.append(
            f"model.freeze_stages is {model.freeze_stages}, but {model.name} has "
            f"{STAGE_COUNTS[model.name]} stages"
        )
    if recipe.optim.backbone_lr is not None and recipe.optim.learning_rate == 0:
        problems.append("optim.backbone_lr requires optim.learning_rate above 0")
    return problems


def _batch_problems(recipe: Recipe) -> list[str]:
    batch, group = recipe.batch, recipe.group
    if min(batch, group) < 2 or batch % group == 0:  # smaller values are out of range
        return []
    divisors = [n for n in range(2, batch + 1) if batch % n == 0]
    nearest = min(divisors, key=lambda n: abs(n - group))
    return [
        f"batch ({batch}) is not a multiple of group ({group}): "
        f"try group={nearest} or batch={max(1, round(batch / group)) * group}"
    ]


def _data_problems(recipe: Recipe) -> list[str]:
    problems, data = [], recipe.data
    if data.image_size % 32:
        size = max(32, round(data.image_size / 32) * 32)
        problems.append(f"data.image_size ({data.image_size}) must be a multiple of 32: try {size}")
    if data.normalize == "custom" and None in (data.mean, data.std):
        problems.append("data.normalize=custom needs data.mean=[R,G,B] and data.std=[R,G,B]")
    start = data.start_image_size
    if start is not None and (start % 32 or start >= data.image_size):
        problems.append(
            f"data.start_image_size ({start}) must be a multiple of 32 below data.image_size "
            f"({data.image_size})"
        )
    return problems


def _mix_problems(recipe: Recipe) -> list[str]:
    problems, mix, group = [], recipe.mix, recipe.group
    if mix.probability > 0:
        if not (mix.cutmix or mix.mosaic):
            problems.append(
                "mix.probability is above 0, but mix.cutmix and mix.mosaic are off: "
                "set mix.probability=0 or switch one on"
            )
        if mix.mosaic and group < 4:
            problems.append(f"mix.mosaic combines four images of a group, but group is {group}")
        if mix.probability < 1 and mix.images_per_draw > 0 and group % mix.images_per_draw:
            problems.append(
                f"group ({group}) is not a multiple of mix.images_per_draw ({mix.images_per_draw})"
            )
    return problems


def _attack_problems(recipe: Recipe) -> list[str]:
    problems = []
    if recipe.adversarial.step_size > 0:
        steps, warmup = recipe.schedule.steps, recipe.schedule.warmup_steps
        if recipe.adversarial.probability == 0:
            problems.append("adversarial.step_size has no effect: adversarial.probability is 0")
        if warmup >= steps - 1:
            problems.append(
                f"adversarial.step_size has no effect: none of the {steps:,} steps follows the "
                f"warm-up ({warmup:,})"
            )
    return problems
