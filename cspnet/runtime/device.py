"""Where a run happens: device, precision and its reason, workers, the wish to stop.

None of this is in the recipe and, precision apart, none of it changes the numbers.
"""

import contextlib
import math
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cspnet.errors import RecipeError
from cspnet.runtime.cpu import available_cores
from cspnet.runtime.distributed import SINGLE_PROCESS, Processes

# Share of the activations that a compiled net may keep for the backward pass; the rest is computed
# again, but for `tiny` no convolution is (benchmarks/memory.py).
ACTIVATION_BUDGETS = {"fast": 1.0, "fit": 0.6, "tiny": 0.3}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Turing cards without tensor cores (chips TU116 and TU117), whose compute capability is 7.5 all the
# same: GTX 16, MX450, MX550, the small T and Quadro T cards, CMP 30HX. The T4 has tensor cores.
NO_TENSOR_CORES = re.compile(
    r"\b(GTX 16\d\d|MX[45]50|T(400|500|550|600|1000|1200|2000)|CMP 30HX)(?![0-9])", re.IGNORECASE
)


@dataclass(frozen=True)
class RunOptions:
    """What the command line says: where to run, not what."""

    output: Path
    resume: bool = False
    device: str = "auto"
    workers: int | None = None
    # Groups through the net at once; "auto": as many as fit; None: auto on a GPU, else one.
    passes: int | Literal["auto"] | None = None
    compile: bool | None = None  # None: on a GPU
    memory: str = "fast"  # a key of BUDGETS, for a compiled net
    max_hours: float | None = None
    force: bool = False  # resume with other settings
    recipe_file: Path | None = None  # that the recipe was read from
    stop_when_full: bool = False  # a full disk ends the run, and does not only pause its saving


