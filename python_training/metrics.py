"""WA, UA and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def confusion_matrix(truth: Sequence[int], predicted: Sequence[int], classes: int) -> np.ndarray:
    """(classes, classes) counts; rows are the truth, columns the predictions."""
    if len(truth) != len(predicted):
        raise ValueError(
            f"confusion_matrix: expected as many predictions as truths ({len(truth)}), got {len(predicted)}"
        )
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (np.asarray(truth, dtype=np.int64), np.asarray(predicted, dtype=np.int64)), 1)
    return matrix


def weighted_accuracy(matrix: np.ndarray) -> float:
    """WA: the share of utterances that are right."""
    return float(np.trace(matrix) / matrix.sum())


def unweighted_accuracy(matrix: np.ndarray) -> float:
    """UA: the mean recall over the classes present in the truth."""
    present = matrix.sum(1) > 0
    return float((np.diag(matrix)[present] / matrix.sum(1)[present]).mean())
