"""Micro-batches: which groups of a step go through the network at once."""

from typing import Literal

from cspnet.errors import RecipeError
from cspnet.recipe.schema import TIMM_PREFIX, Recipe
from cspnet.runtime.options import RunOptions


def split_groups(groups: range, at_once: int) -> list[range]:
    """The groups in micro-batches of `at_once` groups; the last one may have fewer."""
    return [groups[first : first + at_once] for first in range(0, len(groups), at_once)]


def candidate_sizes(groups: int) -> list[int]:
    """Groups per micro-batch that give 1, 2, 3 … micro-batches a step, largest first: 4, 2, 1."""
    return sorted({-(-groups // count) for count in range(1, groups + 1)}, reverse=True)


def choose_groups_at_once(
    options: RunOptions, recipe: Recipe, groups: int, on_gpu: bool
) -> int | None:
    """Groups per micro-batch as --micro-batch requests; None to find the most that fit.

    `groups` is the number of groups of a step in this process. Raises RecipeError if the request is
    not a multiple of the group, exceeds the step, or is impossible for the network.
    """
    requested, is_timm = options.micro_batch, recipe.model.name.startswith(TIMM_PREFIX)
    if requested is None or requested == "auto":
        automatic = requested == "auto" or on_gpu
        return None if automatic and not is_timm else 1
    group, most = recipe.group, groups * recipe.group
    if requested % group or not group <= requested <= most:
        choices = f"{group}" if groups == 1 else f"a multiple of {group} from {group} to {most}"
        raise RecipeError(
            f"--micro-batch {requested}: must be {choices}, since a group has {group} images and "
            f"each process computes {groups} groups per step"
        )
    if is_timm and requested > group:
        raise RecipeError(
            f"--micro-batch {requested}: BatchNorm in timm's networks uses the statistics of the "
            f"whole micro-batch, so it must be one group: --micro-batch {group}"
        )
    return requested // group


def parse_micro_batch(text: str | None) -> int | Literal["auto"] | None:
    """The value of --micro-batch. Raises RecipeError unless it is a number or `auto`."""
    if text is None or text == "auto":
        return None if text is None else "auto"
    if not text.isdecimal():
        raise RecipeError(f"--micro-batch {text}: must be auto or a number of images")
    return int(text)
