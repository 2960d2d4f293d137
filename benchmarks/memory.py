"""What is kept of an image for the backward pass: eager and compiled, ours and timm's net.

    python benchmarks/memory.py [--json FILE]

Exact and the same on every machine: no kernel runs and no GPU is needed, the tensors are fake.
Eager counts the distinct storages that autograd saves under float16 autocast on fake CUDA.
Compiled counts what the forward graph of torch.compile hands to the backward graph, and the
convolutions that the backward graph does once more, for some `activation_memory_budget`s, the
presets of the trainer among them.
"""

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

import timm
import torch
from torch import nn

from cspnet.nets import create
from cspnet.train.runtime import BUDGETS
from cspnet.train.saved import compiled, eager


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

    names = {budget: name for name, budget in BUDGETS.items()}
    budgets = sorted({*options.budgets, *BUDGETS.values()}, reverse=True)
    rows = []

    def add(who: str, how: str, groups: int, bytes_kept: float, again: int | None = None) -> None:
        row = {"net": who, "mode": how, "groups": groups, "mb_per_image": bytes_kept / 1e6}
        rows.append(row if again is None else {**row, "convolutions_again": again})
        note = "" if again is None else f"{again:4d} convolutions again"
        print(f"{who:5} {how:20} {groups:2d} × {options.group}  {bytes_kept / 1e6:7.2f} MB  {note}")

    print(f"{options.net}, {options.size}×{options.size}, MB (10^6 bytes) an image")
    one, several = options.group, options.group * options.groups
    add("timm", "eager", 1, eager(timms, one, options.size))
    # of one group: its net has no other size of group than the pass
    add("ours", "eager", 1, eager(lambda: create(options.net), one, options.size))
    add("ours", "eager", options.groups, eager(ours, several, options.size))
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
