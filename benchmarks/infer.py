"""Frames/s of the net alone: ours as trained, ours folded, timm's with the same weights.

    python benchmarks/infer.py [--cases 512x1 256x128] [--precision fp16] [--compile] [--json FILE]

A case is size x batch; where none is given, those of the device, small on a CPU. Random images on
the device, channels-last, weights in the precision named. The nets take turns, window by window;
the median of the windows counts, and their range is its spread.
"""

import argparse
import statistics
import time
from pathlib import Path

import timm
import torch
from common import about, write
from torch import nn

from cspnet.nets import create
from cspnet.nets.layers import fold
from cspnet.runtime.device import DTYPES, choose_precision, setup_device

CASES = {"cuda": ["512x1", "256x128"], "cpu": ["256x1", "128x8"]}


def build(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Module]:
    """The nets by name, one function of the image, ready for inference."""
    torch.manual_seed(0)
    ours = create(name, norm_momentum=1.0).to(memory_format=torch.channels_last)
    with torch.no_grad():
        ours(torch.randn(8, 3, 128, 128))  # statistics of a batch, so that signals live
    theirs = timm.create_model(name, act_layer="mish").to(memory_format=torch.channels_last)
    theirs.load_state_dict(ours.state_dict())
    nets = {"ours folded": fold(ours), "ours": ours, "timm": theirs}
    return {key: net.eval().requires_grad_(False).to(device, dtype) for key, net in nets.items()}


def measure(nets: dict[str, nn.Module], images: torch.Tensor, options) -> dict[str, list[float]]:
    """Frames per second of each window of each net; RuntimeError where the nets do not agree."""
    synchronise = torch.cuda.synchronize if images.is_cuda else lambda: None

    def seconds(net: nn.Module, calls: int) -> float:
        synchronise()
        start = time.perf_counter()
        for _ in range(calls):
            net(images)
        synchronise()
        return time.perf_counter() - start

    expected = nets["timm"](images).float()
    tolerance = 1e-3 if images.dtype == torch.float32 else 0.1
    for name, net in nets.items():
        difference = (net(images).float() - expected).abs().max() / expected.abs().max()
        if not difference < tolerance:
            raise RuntimeError(f"{name} differs from timm's net by {difference:.1e} of the largest")
    calls = {}
    for name, net in nets.items():
        seconds(net, 2)
        calls[name] = max(1, round(options.seconds / seconds(net, 1)))
    windows = {name: [] for name in nets}
    for _ in range(options.windows):
        for name, net in nets.items():
            frames = calls[name] * len(images)
            windows[name].append(frames / seconds(net, calls[name]))
    return windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--net", default="cspdarknet53")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--cases", nargs="+", metavar="SIZExBATCH")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="a window")
    parser.add_argument("--compile", action="store_true", help="every net by torch.compile")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = setup_device(options.device)
    torch.backends.cudnn.benchmark = True
    precision = choose_precision(options.precision, device).name
    record = about(options) | {"precision": precision, "results": {}}
    print(f"{record['machine']}, torch {torch.__version__}, timm {timm.__version__}, {precision}")
    nets = build(options.net, DTYPES[precision], device)
    if options.compile:
        nets = {name: torch.compile(net, dynamic=False) for name, net in nets.items()}
    for case in options.cases or CASES[device.type]:
        size, batch = (int(number) for number in case.split("x"))
        images = torch.randn(batch, 3, size, size).to(device, DTYPES[precision])
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            windows = measure(nets, images, options)
        medians = {name: statistics.median(speeds) for name, speeds in windows.items()}
        record["results"][case] = {
            name: {"frames_per_second": medians[name], "windows": speeds}
            for name, speeds in windows.items()
        }
        print(f"{size}×{size}, batch {batch}")
        for name, speeds in windows.items():
            print(
                f"  {name:12} {medians[name]:9.2f} frames/s ({min(speeds):.2f} to "
                f"{max(speeds):.2f})  {medians[name] / medians['timm']:5.2f} of timm's"
            )
        write(options.json, record)


if __name__ == "__main__":
    main()
