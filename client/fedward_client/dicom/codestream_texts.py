"""Blank what a compressed picture says beside its picture, without touching the picture (hop 3).

JPEG, JPEG-LS and JPEG 2000 have segments for comments and applications: camera, program, place, and whatever
a device thought worth telling, names included. Decoders pass over them, so their bytes can be zeroed where
they stand and nothing moves. Some things cannot be blanked: boxes around a codestream, bytes behind its end,
segments of unknown meaning, an offset table that names no fragment. Such pixels are decoded instead.

Not seen: what an encoder hides in the coded picture itself, or in the spare bytes of a run-length segment.
"""

from __future__ import annotations

import re
import struct
from itertools import pairwise

from pydicom.uid import RLELossless

from fedward_client.dicom.elements import UNDEFINED_LENGTH
from fedward_client.dicom.fragments import item_places
from fedward_client.dicom.parser import ParsedFile
from fedward_client.dicom.values import raw_value

_FILLING = b"\0\xff"  # behind the end of a codestream, up to an even length

# Coded data of JPEG holds 0xFF only in front of 0x00 or a restart; of JPEG-LS, of a byte below 0x80.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_MARKER_LS = re.compile(rb"\xff[\x80-\xcf\xd8-\xfe]")
_COMMENT, _APPLICATIONS = 0xFE, range(0xE0, 0xF0)
# 0xC8 is reserved, 0xDE and 0xDF are of pictures in several sizes: what they hold is not known here.
_JPEG_TABLES = frozenset((*range(0xC0, 0xC8), *range(0xC9, 0xD0), *range(0xDA, 0xDE), 0xF7, 0xF8))
_SCAN, _LS_FRAME = 0xDA, 0xF7
# Needed to know the colours, with their lengths: too short for a thumbnail or a text.
_HARMLESS = ((0xE0, b"JFIF\0", 14), (0xEE, b"Adobe", 12), (0xE8, b"mrfx", 5))

_J2K_COMMENT, _TILE, _DATA, _END = 0x64, 0x90, 0x93, 0xD9
_J2K_TABLES = frozenset((0x50, 0x51, 0x52, 0x53, 0x55, 0x57, 0x58, 0x59, 0x5C, 0x5D, 0x5E, 0x5F))
_J2K_TABLES |= frozenset((0x60, 0x61, 0x63))


def without_texts(parsed: ParsedFile, num_frames: int) -> bytes | None:
    """Value of compressed pixel data with its comments blanked; None when that cannot be done.

    Args:
        parsed: a compressed file.
        num_frames: as declared.

    Source: DICOM PS3.5 A.4 and G.5; ITU-T T.81 B.1 and B.2, T.87 C, T.800 A.
    """
    blank = _run_lengths if parsed.syntax == RLELossless else blank_texts
    pixels = parsed.body[parsed.pixel_start :]
    if parsed.pixel_length != UNDEFINED_LENGTH:
        return None
    places = item_places(pixels)
    if places is None or len(places[0]) < 2:
        return None
    (table_start, table_end), *fragments = places[0]
    starts = [start - fragments[0][0] for start, _ in fragments]
    extended = raw_value(parsed.elements, "ExtendedOffsetTable") or b""
    if not _names_fragments(pixels[table_start:table_end], starts, "<L"):
        return None
    if not _names_fragments(extended, starts, "<Q"):
        return None
    if raw_value(parsed.elements, "ExtendedOffsetTableLengths") and not _says_lengths(parsed, fragments):
        return None
    if num_frames != len(fragments) and num_frames != 1:
        return None
    cleaned = bytearray(pixels[: fragments[-1][1]])
    frames = [[fragment] for fragment in fragments] if num_frames == len(fragments) else [fragments]
    for frame in frames:
        blanked = blank(b"".join(pixels[start:end] for start, end in frame))
        if blanked is None:
            return None
        position = 0
        for start, end in frame:
            cleaned[start:end] = blanked[position : position + end - start]
            position += end - start
    return bytes(cleaned)


