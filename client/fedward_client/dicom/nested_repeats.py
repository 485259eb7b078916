"""Refuse a sequence item that says something twice, where pydicom read it (hop 2).

pydicom keeps of each element what comes last and others what comes first, so that one file can mean two
things. What it dropped leaves a gap: elements of an item follow one another without any.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset

from fedward_client.dicom.elements import UNDEFINED_LENGTH
from fedward_client.dicom.refusal import Reason, UnusableImageError

_HEADER_BYTES = (8, 12)
_DELIMITER_BYTES = 8


def refuse_nested_repeats(dataset: Dataset) -> None:
    """Look into all sequences that pydicom read; others are walked strictly when they are asked for.

    Raises:
        UnusableImageError: something in an item was passed over.
    """
    for element in _stored(dataset):
        if isinstance(element, DataElement) and element.VR == "SQ":
            _end_of_sequence(element)


def _stored(dataset: Dataset) -> Iterable[RawDataElement | DataElement]:
    found = (dataset.get_item(tag) for tag in dataset.keys())  # noqa: SIM118 - iterating converts values
    return [each for each in found if each is not None]


def _end_of_sequence(sequence: DataElement) -> int:
    """Where it ends; it was of undefined length, or pydicom would not have read it yet."""
    position = _place_of(sequence)
    for item in sequence.value:
        position = _end_of_item(item)
    return position + _DELIMITER_BYTES


def _end_of_item(item: Dataset) -> int:
    position = int(item.seq_item_tell) + _HEADER_BYTES[0]
    for element in sorted(_stored(item), key=_place_of):
        if position >= 0 and _place_of(element) - position not in _HEADER_BYTES:
            raise UnusableImageError(Reason.MALFORMED)
        position = _end_of_element(element)
    return position + (_DELIMITER_BYTES if item.is_undefined_length_sequence_item else 0)


def _end_of_element(element: RawDataElement | DataElement) -> int:
    """Where it ends; -1 when pydicom does not tell."""
    if isinstance(element, DataElement):
        return _end_of_sequence(element) if element.VR == "SQ" else -1
    return -1 if element.length == UNDEFINED_LENGTH else element.value_tell + element.length


def _place_of(element: RawDataElement | DataElement) -> int:
    """Where its value begins."""
    return element.value_tell if isinstance(element, RawDataElement) else int(element.file_tell or 0)
