"""The confusion matrix of an evaluation, against counting by hand."""

import numpy as np
import torch

from cspnet.inference.confusion import Pair, to_markdown, worst_pairs
from cspnet.inference.evaluate import evaluate_network
from cspnet.runtime.device import Precision
from cspnet.sources.data_root import open_validation
from cspnet.weights.trained import build_net


def test_the_matrix_counts_each_image_once_whatever_the_batch(tiny):
    recipe, validation = tiny(), open_validation("digits", [str(n) for n in range(10)])
    torch.manual_seed(0)
    net, counted, order = build_net(recipe, 10), np.zeros((10, 10), int), []

    def on_batch(first, logits, labels):
        assert logits.dtype == torch.float32 and logits.shape == (len(labels), 10)
        order.extend(range(first, first + len(labels)))
        for true, row in zip(labels.tolist(), logits, strict=True):
            counted[true, int(row.argmax())] += 1

    scores = evaluate_network(
        net, validation, recipe, Precision("fp32", ""), 0, batch=50, on_batch=on_batch
    )
    assert (scores.confusion == counted).all() and scores.confusion.dtype == np.int64
    assert order == list(range(359))
    assert (counted.sum(1) == np.bincount(validation.labels, minlength=10)).all()
    assert 100 * np.trace(counted) / 359 == scores.top1
    again = evaluate_network(net, validation, recipe, Precision("fp32", ""), 0, batch=359)
    assert (again.confusion == counted).all() and "confusion" not in again.to_dict()


def test_the_worst_pairs_come_first_and_ties_in_the_order_of_the_classes():
    confusion = np.array([[5, 2, 0], [2, 90, 8], [0, 0, 1]])
    pairs = worst_pairs(confusion, ["cat", "dog", "owl"])
    assert pairs == [
        Pair("dog", "owl", 8, 100),
        Pair("cat", "dog", 2, 7),
        Pair("dog", "cat", 2, 100),
    ]
    assert worst_pairs(confusion, ["cat", "dog", "owl"], most=1) == pairs[:1]
    assert to_markdown(pairs).splitlines()[2] == "| dog | owl | 8 of 100 | 8% |"
    assert worst_pairs(np.diag([3, 4]), ["a", "b"]) == []
    assert (np.diag(confusion) == [5, 90, 1]).all(), "the matrix stays as it was"
