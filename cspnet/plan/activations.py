"""Activations that a network keeps for the backward pass, counted with fake tensors.

The count is exact and the same on every machine: no kernel runs, and no GPU is needed.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


@contextlib.contextmanager
def fake_tensors(device: str) -> Iterator[None]:
    """Create fake tensors on a device that need not exist, with 16-bit autocast."""
    dtype = torch.bfloat16 if device == "cpu" else torch.float16
    available = mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    with FakeTensorMode(), torch.device(device), available, torch.autocast(device, dtype):
        yield


def network_and_input(
    build: Callable[[], nn.Module], images: int, size: int
) -> tuple[nn.Module, torch.Tensor]:
    """The network in training mode and its input [images, 3, size, size], both channels-last."""
    net = build().train()
    for module in net.modules():  # Module.to() does not work for fake parameters
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach().contiguous(memory_format=torch.channels_last)
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    return net, torch.randn(images, 3, size, size).to(memory_format=torch.channels_last)


def eager_activation_bytes(build: Callable[[], nn.Module], images: int, size: int) -> float:
    """Bytes per image that eager mode saves: the difference of two batch sizes, per image."""

    def saved(images: int) -> int:
        storages = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage  # kept alive, so that its address is not reused
            return tensor

        with fake_tensors("cuda"), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            net, x = network_and_input(build, images, size)
            net(x).logsumexp(1).sum()
        return sum(storage.nbytes() for storage in storages.values())

    return (saved(2 * images) - saved(images)) / images


class ConvCost(NamedTuple):
    """Cost of a convolution for one image."""

    macs: int  # multiply-adds in the forward pass
    inputs: int  # elements
    outputs: int
    trained: bool


def conv_costs(build: Callable[[], nn.Module], images: int, size: int) -> list[ConvCost]:
    """The costs of the convolutions of a network, in order of execution."""
    costs: list[ConvCost] = []

    def note(module: nn.Conv2d, inputs: tuple[torch.Tensor], out: torch.Tensor) -> None:
        macs = module.weight[0].numel() * out[0].numel()
        trained = module.weight.requires_grad
        costs.append(ConvCost(macs, inputs[0][0].numel(), out[0].numel(), trained))

    with fake_tensors("cuda"), torch.no_grad():
        net, x = network_and_input(build, images, size)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        net(x)
    return costs
