"""One evaluation of a run's net for its report, or in a sentence why there is none."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cspnet.errors import CheckpointError, CspnetError, RecipeError
from cspnet.inference.evaluate import Scores, evaluate_network
from cspnet.report.classes import class_labels
from cspnet.report.mistakes import Mistake, TopMistakes, view
from cspnet.run.reader import RunRecord
from cspnet.runtime.device import choose_workers, inference_precision, setup_device
from cspnet.sources.data_root import display_names, open_validation
from cspnet.text import end_sentence
from cspnet.train.diagnose import is_out_of_memory
from cspnet.weights.labels import LABELS_ADVICE
from cspnet.weights.load import Trained, load_weights, resolve_class_names

OWN = ("best", "last")
WAYS = f"If you know the class names, {LABELS_ADVICE}"


@dataclass(frozen=True)
class Evaluation:
    """What a net of the run makes of the validation set."""

    checkpoint: str
    step: int
    averaged: bool
    data: str  # where the images are
    scores: Scores
    names: list[str]  # of the classes, in the order of the matrix; a synset with its id
    mistakes: list[Mistake]  # the surest first
    pictures: list[np.ndarray]  # of them: what the net saw, uint8 RGB [S, S, 3]


def selection_note(run: RunRecord, verdict: Evaluation) -> str:
    """Says that the checkpoint was selected on the images that it is evaluated on; else empty."""
    best = run.folder.best_checkpoint
    if not run.selected or verdict.checkpoint != str(best):
        return ""
    if verdict.data != run.fields.get("data.root"):
        return ""
    return (
        "best.pt is the best of several validations, selected on these images, so its top-1 is "
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
    """The verdict of the checkpoint on the data, by default the run's own, and remarks.

    What is missing of the run's own is a remark; what was asked for raises a CspnetError.
    `progress` is told how many images are done, of how many.
    """
    where = setup_device(device)
    trained, file, remarks = _open(run, checkpoint)
    if trained is None:
        return None, remarks
    recipe = trained.recipe
    root = data or _own_root(run, recipe.data.root)
    try:
        source = open_validation(root, trained.classes, trained.net.classes)
    except CspnetError as error:
        if data:
            raise
        told = (
            f"The validation images are not available, nothing was evaluated: {end_sentence(error)}"
        )
        return None, [*remarks, f"{told} --data DIR says where they are."]
    trained = resolve_class_names(trained, source.classes, str(file), ways=WAYS)
    remarks += [f"{file}: {remark}." for remark in trained.remarks]
    surest = TopMistakes()
    try:
        scores = evaluate_network(
            trained.net.to(where),
            source,
            recipe,
            inference_precision(recipe.precision, where),
            choose_workers(workers, where),
            progress=lambda images: progress(images, len(source)),
            seen=surest,
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        told = f"The memory of {where} did not suffice beside what else runs there"
        return None, [*remarks, f"{told}, so nothing was evaluated: --device cpu does without it."]
    if scores.unreadable:
        remarks.append(f"{scores.unreadable:,} validation images are unreadable; black ones count.")
    classes = trained.classes
    mistakes = surest.mistakes()
    verdict = Evaluation(
        checkpoint=str(file),
        step=trained.step,
        averaged=trained.averaged,
        data=root,
        scores=scores,
        names=class_labels(classes, display_names(classes)),
        mistakes=mistakes,
        pictures=[view(source, mistake.index, recipe) for mistake in mistakes],
    )
    return verdict, remarks


def _own_root(run: RunRecord, typed: str) -> str:
    """The run's data root, from any working directory where that path is still there."""
    recorded = run.environment.get("data_root")
    return recorded if isinstance(recorded, str) and os.path.isdir(recorded) else typed


def _open(run: RunRecord, asked: str | None) -> tuple[Trained | None, Path | str, list[str]]:
    """The net that was asked for; else the best one, else the last one that can be read."""
    folder = run.folder.checkpoint_folder
    if asked:
        file = folder / f"{asked}.pt" if asked in OWN else asked
        trained = load_weights(str(file))
        return trained, file, []
    remarks = []
    for name in OWN:
        file = folder / f"{name}.pt"
        if file.is_file():
            try:
                return load_weights(str(file)), file, remarks
            except (CheckpointError, RecipeError) as error:
                remarks.append(end_sentence(error))
    remarks.append(
        f"Nothing was evaluated: {folder} has no checkpoint"
        + (" that can be read." if remarks else " yet. After the first save, report again.")
    )
    return None, "", remarks
