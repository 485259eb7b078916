"""How well scores rank positives above negatives, from two histograms over the same cells.

AUROC is the share of pairs (a positive, a negative) in the right order, a pair in one cell counting
half. The order inside a cell is not known, so the true share lies within half of those pairs on either
side: the error bound. Where every cell holds one distinct score, the value is exact.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def auroc(positives: NDArray[np.int64], negatives: NDArray[np.int64]) -> tuple[float, float] | None:
    """Compute the area under the ROC curve and its error bound; None without a positive or a negative.

    Args:
        positives: cases of the label by cell `(cells,)`, lowest score first.
        negatives: all other cases, by the same cells.

    Returns:
        The area as the middle of what is possible, and the largest distance of the true area from it.

    Source: Hanley and McNeil 1982, "The meaning and use of the area under a ROC curve".
    """
    num_pairs = float(positives.sum()) * float(negatives.sum())
    if not num_pairs:
        return None
    in_cell = negatives.astype(np.float64)
    below = np.cumsum(in_cell) - in_cell
    tied = float(positives @ in_cell)
    return (float(positives @ below) + tied / 2) / num_pairs, tied / 2 / num_pairs


def average_precision(positives: NDArray[np.int64], negatives: NDArray[np.int64]) -> float | None:
    """Average precision over the recall gained from cell to cell; None without a positive.

    Cases that share a cell are taken together, as scikit-learn does with equal scores.
    """
    if not positives.sum():
        return None
    gained = positives[::-1]
    found, called = np.cumsum(gained), np.cumsum(gained + negatives[::-1])
    precision = found / np.maximum(called, 1)
    return min(float(gained @ precision) / float(positives.sum()), 1.0)  # rounding may add an ulp


def roc_points(
    positives: NDArray[np.int64], negatives: NDArray[np.int64], max_points: int
) -> tuple[tuple[float, float], ...]:
    """Give points (false positive rate, true positive rate) of the ROC curve, from (0, 0) to (1, 1).

    Args:
        positives: cases of the label by cell, lowest score first.
        negatives: all other cases, by the same cells.
        max_points: at most this many, evenly along the curve; below 2, or with no curve, none are given.
    """
    if max_points < 2 or not positives.sum() or not negatives.sum():
        return ()
    occupied = (positives + negatives)[::-1] > 0
    false_rate = _cumulative_share(negatives[::-1][occupied])
    true_rate = _cumulative_share(positives[::-1][occupied])
    if len(true_rate) > max_points:
        along = np.searchsorted(false_rate + true_rate, np.linspace(0, 2, max_points))
        chosen = np.unique(np.minimum(along, len(true_rate) - 1))
        false_rate, true_rate = false_rate[chosen], true_rate[chosen]
    return tuple((round(float(x), 5), round(float(y), 5)) for x, y in zip(false_rate, true_rate, strict=True))


def _cumulative_share(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.concatenate(([0.0], np.cumsum(counts) / counts.sum()))
