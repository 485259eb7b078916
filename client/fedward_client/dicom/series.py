"""Decide which volumes the slices of a series are, or by which name they are refused (hop 2).

Headers only. File names never count, and InstanceNumber only where positions repeat. In this order: files
given twice, localizers, mosaics, slices without a place, mixed orientations, kinds and grids, repeated
positions, then the geometry of each volume (`geometry.py`). A slice that is left out is named with its
reason; a volume comes out only when every decision on the way was certain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, pairwise

import numpy as np

from fedward_client.dicom.geometry import (
    MAX_DEVIATION_MM,
    ORIENTATION_TOLERANCE,
    Grid,
    Handled,
    Plane,
    Points,
    grid_of,
    orthonormal,
    places_of,
    tilt_degrees,
    usable_position,
)
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.repeat_order import Label, Places
from fedward_client.dicom.repeats import Part, split_repeats
from fedward_client.dicom.series_kinds import divide_kinds, refuse_cut_concatenations, refuse_other_frames
from fedward_client.dicom.slice_facts import Content, SliceFacts, read_slice_facts, slice_facts

__all__ = [
    "SeriesVerdict",
    "SliceFacts",
    "VolumeGeometry",
    "group_series",
    "read_slice_facts",
    "slice_facts",
]

_MIN_STACK = 3
_MAX_STRAYS = 3
_MAX_STACKS = 64
_SAME_PLANE_DEGREES = 2.0
_TURNED = 0.1  # difference of cosines, 6 degrees
_STRAY_DEGREES = 10.0
_TILT_TOLERANCE_DEGREES = 1.0
_NOMINAL_TOLERANCE = 0.1

Dropped = tuple[Content, int, Reason]


@dataclass(frozen=True, eq=False)
class VolumeGeometry:
    """One volume, before its pixels are read.

    Attributes:
        slices: ascending along the normal, one at each position.
        copies: (kept, copy): slices sent twice; the volume holds only if their pixels agree.
        grid: shape and affine of the assembled volume, and how it is resampled.
        label: what sets it apart within its series, as (fact, value) pairs; () for the only volume.
        handled: what was found and dealt with.
    """

    slices: tuple[SliceFacts, ...] = field(repr=False)
    copies: tuple[tuple[SliceFacts, SliceFacts], ...] = field(repr=False)
    grid: Grid
    label: Label = field(repr=False)
    handled: tuple[Handled, ...]

    @property
    def affine(self) -> Points:
        """`(4, 4)` float64: (slice, row, column, 1) of the assembled volume to RAS mm."""
        return self.grid.affine

    @property
    def shape(self) -> tuple[int, int, int]:
        """(slices, rows, columns) of the assembled volume."""
        return self.grid.shape

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between slices, rows and columns of the assembled volume."""
        return self.grid.spacing_mm


@dataclass(frozen=True)
class SeriesVerdict:
    """What became of a series.

    Attributes:
        volumes: one for each stack, time point, echo ...; in that order.
        refused: why there is no volume; None when there is one.
        dropped: (content, frame index, reason) of each slice that is in no volume.
    """

    volumes: tuple[VolumeGeometry, ...]
    refused: Reason | None
    dropped: tuple[Dropped, ...] = field(repr=False)


@dataclass(frozen=True, eq=False, slots=True)
class _Placed:
    """A slice with its checked place; `axes` `(2, 3)` are the directions of its rows and columns."""

    facts: SliceFacts
    axes: Points

    @property
    def normal(self) -> Points:
        return np.cross(self.axes[0], self.axes[1])


def group_series(slices: Sequence[SliceFacts]) -> SeriesVerdict:
    """Find the volumes of one series.

    Args:
        slices: all slices that the site has of one series, in any order.

    Raises:
        ValueError: no slice, or slices of several series: a mistake of the caller.
    """
    if len({each.series for each in slices}) != 1:
        raise ValueError("slices of exactly one series are needed")
    dropped: list[Dropped] = []
    kept = _drop_twice(sorted(slices, key=_order), dropped)
    volumes: list[VolumeGeometry] = []
    try:
        refuse_cut_concatenations(kept)
        for stack in _stacks(_placed(_drop_localizers(kept, dropped), dropped), dropped):
            volumes += _volumes_of(stack, dropped)
    except UnusableImageError as error:
        named = {(content, index) for content, index, _ in dropped}
        left = [each for each in kept if (each.content, each.frame_index) not in named]
        dropped += _all(left, error.reason)
        return SeriesVerdict((), error.reason, tuple(dropped))
    return SeriesVerdict(tuple(volumes), None if volumes else _main_reason(dropped), tuple(dropped))


