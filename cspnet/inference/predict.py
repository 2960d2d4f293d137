"""Image classification: the most probable classes of each file."""

import contextlib
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rich.table import Table
from rich.text import Text

from cspnet.images.decode import UnreadableError, decode, evaluation_view
from cspnet.inference.batches import batches_with_logits
from cspnet.recipe.schema import Recipe
from cspnet.runtime.device import Precision
from cspnet.sources.data_root import display_names
from cspnet.sources.protocol import Source
from cspnet.text import printable
from cspnet.weights.trained import Trained

CSV_COLUMNS = ("file", "rank", "class", "name", "probability", "error")  # of the CSV


class Guess(NamedTuple):
    label: str  # the class name: its folder in the training set, or its index if unnamed
    name: str  # for display
    probability: float


@dataclass(frozen=True)
class Prediction:
    file: str
    guesses: list[Guess] = field(default_factory=list)  # most probable first
    error: str | None = None  # why the file could not be read; then there are no guesses


def predict_files(
    trained: Trained,
    files: Source,
    precision: Precision,
    workers: int,
    top: int,
    batch: int | None = None,
) -> Iterator[Prediction]:
    """The `top` most probable classes of each file, in the order of the source.

    Runs on the network's device; leaves the network in evaluation mode. `batch` is the number of
    images per batch, by default the recipe's. The labels of the source are ignored.
    """
    net, recipe = trained.net.eval(), trained.recipe
    labels = trained.classes or [str(index) for index in range(net.classes)]
    names = display_names(trained.classes) if trained.classes else labels
    batch = min(batch or recipe.batch, len(files))
    workers = min(workers, -(-len(files) // batch))  # each worker loads whole batches
    with contextlib.closing(
        batches_with_logits(net, files, recipe, precision, workers, batch, padding=False)
    ) as batches:
        for loaded in batches:
            probabilities, classes = _best(loaded.logits, top)
            rows = zip(probabilities.tolist(), classes.tolist(), strict=True)
            for index, row in enumerate(rows, loaded.first):
                if index in loaded.unreadable:
                    yield Prediction(files.name(index), error=_reason(files, index, recipe))
                    continue
                guesses = [
                    Guess(labels[k], names[k], probability)
                    for probability, k in zip(*row, strict=True)
                ]
                yield Prediction(files.name(index), guesses)


def _best(logits: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest probabilities, float32, and their classes, both [B, top], of logits [B, K]."""
    # Rank the logits: the probabilities of a confident network underflow to equal zeros.
    classes = logits.topk(min(top, logits.shape[1]), dim=1).indices
    return logits.softmax(1).gather(1, classes), classes


def _reason(files: Source, index: int, recipe: Recipe) -> str:
    """Why a file could not be read. Reads it again, as a batch contains only its index."""
    try:
        evaluation_view(decode(files.read(index)[0]), recipe.data.image_size, recipe.evaluate)
    except OSError as error:
        return error.strerror or str(error)
    except UnreadableError as error:
        return str(error)
    return "it could not be read at first"  # for example, it was still being written


def predictions_to_json(predictions: list[Prediction]) -> str:
    """A JSON list with an object per file: its `predictions`, in descending order, or `error`."""
    content: list[dict[str, Any]] = []
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
    """One CSV line per file and rank (from 1); for an unreadable file, one line with its error."""
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
    """A table for the terminal, without unreadable files."""
    table = Table(box=None, pad_edge=False)
    table.add_column("file", no_wrap=True)
    table.add_column("class", no_wrap=True)
    table.add_column("probability", justify="right", no_wrap=True)
    for prediction in predictions:
        for rank, guess in enumerate(prediction.guesses):
            # Text, because rich may interpret a str as markup or an emoji.
            file = Text(printable(prediction.file) if rank == 0 else "")
            table.add_row(file, Text(printable(guess.name)), f"{100 * guess.probability:.2f} %")
    return table