def setup_device(name: str, world: Processes = SINGLE_PROCESS) -> torch.device:
    """The device of `auto`, `cpu`, `cuda` or `cuda:N`; of several processes each has its own GPU.

    A GPU becomes torch's current one: whatever names none would take a share of the first GPU's
    memory. Its float32 is float32, in no convolution TF32, which torch lets cuDNN use. Raises
    RecipeError where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()) or name.endswith(":"):
        raise RecipeError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if world.size > 1:
            if number:
                raise RecipeError(
                    f"--device {name} is one device for {world.size} processes: use --device cuda"
                )
            if world.local_size > count:
                raise RecipeError(
                    f"{world.local_size} processes on this machine, which shows {count} CUDA "
                    f"devices to torch: start one for each, torchrun --nproc-per-node={count}"
                )
            number = world.local_rank
        if int(number or 0) >= count:
            raise RecipeError(
                f"--device {name}: this machine shows {count} CUDA devices to torch. "
                "Check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu."
            )
        device = torch.device("cuda", int(number or 0))
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
        return device
    return torch.device("cpu")


def choose_workers(
    asked: int | None, device: torch.device, world: Processes = SINGLE_PROCESS
) -> int:
    """Processes that decode images: one a core beside a GPU, none where the CPU runs the net.

    The processes of a machine share its cores, unless a number is asked for.

    There OpenMP threads wait for each other in spinning loops: a further busy process costs more
    than decoding in between does.
    """
    if asked is not None:
        if asked < 0:
            raise RecipeError(f"--workers {asked}: must be 0 (none, decode in the loop) or more")
        return asked
    share = available_cores() // world.local_size
    return min(16, max(1, share)) if device.type == "cuda" else 0


@dataclass(frozen=True)
class Precision:
    """Number format of activations; weights and the optimizer's state are always float32."""

    name: str
    reason: str

    @property
    def scales_loss(self) -> bool:
        return self.name == "fp16"

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context of a forward pass; does nothing in fp32."""
        return torch.autocast(device.type, DTYPES[self.name], enabled=self.name != "fp32")


def choose_precision(asked: str, device: torch.device) -> Precision:
    """The precision of a recipe on a device, with its reason.

    By compute capability and not by torch.cuda.is_bf16_supported(), which says yes on Turing, where
    bf16 is emulated. Turing cards without tensor cores are known by their names only: fp16 gives
    NaN on them in cuDNN's convolutions (pytorch#58123, pytorch#77955), so `auto` is fp32 there.
    """
    if device.type == "cpu":
        if asked == "fp16":
            raise RecipeError("precision is fp16, the device a CPU: use precision=fp32 or bf16")
        if asked == "auto":
            return Precision("fp32", "the device is a CPU")
        if asked == "bf16" and torch.backends.cpu.get_cpu_capability() == "AVX2":
            # Its convolutions fall back to plain loops (docs/results.md).
            return Precision(asked, "asked for; but fp32 is ten times as fast on a CPU with AVX2")
        return Precision(asked, "asked for by the recipe")
    major, minor = torch.cuda.get_device_capability(device)
    named = f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}"
    unsafe = _lacks_tensor_cores(device)
    if asked == "auto":
        if major >= 8:
            return Precision("bf16", f"{named}: native bf16, no loss scaling needed")
        if unsafe:
            return Precision("fp32", f"{named}, but no tensor cores: fp16 is known to give NaN")
        if major == 7:
            return Precision("fp16", f"{named}: fp16 tensor cores, no native bf16; loss scaling on")
        return Precision("fp32", f"{named}: no tensor cores")
    if asked == "bf16" and major < 8:
        other = "fp16" if major == 7 and not unsafe else "fp32"
        raise RecipeError(f"precision is bf16, but {named}: bf16 needs 8.0. Use precision={other}.")
    if asked == "fp16" and unsafe:
        return Precision(
            asked,
            f"asked for by the recipe. WARNING: {named}, but no tensor cores, and fp16 is known to "
            "give NaN there: precision=fp32 is safe",
        )
    return Precision(asked, "asked for by the recipe")


def _lacks_tensor_cores(device: torch.device) -> bool:
    """Whether a GPU is a Turing one without tensor cores."""
    if torch.cuda.get_device_capability(device) != (7, 5):
        return False
    return NO_TENSOR_CORES.search(torch.cuda.get_device_name(device)) is not None


def inference_precision(asked: str, device: torch.device) -> Precision:
    """For a trained net: the one of its recipe, or what `auto` is where the device lacks that.

    So too for fp16 on a Turing card without tensor cores: a score of NaN would tell nothing.
    """
    try:
        if asked != "fp16" or device.type == "cpu" or not _lacks_tensor_cores(device):
            return choose_precision(asked, device)
    except RecipeError:
        pass
    found = choose_precision("auto", device)
    return Precision(found.name, f"{found.reason}; trained in {asked}")


class StopRequest(contextlib.AbstractContextManager):
    """Turns signals and a time limit into a wish that the loop reads.

    SIGINT, SIGTERM, SIGHUP (the terminal was closed, or its connection was lost), and SIGUSR1, with
    which Slurm announces its own limit. A second SIGINT leaves at once. `hours` count from here.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, hours: float | None = None):
        self.signal: str | None = None  # the name of the first one received
        self._hours = hours
        self._before: list[dict] = []  # handlers, of each block around the present place
        self._end = math.inf if hours is None else time.monotonic() + 3600 * hours

    @property
    def requested(self) -> str | None:
        """Why the run is to stop: the name of a signal, or the limit; None as long as it is not."""
        if self.signal is None and time.monotonic() >= self._end:
            return f"--max-hours {self._hours:g}"
        return self.signal

    def request(self, reason: str) -> None:
        """Asks for a stop after the present step, for another reason than a signal."""
        self.signal = self.signal or reason

    def __enter__(self) -> "StopRequest":
        # What the parent had ignored (nohup, a shell's background job) stays ignored.
        heeded = [n for n in self.SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        self._before.append({number: signal.signal(number, self._ask) for number in heeded})
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.pop().items():
            signal.signal(number, handler)

    def _ask(self, number: int, _) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
