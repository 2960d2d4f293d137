"""Train with two source trees and compare the results bit for bit: the check of a refactoring.

    python benchmarks/compare_commits.py BEFORE AFTER [--only NAME ...] [--output FOLDER]

BEFORE and AFTER are checkouts, for example of `git worktree add`. Each run below is trained with
both: every tensor and number in last.pt and best.pt must be equal, and so must the lines of
metrics.jsonl, except for times and memory. Recipe keys and options that were renamed between the
two are translated by the tables below; entries of checkpoints that were renamed are paired by their
content. Exits with 1 if anything differs.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import argument_parser
from run_folders import golden, is_equal, leaf_differences, metrics_differences

# Section and field, before and after; without dots, so that a search for a key does not find them.
KEYS = """
average decay            ema decay
mix share                mix images_per_draw
adversarial strength     adversarial step_size
adversarial target       adversarial objective
augment resize           augment scale
augment angle            augment rotation
data size                data image_size
data start_size          data start_image_size
data scaled_decode       data reduced_decode
evaluate crop            evaluate crop_pct
evaluate resize          evaluate interpolation
model weights            model init_from
model freeze             model freeze_stages
loss smoothing           loss label_smoothing
"""
# Values of renamed keys, before and after, by the field's new name.
VALUES = {
    "objective": {"nothing": "suppress", "label": "mislead"},
    "interpolation": {"corners": "align_corners"},
}
BEFORE_TO_AFTER = {
    f"{a}.{b}": f"{c}.{d}" for a, b, c, d in map(str.split, KEYS.strip().splitlines())
}
AFTER_TO_BEFORE = {after: before for before, after in BEFORE_TO_AFTER.items()}

# Prints the keys of the recipe.
LIST_KEYS = """
import importlib
for module in ("schema", "recipe.schema"):
    try:
        Recipe = importlib.import_module("cspnet." + module).Recipe
    except ImportError:
        pass
from dataclasses import fields, is_dataclass
for field in fields(Recipe()):
    value, name = getattr(Recipe(), field.name), field.name
    print(*[f"{name}.{f.name}" for f in fields(value)] if is_dataclass(value) else [name])
