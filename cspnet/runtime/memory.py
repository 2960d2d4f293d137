"""Memory of the device and of the process."""

import os
import resource
import sys

import torch

# What cuDNN and cuBLAS report, as a plain RuntimeError, if the device has no memory for them.
MESSAGES = ("unable to find an engine to execute", "ALLOC_FAILED", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that the device is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in MESSAGES)
    )


def peak_memory_gb() -> float:
    """Peak memory so far, 10^9 bytes: reserved by torch on the device, or of this process."""
    if torch.cuda.is_initialized():  # there may be a GPU that the run does not use
        return torch.cuda.max_memory_reserved() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def available_memory_gb(device: torch.device) -> float:
    """Memory of the device, or of the machine for a CPU; 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
