"""Frames per second of inference: cspnet as trained, cspnet folded, timm with the same weights.

    python benchmarks/infer.py [--cases 512x1 256x128] [--precision fp16] [--compile] [--json FILE]

A case is SIZExBATCH. Random images on the device, channels-last, weights in the given precision.
"""

import time
from collections.abc import Callable

import timm
import torch
from harness import (
    Windows,
    argument_parser,
    interleave,
    new_record,
    print_table,
    synchronizer,
    write_record,
)
from torch import nn

from cspnet.nets import create
from cspnet.nets.layers import fold
from cspnet.runtime.device import DTYPES, choose_precision, setup_device

# Default cases by type of device.
CASES = {"cuda": ["512x1", "256x128"], "cpu": ["256x1", "128x8"]}


def build(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Module]:
    """Networks with the same weights, by name, in evaluation mode."""
    torch.manual_seed(0)
    ours = create(name, norm_momentum=1.0).to(memory_format=torch.channels_last)
    with torch.no_grad():
        ours(torch.randn(8, 3, 128, 128))  # running statistics
    theirs = timm.create_model(name, act_layer="mish").to(memory_format=torch.channels_last)
    theirs.load_state_dict(ours.state_dict())
    nets = {"cspnet folded": fold(ours), "cspnet": ours, "timm": theirs}
    return {key: net.eval().requires_grad_(False).to(device, dtype) for key, net in nets.items()}


def require_equal(nets: dict[str, nn.Module], images: torch.Tensor) -> None:
    """Raise RuntimeError unless all networks return the same logits up to rounding."""
    expected = nets["timm"](images).float()
    tolerance = 1e-3 if images.dtype == torch.float32 else 0.1
    for name, net in nets.items():
        difference = (net(images).float() - expected).abs().max() / expected.abs().max()
        if not difference < tolerance:
            raise RuntimeError(f"{name} differs from timm by {difference:.1e} of the largest logit")


def measure(nets: dict[str, nn.Module], images: torch.Tensor, options) -> dict[str, Windows]:
    """Frames per second of each network, in interleaved windows."""
    synchronize = synchronizer(images.device)

    def time_calls(net: nn.Module, calls: int) -> float:
        """Duration in seconds of `calls` calls."""
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            net(images)
        synchronize()
        return time.perf_counter() - start

    def window_of(net: nn.Module) -> Callable[[], float]:
        time_calls(net, 2)  # warm-up
        calls = max(1, round(options.seconds / time_calls(net, 1)))
        return lambda: calls * len(images) / time_calls(net, calls)

    require_equal(nets, images)
    variants = {name: window_of(net) for name, net in nets.items()}
    rates = interleave(variants, options.windows)
    return {name: Windows(values) for name, values in rates.items()}


def main() -> None:
    parser = argument_parser(__doc__, precision=tuple(DTYPES))
    parser.add_argument("--net", default="cspdarknet53")
    parser.add_argument("--cases", nargs="+", metavar="SIZExBATCH")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a window")
    parser.add_argument("--compile", action="store_true", help="torch.compile every network")
    options = parser.parse_args()
    device = setup_device(options.device)
    torch.backends.cudnn.benchmark = True
    precision = choose_precision(options.precision, device).name
    record = new_record(options) | {"precision": precision, "results": {}}
    print(f"{record['machine']}, torch {torch.__version__}, timm {timm.__version__}, {precision}")
    nets = build(options.net, DTYPES[precision], device)
    if options.compile:
        nets = {name: torch.compile(net, dynamic=False) for name, net in nets.items()}
    for case in options.cases or CASES[device.type]:
        size, batch = (int(number) for number in case.split("x"))
        images = torch.randn(batch, 3, size, size).to(device, DTYPES[precision])
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            results = measure(nets, images, options)
        record["results"][case] = {
            name: {"frames_per_second": windows.median, "windows": windows.values}
            for name, windows in results.items()
        }
        print(f"{size}×{size}, batch {batch}")
        print_table(results, "frames/s", reference="timm")
        write_record(options.json, record)


if __name__ == "__main__":
    main()
