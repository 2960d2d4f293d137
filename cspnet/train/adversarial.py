"""Self-adversarial training: attack images with the network itself, then train on the result.

As in Darknet's src/network_kernels.cu (train_network_datum_gpu, forward_backward_network_gpu): half
of the groups are attacked after the warm-up, with a step size that grows with the training step,
towards a target of all zeros, "no object". With a softmax classifier that lowers the log-sum-exp of
the logits. The attack uses the raw gradient, neither its sign nor a normalized one. BatchNorm uses
its running statistics without updating them, so the images of a group do not affect each other.

Two defects of the original are not reproduced: the classifier's bias receives the gradient of the
attack, and the buffer of the input gradient is not cleared.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from cspnet.data import stream
from cspnet.recipe.schedule import attack_step_size
from cspnet.recipe.schema import Recipe


def attack_mask(recipe: Recipe, step: int, groups: range) -> np.ndarray:
    """Which of the groups of a step are attacked: bool [len(groups)], independent draws."""
    if not attack_step_size(step, recipe):
        return np.zeros(len(groups), bool)
    draws = [
        stream.rng_for(recipe.seed, stream.ATTACK_DOMAIN, step, group).random() for group in groups
    ]
    return np.array(draws) < recipe.adversarial.probability


def attack(
    forward: Callable[[torch.Tensor], torch.Tensor],
    net: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor | None,
    size: float,
    scale: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Images [B, 3, S, S], moved by `size` times the gradient and clipped to [0, 1].

    `forward` returns the logits of images by `net`, whose weights receive no gradient. Without
    targets, the attack lowers the log-sum-exp of the logits. With soft targets [B, K], which
    Darknet does not have, it raises the cross-entropy. The objective is multiplied by `scale`
    before the backward pass, so that fp16 does not underflow.
    """
    pixels = images.detach().requires_grad_()
    with _frozen(net), torch.enable_grad():
        logits = forward(pixels).float()  # [B, K]
        if targets is None:
            objective = -logits.logsumexp(1).sum()
        else:
            objective = nn.functional.cross_entropy(logits, targets, reduction="sum")
        (gradient,) = torch.autograd.grad(objective * scale, pixels)
    gradient = torch.nan_to_num(gradient / scale, nan=0.0, posinf=0.0, neginf=0.0)
    return (images + size * gradient).clamp(0, 1)


@contextlib.contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """Use running statistics in BatchNorm, and save no activations for weight gradients."""
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    net.eval()
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
        net.train()
