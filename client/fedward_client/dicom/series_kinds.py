"""Tell apart what was taken and what was made of it, where both lie in parallel in one series (hop 2).

Workstations put reformatted or projected pictures into the series that they came from. Where such pictures
lie at positions of their own, between the slices, nothing but ImageType says that they are no slices of it:
stacked together they make a grid as regular as any. And a series of which a few parts were never all sent
looks whole as well; the parts of a concatenation say how many there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from fedward_client.dicom.geometry import Points
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.repeat_order import Label, Places
from fedward_client.dicom.repeats import together
from fedward_client.dicom.slice_facts import SliceFacts

_MIN_STACK = 3

Kind = tuple[Label, tuple[int, ...]]


def divide_kinds(
    slices: Sequence[SliceFacts], places: Places, along: Points
) -> tuple[list[Kind], tuple[int, ...]]:
    """Divide the slices of one stack into kinds of image that share no position.

    Kinds that do share positions stay together here; `repeats.py` tells them apart.

    Args:
        slices: of one orientation.
        places: number of each slice's position.
        along: where each lies along the normal, mm.

    Returns:
        (what sets it apart, indices of its slices) for each kind, and the indices of too few to be a volume
        beside one.

    Raises:
        UnusableImageError: MIXED_SERIES, when one kind goes on where another ends: that may be one volume,
            of which a part was treated otherwise, or two.
    """
    members: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, each in enumerate(slices):
        members[each.image_type[:2]].append(number)
    if len(members) == 1:
        return [((), tuple(range(len(slices))))], ()
    places_of = {kind: frozenset(places[numbers].tolist()) for kind, numbers in members.items()}
    kinds: list[Kind] = []
    few: list[int] = []
    groups = together(places_of.values())
    for group in groups:
        united = sorted(kind for kind, own in places_of.items() if own <= group)
        numbers = tuple(sorted(number for kind in united for number in members[kind]))
        if len(group) < _MIN_STACK and len(groups) > 1:
            few += numbers
        else:
            kinds.append(((("kind", united[0]),) if len(groups) > 1 else (), numbers))
    ends = sorted((along[list(numbers)].min(), along[list(numbers)].max()) for _, numbers in kinds)
    consecutive = any(after[0] > before[1] for before, after in pairwise(ends))
    if not kinds or consecutive:
        raise UnusableImageError(Reason.MIXED_SERIES)
    return sorted(kinds, key=lambda kind: str(kind[0])), tuple(few)


def refuse_cut_concatenations(slices: Sequence[SliceFacts]) -> None:
    """See that every part of an image that was sent in parts is there.

    Raises:
        UnusableImageError: MISSING_SLICES.

    Source: DICOM PS3.3 C.7.6.16.2.2.4; the total is optional, the numbers count from 1.
    """
    parts: dict[str, set[int]] = defaultdict(set)
    totals: dict[str, int] = {}
    for each in slices:
        if each.concatenation and each.part is not None:
            parts[each.concatenation].add(each.part)
            totals[each.concatenation] = max(each.num_parts or 0, totals.get(each.concatenation, 0))
    for name, numbers in parts.items():
        if min(numbers) != 1 or max(totals[name], *numbers) != len(numbers):
            raise UnusableImageError(Reason.MISSING_SLICES)


def refuse_other_frames(slices: Sequence[SliceFacts]) -> None:
    """See that all positions are told in one frame of reference.

    Raises:
        UnusableImageError: MIXED_SERIES.
    """
    if len({each.frame_of_reference for each in slices}) > 1:
        raise UnusableImageError(Reason.MIXED_SERIES)
