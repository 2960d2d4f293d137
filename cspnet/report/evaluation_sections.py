"""The sections of the report on an evaluation: confusion, worst classes, errors, all classes."""

import base64

from cspnet.inference.confusion import worst_pairs
from cspnet.report.classes import (
    DARK_CELL,
    MAX_MATRIX,
    ClassScore,
    class_scores,
    count_ties,
    row_fractions,
    worst_classes,
)
from cspnet.report.evaluation import Evaluation
from cspnet.report.markup import escape, table
from cspnet.report.mistakes import encode_jpeg, format_percent

MAX_ROWS = 2000  # of the table of classes; beyond it, the worst classes are shown
SMALL_IMAGE = 128  # pixels; smaller images are enlarged without smoothing


def evaluation_sections(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """The sections: id, title and HTML content."""
    scores = class_scores(evaluation.confusion, evaluation.names)
    if len(scores) <= MAX_MATRIX:
        overview = ("confusion", "Confusion matrix", _matrix(evaluation))
    else:
        overview = ("worst", "Worst classes", _worst(evaluation, scores))
    return [
        overview,
        ("mistakes", "Most confident errors", _mistakes(evaluation)),
        ("classes", "Classes", _classes(scores)),
    ]


def _matrix(evaluation: Evaluation) -> str:
    confusion, names = evaluation.confusion, evaluation.names
    fractions, largest_error = row_fractions(confusion)
    rows = []
    for row, name in enumerate(names):
        cells = []
        for column, count in enumerate(confusion[row].tolist()):
            correct = row == column
            strength = fractions[row, column] / (1 if correct else largest_error or 1)
            css = ("right" if correct else "wrong") + (" deep" if strength > DARK_CELL else "")
            text = escape(f"{name} predicted as {names[column]}: {count:,} images")
            cells.append(
                f'<td class="{css}" style="--p:{strength:.2f}" title="{text}">{count:,}'
                if count
                else "<td>"
            )
        rows.append(f'<tr><th title="{escape(name)}">{escape(name)}{"".join(cells)}')
    header = "".join(f'<th title="{escape(name)}"><span>{escape(name)}</span>' for name in names)
    return (
        "<p>Number of images by true class (row) and predicted class (column). Blue: correct, "
        "shaded by the fraction of the class. Orange: errors, shaded relative to the largest "
        f'fraction ({100 * largest_error:.3g} %).</p><div class="pair">'
        f'<div class="scroll"><table class="matrix"><thead><tr><td>{header}<tbody>\n'
        + "\n".join(rows)
        + f"</table></div><div>{_pairs(evaluation)}</div></div>"
    )


def _pairs(evaluation: Evaluation) -> str:
    rows = [
        [escape(pair.true), escape(pair.predicted), f"{pair.images:,} of {pair.of:,}"]
        for pair in worst_pairs(evaluation.confusion, evaluation.names)
    ]
    if not rows:
        return "<p>All predictions are correct.</p>"
    return "<h3>Most frequent confusions</h3>" + table(
        ["true class", "predicted as", "images"], rows, (2,)
    )


def _worst(evaluation: Evaluation, scores: list[ClassScore]) -> str:
    shown = worst_classes(scores)
    rows = [
        [
            escape(score.name),
            f'<meter min="0" max="100" value="{score.top1:.1f}"></meter> {score.top1:.1f} %',
            f"{score.images:,}",
            _top_confusion(score),
        ]
        for score in shown
    ]
    header = ["class", "top-1", "images", "most often predicted as"]
    return (
        f"<p>The classes with the lowest top-1 of all {len(scores):,} classes"
        f'{_ties(scores, shown)}.</p><div class="pair"><div>{table(header, rows, (1, 2))}</div>'
        f"<div>{_pairs(evaluation)}</div></div>"
    )


def _ties(scores: list[ClassScore], shown: list[ClassScore]) -> str:
    """States how many more classes have the top-1 of the last one shown; empty if none has."""
    ties = count_ties(scores, shown)
    return f", and {ties:,} more with the same top-1 ({shown[-1].top1:.4g} %)" if ties else ""


def _top_confusion(score: ClassScore) -> str:
    if not score.confused_images:
        return ""
    return f"{escape(score.confused_with)} <small>{score.confused_images:,}</small>"


def _mistakes(evaluation: Evaluation) -> str:
    if not evaluation.mistakes:
        return "<p>All predictions are correct.</p>"
    tiles = []
    for mistake, picture in zip(evaluation.mistakes, evaluation.pictures, strict=True):
        true = escape(evaluation.names[mistake.true])
        predicted = escape(evaluation.names[mistake.predicted])
        data = base64.b64encode(encode_jpeg(picture)).decode()
        css = ' class="coarse"' if len(picture) < SMALL_IMAGE else ""
        tiles.append(
            f'<figure><img{css} alt="{true}" src="data:image/jpeg;base64,{data}">'
            f"<figcaption><b>{true}</b><br>predicted as <b>{predicted}</b>, "
            f"{format_percent(mistake.probability)}</figcaption></figure>"
        )
    return (
        "<p>The wrong predictions with the highest probability, as the network sees the images. "
        f'They show weaknesses of the network and wrong labels.</p><div class="tiles">'
        f"{''.join(tiles)}</div>"
    )


def _classes(scores: list[ClassScore]) -> str:
    shown, note = scores, ""
    if len(scores) > MAX_ROWS:
        shown = worst_classes(scores, MAX_ROWS)
        note = f"<p>The worst {MAX_ROWS:,} of {len(scores):,} classes{_ties(scores, shown)}.</p>"
    rows = [
        [escape(score.name), f"{score.images:,}", f"{score.top1:.1f}", _top_confusion(score)]
        for score in shown
    ]
    content = table(["class", "images", "top-1 (%)", "most often predicted as"], rows, (1, 2))
    is_open = " open" if len(scores) <= MAX_MATRIX else ""
    return f"<details{is_open}><summary>{len(shown):,} classes</summary>{note}{content}</details>"
