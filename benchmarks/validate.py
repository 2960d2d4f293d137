"""Images/s of a validation: ours against the loop of timm's validate.py, on the same net and files.

    python benchmarks/validate.py --data data/imagenet/val [--images 256 --json FILE]

Both decode, resize to the same view (shorter side to size / 0.887, antialiased, central square),
normalise, send the batch through cspdarknet53 with Mish, and count top-1, top-5 and the loss. The
weights are the same, and the mean losses are compared. Windows of whole validations, in turns.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import timm
import timm.data
import torch
from common import about, write
from timm.utils import AverageMeter, accuracy

from cspnet.inference.evaluate import evaluate_network
from cspnet.nets import create
from cspnet.recipe import load as recipes
from cspnet.runtime.device import choose_precision, choose_workers, setup_device
from cspnet.sources.data_root import Folder, validation_folder

CROP = 0.887  # timm's for cspdarknet53


class Part:
    """The first images of a source, again and again until there are enough."""

    def __init__(self, source: Folder, images: int):
        self.source, self.classes = source, source.classes
        self.labels = np.resize(source.labels, images)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[bytes, int]:
        return self.source.read(index % len(self.source))

    def name(self, index: int) -> str:
        return self.source.name(index % len(self.source))


@torch.no_grad()
def timms(net, folder: Path, options, device, precision, workers: int) -> tuple[float, float]:
    """Images/s and mean loss by the loop of timm's validate.py (timm 1.0), channels-last."""
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True  # its settings
    dataset = timm.data.ImageDataset(str(folder))
    repeats = -(-options.images // len(dataset.reader.samples))
    dataset.reader.samples = (dataset.reader.samples * repeats)[: options.images]
    loader = timm.data.create_loader(
        dataset,
        (3, options.size, options.size),
        options.batch,
        is_training=False,
        num_workers=workers,
        crop_pct=CROP,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, help="on a GPU 256, else 32")
    parser.add_argument("--images", type=int, help="on a GPU 10,000, else 160")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--rounds", type=int, default=3, help="beside the first, which is dropped")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = setup_device(options.device)
    precision = choose_precision(options.precision, device)
    workers = choose_workers(options.workers, device)
    small = device.type == "cpu"
    options.batch = options.batch or (32 if small else 256)
    options.images = options.images or (160 if small else 10_000)
    folder = validation_folder(options.data)
    source = Part(Folder(folder), options.images)
    torch.manual_seed(0)
    ours = create("cspdarknet53", classes=len(source.classes), norm_momentum=1.0)
    with torch.no_grad():
        ours(torch.randn(8, 3, 128, 128))  # statistics of a batch, so that signals live
    theirs = timm.create_model("cspdarknet53", act_layer="mish", num_classes=len(source.classes))
    theirs.load_state_dict(ours.state_dict())
    nets = [
        net.eval().to(device=device, memory_format=torch.channels_last) for net in (ours, theirs)
    ]
    recipe = recipes.load_recipe(
        None,
        [
            *(
                f"data.image_size={options.size}",
                "data.normalize=imagenet",
                f"batch={options.batch}",
            ),
            *(f"evaluate.crop_pct={CROP}", "evaluate.interpolation=antialias"),
        ],
    )
    record = about(options) | {"precision": precision.name, "workers": workers}
    speeds: dict[str, list[float]] = {"ours": [], "timm": []}
    for _ in range(options.rounds + 1):
        torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = False
        scores = evaluate_network(nets[0], source, recipe, precision, workers)
        speed, loss = timms(nets[1], folder, options, device, precision, workers)
        speeds["ours"].append(scores.images_per_second)
        speeds["timm"].append(speed)
        write(options.json, {**record, "images_per_second, first ones too": speeds})
    record["loss"] = {"ours": scores.loss, "timm": loss}
    if abs(scores.loss - loss) > 0.02 * abs(loss):  # PIL's pixels and rounding differ from OpenCV's
        raise RuntimeError(f"not the same validation: loss {scores.loss:.4f}, timm's {loss:.4f}")
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)][1:]
    for name, windows in speeds.items():
        windows.pop(0)
        low, high = min(windows), max(windows)
        print(f"{name:5} {statistics.median(windows):9.2f} images/s ({low:.2f}–{high:.2f})")
    print(
        f"ours to timm's {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}); "
        f"mean loss {scores.loss:.4f}, timm's {loss:.4f}"
    )
    write(options.json, {**record, "images_per_second": speeds, "ratios": ratios})


if __name__ == "__main__":
    main()
