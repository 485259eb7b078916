"""Resampled volumes against ground truth in world coordinates, highdicom and numerical averages."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import highdicom as hd
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.volume import Volume
from fedward_client.dicom.volume_grid import View, resample, resample_labels, target_grid
from fedward_common.errors import PlanError
from tests.client.series_builder import (
    Floats,
    a_truth,
    files_of,
    part_in_place,
    rotation,
    slices_of,
    volumes_of,
)

RAMP = np.array((0.9, -0.6, 0.35))
AXIAL = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])  # (slice, row, column) to RAS
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def a_volume(values: NDArray[Any], affine: Floats = AXIAL, fill: float | None = None) -> Volume:
    return Volume(values.astype(np.float32), affine, "HU", False, None, "LINEAR", fill)


def an_affine(
    axes: Floats, spacing: tuple[float, float, float], origin: tuple[float, float, float]
) -> Floats:
    """(slice, row, column) to RAS; the columns of `axes` are their directions."""
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = origin
    return affine


def a_ramp(shape: tuple[int, int, int], affine: Floats) -> Volume:
    index = np.indices(shape).reshape(3, -1)
    values = RAMP @ (affine[:3, :3] @ index + affine[:3, 3:])
    return a_volume(values.reshape(shape), affine)


def noise(shape: tuple[int, int, int], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def in_source(volume: Volume, source: Volume, margin_mm: float) -> tuple[NDArray[np.bool_], Floats]:
    """Which voxels lie in the source, at least a margin from its outermost centres, and their RAS places."""
    index = np.indices(volume.values.shape).reshape(3, -1)
    ras = volume.affine[:3, :3] @ index + volume.affine[:3, 3:]
    there = np.linalg.solve(source.affine[:3, :3], ras - source.affine[:3, 3:])
    edge = margin_mm / np.linalg.norm(source.affine[:3, :3], axis=0)[:, None]
    last = np.array(source.values.shape)[:, None] - 1
    inside = np.all((there >= edge - 1e-9) & (there <= last - edge + 1e-9), axis=0)
    return inside.reshape(volume.values.shape), ras


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 5.0)] * 3),
    wanted=st.none() | st.tuples(*[st.floats(0.3, 9.0)] * 3),
    size=st.tuples(*[st.integers(1, 16)] * 3),
    view=st.sampled_from(["acquired", "axial", "coronal", "sagittal"]),
)
def test_a_ramp_through_the_patient_stays_in_its_place(
    seed: int,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    wanted: tuple[float, float, float] | None,
    size: tuple[int, int, int],
    view: View,
) -> None:
    source = a_ramp(shape, an_affine(rotation(seed).T, spacing, (12.0, -7.0, 300.0)))
    volume = resample(source, wanted, size, view=view)
    assert volume.values.shape == size
    assert volume.values.dtype == np.float32
    coarsest = max(np.linalg.norm(volume.affine[:3, :3], axis=0))
    inside, ras = in_source(volume, source, coarsest / 2)
    true = (RAMP @ ras).reshape(size)
    np.testing.assert_allclose(volume.values[inside], true[inside], atol=2e-3)
    if wanted is not None:
        np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, :3], axis=0), wanted, rtol=0.03)


@settings(deadline=None, max_examples=40)
@given(
    num=st.integers(1, 30),
    wanted=st.integers(1, 40),
    axis=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_a_new_voxel_is_the_mean_of_the_line_through_the_old_ones(
    num: int, wanted: int, axis: int, seed: int
) -> None:
    line = noise((num, 1, 1), seed).ravel()
    shape, size = [1, 1, 1], [1, 1, 1]
    shape[axis], size[axis] = num, wanted
    found = resample(a_volume(line.reshape(shape)), None, (size[0], size[1], size[2])).values.ravel()
    # Axial slices as they are shown: AXIAL turns no axis, so the order of the line stays.
    step = num / wanted
    stretch = np.linspace(-0.5, 0.5, 20_001) * max(0.0, step - 1)
    for number, value in enumerate(found):
        centre = (number + 0.5) * step - 0.5
        assert value == pytest.approx(np.interp(centre + stretch, np.arange(num), line).mean(), abs=2e-4)


def test_what_has_its_spacing_and_size_already_keeps_every_value() -> None:
    values = noise((5, 8, 9))
    for spacing in (None, (1.0, 1.0, 1.0), (1.0001, 0.9999, 1.0)):
        same = resample(a_volume(values), spacing, (5, 8, 9))
        np.testing.assert_array_equal(same.values, values)
        np.testing.assert_allclose(same.affine, AXIAL, atol=1e-12)
        assert (same.fill, same.units) == (None, "HU")


def test_cutting_and_padding_change_no_value_and_no_place() -> None:
    truth = a_truth(num_slices=6, size=(12, 9), axes=rotation(5), spacing=(0.8, 0.8))
    _, (source,) = volumes_of(files_of(slices_of(truth)))
    cut = resample(source, (2.5, 0.8, 0.8), (4, 7, 9))
    rows = np.linalg.solve(
        source.affine, cut.affine @ np.append(np.indices((4, 7, 9)).reshape(3, -1), np.ones((1, 252)), 0)
    )
    index = np.round(rows[:3]).astype(int)
    np.testing.assert_allclose(rows[:3], index, atol=1e-3)
    np.testing.assert_array_equal(cut.values.ravel(), source.values[tuple(index)])
    padded = resample(source, (2.5, 0.8, 0.8), (9, 20, 20))
    assert part_in_place(padded.values, padded.affine, truth) == 1.0
    assert padded.fill == source.values.min()
    assert (padded.values == np.float32(padded.fill)).sum() >= 9 * 20 * 20 - source.values.size


def test_padding_uses_the_fill_that_the_volume_has() -> None:
    padded = resample(a_volume(noise((3, 4, 4)), fill=-9.0), (1.0, 1.0, 1.0), (5, 4, 4))
    assert (padded.values[[0, -1]] == -9.0).all()
    assert padded.values[1:-1].min() > -9.0


def test_a_volume_thinner_than_one_voxel_is_in_one() -> None:
    for size in ((4, 4, 4), (5, 4, 4)):
        volume = resample(a_volume(np.full((1, 4, 4), 7.0), fill=0.0), (5.0, 1.0, 1.0), size)
        assert [float(each.max()) for each in volume.values] == [
            7.0 if number == 2 else 0.0 for number in range(size[0])
        ]


# Where slices, rows and columns run, in the letters of PatientOrientation; and the axis of RAS of each.
VIEWS: dict[View, tuple[str, list[int]]] = {
    "axial": ("HPL", [2, 1, 0]),
    "coronal": ("PFL", [1, 2, 0]),
    "sagittal": ("RFP", [0, 2, 1]),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_view_is_what_highdicom_makes_of_the_orientation(view: View, order: tuple[int, int, int]) -> None:
    letters, axes = VIEWS[view]
    spacing, shape = np.array((2.0, 0.7, 0.9)), np.array((4, 5, 6))
    sources = [order.index(axis) for axis in axes]
    for signs in product((1, -1), repeat=3):
        affine = an_affine(np.eye(3)[:, order] * signs, (2.0, 0.7, 0.9), (5.0, -6.0, 7.0))
        values = noise((4, 5, 6))
        first, second, third = shape[sources].tolist()
        wanted = spacing[sources].tolist()
        volume = resample(a_volume(values, affine), wanted, (first, second, third), view=view)
        theirs = hd.volume.Volume(values, LPS @ affine, "PATIENT").to_patient_orientation(letters)
        np.testing.assert_array_equal(volume.values, theirs.array)
        np.testing.assert_allclose(volume.affine, LPS @ theirs.affine, atol=1e-9)


def test_acquired_slices_stay_slices_and_patients_lie_the_same_way() -> None:
    supine, prone = AXIAL, AXIAL * np.array([-1.0, -1.0, 1.0, 1.0])[:, None]
    values = noise((3, 4, 5))
    one = resample(a_volume(values, supine), (1.0, 1.0, 1.0), (3, 4, 5))
    other = resample(a_volume(values[:, ::-1, ::-1], prone), (1.0, 1.0, 1.0), (3, 4, 5))
    np.testing.assert_array_equal(one.values, other.values)
    sagittal = an_affine(np.array([[1, 0, 0], [0, 0, -1], [0, -1, 0.0]]), (3.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    kept = resample(a_volume(values, sagittal), (3.0, 1.0, 1.0), (3, 4, 5))
    np.testing.assert_array_equal(kept.values, values)


@pytest.mark.parametrize("angle", [44.0, 45.0, 46.0])
@pytest.mark.parametrize("digits", range(2))
def test_rounding_does_not_decide_between_two_views_that_fit_alike(angle: float, digits: int) -> None:
    radians = np.radians(angle)
    turn = np.array(
        [[1, 0, 0], [0, np.cos(radians), -np.sin(radians)], [0, np.sin(radians), np.cos(radians)]]
    )
    affine = AXIAL.copy()
    affine[:3, :3] = turn @ AXIAL[:3, :3] * (1 + digits * 1e-7) + digits * 1e-9
    grid = target_grid((4, 4, 4), affine, None, (4, 4, 4))
    upright = target_grid((4, 4, 4), AXIAL, None, (4, 4, 4))
    if angle <= 45:
        assert (grid.axes, grid.flipped) == (upright.axes, upright.flipped)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    spacing=st.none() | st.tuples(*[st.floats(0.5, 3.0)] * 3),
    size=st.tuples(*[st.integers(1, 12)] * 3),
    view=st.sampled_from(["acquired", "axial", "coronal", "sagittal"]),
)
def test_labels_go_where_their_voxels_go(
    seed: int, spacing: tuple[float, float, float] | None, size: tuple[int, int, int], view: View
) -> None:
    affine = an_affine(rotation(seed).T, (2.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    labels = np.random.default_rng(seed).integers(1, 200, (6, 9, 8)).astype(np.uint8)
    grid = target_grid(labels.shape, affine, spacing, size, view=view)
    volume = resample(a_volume(np.ones((6, 9, 8)), affine, fill=0.0), spacing, size, view=view)
    found = resample_labels(labels, grid)
    np.testing.assert_array_equal(grid.affine, volume.affine)
    np.testing.assert_array_equal(found > 0, volume.values > 0.5)
    index = np.indices(size).reshape(3, -1)
    there = np.linalg.solve(affine, grid.affine @ np.append(index, np.ones((1, index.shape[1])), 0))[:3]
    nearest = np.round(there).astype(int)
    sure = (np.abs(there - nearest) < 0.49).all(axis=0) & (found.ravel() > 0)
    np.testing.assert_array_equal(found.ravel()[sure], labels[tuple(nearest[:, sure])])


@pytest.mark.parametrize(
    ("spacing", "size"),
    [
        (None, (0, 4, 4)),
        (None, (4096, 4096, 4096)),
        (None, (4, 4)),
        ((0.0, 1.0, 1.0), (4, 4, 4)),
        ((1.0, float("nan"), 1.0), (4, 4, 4)),
        ((1.0, 1.0, 1e9), (4, 4, 4)),
        ((1.0, 1.0), (4, 4, 4)),
    ],
)
def test_an_impossible_grid_is_the_plans_mistake(spacing: Any, size: Any) -> None:
    with pytest.raises(PlanError) as caught:
        resample(a_volume(noise((3, 3, 3))), spacing, size)
    assert caught.value.remedy


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_voxel_that_is_no_number_does_not_spread(value: float) -> None:
    values = noise((3, 3, 3))
    values[1, 1, 1] = value
    with pytest.raises(UnusableImageError) as caught:
        resample(a_volume(values), None, (2, 2, 2))
    assert caught.value.reason is Reason.DISPLAY_VALUES
