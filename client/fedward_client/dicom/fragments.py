"""Put the fragments of compressed pixels together to frames (hop 2).

A frame may be one fragment or many, and an offset table may say where each begins; archives often leave it
empty or keep one that another encoding had. So a table is believed only where it names beginnings of
fragments. As many fragments as frames need no table, and a fragment that begins as a codestream does begins
a frame: inside a codestream those bytes cannot occur. What none of this settles is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import NoReturn

from fedward_client.dicom.refusal import Reason, UnusableImageError

_ITEM = struct.Struct("<4sL").unpack_from
_FRAGMENT, _SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
MAX_ITEMS = 2**18
_CODESTREAM_BEGINS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  \r\n\x87\n")


def coded_frames(
    pixels: bytes, num_frames: int, *, delimited: bool, max_fragments: int, extended_offsets: bytes = b""
) -> list[bytes]:
    """Find the frames in the value of compressed pixel data.

    Args:
        pixels: from the offset table's item on.
        num_frames: as declared, at least 1; what is there beyond them is left alone.
        delimited: the value must end with its delimiter, as one of undefined length does.
        max_fragments: more are refused.
        extended_offsets: ExtendedOffsetTable.

    Raises:
        UnusableImageError: a fragment is cut off, or there is no saying where each frame begins.

    Source: DICOM PS3.5 A.4.
    """
    table, starts, fragments = _fragments(pixels, delimited=delimited, max_fragments=max_fragments)
    if num_frames == 1:
        if not fragments:
            _refuse()
        return [b"".join(fragments)]
    if len(fragments) == num_frames:
        return fragments
    for width, offsets in (("Q", extended_offsets), ("L", table)):
        first = _named(starts, offsets, width)
        if len(first) >= num_frames:
            return _joined(fragments, first, num_frames)
    first = [number for number, each in enumerate(fragments) if each.startswith(_CODESTREAM_BEGINS)]
    if len(first) < num_frames or first[0] != 0:  # num_frames is 2 at least
        _refuse()
    return _joined(fragments, first, num_frames)


def item_places(body: bytes, position: int = 0) -> tuple[list[tuple[int, int]], int] | None:
    """Where the values of the items lie, the offset table's first, and the first byte behind their delimiter.

    Args:
        body: the pixel data, or what holds it.
        position: of the offset table's item.

    Returns:
        None when the delimiter is missing, an item is cut off, or bytes are no item.
    """
    found: list[tuple[int, int]] = []
    while position + 8 <= len(body) and len(found) < MAX_ITEMS:
        tag, length = _ITEM(body, position)
        position += 8
        if tag == _SEQUENCE_END:
            return found, position
        if tag != _FRAGMENT or position + length > len(body):
            return None
        found.append((position, position + length))
        position += length
    return None


def _refuse() -> NoReturn:
    raise UnusableImageError(Reason.TRUNCATED)


def _fragments(pixels: bytes, *, delimited: bool, max_fragments: int) -> tuple[bytes, list[int], list[bytes]]:
    """The offset table; where each fragment's item begins, counted from behind the table; the fragments.

    Every fragment must be all there: decoders make do with half of one and say nothing. Empty ones are none.
    """
    position = num_items = origin = 0
    table = b""
    starts: list[int] = []
    found: list[bytes] = []
    while position + 8 <= len(pixels):
        tag, length = _ITEM(pixels, position)
        if tag == _SEQUENCE_END and delimited:
            return table, starts, found
        num_items += 1
        if tag != _FRAGMENT or num_items > max_fragments:
            raise UnusableImageError(Reason.CODESTREAM)
        value = pixels[position + 8 : position + 8 + length]
        if num_items == 1:
            table, origin = value, position + 8 + length
        elif value:
            starts.append(position - origin)
            found.append(value)
        position += 8 + length
    if delimited or position != len(pixels):
        _refuse()
    return table, starts, found


def _named(starts: Sequence[int], offsets: bytes, width: str) -> list[int]:
    """Fragments at which a table says that frames begin; none when it says anything else."""
    size = struct.calcsize(f"<{width}")
    named = struct.unpack(f"<{len(offsets) // size}{width}", offsets[: len(offsets) // size * size])
    number_of = {start: number for number, start in enumerate(starts)}
    ascending = all(before < after for before, after in pairwise(named))
    sound = bool(named) and named[0] == 0 and ascending and all(each in number_of for each in named)
    return [number_of[each] for each in named] if sound else []


def _joined(fragments: Sequence[bytes], first: Sequence[int], num_frames: int) -> list[bytes]:
    ends = [*first[1:], len(fragments)]
    return [b"".join(fragments[start:end]) for start, end in list(zip(first, ends, strict=True))[:num_frames]]
