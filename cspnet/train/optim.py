"""The optimizer with its parameter groups, and the EMA of the weights."""

import torch
from torch import nn

from cspnet.nets.network import Network
from cspnet.recipe.schema import Optim


def parameter_groups(net: Network, optim: Optim) -> list[dict]:
    """Trained parameters by weight decay and by `share`, the factor on the learning rate.

    Weights of convolutions and of the classifier, which are the tensors of more than one dimension,
    decay; biases and BatchNorm do not (Darknet's update_convolutional_layer). The factor is 1
    except for the backbone if the recipe sets optim.backbone_lr.
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


def build_optimizer(net: Network, optim: Optim) -> torch.optim.SGD:
    """SGD as in Darknet: momentum without dampening, the learning rate outside of the buffer.

    The caller sets the learning rate of each step. On CUDA the fused kernel reads on the device
    whether the loss scaler skips the step, so that the host does not wait.
    """
    optimizer = torch.optim.SGD(
        parameter_groups(net, optim),
        lr=0.0,
        momentum=optim.momentum,
        fused=next(net.parameters()).is_cuda or None,
    )
    # The fused kernel allocates momentum without clearing it, and leaves it uninitialized if the
    # loss scaler skips the first step.
    for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def step_optimizer(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> torch.Tensor | None:
    """Update the weights and clear the gradients.

    Under loss scaling, return on the device whether the step was applied (1) or skipped (0).
    """
    scaler.step(optimizer)
    applied = None
    if scaler.is_enabled():
        infinite = scaler._found_inf_per_device(optimizer).values()
        applied = 1 - sum(infinite).clamp(max=1)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return applied


class EMA:
    """Exponential moving average (EMA) of weights and BatchNorm statistics, float32.

    The decay of the n-th update is min(decay, (1 + n) / (10 + n)), so that the random initial
    weights are forgotten soon (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, net: nn.Module, decay: float):
        self.decay = decay
        live = net.state_dict()  # shares memory with the network
        self.tensors = {name: tensor.clone() for name, tensor in live.items()}
        moving = [name for name, tensor in live.items() if tensor.is_floating_point()]
        self._live = [live[name] for name in moving]
        self._kept = [self.tensors[name] for name in moving]

    @torch.no_grad()
    def update(self, update: int | torch.Tensor, applied: torch.Tensor | None = None) -> None:
        """Average in the weights after the `update`-th update, counted from 1.

        Under loss scaling both arguments are on the device; if `applied` is 0, nothing changes.
        """
        if applied is None or isinstance(update, int):
            decay = min(self.decay, (1 + float(update)) / (10 + float(update)))
            torch._foreach_lerp_(self._kept, self._live, 1 - decay)
            return
        decay_now = torch.clamp((1 + update) / (10 + update), max=self.decay)
        moves = torch._foreach_sub(self._live, self._kept)
        torch._foreach_mul_(moves, ((1 - decay_now) * applied).float())
        torch._foreach_add_(self._kept, moves)

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load the tensors of a checkpoint."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
