"""Images/s of a training step: ours against timm's, eager and compiled, interleaved in one run.

    python benchmarks/step.py [--variants ours timm ours-compiled timm-compiled] [--json FILE]

On a GPU at the recipe's size, on a CPU at a small one. Both train cspdarknet53 with Mish on random
uint8 images that lie on the device: normalisation, forward, soft-target cross-entropy, backward,
SGD with momentum, channels-last, the same precision and loss scaling, the same batch. Ours is the
recipe's step (groups, no wait of the host); timm's is that of its train.py (one BatchNorm over the
batch, GradScaler, `loss.item()` at each step). Windows of the variants follow each other in turns;
the median of the windows is what counts.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from common import about, write
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler

from cspnet.data.augment import IMAGENET_MEAN, IMAGENET_STD, normalize
from cspnet.recipe import load as recipes
from cspnet.recipe.schedule import learning_rate
from cspnet.runtime.device import Precision, choose_precision, setup_device
from cspnet.runtime.options import ACTIVATION_BUDGETS
from cspnet.train.optim import apply_update as update
from cspnet.train.optim import build_optimizer
from cspnet.weights.load import build_net

VARIANTS = ("ours", "timm", "ours-compiled", "timm-compiled")


def ours(options, images, targets, precision: Precision, compiled: bool) -> Callable[[], None]:
    """One step of ours."""
    recipe = options.recipe
    net = build_net(recipe, targets.shape[1]).to(images.device)
    optimizer = build_optimizer(net, recipe.optim)
    scaler = torch.amp.GradScaler(images.device.type, enabled=precision.scales_loss)
    loss_sum = torch.zeros((), device=images.device)
    run = torch.compile(net, dynamic=False) if compiled else net
    part = recipe.group * options.passes
    updates: torch.Tensor | int = 0
    if scaler.is_enabled():
        updates = torch.zeros((), dtype=torch.float64, device=images.device)

    def step() -> None:
        nonlocal updates
        torch._functorch.config.activation_memory_budget = ACTIVATION_BUDGETS[options.recompute]
        torch.backends.cudnn.benchmark = options.autotune
        rate = learning_rate(updates + 1, recipe)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        for first in range(0, recipe.batch, part):
            pixels = images[first : first + part].permute(0, 3, 1, 2).float() / 255
            with precision.autocast(images.device):
                logits = run(normalize(pixels, recipe.data))
            loss = torch.nn.functional.cross_entropy(
                logits.float(), targets[first : first + part], reduction="sum"
            )
            loss = loss / recipe.batch
            scaler.scale(loss).backward()
            loss_sum.add_(loss.detach())
        applied = update(optimizer, scaler)
        updates += 1 if applied is None else applied

    return step


def timms(options, images, targets, precision: Precision, compiled: bool) -> Callable[[], None]:
    """One step as timm's train.py makes it (timm 1.0: train_one_epoch, PrefetchLoader)."""
    net = timm.create_model("cspdarknet53", act_layer="mish", num_classes=targets.shape[1])
    net = net.to(images.device, memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(net, opt="momentum", lr=0.1, momentum=0.9, weight_decay=5e-4)
    scaler = NativeScaler(device=images.device.type) if precision.scales_loss else None
    run = torch.compile(net) if compiled else net
    mean, std = (
        torch.tensor([255 * x for x in part], device=images.device).view(1, 3, 1, 1)
        for part in (IMAGENET_MEAN, IMAGENET_STD)
    )

    def step() -> None:
        torch._functorch.config.activation_memory_budget = 1.0
        torch.backends.cudnn.benchmark = True  # train.py's setting
        pixels = images.permute(0, 3, 1, 2).float().sub_(mean).div_(std)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with precision.autocast(images.device):
            output = run(pixels)
            loss = torch.sum(-targets * torch.log_softmax(output, dim=-1), dim=-1).mean()
        if scaler is not None:
            scaler(loss, optimizer, parameters=net.parameters())
        else:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def count_waits(step: Callable[[], None], steps: int = 3) -> float:
    """How often the host waits for the device in a step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(steps):
            step()
        torch.cuda.set_sync_debug_mode("default")
    # Switching the mode on warns too, that it does not see all.
    return sum("called a synchronizing" in str(warning.message) for warning in caught) / steps


def measure(
    options, device: torch.device, precision: Precision, keep: Callable[[dict], None]
) -> dict:
    """Warm-up and windows by variant, of which `keep` gets what there is after each round."""
    generator = torch.Generator().manual_seed(0)
    size, batch = options.size, options.recipe.batch
    images = torch.randint(0, 256, (batch, size, size, 3), generator=generator, dtype=torch.uint8)
    targets = torch.rand(batch, 1000, generator=generator).softmax(1)
    images, targets = images.to(device), targets.to(device)
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    results, steps = {}, {}
    for name in options.variants:
        make = ours if name.startswith("ours") else timms
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_reserved()
        steps[name] = make(options, images, targets, precision, name.endswith("compiled"))
        start = time.perf_counter()
        for _ in range(options.warmup):
            steps[name]()
        synchronise()
        results[name] = {"warmup_seconds": time.perf_counter() - start, "windows": []}
        if device.type == "cuda":
            results[name]["peak_gb"] = (torch.cuda.max_memory_reserved() - before) / 1e9
    for _ in range(options.windows):
        for name in options.variants:
            synchronise()
            start = time.perf_counter()
            for _ in range(options.steps):
                steps[name]()
            synchronise()
            speed = options.steps * batch / (time.perf_counter() - start)
            results[name]["windows"].append(speed)
        keep(results)
    if device.type == "cuda":
        for name in options.variants:
            results[name]["host_waits_per_step"] = count_waits(steps[name])
    for result in results.values():
        result["images_per_second"] = statistics.median(result["windows"])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp16", "bf16", "fp32"))
    parser.add_argument("--size", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--passes", type=int, help="groups at once; all of them if not given")
    parser.add_argument("--recompute", default="none", choices=tuple(ACTIVATION_BUDGETS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS[:2]), choices=VARIANTS)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--steps", type=int, help="a window")
    parser.add_argument("--warmup", type=int)
    parser.add_argument("--cap-gb", type=float, help="memory that torch may reserve, 10^9 bytes")
    parser.add_argument("--autotune", action="store_true", help="cuDNN's, for ours, as timm has it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = setup_device(options.device)
    small = device.type == "cpu"
    if options.cap_gb and not small:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap_gb * 1e9 / total, device)
    defaults = {"size": (128, 256), "batch": (32, 128), "steps": (3, 50), "warmup": (2, 20)}
    for name, (on_cpu, on_gpu) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, on_cpu if small else on_gpu)
    asked = "bf16" if small and options.precision == "auto" else options.precision
    precision = choose_precision(asked, device)
    given = (f"batch={options.batch}", f"group={options.group}", f"data.image_size={options.size}")
    options.recipe = recipes.load_recipe(None, [*given, "data.normalize=imagenet"])
    options.passes = options.passes or options.recipe.groups
    record = about(options) | {"precision": precision.name, "groups at once": options.passes}

    def keep(results: dict) -> None:
        write(options.json, {**record, "results": results})

    results = measure(options, device, precision, keep)
    keep(results)
    print(
        f"{record['machine']}, torch {torch.__version__}, timm {timm.__version__}, "
        f"{precision.name}, {options.size}x{options.size}, batch {options.batch} in passes of "
        f"{options.passes * options.group}, {torch.get_num_threads()} threads"
    )
    reference = results.get("timm", next(iter(results.values())))["images_per_second"]
    for name, result in results.items():
        low, high = min(result["windows"]), max(result["windows"])
        peak = ""
        if not small:
            waits = result["host_waits_per_step"]
            peak = f"  {result['peak_gb']:.2f} GB reserved, {waits:g} waits per step"
        print(
            f"{name:14} {result['images_per_second']:9.2f} images/s ({low:.2f} to {high:.2f})  "
            f"{result['images_per_second'] / reference:5.2f} of timm's{peak}"
        )


if __name__ == "__main__":
    main()
