"""Do the optimized code paths change the numbers? Losses of 20 steps, against plain modules.

    python benchmarks/parity.py --data data/imagenet [--precisions fp32 bf16] [--json FILE]

The same run with torch's own modules (F.batch_norm, F.mish), with cspnet's eager functions, and
compiled; with mixing, and with the attack unless --no-attack is given. At the learning rate that
the warm-up of the recipe reaches after 20 steps, the differences are the rounding errors of single
steps. At a rate that changes a new network, each step amplifies earlier rounding errors; the
control shows how much: the plain modules with another number of threads, or on a GPU a repetition.

Printed are the largest relative difference of a loss, and that of the final momentum, which is the
sum of the gradients (norm of the difference over the norm). In 16 bits, the distance to the plain
modules in fp32 is printed, too: a compiled network rounds less often, so it can be closer than the
plain modules. A loss is a mean over the images of a step: the more images, the smaller its errors.
A CPU without 16-bit convolutions computes them as the tensor cores of a GPU do (tensor_cores.py).
"""

from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import tensor_cores
import torch
from harness import argument_parser, new_record, temporary_run, training_metrics, write_record

from cspnet.nets import csp, layers, mish
from cspnet.recipe.load import find_recipe, load_recipe
from cspnet.runtime.device import DTYPES, Precision, setup_device
from cspnet.runtime.signals import StopRequest
from cspnet.train.compile import prepare_step
from cspnet.train.loop import train_loop
from cspnet.train.start import start

STEPS = 20
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
OVERRIDES = [
    *(f"schedule.steps={STEPS}", f"save_every={STEPS}", "log_every=1", "evaluate.every=1000"),
    *("schedule.warmup_steps=0", "schedule.power=1"),
]
ATTACK = ["adversarial.step_size=1", "adversarial.probability=0.5"]
SMALL = ["batch=16", "group=8", "data.image_size=128"]  # on a CPU
PATHS = ("eager", "compiled", "control")
RATES = ("1.6e-8", "0.005")


class Result(NamedTuple):
    losses: list[float]  # of each step
    momentum: torch.Tensor  # of all weights at the end, as one vector


def train_steps(options, precision: str, path: str, rate: str) -> Result:
    """Train STEPS steps along a code path: plain or one of PATHS."""
    on_cpu = setup_device(options.device).type == "cpu"
    emulates = on_cpu and not tensor_cores.is_native(DTYPES[precision])
    recipe = load_recipe(
        find_recipe(options.recipe),
        [
            *(*OVERRIDES, *([] if options.no_attack else ATTACK), f"optim.learning_rate={rate}"),
            f"precision={'fp32' if emulates else precision}",  # a CPU would refuse fp16
            *(*(SMALL if on_cpu else []), *options.overrides),
        ],
        options.data,
    )
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        run = stack.enter_context(
            temporary_run(
                recipe,
                device=options.device,
                workers=0,
                micro_batch=recipe.group,
                compile=path == "compiled",
            )
        )
        if emulates:
            stack.enter_context(tensor_cores.emulated())
            hardware = replace(run.hardware, precision=Precision(precision, "emulated"))
            run = replace(run, hardware=hardware)
        if path in ("plain", "control"):
            for module in (mish, layers, csp):
                stack.enter_context(mock.patch.object(module, "is_eager", lambda x: False))
        if path == "control":
            stack.callback(torch.set_num_threads, threads)
            torch.set_num_threads(1 if threads > 1 else 2)
        state = start(run)
        step = prepare_step(run, state)
        if path == "compiled" and step.notes.gradient_error is None:
            raise RuntimeError(step.notes.warning())
        train_loop(run, state, StopRequest(), step)
        losses = [line["loss"] for line in training_metrics(run)]
    momentum = [entry["momentum_buffer"] for entry in state.optimizer.state.values()]
    return Result(losses, torch.cat([tensor.double().cpu().flatten() for tensor in momentum]))


def differences(result: Result, reference: Result) -> tuple[float, float]:
    """Largest relative difference of a loss, and relative difference of the momentum."""
    pairs = zip(result.losses, reference.losses, strict=True)
    momentum = (result.momentum - reference.momentum).norm() / reference.momentum.norm()
    return max(abs(a - b) / abs(b) for a, b in pairs), float(momentum)


def main() -> None:
    parser = argument_parser(__doc__, data=True)
    parser.add_argument("--recipe", default="cspdarknet53-omega")
    parser.add_argument("--precisions", nargs="+", choices=tuple(TOLERANCE), default=[*TOLERANCE])
    parser.add_argument("--rates", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--no-attack", action="store_true")
    parser.add_argument("overrides", nargs="*", help="of the recipe")
    options = parser.parse_args()
    record = new_record(options) | {"steps": STEPS, "results": {}}
    exact_results: dict[str, Result] = {}  # of the plain modules in fp32, by rate
    for precision in options.precisions:
        is_exact = precision == "fp32"
        for rate in options.rates:
            plain = train_steps(options, precision, "plain", rate)
            first, last = plain.losses[0], plain.losses[-1]
            print(f"{precision}, rate {rate}: losses {first:.4f} … {last:.4f}", flush=True)
            if rate not in exact_results:
                exact_results[rate] = (
                    plain if is_exact else train_steps(options, "fp32", "plain", rate)
                )
            for path in options.paths if is_exact else ("plain", *options.paths):
                result = plain if path == "plain" else train_steps(options, precision, path, rate)
                loss, momentum = differences(result, plain)
                exact_loss, exact_momentum = differences(result, exact_results[rate])
                record["results"][f"{precision}, {rate}, {path}"] = {
                    "loss": loss,
                    "momentum": momentum,
                    "loss_from_fp32": exact_loss,
                    "momentum_from_fp32": exact_momentum,
                }
                verdict = "within" if loss <= TOLERANCE[precision] else "above"
                print(
                    f"  {path:8} loss {loss:.1e}, {verdict} {TOLERANCE[precision]:.0e}; "
                    f"momentum {momentum:.1e}; from fp32 {exact_loss:.1e}, {exact_momentum:.1e}",
                    flush=True,
                )
                write_record(options.json, record)


if __name__ == "__main__":
    main()
