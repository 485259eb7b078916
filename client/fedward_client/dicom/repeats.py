"""Tell apart the volumes of a stack whose positions repeat: time points, echoes, b-values (hop 2).

What says so explicitly comes first (TemporalPositionIdentifier, EchoNumbers, DiffusionBValue), then
what often does (dimension index, ImageType, AcquisitionNumber, TriggerTime, one file a volume), and
last the arithmetic of InstanceNumber. Whatever is used must explain every slice: no position twice in a
volume, and whole volumes. Two explanations that contradict each other are none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.repeat_order import Label, Places, agreed, by_order, explains
from fedward_client.dicom.slice_facts import SliceFacts

_BY_DEFINITION: dict[str, Callable[[SliceFacts], Hashable]] = {
    "echo": lambda each: each.echo,
    "b_value": lambda each: each.b_value,
    "temporal_position": lambda each: each.temporal_position,
    "stack": lambda each: each.stack,
}
_BY_CUSTOM: dict[str, Callable[[SliceFacts], Hashable]] = {
    "image_type": lambda each: each.image_type,
    "acquisition_number": lambda each: each.acquisition_number,
    "acquisition_time": lambda each: each.acquisition_time,
    "echo_time": lambda each: each.echo_time,
    "trigger": lambda each: each.trigger,
}
_MAX_DIMENSIONS = 8
_TIMES = ("acquisition_time", "trigger")  # may differ from slice to slice of one volume


@dataclass(frozen=True)
class Part:
    """Slices of one volume.

    Attributes:
        label: what sets this volume apart from the others of its stack, as (fact, value) pairs.
        members: indices of its slices.
        copies: (kept, copy): pairs that can only be one slice sent twice; true if their pixels agree.
    """

    label: Label
    members: tuple[int, ...]
    copies: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Split:
    """Parts in the order of their labels, and members of volumes of which slices are missing."""

    parts: tuple[Part, ...]
    incomplete: tuple[int, ...]


def split_repeats(slices: Sequence[SliceFacts], place: Callable[[Sequence[int]], Places]) -> Split:
    """Divide the slices of one stack into volumes.

    Args:
        slices: of one orientation and one grid, in an order that does not depend on the files' names.
        place: numbers the distinct positions among the slices with these indices, from 0.

    Raises:
        UnusableImageError: VOLUMES_UNCLEAR.
    """
    everything = tuple(range(len(slices)))
    keys = _varying(slices, everything, _BY_DEFINITION)
    if not keys:
        return _split_custom(slices, everything, (), place)
    groups = _groups(slices, everything, keys)
    largest = max(len(set(place(members).tolist())) for members in groups.values())
    if largest == 1 and len(set(place(everything).tolist())) > 1:
        raise UnusableImageError(Reason.VOLUMES_UNCLEAR)  # a number for each slice is no time
    parts: list[Part] = []
    incomplete: list[int] = []
    for label, members in groups.items():
        split = _split_custom(slices, members, label, place)
        parts += split.parts
        incomplete += split.incomplete
    return _only_whole(parts, incomplete, dict(zip(everything, place(everything).tolist(), strict=True)))


def _split_custom(
    slices: Sequence[SliceFacts],
    members: tuple[int, ...],
    label: Label,
    place: Callable[[Sequence[int]], Places],
) -> Split:
    """Divide slices that agree in echo, b-value and temporal position."""
    places = place(members)
    if len(set(places.tolist())) == len(members):
        return Split((Part(label, members),), ())
    getters = _BY_CUSTOM | _dimension_getters(slices, members) | _file_getter(slices, members)
    found = _by_facts(slices, members, places, getters)
    if found is None:
        found = by_order(slices, members, places)
        _refuse_mixed(slices, members, places, getters, found)
    if found is None:
        return Split((_with_copies(slices, members, label, places, getters),), ())
    parts = [Part(label + key, group) for key, group in sorted_by_label(found.items())]
    return _only_whole(parts, [], dict(zip(members, places.tolist(), strict=True)))


def _by_facts(
    slices: Sequence[SliceFacts],
    members: tuple[int, ...],
    places: Places,
    getters: Mapping[str, Callable[[SliceFacts], Hashable]],
) -> dict[Label, tuple[int, ...]] | None:
    """Smallest set of facts whose values are whole volumes; all smallest sets must say the same."""
    place_of = dict(zip(members, places.tolist(), strict=True))
    num_places = len(set(places.tolist()))
    # More values than half-full volumes: no part of an explanation, whatever it is combined with.
    keys = _varying(slices, members, getters, most=2 * len(members) // num_places)
    for size in (1, 2):
        found: list[dict[Label, tuple[int, ...]]] = []
        for chosen in combinations(keys.items(), size):
            groups = _groups(slices, members, dict(chosen))
            if explains(groups.values(), place_of, num_places):
                found.append(groups)
        if found:
            return agreed(found)
    return None


def _refuse_mixed(
    slices: Sequence[SliceFacts],
    members: tuple[int, ...],
    places: Places,
    getters: Mapping[str, Callable[[SliceFacts], Hashable]],
    found: Mapping[Label, tuple[int, ...]] | None,
) -> None:
    """Let a fact that divides the slices, but of too many volumes not all, speak against an order of them.

    Raises:
        UnusableImageError: VOLUMES_UNCLEAR.
    """
    place_of = dict(zip(members, places.tolist(), strict=True))
    most = 2 * len(members) // len(set(places.tolist()))
    named = {name: getter for name, getter in getters.items() if name not in _TIMES}
    for name, getter in _varying(slices, members, named, most=most).items() if found else ():
        groups = _groups(slices, members, {name: getter}).values()
        if any(len({place_of[member] for member in group}) < len(group) for group in groups):
            continue
        if any(len({getter(slices[member]) for member in group}) > 1 for group in (found or {}).values()):
            raise UnusableImageError(Reason.VOLUMES_UNCLEAR)


def _with_copies(
    slices: Sequence[SliceFacts],
    members: tuple[int, ...],
    label: Label,
    places: Places,
    getters: Mapping[str, Callable[[SliceFacts], Hashable]],
) -> Part:
    """Keep one slice at each position, if nothing but its number tells it from the others.

    A few slices with other numbers may have been sent again; half a series of them is something else.
    """
    same = [getter for name, getter in getters.items() if name != "file"]
    first: dict[int, int] = {}
    copies = []
    num_renumbered = 0
    for member, place in zip(members, places.tolist(), strict=True):
        kept = first.setdefault(place, member)
        if kept == member:
            continue
        if slices[kept].content == slices[member].content or any(
            getter(slices[kept]) != getter(slices[member]) for getter in same
        ):
            raise UnusableImageError(Reason.VOLUMES_UNCLEAR)
        copies.append((kept, member))
        num_renumbered += slices[kept].instance_number != slices[member].instance_number
    if 2 * num_renumbered > len(first):
        raise UnusableImageError(Reason.VOLUMES_UNCLEAR)
    return Part(label, tuple(first.values()), tuple(copies))


def _only_whole(parts: Sequence[Part], incomplete: Sequence[int], place_of: Mapping[int, int]) -> Split:
    """Take out volumes that lack a position; at least half must be whole.

    A volume lacks what others have with which it shares positions, and it lacks slices if others have more.
    Those that share no position were moved against each other as a whole.
    """
    largest = max(len(part.members) for part in parts)
    places = [frozenset(place_of[member] for member in part.members) for part in parts]
    wanted = together(places)
    whole: list[Part] = []
    cut: list[Part] = []
    for part, own in zip(parts, places, strict=True):
        lacks_none = all(own == group for group in wanted if own & group)
        (whole if lacks_none and len(part.members) == largest else cut).append(part)
    if 2 * len(whole) < len(parts):
        raise UnusableImageError(Reason.VOLUMES_UNCLEAR)
    left_out = [member for part in cut for member in part.members]
    left_out += [copy for part in cut for _, copy in part.copies]
    return Split(tuple(whole), (*incomplete, *left_out))


def together(sets: Iterable[frozenset[int]]) -> list[frozenset[int]]:
    """Unite sets that share something, until none do."""
    united: list[frozenset[int]] = []
    for each in dict.fromkeys(sets):
        touching = [group for group in united if group & each]
        united = [group for group in united if not group & each]
        united.append(each.union(*touching))
    return united


def _dimension_getters(
    slices: Sequence[SliceFacts], members: Sequence[int]
) -> dict[str, Callable[[SliceFacts], Hashable]]:
    """One fact for each component of DimensionIndexValues, where all slices have as many."""
    lengths = Counter(len(slices[member].dimensions) for member in members)
    length = next(iter(lengths))
    if len(lengths) > 1 or length > _MAX_DIMENSIONS:
        return {}

    def getter(axis: int) -> Callable[[SliceFacts], Hashable]:
        return lambda each: each.dimensions[axis]

    return {f"dimension_{axis + 1}": getter(axis) for axis in range(length)}


def _file_getter(
    slices: Sequence[SliceFacts], members: Sequence[int]
) -> dict[str, Callable[[SliceFacts], Hashable]]:
    """One file a volume, where files have several frames. By number: a file sent twice is no volume."""
    if len({slices[member].content for member in members}) == len(members):
        return {}
    return {"file": lambda each: each.instance_number}


def _varying(
    slices: Sequence[SliceFacts],
    members: Sequence[int],
    getters: Mapping[str, Callable[[SliceFacts], Hashable]],
    most: int | None = None,
) -> dict[str, Callable[[SliceFacts], Hashable]]:
    numbers = {name: len({getter(slices[member]) for member in members}) for name, getter in getters.items()}
    most = len(members) if most is None else most
    return {name: getter for name, getter in getters.items() if 1 < numbers[name] <= most}


def _groups(
    slices: Sequence[SliceFacts],
    members: Sequence[int],
    keys: Mapping[str, Callable[[SliceFacts], Hashable]],
) -> dict[Label, tuple[int, ...]]:
    groups: dict[Label, list[int]] = {}
    for member in members:
        label = tuple((name, getter(slices[member])) for name, getter in keys.items())
        groups.setdefault(label, []).append(member)
    return dict(sorted_by_label((label, tuple(group)) for label, group in groups.items()))


def sorted_by_label(
    groups: Iterable[tuple[Label, tuple[int, ...]]],
) -> list[tuple[Label, tuple[int, ...]]]:
    """Order volumes by what sets them apart: numbers by size, absent ones first."""
    return sorted(groups, key=lambda item: [_rank(value) for _, value in item[0]])


def _rank(value: Hashable) -> tuple[int, float, str, tuple[object, ...]]:
    if value is None:
        return 0, 0.0, "", ()
    if isinstance(value, int | float):
        return 1, float(value), "", ()
    if isinstance(value, tuple):
        return 3, 0.0, "", tuple(_rank(part) for part in value)
    return 2, 0.0, str(value), ()
