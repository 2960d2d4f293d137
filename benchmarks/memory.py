"""What is kept of an image for the backward pass: eager and compiled, ours and timm's net.

    python benchmarks/memory.py [--json FILE]

Exact and the same on every machine: no kernel runs and no GPU is needed, the tensors are fake.
Eager counts the distinct storages that autograd saves under float16 autocast on fake CUDA.
Compiled counts what the forward graph of torch.compile hands to the backward graph, and the
convolutions that the backward graph does once more, for some `activation_memory_budget`s, the
presets of the trainer among them.
"""

import argparse
import copy
import datetime
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes

from cspnet.nets import create
from cspnet.plan.activations import eager_activation_bytes, fake_tensors, network_and_input
from cspnet.runtime.device import ACTIVATION_BUDGETS


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
            bytes_kept = kept(forward, num_fwd_outputs, (images, 3, size, size))
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
    with fake_tensors(device):
        net, x = network_and_input(build, images, size)
        torch.compile(net, backend=backend, fullgraph=True)(x)
    return found


def kept(forward: torch.fx.GraphModule, outputs: int, image_shape: tuple[int, ...]) -> int:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--net", default="cspdarknet53")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--groups", type=int, default=4, help="in a pass, where there are several")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.75, 0.6, 0.55, 0.3])
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="to trace on; cuda needs one"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start = time.perf_counter()

    def ours() -> nn.Module:
        return create(options.net, group=options.group)

    def timms() -> nn.Module:
        return timm.create_model(options.net, act_layer="mish")

    names = {budget: name for name, budget in ACTIVATION_BUDGETS.items()}
    budgets = sorted({*options.budgets, *ACTIVATION_BUDGETS.values()}, reverse=True)
    rows = []

    def add(who: str, how: str, groups: int, bytes_kept: float, again: int | None = None) -> None:
        row = {"net": who, "mode": how, "groups": groups, "mb_per_image": bytes_kept / 1e6}
        rows.append(row if again is None else {**row, "convolutions_again": again})
        note = "" if again is None else f"{again:4d} convolutions again"
        print(f"{who:5} {how:20} {groups:2d} × {options.group}  {bytes_kept / 1e6:7.2f} MB  {note}")

    print(f"{options.net}, {options.size}×{options.size}, MB (10^6 bytes) an image")
    one, several = options.group, options.group * options.groups
    add("timm", "eager", 1, eager_activation_bytes(timms, one, options.size))
    # of one group: its net has no other size of group than the pass
    add("ours", "eager", 1, eager_activation_bytes(lambda: create(options.net), one, options.size))
    add("ours", "eager", options.groups, eager_activation_bytes(ours, several, options.size))
    for who, build, images, wanted in (
        ("timm", timms, one, [1.0]),
        ("ours", ours, one, budgets),
        ("ours", ours, several, budgets),
    ):
        results = compiled(build, images, options.size, wanted, options.device)
        for budget, (bytes_kept, again) in zip(wanted, results, strict=True):
            name = f" ({names[budget]})" if budget in names else ""
            add(who, f"compiled {budget:g}{name}", images // one, bytes_kept, again)
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s; torch {torch.__version__}, timm {timm.__version__}")
    if options.json:
        content = {
            "date": datetime.date.today().isoformat(),
            "machine": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "timm": timm.__version__,
            **{k: getattr(options, k) for k in ("net", "size", "group", "device")},
            "seconds": seconds,
            "rows": rows,
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
