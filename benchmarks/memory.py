"""Activation memory per image that is saved for backward: cspnet and timm, eager and compiled.

    python benchmarks/memory.py [--json FILE]

Exact and machine-independent: tensors are fake, no kernel runs and no GPU is needed. Eager counts
the distinct storages that autograd saves under fp16 autocast on fake CUDA. Compiled counts what the
forward graph of torch.compile passes to the backward graph, and the convolutions that the backward
graph recomputes, for several values of `activation_memory_budget`, including the trainer's presets.
"""

import copy
import time
from collections.abc import Callable

import timm
import torch
from harness import argument_parser, new_record, write_record
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes

from cspnet.nets import create
from cspnet.plan.activations import eager_activation_bytes, fake_tensors, network_and_input
from cspnet.runtime.options import ACTIVATION_BUDGETS


def compiled(
    build: Callable[[], nn.Module], images: int, size: int, budgets: list[float], device: str
) -> list[tuple[float, int]]:
    """Bytes per image, and recomputed convolutions, for each budget."""
    results = []

    def partition(joint, inputs, *, num_fwd_outputs, **others):
        joint_graph_passes(joint)
        for budget in budgets:
            with config.patch(activation_memory_budget=budget):
                forward, backward = min_cut_rematerialization_partition(
                    copy.deepcopy(joint), inputs, num_fwd_outputs=num_fwd_outputs, **others
                )
            bytes_saved = saved_bytes(forward, num_fwd_outputs, (images, 3, size, size))
            recomputed = backward.graph.find_nodes(
                op="call_function", target=torch.ops.aten.convolution.default
            )
            results.append((bytes_saved / images, len(recomputed)))
        return forward, backward

    backend = aot_autograd(
        fw_compiler=lambda graph, _: graph.forward,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    with fake_tensors(device):
        net, x = network_and_input(build, images, size)
        torch.compile(net, backend=backend, fullgraph=True)(x)
    return results


def saved_bytes(forward: torch.fx.GraphModule, outputs: int, image_shape: tuple[int, ...]) -> int:
    """Bytes of image-dependent tensors that a forward graph returns in addition to its outputs."""
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


def main() -> None:
    parser = argument_parser(__doc__, device=False)
    parser.add_argument("--net", default="cspdarknet53")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--groups", type=int, default=4, help="in a micro-batch of several groups")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.75, 0.6, 0.55, 0.3])
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="to trace on; cuda needs a GPU"
    )
    options = parser.parse_args()
    start = time.perf_counter()

    def build_cspnet() -> nn.Module:
        return create(options.net, group=options.group)

    def build_timm() -> nn.Module:
        return timm.create_model(options.net, act_layer="mish")

    names = {budget: name for name, budget in ACTIVATION_BUDGETS.items()}
    budgets = sorted({*options.budgets, *ACTIVATION_BUDGETS.values()}, reverse=True)
    rows = []

    def add(net: str, mode: str, groups: int, size: float, recomputed: int | None = None) -> None:
        row = {"net": net, "mode": mode, "groups": groups, "mb_per_image": size / 1e6}
        rows.append(row if recomputed is None else {**row, "recomputed_convolutions": recomputed})
        note = "" if recomputed is None else f"{recomputed:4d} convolutions recomputed"
        print(f"{net:6} {mode:20} {groups:2d} × {options.group}  {size / 1e6:7.2f} MB  {note}")

    print(f"{options.net}, {options.size}×{options.size}, MB (10^6 bytes) per image")
    one, several = options.group, options.group * options.groups
    add("timm", "eager", 1, eager_activation_bytes(build_timm, one, options.size))
    # A single group equals the micro-batch, so no group size is set.
    add(
        "cspnet", "eager", 1, eager_activation_bytes(lambda: create(options.net), one, options.size)
    )
    add(
        "cspnet",
        "eager",
        options.groups,
        eager_activation_bytes(build_cspnet, several, options.size),
    )
    for net, build, images, budgets_of_net in (
        ("timm", build_timm, one, [1.0]),
        ("cspnet", build_cspnet, one, budgets),
        ("cspnet", build_cspnet, several, budgets),
    ):
        results = compiled(build, images, options.size, budgets_of_net, options.device)
        for budget, (bytes_saved, recomputed) in zip(budgets_of_net, results, strict=True):
            name = f" ({names[budget]})" if budget in names else ""
            add(net, f"compiled {budget:g}{name}", images // one, bytes_saved, recomputed)
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s; torch {torch.__version__}, timm {timm.__version__}")
    record = new_record(options) | {"seconds": seconds, "rows": rows}
    write_record(options.json, record)


if __name__ == "__main__":
    main()
