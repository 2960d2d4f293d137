"""Everything in a run that changes from step to step.

It includes no random state: random numbers depend on (seed, step, group) only
(cspnet/data/stream.py).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

import cspnet
from cspnet.errors import CheckpointError
from cspnet.nets.network import Network
from cspnet.recipe.schedule import learning_rate
from cspnet.recipe.schema import Recipe
from cspnet.run.checkpoint import FORMAT
from cspnet.train.identity import DatasetIdentity, RunIdentity
from cspnet.train.optim import EMA, step_optimizer


@dataclass
class TrainState:
    """The state of a run after some optimizer steps."""

    net: Network
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: EMA | None
    step: int = 0  # optimizer steps done
    # Steps that updated the weights. Under loss scaling some steps are skipped, and only the device
    # knows which, so there it is a float64 tensor on the device. The learning rate depends on it.
    updates: torch.Tensor | int = 0
    validated_step: int = 0  # of the last validation
    best_top1: float = -1.0  # percent, of all validations; -1 before the first
    loss_sum: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # since the last log
    loss_steps: int = 0  # in loss_sum
    # First step with a non-finite loss, counted from 0; -1 if none. int64, on the device.
    bad_step: torch.Tensor = field(default_factory=lambda: torch.tensor(-1))
    # Whether all of it belongs to the same step, so that it may be saved; see `inconsistent`.
    consistent: bool = True
    saved_step: int = -1  # of the last save, or of the checkpoint that the run resumed from

    @property
    def nbytes(self) -> int:
        """Size of a checkpoint, accurate to a few thousand bytes."""
        tensors = [
            *self.net.state_dict().values(),
            *(self.ema.tensors if self.ema else {}).values(),
        ]
        for group in self.optimizer.param_groups:
            tensors += group["params"]  # the momentum of each
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @contextlib.contextmanager
    def inconsistent(self) -> Iterator[None]:
        """Mark the state as not to be saved if the block fails.

        From the first forward pass of a step, which updates the running statistics, to the update
        of the weights it belongs to two steps; during trials it has their statistics.
        """
        self.consistent = False
        yield
        self.consistent = True

    def set_learning_rate(self, recipe: Recipe) -> float | torch.Tensor:
        """Set the learning rate of the next update in the optimizer; return it."""
        rate = learning_rate(self.updates + 1, recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        return rate

    def note_loss(self, loss: torch.Tensor) -> None:
        """Add the loss of the current step to the sum, and remember the first non-finite one.

        On the device, so that the host does not wait.
        """
        self.loss_sum += loss
        self.loss_steps += 1
        is_first = ~torch.isfinite(loss) & (self.bad_step < 0)
        self.bad_step.copy_(torch.where(is_first, self.step, self.bad_step))

    def apply_update(self) -> None:
        """Update the weights with the accumulated gradients, then the EMA; count the step."""
        applied = step_optimizer(self.optimizer, self.scaler)
        self.step += 1
        self.updates += 1 if applied is None else applied
        if self.ema:
            self.ema.update(self.updates, applied)

    def take_mean_loss(self) -> float:
        """Mean loss since the last call; starts a new interval. The host waits for the device."""
        mean = float(self.loss_sum) / self.loss_steps
        self.loss_sum.zero_()
        self.loss_steps = 0
        return mean

    def state_dict(self) -> dict:
        """Its part of a checkpoint. Weights have the keys that timm looks for."""
        return {
            "step": self.step,
            "updates": int(self.updates),
            "validated": self.validated_step,
            "best_top1": self.best_top1,
            "loss_sum": self.loss_sum.cpu(),
            "loss_steps": self.loss_steps,
            "state_dict": self.net.state_dict(),
            "state_dict_ema": self.ema.tensors if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, saved: dict) -> None:
        """Load a checkpoint. Raises CheckpointError if tensor shapes differ."""
        try:
            self.net.load_state_dict(saved["state_dict"])
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip()
            raise CheckpointError(
                f"tensor shapes differ from the checkpoint, which --force cannot change: {first}"
            ) from None
        if self.ema:
            self.ema.load(saved["state_dict_ema"] or saved["state_dict"])
        # Only the momentum: whether the fused kernel updates the weights depends on this device.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(
            {"state": saved["optimizer"]["state"], "param_groups": groups}
        )
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.step = saved["step"]
        if isinstance(self.updates, torch.Tensor):
            self.updates.fill_(saved["updates"])
        else:
            self.updates = saved["updates"]
        self.validated_step = saved["validated"]
        self.best_top1 = saved["best_top1"]
        self.loss_sum.copy_(saved["loss_sum"])
        self.loss_steps = saved["loss_steps"]

    def restore(self, saved: dict, identity: RunIdentity, force: bool = False) -> list[str]:
        """Load a checkpoint of the same run; return remarks to print.

        Raises CheckpointError if settings or data differ. With `force` only tensor shapes must be
        the same.
        """
        remarks = identity.require_same(saved, force)
        self.load_state_dict(saved)
        self.saved_step = self.step
        val_changed = DatasetIdentity.from_text(saved["dataset"]).val != identity.dataset.val
        if val_changed and self.best_top1 >= 0:
            self.best_top1 = -1.0
            remarks.append("the validation images changed: the selection of best.pt starts again")
        return remarks


def checkpoint_content(identity: RunIdentity, state: TrainState) -> dict:
    """All of a checkpoint: plain values, text and tensors."""
    return {
        "format": FORMAT,
        "cspnet": cspnet.__version__,
        "torch": str(torch.__version__),
        **identity.to_dict(),
        "epoch": identity.epoch(state.step),
        **state.state_dict(),
    }
