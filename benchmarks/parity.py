"""Do the fast paths change the numbers? Losses of 20 steps, against the plain modules.

    python benchmarks/parity.py --data data/imagenet [--precision fp32 bf16 --json FILE]

The same run by torch's modules one by one (F.batch_norm, F.mish), by our eager functions, and
compiled. Mixing is on, and the attack where it is not left out. First at the rate that the recipe's
warm-up has after 20 steps: what differs is the rounding of each step. Then at a rate that moves a
fresh net, where each step blows up the rounding of those before; how much is told by a control, the
plain modules with another number of threads, or on a GPU once more. Prints the largest relative
difference of a loss, and that of the momentum at the end, which is the sum of the gradients (norm
of the difference over the norm). In half precision also how far each is from the plain modules in
fp32: a compiled net rounds less often, and may well be nearer to them than the plain modules are.
A loss is a mean over the images of a step: the more there are, the less is left of it. A CPU whose
own convolutions do not take a type computes them as a GPU's tensor cores do (tensor_cores.py).
"""

import argparse
import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import tensor_cores
import torch
from common import about, write
from rich.console import Console

from cspnet.nets import csp, layers, mish
from cspnet.recipe import load as recipes
from cspnet.run.checkpoint import load_checkpoint
from cspnet.runtime.device import DTYPES, Precision, setup_device
from cspnet.runtime.options import RunOptions
from cspnet.train import loop, setup

STEPS = 20
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
OVERRIDES = [
    *(f"schedule.steps={STEPS}", f"save_every={STEPS}", "log_every=1", "evaluate.every=1000"),
]
ATTACK = ["adversarial.step_size=1", "adversarial.probability=0.5"]
FLAT = ["schedule.warmup_steps=0", "schedule.power=1"]
PATHS = ("eager", "compiled", "control")
RATES = {rate: [*FLAT, f"optim.learning_rate={rate}"] for rate in ("1.6e-8", "0.005")}


def run(options, precision: str, path: str, rates: list[str]) -> tuple[list[float], torch.Tensor]:
    """Losses of the steps; the momentum of all weights at the end as one vector."""
    attack = [] if options.no_attack else ATTACK
    given = [*OVERRIDES, *attack, f"precision={precision}", *rates, *options.overrides]
    recipe = recipes.load_recipe(recipes.find_recipe(options.recipe), given, options.data)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patched:
        patched.enter_context(
            mock.patch.object(loop, "is_validation_due", lambda recipe, step: False)
        )
        on_cpu = setup_device(options.device).type == "cpu"
        if on_cpu and not tensor_cores.native(DTYPES[precision]):
            patched.enter_context(tensor_cores.emulated())
            emulated = Precision(precision, "emulated")  # a run of its own refuses fp16 on a CPU
            patched.enter_context(
                mock.patch.object(setup, "choose_precision", lambda *of: emulated)
            )
        if path in ("plain", "control"):  # nothing is fused, Mish is torch's
            for module in (mish, layers, csp):
                patched.enter_context(mock.patch.object(module, "is_eager", lambda x: False))
        if path == "control":
            torch.set_num_threads(1 if threads > 1 else 2)
        place = RunOptions(
            Path(folder) / "run",
            device=options.device,
            workers=0,
            micro_batch=recipe.group,
            compile=path == "compiled",
        )
        console = Console(record=True, file=open(os.devnull, "w"), width=500)  # noqa: SIM115
        try:
            loop.train(recipe, place, console)
        finally:
            torch.set_num_threads(threads)
        told = console.export_text()
        if path == "compiled" and "compiled; self-test passed" not in told:
            raise RuntimeError(f"this was no compiled run: {told}")
        text = (place.output / "metrics.jsonl").read_text()
        saved = load_checkpoint(place.output / "checkpoints" / "last.pt")
    momentum = [entry["momentum_buffer"] for entry in saved["optimizer"]["state"].values()]
    losses = [json.loads(line)["loss"] for line in text.splitlines()]
    return losses, torch.cat([tensor.double().flatten() for tensor in momentum])


def differences(ours: tuple, others: tuple) -> tuple[float, float]:
    """Of two runs: the largest relative one of their losses, and that of the momentum."""
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours[0], others[0], strict=True))
    return worst, float((ours[1] - others[1]).norm() / others[1].norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--recipe", default="cspdarknet53-omega")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", nargs="+", choices=tuple(TOLERANCE))
    parser.add_argument("--rates", nargs="+", choices=tuple(RATES), default=list(RATES))
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--no-attack", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="of the recipe")
    options = parser.parse_args()
    small = setup_device(options.device).type == "cpu"
    if small:
        options.overrides = ["batch=16", "group=8", "data.image_size=128", *options.overrides]
    record = about(options) | {"steps": STEPS, "results": {}}
    exacts = {}
    for precision in options.precision or TOLERANCE:
        for name in options.rates:
            rates = RATES[name]
            plain = run(options, precision, "plain", rates)
            print(
                f"{precision}, rate {name}: losses {plain[0][0]:.4f} … {plain[0][-1]:.4f}",
                flush=True,
            )
            is_exact = precision == "fp32"
            if name not in exacts:
                exacts[name] = plain if is_exact else run(options, "fp32", "plain", rates)
            for path in options.paths if is_exact else ("plain", *options.paths):
                ours = plain if path == "plain" else run(options, precision, path, rates)
                worst, apart = differences(ours, plain)
                from_fp32 = differences(ours, exacts[name])
                record["results"][f"{precision}, {name}, {path}"] = [worst, apart, *from_fp32]
                verdict = "within" if worst <= TOLERANCE[precision] else "more than"
                print(
                    f"  {path:8} loss {worst:.1e}, {verdict} {TOLERANCE[precision]:.0e}; "
                    f"momentum {apart:.1e}; from fp32 {from_fp32[0]:.1e}, {from_fp32[1]:.1e}",
                    flush=True,
                )
                write(options.json, record)


if __name__ == "__main__":
    main()
