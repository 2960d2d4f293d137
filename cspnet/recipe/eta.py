"""Time left, expected end and bottleneck of a run."""

from datetime import datetime, timedelta

from cspnet.recipe.schema import Recipe

# The dataloader is the bottleneck if the network waits for it at least this fraction of the time.
LOADER_BOUND = 0.1


def find_bottleneck(data_wait: float, workers: int, cores: int, device: str) -> tuple[str, str]:
    """The bottleneck of a run, and advice.

    `data_wait` is the fraction of a step that the network waits for data; `device` is cpu or cuda.
    """
    if data_wait < LOADER_BOUND:
        advice = "the hardware is fully used"
        if device == "cpu":
            advice = "use a GPU, smaller images (data.image_size), or a narrower network"
        return f"the network; {data_wait:.0%} of the time is spent waiting for data", advice
    bottleneck = f"the dataloader; {data_wait:.0%} of the time is spent waiting for data"
    smaller = (
        "store smaller images with `cspnet pack`, or decode fewer pixels with "
        "data.reduced_decode=true"
    )
    if device == "cpu" and not workers:
        return bottleneck, f"images are decoded in the training process: {smaller}"
    if workers < cores:
        return bottleneck, f"use --workers {cores}; {smaller}"
    return bottleneck, f"{smaller}; if the CPU is idle, use a faster disk"


def seconds_left(recipe: Recipe, step: int, speed: float) -> float:
    """Seconds for the steps after `step` at `speed` images/s now, scaled by the images' pixels."""
    size = recipe.size_at(max(0, step - 1))
    relative_pixels = (size / recipe.data.image_size) ** 2
    return recipe.full_size_steps(step) / relative_pixels * recipe.batch / speed


def format_duration(seconds: float) -> str:
    """A duration as text: 12.3 s, 1:02:03, 3d 04h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02}h" if days else f"{hours}:{minutes:02}:{seconds:02}"


def format_eta(seconds: float) -> str:
    """The local time in `seconds` from now, to the minute."""
    return f"{datetime.now() + timedelta(seconds=seconds):%Y-%m-%d %H:%M}"
