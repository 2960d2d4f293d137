"""What a resumed run must share with its checkpoint: recipe, classes, data set, precision."""

import json
from dataclasses import asdict, dataclass

from cspnet.errors import CheckpointError
from cspnet.recipe.load import flatten, recipe_from_yaml, recipe_to_yaml
from cspnet.recipe.schema import Recipe
from cspnet.sources.listing import Listing, compare_listings
from cspnet.text import printable

# Recipe fields that a resumed run may change freely.
FREE = (
    *("data.root", "data.max_unreadable", "log_every", "save_every", "evaluate.every"),
    *("archive_every", "archive_keep"),
)
# Fields that it may change with a remark, since the learning rate depends on them.
HORIZON = ("schedule.steps",)
NOTHING_LISTED = Listing(0, "", [])


@dataclass(frozen=True)
class DatasetIdentity:
    """Which images a run trains and validates on."""

    root: str  # data.root as an absolute path
    train: Listing = NOTHING_LISTED
    val: Listing = NOTHING_LISTED

    def to_text(self) -> str:
        """JSON in ASCII, since a path may hold bytes that are not valid in any encoding."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "DatasetIdentity":
        content = json.loads(text)
        return cls(content["root"], Listing(**content["train"]), Listing(**content["val"]))


def changed_fields(text: str, recipe: Recipe) -> list[str]:
    """Keys that differ between a stored recipe and this one, without those that may change.

    Raises RecipeError if the text is not a recipe of this version.
    """
    before, now = _flat(text), _flat(recipe_to_yaml(recipe))
    return [key for key in now if now[key] != before[key] and key not in (*FREE, *HORIZON)]


def _flat(text: str) -> dict:
    return dict(flatten(recipe_from_yaml(text)))


@dataclass(frozen=True)
class RunIdentity:
    """What stays the same from the first step of a run to its last, across resumes."""

    recipe: Recipe
    classes: list[str]
    images: int  # in the training set
    dataset: DatasetIdentity
    precision: str
    precision_reason: str

    def epoch(self, step: int) -> float:
        """Passes over the training set in the first `step` steps."""
        return step * self.recipe.batch / self.images

    def to_dict(self) -> dict:
        """Its part of a checkpoint: plain values."""
        return {
            "recipe": recipe_to_yaml(self.recipe),
            "classes": self.classes,
            "images": self.images,
            "dataset": self.dataset.to_text(),
            "precision": self.precision,
            "precision_reason": self.precision_reason,
        }

    def require_same(self, saved: dict, force: bool = False) -> list[str]:
        """Compare with the checkpoint `saved`; return remarks about permitted differences.

        Raises CheckpointError with all differences that are not permitted; with `force`, these are
        remarks, too.
        """
        # Both through the text, which omits fields without effect.
        before, now = _flat(saved["recipe"]), _flat(recipe_to_yaml(self.recipe))
        changed = [key for key in now if now[key] != before[key] and key not in FREE]
        remarks: list[str] = []
        differences = [
            f"{key} was {before[key]}, is now {now[key]}" for key in changed if key not in HORIZON
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
                + "\nResume with the settings of the run, start a new run in another folder, or "
                "change the settings of this one with --force."
            )
        remarks += [f"forced: {difference}" for difference in differences]
        remarks += [
            f"the schedule changes: {key} was {before[key]:,}, is now {now[key]:,}"
            for key in changed
            if key in HORIZON
        ]
        if saved["precision"] != self.precision:
            remarks.append(
                f"the precision changes with the device: {saved['precision']} -> {self.precision}; "
                "the run will not be bit-identical to an uninterrupted one"
            )
        return remarks

    def _compare_dataset(self, before: DatasetIdentity) -> tuple[list[str], list[str]]:
        """Differences that change labels, and other differences, since the checkpoint."""
        now = self.dataset
        labels: list[str] = []
        others: list[str] = []
        for split in ("train", "val"):
            differences = compare_listings(
                split, getattr(before, split), getattr(now, split), self.classes
            )
            labels += differences[0]
            others += differences[1]
        if before.root != now.root:
            moved = f"data.root was {printable(before.root)}, is now {printable(now.root)}"
            if labels or others:
                (labels if labels else others).append(moved)
            else:
                others.append(f"{moved}; its listing is the same")
        return labels, others
