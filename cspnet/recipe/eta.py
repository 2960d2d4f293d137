"""When a run will be done, and what holds it up."""

from datetime import datetime, timedelta

from cspnet.recipe.schema import Recipe

LOADER_BOUND = 0.1  # share of the time that the net waits: from there on the loader is to blame


def find_bottleneck(data_wait: float, workers: int, cores: int, device: str) -> tuple[str, str]:
    """What a run is held up by, and what to change.

    `data_wait` is the share of a step's time that the net waits for images; `device` cpu or cuda.
    """
    if data_wait < LOADER_BOUND:
        remedy = "it runs as fast as this card lets it"
        if device == "cpu":
            remedy = "a GPU is the remedy; here, smaller images (data.image_size) or a narrower net"
        return f"the net: it waits for images {data_wait:.0%} of the time", remedy
    what = f"the loader: the net waits for it {data_wait:.0%} of the time"
    smaller = (
        "`cspnet pack` makes smaller files once, data.reduced_decode=true decodes large ones less"
    )
    if device == "cpu" and not workers:
        return what, f"images are decoded in between; {smaller}"
    if workers < cores:
        return what, f"--workers {cores}; {smaller}"
    return what, f"{smaller}; where the processors are idle, a faster disk"


def seconds_left(recipe: Recipe, step: int, speed: float) -> float:
    """Of the steps after `step`, at so many images/s now; where images grow, by their pixels."""
    now = (
        recipe.size_at(max(0, step - 1)) / recipe.data.image_size
    ) ** 2  # of the work at full size
    return recipe.work(step) / now * recipe.batch / speed


def format_duration(seconds: float) -> str:
    """A duration for people: 12.3 s, 1:02:03, 3d 04h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02}h" if days else f"{hours}:{minutes:02}:{seconds:02}"


def format_eta(seconds: float) -> str:
    """The local time in so many seconds, to the minute."""
    return f"{datetime.now() + timedelta(seconds=seconds):%Y-%m-%d %H:%M}"
