"""What a step is made of: images onto the device, the attack, the forward pass, the loss."""

from functools import lru_cache

import numpy as np
import torch
from torch import nn

from cspnet.data.augment import normalize, sample_params
from cspnet.data.loader import TrainGroups
from cspnet.train.adversarial import attack, attack_mask, attack_step_size
from cspnet.train.setup import Run
from cspnet.train.state import TrainState


def to_device(job: Run, groups: list, step: int, part: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Augmented images in [0, 1] and soft targets of some groups of a step, on the device."""
    images, labels = (
        torch.cat([copy_to(job.device, getattr(group, name)) for group in groups])
        for name in ("images", "labels")
    )
    draws = sample_params(job.recipe, step, part).to(job.device)
    return job.augment(images, labels, draws, job.recipe, len(job.training.classes))


def copy_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the device; on CUDA by a stream of its own, while kernels of earlier steps run.

    The host does not wait where the tensor is pinned; what follows on the device does.
    """
    if device.type != "cuda":
        return tensor.to(device)
    copies, work = _copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):
        copy = tensor.to(device, non_blocking=True)
    work.wait_stream(copies)
    copy.record_stream(work)  # its memory is given away only after the work that reads it
    return copy


@lru_cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def forward(job: Run, net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits [B, K] of images in [0, 1], in the run's precision."""
    with job.precision.autocast(job.device):
        return net(normalize(images, job.recipe.data))


def attack_some(
    job: Run, state: TrainState, net: nn.Module, images, targets, part: range
) -> torch.Tensor:
    """The images of a pass, those of the attacked groups changed in place.

    Group by group: whatever the passes, the attack is the same computation, and one graph for all.
    """
    group = job.recipe.group
    for place in np.flatnonzero(attack_mask(job.recipe, state.step, part)):
        rows = slice(place * group, (place + 1) * group)
        images[rows] = attack_group(job, state, net, images[rows], targets[rows])
    return images


def attack_group(job: Run, state: TrainState, net: nn.Module, images, targets) -> torch.Tensor:
    """Images of a group, changed by the net against itself with the strength of the step."""
    return attack(
        lambda seen: forward(job, net, seen),
        state.net,
        images,
        targets if job.recipe.adversarial.objective == "mislead" else None,
        attack_step_size(state.step, job.recipe),
        # As large as the loss of a step, by whose gradients the scale was found.
        state.scaler.scale(torch.full((), 1 / job.recipe.batch, device=job.device)),
    )


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over the images of the cross-entropy with soft targets [B, K], in float32."""
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def one_pass(
    job: Run,
    state: TrainState,
    net: nn.Module,
    attacked: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Loss of the first pass of the last step, with its backward pass, for a trial.

    The gradients are scaled as the run's are, or by `scale`.
    """
    groups, part = TrainGroups(job.training, job.recipe), job.passes[0]
    step = job.recipe.schedule.steps - 1  # at the full size
    images, targets = to_device(job, [groups[step, group] for group in part], step, part)
    if attacked:
        rows = slice(job.recipe.group)
        images[rows] = attack_group(job, state, net, images[rows], targets[rows])
    loss = cross_entropy(forward(job, net, images), targets) / job.recipe.batch
    (state.scaler.scale(loss) if scale is None else loss * scale).backward()
    return loss.detach()


def at_most(job: Run, state: TrainState, net: nn.Module) -> torch.Tensor:
    """What takes the most memory: a pass with the attack, and a batch of a validation."""
    size = job.recipe.data.image_size
    # of a validation; meanwhile in the place of a step's images, of which a pass has but a part
    batch = torch.rand(job.recipe.batch, 3, size, size, device=job.device)
    loss = one_pass(job, state, net, attacked=job.recipe.adversarial.step_size > 0)
    weights = state.average.tensors if state.average else {}
    state.net.eval()
    with torch.no_grad(), job.precision.autocast(job.device):
        torch.func.functional_call(state.net, weights, (batch,))
    state.net.train()
    return loss
