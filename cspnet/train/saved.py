"""What a net keeps of each image for the backward pass: counted, with tensors that hold nothing.

Exact and the same on every machine: no kernel runs, and no GPU is needed.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._subclasses.fake_tensor import FakeTensorMode


@contextlib.contextmanager
def fake(device: str) -> Iterator[None]:
    """Tensors without content on a device that need not exist, under 16-bit autocast."""
    dtype = torch.bfloat16 if device == "cpu" else torch.float16
    available = mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    with FakeTensorMode(), torch.device(device), available, torch.autocast(device, dtype):
        yield


def _prepared(build: Callable[[], nn.Module], images: int, size: int) -> tuple[nn.Module, ...]:
    """The net in training mode and its input, [images, 3, size, size], both channels-last."""
    net = build().train()
    for module in net.modules():  # Module.to() cannot do it to fake parameters
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach().contiguous(memory_format=torch.channels_last)
            module.weight = nn.Parameter(weight)
    return net, torch.randn(images, 3, size, size).to(memory_format=torch.channels_last)


def eager(build: Callable[[], nn.Module], images: int, size: int) -> float:
    """Bytes an image: what a pass of twice as many images saves more, by image."""

    def saved(images: int) -> int:
        storages = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage  # held, or its address would be used again
            return tensor

        with fake("cuda"), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            net, x = _prepared(build, images, size)
            net(x).logsumexp(1).sum()
        return sum(storage.nbytes() for storage in storages.values())

    return (saved(2 * images) - saved(images)) / images


def compiled(
    build: Callable[[], nn.Module], images: int, size: int, budgets: list[float], device: str
) -> list[tuple[float, int]]:
    """For each budget the bytes an image and the convolutions that the backward pass does again."""
    found = []

    def partition(joint, inputs, *, num_fwd_outputs, **others):
        joint_graph_passes(joint)
        for budget in budgets:
            with config.patch(activation_memory_budget=budget):
                forward, backward = min_cut_rematerialization_partition(
                    copy.deepcopy(joint), inputs, num_fwd_outputs=num_fwd_outputs, **others
                )
            bytes_kept = _kept(forward, num_fwd_outputs, (images, 3, size, size))
            again = backward.graph.find_nodes(
                op="call_function", target=torch.ops.aten.convolution.default
            )
            found.append((bytes_kept / images, len(again)))
        return forward, backward

    backend = aot_autograd(
        fw_compiler=lambda graph, _: graph.forward,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    with fake(device):
        net, x = _prepared(build, images, size)
        torch.compile(net, backend=backend, fullgraph=True)(x)
    return found


def _kept(forward: torch.fx.GraphModule, outputs: int, image_shape: tuple[int, ...]) -> int:
    """Bytes that a forward graph returns beside its `outputs` and that depend on the images."""
    dependent, storages = set(), {}
    for node in forward.graph.nodes:
        is_input = node.op == "placeholder" and tuple(node.meta["val"].shape) == image_shape
        if is_input or any(source in dependent for source in node.all_input_nodes):
            dependent.add(node)
        if node.op == "output":
            for saved in node.args[0][outputs:]:
                if saved in dependent and isinstance(saved.meta["val"], torch.Tensor):
                    storage = saved.meta["val"].untyped_storage()
                    storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def convolutions(
    build: Callable[[], nn.Module], images: int, size: int
) -> list[tuple[int, int, int]]:
    """Of each convolution, for one image: multiply-adds of a forward pass; elements in and out."""
    found = []

    def note(module: nn.Conv2d, given: tuple[torch.Tensor], out: torch.Tensor) -> None:
        macs = module.weight[0].numel() * out[0].numel()
        found.append((macs, given[0][0].numel(), out[0].numel()))

    with fake("cuda"), torch.no_grad():
        net, x = _prepared(build, images, size)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        net(x)
    return found
