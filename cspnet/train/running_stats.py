"""BatchNorm's running statistics and the loss of a step, summed over the processes of a run."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cspnet.nets.layers import GroupBatchNorm2d
from cspnet.runtime.distributed import Processes


class RunningStats:
    """Keeps the running statistics of all processes equal to those of a single process.

    A running average is updated once per group, in order: r <- (1 - m) r + m s. That is linear in
    r. So each process updates its own copy with its own groups, and the contributions are summed
    over the processes, each decayed by the groups that follow it. Construct it while the network is
    identical in all processes, with `groups` as the number of groups of one process per step.
    """

    def __init__(self, processes: Processes, net: nn.Module, groups: int):
        self._processes = processes
        norms = [
            norm
            for norm in net.modules()
            if isinstance(norm, _BatchNorm) and norm.training and norm.track_running_stats
        ]
        self._tensors: list[torch.Tensor] = []
        decays: list[torch.Tensor] = []
        for norm in norms:
            assert norm.running_mean is not None and norm.running_var is not None
            assert norm.momentum is not None
            self._tensors += [norm.running_mean, norm.running_var]
            decays += 2 * [torch.full_like(norm.running_mean, 1 - norm.momentum)]
        # GroupBatchNorm2d does not count its forward passes.
        self._counts = [
            norm.num_batches_tracked
            for norm in norms
            if type(norm) is not GroupBatchNorm2d and norm.num_batches_tracked is not None
        ]
        self._groups_elsewhere = groups * (processes.size - 1)
        decay = torch.cat(decays) if decays else torch.zeros(0)  # [sum of channels, twice]
        self._decay_of_own, self._decay_of_all = decay**groups, decay ** (groups * processes.size)
        self._decay_after_own = decay ** (groups * (processes.size - 1 - processes.rank))
        self._before_step = self._flatten()

    @torch.no_grad()
    def all_reduce(self, loss: torch.Tensor) -> torch.Tensor:
        """Set the statistics after all micro-batches of a step; return the loss of all processes.

        One all-reduce on the device, without a wait of the host. `loss` is a scalar tensor.
        """
        if self._processes.size == 1 or not self._tensors:
            return self._processes.all_reduce(loss)
        added = self._decay_after_own * (self._flatten() - self._decay_of_own * self._before_step)
        total = self._processes.all_reduce(torch.cat([added, loss.reshape(1).to(added)]))
        self._before_step = self._decay_of_all * self._before_step + total[:-1]
        pieces = self._before_step.split([tensor.numel() for tensor in self._tensors])
        torch._foreach_copy_(self._tensors, list(pieces))
        if self._counts:
            torch._foreach_add_(self._counts, self._groups_elsewhere)
        return total[-1]

    def _flatten(self) -> torch.Tensor:
        return torch.cat(self._tensors) if self._tensors else torch.zeros(0)
