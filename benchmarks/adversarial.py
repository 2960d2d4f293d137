"""Cost of the self-adversarial attack: training steps with it and without it, interleaved.

    python benchmarks/adversarial.py [--width 0.5 --size 128 --group 16 --rounds 8]

One group of random images: forward, backward and SGD.
"""

import time

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

from cspnet.nets import create
from cspnet.runtime.device import DTYPES, choose_precision, setup_device
from cspnet.train.adversarial import attack


def main() -> None:
    parser = argument_parser(__doc__, precision=tuple(DTYPES))
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    device = setup_device(options.device)
    precision = choose_precision(options.precision, device)
    net = create("cspdarknet53", width=options.width, group=options.group)
    net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    images = torch.rand(options.group, 3, options.size, options.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (options.group,), device=device)
    synchronize = synchronizer(device)

    def forward(images: torch.Tensor) -> torch.Tensor:
        with precision.autocast(device):
            return net(images)

    def step(with_attack: bool) -> float:
        """Milliseconds of a training step."""
        synchronize()
        start = time.perf_counter()
        inputs = attack(forward, net, images, None, 0.1) if with_attack else images
        torch.nn.functional.cross_entropy(forward(inputs).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        return 1000 * (time.perf_counter() - start)

    variants = {"plain": lambda: step(False), "attack": lambda: step(True)}
    results = interleave(variants, options.rounds, dropped=2)
    times = {name: Windows(values) for name, values in results.items()}
    print_table(times, "ms", reference="plain")
    record = new_record(options) | {
        "precision": precision.name,
        "milliseconds": results,
        "ratio": times["attack"].ratios_to(times["plain"]).median,
    }
    write_record(options.json, record)


if __name__ == "__main__":
    main()
