"""Numbers that a safe copy may keep: as many as the standard permits, naming nobody (hop 3).

A list of numbers is a place for bytes. So an element keeps no more numbers than its multiplicity allows, a
pointer points at an element that the dictionary knows, a look-up table is as long as its descriptor says, and
a number that is a patient's number or birth date is emptied. Within these bounds numbers are not judged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from pydicom.datadict import dictionary_VM
from pydicom.dataset import Dataset

from fedward_client.dicom.deidentify_rules import NUMBER_VRS, keyword_of
from fedward_client.dicom.identifiers import Identifier

FEWEST_DIGITS = 6
"""Of a patient's number that is looked for among numbers; shorter ones are common."""

_PICTURE_GROUPS = (0x0028, 0x7FE0, 0x5200)
_OTHER = re.compile(r"[^0-9]")
_TABLES = (
    ("LUTData", "LUTDescriptor"),
    *(
        (f"{colour}PaletteColorLookupTableData", f"{colour}PaletteColorLookupTableDescriptor")
        for colour in ("Red", "Green", "Blue", "Alpha")
    ),
)
_SEGMENTED = tuple((f"Segmented{data}", descriptor) for data, descriptor in _TABLES[1:])
_ALL_ENTRIES = 65536  # which a descriptor writes as 0


@cache
def most_values(tag: int) -> float:
    """How many values an element may have; infinite when the standard sets no bound.

    >>> most_values(0x00280030), most_values(0x00281050)
    (2, inf)
    """
    try:
        upper = re.split(r"-| or ", str(dictionary_VM(tag)))[-1]
    except KeyError:
        return 0
    return int(upper) if upper.isdigit() else math.inf


def may_stay(tag: int, vr: str, values: Sequence[Any]) -> bool:
    """Whether numbers are as many as they may be and, of pointers, point at something."""
    if len(values) > most_values(tag):
        return False
    return vr != "AT" or all(keyword_of(int(value)) for value in values)


def drop_odd_tables(copy: Dataset) -> None:
    """Remove look-up tables of one dataset or item that are not as long as their descriptors say."""
    for data, descriptor in _TABLES:
        if data in copy and not _is_as_long_as_told(copy[data].value, copy.get(descriptor)):
            del copy[data]
    for data, descriptor in _SEGMENTED:
        if data in copy and descriptor not in copy:
            del copy[data]


def _is_as_long_as_told(table: Any, descriptor: Any) -> bool:
    try:
        num_entries = int(descriptor[0]) or _ALL_ENTRIES
    except (TypeError, ValueError, IndexError):
        return False
    if isinstance(table, bytes):  # of 16 bits an entry, or of 8 up to an even length
        return len(table) in (2 * num_entries, num_entries, num_entries + num_entries % 2)
    return isinstance(table, Sequence) and len(table) == num_entries


def empty_telling_numbers(copy: Dataset, identifiers: Iterable[Identifier], written: Iterable[str]) -> None:
    """Empty numbers that say what a removed number or date said, in whatever form.

    Args:
        copy: cleaned.
        identifiers: of the source.
        written: replacement values, which may equal another one's original.
    """
    telling = frozenset(_numbers_of(identifiers)) - {float(each) for each in written if each.isdigit()}
    if not telling:
        return
    singles = frozenset(float(np.float32(each)) for each in telling if each < 1e38)  # as FL would round them
    for element in copy.iterall():
        if element.VR not in NUMBER_VRS - {"AT"} or element.tag.group in _PICTURE_GROUPS:
            continue
        value = element.value
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        known = singles if element.VR == "FL" else telling
        if any(float(each) in known for each in values if each not in (None, "")):
            element.value = None


def _numbers_of(identifiers: Iterable[Identifier]) -> Iterator[float]:
    for identifier in identifiers:
        if identifier.direct or identifier.kind == "date":
            digits = _OTHER.sub("", identifier.text[:64])
            digits = digits[:8] if identifier.kind == "date" else digits
            if len(digits) >= FEWEST_DIGITS and len(set(digits)) > 2:
                yield float(digits)
