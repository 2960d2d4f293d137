"""Images per second of a training step: cspnet against timm, eager and compiled, interleaved.

    python benchmarks/step.py [--variants cspnet timm cspnet-compiled timm-compiled] [--json FILE]

Both train cspdarknet53 with Mish on the same random uint8 images on the device: normalization,
forward pass, soft-target cross-entropy, backward pass, SGD with momentum, channels-last, with the
same precision, loss scaling and batch. cspnet's step is that of a run (ghost batches, the host
never waits); timm's is that of its train.py (BatchNorm over the whole batch, `loss.item()` in each
step). The default sizes are those of the recipe on a GPU and smaller on a CPU.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm
import torch
from harness import (
    RepeatedSource,
    Windows,
    argument_parser,
    interleave,
    new_record,
    synchronizer,
    temporary_run,
    use_defaults,
    write_record,
)
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler

from cspnet.data.augment import IMAGENET_MEAN, IMAGENET_STD
from cspnet.recipe.load import load_recipe
from cspnet.runtime.device import DTYPES, setup_device
from cspnet.runtime.options import ACTIVATION_BUDGETS
from cspnet.train.setup import Run
from cspnet.train.start import start
from cspnet.train.step import MicroBatch, TrainStep

VARIANTS = ("cspnet", "timm", "cspnet-compiled", "timm-compiled")
CLASSES = 1000


def with_classes(run: Run, count: int) -> Run:
    """The run with that many classes; its images stay the same."""
    source = RepeatedSource(run.train_set, len(run.train_set))
    source.classes = [str(number) for number in range(count)]
    return replace(run, train_set=source)


def cspnet_step(
    run: Run, options, images: torch.Tensor, targets: torch.Tensor, compiled: bool
) -> Callable[[], None]:
    """The optimizer step of a run, on images [N, H, W, 3] and soft targets [N, K]."""
    state, recipe = start(run), run.recipe
    network = torch.compile(state.net, dynamic=False) if compiled else None
    step = TrainStep(run, state.net, options.micro_batch // recipe.group, network)
    step.distribute()
    group = recipe.group
    slices = [slice(part.start * group, part.stop * group) for part in step.micro_batches]

    def run_step() -> None:
        torch._functorch.config.activation_memory_budget = ACTIVATION_BUDGETS[options.recompute]
        torch.backends.cudnn.benchmark = options.autotune
        state.set_learning_rate(recipe)
        micro_batches = [
            MicroBatch(images[rows].permute(0, 3, 1, 2).float() / 255, targets[rows])
            for rows in slices
        ]
        state.note_loss(step.forward_backward(micro_batches, state.scaler))
        state.apply_update()

    return run_step


def timm_step(
    run: Run, options, images: torch.Tensor, targets: torch.Tensor, compiled: bool
) -> Callable[[], None]:
    """The step of timm's train.py (timm 1.0: train_one_epoch, PrefetchLoader)."""
    device, precision = images.device, run.hardware.precision
    net = timm.create_model("cspdarknet53", act_layer="mish", num_classes=targets.shape[1])
    net = net.to(device, memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(net, opt="momentum", lr=0.1, momentum=0.9, weight_decay=5e-4)
    scaler = NativeScaler(device=device.type) if precision.scales_loss else None
    network = torch.compile(net) if compiled else net
    mean, std = (
        torch.tensor([255 * x for x in values], device=device).view(1, 3, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )

    def run_step() -> None:
        torch._functorch.config.activation_memory_budget = 1.0
        torch.backends.cudnn.benchmark = True  # as in train.py
        pixels = images.permute(0, 3, 1, 2).float().sub_(mean).div_(std)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with precision.autocast(device):
            output = network(pixels)
            loss = torch.sum(-targets * torch.log_softmax(output, dim=-1), dim=-1).mean()
        if scaler is not None:
            scaler(loss, optimizer, parameters=net.parameters())
        else:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return run_step


def count_waits(step: Callable[[], None], steps: int = 3) -> float:
    """How often the host waits for the GPU per step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(steps):
            step()
        torch.cuda.set_sync_debug_mode("default")
    # set_sync_debug_mode itself warns, too.
    return sum("called a synchronizing" in str(warning.message) for warning in caught) / steps


def warm_up(build: Callable[[], Callable[[], None]], steps: int, device: torch.device):
    """Build a step and run it; return it with its warm-up time and, on a GPU, its peak memory."""
    synchronize = synchronizer(device)
    on_gpu = device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
    step = build()
    start_time = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    result: dict[str, Any] = {"warmup_seconds": time.perf_counter() - start_time, "windows": []}
    if on_gpu:
        result["peak_gb"] = (torch.cuda.max_memory_reserved() - before) / 1e9
    return step, result


def measure(run: Run, options, on_round: Callable[[dict], None]) -> dict[str, dict[str, Any]]:
    """Images per second and more, by variant. `on_round` receives the results so far."""
    device, batch, size = run.hardware.device, run.recipe.batch, run.recipe.data.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, size, size, 3), generator=generator, dtype=torch.uint8)
    targets = torch.rand(batch, CLASSES, generator=generator).softmax(1)
    images, targets = images.to(device), targets.to(device)
    synchronize = synchronizer(device)
    steps, results = {}, {}
    for name in options.variants:
        build = cspnet_step if name.startswith("cspnet") else timm_step
        compiled = name.endswith("compiled")
        steps[name], results[name] = warm_up(
            lambda build=build, compiled=compiled: build(run, options, images, targets, compiled),
            options.warmup,
            device,
        )

    def window(name: str) -> float:
        synchronize()
        start_time = time.perf_counter()
        for _ in range(options.steps):
            steps[name]()
        synchronize()
        return options.steps * batch / (time.perf_counter() - start_time)

    def after_round(windows: dict[str, list[float]]) -> None:
        for name, values in windows.items():
            results[name] |= {
                "windows": values,
                "images_per_second": Windows(values).median if values else None,
            }
        on_round(results)

    variants = {name: lambda name=name: window(name) for name in options.variants}
    interleave(variants, options.windows, after_round=after_round)
    if device.type == "cuda":
        for name in options.variants:
            results[name]["host_waits_per_step"] = count_waits(steps[name])
    return results


def print_results(results: dict[str, dict[str, Any]]) -> None:
    """Median, range and ratio to timm's median (or the first variant's), one line per variant."""
    reference = "timm" if "timm" in results else next(iter(results))
    reference_speed = results[reference]["images_per_second"]
    for name, result in results.items():
        windows, notes = Windows(result["windows"]), ""
        if "peak_gb" in result:
            waits = result["host_waits_per_step"]
            notes = f"  {result['peak_gb']:.2f} GB reserved, {waits:g} host waits per step"
        print(
            f"{name:15} {windows.median:9.2f} images/s ({windows.spread()})  "
            f"{windows.median / reference_speed:5.2f} of {reference}{notes}"
        )


def main() -> None:
    parser = argument_parser(__doc__, precision=tuple(DTYPES))
    parser.add_argument("--size", type=int, help="128 on a CPU, else 256")
    parser.add_argument("--batch", type=int, help="32 on a CPU, else 128")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, help="images; the batch by default")
    parser.add_argument("--recompute", default="none", choices=tuple(ACTIVATION_BUDGETS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS[:2]), choices=VARIANTS)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--steps", type=int, help="per window: 3 on a CPU, else 50")
    parser.add_argument("--warmup", type=int, help="steps: 2 on a CPU, else 20")
    parser.add_argument("--cap-gb", type=float, help="limit of reserved memory, in GB (10^9 bytes)")
    parser.add_argument(
        "--autotune", action="store_true", help="enable cuDNN's autotuning for cspnet, as in timm"
    )
    options = parser.parse_args()
    device = setup_device(options.device)
    on_cpu = device.type == "cpu"
    if options.cap_gb and not on_cpu:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap_gb * 1e9 / total, device)
    use_defaults(options, on_cpu, size=(128, 256), batch=(32, 128), steps=(3, 50), warmup=(2, 20))
    options.micro_batch = options.micro_batch or options.batch
    precision = "bf16" if on_cpu and options.precision == "auto" else options.precision
    recipe = load_recipe(
        None,
        [
            *(f"batch={options.batch}", f"group={options.group}", f"precision={precision}"),
            *("data.root=digits", "data.normalize=imagenet", f"data.image_size={options.size}"),
        ],
    )
    with temporary_run(recipe, device=options.device, workers=0) as run:
        precision = run.hardware.precision.name
        record = new_record(options) | {"precision": precision}
        print(
            f"{record['machine']}, torch {torch.__version__}, timm {timm.__version__}, "
            f"{precision}, {options.size}×{options.size}, batch {options.batch} in micro-batches "
            f"of {options.micro_batch}, {torch.get_num_threads()} threads",
            flush=True,
        )

        def keep(results: dict) -> None:
            write_record(options.json, {**record, "results": results})

        results = measure(with_classes(run, CLASSES), options, keep)
        keep(results)
    print_results(results)


if __name__ == "__main__":
    main()
