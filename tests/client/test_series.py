"""Which volumes a series is, from headers alone: every case by name, none by a guess."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedward_client.dicom.geometry import Handled
from fedward_client.dicom.refusal import Reason
from fedward_client.dicom.series import SeriesVerdict, SliceFacts, group_series
from tests.client.series_builder import Truth, a_truth, rotation

AXIAL = np.eye(3)
SAGITTAL = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, -1.0], [-1.0, 0.0, 0.0]])
CORONAL = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])


def facts_of(truth: Truth, name: str = "slice", first: int = 1, **changes: Any) -> list[SliceFacts]:
    """Header facts of each slice, in order along the normal; InstanceNumber counts from `first`."""
    return (
        [
            SliceFacts(
                content=f"{name} {number:04d}",
                frame_index=0,
                series="1.2.3",
                study="1.2",
                modality="CT",
                rows=truth.values.shape[1],
                columns=truth.values.shape[2],
                position=tuple(origin.tolist()),
                orientation=tuple(truth.axes[:2].ravel().tolist()),
                pixel_spacing=truth.spacing,
                image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
                instance_number=first + number,
                slice_thickness=2.5,
            )
            for number, origin in enumerate(truth.origins)
        ]
        if not changes
        else [replace(each, **changes) for each in facts_of(truth, name, first)]
    )


def time_series(
    num_times: int, num_slices: int = 5, *, by_position: bool = False, **changes: Any
) -> list[SliceFacts]:
    """Volumes at the same positions, numbered volume after volume or position after position."""
    truth = a_truth(num_slices=num_slices)
    found = []
    for time in range(num_times):
        for number, each in enumerate(facts_of(truth, f"time {time}", **changes)):
            index = number * num_times + time if by_position else time * num_slices + number
            found.append(replace(each, instance_number=index + 1))
    return found


def contents(verdict: SeriesVerdict) -> list[list[str]]:
    return [[each.content for each in volume.slices] for volume in verdict.volumes]


def refusals(verdict: SeriesVerdict) -> set[Reason]:
    return {reason for _, _, reason in verdict.dropped}


def test_slices_come_in_the_order_of_their_positions_whatever_their_names_and_numbers() -> None:
    slices = facts_of(a_truth(num_slices=20))
    expected = [each.content for each in slices]
    numbers = list(range(20))
    random.Random(1).shuffle(numbers)
    renumbered = [replace(each, instance_number=number) for each, number in zip(slices, numbers, strict=True)]
    for series in (
        slices,
        slices[::-1],
        renumbered,
        [replace(each, instance_number=None) for each in slices],
    ):
        verdict = group_series(series)
        assert contents(verdict) == [expected]
        assert (verdict.refused, verdict.dropped, verdict.volumes[0].handled) == (None, (), ())


def test_a_file_held_twice_counts_once() -> None:
    slices = facts_of(a_truth())
    verdict = group_series([*slices, slices[3]])
    assert len(verdict.volumes[0].slices) == 7
    assert verdict.dropped == ((slices[3].content, 0, Reason.DUPLICATE),)


def test_slices_of_two_series_are_a_mistake_of_the_caller() -> None:
    one, other = facts_of(a_truth(num_slices=2))
    with pytest.raises(ValueError, match="one series"):
        group_series([one, replace(other, series="9.9")])
    with pytest.raises(ValueError, match="one series"):
        group_series([])


@pytest.mark.parametrize("missing", ["position", "orientation", "pixel_spacing"])
def test_a_slice_without_place_refuses_the_series(missing: str) -> None:
    slices = facts_of(a_truth())
    nothing: dict[str, Any] = {missing: None}
    slices[2] = replace(slices[2], **nothing)
    verdict = group_series(slices)
    assert (verdict.refused, verdict.volumes) == (Reason.NO_POSITION, ())
    assert len(verdict.dropped) == 7


@pytest.mark.parametrize(
    "change",
    [
        {"position": (0.0, float("nan"), 0.0)},
        {"position": (0.0, 1e9, 0.0)},
        {"orientation": (1.0, 0.0, 0.0, 0.9, 0.1, 0.0)},
        {"orientation": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)},
        {"pixel_spacing": (0.0, 0.5)},
        {"pixel_spacing": (0.5, float("inf"))},
        {"rows": 0},
    ],
)
def test_impossible_geometry_is_no_geometry(change: dict[str, Any]) -> None:
    verdict = group_series([replace(each, **change) for each in facts_of(a_truth())])
    assert verdict.refused is Reason.NO_POSITION


def test_a_captured_screen_in_the_series_is_left_out_by_name() -> None:
    slices = facts_of(a_truth())
    screen = replace(
        slices[0], content="screen", position=None, rows=600, image_type=("DERIVED", "SECONDARY")
    )
    verdict = group_series([screen, *slices])
    assert len(verdict.volumes) == 1
    assert verdict.dropped == (("screen", 0, Reason.NO_POSITION),)


def test_localizers_are_left_out_by_image_type() -> None:
    slices = facts_of(a_truth())
    scouts = facts_of(a_truth(num_slices=2), "scout", image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))
    verdict = group_series([*scouts, *slices])
    assert contents(verdict) == [[each.content for each in slices]]
    assert refusals(verdict) == {Reason.LOCALIZER}
    assert group_series(scouts).refused is Reason.LOCALIZER


def test_a_single_image_across_the_stack_is_a_localizer_whatever_its_type() -> None:
    slices = facts_of(a_truth())
    scout = facts_of(a_truth(num_slices=1, axes=CORONAL, size=(40, 30)), "scout")
    verdict = group_series([*slices, *scout])
    assert contents(verdict) == [[each.content for each in slices]]
    assert verdict.dropped == (("scout 0000", 0, Reason.LOCALIZER),)
    twice = group_series([*slices, *scout, replace(scout[0], content="scout again")])
    assert contents(twice) == contents(verdict)
    assert refusals(twice) == {Reason.LOCALIZER}


def test_a_single_slice_of_nearly_the_same_orientation_refuses_the_series() -> None:
    slices = facts_of(a_truth())
    turned = facts_of(a_truth(num_slices=1, axes=leaning(3), origin=(-40, 12.5, 400)), "turned")
    assert group_series([*slices, *turned]).refused is Reason.MIXED_ORIENTATION


def seen_from_behind(each: SliceFacts) -> SliceFacts:
    """Mirrored: rows run the other way."""
    assert each.orientation is not None
    return replace(each, orientation=(*(-value for value in each.orientation[:3]), *each.orientation[3:]))


def upside_down(each: SliceFacts) -> SliceFacts:
    assert each.orientation is not None
    return replace(each, orientation=tuple(-value for value in each.orientation))


@pytest.mark.parametrize("change", [seen_from_behind, upside_down])
@pytest.mark.parametrize("changed", [[3], [3, 4], [0, 1, 2, 3], [1, 3, 5], range(6)])
def test_slices_that_are_turned_against_the_others_refuse_the_series(
    change: Callable[[SliceFacts], SliceFacts], changed: Sequence[int]
) -> None:
    slices = facts_of(a_truth())
    turned = [change(each) if number in changed else each for number, each in enumerate(slices)]
    again = replace(turned[3], content="sent again")
    for series in (turned, [*turned, again]):
        assert group_series(series).refused is Reason.MIXED_ORIENTATION
    every = group_series([change(each) for each in slices])
    assert every.refused is None


def test_volumes_that_follow_the_head_are_volumes_and_parts_of_one_are_not() -> None:
    before, after = facts_of(a_truth(), "before"), facts_of(a_truth(axes=leaning(0.3)), "after")
    assert len(group_series([*before, *after]).volumes) == 2
    assert group_series([*before[:4], *after[4:]]).refused is Reason.MIXED_ORIENTATION
    assert group_series([*before[:3], *after[4:]]).refused is Reason.MIXED_ORIENTATION
    discs = [*facts_of(a_truth(), "disc 1")[:4], *facts_of(a_truth(axes=leaning(12)), "disc 2")]
    assert len(group_series(discs).volumes) == 2


def test_slices_that_all_point_elsewhere_are_refused() -> None:
    radial = [facts_of(a_truth(num_slices=1, axes=rotation(seed)), f"radial {seed}")[0] for seed in range(9)]
    assert group_series(radial).refused is Reason.MIXED_ORIENTATION


def test_stacks_of_different_orientation_become_volumes_of_their_own() -> None:
    stacks = [
        facts_of(a_truth(num_slices=6, axes=axes), name)
        for axes, name in ((AXIAL, "axial"), (SAGITTAL, "sagittal"), (CORONAL, "coronal"))
    ]
    verdict = group_series([each for stack in stacks for each in stack])
    assert sorted(contents(verdict)) == sorted([each.content for each in stack] for stack in stacks)


def test_one_stack_with_a_hole_does_not_cost_the_other() -> None:
    axial, sagittal = facts_of(a_truth(), "axial"), facts_of(a_truth(axes=SAGITTAL), "sagittal")
    verdict = group_series([*axial, *sagittal[:3], *sagittal[4:]])
    assert contents(verdict) == [[each.content for each in axial]]
    assert refusals(verdict) == {Reason.MISSING_SLICES}
    assert verdict.refused is None


@pytest.mark.parametrize("change", [{"rows": 14}, {"columns": 10}, {"pixel_spacing": (0.8, 0.81)}])
def test_parallel_slices_of_different_grids_are_refused(change: dict[str, Any]) -> None:
    slices = facts_of(a_truth(size=(64, 64)))
    mixed = [*slices[:4], *(replace(each, **change) for each in slices[4:])]
    assert group_series(mixed).refused is Reason.MIXED_GRID


def test_two_frames_of_reference_are_refused() -> None:
    slices = facts_of(a_truth())
    mixed = [replace(each, frame_of_reference=f"1.{number % 2}") for number, each in enumerate(slices)]
    assert group_series(mixed).refused is Reason.MIXED_SERIES


@pytest.mark.parametrize("missing", [[3], [1], [3, 4], [2, 5]])
def test_missing_slices_are_refused(missing: list[int]) -> None:
    slices = facts_of(a_truth(num_slices=12))
    left = [each for number, each in enumerate(slices) if number not in missing]
    assert group_series(left).refused is Reason.MISSING_SLICES


def test_every_second_slice_missing_from_half_of_the_series_is_refused() -> None:
    slices = facts_of(a_truth(num_slices=20))
    assert group_series([*slices[:10], *slices[11::2]]).refused is Reason.MISSING_SLICES


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("stated", ["slice_thickness", "spacing_between"])
def test_a_series_of_which_only_every_second_slice_came_is_refused(step: int, stated: str) -> None:
    nominal: dict[str, Any] = {"slice_thickness": 9.0, stated: 2.5}
    thinned = [replace(each, **nominal) for each in facts_of(a_truth(num_slices=12))][::step]
    assert group_series(thinned).refused is Reason.MISSING_SLICES
    assert group_series(thinned[:2]).refused is Reason.MISSING_SLICES
    changes: list[dict[str, Any]] = [
        {"instance_number": None},
        {stated: None, "slice_thickness": None},
        {stated: 9.0},
    ]
    for change in changes:
        assert group_series([replace(each, **change) for each in thinned]).refused is None
    counted = [replace(each, instance_number=number) for number, each in enumerate(thinned)]
    assert group_series(counted).refused is None  # gaps between slices


def test_numbers_that_another_volume_has_are_not_missing() -> None:
    """Two echoes, numbered by turns, with as much between the slices as they are thick."""
    slices = [
        replace(each, echo=echo, instance_number=2 * number + echo, content=f"{echo} {number}")
        for echo in (1, 2)
        for number, each in enumerate(facts_of(a_truth(distances=5.0)))
    ]
    assert [len(volume.slices) for volume in group_series(slices).volumes] == [7, 7]
    assert group_series(slices[:7]).refused is Reason.MISSING_SLICES


def leaning(degrees: float) -> NDArray[np.float64]:
    """Axes of slices that lean to the back."""
    angle = np.radians(degrees)
    return np.array([[1, 0, 0], [0, np.cos(angle), np.sin(angle)], [0, -np.sin(angle), np.cos(angle)]])


def test_more_orientations_than_anybody_acquires_are_refused_at_once() -> None:
    pairs = [
        each
        for number in range(65)
        for each in facts_of(a_truth(num_slices=2, axes=leaning(2.7 * number)), f"{number}")
    ]
    assert len(group_series(pairs[:128]).volumes) == 64
    assert group_series(pairs).refused is Reason.MIXED_ORIENTATION


def test_a_protocol_that_changes_its_thickness_has_no_missing_slices() -> None:
    distances = (2.5,) * 6 + (3.75,) + (5.0,) * 6
    slices = facts_of(a_truth(distances=distances))
    thick = [replace(each, slice_thickness=2.5 if number < 7 else 5.0) for number, each in enumerate(slices)]
    verdict = group_series(thick)
    assert verdict.volumes[0].handled == (Handled.UNEQUAL_SPACING,)
    assert group_series(slices).refused is Reason.MISSING_SLICES
    del thick[3]
    assert group_series(thick).refused is Reason.MISSING_SLICES


def test_distances_that_change_a_little_are_handled_and_much_are_refused() -> None:
    little = facts_of(a_truth(distances=(2.5, 2.7, 2.4, 3.1, 2.5, 2.6)))
    assert group_series(little).volumes[0].handled == (Handled.UNEQUAL_SPACING,)
    assert group_series(little[::-1]).volumes[0].handled == (Handled.UNEQUAL_SPACING,)
    for distances in ((2.5, 2.5, 4.2, 2.5, 2.5), (2.5, 2.5, 0.2, 2.5, 2.5)):
        assert group_series(facts_of(a_truth(distances=distances))).refused is Reason.UNEQUAL_SPACING


def test_unequal_distances_with_alternating_numbers_are_two_volumes_and_refused() -> None:
    moved = facts_of(a_truth(distances=(2.5, 3.5) * 4))
    numbers = [1, 6, 2, 7, 3, 8, 4, 9, 5]
    slices = [replace(each, instance_number=number) for each, number in zip(moved, numbers, strict=True)]
    assert group_series(slices).refused is Reason.UNEQUAL_SPACING


def test_positions_printed_with_one_decimal_are_still_regular() -> None:
    truth = a_truth(num_slices=40, distances=1.25, origin=(-40.0, 12.0, 300.0))
    rounded = replace(truth, origins=np.round(truth.origins, 1))
    verdict = group_series(facts_of(rounded))
    assert verdict.volumes[0].handled == ()
    np.testing.assert_allclose(verdict.volumes[0].spacing_mm, (1.25, 0.8, 0.8), atol=2e-3)


def test_slices_shifted_in_their_plane_are_refused() -> None:
    truth = a_truth()
    origins = truth.origins.copy()
    origins[3, 0] += 4.0
    assert group_series(facts_of(replace(truth, origins=origins))).refused is Reason.MISALIGNED
    side_by_side = np.array([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0], [100.0, 0.0, 0.0]])
    tiles = replace(truth.part(range(3)), origins=side_by_side)
    assert group_series(facts_of(tiles)).refused is Reason.MISALIGNED


def test_tilt_is_found_from_positions_alone() -> None:
    for stated in (15.0, -15.0, 0.0, None):
        verdict = group_series(facts_of(a_truth(tilt_degrees=15), gantry_tilt=stated))
        assert verdict.volumes[0].handled == (Handled.GANTRY_TILT,)


def test_a_stated_tilt_that_the_positions_deny_is_refused_for_original_ct() -> None:
    upright = a_truth()
    assert group_series(facts_of(upright, gantry_tilt=15.0)).refused is Reason.GANTRY_TILT
    assert group_series(facts_of(a_truth(tilt_degrees=10), gantry_tilt=15.0)).refused is Reason.GANTRY_TILT
    reformatted = facts_of(upright, gantry_tilt=15.0, image_type=("DERIVED", "SECONDARY", "REFORMATTED"))
    assert group_series(reformatted).refused is None


def test_impossible_tilt_is_refused() -> None:
    assert group_series(facts_of(a_truth(tilt_degrees=60))).refused is Reason.GANTRY_TILT


def test_a_volume_that_fits_no_memory_is_refused() -> None:
    slices = facts_of(a_truth(num_slices=9), rows=16384, columns=16384)
    assert group_series(slices).refused is Reason.OVER_LIMIT


def test_a_single_slice_needs_its_thickness() -> None:
    slices = facts_of(a_truth(num_slices=1))
    volume = group_series(slices).volumes[0]
    assert (volume.handled, volume.spacing_mm) == ((Handled.SINGLE_SLICE,), (2.5, 0.8, 0.8))
    for thickness in (None, 0.0, -1.0):
        assert group_series([replace(slices[0], slice_thickness=thickness)]).refused is Reason.SINGLE_SLICE


def expected_times(num_times: int, num_slices: int = 5) -> list[list[str]]:
    return [[f"time {time} {number:04d}" for number in range(num_slices)] for time in range(num_times)]


@pytest.mark.parametrize(
    "key",
    [
        "temporal_position",
        "acquisition_number",
        "acquisition_time",
        "trigger",
        "b_value",
        "echo",
        "echo_time",
    ],
)
@pytest.mark.parametrize("by_position", [False, True])
def test_whatever_numbers_the_volumes_divides_them(key: str, by_position: bool) -> None:
    slices = time_series(12, by_position=by_position)
    value = str if key == "acquisition_time" else int
    numbered = []
    for each in slices:
        change: dict[str, Any] = {key: value(f"{int(each.content.split()[1]) + 10}")}
        numbered.append(replace(each, instance_number=None, **change))
    verdict = group_series(numbered)
    assert contents(verdict) == expected_times(12)
    assert [volume.label[0][0] for volume in verdict.volumes] == [key] * 12


@pytest.mark.parametrize("by_position", [False, True])
def test_instance_numbers_divide_time_points_by_their_arithmetic(by_position: bool) -> None:
    verdict = group_series(time_series(4, by_position=by_position))
    assert contents(verdict) == expected_times(4)


def test_time_points_with_a_slice_missing_are_left_out_by_name() -> None:
    slices = time_series(6)
    for lost in ([slices[-1]], slices[-3:], [slices[12]], [slices[7], slices[28]]):
        verdict = group_series([each for each in slices if each not in lost])
        times = {int(each.content.split()[1]) for each in lost}
        assert contents(verdict) == [
            times_of for number, times_of in enumerate(expected_times(6)) if number not in times
        ]
        assert refusals(verdict) == {Reason.INCOMPLETE_VOLUME}


def test_a_first_slice_missing_does_not_shift_time_points() -> None:
    slices = time_series(4)
    assert group_series(slices[1:]).refused is Reason.VOLUMES_UNCLEAR
    assert group_series(slices[2:]).refused is Reason.VOLUMES_UNCLEAR
    whole_volume_missing = group_series(slices[5:])
    assert contents(whole_volume_missing) == expected_times(4)[1:]


def test_position_after_position_with_a_slice_missing_is_refused() -> None:
    slices = time_series(4, by_position=True)
    for lost in (0, 7, 19):
        left = [each for number, each in enumerate(slices) if number != lost]
        assert group_series(left).refused is Reason.VOLUMES_UNCLEAR
    both = [each for each in slices if each.instance_number not in (1, 7)]
    assert group_series(both).refused is Reason.VOLUMES_UNCLEAR


def left_of(slices: Sequence[SliceFacts], *lost: int) -> list[SliceFacts]:
    return [each for number, each in enumerate(slices) if number not in lost]


def test_two_slices_a_volume_do_not_show_where_a_volume_begins() -> None:
    slices = time_series(5, num_slices=2)
    assert contents(group_series(slices)) == expected_times(5, 2)
    for lost in ([0], [0, 1, 2], [0, 9]):
        assert group_series(left_of(slices, *lost)).refused is Reason.VOLUMES_UNCLEAR
    turns = time_series(5, num_slices=2, by_position=True)
    assert contents(group_series(turns)) == expected_times(5, 2)
    assert group_series(left_of(turns, 0, 9)).refused is Reason.VOLUMES_UNCLEAR


def taken_by_turns(num_times: int, order: Sequence[int], first: int) -> list[SliceFacts]:
    """Volume after volume, the slices of each in this order."""
    slices = time_series(num_times, num_slices=len(order))
    rank = {place: number for number, place in enumerate(order)}
    return [
        replace(each, instance_number=first + index // len(order) * len(order) + rank[index % len(order)])
        for index, each in enumerate(slices)
    ]


@pytest.mark.parametrize("order", [(0, 2, 1), (0, 2, 1, 3), (0, 2, 4, 1, 3), (1, 3, 5, 0, 2, 4)])
def test_slices_taken_by_turns_are_divided_if_they_count_from_one(order: tuple[int, ...]) -> None:
    slices = taken_by_turns(4, order, first=1)
    assert contents(group_series(slices)) == expected_times(4, len(order))
    lost = order[0]  # the very first one
    assert group_series(left_of(slices, lost)).refused is Reason.VOLUMES_UNCLEAR
    from_zero = taken_by_turns(4, order, first=0)
    assert group_series(left_of(from_zero, lost)).refused is Reason.VOLUMES_UNCLEAR


def test_blocks_that_begin_in_the_middle_of_an_ascending_stack_are_refused() -> None:
    slices = [replace(each, instance_number=number + 4) for number, each in enumerate(time_series(4))]
    assert group_series(left_of(slices, 0, 1)).refused is Reason.VOLUMES_UNCLEAR


def test_positions_that_only_other_volumes_have_are_missing() -> None:
    slices = time_series(6, temporal_position=1)
    slices = [replace(each, temporal_position=index // 5) for index, each in enumerate(slices)]
    verdict = group_series(left_of(slices, 0, 9))  # as many left of both, and both incomplete
    assert contents(verdict) == expected_times(6)[2:]
    assert refusals(verdict) == {Reason.INCOMPLETE_VOLUME}
    shorter = left_of(slices, 0, 9, 10, 19, 21)
    assert group_series(shorter).refused is Reason.VOLUMES_UNCLEAR


def test_phases_that_run_into_one_another_need_another_witness() -> None:
    def phases(**changes: Any) -> list[SliceFacts]:
        """Heart beats of 800 to 1200 ms: late phases of one position come after those of another."""
        return [
            replace(
                each, trigger=(40.0 + 5 * number) * time, instance_number=4 * number + time + 1, **changes
            )
            for time in range(4)
            for number, each in enumerate(facts_of(a_truth(num_slices=5), f"time {time}"))
        ]

    assert contents(group_series(phases())) == expected_times(4)
    without = [replace(each, instance_number=None) for each in phases()]
    assert group_series(without).refused is Reason.VOLUMES_UNCLEAR


def test_phases_of_which_each_position_lost_another_are_refused() -> None:
    slices = [
        replace(each, trigger=40.0 * (index // 5), instance_number=None)
        for index, each in enumerate(time_series(4))
    ]
    assert group_series(left_of(slices, 0, 6, 12, 18, 4)).refused is Reason.VOLUMES_UNCLEAR


def test_a_fact_that_names_too_few_volumes_still_speaks_against_an_order() -> None:
    slices = [
        replace(each, trigger=40.0 * index, acquisition_number=index // 3, instance_number=None)
        for index, each in enumerate(time_series(4, num_slices=3))
    ]
    slices = [replace(each, trigger=40.0 * (index // 3)) for index, each in enumerate(slices)]
    left = left_of(slices, 3, 4, 5, 7, 9, 11)  # two at each position; three acquisitions, one of them whole
    assert group_series(left).refused is Reason.VOLUMES_UNCLEAR


def test_every_second_position_missing_from_all_times_is_refused() -> None:
    slices = [
        replace(each, acquisition_number=index % 4)
        for index, each in enumerate(
            sorted(time_series(4, num_slices=8, by_position=True), key=lambda each: each.instance_number or 0)
        )
    ]
    left = [each for index, each in enumerate(slices) if index // 4 % 2]
    assert refusals(group_series(left)) == {Reason.MISSING_SLICES}


def test_explanations_that_contradict_each_other_are_none() -> None:
    slices = [
        replace(each, acquisition_number=number % 2, acquisition_time=str(number // 5))
        for number, each in enumerate(time_series(2, num_slices=5))
    ]
    assert group_series(slices).refused is Reason.VOLUMES_UNCLEAR


def test_numbers_without_system_are_refused() -> None:
    slices = time_series(4)
    numbers = list(range(1, 21))
    random.Random(3).shuffle(numbers)
    mixed = [replace(each, instance_number=number) for each, number in zip(slices, numbers, strict=True)]
    assert group_series(mixed).refused is Reason.VOLUMES_UNCLEAR


def test_heart_phases_follow_the_order_of_their_trigger_times() -> None:
    phases = [
        replace(each, instance_number=None, trigger=40.0 * time + 1.5 * number)
        for time in range(3)
        for number, each in enumerate(facts_of(a_truth(num_slices=5), f"time {time}"))
    ]
    assert contents(group_series(phases)) == expected_times(3)
    assert group_series(phases[1:]).refused is Reason.VOLUMES_UNCLEAR


def test_trigger_times_that_contradict_the_numbers_are_refused() -> None:
    slices = [
        replace(each, trigger=float(number // 5 if number % 5 else 2 - number // 5) * 40.0 + number % 5)
        for number, each in enumerate(time_series(3))
    ]
    assert group_series(slices).refused is Reason.VOLUMES_UNCLEAR


def test_two_echoes_over_several_time_points_need_both_facts() -> None:
    slices = [
        replace(each, echo=echo, acquisition_number=time, instance_number=None)
        for time in range(3)
        for echo in (1, 2)
        for each in facts_of(a_truth(num_slices=5), f"time {time} echo {echo}")
    ]
    verdict = group_series(slices)
    assert [volume.label for volume in verdict.volumes] == [
        (("echo", echo), ("acquisition_number", time)) for echo in (1, 2) for time in range(3)
    ]
    assert all(len(volume.slices) == 5 for volume in verdict.volumes)


def test_echoes_numbered_alternately_are_divided_with_the_time_points() -> None:
    slices: list[SliceFacts] = []
    for time in range(3):
        for number in range(5):
            for echo in (1, 2):
                each = facts_of(a_truth(num_slices=5), f"time {time} echo {echo}")[number]
                slices.append(replace(each, echo=echo, instance_number=len(slices) + 1))
    verdict = group_series(slices)
    assert [len({each.content[:13] for each in volume.slices}) for volume in verdict.volumes] == [1] * 6


def test_diffusion_directions_of_one_b_value_are_divided_by_instance_number() -> None:
    slices = [
        replace(each, b_value=0.0 if int(each.content.split()[1]) == 0 else 1000.0) for each in time_series(7)
    ]
    verdict = group_series(slices)
    assert contents(verdict) == expected_times(7)
    assert [volume.label[0] for volume in verdict.volumes] == [("b_value", 0.0)] + [("b_value", 1000.0)] * 6


def test_temporal_positions_divide_even_where_the_patient_moved() -> None:
    volumes = [
        facts_of(
            a_truth(num_slices=5, origin=(-40, 12.5, 300 + 1.25 * time)),
            f"time {time}",
            temporal_position=time,
        )
        for time in range(2)
    ]
    assert contents(group_series([*volumes[0], *volumes[1]])) == expected_times(2)


def test_a_number_for_each_slice_is_no_time() -> None:
    slices = [replace(each, temporal_position=number) for number, each in enumerate(facts_of(a_truth()))]
    assert group_series(slices).refused is Reason.VOLUMES_UNCLEAR


def test_frames_of_one_file_are_divided_by_dimension_index_or_by_their_order() -> None:
    slices = [
        replace(
            each,
            content="file",
            frame_index=index,
            instance_number=1,
            dimensions=(1, index % 5 + 1, index // 5 + 1),
        )
        for index, each in enumerate(time_series(3))
    ]
    for series in (slices, [replace(each, dimensions=()) for each in slices]):
        verdict = group_series(series)
        assert [[each.frame_index for each in volume.slices] for volume in verdict.volumes] == [
            list(range(start, start + 5)) for start in (0, 5, 10)
        ]


def test_each_multi_frame_file_can_be_a_volume() -> None:
    slices = [
        replace(each, content=f"file {9 - time}", frame_index=number, instance_number=time)
        for time in range(3)
        for number, each in enumerate(facts_of(a_truth()))
    ]
    verdict = group_series(slices)
    assert [{each.content for each in volume.slices} for volume in verdict.volumes] == [
        {"file 9"},
        {"file 8"},
        {"file 7"},
    ]


def test_a_multi_frame_file_sent_twice_is_a_copy_of_every_slice() -> None:
    slices = [
        replace(each, content=name, frame_index=number, instance_number=1)
        for name in ("file", "file again")
        for number, each in enumerate(facts_of(a_truth()))
    ]
    (volume,) = group_series(slices).volumes
    assert (len(volume.slices), len(volume.copies)) == (7, 7)


def test_a_slice_sent_twice_under_another_name_is_a_copy_until_its_pixels_deny_it() -> None:
    slices = facts_of(a_truth())
    again = replace(slices[4], content="sent again")
    volume = group_series([*slices, again]).volumes[0]
    assert len(volume.slices) == 7
    assert [(kept.content, copy.content) for kept, copy in volume.copies] in (
        [("slice 0004", "sent again")],
        [("sent again", "slice 0004")],
    )
    assert volume.handled == (Handled.COPIES,)


def test_all_slices_sent_twice_are_copies_only_if_their_numbers_agree() -> None:
    slices = facts_of(a_truth())
    again = [replace(each, content=f"again {each.content}") for each in slices]
    assert len(group_series([*slices, *again]).volumes[0].copies) == 7
    random.Random(5).shuffle(again)
    renumbered = [replace(each, instance_number=20 + number) for number, each in enumerate(again)]
    assert group_series([*slices, *renumbered]).refused is Reason.VOLUMES_UNCLEAR


def test_identifiers_stay_out_of_every_repr() -> None:
    slices = facts_of(a_truth(), "CNRY", series="1.2.99999", study="1.2.88888")
    verdict = group_series([*slices, slices[0]])
    text = repr(slices) + repr(verdict) + repr(verdict.volumes)
    for canary in ("CNRY", "99999", "88888"):
        assert canary not in text


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_files_changes_nothing(seed: int) -> None:
    shuffled: list[SliceFacts]
    series: Sequence[list[SliceFacts]] = (
        facts_of(a_truth(tilt_degrees=12, distances=(2.5, 2.7, 2.4, 3.1))),
        time_series(4),
        [*facts_of(a_truth()), *facts_of(a_truth(num_slices=1, axes=CORONAL), "scout")],
        [*facts_of(a_truth()), *facts_of(a_truth(), "again")],
        time_series(4)[2:],
    )
    for slices in series:
        shuffled = list(slices)
        random.Random(seed).shuffle(shuffled)
        one, other = group_series(slices), group_series(shuffled)
        assert contents(one) == contents(other)
        assert (one.refused, set(one.dropped)) == (other.refused, set(other.dropped))
        for a_volume, same in zip(one.volumes, other.volumes, strict=True):
            np.testing.assert_array_equal(a_volume.affine, same.affine)
            assert (a_volume.shape, a_volume.label, a_volume.copies) == (same.shape, same.label, same.copies)


DERIVED = ("DERIVED", "SECONDARY", "MPR")


def lifted(truth: Truth, mm: float) -> Truth:
    return replace(truth, origins=truth.origins + mm * truth.axes[2])


@pytest.mark.parametrize("lift", [1.25, 0.4])
def test_derived_pictures_between_the_slices_are_a_volume_of_their_own(lift: float) -> None:
    """Stacked together they would be a grid as regular as any."""
    acquired = facts_of(a_truth(num_slices=9), "acquired")
    derived = facts_of(lifted(a_truth(num_slices=9), lift), "derived", 100, image_type=DERIVED)
    verdict = group_series(acquired + derived)
    assert (verdict.refused, verdict.dropped) == (None, ())
    found = {volume.label: [each.content for each in volume.slices] for volume in verdict.volumes}
    assert found == {
        (("kind", kind[:2]),): sorted(each.content for each in part)
        for kind, part in ((DERIVED, derived), (acquired[0].image_type, acquired))
    }


@pytest.mark.parametrize("place", [-300.0, 1.25, 9 * 2.5])
def test_a_derived_picture_at_a_place_of_its_own_is_left_out_by_name(place: float) -> None:
    picture = facts_of(lifted(a_truth(num_slices=1, size=(64, 64)), place), "screen", 10, image_type=DERIVED)
    verdict = group_series(facts_of(a_truth(num_slices=9)) + picture)
    assert [len(volume.slices) for volume in verdict.volumes] == [9]
    assert verdict.dropped == (("screen 0000", 0, Reason.MIXED_SERIES),)


def test_a_volume_that_goes_on_as_another_kind_is_refused() -> None:
    truth = a_truth(num_slices=9)
    rest = facts_of(truth.part([5, 6, 7, 8]), "rest", 6, image_type=("DERIVED", "PRIMARY", "AXIAL"))
    verdict = group_series(facts_of(truth.part([0, 1, 2, 3, 4])) + rest)
    assert (verdict.volumes, verdict.refused) == ((), Reason.MIXED_SERIES)


def test_a_slice_of_another_kind_is_missing_from_the_others() -> None:
    slices = facts_of(a_truth(num_slices=9))
    slices[4] = replace(slices[4], image_type=("DERIVED", "PRIMARY", "AXIAL"))
    verdict = group_series(slices)
    assert (verdict.volumes, verdict.refused) == ((), Reason.MISSING_SLICES)


def test_a_localizer_that_does_not_say_so_may_have_a_frame_of_reference_of_its_own() -> None:
    scout = facts_of(a_truth(num_slices=1, axes=CORONAL), "scout", frame_of_reference="1.9")
    verdict = group_series(facts_of(a_truth(num_slices=5), frame_of_reference="1.8") + scout)
    assert [len(volume.slices) for volume in verdict.volumes] == [5]
    assert verdict.dropped == (("scout 0000", 0, Reason.LOCALIZER),)


@pytest.mark.parametrize(
    ("present", "total", "refused"),
    [
        ((1, 2, 3), 3, None),
        ((1, 2, 3), None, None),
        ((1, 2), 3, Reason.MISSING_SLICES),
        ((1, 2), None, None),
        ((2, 3), None, Reason.MISSING_SLICES),
        ((1, 3), 3, Reason.MISSING_SLICES),
    ],
)
def test_an_image_sent_in_parts_needs_all_of_them(
    present: tuple[int, ...], total: int | None, refused: Reason | None
) -> None:
    truth = a_truth(num_slices=6)
    slices = [
        replace(
            each, content=f"part {part}", frame_index=index, concatenation="1.7", part=part, num_parts=total
        )
        for part in present
        for index, each in enumerate(facts_of(truth.part([2 * part - 2, 2 * part - 1])))
    ]
    assert group_series(slices).refused is refused
