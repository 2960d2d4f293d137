"""What depends on the step: learning rate, attack, and when to log, validate and save."""

from typing import TYPE_CHECKING

from cspnet.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch

    Number = int | float | torch.Tensor


def learning_rate(update: "Number", recipe: Recipe) -> "Number":
    """Learning rate of the `update`-th update of the weights, counted from 1.

    A float for an int; for a float64 tensor, a float32 tensor on its device. As Darknet's
    get_current_rate (src/network.c): polynomial warm-up and decay with the same power; the decay
    counts from step 0, and the last step has rate 0.
    """
    peak, schedule = recipe.optim.learning_rate, recipe.schedule
    if isinstance(update, int | float):
        if update < schedule.warmup_steps:
            return peak * (update / schedule.warmup_steps) ** schedule.power
        return peak * (1 - update / schedule.steps) ** schedule.power
    rising = (update / max(schedule.warmup_steps, 1)) ** schedule.power
    falling = (1 - update / schedule.steps) ** schedule.power
    return (peak * rising.where(update < schedule.warmup_steps, falling)).float()


def attack_step_size(step: int, recipe: Recipe) -> float:
    """Step size of the attack in step `step`, counted from 0; 0 during the warm-up."""
    if step <= recipe.schedule.warmup_steps:
        return 0.0
    return recipe.adversarial.step_size * step / recipe.schedule.steps


def is_log_due(recipe: Recipe, step: int) -> bool:
    """Whether metrics are due after `step` steps."""
    return step % recipe.log_every == 0 or step == recipe.schedule.steps


def is_save_due(recipe: Recipe, step: int) -> bool:
    """Whether a checkpoint is due after `step` steps, as last.pt or as an archive."""
    intervals = (recipe.save_every, recipe.archive_every)
    return any(interval and step % interval == 0 for interval in intervals)


def is_validation_due(recipe: Recipe, step: int) -> bool:
    """Whether a validation is due after `step` steps: at intervals, and after the last."""
    return step > 0 and (step % recipe.evaluate.every == 0 or step == recipe.schedule.steps)


def count_validations_and_saves(recipe: Recipe) -> tuple[int, int]:
    """Numbers of validations and of saves in a run."""
    last, every = recipe.schedule.steps, recipe.evaluate.every
    validations = {*range(every, last + 1, every), last}
    saves = set(validations)  # one before each validation and one after it
    for interval in (recipe.save_every, recipe.archive_every):
        saves.update(range(interval, last + 1, interval) if interval else ())
    return len(validations), len(saves) + len(validations)
