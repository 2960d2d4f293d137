"""A trained net with what is known of it, and how it is built and filled."""

from dataclasses import dataclass, field

import torch
from torch import nn

from cspnet.errors import CheckpointError, RecipeError
from cspnet.nets import create
from cspnet.nets.timm_net import create_timm_network
from cspnet.recipe.schema import TIMM_PREFIX, Recipe


@dataclass(frozen=True)
class Trained:
    """A net with what is known of it. On the CPU, float32, channels-last."""

    net: nn.Module  # with `name` and `classes`
    recipe: Recipe
    classes: list[str] | None  # names in index order, sorted; None: the file has none
    step: int = 0
    averaged: bool = False  # the weights are a moving average
    seen: int = 0  # images trained on
    remarks: list[str] = field(default_factory=list)
    # The class order of the file: the i-th class of `net` is its order[i]-th. None: the same.
    order: list[int] | None = None
    # Of a net without class names: why their order is unknown. Empty where that of folder names may
    # be assumed, as in a timm state dict.
    unordered: str = ""
    # The names follow from the number of classes alone (ImageNet's 1000); the user may overrule.
    inferred: bool = False


def build_net(recipe: Recipe, classes: int) -> nn.Module:
    """The net of a recipe with fresh weights, float32, channels-last, on the CPU.

    The weights are a function of the seed, whatever the device. RecipeError: not a net of timm's.
    """
    model = recipe.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if model.name.startswith(TIMM_PREFIX):
            try:
                net = create_timm_network(model.name, classes=classes, size=recipe.data.image_size)
            except ValueError as error:
                raise RecipeError(f"model.name={model.name}: {error}") from None
            return net.to(memory_format=torch.channels_last)
        net = create_from_recipe(recipe, classes)
    return net.to(memory_format=torch.channels_last)


def create_from_recipe(recipe: Recipe, classes: int) -> nn.Module:
    """A net of ours by a recipe, with weights of torch's present seed, on its present device."""
    model = recipe.model
    return create(
        model.name,
        classes=classes,
        activation=model.activation,
        leaky_slope=model.leaky_slope,
        width=model.width,
        norm_eps=model.norm_eps,
        norm_momentum=model.norm_momentum,
        group=recipe.group,
    )


def recipe_problems(error: RecipeError) -> str:
    """The problems of a recipe that a file stands for, in one line."""
    _, _, listed = str(error).partition(":\n  - ")
    return listed.replace("\n  - ", "; ") or str(error)


def load_strict(net: nn.Module, state: dict[str, torch.Tensor], origin: str) -> None:
    """Loads a state dict strictly; CheckpointError names the first tensor that does not fit."""
    for key, tensor in net.state_dict().items():
        if key not in state:
            raise CheckpointError(f"{origin} has no tensor {key}, which {net.name} needs")
        if state[key].shape != tensor.shape:
            raise CheckpointError(
                f"{origin}: {key} is {list(state[key].shape)}, {net.name} needs "
                f"{list(tensor.shape)}"
            )
    known = net.state_dict()  # once: asked for each key it took longer than all the rest
    extra = [key for key in state if key not in known]
    if extra:
        raise CheckpointError(f"{origin} has a tensor {extra[0]} that {net.name} has not")
    net.load_state_dict(state)


@torch.no_grad()
def permute_classes(net: nn.Module, order: list[int]) -> None:
    """Makes the `order[i]`-th class of a net the i-th, in place.

    CheckpointError where a classifier of timm's has a tensor that is not one row per class.
    """
    head = [
        (name, tensor)
        for name, tensor in net.state_dict().items()
        if name.startswith(net.classifier_prefixes)
    ]
    for name, tensor in head:
        if not tensor.ndim or len(tensor) != len(order):
            raise CheckpointError(
                f"the classes of {net.name} cannot be reordered: its classifier's {name} is "
                f"{list(tensor.shape)}, not one row for each of {len(order)} classes"
            )
    for _, tensor in head:
        tensor.copy_(tensor[order])
