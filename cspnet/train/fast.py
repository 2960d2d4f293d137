"""What a device allows: compiled kernels that were tested first, and as few passes as fit.

Both happen before the first step, with real images, and leave the state as it was.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console
from torch import nn

from cspnet.errors import OutOfMemory
from cspnet.train.job import Job, passes_of
from cspnet.train.runtime import BUDGETS, Precision
from cspnet.train.state import TrainState

# How far the compiled gradient of a fresh net may be from the eager one in float32, as a share of
# its norm: another number of threads alone makes 4e-3 (benchmarks/parity.py).
TOLERANCE = 0.02
# In 16 bits both are roundings of float32's gradient: how many times further away from it than the
# eager one the compiled one may be.
WORSE = 2.0

# Loss of a pass, already scaled and divided, its backward pass done: (job, net) -> loss
Trial = Callable[[Job, nn.Module], torch.Tensor]


def compile_tested(job: Job, state: TrainState, trial: Trial) -> tuple[Job, nn.Module]:
    """The job and the net with compiled kernels; as they were, and loudly, where these are wrong.

    One group goes through both: loss and gradients must agree, in 16 bits as well as the eager ones
    agree with float32's. On a machine without a compiler, or with a faulty one, training goes on in
    eager mode.
    """
    alone = replace(job, passes=passes_of(job.groups, 1))
    kept = {name: tensor.clone() for name, tensor in state.net.state_dict().items()}
    torch._functorch.config.activation_memory_budget = BUDGETS[job.place.memory]

    def gradient(job: Job, net: nn.Module) -> tuple[float, list[torch.Tensor]]:
        loss = float(trial(job, net))
        gradients = [weight.grad for weight in state.net.parameters() if weight.requires_grad]
        state.optimizer.zero_grad(set_to_none=True)
        state.net.load_state_dict(kept)
        return loss, gradients

    # A graph for each size, number of groups and mode: more than torch expects of one function.
    torch._dynamo.config.recompile_limit = 64
    try:
        fast = replace(alone, augment=torch.compile(job.augment, dynamic=False))
        net = torch.compile(state.net, dynamic=False)
        loss, expected = gradient(alone, state.net)
        allowed = TOLERANCE
        if job.precision.name != "fp32":
            rounded, exact = expected, replace(alone, precision=Precision("fp32", "to compare"))
            _, expected = gradient(exact, state.net)
            allowed = WORSE * _distance(rounded, expected)
        compiled_loss, compiled = gradient(fast, net)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing compiler, an unsupported card: each has its own
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        return job, _eager(job.console, state, f"torch.compile failed ({first[:200]})")
    distance = _distance(compiled, expected)
    if not (distance <= allowed and abs(compiled_loss - loss) <= TOLERANCE * abs(loss)):
        reason = (
            f"the compiled net is not the eager one: loss {compiled_loss:.6g} for {loss:.6g}, "
            f"gradient off by {distance:.1e} of its norm, {allowed:.1e} is allowed"
        )
        return job, _eager(job.console, state, reason)
    job.console.print(
        f"compiled, tested: gradient off by {distance:.1e} of its norm, {allowed:.1e} is allowed; "
        f"--memory {job.place.memory}"
    )
    return replace(job, augment=fast.augment), net


def _eager(console: Console, state: TrainState, reason: str) -> nn.Module:
    console.print(
        f"NOT COMPILED: {reason}. Training goes on in eager mode, slower and with more memory; "
        "--no-compile says so from the start",
        style="bold red",
    )
    return state.net


def _distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Norm of the difference of two lists of tensors, as a share of the norm of the second."""
    squares = [((x - y).double().square().sum(), y.double().square().sum()) for x, y in zip(a, b)]  # noqa: B905
    difference, norm = (float(torch.stack(part).sum()) for part in zip(*squares, strict=True))
    return (difference / norm) ** 0.5 if norm > 0 else float("nan")


def fit_passes(job: Job, net: nn.Module, state: TrainState, trial: Trial) -> Job:
    """The job with the fewest passes that the device has memory for, said on the console.

    The trial runs twice, since the first step allocates what the second finds in its way. Raises
    OutOfMemory where a single group does not fit.
    """
    recipe, groups = job.recipe, len(job.groups)
    # So many groups at once that a step has 1, 2, 3 … passes: of 4 groups 4, 2 or 1.
    for at_once in sorted({-(-groups // passes) for passes in range(1, groups + 1)}, reverse=True):
        tried = replace(job, passes=passes_of(job.groups, at_once))
        kept = copy.deepcopy(state.net.state_dict())
        try:
            for _ in range(2):
                trial(tried, net)
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        state.optimizer.zero_grad(set_to_none=True)
        state.net.load_state_dict(kept)
        del kept
        peak = _release(job)
        if fits:
            passes = len(tried.passes)
            job.console.print(
                f"{at_once} groups of {recipe.group} images at once, {passes} passes per step"
                + f", {peak / 1e9:.1f} GB" * bool(peak)
            )
            return tried
    raise OutOfMemory(
        f"a single group of {recipe.group} images of {recipe.data.size}×{recipe.data.size} does "
        f"not fit into the memory of {job.device}: free it of other processes, try --memory tiny, "
        f"or change the recipe: data.size={max(32, recipe.data.size - 32)}, for one"
    )


def _release(job: Job) -> int:
    """Gives unused memory back to the device; the most that was reserved until then, bytes."""
    if job.device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_reserved(job.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(job.device)
    return peak
