"""What a net takes images for: the classes with the highest probabilities, file by file.

The way to the logits is that of `evaluate`: the recipe's evaluation view, normalisation, precision.
"""

import contextlib
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from rich.table import Table
from rich.text import Text

from cspnet.data.augment import normalize
from cspnet.data.loader import evaluation_batches
from cspnet.images.decode import UnreadableError, decode, evaluation_view
from cspnet.recipe.schema import Recipe
from cspnet.runtime.device import Precision
from cspnet.sources.data_root import Source, display_names
from cspnet.text import printable
from cspnet.weights.load import Trained

CSV_COLUMNS = ("file", "rank", "class", "name", "probability", "error")  # of the CSV


class Guess(NamedTuple):
    label: str  # the class as it was trained: its folder's name, or its index where it has none
    name: str  # what to call it before people
    probability: float


@dataclass(frozen=True)
class Prediction:
    file: str
    guesses: list[Guess] = field(default_factory=list)  # best first
    error: str | None = None  # why the file could not be read; there are no guesses then


def predict_files(
    trained: Trained,
    files: Source,
    precision: Precision,
    workers: int,
    top: int,
    batch: int | None = None,
) -> Iterator[Prediction]:
    """The `top` best classes of each file, or all there are, in the order of the source.

    On the device of the net, which is left in evaluation mode. `batch` is the number of images at
    once, the recipe's by default. Labels of the source are not looked at.
    """
    net, recipe = trained.net.eval(), trained.recipe
    device = next(net.parameters()).device
    names = display_names(trained.classes) if trained.classes else None
    batch = min(batch or recipe.batch, len(files))
    workers = min(workers, -(-len(files) // batch))  # a worker makes a whole batch
    size, how = recipe.data.image_size, recipe.evaluate
    with contextlib.closing(
        evaluation_batches(files, batch, size, how, workers, device.type == "cuda")
    ) as batches:
        for number, loaded in enumerate(batches):
            count = int(loaded.mask.sum())  # less than a batch in the last one
            images = loaded.images.to(device, non_blocking=True)[:count]
            best, indices = _best(net, images, recipe, precision, top)
            rows = zip(best.tolist(), indices.tolist(), strict=True)
            for index, (probabilities, chosen) in enumerate(rows, number * batch):
                if index in loaded.unreadable:
                    yield Prediction(files.name(index), error=_reason(files, index, recipe))
                    continue
                guesses = [
                    Guess(trained.classes[k], names[k], probability)
                    if trained.classes
                    else Guess(str(k), str(k), probability)
                    for k, probability in zip(chosen, probabilities, strict=True)
                ]
                yield Prediction(files.name(index), guesses)


@torch.no_grad()
def _best(
    net: torch.nn.Module, images: torch.Tensor, recipe: Recipe, precision: Precision, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, float32, and classes of the best [B, top], of uint8 [B, S, S, 3]."""
    pixels = normalize(images.permute(0, 3, 1, 2).float() / 255, recipe.data)
    with precision.autocast(images.device):
        logits = net(pixels)
    logits = logits.float()
    # Ranked as logits: probabilities of a sure net are zero, and equal, from some rank on.
    indices = logits.topk(min(top, logits.shape[1]), dim=1).indices
    return logits.softmax(1).gather(1, indices), indices


def _reason(files: Source, index: int, recipe: Recipe) -> str:
    """Why a file could not be read. It is read again: a batch tells no more than the index."""
    try:
        evaluation_view(decode(files.read(index)[0]), recipe.data.image_size, recipe.evaluate)
    except OSError as error:
        return error.strerror or str(error)
    except UnreadableError as error:
        return str(error)
    return "it could not be read at first"  # it is still being written, for one


def predictions_to_json(predictions: list[Prediction]) -> str:
    """A list with an object per file: its `predictions`, best first, or its `error`."""
    content = []
    for prediction in predictions:
        if prediction.error is not None:
            content.append({"file": prediction.file, "error": prediction.error})
            continue
        guesses = [
            {"class": guess.label, "name": guess.name, "probability": guess.probability}
            for guess in prediction.guesses
        ]
        content.append({"file": prediction.file, "predictions": guesses})
    return json.dumps(content, indent=2) + "\n"


def predictions_to_csv(predictions: list[Prediction]) -> str:
    """A line per file and rank, from 1; for an unreadable file one line with its error."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for prediction in predictions:
        if prediction.error is not None:
            writer.writerow([prediction.file, "", "", "", "", prediction.error])
        for rank, guess in enumerate(prediction.guesses, 1):
            writer.writerow([prediction.file, rank, *guess, ""])
    return text.getvalue()


def predictions_to_table(predictions: list[Prediction]) -> Table:
    """The guesses for people; unreadable files are not in it."""
    table = Table(box=None, pad_edge=False)
    table.add_column("file", no_wrap=True)
    table.add_column("class", no_wrap=True)
    table.add_column("probability", justify="right", no_wrap=True)
    for prediction in predictions:
        for rank, guess in enumerate(prediction.guesses):
            # Text, for a str may be taken for markup or an emoji's name.
            file = Text(printable(prediction.file) if rank == 0 else "")
            table.add_row(file, Text(printable(guess.name)), f"{100 * guess.probability:.2f} %")
    return table
