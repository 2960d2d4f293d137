"""Everything of a run that changes from step to step, and what a resumed run must share with it.

No random state is in it: the step is the only clock and the only seed (cspnet/data/stream.py).
"""

import json
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

import cspnet
from cspnet.errors import CheckpointError
from cspnet.recipe.load import flatten, recipe_from_yaml, recipe_to_yaml
from cspnet.recipe.schema import Recipe
from cspnet.run.checkpoint import FORMAT
from cspnet.sources.listing import Listing, compare_listings
from cspnet.text import printable
from cspnet.train.optim import EMA

# Recipe fields that a resumed run may change. All others, and the data, are the run's identity.
CHANGEABLE_FIELDS = (
    *("data.root", "data.max_unreadable", "log_every", "save_every", "evaluate.every"),
    *("archive_every", "archive_keep"),
)
HORIZON_FIELDS = ("schedule.steps",)


NOTHING_LISTED = Listing(0, "", [])


@dataclass(frozen=True)
class DatasetIdentity:
    """Which images a run trains and validates on."""

    root: str  # data.root as an absolute path
    train: Listing = NOTHING_LISTED
    val: Listing = NOTHING_LISTED

    def to_text(self) -> str:
        """JSON in ASCII: a path may hold bytes that no encoding of text has."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "DatasetIdentity":
        content = json.loads(text)
        return cls(content["root"], Listing(**content["train"]), Listing(**content["val"]))


def changed_fields(text: str, recipe: Recipe) -> list[str]:
    """Keys of a stored recipe whose values are others now, but for those that may change.

    RecipeError where the text is no recipe of this version.
    """
    then, now = (dict(flatten(recipe_from_yaml(t))) for t in (text, recipe_to_yaml(recipe)))
    return [
        key
        for key in now
        if now[key] != then[key] and key not in (*CHANGEABLE_FIELDS, *HORIZON_FIELDS)
    ]


@dataclass
class TrainState:
    """Everything that changes from step to step."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: EMA | None
    recipe: Recipe
    classes: list[str]
    images: int  # in the training set
    dataset: DatasetIdentity
    precision: str
    precision_reason: str
    step: int = 0  # optimizer steps done
    # Those of them that changed the weights: under loss scaling some are skipped, and only the
    # device knows which, so there it is a float64 tensor on it. The schedule counts these.
    updates: torch.Tensor | int = 0
    validated: int = 0  # step of the last validation
    best_top1: float = -1.0  # percent; of validation
    loss_sum: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # since the last log
    loss_steps: int = 0
    # The first step whose loss was not finite, -1 before there is one; int64, on the device.
    bad_step: torch.Tensor = field(default_factory=lambda: torch.tensor(-1))
    # Whether all of it is of the same step. From a step's first forward pass, which moves the
    # running statistics, to its update it is not; nor while compiled kernels are tested.
    consistent: bool = True
    saved: int = -1  # step of the last save, or of the checkpoint that the run started from

    @property
    def size(self) -> int:
        """Bytes of a checkpoint, but for a few thousand."""
        tensors = [
            *self.net.state_dict().values(),
            *(self.average.tensors if self.average else {}).values(),
        ]
        for group in self.optimizer.param_groups:
            tensors += group["params"]  # the momentum of each
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

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
            "recipe": recipe_to_yaml(self.recipe),
            "classes": self.classes,
            "images": self.images,
            "dataset": self.dataset.to_text(),
            "precision": self.precision,
            "precision_reason": self.precision_reason,
            "step": self.step,
            "updates": int(self.updates),
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

    def restore(self, saved: dict, force: bool = False) -> list[str]:
        """Takes over a checkpoint of the same run; returns remarks worth printing.

        Raises CheckpointError with every setting that differs and may not; by `force` such settings
        are remarks, as long as the tensors fit.
        """
        remarks = self._compare(saved, force)
        self.take(saved)
        self.saved = self.step
        if (
            DatasetIdentity.from_text(saved["dataset"]).val != self.dataset.val
            and self.best_top1 >= 0
        ):
            self.best_top1 = -1.0
            remarks.append("the validation images changed: best.pt is selected anew")
        return remarks

    def take(self, saved: dict) -> None:
        """Takes over a checkpoint. Raises CheckpointError where the tensors do not fit."""
        try:
            self.net.load_state_dict(saved["state_dict"])
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip()
            raise CheckpointError(f"the tensors do not fit, by force neither: {first}") from None
        if self.average:
            self.average.load(saved["state_dict_ema"] or saved["state_dict"])
        # The state alone: which kernel updates the weights is a matter of this device.
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
        self.validated = saved["validated"]
        self.best_top1 = saved["best_top1"]
        self.loss_sum.copy_(saved["loss_sum"])
        self.loss_steps = saved["loss_steps"]

    def _compare(self, saved: dict, force: bool) -> list[str]:
        # Through the text both ways, which leaves out what has no effect.
        then, now = (
            dict(flatten(recipe_from_yaml(text)))
            for text in (saved["recipe"], recipe_to_yaml(self.recipe))
        )
        changed = [key for key in now if now[key] != then[key] and key not in CHANGEABLE_FIELDS]
        remarks: list[str] = []
        differences = [
            f"{key} was {then[key]}, is now {now[key]}"
            for key in changed
            if key not in HORIZON_FIELDS
        ]
        if saved["classes"] != self.classes:
            differences.append(
                f"the classes were {len(saved['classes'])} ({saved['classes'][0]} …), "
                f"are now {len(self.classes)} ({self.classes[0]} …)"
            )
        else:
            labels, remarks = self._compare_dataset(DatasetIdentity.from_text(saved["dataset"]))
            if labels and not differences and not force:
                raise CheckpointError(
                    f"the images in {printable(self.dataset.root)} are not those of the run:"
                    + "".join(f"\n  - {difference}" for difference in labels)
                    + "\nRestore them, or give the right folder with --data. --force continues "
                    "with these."
                )
            differences += labels
        if differences and not force:
            raise CheckpointError(
                "this run cannot be resumed with other settings:"
                + "".join(f"\n  - {difference}" for difference in differences)
                + "\nResume with the settings of the run, start another one in another folder, or "
                "change this one in its course with --force."
            )
        remarks += [f"by force: {difference}" for difference in differences]
        remarks += [
            f"the horizon changes: {key} was {then[key]:,}, is now {now[key]:,}" for key in changed
        ]
        if saved["precision"] != self.precision:
            remarks.append(
                f"the precision changes with the device: {saved['precision']} -> {self.precision}; "
                "the run will not be bit-equal to an undisturbed one"
            )
        return remarks

    def _compare_dataset(self, then: DatasetIdentity) -> tuple[list[str], list[str]]:
        """Changes of labels, and other changes, since the checkpoint."""
        now = self.dataset
        labels, others = [], []
        for split in ("train", "val"):
            found = compare_listings(split, getattr(then, split), getattr(now, split), self.classes)
            labels += found[0]
            others += found[1]
        if then.root != now.root and (labels or others):
            where = f"data.root was {printable(then.root)}, is now {printable(now.root)}"
            (labels if labels else others).append(where)
        elif then.root != now.root:
            others.append(
                f"data.root was {printable(then.root)}, is now {printable(now.root)}; "
                "its listing is the same"
            )
        return labels, others
