"""Figures at the plan's threshold, from the four counts of one label against the rest.

Source: the definitions of scikit-learn's `precision_recall_fscore_support`, with None where it warns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Counts:
    """Cases of one label (positive) against all others (negative), and what the model called them."""

    true_positive: int
    false_negative: int
    false_positive: int
    true_negative: int

    @property
    def positives(self) -> int:
        """Cases that have the label."""
        return self.true_positive + self.false_negative

    @property
    def recall(self) -> float | None:
        """Sensitivity: share of the positives that were found."""
        return ratio(self.true_positive, self.positives)

    @property
    def specificity(self) -> float | None:
        """Share of the negatives that were called negative."""
        return ratio(self.true_negative, self.true_negative + self.false_positive)

    @property
    def precision(self) -> float | None:
        """Share of the cases called positive that are (positive predictive value)."""
        return ratio(self.true_positive, self.true_positive + self.false_positive)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; not defined when nothing is positive or called so."""
        return ratio(
            2 * self.true_positive, 2 * self.true_positive + self.false_positive + self.false_negative
        )


def counts_of(confusion: NDArray[np.int64], label: int) -> Counts:
    """Read the four counts of `label` against the rest from a matrix with rows true, columns predicted."""
    found = int(confusion[label, label])
    positives, called = int(confusion[label].sum()), int(confusion[:, label].sum())
    return Counts(
        true_positive=found,
        false_negative=positives - found,
        false_positive=called - found,
        true_negative=int(confusion.sum()) - positives - called + found,
    )


def accuracy(confusion: NDArray[np.int64]) -> float | None:
    """Share of the cases that were given their own label."""
    return ratio(int(np.trace(confusion)), int(confusion.sum()))


def ratio(part: int, whole: int) -> float | None:
    """Divide, or None when there is nothing to divide by."""
    return part / whole if whole else None


def mean(values: list[float | None]) -> float | None:
    """Average, or None when any value is not defined: a mean over fewer labels is another figure."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
