"""The evaluation of a run's checkpoint for the report, or the reason why there is none."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cspnet.errors import CheckpointError, CspnetError, RecipeError
from cspnet.inference.evaluate import Scores, evaluate_network
from cspnet.report.classes import class_labels
from cspnet.report.mistakes import Mistake, TopMistakes, network_view
from cspnet.run.reader import RunRecord
from cspnet.runtime.device import choose_workers, inference_precision, setup_device
from cspnet.runtime.memory import is_out_of_memory
from cspnet.sources.data_root import display_names, open_validation
from cspnet.sources.protocol import Source
from cspnet.text import end_sentence
from cspnet.weights.labels import LABELS_ADVICE, resolve_class_names
from cspnet.weights.load import load_weights
from cspnet.weights.trained import Trained

OWN_CHECKPOINTS = ("best", "last")
CLASS_NAMES_HINT = f"If you know the class names, {LABELS_ADVICE}"


@dataclass(frozen=True)
class Evaluation:
    """The predictions of a checkpoint of the run on the validation set."""

    checkpoint: str
    step: int
    averaged: bool  # whether these are the EMA weights
    data: str  # the data root
    scores: Scores
    names: list[str]  # labels of the classes in the order of the matrix
    mistakes: list[Mistake]  # the most confident first
    pictures: list[np.ndarray]  # of the mistakes: the network's input, uint8 RGB [S, S, 3]

    @property
    def confusion(self) -> np.ndarray:
        """int64 [K, K]: number of images by true class (row) and predicted class (column)."""
        if self.scores.confusion is None:
            raise ValueError("the scores have no confusion matrix")
        return self.scores.confusion


def selection_note(run: RunRecord, evaluation: Evaluation) -> str:
    """A warning if the checkpoint was selected on the images that it is evaluated on; else ""."""
    best = run.folder.best_checkpoint
    if not run.selected or evaluation.checkpoint != str(best):
        return ""
    if evaluation.data != run.fields.get("data.root"):
        return ""
    return (
        "best.pt is the best of several validations, selected on the same images, so its top-1 is "
        "optimistic; the last validation was not selected."
    )


def evaluate_run(
    run: RunRecord,
    data: str | None = None,
    checkpoint: str | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, images: None,
) -> tuple[Evaluation | None, list[str]]:
    """Evaluates a checkpoint of the run, by default its best on its own data; and remarks.

    If the run's own data or checkpoints are unavailable, a remark says so and there is no
    evaluation. If a given `data` or `checkpoint` is unavailable, this raises CspnetError.
    `progress` is called with the number of images done and the number of all images.
    """
    torch_device = setup_device(device)
    trained, file, remarks = _open_checkpoint(run, checkpoint)
    if trained is None:
        return None, remarks
    recipe = trained.recipe
    root = data or _recorded_root(run, recipe.data.root)
    try:
        source = open_validation(root, trained.classes, trained.net.classes)
    except CspnetError as error:
        if data:
            raise
        return None, [
            *remarks,
            f"Not evaluated, as the validation images are unavailable: {end_sentence(error)} "
            "Give their location with --data DIR.",
        ]
    trained = resolve_class_names(trained, source.classes, str(file), ways=CLASS_NAMES_HINT)
    remarks += [f"{file}: {remark}." for remark in trained.remarks]
    collector = TopMistakes()
    try:
        scores = evaluate_network(
            trained.net.to(torch_device),
            source,
            recipe,
            inference_precision(recipe.precision, torch_device),
            choose_workers(workers, torch_device),
            progress=lambda images: progress(images, len(source)),
            on_batch=collector,
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None, [
            *remarks,
            f"Not evaluated: out of memory on {torch_device}. Use --device cpu, or close other "
            "processes that use the device.",
        ]
    if scores.unreadable:
        remarks.append(
            f"{scores.unreadable:,} validation images are unreadable and evaluated as black images."
        )
    return _evaluation(trained, source, str(file), root, scores, collector.mistakes), remarks


def _evaluation(
    trained: Trained,
    source: Source,
    checkpoint: str,
    root: str,
    scores: Scores,
    mistakes: list[Mistake],
) -> Evaluation:
    classes = trained.classes or list(source.classes)
    return Evaluation(
        checkpoint=checkpoint,
        step=trained.step,
        averaged=trained.averaged,
        data=root,
        scores=scores,
        names=class_labels(classes, display_names(classes)),
        mistakes=mistakes,
        pictures=[network_view(source, mistake.index, trained.recipe) for mistake in mistakes],
    )


def _recorded_root(run: RunRecord, root: str) -> str:
    """The absolute data root that the run recorded, if it exists; else the recipe's `root`."""
    recorded = run.environment.get("data_root")
    return recorded if isinstance(recorded, str) and os.path.isdir(recorded) else root


def _open_checkpoint(
    run: RunRecord, requested: str | None
) -> tuple[Trained | None, Path | str, list[str]]:
    """Opens the requested checkpoint; by default best.pt, or last.pt if that is unreadable."""
    folder = run.folder.checkpoint_folder
    if requested:
        file = folder / f"{requested}.pt" if requested in OWN_CHECKPOINTS else requested
        return load_weights(str(file)), file, []
    remarks: list[str] = []
    for name in OWN_CHECKPOINTS:
        path = folder / f"{name}.pt"
        if path.is_file():
            try:
                return load_weights(str(path)), path, remarks
            except (CheckpointError, RecipeError) as error:
                remarks.append(end_sentence(error))
    remarks.append(
        f"Not evaluated: {folder} has no readable checkpoint."
        if remarks
        else f"Not evaluated: {folder} has no checkpoint yet. Report again after the first save."
    )
    return None, "", remarks
