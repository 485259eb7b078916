"""Hold small cells of a table back, and enough others that none of them can be had by subtraction (hop 6).

The total of a table is known, because every table of a survey counts the same cases. So it is not enough to
leave out a cell with few patients: it would be the total less all others. The rule is to hold back, besides
every cell below the floor, the smallest of the others, until what is held back is about as many patients as
the floor asks for and could be divided among its cells in more than one way.

Three details make this safe against somebody who knows the rule. Cells of equal size are held back together:
if the first of them were chosen, its place would tell which cell was small. Cells that are all one below the
floor do not count as hidden, since their sum gives them away. And where even the whole table would not do,
nothing at all is released. That no cell held back can be computed is tested by listing every table that
gives the same release (tests/client/test_suppression.py), in the case that is worst for the site: each
patient has one case, and the reader knows that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


def protected(amounts: Counts, floor: int, besides: Sequence[int] = ()) -> Counts | None:
    """Release a table.

    Args:
        amounts: `(patients, cells)`, what each patient adds to each cell, 0 or more.
        floor: least number of patients behind a released cell.
        besides: cells to hold back whatever they hold, because another table does.

    Returns:
        `(cells,)`: sums of the cells that are released and 0 in all others; None when the table cannot be
        released at all. Empty cells read 0 as well.

    >>> protected(np.repeat(np.eye(3, dtype=np.int64), [1, 6, 50], axis=0), 5)
    array([ 0,  0, 50])
    """
    sums: Counts = amounts.sum(axis=0, dtype=np.int64)
    held_back = (amounts > 0).sum(axis=0) < floor
    held_back[list(besides)] = True
    while _is_open(amounts, sums, held_back, floor):
        if held_back.all():
            return None
        held_back |= sums == sums[~held_back].min()
    return np.where(held_back, 0, sums)


def _is_open(amounts: Counts, sums: Counts, held_back: NDArray[np.bool_], floor: int) -> bool:
    """Whether what is held back is about somebody, and too little to hide them."""
    num_patients = int((amounts[:, held_back] > 0).any(axis=1).sum())
    if num_patients == 0:
        return False
    return num_patients < floor or held_back.sum() < 2 or bool((sums[held_back] == floor - 1).all())
