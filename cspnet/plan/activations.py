"""What a net keeps of each image for the backward pass: counted, with tensors that hold nothing.

Exact and the same on every machine: no kernel runs, and no GPU is needed.
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
    """Tensors without content on a device that need not exist, under 16-bit autocast."""
    dtype = torch.bfloat16 if device == "cpu" else torch.float16
    available = mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    with FakeTensorMode(), torch.device(device), available, torch.autocast(device, dtype):
        yield


def network_and_input(
    build: Callable[[], nn.Module], images: int, size: int
) -> tuple[nn.Module, ...]:
    """The net in training mode and its input, [images, 3, size, size], both channels-last."""
    net = build().train()
    for module in net.modules():  # Module.to() cannot do it to fake parameters
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach().contiguous(memory_format=torch.channels_last)
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    return net, torch.randn(images, 3, size, size).to(memory_format=torch.channels_last)


def eager_activation_bytes(build: Callable[[], nn.Module], images: int, size: int) -> float:
    """Bytes an image: what a pass of twice as many images saves more, by image."""

    def saved(images: int) -> int:
        storages = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage  # held, or its address would be used again
            return tensor

        with fake_tensors("cuda"), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            net, x = network_and_input(build, images, size)
            net(x).logsumexp(1).sum()
        return sum(storage.nbytes() for storage in storages.values())

    return (saved(2 * images) - saved(images)) / images


class ConvCost(NamedTuple):
    """Of one image."""

    macs: int  # multiply-adds of a forward pass
    inputs: int  # elements
    outputs: int
    trained: bool


def conv_costs(build: Callable[[], nn.Module], images: int, size: int) -> list[ConvCost]:
    """Those of a net, in their order."""
    found = []

    def note(module: nn.Conv2d, given: tuple[torch.Tensor], out: torch.Tensor) -> None:
        macs = module.weight[0].numel() * out[0].numel()
        trained = module.weight.requires_grad
        found.append(ConvCost(macs, given[0][0].numel(), out[0].numel(), trained))

    with fake_tensors("cuda"), torch.no_grad():
        net, x = network_and_input(build, images, size)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        net(x)
    return found
