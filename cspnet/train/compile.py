"""What a device allows: compiled kernels that were tested first, and as few passes as fit.

Both happen before the first step, with real images, and leave the state as it was.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from cspnet.errors import CspnetError, OutOfMemoryError
from cspnet.runtime.device import ACTIVATION_BUDGETS, Precision
from cspnet.train.diagnose import explain_out_of_memory, is_out_of_memory
from cspnet.train.setup import Run, passes_of, sizes_of_passes
from cspnet.train.state import TrainState

# How far the compiled gradient of a fresh net may be from the eager one in float32, as a share of
# its norm: another number of threads alone makes 4e-3 (benchmarks/parity.py).
TOLERANCE = 0.02
# In 16 bits both are roundings of float32's gradient: how many times further away from it than the
# eager one the compiled one may be.
WORSE = 2.0

# Loss of the job's first pass, its backward pass done, with gradients scaled as in the run or by a
# number: (job, net, scale) -> loss
OnePass = Callable[[Run, nn.Module, float | None], torch.Tensor]
# What takes the most memory: (job, net) -> loss
Fullest = Callable[[Run, nn.Module], torch.Tensor]


def accelerate(
    job: Run, state: TrainState, one_pass: OnePass, fullest: Fullest
) -> tuple[Run, nn.Module]:
    """The job in passes that fit, and the net, with compiled kernels where they are asked for.

    In eager mode, and loudly, where there is no compiler, or what it makes is wrong: a pass as the
    run has it must agree with the eager net's. Raises OutOfMemory.
    """
    if job.compile:
        torch._functorch.config.activation_memory_budget = ACTIVATION_BUDGETS[job.place.memory]
        # A graph for each size, number of groups and mode: more than torch expects of one function.
        torch._dynamo.config.recompile_limit = 64
        kept = _copy(state.net)
        try:
            fast = replace(job, augment=torch.compile(job.augment, dynamic=False))
            net = torch.compile(state.net, dynamic=False)
            if job.fit:
                fast = fit_passes(fast, net, state, fullest)
            with explain_out_of_memory(len(fast.passes[0]), state):
                reason = _fault(job, fast, net, state, one_pass)
        except OutOfMemoryError:
            raise
        except Exception as error:  # a missing compiler, an unsupported card: each has its own
            first = str(error).strip().partition("\n")[0] or type(error).__name__
            reason = f"torch.compile failed ({first[:200]})"
            _undo(state, kept)
        _release(job)  # what the test took beyond the run's own is no peak of the run
        reason = job.world.agree(reason)  # one process in eager mode would hold up all
        if reason is None:
            return fast, net
        job.console.print(
            f"NOT COMPILED: {reason}. Training goes on in eager mode, slower and with more memory; "
            "--no-compile says so from the start",
            style="bold red",
        )
        job = replace(job, compile=False)
    return (fit_passes(job, state.net, state, fullest) if job.fit else job), state.net


@contextlib.contextmanager
def compiling_told(state: TrainState) -> Iterator[None]:
    """Turns a failure to compile amid the run, at another size for one, into one message."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CspnetError(
            f"torch.compile failed in step {state.step + 1:,} ({first[:200]}): the same command "
            "with --resume --no-compile goes on in eager mode from the last checkpoint"
        ) from None


class Outcome(NamedTuple):
    """What a pass leaves, in the memory of the host."""

    loss: float
    gradients: list[torch.Tensor]
    statistics: list[torch.Tensor]  # by how much BatchNorm's running ones have moved


def _fault(job: Run, fast: Run, net: nn.Module, state: TrainState, one_pass: OnePass) -> str | None:
    """Why the compiled net of `fast` is not to be trusted; None where it agrees with the eager one.

    The last step's passes, one of each length, go through it, and group by group through the eager
    net: loss, gradients and running statistics must agree, in 16 bits as well as the eager ones
    agree with float32's.
    """
    passes = list({len(part): part for part in fast.passes}.values())
    kept = _copy(state.net)

    def outcome(job: Run, net: nn.Module, passes: list[range], scale: float) -> Outcome:
        loss = sum(float(one_pass(replace(job, passes=[part]), net, scale)) for part in passes)
        gradients = [weight.grad.cpu() for weight in state.net.parameters() if weight.requires_grad]
        moved = [
            tensor.cpu() - kept[name]
            for name, tensor in state.net.state_dict().items()
            if "running_" in name
        ]
        _undo(state, kept)
        return Outcome(loss, gradients, moved)

    def eager(job: Run, scale: float) -> Outcome:
        alone = [group for part in passes for group in passes_of(part, 1)]
        try:
            return outcome(job, state.net, alone, scale)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # It needs more memory than the run, in float32 above all: what is kept for the backward
        # pass waits outside, a few seconds for a group.
        _undo(state, kept)
        _release(job)
        to_host = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: tensor.detach().cpu(), lambda tensor: tensor.to(job.device)
        )
        with to_host:
            return outcome(job, state.net, alone, scale)

    scale = state.scaler.get_scale()  # 1 where the loss is not scaled
    while True:
        rounded, compiled = eager(job, scale), outcome(fast, net, passes, scale)
        finite = all(bool(g.isfinite().all()) for g in rounded.gradients + compiled.gradients)
        if finite or scale <= 1:
            break
        scale /= 16  # as the run itself will find out, in steps that are left out
    exact = rounded
    if job.precision.name != "fp32":
        exact = eager(replace(job, precision=Precision("fp32", "to compare")), scale)
    reason, (apart, allowed) = _disagreement(compiled, rounded, exact)
    if reason is None:
        job.console.print(
            f"compiled, tested: gradient off by {apart:.1e} of its norm, {allowed:.1e} is allowed; "
            f"--memory {job.place.memory}"
        )
    return reason


