"""Turn scores into whole numbers that add: cells of a fixed grid, and sums in fixed point.

Integers make a federation's figures independent of the order in which sites arrive, which no sum of
floats is. The grid is half even in the score and half even in its odds (base 2): networks are often
sure, and on a purely even grid most of their scores would share the first and last cell, which would
blur AUROC. Every step is exactly monotone in IEEE arithmetic (no logarithm is taken), so a higher score
never lands in a lower cell, on any machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FIXED_POINT = 2**20
"""Sums of losses are kept in units of 1 / FIXED_POINT, rounded once a case."""

SMALLEST_SCORE = 2.0**-52
"""Scores below this count as this in the log loss, as in scikit-learn for float64."""

_OCTAVES = 24  # float32 probabilities next to 1 are 2**-24 apart


def cells_of(scores: NDArray[np.float64], num_cells: int) -> NDArray[np.int64]:
    """Give each score its cell.

    Args:
        scores: any shape, in [0, 1].
        num_cells: cells of the grid, at least 2.

    Returns:
        Same shape, in [0, num_cells - 1], never decreasing in the score. Scores that differ by
        2 / (num_cells - 1) or more never share a cell.

    >>> cells_of(np.array([0.0, 0.001, 0.25, 0.5, 0.75, 1.0]), 101)
    array([  0,  15,  36,  50,  64, 100])
    """
    rarer = np.maximum(np.minimum(scores, 1 - scores), 2.0**-_OCTAVES)
    mantissa, exponent = np.frexp(rarer)
    octave = exponent + 2 * mantissa - 2  # log2, drawn with straight lines between powers of two
    below_half = (octave + _OCTAVES) / (_OCTAVES - 1) / 2
    odds = np.where(scores < 0.5, below_half, 1 - below_half)
    cells: NDArray[np.int64] = np.rint((scores + odds) / 2 * (num_cells - 1)).astype(np.int64)
    return cells


def fixed_point_sum(values: NDArray[np.float64]) -> int:
    """Sum values in fixed point; every value is rounded by itself, so the order is irrelevant."""
    return int(np.rint(values * FIXED_POINT).astype(np.int64).sum())
