"""What the self-adversarial attack costs: a training step with it over one without, interleaved.

    python benchmarks/adversarial.py [--width 0.5 --size 128 --group 16 --rounds 8]

One group, forward, backward and SGD, random images; median of the ratios of neighbouring steps.
"""

import argparse
import json
import platform
import statistics
import time

import torch

from cspnet.nets import create
from cspnet.train.adversarial import attack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", default="float32", help="of autocast: float32, bfloat16, float16"
    )
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    net = create("cspdarknet53", width=arguments.width, group=arguments.group).to(
        device, memory_format=torch.channels_last
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    images = torch.rand(arguments.group, 3, arguments.size, arguments.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (arguments.group,), device=device)

    def forward(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return net(images)

    def step(attacks: bool) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        seen = attack(forward, net, images, None, 0.1) if attacks else images
        torch.nn.functional.cross_entropy(forward(seen).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(2):
        step(False), step(True)
    pairs = [(step(False), step(True)) for _ in range(arguments.rounds)]
    ratios = [with_attack / plain for plain, with_attack in pairs]
    record = {
        **vars(arguments),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "plain_ms": 1000 * statistics.median(plain for plain, _ in pairs),
        "attack_ms": 1000 * statistics.median(attacked for _, attacked in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min_max": [min(ratios), max(ratios)],
    }
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
