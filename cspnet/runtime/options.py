"""Where and how fast to train: the options of the command line. What to train is in the recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Fraction of the activations that a compiled network keeps for the backward pass, by value of
# --recompute. The rest is recomputed; only `full` recomputes convolutions (benchmarks/memory.py).
ACTIVATION_BUDGETS = {"none": 1.0, "light": 0.6, "full": 0.3}


@dataclass(frozen=True)
class RunOptions:
    """Options of a run. Apart from the device's precision, none of them changes its results."""

    output: Path  # the run folder
    resume: bool = False
    device: str = "auto"
    workers: int | None = None  # dataloader workers; None chooses by device
    # Images per forward pass, a multiple of the recipe's group. "auto" takes the largest that fits
    # into memory; None is "auto" on a GPU, one group on a CPU.
    micro_batch: int | Literal["auto"] | None = None
    compile: bool | None = None  # None compiles on a GPU only
    recompute: str = "none"  # a key of ACTIVATION_BUDGETS
    max_hours: float | None = None
    recipe_file: Path | None = None  # that the recipe was read from
    force: bool = False  # resume although settings differ
    stop_on_full_disk: bool = False  # a full disk stops the run instead of pausing its saves
