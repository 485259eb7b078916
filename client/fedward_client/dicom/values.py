"""Read values of elements by their DICOM keyword: text, numbers, dates, sequences.

What decides about a file raises when it is malformed; what only describes it is None or "" then. No
converted value is ever put in an error.
"""

from __future__ import annotations

import math
import re
import struct
from datetime import date
from typing import Literal

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import dictionary_VR, tag_for_keyword

from fedward_client.dicom.elements import Elements, OddDatasetError
from fedward_client.dicom.refusal import Reason, UnusableImageError

MAX_TEXT = 1024
_MAX_NUMBERS = 4096

_CHARACTER_SET = 0x00080005
_STRUCT_OF_VR = {b"US": "H", b"SS": "h", b"UL": "L", b"SL": "l", b"FL": "f", b"FD": "d"}
_DATE = re.compile(r"(\d{4})\.?(\d\d)\.?(\d\d)", re.ASCII)
_TEXT_DELIMITERS = {0x5C}  # a backslash ends what an escape sequence switched on


class _Dictionary(dict[str, tuple[int, bytes]]):
    """Keyword -> (tag, VR): the DICOM dictionary, one look-up a keyword."""

    def __missing__(self, keyword: str) -> tuple[int, bytes]:
        tag = tag_for_keyword(keyword)
        if tag is None:
            raise KeyError(keyword)
        self[keyword] = found = (int(tag), dictionary_VR(tag)[:2].encode())
        return found


_DICTIONARY = _Dictionary()


def is_present(elements: Elements, keyword: str) -> bool:
    """Whether the element is there and not empty."""
    place = elements.places.get(_DICTIONARY[keyword][0])
    return place is not None and place[2] > 0


def raw_value(elements: Elements, keyword: str) -> bytes | None:
    """Bytes of a value; None when absent."""
    return elements.value(_DICTIONARY[keyword][0])


def written_vr(elements: Elements, keyword: str) -> bytes:
    """VR as the file writes it; b"" when implicit or absent."""
    place = elements.places.get(_DICTIONARY[keyword][0])
    return b"" if place is None else place[0]


def sequence(elements: Elements, keyword: str) -> tuple[Elements, ...]:
    """Items of a sequence; none when absent.

    Raises:
        OddDatasetError: not encoded as the standard says.
    """
    return elements.items(_DICTIONARY[keyword][0])


def first_item(elements: Elements, keyword: str) -> Elements | None:
    """First item of a sequence; None when absent, empty or not readable."""
    try:
        return next(iter(sequence(elements, keyword)), None)
    except OddDatasetError:
        return None


def raw_text(elements: Elements, keyword: str) -> str:
    """Text of an element, "" when absent; surrounding blanks are no part of it.

    Raises:
        UnusableImageError: longer than any text of the standard that is asked for here.
    """
    return tagged_text(elements, _DICTIONARY[keyword][0])


def tagged_text(elements: Elements, tag: int) -> str:
    """As `raw_text`, for an element that the dictionary does not name."""
    value = elements.value(tag)
    if not value:
        return ""
    if len(value) > 4 * MAX_TEXT:
        raise UnusableImageError(Reason.MALFORMED)
    if value.isascii() and b"\x1b" not in value:
        text = value.decode("ascii")
    else:
        text = _decoded(value, elements.value(_CHARACTER_SET) or b"")
    if len(text) > MAX_TEXT:
        raise UnusableImageError(Reason.MALFORMED)
    if "\\" in text:
        text = "\\".join(part.strip(" \0") for part in text.split("\\"))
    return text.strip(" \0")


def _decoded(value: bytes, character_set: bytes) -> str:
    """Decode as pydicom does, so that a patient keeps one name through all readers."""
    names = [name.strip() for name in character_set.decode("ascii", "replace").rstrip("\0").split("\\")]
    text = decode_bytes(value, convert_encodings(names), _TEXT_DELIMITERS)
    # Undecodable bytes come out as lone surrogates, which no database or hash accepts.
    return str(text.encode("utf-8", "replace").decode("utf-8"))


