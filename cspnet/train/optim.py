"""The optimizer's parameter groups, the learning rate as a function of the step, the average."""

import torch
from torch import nn

from cspnet.recipe.schema import Optim, Recipe

Number = int | float | torch.Tensor


def learning_rate(update: Number, recipe: Recipe) -> Number:
    """Learning rate of the `update`-th update of the weights, which counts from 1.

    A float for an int, a float32 tensor on its device for a float64 one.

    Darknet's get_current_rate (src/network.c): the warm-up rises with the same power with which the
    decay falls, the decay counts from step 0, and the rate of the last step is 0.
    """
    peak, schedule = recipe.optim.learning_rate, recipe.schedule
    if isinstance(update, torch.Tensor):
        rising = (update / max(schedule.warmup_steps, 1)) ** schedule.power
        falling = (1 - update / schedule.steps) ** schedule.power
        return (peak * torch.where(update < schedule.warmup_steps, rising, falling)).float()
    if update < schedule.warmup_steps:
        return peak * (update / schedule.warmup_steps) ** schedule.power
    return peak * (1 - update / schedule.steps) ** schedule.power


def parameter_groups(net: nn.Module, optim: Optim) -> list[dict]:
    """What is trained, by weight decay and by `share`, the factor on the learning rate.

    Weights of convolutions and of the classifier decay; biases and BatchNorm do not. As Darknet's
    update_convolutional_layer: only `weights` decay. They are the tensors with more than one
    dimension. The share is 1, but for the backbone where the recipe gives it a rate of its own.
    """

    def share_of(name: str) -> float:
        if optim.backbone_lr is None or name.startswith(net.classifier_prefixes):
            return 1.0
        return optim.backbone_lr / optim.learning_rate

    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for decays in (True, False):
        decay = optim.weight_decay if decays else 0.0
        for name, weight in net.named_parameters():
            if weight.requires_grad and (weight.ndim > 1) == decays:
                groups.setdefault((decay, share_of(name)), []).append(weight)
    return [
        {"params": weights, "weight_decay": decay, "share": share}
        for (decay, share), weights in groups.items()
    ]


def build_optimizer(net: nn.Module, optim: Optim) -> torch.optim.SGD:
    """SGD as Darknet does it: momentum without dampening, the rate outside of the momentum buffer.

    The rate is set at every step. On CUDA the fused kernel reads the loss scaler's verdict on the
    device, so that the host need not wait for it.
    """
    optimizer = torch.optim.SGD(
        parameter_groups(net, optim),
        lr=0.0,
        momentum=optim.momentum,
        fused=next(net.parameters()).is_cuda or None,
    )
    # Zero momentum from the start. The fused kernel allocates it without clearing it, and where the
    # loss scaler skips the very first step, it would stay that way.
    for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def apply_update(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> torch.Tensor | None:
    """Updates the weights; under loss scaling, 1 or 0 on the device: whether it did so at all."""
    scaler.step(optimizer)
    applied = None
    if scaler.is_enabled():
        infinite = scaler._found_inf_per_device(optimizer).values()
        applied = 1 - sum(infinite).clamp(max=1)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return applied


class EMA:
    """Exponential moving average of weights and BatchNorm statistics, float32.

    The decay of the n-th update is min(decay, (1 + n) / (10 + n)), so that the first weights, which
    are random, are soon forgotten (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, net: nn.Module, decay: float):
        self.decay = decay
        live = net.state_dict()  # shares the net's memory
        self.tensors = {name: tensor.clone() for name, tensor in live.items()}
        moving = [name for name, tensor in live.items() if tensor.is_floating_point()]
        self._live = [live[name] for name in moving]
        self._kept = [self.tensors[name] for name in moving]

    @torch.no_grad()
    def update(self, update: Number, applied: torch.Tensor | None = None) -> None:
        """Takes in the weights after the `update`-th update, which counts from 1.

        Under loss scaling both numbers are on the device; where `applied` is 0 nothing moves.
        """
        if applied is None:
            decay = min(self.decay, (1 + update) / (10 + update))
            torch._foreach_lerp_(self._kept, self._live, 1 - decay)
            return
        decay = torch.clamp((1 + update) / (10 + update), max=self.decay)
        moves = torch._foreach_sub(self._live, self._kept)
        torch._foreach_mul_(moves, ((1 - decay) * applied).float())
        torch._foreach_add_(self._kept, moves)

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over the tensors of a checkpoint."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
