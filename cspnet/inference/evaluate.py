"""Top-1 and top-5 accuracy on a validation set, every image exactly once, in the recipe's view.

Validation during training and `cspnet-eval` use the same function.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cspnet.data.supervision import WorkerMonitor
from cspnet.inference.batches import batches_with_logits
from cspnet.recipe.schema import Recipe
from cspnet.runtime.device import Precision
from cspnet.runtime.distributed import SINGLE_PROCESS, Processes
from cspnet.sources.protocol import Source


@dataclass(frozen=True)
class Scores:
    top1: float  # percent
    top5: float  # percent
    loss: float  # mean cross-entropy, nats
    images: int
    unreadable: int  # images replaced by black ones, and counted
    seconds: float
    # int64 [K, K]: number of images by true class (row) and predicted class (column)
    confusion: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """All scores except the confusion matrix."""
        scores = {name: value for name, value in asdict(self).items() if name != "confusion"}
        return {**scores, "images_per_second": self.images_per_second}


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
    processes: Processes = SINGLE_PROCESS,
    on_batch: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    monitor: WorkerMonitor | None = None,
) -> Scores:
    """The scores of a network, or of other weights (a state dict) in it, on all images of a source.

    `batch` is the number of images per batch, by default the recipe's. The processes share the
    batches; each calls `progress` equally often, with the number of images processed by all. After
    each batch of this process, `on_batch` is called with the index of its first image, logits
    float32 [n, K] and labels [n]. `monitor` is notified of dead dataloader workers, by default
    stderr. The network's mode is restored. WorkersFailedError if dataloader workers keep dying.
    """
    was_training = net.training
    net.eval()
    device = next(net.parameters()).device
    # Top-1 hits, top-5 hits, loss, images, unreadable images.
    totals = torch.zeros(5, dtype=torch.float64, device=device)
    cells: list[torch.Tensor] = []  # flat index in the confusion matrix by image; -1 for padding
    classes = 0
    batch = batch or recipe.batch
    start = time.perf_counter()
    with contextlib.closing(
        batches_with_logits(
            *(net, source, recipe, precision, workers, batch, True, weights, processes, monitor)
        )
    ) as batches:
        for number, (first, count, logits, labels, mask, unreadable) in enumerate(batches, 1):
            totals[:4] += _count(logits, labels, mask)
            totals[4] += len(unreadable)
            classes = logits.shape[1]
            cells.append(torch.where(mask, labels * classes + logits.argmax(1), -1))
            if on_batch:
                on_batch(first, logits[:count], labels[:count])
            progress(min(number * batch * processes.size, len(source)))
    top1, top5, loss, images, unreadable_images = processes.all_reduce(totals).tolist()
    confusion = _confusion(
        np.concatenate(processes.gather(torch.cat(cells).cpu().numpy())), classes
    )
    net.train(was_training)
    assert images == len(source), "the mask must include every image exactly once"
    return Scores(
        top1=100 * top1 / images,
        top5=100 * top5 / images,
        loss=loss / images,
        images=int(images),
        unreadable=int(unreadable_images),
        seconds=time.perf_counter() - start,
        confusion=confusion,
    )


def _count(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sums over the images in the mask: top-1 hits, top-5 hits, loss, images; float64 [4]."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [B, 5]
    loss = F.cross_entropy(logits, labels, reduction="none")
    counts = torch.stack([hits[:, 0], hits.any(1), loss, torch.ones_like(loss)], 1)  # [B, 4]
    return (counts.double() * mask[:, None]).sum(0)


def _confusion(cells: np.ndarray, classes: int) -> np.ndarray:
    """The confusion matrix, int64 [K, K], from flat indices of cells; -1 is ignored."""
    return np.bincount(cells[cells >= 0], minlength=classes**2).reshape(classes, classes)
