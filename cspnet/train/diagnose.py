"""When numbers go bad, or memory ends: what it was, and where, in one message."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from cspnet.data import stream
from cspnet.errors import CheckpointError, NonFiniteError, OutOfMemoryError
from cspnet.run.checkpoint import load_checkpoint
from cspnet.run.folder import RunFolder
from cspnet.sources.data_root import Source
from cspnet.train.state import TrainState


def note_loss(state: TrainState, loss: torch.Tensor) -> None:
    """Adds the loss of a step to the sum of the window, and notes the first that is not finite.

    On the device: the host does not wait.
    """
    state.loss_sum += loss
    first = ~torch.isfinite(loss) & (state.bad_step < 0)
    state.bad_step.copy_(torch.where(first, state.step, state.bad_step))


@torch.no_grad()
def is_finite(state: TrainState) -> bool:
    """Whether weights, running statistics, averages and momentum are all finite. The host waits."""
    tensors = [t for t in state.net.state_dict().values() if t.is_floating_point()]
    if state.average:
        tensors += [t for t in state.average.tensors.values() if t.is_floating_point()]
    tensors += [entry["momentum_buffer"] for entry in state.optimizer.state.values()]
    largest = torch.stack(torch._foreach_norm(tensors, math.inf))
    return bool(torch.isfinite(largest).all())


def first_non_finite_layer(net: nn.Module, forward: Callable[[], object]) -> str | None:
    """The first layer in a forward pass whose weights, or whose output, are not finite; None."""
    found: list[str] = []

    def look(name: str) -> Callable:
        def hook(module: nn.Module, _, output: torch.Tensor) -> None:
            if found:
                return
            own = [(k, t) for k, t in module.named_parameters() if not torch.isfinite(t).all()]
            own += [(k, t) for k, t in module.named_buffers() if not torch.isfinite(t).all()]
            if own:
                found.append(f"{name}.{own[0][0]}")
            elif not torch.isfinite(output).all():
                found.append(f"the output of {name}")

        return hook

    leaves = [(n, m) for n, m in net.named_modules() if not list(m.children())]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def step_images(state: TrainState, source: Source, step: int) -> list[dict]:
    """Each image of a step: its position in the stream, its index and its name."""
    recipe = state.recipe
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
    state: TrainState, source: Source, folder: RunFolder, forward: Callable[[int], object]
) -> NonFiniteError:
    """The error to raise, with the batch at fault written to not-finite.json in the run folder.

    `forward(step)` sends the images of a step, from 0, through the net, whose weights are not kept.
    Where no loss was at fault, the update of the last step was. Steps are told as the log counts
    them, from 1.
    """
    noted = int(state.bad_step)
    step = noted if noted >= 0 else state.step - 1
    layer = first_non_finite_layer(state.net, lambda: forward(step)) or "nothing"
    saved = folder.last_checkpoint
    before, checkpoint = None, "There is no checkpoint."
    with contextlib.suppress(CheckpointError):
        # The update has spread it to all weights by now; those of the last save have not seen it.
        content = load_checkpoint(saved)
        state.net.load_state_dict(content["state_dict"])
        before = first_non_finite_layer(state.net, lambda: forward(step)) or "nothing"
        checkpoint = f"The last checkpoint is {saved} of step {content['step']:,}."
        if before != "nothing":
            # Finite weights, but training had diverged when they were saved.
            checkpoint += (
                " It had diverged already: on these images its own output is not finite. Use an "
                "archive or best.pt instead."
            )
    dump = folder.non_finite_file
    content = {
        "step": step + 1,
        "first_not_finite": layer,
        "first_not_finite_by_last_checkpoint": before,
        "loss_scale": state.scaler.get_scale(),
        "images": step_images(state, source, step),
    }
    with contextlib.suppress(OSError):
        folder.write_non_finite(content)
    what = "the loss is not finite" if noted >= 0 else "the weights are not finite after the update"
    return NonFiniteError(
        f"{what} at step {step + 1:,}; nothing was saved since. With its images, the first that is "
        f"not finite: {layer}"
        + (f"; with the weights of the last save: {before}" * bool(before))
        + f". The images are listed in {dump}. {checkpoint} "
        "Try a lower optim.learning_rate, a longer warm-up, or precision=fp32, in a new folder."
    )


# What cuDNN and cuBLAS say, in a plain RuntimeError, where the device has no room for their own.
FULL = ("unable to find an engine to execute", "ALLOC_FAILED", "out of memory")


def is_out_of_memory(error: Exception) -> bool:
    """Whether that error means that the device has too little memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in FULL)
    )


@contextlib.contextmanager
def explain_out_of_memory(at_once: int, state: TrainState) -> Iterator[None]:
    """Turns the device's running out of memory into one message with numbers and a cure.

    `at_once` groups go through the net at once.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        recipe = state.recipe
        numbers = ""
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            peak = torch.cuda.max_memory_reserved()
            numbers = (
                f" The device has {total / 1e9:.1f} GB, {free / 1e9:.1f} GB of them free now; this "
                f"process held {peak / 1e9:.1f} GB at most."
            )
        cure = (
            f"--passes {at_once - 1} (now {at_once} groups of {recipe.group} images at once) "
            "changes no number but the memory"
            if at_once > 1
            else "one group goes through the net at a time already: free the device of other "
            "processes, or change the recipe, which makes it another run: "
            f"data.image_size={max(32, recipe.data.image_size - 32)} "
            f"(now {recipe.data.image_size}), or "
            f"group={max(2, recipe.group // 2)} (now {recipe.group})"
        )
        first = str(error).partition("\n")[0][:160]
        raise OutOfMemoryError(
            f"out of memory at step {state.step:,}: {first}{numbers}\n{cure}. The last checkpoint "
            "is as it was: --resume."
        ) from None
