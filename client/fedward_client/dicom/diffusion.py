"""Find the diffusion b-value where scanners wrote it before DICOM had an element for it.

A private element is named by its block's creator, not by its number, so the creator is looked for
first. A number that no scanner means is no b-value.
"""

from __future__ import annotations

import struct

from fedward_client.dicom.elements import Elements
from fedward_client.dicom.refusal import UnusableImageError
from fedward_client.dicom.values import tagged_numbers, tagged_text

# creator -> (group, element within the block, VR): the vendors' DICOM conformance statements
_B_VALUE_OF_CREATOR: dict[str, tuple[int, int, bytes]] = {
    "SIEMENS MR HEADER": (0x0019, 0x0C, b"IS"),
    "GEMS_PARM_01": (0x0043, 0x39, b"IS"),
    "Philips Imaging DD 001": (0x2001, 0x03, b"FL"),
    "Image Private Header": (0x0065, 0x09, b"FD"),
}
_GROUPS = sorted({group for group, _, _ in _B_VALUE_OF_CREATOR.values()})
_LARGEST_B_VALUE = 100_000
_GE_OFFSET = 1_000_000_000  # GE adds it to b-values of some sequences


def private_b_value(elements: Elements) -> float | None:
    """B-value in s/mm2 from a vendor's private element, or None."""
    for group in _GROUPS:
        for block in range(0x10, 0x20):
            creator_tag = group << 16 | block
            if creator_tag not in elements.places:
                continue
            found = _B_VALUE_OF_CREATOR.get(_creator(elements, creator_tag))
            if found is None or found[0] != group:
                continue
            value = _first_number(elements, group << 16 | block << 8 | found[1], found[2])
            if value is not None:
                return value
    return None


def _creator(elements: Elements, tag: int) -> str:
    try:
        return tagged_text(elements, tag)
    except (ValueError, LookupError, UnusableImageError):
        return ""


def _first_number(elements: Elements, tag: int, vr: bytes) -> float | None:
    try:
        found = tagged_numbers(elements, tag, vr)
    except (ValueError, struct.error):
        return None
    if not found:
        return None
    value = float(found[0])
    value = value - _GE_OFFSET if value >= _GE_OFFSET else value
    return value if 0 <= value <= _LARGEST_B_VALUE else None