def _disagreement(
    compiled: Outcome, rounded: Outcome, exact: Outcome
) -> tuple[str | None, tuple[float, float]]:
    """What sets the compiled outcome apart from the eager ones, rounded as the run's and exact.

    None where nothing does; beside it how far off the gradient is, and may be.
    """
    told = {}
    for what, distance in (("gradients", _distance), ("statistics", _largest_distance)):
        ours, theirs, expected = (getattr(one, what) for one in (compiled, rounded, exact))
        apart, allowed = distance(ours, expected), TOLERANCE
        if exact is not rounded:
            allowed = max(allowed, WORSE * distance(theirs, expected))
        told[what] = apart, allowed
    near = abs(compiled.loss - rounded.loss) <= TOLERANCE * abs(rounded.loss)
    if near and all(apart <= allowed < math.inf for apart, allowed in told.values()):
        return None, told["gradients"]
    reason = (
        f"the compiled net is not the eager one: loss {compiled.loss:.6g} for {rounded.loss:.6g}, "
        + ", ".join(f"{what} off by {apart:.1e} ({of:.1e})" for what, (apart, of) in told.items())
        + " of their norm (allowed)"
    )
    return reason, told["gradients"]


def _copy(net: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and statistics, in the memory of the host."""
    return {name: tensor.cpu().clone() for name, tensor in net.state_dict().items()}


def _undo(state: TrainState, kept: dict[str, torch.Tensor]) -> None:
    """The state as it was before a trial."""
    state.optimizer.zero_grad(set_to_none=True)
    state.net.load_state_dict(kept)
    state.net.train()


def _distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Norm of the difference of two lists of tensors, as a share of the norm of the second."""
    squares = [((x - y).double().square().sum(), y.double().square().sum()) for x, y in zip(a, b)]  # noqa: B905
    difference, norm = (float(torch.stack(part).sum()) for part in zip(*squares, strict=True))
    distance = (difference / norm) ** 0.5 if norm > 0 else math.inf
    return math.inf if math.isnan(distance) else distance


def _largest_distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The largest distance of a pair; of two that are 0, such as a frozen layer's moves, none."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x.any() or y.any()]
    return max((_distance([x], [y]) for x, y in pairs), default=0.0)


def fit_passes(job: Run, net: nn.Module, state: TrainState, trial: Fullest) -> Run:
    """The job with the fewest passes that the device has memory for, said on the console.

    The trial runs twice, since the first step allocates what the second finds in its way. Raises
    OutOfMemory where a single group does not fit.
    """
    recipe = job.recipe
    for at_once in sizes_of_passes(len(job.groups)):
        tried = replace(job, passes=passes_of(job.groups, at_once))
        kept = _copy(state.net)
        try:
            for _ in range(2):
                trial(tried, net)
            failure = None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failure = str(error)  # not the error itself, which holds on to tensors
        _undo(state, kept)
        peak = _release(job)
        if failure is None:
            passes = len(tried.passes)
            job.console.print(
                f"{at_once} groups of {recipe.group} images at once, {passes} passes per step"
                + f", {peak / 1e9:.1f} GB" * bool(peak)
            )
            return tried
    raise OutOfMemoryError(
        f"a single group of {recipe.group} images of "
        f"{recipe.data.image_size}×{recipe.data.image_size} does "
        f"not fit into the memory of {job.device}: free it of other processes, try --memory tiny, "
        f"or change the recipe: data.image_size={max(32, recipe.data.image_size - 32)}, for one "
        f"({failure.strip().partition(chr(10))[0][:160]})"
    )


def _release(job: Run) -> int:
    """Gives unused memory back to the device; the most that was reserved until then, bytes."""
    if job.device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_reserved(job.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(job.device)
    return peak