def _order(each: SliceFacts) -> tuple[bool, int, str, int]:
    """An order of slices that no renaming or shuffling of files changes."""
    number = each.instance_number
    return number is None, number or 0, each.content, each.frame_index


def _all(slices: Sequence[SliceFacts], reason: Reason) -> list[Dropped]:
    return [(each.content, each.frame_index, reason) for each in slices]


def _main_reason(dropped: Sequence[Dropped]) -> Reason:
    counts = Counter(reason for _, _, reason in dropped if reason is not Reason.DUPLICATE)
    return max(counts, key=lambda reason: (counts[reason], reason))


def _drop_twice(slices: Sequence[SliceFacts], dropped: list[Dropped]) -> list[SliceFacts]:
    """Take each frame of each content once, under however many names a site holds it."""
    kept: dict[tuple[Content, int], SliceFacts] = {}
    for each in slices:
        if (each.content, each.frame_index) in kept:
            dropped.append((each.content, each.frame_index, Reason.DUPLICATE))
        else:
            kept[each.content, each.frame_index] = each
    return list(kept.values())


def _drop_localizers(slices: Sequence[SliceFacts], dropped: list[Dropped]) -> list[SliceFacts]:
    localizers = [each for each in slices if "LOCALIZER" in each.image_type]
    dropped += _all(localizers, Reason.LOCALIZER)
    kept = [each for each in slices if "LOCALIZER" not in each.image_type]
    if any("MOSAIC" in each.image_type for each in kept):
        raise UnusableImageError(Reason.MOSAIC)
    return kept


def _placed(slices: Sequence[SliceFacts], dropped: list[Dropped]) -> list[_Placed]:
    """Take slices with a usable place; what has none is left out only if it is another kind of image."""
    placed = [_place(each) for each in slices]
    nowhere = [each for each, place in zip(slices, placed, strict=True) if place is None]
    found = [place for place in placed if place is not None]
    kinds = {_kind(place.facts) for place in found}
    if nowhere and (not found or any(_kind(each) in kinds for each in nowhere)):
        raise UnusableImageError(Reason.NO_POSITION)
    dropped += _all(nowhere, Reason.NO_POSITION)
    return found


def _kind(each: SliceFacts) -> tuple[object, ...]:
    return each.rows, each.columns, each.image_type


def _place(each: SliceFacts) -> _Placed | None:
    if each.position is None or each.orientation is None or each.pixel_spacing is None:
        return None
    axes = orthonormal(each.orientation)
    sized = len(each.pixel_spacing) == 2 and all(0 < value < np.inf for value in each.pixel_spacing)
    if axes is None or not sized or not usable_position(each.position) or min(each.rows, each.columns) < 1:
        return None
    return _Placed(each, axes)


def _stacks(placed: Sequence[_Placed], dropped: list[Dropped]) -> list[list[_Placed]]:
    """Divide by orientation; single images across a stack are localizers, whatever they say."""
    stacks = _parallel(placed)
    single = [stack for stack in stacks if len({each.facts.position for each in stack}) == 1]
    full = [stack for stack in stacks if stack not in single]
    if len(stacks) > 1 and single:
        across = all(_angle(one[0], stack[0]) > _STRAY_DEGREES for one in single for stack in full)
        if max(map(len, full), default=0) < _MIN_STACK or len(single) > _MAX_STRAYS or not across:
            raise UnusableImageError(Reason.MIXED_ORIENTATION)
        dropped += _all([each.facts for stack in single for each in stack], Reason.LOCALIZER)
        stacks = full
    refuse_other_frames([each.facts for stack in stacks for each in stack])
    if any(_torn(one, other) for one, other in combinations(stacks, 2)):
        raise UnusableImageError(Reason.MIXED_ORIENTATION)
    return stacks


