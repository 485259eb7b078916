"""Find the elements of a dataset held in memory, strictly and without copying values (hop 2).

Indexing a hospital's archive is mostly looking for fifty values in hundreds of elements, so this walk
notes where each element lies and converts nothing. It follows the standard to the letter. What it does
not understand raises `OddDatasetError`, and `parser.py` then asks pydicom, which knows the usual
deviations; so a stranger's file costs time, never a wrong value. Every read is bounded by the data.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

UNDEFINED_LENGTH = 0xFFFFFFFF
PIXEL_TAGS = (0x7FE00010, 0x7FE00008, 0x7FE00009)
"""PixelData, FloatPixelData, DoubleFloatPixelData: the walk ends at the first of them."""

_MAX_DEPTH = 24
_MAX_ELEMENTS = 200_000
_MAX_ALL_ELEMENTS = 1_000_000
"""Of one dataset or item, and of all nested ones together: a walk ends within a second or two."""
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_SHORT_VRS = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split(),
)
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())

_EXPLICIT = {True: struct.Struct("<HH2sH").unpack_from, False: struct.Struct(">HH2sH").unpack_from}
_IMPLICIT = {True: struct.Struct("<HHL").unpack_from, False: struct.Struct(">HHL").unpack_from}
_LENGTH = {True: struct.Struct("<L").unpack_from, False: struct.Struct(">L").unpack_from}

Place = tuple[bytes, int, int]
"""VR as written (b"" when implicit), start of the value, its length; see `Elements.places`."""


class OddDatasetError(ValueError):
    """The dataset departs from the standard's encoding; says nothing about where or how."""


class TooManyElementsError(OddDatasetError):
    """So many that no other reader gets to their end in the time that a file has."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a dataset is written.

    Args:
        explicit: each element names its value representation.
        little: little-endian byte order.
    """

    explicit: bool
    little: bool


@dataclass(frozen=True, slots=True)
class Elements:
    """Where the elements of one dataset or sequence item lie in the data.

    Args:
        data: what the places refer to.
        encoding: of these elements.
        places: tag -> (VR as written, b"" when implicit; start of the value; its length, which is
            `UNDEFINED_LENGTH` for some sequences and for compressed pixels).
        end: where the walk ended: at the pixel data's element header, or behind the last element.
    """

    data: bytes = field(repr=False)
    encoding: Encoding
    places: dict[int, tuple[bytes, int, int]] = field(repr=False)
    end: int

    def value(self, tag: int) -> bytes | None:
        """Bytes of a value of known length; None when the element is absent."""
        place = self.places.get(tag)
        if place is None or place[2] == UNDEFINED_LENGTH:
            return None
        return self.data[place[1] : place[1] + place[2]]

    def items(self, tag: int) -> tuple[Elements, ...]:
        """Items of a sequence; none when it is absent or empty.

        Raises:
            OddDatasetError: not encoded as the standard says.
        """
        place = self.places.get(tag)
        if place is None:
            return ()
        vr, start, length = place
        # A sequence inside UN is implicit little-endian whatever surrounds it (PS3.5 6.2.2).
        encoding = Encoding(explicit=False, little=True) if vr == b"UN" else self.encoding
        end = len(self.data) if length == UNDEFINED_LENGTH else start + length
        found: list[Elements] = []
        budget = [_MAX_ALL_ELEMENTS]
        _read_items(self.data, start, end, encoding, length == UNDEFINED_LENGTH, 0, budget, found)
        return tuple(found)


def find_elements(data: bytes, start: int, encoding: Encoding) -> Elements:
    """Walk a dataset from `start` up to its pixel data or the end of the data.

    Returns:
        All elements in front of the pixel data and, where there is one, the pixel data itself.

    Raises:
        OddDatasetError: not encoded as the standard says, or cut off in front of the pixel data.

    Source: DICOM PS3.5 7.1 and 7.5.
    """
    places: dict[int, tuple[bytes, int, int]] = {}
    end = _walk(data, start, len(data), encoding, places, 0, [_MAX_ALL_ELEMENTS], top=True)
    return Elements(data, encoding, places, end)


