"""Bit-for-bit comparison of run folders."""

import logging
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from harness import ROOT

from cspnet.errors import CheckpointError
from cspnet.run.checkpoint import CheckpointFiles, load_checkpoint
from cspnet.run.folder import RunFolder

sys.path.insert(0, str(ROOT))

from tests import golden


def is_equal(one: Any, other: Any) -> bool:
    """Bit-equality of tensors, numbers and texts."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and one == other
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # As bytes: NaN equals NaN, and 0 is not -0.
    first, second = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


def describe_difference(one: Any, other: Any) -> str:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return f"{one} and {other}"
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"
    distance = (one.double() - other.double()).norm() / one.double().norm()
    return f"by {float(distance):.3g} of its norm"


def leaf_differences(one: dict[str, Any], other: dict[str, Any], where: str) -> list[str]:
    """A line for each key of both dictionaries whose values differ."""
    return [
        f"{where}: {key} differs: {describe_difference(value, other[key])}"
        for key, value in one.items()
        if key in other and not is_equal(value, other[key])
    ]


def metrics_differences(one: Path, other: Path) -> list[str]:
    """Differences of metrics.jsonl, apart from times and memory."""
    first, second = golden.metrics(one), golden.metrics(other)
    lines = []
    if len(first) != len(second):
        lines.append(f"metrics.jsonl: {len(first)} and {len(second)} lines")
    for a, b in zip(first, second, strict=False):
        where = f"metrics.jsonl: {a['split']} at step {a['step']}"
        keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
        lines += [f"{where}: {key}: {a.get(key)} and {b.get(key)}" for key in keys]
    return lines


def run_differences(uninterrupted: Path, interrupted: Path) -> list[str]:
    """Differences between two folders of the same run, one of which was interrupted and resumed.

    Compares checkpoints, metrics and TensorBoard curves; temporary files must not remain.
    """
    folders = [RunFolder(path) for path in (uninterrupted, interrupted)]
    files = [CheckpointFiles(folder.checkpoint_folder, 1) for folder in folders]
    archives = [[path.name for path in checkpoints.archives()] for checkpoints in files]
    lines = [f"archives: {archives[0]}, {archives[1]}"] if archives[0] != archives[1] else []
    for name in ("last.pt", "previous.pt", "best.pt", *archives[0]):
        try:
            one, other = (_checkpoint_leaves(run.folder / name) for run in files)
        except CheckpointError as error:
            lines.append(str(error))
            continue
        lines += leaf_differences(one, other, name)
        lines += [f"{name}: only one has {key}" for key in sorted(one.keys() ^ other.keys())]
    lines += metrics_differences(uninterrupted, interrupted)
    metrics = golden.metrics(interrupted)
    for split in ("train", "val"):
        steps = [line["step"] for line in metrics if line["split"] == split]
        if steps != sorted(set(steps)):
            lines.append(f"metrics.jsonl: the steps of {split} are not strictly increasing")
    lines += [f"temporary file: {path.name}" for path in interrupted.rglob("*.tmp")]
    try:
        if _tensorboard_curves(folders[0]) != _tensorboard_curves(folders[1]):
            lines.append("the TensorBoard curves differ")
    except ValueError as error:
        lines.append(f"TensorBoard: {error}")
    return lines


def _checkpoint_leaves(file: Path) -> dict[str, Any]:
    """Values of a checkpoint, without the optimizer's learning rate, which each step sets."""
    content = load_checkpoint(file)
    for group in content["optimizer"]["param_groups"]:
        del group["lr"]
    return golden.leaves(content)


def _tensorboard_curves(folder: RunFolder) -> dict[str, dict[int, float]]:
    """Loss and top-1 by step. ValueError if the steps are not strictly increasing."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports each restart
    events = EventAccumulator(str(folder.tensorboard_folder), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag in ("train/loss", "val/top1"):
        points = [(event.step, event.value) for event in events.Scalars(tag)]
        if any(after[0] <= before[0] for before, after in pairwise(points)):
            raise ValueError(f"{tag}: steps {[step for step, _ in points]}")
        curves[tag] = dict(points)
    return curves