def _torn(one: Sequence[_Placed], other: Sequence[_Placed]) -> bool:
    """Whether two stacks in nearly the same planes are parts of one volume rather than two volumes.

    Pictures that are turned or mirrored against each other are no volumes of one acquisition. Where the
    planes follow the patient's head by a fraction of a degree, each stack must be a whole volume: as many
    slices, at nearly the same place.
    """
    if _angle(one[0], other[0]) > _SAME_PLANE_DEGREES:
        return False
    normal = one[0].normal
    ends = [np.array([each.facts.position for each in stack]) @ normal for stack in (one, other)]
    (start, end), (other_start, other_end) = ((along.min(), along.max()) for along in ends)
    turned = np.abs(one[0].axes - other[0].axes).max() > _TURNED
    apart = abs(start + end - other_start - other_end) > end - start
    return bool(turned or apart or len(one) != len(other))


def _parallel(placed: Sequence[_Placed]) -> list[list[_Placed]]:
    """Put each slice to the first one that it is parallel to.

    Raises:
        UnusableImageError: MIXED_ORIENTATION when there are more stacks than anybody acquires.
    """
    stacks: list[list[_Placed]] = []
    stack_of: dict[tuple[float, ...] | None, list[_Placed]] = {}
    for each in placed:
        stack = stack_of.get(each.facts.orientation)
        if stack is None:
            near = (to for to in stacks if np.abs(each.axes - to[0].axes).max() <= ORIENTATION_TOLERANCE)
            stack = next(near, None)
            if stack is None:
                stacks.append(stack := [])
            if len(stacks) > _MAX_STACKS:
                raise UnusableImageError(Reason.MIXED_ORIENTATION)
            stack_of[each.facts.orientation] = stack
        stack.append(each)
    return stacks


def _angle(one: _Placed, other: _Placed) -> float:
    """Angle between two planes, degrees, whichever side each is seen from."""
    return float(np.degrees(np.arccos(np.clip(abs(one.normal @ other.normal), 0.0, 1.0))))


def _volumes_of(stack: Sequence[_Placed], dropped: list[Dropped]) -> list[VolumeGeometry]:
    """Volumes of parallel slices; what is refused is named slice by slice, other stacks go on."""
    positions = np.array([each.facts.position for each in stack], np.float64)
    places = places_of(positions, stack[0].normal)
    try:
        kinds, few = divide_kinds([each.facts for each in stack], places, positions @ stack[0].normal)
    except UnusableImageError as error:
        dropped += _all([each.facts for each in stack], error.reason)
        return []
    dropped += _all([stack[number].facts for number in few], Reason.MIXED_SERIES)
    return [
        volume
        for label, numbers in kinds
        for volume in _of_one_kind([stack[number] for number in numbers], label, dropped)
    ]


def _of_one_kind(stack: Sequence[_Placed], label: Label, dropped: list[Dropped]) -> list[VolumeGeometry]:
    facts = [each.facts for each in stack]
    positions = np.array([each.position for each in facts], np.float64)
    try:
        plane = _plane(stack)
        split = split_repeats(facts, partial(_places, positions, plane))
    except UnusableImageError as error:
        dropped += _all(facts, error.reason)
        return []
    dropped += _all([facts[member] for member in split.incomplete], Reason.INCOMPLETE_VOLUME)
    volumes = []
    for part in split.parts:
        try:
            volumes.append(_volume(facts, positions, plane, replace(part, label=label + part.label)))
        except UnusableImageError as error:
            copies = [copy for _, copy in part.copies]
            dropped += _all([facts[member] for member in (*part.members, *copies)], error.reason)
    return volumes


def _plane(stack: Sequence[_Placed]) -> Plane:
    """What the slices have in common, if they have.

    Raises:
        UnusableImageError: MIXED_GRID.
    """
    rows, columns = stack[0].facts.rows, stack[0].facts.columns
    spacings = np.array([each.facts.pixel_spacing for each in stack])
    far_corner = np.abs(spacings - spacings[0]) * (rows, columns)
    if far_corner.max() > MAX_DEVIATION_MM or any(
        (each.facts.rows, each.facts.columns) != (rows, columns) for each in stack
    ):
        raise UnusableImageError(Reason.MIXED_GRID)
    axes = orthonormal(tuple(np.mean([each.axes for each in stack], axis=0).ravel().tolist()))
    if axes is None:  # cannot be: the mean of nearly equal cosines
        raise UnusableImageError(Reason.MIXED_ORIENTATION)
    row_mm, column_mm = spacings.mean(axis=0).tolist()
    return Plane(axes[0], axes[1], rows, columns, row_mm, column_mm)


