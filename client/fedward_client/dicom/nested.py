"""Read the objects that carry labels: segmentations, measurement reports, structure sets (hop 3).

They are trees of sequences, thousands of items deep or wide, and anyone may have written them. So the
tree is walked by the strict walk of `elements.py`, which converts nothing, and only what is asked for
is looked at; size, items and depth are bounded before. Values come by DICOM keyword. Codes come without
their meaning: that is free text.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

from pydicom import uid
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.sr.coding import Code

from fedward_client.dicom.elements import Elements
from fedward_client.dicom.parser import ParsedFile, parse_file
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.values import integer, numbers, raw_text
from fedward_client.labels import Concept

MAX_ITEMS = 250_000
"""Sequence items of one object: a segmentation has 6 to 12 a frame."""

MAX_INFLATED_BYTES = 128 * 2**20
"""A deflated object may become so large."""

_ITEM_TAGS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # little and big endian
_SNOMED_RT = ("SRT", "SNM3", "99SDM")  # three designators of one scheme (PS3.16 8.2)
_MAX_ODD_BYTES = 4 * 2**20
_MAX_ODD_ITEMS = 20_000


def open_object(data: bytes, sop_classes: Collection[str], *, max_bytes: int) -> ParsedFile:
    """Parse one object held in memory; call it inside `contained`.

    Args:
        data: the whole file.
        sop_classes: what it may be.
        max_bytes: of the file.

    Raises:
        UnusableImageError: not DICOM, another kind of object, or beyond the limits.
    """
    if len(data) > max_bytes:
        raise UnusableImageError(Reason.OVER_LIMIT)
    num_items = num_items_in(data)
    if num_items > MAX_ITEMS:
        raise UnusableImageError(Reason.OVER_LIMIT)
    # pydicom reads what departs from the standard, but at a kilobyte an item.
    tolerant = num_items <= _MAX_ODD_ITEMS and len(data) <= _MAX_ODD_BYTES
    parsed = parse_file(data, max_inflated=MAX_INFLATED_BYTES, tolerant=tolerant)
    if parsed.body is not data and num_items_in(parsed.body) > MAX_ITEMS:
        raise UnusableImageError(Reason.OVER_LIMIT)
    sop_class = text(parsed.elements, "SOPClassUID")
    if sop_class not in sop_classes:
        name = str(uid.UID(sop_class).name)
        raise UnusableImageError(
            Reason.SOP_CLASS, "not in the DICOM dictionary" if name == sop_class else name
        )
    return parsed


def text(elements: Elements, keyword: str) -> str:
    """Text of an element, "" when it is absent."""
    return raw_text(elements, keyword)


def whole(elements: Elements, keyword: str, default: int = -1) -> int:
    """Whole number, not negative; `default` when it is absent.

    Raises:
        UnusableImageError: it is something else.
    """
    return integer(elements, keyword, default)


def decimals(elements: Elements, keyword: str) -> tuple[float, ...]:
    """All numbers of an element, finite; none when it is absent.

    Raises:
        ValueError: not numbers, not finite, or too many.
    """
    return numbers(elements, keyword)


def items(elements: Elements, keyword: str) -> tuple[Elements, ...]:
    """Items of a sequence; none when it is absent or empty."""
    return elements.items(tag_of(keyword))


def first_item(elements: Elements, keyword: str) -> Elements | None:
    """First item of a sequence, or None."""
    return next(iter(items(elements, keyword)), None)


def concept(elements: Elements, keyword: str) -> Concept | None:
    """Code in a code sequence, or None when it is absent or empty.

    Source: DICOM PS3.3 8.8; a value is short, long, or a URN.
    """
    code = first_item(elements, keyword)
    if code is None:
        return None
    value = text(code, "CodeValue") or text(code, "LongCodeValue") or text(code, "URNCodeValue")
    return Concept(text(code, "CodingSchemeDesignator"), value) if value else None


def same_concept(one: Concept | None, other: Concept | None) -> bool:
    """Whether two codes mean the same; the retired SNOMED-RT codes equal their SNOMED CT successors.

    >>> same_concept(Concept("SRT", "T-62000"), Concept("SCT", "10200004"))
    True
    >>> same_concept(Concept("DCM", "121071"), Concept("99LOCAL", "121071"))
    False
    """
    return one is not None and other is not None and bool(_code(one) == _code(other))


def _code(concept: Concept) -> Code:
    scheme = "SRT" if concept.scheme in _SNOMED_RT else concept.scheme
    return Code(concept.value, scheme, "")


@cache
def tag_of(keyword: str) -> int:
    """Tag of a DICOM keyword."""
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise KeyError(keyword)
    return tag


@cache
def _vr_of(keyword: str) -> bytes:
    return dictionary_VR(tag_of(keyword)).encode()


def num_items_in(data: bytes) -> int:
    """At most as many items as there are item tags anywhere, by chance in pixels too."""
    return max(map(data.count, _ITEM_TAGS))
