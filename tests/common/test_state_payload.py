"""Metric counts on the wire: fixed length, fixed order, int64, nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward_common.errors import PayloadError
from fedward_common.evaluation.state import empty_state, state_layout, state_of
from fedward_common.state_payload import pack_state, state_bytes, unpack_state
from tests.builders import a_plan

PLAN = a_plan(evaluation={"score_bins": 16})
THREE = a_plan(task={"labels": ("a", "b", "c")}, evaluation={"score_bins": 16})


def test_state_has_the_length_that_the_plan_implies_whatever_it_counts() -> None:
    # num_cases 1, confusion 2x2, positives and negatives 1x16 each, two sums
    assert state_bytes(PLAN) == 8 * (1 + 4 + 16 + 16 + 1 + 1)
    # three labels: confusion 3x3, one histogram a label
    assert state_bytes(THREE) == 8 * (1 + 9 + 48 + 48 + 1 + 1)
    assert len(pack_state(empty_state(PLAN), PLAN)) == state_bytes(PLAN)


def test_packed_state_is_little_endian_int64_in_the_plans_order() -> None:
    state = empty_state(PLAN)
    state["num_cases"][0] = 258
    state["brier"][0] = -1
    raw = pack_state(state, PLAN)
    assert raw[:8] == b"\x02\x01" + bytes(6)
    assert raw[-8:] == b"\xff" * 8
    assert not any(raw[8:-8])


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), max_size=20))
def test_unpacked_state_equals_the_packed_one(cases: list[tuple[float, int]]) -> None:
    scores = np.array([[1 - score, score] for score, _ in cases]).reshape(-1, 2)
    state = state_of(scores, np.array([label for _, label in cases], dtype=np.int64), PLAN)
    again = unpack_state(pack_state(state, PLAN), PLAN)
    assert list(again) == list(state_layout(PLAN))
    for name, array in state.items():
        np.testing.assert_array_equal(again[name], array)
        assert again[name].dtype == np.int64


@pytest.mark.parametrize("change", [-8, -1, 1, 8])
def test_bytes_of_another_length_are_refused(change: int) -> None:
    with pytest.raises(PayloadError, match="bytes, expected"):
        unpack_state(bytes(state_bytes(PLAN) + change), PLAN)


def test_state_of_another_plan_is_refused() -> None:
    with pytest.raises(PayloadError):
        pack_state(empty_state(THREE), PLAN)


def test_state_with_an_array_missing_or_too_many_is_refused() -> None:
    state = empty_state(PLAN)
    with pytest.raises(PayloadError):
        pack_state({**state, "names": np.zeros(1, dtype=np.int64)}, PLAN)
    del state["brier"]
    with pytest.raises(PayloadError):
        pack_state(state, PLAN)


def test_scores_in_the_place_of_counts_are_refused_instead_of_rounded() -> None:
    state = empty_state(PLAN)
    with pytest.raises(PayloadError):
        pack_state({**state, "positives": np.full((1, 16), 0.7)}, PLAN)
