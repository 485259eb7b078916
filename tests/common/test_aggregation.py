"""The running sum against exact rational arithmetic, Flower and every order of arrival."""

from __future__ import annotations

import itertools
import math
import tracemalloc
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
# Sites of one case and of a million, changes of 1e-9 and of 64, side by side.
elements = st.floats(-MAX_ABS, MAX_ABS, width=32) | st.floats(-(2.0**-7), 2.0**-7, width=32)
numbers_of_cases = st.integers(1, MAX_CASES) | st.integers(0, 19).map(lambda exponent: 2**exponent)
updates = st.lists(
    st.tuples(st.lists(elements, min_size=NUM_SMALL, max_size=NUM_SMALL), numbers_of_cases),
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


def exact_mean(contributions: list[tuple[Weights, int]]) -> NDArray[np.float32]:
    """The rounding that the module promises, in Python's unbounded integers."""
    flat = [(flatten(delta), cases) for delta, cases in contributions]
    num_cases = sum(cases for _, cases in flat)
    totals = [0] * len(flat[0][0])
    for values, cases in flat:
        exponent = int(math.log2(cases))
        for index, value in enumerate(values):
            product = np.float32(Fraction(float(value)) * cases * Fraction(2) ** (29 - exponent))
            totals[index] += int(product) << exponent
    return np.array([float(total) * (2.0**-29 / num_cases) for total in totals], dtype=np.float32)


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


def test_mean_does_not_depend_on_ties_at_half_a_unit() -> None:
    """Rounding into a float sum would send a tie up or down by what arrived before."""
    layout: Layout = (TensorSpec(name="x", shape=(1,), kind="parameter"),)

    def total(order: tuple[float, ...]) -> bytes:
        running = RunningSum(layout, max_abs=1.0, max_cases=1)
        for value in order:
            running.add({"x": np.array([value], dtype=np.float32)}, 1)
        return running.mean()["x"].tobytes()

    unit = 2.0**-29
    half_units = (0.5 * unit, 1.5 * unit, 1.0 * unit, -0.5 * unit, 2.5 * unit)
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
        products = [Fraction(values[index]) * num_cases for values, num_cases in updates]
        exact = sum(products, Fraction(0)) / cases
        # Each product is rounded to float32 first, and the result last: half a unit in the last place.
        first_roundings = float(sum(map(abs, products), Fraction(0)) / cases) * 2.0**-24
        last_rounding = float(np.spacing(np.abs(mean[index]))) / 2
        bound = running.resolution + 1.0001 * (first_roundings + last_rounding)
        assert float(abs(Fraction(float(mean[index])) - exact)) <= bound


@given(updates=updates)
@settings(max_examples=200, deadline=None)
def test_mean_has_the_bits_of_the_sum_in_unbounded_integers(updates: list[tuple[list[float], int]]) -> None:
    contributions = [(a_small_update(values), num_cases) for values, num_cases in updates]
    assert mean_of(contributions, SMALL).tobytes() == exact_mean(contributions).tobytes()


@pytest.mark.parametrize("cases", [(2, 2, 3), (5, 1000, 7), (1452, 545, 2711), (999_999, 1_000_000, 3)])
def test_resolution_is_a_float32_weights_own_rounding_for_sites_of_any_size(cases: tuple[int, ...]) -> None:
    running = RunningSum(SMALL, max_abs=MAX_ABS, max_cases=MAX_CASES)
    for num_cases in cases:
        running.add(a_small_update([0.0] * NUM_SMALL), num_cases)
    assert running.resolution <= float(np.spacing(np.float32(0.05))) / 2


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("cases", [(2, 2, 2), (3, 500_000, 999_999), (1452, 545, 2711)])
def test_mean_is_as_close_to_the_exact_one_as_float32_weights_can_tell(
    scale: float, cases: tuple[int, ...]
) -> None:
    layout = a_large_layout(3_000)
    contributions = [(a_random_update(layout, seed, scale), num) for seed, num in enumerate(cases)]
    exact = sum(flatten(delta).astype(np.longdouble) * num for delta, num in contributions) / sum(cases)
    error = np.abs(mean_of(contributions, layout) - exact).max()
    largest = max(float(np.abs(flatten(delta)).max()) for delta, _ in contributions)
    assert error <= np.spacing(np.float32(0.05)) / 2 + largest * 2.0**-23


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
    # cut to its unit; rounded to float32 as a product and as a mean
    assert error.max() <= 2.0 ** (10 - 29) / 1570 + float(np.spacing(np.float32(5e-3)))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_blocks_do_not_change_a_bit(threads: int) -> None:
    layout = a_large_layout(700_001)
    contributions = [(a_random_update(layout, seed), 50 * seed + 1) for seed in range(3)]
    exact = sum(flatten(delta).astype(np.float64) * cases for delta, cases in contributions) / 153
    mean = mean_of(contributions, layout, threads=threads)
    assert mean.tobytes() == mean_of(contributions, layout, threads=1).tobytes()
    np.testing.assert_allclose(mean, exact, rtol=2**-22, atol=2**-29)


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
    np.testing.assert_allclose(mean_of(contributions, layout), theirs, rtol=1e-5, atol=2**-29)


def a_number(value: float) -> Weights:
    return {"x": np.array([value, -value / 3], dtype=np.float32)}


NUMBER: Layout = (TensorSpec(name="x", shape=(2,), kind="parameter"),)


def bits_in_every_order(
    contributions: list[tuple[Weights, int]], max_abs: float, max_cases: int
) -> set[bytes]:
    bits = set()
    for order in itertools.permutations(contributions):
        running = RunningSum(NUMBER, max_abs=max_abs, max_cases=max_cases)
        for delta, num_cases in order:
            running.add(delta, num_cases)
        bits.add(flatten(running.mean()).tobytes())
    return bits


@pytest.mark.parametrize(
    ("values", "bits"),
    [
        # 0.9 + 1.1 + 1.3 + 1.5 at 1024 cases: 0.9 * 2**29 fits 31 bits, any three of them do not
        ([(0.9, 1024), (1.1, 1024), (1.3, 1024), (1.5, 1024)], 31),
        # nothing is large, but a site of one case makes the unit 2**10 times finer
        ([(0.01, 1024), (0.02, 1500), (-0.03, 1025), (0.01, 1)], 31),
        # the first plane overflows as well, by size and by refinement
        ([(1000.0, 2**24), (1001.0, 2**24 - 1), (900.0, 2**23), (1e-3, 1)], 63),
        ([(-1024.0, 2**24), (-1024.0, 2**24), (-1024.0, 2**24), (-1e-8, 1)], 63),
    ],
)
def test_a_block_that_outgrows_its_integers_half_way_gives_the_exact_sum_in_every_order(
    values: list[tuple[float, int]], bits: int
) -> None:
    contributions = [(a_number(value), num_cases) for value, num_cases in values]
    finest = min(int(math.log2(num_cases)) for _, num_cases in values)
    units = sum(Fraction(value) * num_cases for value, num_cases in values) * 2 ** (29 - finest)
    assert abs(units) >= 2**bits  # or the test would test nothing
    assert bits_in_every_order(contributions, 1024.0, 2**24) == {exact_mean(contributions).tobytes()}


def test_large_numbers_that_cancel_leave_the_small_one() -> None:
    """A float sum loses it; integers that wrapped or saturated would as well."""
    layout: Layout = (TensorSpec(name="x", shape=(1,), kind="parameter"),)
    values = [(1024.0, 2**24), (2.0**-20, 1), (-1024.0, 2**24)]
    for order in itertools.permutations(values):
        running = RunningSum(layout, max_abs=1024.0, max_cases=2**24)
        for value, num_cases in order:
            running.add({"x": np.array([value], dtype=np.float32)}, num_cases)
        assert float(running.mean()["x"][0]) == np.float32(2.0**-20 / (2**25 + 1))


@pytest.mark.parametrize("max_abs", [64.0, 1024.0])
def test_sum_holds_every_site_at_the_bounds_without_overflow(max_abs: float) -> None:
    extreme = {"x": np.array([max_abs, -max_abs], dtype=np.float32)}
    running = RunningSum(NUMBER, max_abs=max_abs, max_cases=2**24)
    running.add({"x": np.zeros(2, dtype=np.float32)}, 1)  # the finest unit
    for _ in range(MAX_SITES - 1):
        running.add(extreme, 2**24)
    with pytest.raises(PayloadError, match="4096 updates"):
        running.add(extreme, 1)
    num_cases = (MAX_SITES - 1) * 2**24
    exact = np.float32(max_abs * num_cases / (num_cases + 1))
    np.testing.assert_array_equal(running.mean()["x"], np.array([exact, -exact]))


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
    with pytest.raises(PayloadError, match="not finite or beyond"):
        running.add(bad, 100)
    assert (running.num_cases, running.num_sites) == (7, 1)
    assert flatten(running.mean()).tobytes() == mean_of([(good, 7)], layout).tobytes()


@pytest.mark.parametrize("scale", [1e-3, 0.5, 10.0])
@pytest.mark.parametrize("num_cases", [1, 100, MAX_CASES])
def test_refused_update_leaves_nothing_behind_whatever_it_did_to_width_and_unit(
    scale: float, num_cases: int
) -> None:
    layout = a_large_layout(700_000)
    goods = [(a_random_update(layout, seed), 40 + seed) for seed in range(2)]
    bad = a_random_update(layout, 3, scale)
    bad["c"][-1] = math.nan
    running = RunningSum(layout, max_abs=MAX_ABS, max_cases=MAX_CASES)
    for good in goods:
        with pytest.raises(PayloadError, match="not finite or beyond"):
            running.add(bad, num_cases)
        running.add(*good)
    with pytest.raises(PayloadError, match="not finite or beyond"):
        running.add(bad, num_cases)
    assert flatten(running.mean()).tobytes() == mean_of(goods, layout).tobytes()


@pytest.mark.parametrize("num_sites", [2, 8])
def test_peak_is_one_model_and_the_work_space_however_many_sites(num_sites: int) -> None:
    layout = a_large_layout(3_000_000)
    update = a_random_update(layout, seed=1)
    refused = {**update, "a": np.full_like(update["a"], 0.5), "c": np.full_like(update["c"], math.nan)}
    tracemalloc.start()
    try:
        running = RunningSum(layout, max_abs=MAX_ABS, max_cases=MAX_CASES, threads=2)
        for _ in range(num_sites):
            running.add(update, 1000)
            with pytest.raises(PayloadError):  # four of these would not fit 32 bits
                running.add(refused, 1000)
        mean = running.mean()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= sum(array.nbytes for array in mean.values()) + 2.5 * 2**20


def test_a_sum_that_became_its_mean_takes_nothing_more() -> None:
    running = RunningSum(SMALL, max_abs=MAX_ABS, max_cases=MAX_CASES)
    running.add(a_small_update([1.0] * NUM_SMALL), 3)
    mean = running.mean()
    with pytest.raises(RuntimeError, match="mean already"):
        running.add(a_small_update([2.0] * NUM_SMALL), 3)
    with pytest.raises(RuntimeError, match="mean already"):
        running.mean()
    np.testing.assert_array_equal(flatten(mean), np.ones(NUM_SMALL, np.float32))


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
    ("max_abs", "max_cases"),
    [(0.0, 1), (1025.0, 1), (math.inf, 1), (math.nan, 1), (1.0, 0), (1.0, 2**24 + 1)],
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