def _walk(  # noqa: C901 - one loop over every element of the archive: inlined on purpose
    data: bytes,
    position: int,
    end: int,
    encoding: Encoding,
    places: dict[int, tuple[bytes, int, int]],
    depth: int,
    budget: list[int],
    *,
    top: bool,
) -> int:
    explicit = encoding.explicit
    unpack = (_EXPLICIT if explicit else _IMPLICIT)[encoding.little]
    unpack_length = _LENGTH[encoding.little]
    vr = b""
    previous = -1
    for _ in range(_MAX_ELEMENTS):
        if position + 8 > end:
            break
        if explicit:
            group, number, vr, length = unpack(data, position)
            start = position + 8
            if vr in _LONG_VRS:
                if position + 12 > end:
                    raise OddDatasetError
                (length,) = unpack_length(data, start)
                start += 4
            elif vr not in _SHORT_VRS and group != 0xFFFE:
                raise OddDatasetError
        else:
            group, number, length = unpack(data, position)
            start = position + 8
        tag = group << 16 | number
        if tag <= previous:  # out of order: another writer's idea, or bytes that are no elements
            raise OddDatasetError
        previous = tag
        if group == 0x7FE0 and tag in PIXEL_TAGS and top:
            places[tag] = (vr, start, length)
            return position
        if group == 0xFFFE:
            if tag == _ITEM_END and not top:
                return position + 8
            raise OddDatasetError
        if length == UNDEFINED_LENGTH:
            following = _behind_sequence(data, start, end, vr, encoding, depth, budget)
        else:
            following = start + length
            if following > end:
                raise OddDatasetError
        places[tag] = (vr, start, length)
        position = following
    else:  # more elements than anything real has
        raise TooManyElementsError
    if position != end:  # a few bytes that are no element
        raise OddDatasetError
    return position


def element_at(data: bytes, position: int, encoding: Encoding) -> tuple[int, Place, int]:
    """Read the one element that begins at `position`.

    Returns:
        tag, place, and where the next one begins.

    Raises:
        OddDatasetError: not encoded as the standard says, or cut off.
    """
    vr = b""
    try:
        if encoding.explicit:
            group, number, vr, length = _EXPLICIT[encoding.little](data, position)
            start = position + 8
            if vr in _LONG_VRS:
                (length,) = _LENGTH[encoding.little](data, start)
                start += 4
            elif vr not in _SHORT_VRS:
                raise OddDatasetError
        else:
            group, number, length = _IMPLICIT[encoding.little](data, position)
            start = position + 8
    except struct.error:
        raise OddDatasetError from None
    if length == UNDEFINED_LENGTH:
        budget = [_MAX_ALL_ELEMENTS]
        following = _behind_sequence(data, start, len(data), vr, encoding, 0, budget)
    else:
        following = start + length
    if following > len(data):
        raise OddDatasetError
    return group << 16 | number, (vr, start, length), following


def _behind_sequence(
    data: bytes, start: int, end: int, vr: bytes, encoding: Encoding, depth: int, budget: list[int]
) -> int:
    if vr not in (b"SQ", b"UN", b""):
        raise OddDatasetError
    inner = Encoding(explicit=False, little=True) if vr == b"UN" else encoding
    return _read_items(data, start, end, inner, True, depth, budget, None)


def _read_items(
    data: bytes,
    position: int,
    end: int,
    encoding: Encoding,
    delimited: bool,
    depth: int,
    budget: list[int],
    found: list[Elements] | None,
) -> int:
    """Walk a sequence's items, keep them in `found` when it is given, and return where it ends."""
    if depth > _MAX_DEPTH:
        raise OddDatasetError
    unpack = _IMPLICIT[encoding.little]  # item headers have no VR in any encoding
    num_elements = 0
    while position + 8 <= end:
        group, number, length = unpack(data, position)
        tag = group << 16 | number
        position += 8
        if tag == _SEQUENCE_END and delimited:
            return position
        num_elements += 1
        if tag != _ITEM or num_elements > _MAX_ELEMENTS:
            raise TooManyElementsError if tag == _ITEM else OddDatasetError
        places: dict[int, tuple[bytes, int, int]] = {}
        item_end = end if length == UNDEFINED_LENGTH else position + length
        if item_end > end:
            raise OddDatasetError
        if length == UNDEFINED_LENGTH or found is not None:
            # An item that lacks its delimiter takes in all that follows, and so the sequence lacks its own.
            position = _walk(data, position, item_end, encoding, places, depth + 1, budget, top=False)
            num_elements += len(places)
            budget[0] -= 1 + len(places)
            if budget[0] < 0:
                raise TooManyElementsError
            if found is not None:
                found.append(Elements(data, encoding, places, position))
        position = item_end if length != UNDEFINED_LENGTH else position
    if delimited or position != end:
        raise OddDatasetError
    return position
