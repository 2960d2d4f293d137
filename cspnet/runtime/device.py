"""The device of a run with its precision, and the number of dataloader workers."""

import re
from dataclasses import dataclass

import torch

from cspnet.errors import RecipeError
from cspnet.runtime.cpu import available_cores
from cspnet.runtime.distributed import SINGLE_PROCESS, Processes

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Turing cards without tensor cores (chips TU116 and TU117), although their compute capability is
# 7.5: GTX 16, MX450, MX550, the small T and Quadro T cards, CMP 30HX. The T4 has tensor cores.
NO_TENSOR_CORES = re.compile(
    r"\b(GTX 16\d\d|MX[45]50|T(400|500|550|600|1000|1200|2000)|CMP 30HX)(?![0-9])", re.IGNORECASE
)


def setup_device(name: str, processes: Processes = SINGLE_PROCESS) -> torch.device:
    """Set up the device `auto`, `cpu`, `cuda` or `cuda:N`; each of several processes gets one GPU.

    A GPU becomes torch's current device, since operations without a device would allocate memory on
    the first GPU. Its float32 convolutions do not use TF32, which cuDNN would by default. Raises
    RecipeError if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()) or name.endswith(":"):
        raise RecipeError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if processes.size > 1:
            if number:
                raise RecipeError(
                    f"--device {name} is one device for {processes.size} processes: "
                    "use --device cuda"
                )
            if processes.local_size > count:
                raise RecipeError(
                    f"{processes.local_size} processes on this machine, but torch finds {count} "
                    f"CUDA devices: start one for each, torchrun --nproc-per-node={count}"
                )
            number = str(processes.local_rank)
        if int(number or 0) >= count:
            raise RecipeError(
                f"--device {name}: torch finds {count} CUDA devices on this machine. "
                "Check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu."
            )
        device = torch.device("cuda", int(number or 0))
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
        return device
    return torch.device("cpu")


def choose_workers(
    requested: int | None, device: torch.device, processes: Processes = SINGLE_PROCESS
) -> int:
    """Number of dataloader workers: as requested; else one per core with a GPU, none on a CPU.

    The processes of a machine share its cores. On a CPU, OpenMP threads spin while they wait for
    each other, so that an additional busy process costs more than decoding in the training process.
    """
    if requested is not None:
        if requested < 0:
            raise RecipeError(
                f"--workers {requested}: must be 0 (decode in the training process) or more"
            )
        return requested
    own_cores = available_cores() // processes.local_size
    return min(16, max(1, own_cores)) if device.type == "cuda" else 0


@dataclass(frozen=True)
class Precision:
    """Number format of activations. Weights and optimizer state are always float32."""

    name: str
    reason: str

    @property
    def scales_loss(self) -> bool:
        return self.name == "fp16"

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context manager for a forward pass; disabled in fp32."""
        return torch.autocast(device.type, DTYPES[self.name], enabled=self.name != "fp32")


@dataclass(frozen=True)
class Hardware:
    """What a process computes with."""

    device: torch.device
    precision: Precision
    workers: int  # dataloader workers


def choose_precision(requested: str, device: torch.device) -> Precision:
    """The precision that a recipe requests, or for `auto` the best of the device, with the reason.

    Decided by compute capability, not by torch.cuda.is_bf16_supported(), which is true on Turing,
    where bf16 is emulated. Turing cards without tensor cores are recognized by name; fp16 yields
    NaN on them in cuDNN's convolutions (pytorch#58123, pytorch#77955), so `auto` is fp32 there.
    Raises RecipeError if the device does not support the precision.
    """
    if device.type == "cpu":
        if requested == "fp16":
            raise RecipeError(
                "precision is fp16, but the device is a CPU: use precision=fp32 or bf16"
            )
        if requested == "auto":
            return Precision("fp32", "the device is a CPU")
        if requested == "bf16" and torch.backends.cpu.get_cpu_capability() == "AVX2":
            # Convolutions fall back to plain loops (docs/results.md).
            return Precision(requested, "requested; fp32 is ten times as fast on a CPU with AVX2")
        return Precision(requested, "requested by the recipe")
    major, minor = torch.cuda.get_device_capability(device)
    named = f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}"
    unsafe = _lacks_tensor_cores(device)
    if requested == "auto":
        if major >= 8:
            return Precision("bf16", f"{named}: native bf16, no loss scaling needed")
        if unsafe:
            return Precision("fp32", f"{named}, but no tensor cores: fp16 is known to give NaN")
        if major == 7:
            return Precision("fp16", f"{named}: fp16 tensor cores, no native bf16; loss scaling on")
        return Precision("fp32", f"{named}: no tensor cores")
    if requested == "bf16" and major < 8:
        other = "fp16" if major == 7 and not unsafe else "fp32"
        raise RecipeError(f"precision is bf16, but {named}: bf16 needs 8.0. Use precision={other}.")
    if requested == "fp16" and unsafe:
        return Precision(
            requested,
            f"requested by the recipe. WARNING: {named}, but no tensor cores, and fp16 is known to "
            "give NaN there: precision=fp32 is safe",
        )
    return Precision(requested, "requested by the recipe")


def _lacks_tensor_cores(device: torch.device) -> bool:
    """Whether the GPU is a Turing card without tensor cores."""
    if torch.cuda.get_device_capability(device) != (7, 5):
        return False
    return NO_TENSOR_CORES.search(torch.cuda.get_device_name(device)) is not None


def inference_precision(trained_in: str, device: torch.device) -> Precision:
    """The precision for inference: that of the recipe, or `auto` if the device does not support it.

    `auto` also replaces fp16 on a Turing card without tensor cores, where it would yield NaN.
    """
    try:
        if trained_in != "fp16" or device.type == "cpu" or not _lacks_tensor_cores(device):
            return choose_precision(trained_in, device)
    except RecipeError:
        pass
    automatic = choose_precision("auto", device)
    return Precision(automatic.name, f"{automatic.reason}; trained in {trained_in}")