def text_or_none(elements: Elements, keyword: str) -> str:
    """Text that only describes: "" also when it cannot be read."""
    try:
        return tagged_text(elements, _DICTIONARY[keyword][0])
    except (ValueError, LookupError, UnusableImageError):
        return ""


def numbers(elements: Elements, keyword: str) -> tuple[float, ...]:
    """All numbers of an element, binary or text; none when absent.

    Raises:
        ValueError: not numbers, not finite, or too many.
        struct.error: the value's length fits no number.
    """
    return tagged_numbers(elements, *_DICTIONARY[keyword])


def tagged_numbers(elements: Elements, tag: int, vr: bytes) -> tuple[float, ...]:
    """As `numbers`, with the VR to assume where the file names none."""
    value = elements.value(tag)
    if not value:
        return ()
    written = elements.places[tag][0]
    code = _STRUCT_OF_VR.get(vr if written in (b"", b"UN") else written)
    found: tuple[float, ...]
    if code is not None:
        order = "<" if elements.encoding.little else ">"
        count = len(value) // struct.calcsize(order + code)
        if count > _MAX_NUMBERS:
            raise ValueError
        found = struct.unpack(f"{order}{count}{code}", value)
    else:
        if len(value) > 32 * _MAX_NUMBERS:
            raise ValueError
        parts = value.decode("ascii").strip(" \0")
        if "_" in parts:  # Python reads 1_0 as ten
            raise ValueError
        found = tuple([float(part) for part in parts.split("\\")]) if parts else ()
    if not all(map(math.isfinite, found)):
        raise ValueError
    return found


def integer(elements: Elements, keyword: str, default: int) -> int:
    """One whole number that decides about the file.

    Raises:
        UnusableImageError: negative, several, or no whole number.
    """
    tag, vr = _DICTIONARY[keyword]
    place = elements.places.get(tag)
    if place is None:
        return default
    if place[0] == b"US" and place[2] == 2:  # nearly all of them
        order: Literal["little", "big"] = "little" if elements.encoding.little else "big"
        return int.from_bytes(elements.data[place[1] : place[1] + 2], order)
    try:
        found = tagged_numbers(elements, tag, vr)
    except (ValueError, struct.error):
        raise UnusableImageError(Reason.MALFORMED) from None
    if not found:
        return default
    if len(found) > 1 or found[0] < 0 or found[0] != int(found[0]):
        raise UnusableImageError(Reason.MALFORMED)
    return int(found[0])


def numbers_or_none(elements: Elements, keyword: str, count: int) -> tuple[float, ...] | None:
    """Exactly `count` numbers that only describe, or None."""
    tag, vr = _DICTIONARY[keyword]
    if tag not in elements.places:
        return None
    try:
        found = tagged_numbers(elements, tag, vr)
    except (ValueError, struct.error):
        return None
    return found if len(found) == count else None


def number_or_none(elements: Elements, keyword: str) -> float | None:
    """One number that only describes, or None."""
    found = numbers_or_none(elements, keyword, 1)
    return None if found is None else float(found[0])


def integer_or_none(elements: Elements, keyword: str) -> int | None:
    """One whole number that only describes, or None; may be negative."""
    found = numbers_or_none(elements, keyword, 1)
    return int(found[0]) if found is not None and found[0] == int(found[0]) else None


def date_or_none(text: str) -> date | None:
    """Calendar date of a DA value, also in the form with dots that predates DICOM.

    >>> date_or_none("20190203")
    datetime.date(2019, 2, 3)
    >>> date_or_none("20190230") is None
    True
    """
    match = _DATE.fullmatch(text)
    try:
        return None if match is None else date(int(match[1]), int(match[2]), int(match[3]))
    except ValueError:
        return None
