"""Divide slices at repeated positions by their order: trigger times, arithmetic of InstanceNumber (hop 2).

The last resort of `repeats.py`, where no fact names the volume of a slice. Orders are easily wrong by one
when slices are missing, so what could be read in two ways is refused.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.slice_facts import SliceFacts

Places = NDArray[np.int64]
Label = tuple[tuple[str, Hashable], ...]

_MAX_INSTANCE_NUMBER = 2**31  # what an IS value can hold
_FEW_PLACES = 3


def by_order(
    slices: Sequence[SliceFacts], members: tuple[int, ...], places: Places
) -> dict[Label, tuple[int, ...]] | None:
    """Order of trigger times and arithmetic of InstanceNumber, if one says something and none disagrees."""
    by_trigger, apart = _by_trigger_order(slices, members, places)
    by_number = _by_instance_number(slices, members, places)
    if by_trigger is not None and by_number is None and not apart:
        raise UnusableImageError(Reason.VOLUMES_UNCLEAR)
    found = [each for each in (by_trigger, by_number) if each is not None]
    return agreed(found) if found else None


def agreed(found: Sequence[dict[Label, tuple[int, ...]]]) -> dict[Label, tuple[int, ...]]:
    """Take what all explanations say.

    Raises:
        UnusableImageError: VOLUMES_UNCLEAR when two divide the slices otherwise.
    """
    if len({frozenset(map(frozenset, each.values())) for each in found}) > 1:
        raise UnusableImageError(Reason.VOLUMES_UNCLEAR)
    return found[0]


def explains(groups: Iterable[tuple[int, ...]], place_of: Mapping[int, int], num_places: int) -> bool:
    """No position twice in a group, and at least half of the groups have every position."""
    whole = num = 0
    for group in groups:
        if len({place_of[member] for member in group}) < len(group):
            return False
        num += 1
        whole += len(group) == num_places
    return 2 * whole >= num


def _by_trigger_order(
    slices: Sequence[SliceFacts], members: tuple[int, ...], places: Places
) -> tuple[dict[Label, tuple[int, ...]] | None, bool]:
    """Heart phases: trigger times differ a little from slice to slice, their order does not.

    Only where every position has as many of them; one that is missing would move all later ones.

    Returns:
        The phases, and whether their times lie further apart than those within a phase. Where they do not,
        because hearts beat unevenly or because other slices are missing at each position, it takes
        another witness.
    """
    queues: dict[int, list[tuple[float, int]]] = {}
    for member, place in zip(members, places.tolist(), strict=True):
        trigger = slices[member].trigger
        if trigger is None:
            return None, False
        queues.setdefault(place, []).append((trigger, member))
    counts = {len(queue) for queue in queues.values()}
    if len(counts) > 1 or any(len({time for time, _ in queue}) < len(queue) for queue in queues.values()):
        return None, False
    phases = list(zip(*(sorted(queue) for queue in queues.values()), strict=True))
    ends = [(phase_times[0], phase_times[-1]) for phase_times in (sorted(t for t, _ in p) for p in phases)]
    widest = max(last - first for first, last in ends)
    apart = all(after[0] - before[1] > widest for before, after in pairwise(ends))
    groups: dict[Label, tuple[int, ...]] = {
        (("trigger_order", number),): tuple(sorted(member for _, member in phase))
        for number, phase in enumerate(phases)
    }
    return groups, apart


def _by_instance_number(
    slices: Sequence[SliceFacts], members: tuple[int, ...], places: Places
) -> dict[Label, tuple[int, ...]] | None:
    """Volume after volume, or position after position, exactly; else not at all.

    Frames of one multi-frame file count by their own number.
    """
    one_file = len({slices[member].content for member in members}) == 1
    numbers = [_number(slices[member], one_file=one_file) for member in members]
    known = [number for number in numbers if number is not None and abs(number) < _MAX_INSTANCE_NUMBER]
    if len(set(known)) < len(members):
        return None
    counted = np.array(known, np.int64)
    num_places = len(set(places.tolist()))
    every = sorted({number for each in slices if (number := _number(each, one_file=one_file)) is not None})
    index = _volume_after_volume(counted, places, from_one=every[0] == 1 and _without_holes(every))
    # Two positions could lose as many slices at the beginning and at the end and leave no hole.
    within = [number for number in every if min(known) <= number <= max(known)]
    if index is None and _without_holes(within) and (num_places > 2 or every[0] == 1):
        index = _position_after_position(counted, places)
    if index is None:
        return None
    groups: dict[Label, list[int]] = {}
    for member, number in zip(members, index.tolist(), strict=True):
        groups.setdefault((("instance_block", number),), []).append(member)
    place_of = dict(zip(members, places.tolist(), strict=True))
    frozen = {label: tuple(group) for label, group in groups.items()}
    return frozen if explains(frozen.values(), place_of, num_places) else None


def _number(each: SliceFacts, *, one_file: bool) -> int | None:
    return each.frame_index + 1 if one_file else each.instance_number


def _without_holes(ascending: Sequence[int]) -> bool:
    return len({after - before for before, after in pairwise(ascending)}) == 1


def _volume_after_volume(numbers: Places, places: Places, *, from_one: bool) -> Places | None:
    """Index of the volume if `number = first + volume * positions + (fixed order of the position)`."""
    steps = numbers - numbers.min()
    step = math.gcd(*steps.tolist())  # other echoes may have the numbers in between
    steps = steps // step
    num_places = int(places.max()) + 1
    within = steps % num_places
    slot = np.full(num_places, -1, np.int64)
    slot[places] = within
    if (slot[places] != within).any() or len(set(slot.tolist())) < num_places:
        return None
    first_number = 0 if from_one else (int(numbers.min()) - 1) // step
    return steps // num_places if _begins_a_volume(slot, first_number, len(numbers)) else None


def _begins_a_volume(slot: Places, first_number: int, num_slices: int) -> bool:
    """Whether blocks of slices begin where the volumes began.

    Were the very first slice missing, blocks of the right size would start one slice late. An order that
    runs through the stack from one end to the other shows where a volume begins; a few slices may do so
    by chance. Other orders, taken by turns, must count from 1, begin and end near the ends of the stack,
    and not be the former begun in the middle.

    Args:
        slot: when each position of the stack was taken, from 0.
        first_number: how many numbers there are before the least one, of these or of missing slices.
        num_slices: of all volumes.
    """
    num_places = len(slot)
    steps = np.diff(slot)
    runs_through = bool((steps > 0).all() or (steps < 0).all())
    if runs_through and num_places > _FEW_PLACES:
        return True
    if num_places <= _FEW_PLACES + 1:
        return first_number == 0 and num_slices % num_places == 0
    if first_number % num_places:
        return False
    order = np.argsort(slot)
    begun_late = not runs_through and set((np.diff(order) % num_places).tolist()) in ({1}, {num_places - 1})
    beside_end = np.minimum(order, num_places - 1 - order)[[0, -1]] <= 1
    return bool(beside_end.all() and not begun_late)


def _position_after_position(numbers: Places, places: Places) -> Places | None:
    """Index of the volume if each position holds one unbroken run and all runs are alike."""
    num_places = int(places.max()) + 1
    if len(numbers) % num_places:
        return None
    order = np.lexsort((numbers, places))
    num_volumes = len(numbers) // num_places
    if (np.bincount(places) != num_volumes).any():
        return None
    runs = numbers[order].reshape(num_places, num_volumes)
    offsets = runs - runs[:, :1]
    starts = np.sort(runs[:, 0])
    apart = np.diff(starts)
    alike = (offsets == offsets[0]).all() and (len(apart) == 0 or (apart == apart[0]).all())
    if not alike or (len(apart) and apart[0] <= offsets[0, -1]):
        return None
    index = np.empty(len(numbers), np.int64)
    index[order] = np.tile(np.arange(num_volumes), num_places)
    return index
