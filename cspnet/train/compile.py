"""Preparing a step for the device: compile the network and test the result, size the micro-batch.

Both happen before the first step, with real images, and leave the state as it was.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from cspnet.errors import OutOfMemoryError
from cspnet.runtime.device import Precision
from cspnet.runtime.memory import is_out_of_memory
from cspnet.runtime.options import ACTIVATION_BUDGETS
from cspnet.train.diagnose import explain_errors, first_line
from cspnet.train.micro_batch import candidate_sizes, choose_groups_at_once, split_groups
from cspnet.train.setup import Run
from cspnet.train.state import TrainState
from cspnet.train.step import StepNotes, TrainStep

# Maximum distance between the compiled and the eager gradient of a new network in float32, relative
# to the norm. A different number of threads alone causes 4e-3 (benchmarks/parity.py).
TOLERANCE = 0.02
# In 16 bits both are rounded versions of the float32 gradient. The compiled one may be this many
# times as far from it as the eager one.
WORSE = 2.0


def prepare_step(run: Run, state: TrainState, step_class: type[TrainStep] = TrainStep) -> TrainStep:
    """The step as this run computes it: compiled if requested, with micro-batches that fit.

    If there is no compiler, or its result differs from eager mode, warn and use eager mode. Prints
    its decisions, which are in `notes`, too. Raises OutOfMemoryError.
    """
    # The first collective operation allocates device memory: before the memory probe.
    run.processes.all_reduce(torch.zeros(1, device=run.hardware.device))
    groups_at_once = choose_groups_at_once(
        run.options, run.recipe, len(run.groups), run.hardware.device.type == "cuda"
    )
    step = step_class(run, state.net, groups_at_once or 1)
    if state.step < run.recipe.schedule.steps:
        with state.inconsistent():  # trials change weights and statistics for a moment
            step = _try_out(run, state, step, probes=groups_at_once is None)
    step.distribute()
    return step


def _try_out(run: Run, state: TrainState, eager: TrainStep, probes: bool) -> TrainStep:
    """The step after its trials: compiled and tested, or eager; with the size that fits."""
    notes = StepNotes(run.recipe, eager.groups_at_once, len(run.groups))
    step = None
    if run.compiles:
        step, notes = _compile(run, state, eager, probes, notes)
    if step is None:
        step = eager
        if probes:
            step, peak = probe_micro_batch(run, state, eager)
            notes = replace(notes, groups_at_once=step.groups_at_once, peak=peak)
    for line in notes.lines():
        run.output.print(line, style="bold red" if line == notes.warning() else None)
    step.notes = notes
    return step


def _compile(
    run: Run, state: TrainState, eager: TrainStep, probes: bool, notes: StepNotes
) -> tuple[TrainStep | None, StepNotes]:
    """The compiled step, or None if it cannot be used in all processes; the notes say why."""
    torch._functorch.config.activation_memory_budget = ACTIVATION_BUDGETS[run.options.recompute]
    # A graph for each image size, number of groups and mode: more than the default limit.
    torch._dynamo.config.recompile_limit = 64
    weights = _copy_to_host(state.net)
    step, peak, comparison = eager, 0, None
    try:
        step = type(eager)(
            run,
            state.net,
            eager.groups_at_once,
            network=torch.compile(state.net, dynamic=False),
            augment=torch.compile(eager.augment, dynamic=False),
        )
        if probes:
            step, peak = probe_micro_batch(run, state, step)
        with explain_errors(run.recipe, state, step.groups_at_once, compiles=False):
            comparison = self_test(run, state, step, eager)
        failure = comparison.failure
    except OutOfMemoryError:
        raise
    except Exception as error:  # each missing compiler and unsupported card raises its own type
        failure = f"torch.compile failed ({first_line(error)[:200]})"
        _undo_trial(state, weights)
    _release_memory(run)  # the test's memory does not count for the peak of the run
    failure = run.processes.agree(failure)  # one eager process would slow down all
    if failure is not None:
        return None, replace(notes, compile_failure=failure)
    assert comparison is not None
    notes = replace(
        notes,
        groups_at_once=step.groups_at_once,
        peak=peak,
        gradient_error=comparison.gradient_error,
        recompute=run.options.recompute,
    )
    return step, notes


class Outcome(NamedTuple):
    """Results of forward and backward passes, in host memory."""

    loss: float
    gradients: list[torch.Tensor]
    statistics: list[torch.Tensor]  # change of each running statistic of BatchNorm


@dataclass(frozen=True)
class Comparison:
    """Compiled against eager."""

    failure: str | None  # None if they agree
    gradient_error: tuple[float, float]  # distance relative to the norm, and the tolerance


def self_test(run: Run, state: TrainState, step: TrainStep, eager: TrainStep) -> Comparison:
    """Compare a compiled step with the eager one on the groups of the last step.

    One micro-batch of each length goes through the compiled network, and group by group through the
    eager one. Loss, gradients and changes of the running statistics must agree; in 16 bits, they
    must be as close to float32 as the eager ones.
    """
    by_length = {len(group_range): group_range for group_range in step.micro_batches}
    group_ranges = list(by_length.values())
    singles = [group for group_range in group_ranges for group in split_groups(group_range, 1)]
    weights = _copy_to_host(state.net)

    def measure(step: TrainStep, group_ranges: list[range], scale: float) -> Outcome:
        loss = sum(float(step.trial(group_range, scale)) for group_range in group_ranges)
        gradients = [w.grad.cpu() for w in state.net.parameters() if w.grad is not None]
        changes = [
            tensor.cpu() - weights[name]
            for name, tensor in state.net.state_dict().items()
            if "running_" in name
        ]
        _undo_trial(state, weights)
        return Outcome(loss, gradients, changes)

    def measure_eager(step: TrainStep, scale: float) -> Outcome:
        try:
            return measure(step, singles, scale)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Eager mode, especially in float32, needs more memory than the run: keep the activations
        # in host memory, which takes a few seconds per group.
        _undo_trial(state, weights)
        _release_memory(run)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: tensor.detach().cpu(), lambda tensor: tensor.to(step.device)
        ):
            return measure(step, singles, scale)

    scale = state.scaler.get_scale()  # 1 without loss scaling
    while True:
        rounded, compiled = measure_eager(eager, scale), measure(step, group_ranges, scale)
        finite = all(bool(g.isfinite().all()) for g in rounded.gradients + compiled.gradients)
        if finite or scale <= 1:
            break
        scale /= 16  # the run itself gets there by skipping steps
    exact = rounded
    if eager.precision.name != "fp32":
        in_float32 = type(eager)(run, state.net, precision=Precision("fp32", "as a reference"))
        exact = measure_eager(in_float32, scale)
    return compare(compiled, rounded, exact)


def compare(compiled: Outcome, rounded: Outcome, exact: Outcome) -> Comparison:
    """Compare a compiled outcome with the eager one in the same precision and in float32.

    The latter two are the same object in float32.
    """
    errors: dict[str, tuple[float, float]] = {}
    for name, distance in (("gradients", _distance), ("statistics", _largest_distance)):
        ours, eager, reference = (getattr(one, name) for one in (compiled, rounded, exact))
        tolerance = TOLERANCE
        if exact is not rounded:
            tolerance = max(tolerance, WORSE * distance(eager, reference))
        errors[name] = distance(ours, reference), tolerance
    same_loss = abs(compiled.loss - rounded.loss) <= TOLERANCE * abs(rounded.loss)
    if same_loss and all(error <= allowed < math.inf for error, allowed in errors.values()):
        return Comparison(None, errors["gradients"])
    failure = (
        "the compiled network differs from eager mode: "
        f"loss {compiled.loss:.6g} instead of {rounded.loss:.6g}, "
        + ", ".join(
            f"{name} off by {error:.1e} of their norm (tolerance {allowed:.1e})"
            for name, (error, allowed) in errors.items()
        )
    )
    return Comparison(failure, errors["gradients"])


def _copy_to_host(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in net.state_dict().items()}


def _undo_trial(state: TrainState, weights: dict[str, torch.Tensor]) -> None:
    """Restore weights and statistics, and clear the gradients."""
    state.optimizer.zero_grad(set_to_none=True)
    state.net.load_state_dict(weights)
    state.net.train()


def _distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Norm of the difference of two lists of tensors, relative to the norm of the second."""
    pairs = list(zip(a, b, strict=True))
    difference = float(torch.stack([(x - y).double().square().sum() for x, y in pairs]).sum())
    norm = float(torch.stack([y.double().square().sum() for _, y in pairs]).sum())
    distance = (difference / norm) ** 0.5 if norm > 0 else math.inf
    return math.inf if math.isnan(distance) else distance


