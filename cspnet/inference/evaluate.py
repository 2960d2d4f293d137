"""Top-1 and top-5 on a validation set: every image exactly once, in the view of the recipe.

Training's own validation and `cspnet-eval` call the same function.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cspnet.data.augment import normalize
from cspnet.data.loader import evaluation_batches
from cspnet.data.supervision import WorkerMonitor
from cspnet.recipe.schema import Recipe
from cspnet.runtime.device import Precision
from cspnet.runtime.distributed import SINGLE_PROCESS, Processes
from cspnet.sources.data_root import Source


@dataclass(frozen=True)
class Scores:
    top1: float  # percent
    top5: float  # percent
    loss: float  # mean cross-entropy with the true class, nats
    images: int
    unreadable: int  # counted as black images
    seconds: float
    # int64 [K, K]: images of a class (row) by the class that the net took them for (column)
    confusion: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    def to_dict(self) -> dict:
        """All numbers but the confusion matrix."""
        numbers = {name: value for name, value in asdict(self).items() if name != "confusion"}
        return {**numbers, "images_per_second": self.images_per_second}


@torch.no_grad()
def evaluate_network(
    net: nn.Module,
    source: Source,
    recipe: Recipe,
    precision: Precision,
    workers: int,
    batch: int | None = None,
    weights: dict[str, torch.Tensor] | None = None,
    progress: Callable[[int], None] = lambda images: None,
    world: Processes = SINGLE_PROCESS,
    seen: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    monitor: WorkerMonitor | None = None,
) -> Scores:
    """Scores of the net, or of other weights (a state dict) in it, on all images of the source.

    `batch` is the number of images at once, the recipe's by default; `progress` is told how many
    are done, as often in each process of the world, which share the batches. `seen` gets, batch by
    batch, the index of its first image, logits float32 [n, K] and labels [n] of its images; those
    of this process. The net is left in the mode in which it was. `monitor` hears of dataloader
    workers that died; by default stderr does. Raises WorkersLost where they die again and again.
    """
    was_training = net.training
    net.eval()
    device = next(net.parameters()).device
    # Top-1, top-5, loss, images, and unreadable ones among these.
    totals = torch.zeros(5, dtype=torch.float64, device=device)
    taken: list[torch.Tensor] = []  # place in the confusion matrix, by image; -1 outside the mask
    batch = batch or recipe.batch
    start = time.perf_counter()
    with contextlib.closing(
        evaluation_batches(
            *(source, batch, recipe.data.image_size, recipe.evaluate, workers),
            *(device.type == "cuda", world.rank, world.size, monitor),
        )
    ) as batches:
        for number, loaded in enumerate(batches):
            images, labels, mask = (part.to(device, non_blocking=True) for part in loaded[:3])
            pixels = normalize(images.permute(0, 3, 1, 2).float() / 255, recipe.data)
            with precision.autocast(device):
                logits = torch.func.functional_call(net, weights or {}, (pixels,))
            logits = logits.float()
            totals[:4] += _count(logits, labels, mask)
            totals[4] += len(loaded.unreadable)
            classes = logits.shape[1]
            taken.append(torch.where(mask, labels * classes + logits.argmax(1), -1))
            if seen:
                real = int(loaded.mask.sum())
                seen((number * world.size + world.rank) * batch, logits[:real], labels[:real])
            progress(min((number + 1) * batch * world.size, len(source)))
    top1, top5, loss, images, unreadable = world.sum_(totals).tolist()
    places = np.concatenate(world.gather(torch.cat(taken).cpu().numpy()))
    confusion = np.bincount(places[places >= 0], minlength=classes**2).reshape(classes, classes)
    net.train(was_training)
    assert images == len(source), "the mask must let every image through once"
    return Scores(
        top1=100 * top1 / images,
        top5=100 * top5 / images,
        loss=loss / images,
        images=int(images),
        unreadable=int(unreadable),
        seconds=time.perf_counter() - start,
        confusion=confusion,
    )


def _count(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sums over the images under the mask: top-1 and top-5 hits, loss, images; float64 [4]."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [B, 5]
    loss = F.cross_entropy(logits, labels, reduction="none")
    counts = torch.stack([hits[:, 0], hits.any(1), loss, torch.ones_like(loss)], 1)  # [B, 4]
    return (counts.double() * mask[:, None]).sum(0)
