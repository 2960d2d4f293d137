"""Images per second of a validation: cspnet against the loop of timm's validate.py.

    python benchmarks/validate.py --data data/imagenet/val [--images 256 --json FILE]

Both decode the same files, resize to the same view (shorter side to size / 0.887, antialiased,
center crop), normalize, run cspdarknet53 with the same weights, and compute top-1, top-5 and the
loss. The mean losses must agree. A window is a whole validation.
"""

import time
from pathlib import Path

import timm
import timm.data
import torch
from harness import (
    RepeatedSource,
    Windows,
    argument_parser,
    interleave,
    new_record,
    open_folder,
    print_table,
    use_defaults,
    write_record,
)
from timm.utils import AverageMeter, accuracy

from cspnet.inference.evaluate import evaluate_network
from cspnet.nets import create
from cspnet.recipe import load as recipes
from cspnet.runtime.device import DTYPES, choose_precision, choose_workers, setup_device

CROP_PCT = 0.887  # timm's default for cspdarknet53


@torch.no_grad()
def run_timm(net, folder: Path, options, device, precision, workers: int) -> tuple[float, float]:
    """Images per second and mean loss of the loop in timm's validate.py (timm 1.0)."""
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True  # as there
    dataset = timm.data.ImageDataset(str(folder))
    repeats = -(-options.images // len(dataset.reader.samples))
    dataset.reader.samples = (dataset.reader.samples * repeats)[: options.images]
    loader = timm.data.create_loader(
        dataset,
        (3, options.size, options.size),
        options.batch,
        is_training=False,
        num_workers=workers,
        crop_pct=CROP_PCT,
        interpolation="bilinear",
        device=device,
    )
    meters = [AverageMeter() for _ in range(3)]  # loss, top-1, top-5
    start = time.perf_counter()
    for images, target in loader:
        images = images.contiguous(memory_format=torch.channels_last)
        with precision.autocast(device):
            output = net(images)
            loss = torch.nn.functional.cross_entropy(output, target)
        acc1, acc5 = accuracy(output.detach(), target, topk=(1, 5))
        for meter, value in zip(meters, (loss, acc1, acc5), strict=True):
            meter.update(value.item(), len(images))
    return len(dataset) / (time.perf_counter() - start), meters[0].avg


def build_networks(classes: int, device: torch.device) -> list[torch.nn.Module]:
    """cspnet's and timm's network with the same weights."""
    torch.manual_seed(0)
    ours = create("cspdarknet53", classes=classes, norm_momentum=1.0)
    with torch.no_grad():
        ours(torch.randn(8, 3, 128, 128))  # running statistics
    theirs = timm.create_model("cspdarknet53", act_layer="mish", num_classes=classes)
    theirs.load_state_dict(ours.state_dict())
    return [
        net.eval().to(device=device, memory_format=torch.channels_last) for net in (ours, theirs)
    ]


def main() -> None:
    parser = argument_parser(__doc__, data=True, precision=tuple(DTYPES))
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, help="32 on a CPU, else 256")
    parser.add_argument("--images", type=int, help="160 on a CPU, else 10,000")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--rounds", type=int, default=3, help="after one dropped round")
    options = parser.parse_args()
    device = setup_device(options.device)
    precision = choose_precision(options.precision, device)
    workers = choose_workers(options.workers, device)
    use_defaults(options, device.type == "cpu", batch=(32, 256), images=(160, 10_000))
    folder = open_folder(options.data, "val")
    source = RepeatedSource(folder, options.images)
    nets = build_networks(len(source.classes), device)
    recipe = recipes.load_recipe(
        None,
        [
            *(
                f"data.image_size={options.size}",
                "data.normalize=imagenet",
                f"batch={options.batch}",
            ),
            *(f"evaluate.crop_pct={CROP_PCT}", "evaluate.interpolation=antialias"),
        ],
    )
    record = new_record(options) | {"precision": precision.name, "workers": workers}

    def ours() -> tuple[float, float]:
        torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = False
        scores = evaluate_network(nets[0], source, recipe, precision, workers)
        return scores.images_per_second, scores.loss

    variants = {
        "cspnet": ours,
        "timm": lambda: run_timm(nets[1], folder.root, options, device, precision, workers),
    }
    results = interleave(variants, options.rounds, dropped=1)
    speeds = {name: Windows([speed for speed, _ in runs]) for name, runs in results.items()}
    losses = {name: runs[-1][1] for name, runs in results.items()}
    # PIL's pixels and rounding differ slightly from OpenCV's.
    if abs(losses["cspnet"] - losses["timm"]) > 0.02 * abs(losses["timm"]):
        raise RuntimeError(f"the validations differ: mean losses {losses}")
    print_table(speeds, "images/s", reference="timm")
    print(f"mean loss {losses['cspnet']:.4f}, timm {losses['timm']:.4f}")
    record |= {
        "loss": losses,
        "images_per_second": {name: windows.values for name, windows in speeds.items()},
        "ratios": speeds["cspnet"].ratios_to(speeds["timm"]).values,
    }
    write_record(options.json, record)


if __name__ == "__main__":
    main()