"""


@dataclass(frozen=True)
class Run:
    overrides: tuple[str, ...] = ()
    micro_batch: int = 0  # in groups; 0 leaves the option out
    options: tuple[str, ...] = ()
    processes: int = 1
    killed: bool = False


# The golden recipe has the attack, mixing, an EMA, and a growing image size.
OFTEN = ("adversarial.probability=0.9", "mix.probability=0.8")
RUNS = {
    "one": Run(),
    "two-processes": Run(processes=2),
    "killed": Run(killed=True),
    "two-processes-killed": Run(processes=2, killed=True),
    "mislead": Run(("adversarial.target=label", "model.name=darknet53", "model.activation=leaky")),
    "micro-batches": Run(OFTEN, micro_batch=2, options=("--workers", "2")),
    "bf16": Run(("precision=bf16", "schedule.steps=4"), micro_batch=4),
    "usual-epsilon": Run(("model.norm_eps=1e-5", "evaluate.resize=corners")),
    "timm": Run(("model.name=timm/resnet18", "data.size=64", "data.start_size=32")),
    "no-ema": Run(("average.decay=0", "model.name=cspresnext50", "log_every=3", "save_every=2")),
}
UNKNOWN_TO_TIMM = ("model.width=", "model.norm_momentum=", "model.norm_eps=")


@dataclass(frozen=True)
class Tree:
    """A checkout, with its recipe keys and options."""

    path: Path
    keys: frozenset[str]
    options: str  # the help of its `train` command

    @classmethod
    def open(cls, path: Path) -> "Tree":
        def output_of(code: str) -> str:
            environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(path), "COLUMNS": "200"}
            command = [sys.executable, "-c", code, "--help"]
            return subprocess.run(
                command, cwd=path, env=environment, check=True, capture_output=True, text=True
            ).stdout

        options = output_of("from cspnet.cli import main_train; main_train()")
        return cls(path, frozenset(output_of(LIST_KEYS).split()), options)

    def override(self, text: str) -> str:
        """The override with the names of this tree."""
        key, _, value = text.partition("=")
        if key not in self.keys:
            key = BEFORE_TO_AFTER.get(key) or AFTER_TO_BEFORE[key]
        field = AFTER_TO_BEFORE.get(key) and key.partition(".")[2]
        values = VALUES.get(field or "", {})
        if key in BEFORE_TO_AFTER:
            after = BEFORE_TO_AFTER[key].partition(".")[2]
            values = {new: old for old, new in VALUES.get(after, {}).items()}
        return f"{key}={values.get(value, value)}"

    def micro_batch(self, groups: int, group: int) -> tuple[str, str]:
        """The option for a micro-batch of that many groups."""
        if "--micro-batch" in self.options:
            return "--micro-batch", str(groups * group)
        return "--passes", str(groups)

    def train(self, run: Run, output: Path) -> None:
        overrides = [*golden.RECIPE, *run.overrides]
        if any(text.startswith("model.name=timm/") for text in overrides):
            overrides = [text for text in overrides if not text.startswith(UNKNOWN_TO_TIMM)]
        overrides = [self.override(text) for text in overrides]
        options = run.options
        if run.micro_batch:
            group = next(int(t.split("=")[1]) for t in golden.RECIPE if t.startswith("group="))
            options += self.micro_batch(run.micro_batch, group)
        if run.killed:
            count = golden.KILL_AFTER
            golden.train(self.path, output, overrides, options, run.processes, kill_after=count)
            options += ("--resume",)
        golden.train(self.path, output, overrides, options, run.processes)


def numbers(file: Path) -> dict[str, Any]:
    """Tensors and numbers of a checkpoint by path, without the format version."""
    content = torch.load(file, map_location="cpu", weights_only=True)
    return {
        key: value
        for key, value in golden.leaves(content).items()
        if isinstance(value, torch.Tensor | int | float) and key != "format"
    }


def compare_checkpoints(before: Path, after: Path) -> list[str]:
    """Differences between the tensors and numbers of two checkpoints."""
    one, other = (numbers(file) for file in (before, after))
    lines = leaf_differences(one, other, before.name)
    unpaired = {key: value for key, value in other.items() if key not in one}
    for key in [key for key in one if key not in other]:
        match = next((k for k, v in unpaired.items() if is_equal(one[key], v)), None)
        if match is None:
            lines.append(f"{before.name}: {key} is missing after")
        else:
            del unpaired[match]
    return lines + [f"{before.name}: {key} is new" for key in unpaired]


def compare(before: Path, after: Path) -> list[str]:
    """Differences between two run folders."""
    lines = []
    for name in ("last.pt", "best.pt"):
        lines += compare_checkpoints(before / "checkpoints" / name, after / "checkpoints" / name)
    return lines + metrics_differences(before, after)


def main() -> None:
    parser = argument_parser(__doc__, device=False, json=False)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--output", type=Path, help="folder for the runs; temporary by default")
    options = parser.parse_args()
    trees = [Tree.open(options.before.resolve()), Tree.open(options.after.resolve())]
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.only:
            folders = []
            for side, tree in zip(("before", "after"), trees, strict=True):
                folder = (options.output or Path(temporary)).resolve() / side / name
                folder.parent.mkdir(parents=True, exist_ok=True)
                tree.train(RUNS[name], folder)
                folders.append(folder)
            lines = compare(*folders)
            failed += bool(lines)
            count = len(golden.tensors(folders[0] / "checkpoints" / "last.pt"))
            verdict = f"{len(lines)} differences" if lines else f"equal, {count} tensors in last.pt"
            print(f"{name}: {verdict}", flush=True)
            for line in lines[:20]:
                print(f"  {line}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
