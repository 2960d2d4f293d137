"""The forward and backward pass of an optimizer step: the only one in the project.

A step consists of groups (ghost batches). Some consecutive groups form a micro-batch, which goes
through the network at once. Gradients accumulate over the micro-batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from cspnet.data.augment import augment, normalize, sample_params
from cspnet.data.loader import Batch, TrainGroups
from cspnet.recipe.schedule import attack_step_size
from cspnet.recipe.schema import Recipe
from cspnet.runtime.device import Precision
from cspnet.runtime.distributed import gradient_sync
from cspnet.train.adversarial import attack, attack_mask
from cspnet.train.micro_batch import split_groups
from cspnet.train.running_stats import RunningStats
from cspnet.train.setup import Run
from cspnet.train.state import TrainState


class MicroBatch(NamedTuple):
    """Some groups of a step, on the device."""

    images: torch.Tensor  # float32 [B, 3, S, S] in [0, 1], channels-last
    targets: torch.Tensor  # float32 [B, K], soft


@dataclass(frozen=True)
class StepNotes:
    """What `prepare_step` decided, and why."""

    recipe: Recipe
    groups_at_once: int
    groups: int  # of a step, in this process
    peak: int = 0  # bytes reserved on the device in the memory probe; 0 without one
    # Distance of the compiled gradient from the eager one relative to its norm, and the tolerance.
    gradient_error: tuple[float, float] | None = None
    recompute: str = "none"
    compile_failure: str | None = None

    @property
    def micro_batch(self) -> int:
        """Images per forward pass."""
        return self.groups_at_once * self.recipe.group

    def warning(self) -> str | None:
        """The line about a failure of the compiler, if any."""
        if self.compile_failure is None:
            return None
        return (
            f"NOT COMPILED: {self.compile_failure}. Training continues in eager mode, which is "
            "slower and needs more memory; --no-compile selects it without this warning"
        )

    def lines(self) -> list[str]:
        """All of it, for people."""
        count = -(-self.groups // self.groups_at_once)
        lines = [
            f"micro-batch {self.micro_batch} images ({self.groups_at_once} × group of "
            f"{self.recipe.group}), {count} per step"
            + f", peak {self.peak / 1e9:.1f} GB in a trial"
            * bool(self.peak)
        ]
        if self.gradient_error:
            error, tolerance = self.gradient_error
            lines.append(
                f"compiled; self-test passed: gradient off by {error:.1e} of its norm (tolerance "
                f"{tolerance:.1e}); --recompute {self.recompute}"
            )
        if warning := self.warning():
            lines.append(warning)
        return lines


class TrainStep:
    """Loads, attacks and backpropagates micro-batches; the optimizer is not part of it.

    `network` is `net` or its compiled version, `augment` likewise; both are called with one or more
    groups. `net` owns the weights and the running statistics.
    """

    def __init__(
        self,
        run: Run,
        net: nn.Module,
        groups_at_once: int = 1,
        network: Callable[[torch.Tensor], torch.Tensor] | None = None,
        augment: Callable = augment,
        precision: Precision | None = None,
    ):
        self.recipe, self.classes = run.recipe, len(run.train_set.classes)
        self.device, self.precision = run.hardware.device, precision or run.hardware.precision
        self.net, self.augment = net, augment
        self.network: Any = net if network is None else network
        self.groups_at_once = groups_at_once
        self.micro_batches = split_groups(run.groups, groups_at_once)
        self.notes = StepNotes(run.recipe, groups_at_once, len(run.groups))
        self._run = run
        self._parallel: Any = self.network  # with gradients summed over the processes
        self._stats: RunningStats | None = None

    def with_groups_at_once(self, groups_at_once: int) -> "TrainStep":
        """The same step in other micro-batches."""
        return type(self)(
            self._run, self.net, groups_at_once, self.network, self.augment, self.precision
        )

    def distribute(self) -> None:
        """Synchronize gradients and statistics from now on; call it after all trials."""
        run = self._run
        self._parallel = run.processes.wrap_ddp(self.network, self.device)
        self._stats = RunningStats(run.processes, self.net, len(run.groups))

    def load(self, groups: Sequence[Batch], state: TrainState, group_range: range) -> MicroBatch:
        """The micro-batch of the groups `group_range` of the current step, augmented and attacked.

        Load all micro-batches before the first forward pass, which updates the running statistics
        that the attacks use. The attack goes group by group, so that its result does not depend on
        the micro-batch.
        """
        images, targets = self.load_clean(groups, state.step, group_range)
        group = self.recipe.group
        for position in np.flatnonzero(attack_mask(self.recipe, state.step, group_range)):
            rows = slice(position * group, (position + 1) * group)
            size = attack_step_size(state.step, self.recipe)
            # The scaler's factor suits gradients of a step's mean loss, so use one image's share.
            share = torch.full((), 1 / self.recipe.batch, device=self.device)
            scale = state.scaler.scale(share)
            images[rows] = self.attack(images[rows], targets[rows], size, scale)
        return MicroBatch(images, targets)

    def load_clean(self, groups: Sequence[Batch], step: int, group_range: range) -> MicroBatch:
        """The micro-batch of the groups `group_range` of a step: augmented, without an attack."""
        images = torch.cat([copy_to(self.device, group.images) for group in groups])
        labels = torch.cat([copy_to(self.device, group.labels) for group in groups])
        draws = sample_params(self.recipe, step, group_range).to(self.device)
        return MicroBatch(*self.augment(images, labels, draws, self.recipe, self.classes))

    def attack(
        self,
        images: torch.Tensor,
        targets: torch.Tensor,
        size: float,
        scale: torch.Tensor | float = 1.0,
    ) -> torch.Tensor:
        """The images of a group after the attack with step size `size`; see `adversarial.attack`.

        The objective is multiplied by `scale` before the backward pass.
        """
        misleads = self.recipe.adversarial.objective == "mislead"
        return attack(
            lambda pixels: self.forward(pixels, self.network),
            self.net,
            images,
            targets if misleads else None,
            size,
            scale,
        )

    def forward(
        self, images: torch.Tensor, network: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Logits [B, K] of images in [0, 1], by `network` in the precision of the step."""
        with self.precision.autocast(self.device):
            return network(normalize(images, self.recipe.data))

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy with soft targets [B, K] in float32, summed; its share of a step's mean."""
        total = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        return total / self.recipe.batch

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], scaler: torch.amp.GradScaler
    ) -> torch.Tensor:
        """Accumulate the gradients of a step; return its mean loss over all processes, a scalar.

        Gradients and running statistics are synchronized with the last micro-batch. The host does
        not wait for the device.
        """
        assert self._stats is not None, "distribute() comes first"
        losses = []
        for number, (images, targets) in enumerate(micro_batches, 1):
            with gradient_sync(number == len(micro_batches), self._parallel):
                loss = self.loss(self.forward(images, self._parallel), targets)
                scaler.scale(loss).backward()
            losses.append(loss.detach())
        return self._stats.all_reduce(torch.as_tensor(sum(losses)))

    def trial(
        self, group_range: range, scale: float = 1.0, with_attack: bool = False
    ) -> torch.Tensor:
        """Loss of the groups `group_range` of the last step; accumulate its gradient times `scale`.

        The last step has images of the full size. The images are read without workers. Nothing is
        synchronized.
        """
        step = self.recipe.schedule.steps - 1
        images, targets = self.load_clean(self._read(step, group_range), step, group_range)
        if with_attack:
            rows = slice(self.recipe.group)
            size = attack_step_size(step, self.recipe)
            images[rows] = self.attack(images[rows], targets[rows], size, scale / self.recipe.batch)
        loss = self.loss(self.forward(images, self.network), targets)
        (loss * scale).backward()
        return loss.detach()

    def peak_trial(self, state: TrainState) -> None:
        """Run what takes the most memory: a micro-batch with an attack, and a validation batch."""
        size = self.recipe.data.image_size
        # This batch of a validation first takes the place of the images of a step, of which a
        # micro-batch is only a part.
        batch = torch.rand(self.recipe.batch, 3, size, size, device=self.device)
        with_attack = self.recipe.adversarial.step_size > 0
        self.trial(self.micro_batches[0], state.scaler.get_scale(), with_attack)
        weights = state.ema.tensors if state.ema else {}
        self.net.eval()
        with torch.no_grad(), self.precision.autocast(self.device):
            torch.func.functional_call(self.net, weights, (batch,))
        self.net.train()

    def augmented_batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The first group of a step, for display: images, targets, and images after the attack.

        The attack has the step size of the step, or of the end of the schedule if the step has
        none. The third value is None if the recipe has no attack.
        """
        group_range = range(1)
        images, targets = self.load_clean(self._read(step, group_range), step, group_range)
        largest = self.recipe.adversarial.step_size
        if not largest:
            return images, targets, None
        scale = 1024.0 if self.precision.scales_loss else 1.0
        size = attack_step_size(step, self.recipe) or largest
        return images, targets, self.attack(images, targets, size, scale)

    def replay_step(self, step: int) -> torch.Tensor:
        """Logits of all groups of a step, without attacks, by the network that is not compiled."""
        group_range = range(self.recipe.groups)
        images, _ = self.load_clean(self._read(step, group_range), step, group_range)
        return self.forward(images, self.net)

    def _read(self, step: int, group_range: range) -> list[Batch]:
        """Read some groups of a step in this process."""
        groups = TrainGroups(self._run.train_set, self.recipe)
        return [groups.read((step, group)) for group in group_range]


def copy_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the device. On CUDA its own stream overlaps the copy with kernels of earlier steps.

    If the tensor is pinned, the host does not wait; later kernels on the device do.
    """
    if device.type != "cuda":
        return tensor.to(device)
    copies, work = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):
        copy = tensor.to(device, non_blocking=True)
    work.wait_stream(copies)
    copy.record_stream(work)  # the allocator must not reuse its memory before `work` has read it
    return copy


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