def _run_lengths(frame: bytes) -> bytes | None:
    """A run-length frame as it is, if nothing stands in the spare places of its header."""
    if len(frame) < 64:
        return None
    count, *offsets = struct.unpack_from("<16L", frame)
    ascending = all(before < after for before, after in pairwise(offsets[:count]))
    sound = 1 <= count <= 15 and offsets[0] == 64 and ascending and not any(offsets[count:])
    return frame if sound else None


def blank_texts(codestream: bytes) -> bytes | None:
    """One JPEG, JPEG-LS or JPEG 2000 codestream with its comments blanked; None when that cannot be done."""
    blanked = bytearray(codestream)
    try:
        if codestream[:2] == b"\xff\x4f":
            return bytes(blanked) if _blank_jpeg2000(blanked) else None
        return bytes(blanked) if codestream[:2] == b"\xff\xd8" and _blank_jpeg(blanked) else None
    except (struct.error, IndexError):
        return None


def _names_fragments(table: bytes, starts: list[int], width: str) -> bool:
    """Whether an offset table says where fragments begin, and nothing else."""
    size = struct.calcsize(width)
    if len(table) % size:
        return False
    named = [offset for (offset,) in struct.iter_unpack(width, table)]
    known = set(starts)
    ascending = all(before < after for before, after in pairwise(named))
    return not named or (named[0] == 0 and ascending and all(offset in known for offset in named))


def _says_lengths(parsed: ParsedFile, fragments: list[tuple[int, int]]) -> bool:
    said = raw_value(parsed.elements, "ExtendedOffsetTableLengths") or b""
    lengths = [end - start for start, end in fragments]
    # The length of a frame, of which the last byte may be filling.
    return len(said) == 8 * len(lengths) and all(
        length - 1 <= told <= length
        for (told,), length in zip(struct.iter_unpack("<Q", said), lengths, strict=True)
    )


def _blank_jpeg(data: bytearray) -> bool:  # noqa: C901 - one loop over markers
    position = 2
    next_marker = _MARKER
    while True:
        if data[position] != 0xFF:
            return False
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == _END:
            return not data[position + 2 :].strip(_FILLING)
        (length,) = struct.unpack_from(">H", data, position + 2)
        start, end = position + 4, position + 2 + length
        if length < 2 or end > len(data):
            return False
        if marker == _COMMENT or marker in _APPLICATIONS:
            if not _is_harmless(marker, data[start:end]):
                data[start:end] = bytes(end - start)
        elif marker not in _JPEG_TABLES:
            return False
        if marker == _LS_FRAME:
            next_marker = _MARKER_LS
        position = end
        if marker == _SCAN:
            found = next_marker.search(data, end)
            if found is None:
                return False
            position = found.start()


def _is_harmless(marker: int, value: bytes | bytearray) -> bool:
    return any(
        marker == known and value.startswith(name) and len(value) <= length
        for known, name, length in _HARMLESS
    )


def _blank_jpeg2000(data: bytearray) -> bool:
    """Main header, then the header of each part of a tile; what lies between is the coded picture."""
    position, end_of_part = 2, 0
    while True:
        mark, marker = data[position], data[position + 1]
        if mark != 0xFF:
            return False
        if marker == _END:
            return not data[position + 2 :].strip(_FILLING)
        if marker == _DATA:
            if end_of_part < position + 2:  # it would be walked for ever
                return False
            position = end_of_part
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        start, end = position + 4, position + 2 + length
        if length < 2 or end > len(data):
            return False
        if marker == _TILE:
            (size,) = struct.unpack_from(">L", data, position + 6)
            # 0: the last one, up to the end of the codestream
            end_of_part = position + size if size else len(data.rstrip(b"\0")) - 2
        elif marker == _J2K_COMMENT:
            data[start + 2 : end] = bytes(max(end - start - 2, 0))
        elif marker not in _J2K_TABLES:
            return False
        position = end
