"""Self-adversarial training: the net changes the images against itself, then learns from them.

As Darknet's src/network_kernels.cu (train_network_datum_gpu, forward_backward_network_gpu): for
half of the groups after the warm-up, with a strength that grows with the step, towards the target
"nothing there": all zeros. With a softmax at the end that lowers the log-sum-exp of the logits,
which is what the net believes in now. The raw gradient is taken, neither its sign nor a norm.
BatchNorm uses its running statistics and leaves them alone, so images do not act on each other.

Two defects of the original are left out: there the classifier's bias receives the attack's
gradient, and the buffer of the input's gradient starts from stale memory.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from cspnet.data import stream
from cspnet.recipe.schema import Recipe


def attack_step_size(step: int, recipe: Recipe) -> float:
    """Step size of the attack in optimizer step `step`, which counts from 0; 0 in the warm-up."""
    if step <= recipe.schedule.warmup_steps:
        return 0.0
    return recipe.adversarial.step_size * step / recipe.schedule.steps


def attack_mask(recipe: Recipe, step: int, groups: range) -> np.ndarray:
    """Which of the groups of a step are attacked: bool [len(groups)], a coin for each."""
    if not attack_step_size(step, recipe):
        return np.zeros(len(groups), bool)
    coins = [
        stream.rng_for(recipe.seed, stream.ATTACK_DOMAIN, step, group).random() for group in groups
    ]
    return np.array(coins) < recipe.adversarial.probability


def attack(
    forward: Callable[[torch.Tensor], torch.Tensor],
    net: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor | None,
    size: float,
    scale: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Images in [0, 1], [B, 3, S, S], moved by `size` times the gradient and clipped to [0, 1].

    `forward` gives the logits of images through `net`, whose weights get no gradient. Without
    targets the log-sum-exp of the logits falls; with soft targets [B, K], which is our variant, the
    cross-entropy rises. `scale` multiplies what is differentiated, so that fp16 does not underflow.
    """
    seen = images.detach().requires_grad_()
    with _frozen(net), torch.enable_grad():
        logits = forward(seen).float()  # [B, K]
        if targets is None:
            ascent = -logits.logsumexp(1).sum()
        else:
            ascent = nn.functional.cross_entropy(logits, targets, reduction="sum")
        (gradient,) = torch.autograd.grad(ascent * scale, seen)
    gradient = torch.nan_to_num(gradient / scale, nan=0.0, posinf=0.0, neginf=0.0)
    return (images + size * gradient).clamp(0, 1)


@contextlib.contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """BatchNorm on running statistics; no weight asks for a gradient, none is saved for one."""
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
