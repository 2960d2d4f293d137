"""The logits of a network for every image of a source, in the recipe's evaluation view."""

import contextlib
from collections.abc import Collection, Generator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cspnet.data.augment import normalize
from cspnet.data.loader import evaluation_batches
from cspnet.data.supervision import WorkerMonitor
from cspnet.recipe.schema import Recipe
from cspnet.runtime.device import Precision
from cspnet.runtime.distributed import SINGLE_PROCESS, Processes
from cspnet.sources.protocol import Source


class LogitBatch(NamedTuple):
    """A batch of images and their logits; the tensors are on the network's device."""

    first: int  # index of the first image in the source
    images: int  # number of images, without padding
    logits: Tensor  # float32 [B, K]
    labels: Tensor  # int64 [B]
    mask: Tensor  # bool [B], False for padding
    unreadable: Collection[int]  # indices of unreadable images, which were replaced by black ones


def batches_with_logits(
    net: nn.Module,
    source: Source,
    recipe: Recipe,
    precision: Precision,
    workers: int,
    batch: int,
    padding: bool = True,
    weights: Mapping[str, Tensor] | None = None,
    processes: Processes = SINGLE_PROCESS,
    monitor: WorkerMonitor | None = None,
) -> Generator[LogitBatch, None, None]:
    """The images of a source in order, `batch` at a time; each process gets its share of batches.

    The network must be in evaluation mode. `weights` temporarily replace its own. `padding` pads
    the last batch to full size, so that all have the same shape. Closing the generator ends the
    dataloader workers. WorkersFailedError if they keep dying.
    """
    device = next(net.parameters()).device
    with contextlib.closing(
        evaluation_batches(
            *(source, batch, recipe.data.image_size, recipe.evaluate, workers),
            *(device.type == "cuda", processes.rank, processes.size, monitor),
        )
    ) as batches:
        for number, loaded in enumerate(batches):
            count = int(loaded.mask.sum())
            size = len(loaded.mask) if padding else count
            images, labels, mask = (
                tensor.to(device, non_blocking=True)[:size] for tensor in loaded[:3]
            )
            pixels = normalize(images.permute(0, 3, 1, 2).float() / 255, recipe.data)
            with torch.no_grad(), precision.autocast(device):
                logits = torch.func.functional_call(net, dict(weights or {}), (pixels,))
            first = (number * processes.size + processes.rank) * batch
            yield LogitBatch(first, count, logits.float(), labels, mask, loaded.unreadable)
