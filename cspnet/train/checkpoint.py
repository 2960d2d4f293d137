"""What survives of a run: one state, saved so that a crash cannot lose it, loaded with suspicion.

A checkpoint is a dictionary of plain tensors, numbers and strings, which
`torch.load(weights_only=True)` reads. No random state is in it: the step is the only clock and the
only seed (cspnet/data/stream.py).
"""

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn

import cspnet
from cspnet.errors import CheckpointError, SaveError
from cspnet.recipe import Recipe, flatten, from_text, to_text
from cspnet.train.optim import Average

FORMAT = 1
# Recipe fields that a resumed run may change. All others, and the data, are the run's identity.
FREE = ("data.root", "log_every", "save_every", "evaluate.every")
HORIZON = ("schedule.steps",)


@dataclass
class TrainState:
    """Everything that changes from step to step."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    recipe: Recipe
    classes: list[str]
    images: int  # in the training set
    precision: str
    precision_reason: str
    step: int = 0  # optimizer steps done
    validated: int = 0  # step of the last validation
    best_top1: float = -1.0  # percent; of validation
    loss_sum: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # since the last log
    loss_steps: int = 0

    @property
    def epoch(self) -> float:
        """Passes over the training set so far."""
        return self.step * self.recipe.batch / self.images

    def to_dict(self) -> dict:
        """The checkpoint. Weights go under the names that timm looks for."""
        return {
            "format": FORMAT,
            "cspnet": cspnet.__version__,
            "torch": str(torch.__version__),
            "recipe": to_text(self.recipe),
            "classes": self.classes,
            "images": self.images,
            "precision": self.precision,
            "precision_reason": self.precision_reason,
            "step": self.step,
            "epoch": self.epoch,
            "validated": self.validated,
            "best_top1": self.best_top1,
            "loss_sum": self.loss_sum.cpu(),
            "loss_steps": self.loss_steps,
            "state_dict": self.net.state_dict(),
            "state_dict_ema": self.average.tensors if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, saved: dict) -> list[str]:
        """Takes over a checkpoint of the same run; returns remarks worth printing.

        Raises CheckpointError with every setting that differs and may not.
        """
        remarks = self._compare(saved)
        self.net.load_state_dict(saved["state_dict"])
        if self.average:
            self.average.load(saved["state_dict_ema"])
        # The state alone: which kernel updates the weights is a matter of this device.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(
            {"state": saved["optimizer"]["state"], "param_groups": groups}
        )
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.step = saved["step"]
        self.validated = saved["validated"]
        self.best_top1 = saved["best_top1"]
        self.loss_sum.copy_(saved["loss_sum"])
        self.loss_steps = saved["loss_steps"]
        return remarks

    def _compare(self, saved: dict) -> list[str]:
        # Through the text both ways, which leaves out what has no effect.
        then, now = (
            dict(flatten(from_text(text))) for text in (saved["recipe"], to_text(self.recipe))
        )
        changed = [key for key in now if now[key] != then[key] and key not in FREE]
        differences = [
            f"{key} was {then[key]}, is now {now[key]}" for key in changed if key not in HORIZON
        ]
        if saved["classes"] != self.classes:
            differences.append(
                f"the classes were {len(saved['classes'])} ({saved['classes'][0]} …), "
                f"are now {len(self.classes)} ({self.classes[0]} …)"
            )
        elif saved["images"] != self.images:
            differences.append(
                f"the training images were {saved['images']:,}, are now {self.images:,}"
            )
        if differences:
            raise CheckpointError(
                "this run cannot be resumed with other settings:"
                + "".join(f"\n  - {difference}" for difference in differences)
                + "\nResume with the settings of the run, or start another one in another folder."
            )
        remarks = [
            f"the horizon changes: {key} was {then[key]:,}, is now {now[key]:,}" for key in changed
        ]
        if saved["precision"] != self.precision:
            remarks.append(
                f"the precision changes with the device: {saved['precision']} -> {self.precision}; "
                "the run will not be bit-equal to an undisturbed one"
            )
        return remarks


def save(content: dict, path: Path, also: Path | None = None) -> None:
    """Writes a checkpoint so that `path` holds the old one or the new one, whatever happens.

    With `also`, the same file is put there too, first: a crash in between leaves `path` older than
    `also`, and the steps that are done again lead to the same `also`. Raises SaveError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    second = path.with_name(f".{also.name}.tmp") if also else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if also and second:
            second.unlink(missing_ok=True)
            _link_or_copy(temporary, second)
            os.replace(second, also)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer has a RuntimeError for a full disk
        for leftover in (temporary, second):
            if leftover:
                with contextlib.suppress(OSError):
                    leftover.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        raise SaveError(
            f"{path} could not be written ({reason}); the earlier one is untouched"
        ) from None


def _link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy on disk where the filesystem has no links (exFAT, SMB)."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """A rename is durable only when its folder has reached the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: Path) -> dict:
    """A checkpoint as written by `save`; CheckpointError where it is not a whole one."""
    content = read_torch(path)
    wanted = ("format", "recipe", "classes", "state_dict")
    if not isinstance(content, dict) or any(key not in content for key in wanted):
        raise CheckpointError(f"{path} holds tensors, but is not a checkpoint of cspnet")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']}, this cspnet reads {FORMAT}: "
            f"it was written by cspnet {content.get('cspnet', '?')}"
        )
    return content


def read_torch(path: Path) -> object:
    """What torch.save wrote to a file, tensors and plain values only: no pickle is executed."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"the checkpoint {path} {what}{_suggest(path)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # zip, pickle and torch each have their own for a broken file
        if isinstance(error, UnpicklingError) and "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path} holds Python objects other than tensors, numbers and text. Loading them "
                "would run code out of the file: refused. Ask for its state dict alone."
            ) from None
        raise CheckpointError(
            f"{path} is truncated, damaged, or not a checkpoint ({path.stat().st_size:,} bytes)"
        ) from None


def _suggest(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    near = sorted({*folder.glob("*.pt"), *folder.glob("checkpoints/*.pt")})
    return f"; found there: {', '.join(map(str, near[:4]))}" if near else ""
