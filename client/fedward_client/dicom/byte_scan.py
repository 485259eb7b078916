"""Search the raw bytes of a file for identifiers: the proof that a copy is safe, file by file.

The parser is not asked what the file says; its bytes are. They are searched in front of the pixels, in
the pixels, and in whatever of it can be inflated, for every spelling that `needles.py` knows, in one
pass whatever their number.

What a clean result means: none of the searched spellings is in these bytes. What it does not mean: that
no other text is there. Text that is part of the picture is not bytes of text (see `gate.py`, `ocr.py`);
text behind a lossy codec, encryption or another compression than deflate is not seen; values shorter
than the limits of `needles.py` are not searched for, and the report says how many.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.datadict import dictionary_VR

from fedward_client.dicom.elements import UNDEFINED_LENGTH, Elements, OddDatasetError
from fedward_client.dicom.needles import Needle, NeedleSet
from fedward_client.dicom.parser import ParsedFile, contained, parse_file
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.syntaxes import DEFLATED_IMAGE_FRAME

Zone = Literal["header", "pixels"]

MAX_INFLATED_BYTES = 256 * 2**20
"""So much is inflated of one file, all parts together; a file that holds more is not proven."""

_LONG_VALUE = 64  # bytes; binary values longer than this are searched as pixels are
_BINARY_VRS = frozenset(("OB", "OW", "OD", "OF", "OL", "OV", "UN", "FL", "FD", "US", "SS", "UL", "SL"))
_STREAM = re.compile(rb"\x78[\x01\x5e\x9c\xda]|\x1f\x8b\x08")  # how zlib and gzip begin
_STREAM_PIECE = 4096
_SHORTEST_STREAM = 16  # inflated bytes; less is chance
_TEXT_SEGMENTS = frozenset((0xFE, 0x64, *range(0xE0, 0xF0)))
_PICTURE_BEGINS = frozenset((0xDA, 0x90))
_ITEM = b"\xfe\xff\x00\xe0"

_PREFIX = 4
_TABLE_BITS = 20
_MULTIPLIER = np.uint32(2654435761)  # Knuth's: spreads neighbouring values over the table


@dataclass(frozen=True)
class Leak:
    """One identifier found where it must not be; says what and how, never the value.

    Args:
        keyword: of the source's element.
        notation: how it was spelled: "text", "utf-16", "base64", ...
        zone: in front of the pixels, or among them.
    """

    keyword: str
    notation: str
    zone: Zone


def scan(data: bytes, needles: NeedleSet, own: Iterable[bytes] = ()) -> tuple[Leak, ...]:
    """Search a whole file, inflated parts of it included.

    Args:
        data: the file, DICOM or not.
        needles: what to look for.
        own: texts that the exporting software itself writes into every header ("Clean Pixel Data
            Option"); blotted out first, so that a patient called Clean does not condemn the file.

    Returns:
        What was found, without repetition; nothing means that the file is clean.

    Raises:
        UnusableImageError: more would have to be inflated than is permitted, so nothing is proven.
    """
    header = _Finder([entry for entry in needles.needles if not entry[0].folded])
    header_in_any_case = _Finder([entry for entry in needles.needles if entry[0].folded])
    pixels = _Finder([entry for entry in header.entries if entry[0].in_pixels])
    found: dict[Leak, None] = {}
    for zone, part in _parts(data):
        if zone == "pixels":
            hits = list(pixels.hits(part))
        else:
            for text in own:
                part = part.replace(text, bytes(len(text)))
            hits = [*header.hits(part), *header_in_any_case.hits(part.lower())]
        for needle, keyword in hits:
            found.setdefault(Leak(keyword, needle.notation, zone))
    return tuple(found)


def scan_text(text: str, needles: NeedleSet) -> bool:
    """Whether one short text holds an identifier, spelled as in a header."""
    part = text.encode("utf-8", "surrogatepass")
    folded = part.lower()
    return any(_occurs(folded if needle.folded else part, needle) for needle, _ in needles.needles)


class _Finder:
    """Looks for many patterns in one pass: a table of first bytes, then the pattern itself."""

    def __init__(self, entries: list[tuple[Needle, str]]) -> None:
        self.entries = entries
        self._short = [entry for entry in entries if len(entry[0].pattern) < _PREFIX]
        self._by_prefix: dict[bytes, list[tuple[Needle, str]]] = {}
        for entry in entries:
            if len(entry[0].pattern) >= _PREFIX:
                self._by_prefix.setdefault(entry[0].pattern[:_PREFIX], []).append(entry)
        prefixes = np.frombuffer(b"".join(self._by_prefix), dtype="<u4")
        self._prefixes = np.sort(prefixes)
        self._table = np.zeros(2**_TABLE_BITS, dtype=bool)
        self._table[_hashed(prefixes)] = True

    def hits(self, part: bytes) -> Iterator[tuple[Needle, str]]:
        """Yield what is found, possibly more than once."""
        for needle, keyword in self._short:
            if _occurs(part, needle):
                yield needle, keyword
        for position in self._candidates(part):
            for needle, keyword in self._by_prefix[part[position : position + _PREFIX]]:
                if part.startswith(needle.pattern, position) and _stands_alone(part, position, needle):
                    yield needle, keyword

    def _candidates(self, part: bytes) -> Iterator[int]:
        if not len(self._prefixes):
            return
        for offset in range(min(_PREFIX, max(0, len(part) - _PREFIX + 1))):
            words = np.frombuffer(part, dtype="<u4", offset=offset, count=(len(part) - offset) // _PREFIX)
            places = np.flatnonzero(self._table[_hashed(words)])
            found = words[places]
            nearest = np.minimum(np.searchsorted(self._prefixes, found), len(self._prefixes) - 1)
            for place in places[self._prefixes[nearest] == found]:
                yield int(place) * _PREFIX + offset


def _hashed(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    spread: NDArray[np.uint32] = (words * _MULTIPLIER) >> np.uint32(32 - _TABLE_BITS)
    return spread


def _occurs(part: bytes, needle: Needle) -> bool:
    position = part.find(needle.pattern)
    while position >= 0:
        if _stands_alone(part, position, needle):
            return True
        position = part.find(needle.pattern, position + 1)
    return False


def _stands_alone(part: bytes, position: int, needle: Needle) -> bool:
    if not needle.bounded:
        return True
    end = position + len(needle.pattern)
    before = part[position - 1 : position] if position else b""
    after = part[end : end + 1]
    return not (before and before in needle.bounded) and not (after and after in needle.bounded)


def _parts(data: bytes) -> Iterator[tuple[Zone, bytes]]:
    """The file as it is to be searched: header, pixels, and what can be inflated of both."""
    budget = _Budget(MAX_INFLATED_BYTES)
    header, binaries = _divide(data, budget)
    yield "header", header
    for part in _streams(header, budget):
        yield "header", part
    for binary in binaries:
        yield "pixels", binary
        for part in _streams(binary, budget):
            yield "pixels", part


class _Budget:
    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes

    def inflate(self, data: bytes | memoryview, window_bits: int) -> bytes:
        """What a stream holds, as far as it can be inflated; b"" when it is none.

        Fed piece by piece: zlib copies what it leaves over, and most of what begins like a stream among
        pixels ends after a few bytes.

        Raises:
            UnusableImageError: over the limit.
        """
        inflater = zlib.decompressobj(window_bits)
        found: list[bytes] = []
        with suppress(zlib.error):
            for start in range(0, len(data), _STREAM_PIECE):
                if inflater.eof:
                    break
                found.append(inflater.decompress(data[start : start + _STREAM_PIECE], self._left + 1))
                self._left -= len(found[-1])
                if self._left < 0:
                    raise UnusableImageError(Reason.OVER_LIMIT)
        return b"".join(found)


def _streams(part: bytes, budget: _Budget) -> Iterator[bytes]:
    for match in _STREAM.finditer(part):
        found = budget.inflate(memoryview(part)[match.start() :], zlib.MAX_WBITS | 32)
        if len(found) >= _SHORTEST_STREAM:
            yield found


def _divide(data: bytes, budget: _Budget) -> tuple[bytes, list[bytes]]:
    """Header without its long binary values, and those values with the pixels.

    What cannot be parsed is header throughout: stricter, with more chance hits.
    """
    try:
        with contained(Reason.MALFORMED):
            parsed = parse_file(data, max_inflated=MAX_INFLATED_BYTES)
            spans = sorted(_long_values(parsed.elements)) if parsed.elements.data is parsed.body else []
    except UnusableImageError:
        return data, []
    if parsed.pixel_bytes_left is None and len(parsed.body) >= MAX_INFLATED_BYTES:
        raise UnusableImageError(Reason.OVER_LIMIT)
    kept = [] if parsed.body is data else [data]  # of a deflated file its own bytes count as well
    binaries = []
    position = 0
    header_end = parsed.header_end if parsed.pixel_tag is not None else len(parsed.body)
    for start, end in spans:
        if start < header_end:
            kept.append(parsed.body[position:start])
            binaries.append(parsed.body[start:end])
            position = end
    kept.append(parsed.body[position:header_end])
    if parsed.pixel_tag is not None:
        binaries += _pixel_parts(parsed, budget)
        if parsed.pixel_length == UNDEFINED_LENGTH:
            *fragments, behind = _fragments(parsed.body[parsed.pixel_start :])
            for fragment in fragments:
                kept += _comments(fragment)
        else:
            behind = parsed.body[parsed.pixel_start + parsed.pixel_length :]
        kept.append(behind)
    return b"\0".join(kept), binaries


def _pixel_parts(parsed: ParsedFile, budget: _Budget) -> list[bytes]:
    """Pixels and what follows; compressed ones joined, so that nothing hides across fragments."""
    rest = parsed.body[parsed.pixel_start :]
    if parsed.pixel_length != UNDEFINED_LENGTH:
        return [rest[: parsed.pixel_length]]
    fragments = list(_fragments(rest))
    parts = [b"".join(fragments)]
    if parsed.syntax == DEFLATED_IMAGE_FRAME:
        parts += [budget.inflate(fragment, -zlib.MAX_WBITS) for fragment in fragments[1:]]
    return parts


def _fragments(rest: bytes) -> Iterator[bytes]:
    """Values of the items, and whatever comes behind the last one."""
    position = 0
    while rest[position : position + 4] == _ITEM and position + 8 <= len(rest):
        (length,) = struct.unpack_from("<L", rest, position + 4)
        yield rest[position + 8 : position + 8 + length]
        position += 8 + length
    yield rest[position:]


def _comments(fragment: bytes) -> Iterator[bytes]:
    """Texts that JPEG, JPEG-LS and JPEG 2000 have in front of the picture, and so read as header is.

    Source: ITU-T T.81 B.2.4.5 and B.2.4.6 (COM, APPn), T.800 A.9.2 (COM).
    """
    if fragment[:2] not in (b"\xff\xd8", b"\xff\x4f"):
        return
    position = 2
    while fragment[position : position + 1] == b"\xff" and position + 4 <= len(fragment):
        marker, length = fragment[position + 1], int.from_bytes(fragment[position + 2 : position + 4], "big")
        if marker in _PICTURE_BEGINS:
            return
        if marker in _TEXT_SEGMENTS:
            yield fragment[position + 4 : position + 2 + length]
        position += 2 + max(length, 2)


def _long_values(elements: Elements) -> Iterator[tuple[int, int]]:
    for tag, (vr, start, length) in elements.places.items():
        if vr == b"SQ" or length == UNDEFINED_LENGTH:
            try:
                for item in elements.items(tag):
                    yield from _long_values(item)
            except OddDatasetError:
                continue
        elif length > _LONG_VALUE and (vr.decode("latin-1") or _vr_of(tag))[:2] in _BINARY_VRS:
            yield start, start + length


def _vr_of(tag: int) -> str:
    """VR of an element whose file does not say it; "" for one that the dictionary does not know."""
    try:
        return str(dictionary_VR(tag))
    except KeyError:
        return ""
