"""Structure sets: contours drawn on the grid, against winding numbers, areas and hand-placed pixels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fedward_client.dicom import rtstruct
from fedward_client.dicom.label_grid import Grid
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.rtstruct import align_structures, fill_polygon, read_structures
from tests.label_builders import AXIAL, a_structure_set, a_volume, grid_of, written

Corners = NDArray[np.float64]
OBLIQUE = (0.955336489, 0.295520207, 0.0, 0.0, 0.0, -1.0)


def refusal(action: Any, *args: Any, **options: Any) -> Reason:
    with pytest.raises(UnusableImageError) as caught:
        action(*args, **options)
    assert caught.value.__cause__ is None
    return caught.value.reason


def box(top: float, left: float, bottom: float, right: float) -> Corners:
    return np.array([[top, left], [top, right], [bottom, right], [bottom, left]], float)


def circle(row: float, column: float, radius: float, num_corners: int = 64) -> Corners:
    angle = np.linspace(0, 2 * np.pi, num_corners, endpoint=False)
    return np.stack([row + radius * np.sin(angle), column + radius * np.cos(angle)], axis=1)


def windings(corners: Corners, rows: int, columns: int) -> NDArray[np.float64]:
    """How often a contour goes round each pixel centre: the sum of the angles under which edges are seen."""
    centres = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    seen = corners - centres[:, :, None, :].astype(float)
    following = np.roll(seen, -1, axis=2)
    cross = seen[..., 0] * following[..., 1] - seen[..., 1] * following[..., 0]
    angles: NDArray[np.float64] = np.arctan2(cross, (seen * following).sum(axis=-1))
    times: NDArray[np.float64] = angles.sum(axis=-1) / (2 * np.pi)
    return times


def drawn(
    slices: Sequence[Dataset],
    contours: Sequence[tuple[int, Corners]],
    grid: Grid | None = None,
    **options: Any,
) -> NDArray[np.bool_]:
    found = read_structures(written(a_structure_set(slices, contours, **options)))
    masks = align_structures(found, grid or grid_of(slices), {"tumour": "GTV"})
    assert masks.segments == ("tumour",)
    mask: NDArray[np.bool_] = masks.values[0]
    return mask


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 12))
def test_polygon_holds_the_centres_that_it_goes_round(seed: int, num_corners: int) -> None:
    """Corners at random, so edges cross: inside is what is gone round an odd number of times."""
    corners = np.random.default_rng(seed).uniform(-4, 24, (num_corners, 2))

    filled = fill_polygon(corners, 20, 18)

    times = windings(corners, 20, 18)
    assert np.abs(times - np.rint(times)).max() < 1e-6
    assert np.array_equal(filled, np.rint(times).astype(int) % 2 == 1)


def test_neighbours_share_an_edge_without_gap_or_overlap() -> None:
    """Edges through pixel centres: every centre belongs to exactly one of the four boxes."""
    parts = [box(0, 0, 5, 5), box(0, 5, 5, 9), box(5, 0, 8, 5), box(5, 5, 8, 9)]

    count = sum(fill_polygon(part, 10, 10).astype(int) for part in parts)

    assert np.array_equal(count, (np.add.outer(np.arange(10) < 8, np.zeros(10)) > 0) & (np.arange(10) < 9))


def test_area_of_a_large_circle_is_that_of_its_polygon() -> None:
    corners = circle(100.3, 99.6, 80, 400)

    assert fill_polygon(corners, 200, 200).sum() == pytest.approx(np.pi * 80**2, rel=2e-3)


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE, (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)])
def test_contours_lie_where_their_coordinates_say(orientation: Sequence[float]) -> None:
    slices = a_volume(5, 40, 30, orientation=orientation)
    contours = [(1, circle(20.2, 14.1, 9.4)), (3, box(3.5, 4.5, 30.5, 20.5))]

    mask = drawn(slices, contours)

    truth = np.zeros((5, 40, 30), bool)
    truth[1] = np.abs(windings(contours[0][1], 40, 30)) > 0.5
    truth[3, 4:31, 5:21] = True
    assert np.array_equal(mask, truth)


def test_hole_is_left_open_whichever_way_round_and_in_whichever_order() -> None:
    slices = a_volume(3, 40, 40)
    outer, inner = box(4.5, 4.5, 30.5, 30.5), box(10.5, 10.5, 20.5, 20.5)
    truth = np.zeros((3, 40, 40), bool)
    truth[1, 5:31, 5:31] = True
    truth[1, 11:21, 11:21] = False

    for contours in ([outer, inner], [inner, outer], [outer[::-1], inner], [outer, inner[::-1]]):
        assert np.array_equal(drawn(slices, [(1, each) for each in contours]), truth)
    keyhole = np.concatenate([outer, outer[:1], inner, inner[:1]])
    assert np.array_equal(drawn(slices, [(1, keyhole)]), truth)


def test_island_in_a_hole_and_two_islands() -> None:
    slices = a_volume(1, 40, 40)
    rings = [box(4.5, 4.5, 30.5, 30.5), box(10.5, 10.5, 20.5, 20.5), box(13.5, 13.5, 16.5, 16.5)]
    apart = box(33.5, 33.5, 36.5, 37.5)

    mask = drawn(slices, [(0, each) for each in [*rings, apart]])

    assert mask.sum() == 26 * 26 - 10 * 10 + 3 * 3 + 3 * 4


def test_volume_may_have_its_slices_in_the_other_order() -> None:
    slices = a_volume(4, 20, 20)
    contours = [(0, circle(10.1, 9.8, 5.3)), (2, circle(8.1, 9.8, 3.3))]

    assert np.array_equal(drawn(slices, contours, grid_of(slices[::-1])), drawn(slices, contours)[::-1])


def test_part_of_a_contour_outside_the_image_is_cut_off() -> None:
    mask = drawn(a_volume(1, 20, 20), [(0, box(-5.5, 14.5, 3.5, 40.5))])

    assert np.array_equal(
        np.argwhere(mask[0]), [[row, column] for row in range(4) for column in range(15, 20)]
    )


@pytest.mark.parametrize(
    ("contours", "options", "reason"),
    [
        ([(0, box(2, 2, 9, 9))], {"geometric_type": "OPEN_PLANAR"}, Reason.CONTOURS),
        ([(0, box(2, 2, 9, 9))], {"geometric_type": "POINT"}, Reason.CONTOURS),
        ([(0, box(2, 2, 9, 9)[:2])], {}, Reason.CONTOURS),
        ([(0, box(2, 2, 9, 9)), (0, box(5, 5, 12, 12))], {}, Reason.CONTOURS),
        ([(0, box(2, 2, 9, 9)), (0, box(2, 2, 9, 9))], {}, Reason.CONTOURS),
        ([], {}, Reason.NO_SEGMENT),
        ([(0, box(2, 2, 9, 9))], {"name": "PTV"}, Reason.NO_SEGMENT),
    ],
)
def test_contours_without_an_agreed_meaning_are_refused(
    contours: list[tuple[int, Corners]], options: dict[str, Any], reason: Reason
) -> None:
    assert refusal(drawn, a_volume(2, 20, 20), contours, **options) is reason


def test_contours_that_exclude_one_another_on_purpose_may_cross() -> None:
    contours = [(0, box(1.5, 1.5, 9.5, 9.5)), (0, box(5.5, 5.5, 12.5, 12.5))]

    mask = drawn(a_volume(1, 20, 20), contours, geometric_type="CLOSEDPLANAR_XOR")

    assert mask.sum() == 8 * 8 + 7 * 7 - 2 * 4 * 4


def moved(slices: Sequence[Dataset], axis: int, part: float) -> Grid:
    grid = grid_of(slices)
    affine = grid.affine.copy()
    affine[:3, 3] += part * affine[:3, axis]
    return Grid(affine, grid.shape, grid.frame_of_reference, grid.instances)


def test_contours_between_slices_or_beyond_them_are_refused() -> None:
    slices = a_volume(3, 20, 20)
    contours = [(1, box(2.5, 2.5, 9.5, 9.5))]

    assert drawn(slices, contours, moved(slices, 0, 0.05)).any()
    assert refusal(drawn, slices, contours, moved(slices, 0, 0.4)) is Reason.LABEL_GRID
    assert refusal(drawn, slices, contours, moved(slices, 0, 7)) is Reason.LABEL_GRID
    tilted = a_volume(3, 20, 20, orientation=OBLIQUE)
    fits = Grid(grid_of(tilted).affine, (3, 20, 20), grid_of(slices).frame_of_reference)
    assert refusal(drawn, slices, contours, fits) is Reason.LABEL_GRID


def test_another_frame_of_reference_is_refused() -> None:
    slices, other = a_volume(2), a_volume(2, name="other")

    assert refusal(drawn, slices, [(0, box(2, 2, 5, 5))], grid_of(other)) is Reason.FRAME_OF_REFERENCE


def test_missing_structure_may_be_declared_empty_and_two_of_one_name_never_fit() -> None:
    slices = a_volume(2)
    dataset = a_structure_set(slices, [(0, box(2, 2, 5, 5))])
    found = read_structures(written(dataset))
    assert not align_structures(found, grid_of(slices), {"x": "PTV"}, absent_is_empty=True).values.any()
    dataset.StructureSetROISequence = [*dataset.StructureSetROISequence, _twin(dataset)]

    twice = read_structures(written(dataset))

    assert refusal(align_structures, twice, grid_of(slices), {"x": "GTV"}) is Reason.NO_SEGMENT


def _twin(dataset: Dataset) -> Dataset:
    twin: Dataset = copy.deepcopy(dataset.StructureSetROISequence[0])
    twin.ROINumber = 2
    return twin


@pytest.mark.parametrize("value", ["nan", "1e400", "inf", "x", "", "1e7"])
def test_coordinates_that_are_no_places_are_refused(value: str) -> None:
    slices = a_volume(2)
    dataset = a_structure_set(slices, [(0, box(2, 2, 5, 5))])
    data = written(dataset)
    number = str(dataset.ROIContourSequence[0].ContourSequence[0].ContourData[3]).encode()
    broken = data.replace(number, value.encode().ljust(len(number)))

    assert broken != data
    assert (
        refusal(align_structures, read_structures(broken), grid_of(slices), {"x": "GTV"}) is Reason.CONTOURS
    )


def test_work_and_size_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = a_volume(1, 200, 200)
    contours = [(0, circle(100, 100, radius)) for radius in range(20, 90)]
    monkeypatch.setattr(rtstruct, "_MAX_FILLED_PIXELS", 20_000)
    assert refusal(drawn, slices, contours) is Reason.OVER_LIMIT
    monkeypatch.setattr(rtstruct, "_MAX_CROSSINGS", 100)
    assert refusal(fill_polygon, circle(100, 100, 80), 200, 200) is Reason.OVER_LIMIT
    monkeypatch.setattr(rtstruct, "_MAX_CONTOUR_BYTES", 100)
    assert refusal(drawn, slices, contours[:1]) is Reason.OVER_LIMIT
    monkeypatch.setattr(rtstruct, "_MAX_STRUCTURE_BYTES", 100)
    assert refusal(drawn, slices, contours[:1]) is Reason.OVER_LIMIT


def test_cut_files_are_refused_or_lack_the_structure_and_numbers_are_unique() -> None:
    slices = a_volume(2)
    dataset = a_structure_set(slices, [(0, box(2, 2, 5, 5))])
    whole = written(dataset)
    for length in range(0, len(whole), 61):
        try:
            found = read_structures(whole[:length])
        except UnusableImageError:
            continue
        assert refusal(align_structures, found, grid_of(slices), {"x": "GTV"}) is Reason.NO_SEGMENT
    dataset.StructureSetROISequence = [*dataset.StructureSetROISequence, *dataset.StructureSetROISequence]
    assert refusal(read_structures, written(dataset)) is Reason.MALFORMED
    assert refusal(read_structures, written(slices[0])) is Reason.SOP_CLASS


def test_names_and_identifiers_stay_out_of_repr() -> None:
    dataset = a_structure_set(a_volume(2), [(0, box(2, 2, 5, 5))], name="CNRYNAME")
    dataset.PatientID = "CNRYPATIENT"

    found = read_structures(written(dataset))

    assert "CNRY" not in repr(found)
    assert str(dataset.StudyInstanceUID) not in repr(found)
