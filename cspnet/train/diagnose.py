"""Diagnosis of non-finite values and of running out of memory, each in one message."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from cspnet.data import stream
from cspnet.errors import CheckpointError, CspnetError, NonFiniteError, OutOfMemoryError
from cspnet.recipe.schema import Recipe
from cspnet.run.checkpoint import load_checkpoint
from cspnet.run.folder import RunFolder
from cspnet.runtime.memory import is_out_of_memory
from cspnet.sources.protocol import Source
from cspnet.train.state import TrainState


@torch.no_grad()
def is_finite(state: TrainState) -> bool:
    """Whether weights, running statistics, EMA and momentum are finite. The host waits."""
    tensors = [t for t in state.net.state_dict().values() if t.is_floating_point()]
    if state.ema:
        tensors += [t for t in state.ema.tensors.values() if t.is_floating_point()]
    tensors += [entry["momentum_buffer"] for entry in state.optimizer.state.values()]
    largest = torch.stack(list(torch._foreach_norm(tensors, math.inf)))
    return bool(torch.isfinite(largest).all())


class LossGuard:
    """Decides how many consecutive log intervals may have a non-finite loss.

    Loss scaling skips the update of a step with non-finite gradients and halves its factor, so it
    may take a few steps. Without it a single non-finite loss has spoiled the weights.
    """

    def __init__(self, state: TrainState):
        self._state = state
        self._limit = 3 if state.scaler.is_enabled() else 1
        self._count = 0  # consecutive intervals

    def accepts(self, loss: float) -> bool:
        """Whether the run may continue after an interval with this mean loss."""
        if math.isfinite(loss):
            self._count = 0
            return True
        self._count += 1
        if self._count >= self._limit:
            return False
        self._state.bad_step.fill_(-1)
        return True


def first_non_finite_layer(net: nn.Module, forward: Callable[[], object]) -> str | None:
    """First layer in a forward pass with non-finite weights or output; None if there is none."""
    first: list[str] = []

    def make_hook(name: str) -> Callable:
        def hook(module: nn.Module, _: object, output: torch.Tensor) -> None:
            if first:
                return
            tensors = [*module.named_parameters(), *module.named_buffers()]
            own = [key for key, tensor in tensors if not torch.isfinite(tensor).all()]
            if own:
                first.append(f"{name}.{own[0]}")
            elif not torch.isfinite(output).all():
                first.append(f"the output of {name}")

        return hook

    leaves = [(n, m) for n, m in net.named_modules() if not list(m.children())]
    handles = [module.register_forward_hook(make_hook(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return first[0] if first else None


def step_images(recipe: Recipe, source: Source, step: int) -> list[dict]:
    """Each image of a step: its group, its position in the stream, its index and its file."""
    images = []
    for group in range(recipe.groups):
        for position in stream.group_positions(step, group, recipe.batch, recipe.group):
            index = stream.index_at(recipe.seed, position, len(source))
            name = source.name(index)
            images.append(
                {"group": group, "position": int(position), "index": int(index), "file": name}
            )
    return images


def non_finite_error(
    state: TrainState,
    recipe: Recipe,
    source: Source,
    folder: RunFolder,
    replay: Callable[[int], object],
) -> NonFiniteError:
    """The error to raise; the images of the step go to not-finite.json in the run folder.

    `replay(step)` runs the network on the images of a step, counted from 0. The weights of the last
    checkpoint replace those of the state. If no loss was non-finite, the last update was. Messages
    count steps from 1, as the log does.
    """
    noted = int(state.bad_step)
    step = noted if noted >= 0 else state.step - 1
    layer = first_non_finite_layer(state.net, lambda: replay(step)) or "nothing"
    path = folder.last_checkpoint
    earlier, advice = None, "There is no checkpoint."
    with contextlib.suppress(CheckpointError):
        # By now the update has spread the values to all weights, but not to the last checkpoint.
        saved = load_checkpoint(path)
        state.net.load_state_dict(saved["state_dict"])
        earlier = first_non_finite_layer(state.net, lambda: replay(step)) or "nothing"
        advice = f"The last checkpoint is {path} of step {saved['step']:,}."
        if earlier != "nothing":
            # Finite weights, but training had diverged when they were saved.
            advice += (
                " It had diverged already: its output for these images is not finite. Use an "
                "archive or best.pt instead."
            )
    content = {
        "step": step + 1,
        "first_not_finite": layer,
        "first_not_finite_by_last_checkpoint": earlier,
        "loss_scale": state.scaler.get_scale(),
        "images": step_images(recipe, source, step),
    }
    with contextlib.suppress(OSError):
        folder.write_non_finite(content)
    what = "the loss is not finite" if noted >= 0 else "the weights are not finite after the update"
    return NonFiniteError(
        f"{what} at step {step + 1:,}; nothing was saved since. First non-finite value on its "
        f"images: {layer}"
        + (f"; with the weights of the last checkpoint: {earlier}" * bool(earlier))
        + f". The images are listed in {folder.non_finite_file}. {advice} "
        "Try a lower optim.learning_rate, a longer warm-up, or precision=fp32, in a new folder."
    )


def is_compile_error(error: Exception) -> bool:
    """Whether the error comes from torch.compile."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


@contextlib.contextmanager
def explain_errors(
    recipe: Recipe, state: TrainState, groups_at_once: int, compiles: bool = True
) -> Iterator[None]:
    """Turn running out of memory, and a failure to compile, into messages with a remedy.

    Failures to compile only if `compiles`.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):  # also if the compiler reports it
            raise _out_of_memory(recipe, state.step, groups_at_once, error) from None
        if compiles and is_compile_error(error):
            raise CspnetError(
                f"torch.compile failed in step {state.step + 1:,} ({first_line(error)[:200]}): "
                "the same command with --resume --no-compile continues in eager mode from the "
                "last checkpoint"
            ) from None
        raise


def first_line(error: Exception) -> str:
    """The first line of an error's message, or else its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _out_of_memory(
    recipe: Recipe, step: int, groups_at_once: int, error: Exception
) -> OutOfMemoryError:
    """The error to raise, with what the device has, what the run used, and what to change."""
    figures = ""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        peak = torch.cuda.max_memory_reserved()
        figures = (
            f" The device has {total / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free now; "
            f"this process used up to {peak / 1e9:.1f} GB."
        )
    group, size = recipe.group, recipe.data.image_size
    if groups_at_once > 1:
        remedy = (
            f"--micro-batch {(groups_at_once - 1) * group} (now {groups_at_once * group} images) "
            "needs less memory and does not change results"
        )
    else:
        remedy = (
            "A micro-batch has one group already: end other processes on the device, or change the "
            f"recipe, which starts a different run: data.image_size={max(32, size - 32)} "
            f"(now {size}), or group={max(2, group // 2)} (now {group})"
        )
    return OutOfMemoryError(
        f"out of memory at step {step:,}: {first_line(error)[:160]}{figures}\n{remedy}. The last "
        "checkpoint is intact; continue with --resume."
    )
