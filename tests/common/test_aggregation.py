"""The running sum against exact rational arithmetic, Flower and every order of arrival."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedward_common.aggregation import MAX_SITES, RunningSum
from fedward_common.errors import PayloadError
from fedward_common.weights import Layout, TensorSpec, Weights

MAX_ABS = 64.0
MAX_CASES = 1_000_000
SMALL: Layout = (
    TensorSpec(name="weight", shape=(2, 3), kind="parameter"),
    TensorSpec(name="scale", shape=(), kind="parameter"),
    TensorSpec(name="mean", shape=(2,), kind="buffer"),
)
NUM_SMALL = 9
elements = st.floats(-MAX_ABS, MAX_ABS, width=32)
updates = st.lists(
    st.tuples(st.lists(elements, min_size=NUM_SMALL, max_size=NUM_SMALL), st.integers(1, MAX_CASES)),
    min_size=1,
    max_size=6,
)


def a_small_update(values: list[float]) -> Weights:
    flat = np.array(values, dtype=np.float32)
    return {"weight": flat[:6].reshape(2, 3), "scale": flat[6:7].reshape(()), "mean": flat[7:]}


def a_large_layout(num_elements: int) -> Layout:
    """Several tensors, none a multiple of the block, so that blocks and threads meet odd ends."""
    first = num_elements // 3
    return (
        TensorSpec(name="a", shape=(first,), kind="parameter"),
        TensorSpec(name="b", shape=(num_elements - first - 7,), kind="parameter"),
        TensorSpec(name="c", shape=(7,), kind="buffer"),
    )


def a_random_update(layout: Layout, seed: int, scale: float = 1e-3) -> Weights:
    rng = np.random.default_rng(seed)
    return {spec.name: (rng.standard_normal(spec.shape) * scale).astype(np.float32) for spec in layout}


def flatten(weights: Weights) -> NDArray[np.float32]:
    return np.concatenate([array.reshape(-1) for array in weights.values()])


def mean_of(
    contributions: list[tuple[Weights, int]], layout: Layout, *, threads: int = 1
) -> NDArray[np.float32]:
    total = RunningSum(layout, max_abs=MAX_ABS, max_cases=MAX_CASES, threads=threads)
    for delta, num_cases in contributions:
        total.add(delta, num_cases)
    return flatten(total.mean())


@given(updates=updates, data=st.data())
@settings(max_examples=200, deadline=None)
def test_mean_has_the_same_bits_in_every_order_of_arrival(
    updates: list[tuple[list[float], int]], data: st.DataObject
) -> None:
    contributions = [(a_small_update(values), num_cases) for values, num_cases in updates]
    shuffled = data.draw(st.permutations(contributions))
    assert mean_of(contributions, SMALL).tobytes() == mean_of(shuffled, SMALL).tobytes()


def test_mean_has_the_same_bits_in_all_orders_where_a_float_sum_does_not() -> None:
    layout = a_large_layout(100_000)
    contributions = [(a_random_update(layout, seed, 10.0**-seed), 100 + seed) for seed in range(4)]
    ours = {mean_of(list(order), layout).tobytes() for order in itertools.permutations(contributions)}
    control = {
        sum((flatten(delta) * np.float32(cases) for delta, cases in order), np.float32(0)).tobytes()
        for order in itertools.permutations(contributions)
    }
    assert len(ours) == 1
    assert len(control) > 1


def test_mean_does_not_depend_on_ties_at_half_a_grid_unit() -> None:
    """Rounding into a float sum would send a tie up or down by what arrived before."""
    layout: Layout = (TensorSpec(name="x", shape=(1,), kind="parameter"),)

    def total(order: tuple[float, ...]) -> bytes:
        running = RunningSum(layout, max_abs=1.0, max_cases=1)
        for value in order:
            running.add({"x": np.array([value], dtype=np.float32)}, 1)
        return running.mean()["x"].tobytes()

    grid = 2.0**-50
    half_units = (0.5 * grid, 1.5 * grid, 1.0 * grid, -0.5 * grid, 2.5 * grid)
    assert len({total(order) for order in itertools.permutations(half_units)}) == 1


@given(updates=updates)
@settings(max_examples=200, deadline=None)
def test_mean_equals_the_exact_rational_mean_within_the_stated_resolution(
    updates: list[tuple[list[float], int]],
) -> None:
    running = RunningSum(SMALL, max_abs=MAX_ABS, max_cases=MAX_CASES)
    for values, num_cases in updates:
        running.add(a_small_update(values), num_cases)
    cases = sum(num_cases for _, num_cases in updates)
    mean = flatten(running.mean())
    for index in range(NUM_SMALL):
        products = (Fraction(values[index]) * num_cases for values, num_cases in updates)
        exact = sum(products, Fraction(0)) / cases
        # The last float32 rounding adds half a unit in the last place of the result.
        last_rounding = float(np.spacing(np.abs(mean[index]))) / 2
        assert float(abs(Fraction(float(mean[index])) - exact)) <= running.resolution + 1.0001 * last_rounding


def test_resolution_is_far_below_a_float32_weight_for_the_default_bounds() -> None:
    running = RunningSum(SMALL, max_abs=64.0, max_cases=1_000_000)
    for _ in range(3):
        running.add(a_small_update([0.0] * NUM_SMALL), 1000)
    assert running.resolution == 2.0**-26 / 1000
    assert running.resolution < float(np.spacing(np.float32(0.05))) / 200


def test_mean_of_two_sites_equals_the_hand_calculation() -> None:
    running = RunningSum(SMALL, max_abs=MAX_ABS, max_cases=MAX_CASES)
    running.add(a_small_update([1, 2, 3, 4, 5, 6, 7, 8, 9]), 30)
    running.add(a_small_update([-1, 0, 1, 0, -1, 0, 1, 0, -1]), 10)
    mean = running.mean()
    # (30 * 1 - 10) / 40 = 0.5, (30 * 2) / 40 = 1.5, (30 * 3 + 10) / 40 = 2.5, ...
    np.testing.assert_array_equal(mean["weight"], np.array([[0.5, 1.5, 2.5], [3.0, 3.5, 4.5]], np.float32))
    np.testing.assert_array_equal(mean["scale"], np.array(5.5, np.float32))
    np.testing.assert_array_equal(mean["mean"], np.array([6.0, 6.5], np.float32))
    assert (running.num_cases, running.num_sites) == (40, 2)
    assert {name: (array.shape, array.dtype) for name, array in mean.items()} == {
        spec.name: (spec.shape, np.dtype(np.float32)) for spec in SMALL
    }


def test_mean_of_one_site_is_its_own_update() -> None:
    layout = a_large_layout(10_000)
    delta = a_random_update(layout, seed=1)
    error = np.abs(mean_of([(delta, 1570)], layout) - flatten(delta))
    assert error.max() <= 2.0**-26 / 1570 + float(np.spacing(np.float32(5e-3))) / 2


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_blocks_do_not_change_a_bit(threads: int) -> None:
    layout = a_large_layout(700_001)
    contributions = [(a_random_update(layout, seed), 50 * seed + 1) for seed in range(3)]
    exact = sum(flatten(delta).astype(np.float64) * cases for delta, cases in contributions) / 153
    mean = mean_of(contributions, layout, threads=threads)
    assert mean.tobytes() == mean_of(contributions, layout, threads=1).tobytes()
    np.testing.assert_allclose(mean, exact, rtol=2**-23, atol=1e-9)


def test_mean_equals_flowers_weighted_average() -> None:
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    layout = a_large_layout(5_000)
    contributions = [(a_random_update(layout, seed), cases) for seed, cases in enumerate((1452, 545, 2711))]
    replies = [
        RecordDict(
            {
                "arrays": ArrayRecord({name: Array(array) for name, array in delta.items()}),
                "metrics": MetricRecord({"num-examples": cases}),
            }
        )
        for delta, cases in contributions
    ]
    flower = aggregate_arrayrecords(replies, "num-examples")
    theirs = np.concatenate([flower[spec.name].numpy() for spec in layout])
    np.testing.assert_allclose(mean_of(contributions, layout), theirs, rtol=1e-5, atol=1e-9)


def test_sum_holds_every_site_at_the_bounds_without_overflow() -> None:
    layout: Layout = (TensorSpec(name="x", shape=(2,), kind="parameter"),)
    extreme = {"x": np.array([64.0, -64.0], dtype=np.float32)}
    running = RunningSum(layout, max_abs=64.0, max_cases=2**24)
    for _ in range(MAX_SITES):
        running.add(extreme, 2**24)
    np.testing.assert_array_equal(running.mean()["x"], extreme["x"])
    with pytest.raises(PayloadError, match="4096 updates"):
        running.add(extreme, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 64.001, -64.001])
@pytest.mark.parametrize("where", [0, 400_000, 699_999])
def test_update_with_one_bad_value_is_refused_and_leaves_the_sum_unchanged(value: float, where: int) -> None:
    layout = a_large_layout(700_000)
    good, bad = a_random_update(layout, seed=1), a_random_update(layout, seed=2)
    flat = flatten(bad)
    flat[where] = value
    first, second, _ = (spec.size for spec in layout)
    bad = {"a": flat[:first], "b": flat[first : first + second], "c": flat[first + second :]}
    running = RunningSum(layout, max_abs=MAX_ABS, max_cases=MAX_CASES, threads=2)
    running.add(good, 7)
    before = flatten(running.mean()).tobytes()
    with pytest.raises(PayloadError, match="not finite or beyond"):
        running.add(bad, 100)
    assert flatten(running.mean()).tobytes() == before
    assert (running.num_cases, running.num_sites) == (7, 1)


@pytest.mark.parametrize("num_cases", [0, -1, MAX_CASES + 1])
def test_number_of_cases_out_of_bounds_is_refused(num_cases: int) -> None:
    running = RunningSum(SMALL, max_abs=MAX_ABS, max_cases=MAX_CASES)
    with pytest.raises(PayloadError, match=f"update of {num_cases} cases"):
        running.add(a_small_update([0.0] * NUM_SMALL), num_cases)


def test_update_with_other_names_or_shapes_is_refused() -> None:
    running = RunningSum(SMALL, max_abs=MAX_ABS, max_cases=MAX_CASES)
    delta = a_small_update([0.0] * NUM_SMALL)
    with pytest.raises(PayloadError, match="names that differ"):
        running.add({"weight": delta["weight"]}, 1)
    with pytest.raises(PayloadError, match="tensor mean"):
        running.add({**delta, "mean": np.zeros(3, dtype=np.float32)}, 1)


def test_mean_without_an_update_is_refused() -> None:
    running = RunningSum(SMALL, max_abs=MAX_ABS, max_cases=MAX_CASES)
    assert running.resolution == math.inf
    with pytest.raises(PayloadError, match="no update"):
        running.mean()


@pytest.mark.parametrize(
    ("max_abs", "max_cases"), [(0.0, 1), (math.inf, 1), (math.nan, 1), (1.0, 0), (1.0, 2**29 + 1)]
)
def test_bounds_that_give_no_grid_are_refused(max_abs: float, max_cases: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        RunningSum(SMALL, max_abs=max_abs, max_cases=max_cases)


def test_updates_are_read_where_they_lie_and_not_changed() -> None:
    delta = a_small_update([1.5] * NUM_SMALL)
    for array in delta.values():
        array.flags.writeable = False
    running = RunningSum(SMALL, max_abs=MAX_ABS, max_cases=MAX_CASES)
    running.add(delta, 3)
    transposed = {**delta, "weight": np.full((3, 2), 1.5, dtype=np.float32).T}
    running.add(transposed, 3)
    np.testing.assert_array_equal(flatten(running.mean()), np.full(NUM_SMALL, 1.5, np.float32))