def _largest_distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Largest distance of a pair of tensors. Pairs of zeros, as of frozen layers, do not count."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x.any() or y.any()]
    return max((_distance([x], [y]) for x, y in pairs), default=0.0)


def probe_micro_batch(run: Run, state: TrainState, step: TrainStep) -> tuple[TrainStep, int]:
    """The step with the largest micro-batch that fits into memory, and its peak memory in bytes.

    The peak is 0 on a CPU. Each size runs twice, since the first run also makes one-time
    allocations. Raises OutOfMemoryError if not even a single group fits.
    """
    recipe = run.recipe
    failure: str | None = None
    for groups_at_once in candidate_sizes(len(run.groups)):
        candidate = step.with_groups_at_once(groups_at_once)
        weights = _copy_to_host(state.net)
        failure = None
        try:
            for _ in range(2):
                candidate.peak_trial(state)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failure = first_line(error)  # the error itself would keep tensors alive
        _undo_trial(state, weights)
        peak = _release_memory(run)
        if failure is None:
            return candidate, peak
    size = recipe.data.image_size
    raise OutOfMemoryError(
        f"a single group of {recipe.group} images of {size}×{size} does not fit into the memory of "
        f"{run.hardware.device}: end other processes on it, try --recompute full, or change the "
        f"recipe, for example data.image_size={max(32, size - 32)} ({str(failure)[:160]})"
    )


def _release_memory(run: Run) -> int:
    """Return cached memory to the device; the peak of reserved memory until now, in bytes."""
    device = run.hardware.device
    if device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return peak
