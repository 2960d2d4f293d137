"""Do the fast paths change the numbers? Losses of 20 steps, against the plain modules.

    python benchmarks/parity.py --data data/imagenet [--precision fp32 bf16 --json FILE]

The same run three times: by torch's modules one by one (F.batch_norm, F.mish), by our eager
functions, and compiled. Mixing is on, and the attack. The rate is low and has no warm-up, so that
the weights move from the first step on, and rounding is not blown up as it is at the recipe's full
rate on a fresh net. Prints the largest relative difference of a step's loss, that of the weights at
the end (norm of the difference over the norm), and for comparison how far these have moved.
"""

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from common import about, write
from rich.console import Console

from cspnet import recipe as recipes
from cspnet.nets import csp, layers
from cspnet.train import loop
from cspnet.train.checkpoint import load
from cspnet.train.runtime import Place, find_device
from cspnet.trained import build_net

STEPS = 20
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
OVERRIDES = [
    *(f"schedule.steps={STEPS}", "schedule.warmup_steps=0", "schedule.power=1", "log_every=1"),
    *("optim.learning_rate=0.005", f"save_every={STEPS}"),
    *("adversarial.strength=1", "adversarial.probability=0.5", "evaluate.every=1000"),
]


def run(options, precision: str, path: str) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Losses of the steps; all weights at the end, and at the start, as a vector each."""
    overrides = [*OVERRIDES, f"precision={precision}", *options.overrides]
    recipe = recipes.load(recipes.find(options.recipe), overrides, options.data)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as plain:
        if path == "plain":  # nothing is fused, Mish is torch's
            for module in (layers, csp):
                plain.enter_context(mock.patch.object(module, "is_eager", lambda x: False))
        place = Place(
            Path(folder) / "run",
            device=options.device,
            workers=0,
            passes=1,
            compile=path == "compiled",
        )
        with mock.patch.object(loop, "is_validation_due", lambda state: False):
            console = Console(quiet=path != "compiled", soft_wrap=True)
            loop.train(recipe, place, console)
            text = (place.output / "metrics.jsonl").read_text()
            saved = load(place.output / "checkpoints" / "last.pt")
    losses = [json.loads(line)["loss"] for line in text.splitlines()]
    return losses, vector(saved["state_dict"]), vector(build_net(recipe, len(saved["classes"])))


def vector(weights: dict | torch.nn.Module) -> torch.Tensor:
    """All parameters of a state dict, or of a net, as one vector of float64."""
    if isinstance(weights, torch.nn.Module):
        weights = weights.state_dict()
    kept = [tensor for name, tensor in weights.items() if "running" not in name]
    return torch.cat([tensor.double().flatten() for tensor in kept])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--recipe", default="cspdarknet53-omega")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", nargs="+", choices=tuple(TOLERANCE))
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="of the recipe")
    options = parser.parse_args()
    small = find_device(options.device).type == "cpu"
    if small:
        options.overrides = ["batch=32", "group=16", "data.size=128", *options.overrides]
    record = about(options) | {"steps": STEPS, "results": {}}
    for precision in options.precision or (["fp32", "bf16"] if small else list(TOLERANCE)):
        expected, weights, fresh = run(options, precision, "plain")
        moved = float((weights - fresh).norm() / fresh.norm())
        for path in ("eager", "compiled"):
            losses, ours, _ = run(options, precision, path)
            worst = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
            apart = float((ours - weights).norm() / weights.norm())
            numbers = {"loss": worst, "weights": apart, "moved": moved}
            record["results"][f"{precision} {path}"] = numbers
            verdict = "within" if worst <= TOLERANCE[precision] else "MORE THAN"
            print(
                f"{precision} {path:8} loss {worst:.1e}, {verdict} {TOLERANCE[precision]:.0e}; "
                f"weights {apart:.1e}, which moved by {moved:.1e}",
                flush=True,
            )
    write(options.json, record)


if __name__ == "__main__":
    main()