def _places(positions: Points, plane: Plane, members: Sequence[int]) -> Places:
    return places_of(positions[list(members)], plane.normal)


def _volume(facts: Sequence[SliceFacts], positions: Points, plane: Plane, part: Part) -> VolumeGeometry:
    """Geometry of slices of which no two share a position.

    Raises:
        UnusableImageError: as `grid_of`; UNEQUAL_SPACING, GANTRY_TILT or MISSING_SLICES when the header
            contradicts it.
    """
    members = np.array(part.members)[np.argsort(_places(positions, plane, part.members))]
    ordered = tuple(facts[member] for member in members)
    grid = grid_of(positions[members], plane, _thickness(ordered))
    if Handled.UNEQUAL_SPACING in grid.handled and not _counted_along(ordered):
        raise UnusableImageError(Reason.UNEQUAL_SPACING)
    if _tilt_contradicted(ordered, positions[members], plane):
        raise UnusableImageError(Reason.GANTRY_TILT)
    if _thinned(ordered, grid.spacing_mm[0], facts):
        raise UnusableImageError(Reason.MISSING_SLICES)
    copies = tuple((facts[kept], facts[copy]) for kept, copy in part.copies)
    handled = (*grid.handled, Handled.COPIES) if copies else grid.handled
    return VolumeGeometry(ordered, copies, grid, part.label, handled)


def _thickness(slices: Sequence[SliceFacts]) -> Points | None:
    stated = [each.slice_thickness or 0.0 for each in slices]
    return np.array(stated) if all(0 < value < 1e3 for value in stated) else None


def _counted_along(slices: Sequence[SliceFacts]) -> bool:
    """Whether InstanceNumber runs through the stack from one end to the other, where it is known.

    Two volumes that the patient's movement shifted against each other also look like one of unequal
    distances; their numbers alternate.
    """
    numbers = [each.instance_number for each in slices if each.instance_number is not None]
    if len(numbers) < len(slices) or len({each.content for each in slices}) < len(slices):
        return True
    steps = np.sign([after - before for before, after in pairwise(numbers)])
    return bool((steps == steps[0]).all() and steps[0] != 0)


def _thinned(slices: Sequence[SliceFacts], distance_mm: float, stack: Sequence[SliceFacts]) -> bool:
    """Whether only every second (third ...) slice is there: equal distances do not show that.

    Numbers with holes prove nothing, nor do gaps between slices; refused is what has both, holes and a
    distance that is as many times the nominal one. Other volumes may have the numbers in between.
    """
    nominal = abs(slices[0].spacing_between or slices[0].slice_thickness or 0.0)
    times = round(distance_mm / nominal) if nominal > 0 else 0
    if len(slices) < 2 or times < 2 or abs(distance_mm / times - nominal) > _NOMINAL_TOLERANCE * nominal:
        return False
    numbers = [each.instance_number for each in slices if each.instance_number is not None]
    if len(numbers) < len(slices) or len({each.content for each in slices}) < len(slices):
        return False
    others = {each.instance_number for each in stack if each.instance_number is not None}
    within = sorted(number for number in others if min(numbers) <= number <= max(numbers))
    steps = {after - before for before, after in pairwise(within)}
    return len(steps) > 1 or steps == {times}


def _tilt_contradicted(slices: Sequence[SliceFacts], positions: Points, plane: Plane) -> bool:
    """Whether a CT scanner says its gantry was tilted and its positions say it was not.

    The angle is nominal, so it corrects nothing. Reformatted images keep it although they are upright.
    """
    stated = slices[0].gantry_tilt
    original = all(each.modality == "CT" and "ORIGINAL" in each.image_type for each in slices)
    if len(slices) < 2 or not original or stated is None or abs(stated) < _TILT_TOLERANCE_DEGREES:
        return False
    found = tilt_degrees(positions[-1] - positions[0], plane)
    return abs(abs(stated) - found) > _TILT_TOLERANCE_DEGREES
