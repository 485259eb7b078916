"""No cell that is held back can be computed from what is released: shown by listing every table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedward_client.suppression import protected

Counts = NDArray[np.int64]


def one_case_a_patient(cells: tuple[int, ...]) -> Counts:
    """The case that is worst for the site: every patient is in one cell, once."""
    return np.repeat(np.eye(len(cells), dtype=np.int64), cells, axis=0)


def tables_of(total: int, num_cells: int) -> Iterator[tuple[int, ...]]:
    if num_cells == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in tables_of(total - first, num_cells - 1):
            yield (first, *rest)


def release(cells: tuple[int, ...], floor: int) -> tuple[int, ...] | None:
    told = protected(one_case_a_patient(cells), floor)
    return None if told is None else tuple(told.tolist())


@pytest.mark.parametrize("floor", [2, 3, 5])
@pytest.mark.parametrize("num_cells", [2, 3, 4])
def test_every_cell_held_back_has_two_values_that_give_the_same_release(floor: int, num_cells: int) -> None:
    for total in range(floor, 3 * floor + 3):
        origins: dict[tuple[int, ...] | None, list[tuple[int, ...]]] = defaultdict(list)
        for cells in tables_of(total, num_cells):
            origins[release(cells, floor)].append(cells)
        for told, tables in origins.items():
            if told is None or sum(told) == total:
                continue  # nothing is told at all, or nobody is behind what is held back
            for cell in (place for place, count in enumerate(told) if count == 0):
                assert len({table[cell] for table in tables}) > 1, (told, tables)


def test_first_of_equal_cells_does_not_give_the_small_one_away() -> None:
    # Chosen by its place, the first 5 would be held back, and only (5, 5, 1) could have led there.
    assert release((5, 5, 1), 5) == (0, 0, 0)
    assert release((5, 9, 1), 5) == (0, 9, 0)


def test_cells_that_are_all_one_below_the_floor_are_not_hidden_by_their_sum_alone() -> None:
    assert release((4, 4, 5, 9), 5) == (0, 0, 0, 9)
    assert release((4, 4), 5) is None


def test_empty_cells_need_no_protection() -> None:
    assert release((0, 0, 7), 5) == (0, 0, 7)


def test_many_cases_of_few_patients_are_held_back() -> None:
    amounts = np.zeros((12, 3), dtype=np.int64)
    amounts[:4, 0] = 100  # four patients, four hundred cases
    amounts[4:, 1] = 1
    amounts[4:, 2] = 2
    told = protected(amounts, 5)
    assert told is not None
    assert told.tolist() == [0, 0, 16]


@settings(max_examples=200, deadline=None)
@given(
    amounts=st.integers(2, 5).flatmap(
        lambda cells: st.lists(
            st.lists(st.integers(0, 3), min_size=cells, max_size=cells), min_size=1, max_size=40
        )
    ),
    floor=st.integers(2, 6),
)
def test_release_is_safe_whatever_patients_have(amounts: list[list[int]], floor: int) -> None:
    table = np.array(amounts, dtype=np.int64)
    told = protected(table, floor)
    if told is None:
        return
    sums, patients = table.sum(axis=0), (table > 0).sum(axis=0)
    shown = told > 0
    assert (told[shown] == sums[shown]).all()
    assert (patients[shown] >= floor).all()
    behind = int((table[:, ~shown] > 0).any(axis=1).sum())
    assert behind == 0 or (behind >= floor and (~shown).sum() >= 2)
    # Which cell comes first does not matter, so two cells held back could always be exchanged.
    order = np.random.default_rng(0).permutation(table.shape[1])
    permuted = protected(table[:, order], floor)
    assert permuted is not None
    assert (permuted == told[order]).all()
