"""A trained network with its metadata; building networks and loading state dicts."""

from dataclasses import dataclass, field

import torch

from cspnet.errors import CheckpointError, RecipeError
from cspnet.nets import create
from cspnet.nets.csp import CspNet
from cspnet.nets.network import Network
from cspnet.nets.timm_net import create_timm_network
from cspnet.recipe.schema import TIMM_PREFIX, Recipe


@dataclass(frozen=True)
class Trained:
    """A trained network with its metadata. On the CPU, float32, channels-last."""

    net: Network
    recipe: Recipe
    classes: list[str] | None  # names in index order, sorted; None if the file has none
    step: int = 0
    averaged: bool = False  # EMA weights
    images_seen: int = 0
    remarks: list[str] = field(default_factory=list)
    # Class i of `net` is class file_order[i] of the file. None if the orders are the same.
    file_order: list[int] | None = None
    # Without class names: why the class order is unknown. Empty if it may be assumed to be that of
    # folder names, as in a timm state dict.
    order_unknown: str = ""
    # The names were inferred from the number of classes (ImageNet's 1000); the user may override.
    inferred: bool = False


def build_net(recipe: Recipe, classes: int) -> Network:
    """A recipe's network with fresh weights, float32, channels-last, on the CPU.

    The weights depend on the seed only, not on the device. RecipeError if timm does not have the
    network, or if it does not accept images of the recipe's size.
    """
    model = recipe.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if model.name.startswith(TIMM_PREFIX):
            try:
                net: Network = create_timm_network(
                    model.name, classes=classes, size=recipe.data.image_size
                )
            except ValueError as error:
                raise RecipeError(f"model.name={model.name}: {error}") from None
        else:
            net = create_from_recipe(recipe, classes)
    return net.to(memory_format=torch.channels_last)


def create_from_recipe(recipe: Recipe, classes: int) -> CspNet:
    """A recipe's CspNet; weights from torch's current random state, on its default device."""
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
    """The problems of a recipe that was derived from a file, in one line."""
    _, _, listed = str(error).partition(":\n  - ")
    return listed.replace("\n  - ", "; ") or str(error)


def load_strict(net: Network, state: dict[str, torch.Tensor], origin: str) -> None:
    """Load a state dict strictly. CheckpointError names the first tensor that does not match."""
    expected = net.state_dict()  # only once: it is slow
    for key, tensor in expected.items():
        if key not in state:
            raise CheckpointError(f"{origin} has no tensor {key}, which {net.name} needs")
        if state[key].shape != tensor.shape:
            raise CheckpointError(
                f"{origin}: {key} is {list(state[key].shape)}, but {net.name} needs "
                f"{list(tensor.shape)}"
            )
    extra = [key for key in state if key not in expected]
    if extra:
        raise CheckpointError(f"{origin} has a tensor {extra[0]}, which {net.name} does not have")
    net.load_state_dict(state)


@torch.no_grad()
def permute_classes(net: Network, order: list[int]) -> None:
    """Make class order[i] of a network class i, in place.

    CheckpointError if a tensor of a timm classifier does not have one row per class.
    """
    state = net.state_dict()
    head = {name: state[name] for name in net.classifier_keys()}
    for name, tensor in head.items():
        if not tensor.ndim or len(tensor) != len(order):
            raise CheckpointError(
                f"the classes of {net.name} cannot be reordered: its classifier's {name} is "
                f"{list(tensor.shape)}, not one row for each of {len(order)} classes"
            )
    for tensor in head.values():
        tensor.copy_(tensor[order])
