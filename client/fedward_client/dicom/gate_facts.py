"""What a header says about text, screens and faces in its pixels: facts for the gate (hop 2).

Headers only, and robust: a value that cannot be read, or that the standard does not know, counts as the
worst it could mean. Two readers stand behind one function, because the index has an `Elements` walk in
hand and the export a pydicom dataset; both must find the same (a test reads every real file twice).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from pydicom.dataset import Dataset

from fedward_client.dicom.elements import UNDEFINED_LENGTH, Elements, OddDatasetError
from fedward_client.dicom.parser import contained, parse_file
from fedward_client.dicom.refusal import Reason
from fedward_client.dicom.values import tagged_numbers, tagged_text

Answer = Literal["yes", "no", "absent"]
_Fact = TypeVar("_Fact")

_SOP_CLASS, _MODALITY, _IMAGE_TYPE = 0x00080016, 0x00080060, 0x00080008
_CONVERSION_TYPE, _SERIES_DESCRIPTION, _PROTOCOL = 0x00080064, 0x0008103E, 0x00181030
_BODY_PART, _BURNED_IN, _RECOGNIZABLE = 0x00180015, 0x00280301, 0x00280302
_IDENTITY_REMOVED, _ROWS, _COLUMNS, _BITS_ALLOCATED = 0x00120062, 0x00280010, 0x00280011, 0x00280100
_SAMPLES, _PHOTOMETRIC, _PLACE = 0x00280002, 0x00280004, (0x00200032, 0x00200037)
_REGIONS = 0x00186011
# Written by frame grabbers and film scanners (PS3.3 C.8.6.1), whatever SOP class they chose.
_CAPTURE_DEVICE = (0x00181010, 0x00181012, 0x00181014, 0x00181016, 0x00181018, 0x00181019)
_REGION_FORMAT, _REGION_CORNERS = 0x00186012, (0x0018601A, 0x00186018, 0x0018601E, 0x0018601C)
_PICTURE_FORMATS = (1, 2, 3)  # 2D, M-mode, spectral; not "none", wave form and graphics

_MAX_REGIONS = 64
# Not SCREENING, nor SnapShot, which is how some scanners call an acquisition.
_CAPTURE_WORDS = re.compile(
    r"SCREEN(?!ING)|SAVE\b|CAPTURE|SCANNED|DIGITI[SZ]ED|DOSE.?(INFO|REPORT|SUMMARY|RECORD|PAGE)"
    r"|(CSA|PATIENT|EXAM).?(REPORT|PROTOCOL)|REPORT|RESULT.?(TABLE|PAGE)|KEY.?(IMAGE|OBJECT)"
    r"|BILDSCHIRM|BERICHT|(PATIENTEN|DOSIS).?PROTOKOLL|[EÉ]CRAN\b|RAPPORT|PANTALLA|INFORME|SCHERMATA|REFERTO"
)
_HEAD = re.compile(r"HEAD|BRAIN|SKULL|FACE|FACIAL|ORBIT|SINUS|JAW|IAC|MANDIBLE|MAXILLA|NASAL|NOSE|EAR\b|EYE")


class Box(NamedTuple):
    """Part of an image, rows and columns counted from 0; `bottom` and `right` are the first ones outside."""

    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True)
class GateFacts:
    """What one header says that bears on text, screens and faces in the pixels.

    Attributes:
        sop_class: UID, "" when absent.
        burned_in: BurnedInAnnotation; a value that is neither YES nor NO counts as "yes".
        recognizable: RecognizableVisualFeatures, likewise.
        conversion_type: ConversionType, "" when absent.
        image_type: values in capitals, () when absent.
        says_capture: a series or protocol description that speaks of a screen, report or scan.
        capture_device: an element that only frame grabbers and film scanners write.
        overlay_planes: number of overlay groups (60xx).
        overlay_in_pixels: an overlay that lies, or may lie, in unused bits of the pixels.
        num_private: private elements outside sequences.
        regions: ultrasound regions that hold picture, as written, within one pixel of the image.
        regions_unusable: regions are there, but contradict the image or cannot be read.
        head: BodyPartExamined names a part of the head.
        identity_removed: PatientIdentityRemoved.
        malformed: DICOM keywords of deciding elements that could not be read.
        colour: stored in colour or with a palette.
        placeless: neither ImagePositionPatient nor ImageOrientationPatient is there.
    """

    sop_class: str = field(repr=False)
    modality: str = field(repr=False)
    burned_in: Answer
    recognizable: Answer
    conversion_type: str = field(repr=False)
    image_type: tuple[str, ...] = field(repr=False)
    says_capture: bool
    capture_device: bool
    rows: int
    columns: int
    overlay_planes: int
    overlay_in_pixels: bool
    num_private: int
    regions: tuple[Box, ...]
    regions_unusable: bool
    head: bool
    identity_removed: Answer
    malformed: frozenset[str] = frozenset()
    colour: bool = False
    placeless: bool = False


def read_gate_facts(data: bytes) -> GateFacts:
    """Read the facts of one file held in memory, stopping in front of its pixels.

    Raises:
        UnusableImageError: empty, not DICOM, a deflate bomb, or too damaged to walk.
    """
    with contained(Reason.MALFORMED):
        return gate_facts(parse_file(data).elements)


def gate_facts(dataset: Dataset | Elements) -> GateFacts:
    """Take the facts out of a parsed header; never raises for a malformed value.

    Args:
        dataset: a pydicom dataset (call it inside `parser.contained`, pydicom warns) or the elements of
            `parser.parse_file`, as read without `specific_tags`: overlays and private elements count.
    """
    values: _Values = _FromElements(dataset) if isinstance(dataset, Elements) else _FromDataset(dataset)
    malformed: set[str] = set()

    def fact(keyword: str, read: Callable[[], _Fact], worst: _Fact) -> _Fact:
        try:
            return read()
        except Exception:  # hostile input; what it was goes nowhere
            malformed.add(keyword)
            return worst

    def text(keyword: str, tag: int) -> str:
        return fact(keyword, lambda: values.text(tag).upper(), "")

    no_tags: Set[int] = frozenset()
    tags = fact("DataSet", values.tags, no_tags)
    rows = fact("Rows", lambda: _size(values, _ROWS), 0)
    columns = fact("Columns", lambda: _size(values, _COLUMNS), 0)
    regions = fact("SequenceOfUltrasoundRegions", lambda: _regions(values, rows, columns), None)
    overlay_groups = {tag >> 16 for tag in tags if tag >> 24 == 0x60 and not tag & 0x10000}
    image_type = text("ImageType", _IMAGE_TYPE)
    described = [values.text_or_blank(tag).upper() for tag in (_SERIES_DESCRIPTION, _PROTOCOL)]
    malformed.discard("SequenceOfUltrasoundRegions")  # told by `regions_unusable`
    return GateFacts(
        sop_class=fact("SOPClassUID", lambda: values.text(_SOP_CLASS), ""),
        modality=text("Modality", _MODALITY),
        burned_in=fact("BurnedInAnnotation", lambda: _answer(values, _BURNED_IN), "yes"),
        recognizable=fact("RecognizableVisualFeatures", lambda: _answer(values, _RECOGNIZABLE), "yes"),
        conversion_type=text("ConversionType", _CONVERSION_TYPE),
        image_type=tuple(part.strip() for part in image_type.split("\\")) if image_type else (),
        says_capture=any(_CAPTURE_WORDS.search(words) for words in (image_type, *described)),
        capture_device=not tags.isdisjoint(_CAPTURE_DEVICE),
        rows=rows,
        columns=columns,
        overlay_planes=len(overlay_groups),
        overlay_in_pixels=fact(
            "OverlayBitPosition",
            lambda: any(_lies_in_pixels(values, tags, group) for group in overlay_groups),
            True,
        ),
        num_private=len([tag for tag in tags if tag & 0x10000 and tag > 0x8FFFF]),
        regions=regions or (),
        regions_unusable=regions is None,
        head=_HEAD.search(values.text_or_blank(_BODY_PART).upper()) is not None,
        identity_removed=fact("PatientIdentityRemoved", lambda: _answer(values, _IDENTITY_REMOVED), "no"),
        colour=fact("PhotometricInterpretation", lambda: _is_colour(values), True),
        placeless=tags.isdisjoint(_PLACE),
        malformed=frozenset(malformed),
    )


class _Values(Protocol):
    """One header, however it was parsed. Everything but `text_or_blank` raises when malformed."""

    def tags(self) -> Set[int]: ...
    def text(self, tag: int) -> str: ...
    def text_or_blank(self, tag: int) -> str: ...
    def numbers(self, tag: int, vr: bytes) -> tuple[float, ...]: ...
    def items(self, tag: int) -> tuple[_Values, ...]: ...


class _FromElements:
    def __init__(self, elements: Elements) -> None:
        self._elements = elements

    def tags(self) -> Set[int]:
        return self._elements.places.keys()

    def text(self, tag: int) -> str:
        return tagged_text(self._elements, self._of_known_length(tag))

    def text_or_blank(self, tag: int) -> str:
        return _or_blank(self, tag)

    def numbers(self, tag: int, vr: bytes) -> tuple[float, ...]:
        return tagged_numbers(self._elements, self._of_known_length(tag), vr)

    def items(self, tag: int) -> tuple[_Values, ...]:
        return tuple(_FromElements(item) for item in self._elements.items(tag))

    def _of_known_length(self, tag: int) -> int:
        """Only a sequence has none: such an element is there, and says something else than it should."""
        if self._elements.places.get(tag, (b"", 0, 0))[2] == UNDEFINED_LENGTH:
            raise OddDatasetError
        return tag


class _FromDataset:
    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def tags(self) -> Set[int]:
        return {int(tag) for tag in self._dataset.keys()}  # noqa: SIM118

    def text(self, tag: int) -> str:
        parts = self._parts(tag)
        if any(not isinstance(part, str) for part in parts):
            raise OddDatasetError
        return "\\".join(part.strip(" \0") for part in parts)

    def text_or_blank(self, tag: int) -> str:
        return _or_blank(self, tag)

    def numbers(self, tag: int, vr: bytes) -> tuple[float, ...]:  # noqa: ARG002 - the dataset knows
        return tuple(float(part) for part in self._parts(tag))

    def items(self, tag: int) -> tuple[_Values, ...]:
        element = self._dataset.get(tag)
        if element is None:
            return ()
        if element.VR != "SQ":
            raise OddDatasetError
        return tuple(_FromDataset(item) for item in element.value)

    def _parts(self, tag: int) -> list[Any]:
        element = self._dataset.get(tag)
        if element is None or element.value is None or element.value == "":
            return []
        return [element.value] if element.VM <= 1 else list(element.value)


def _or_blank(values: _Values, tag: int) -> str:
    try:
        return values.text(tag)
    except Exception:  # only describes: a hospital's odd character set is no sign of text in pixels
        return ""


def _answer(values: _Values, tag: int) -> Answer:
    text = values.text(tag).strip().upper()
    if text == "":
        return "absent"
    return "no" if text == "NO" else "yes"


def _size(values: _Values, tag: int) -> int:
    found = values.numbers(tag, b"US")
    if not found:
        return 0
    if len(found) > 1 or found[0] != int(found[0]) or found[0] < 0:
        raise OddDatasetError
    return int(found[0])


def _is_colour(values: _Values) -> bool:
    grey = values.text(_PHOTOMETRIC).upper() in ("", "MONOCHROME1", "MONOCHROME2")
    return not grey or values.numbers(_SAMPLES, b"US") not in ((), (1.0,))


def _lies_in_pixels(values: _Values, tags: Set[int], group: int) -> bool:
    """PS3.3 C.9.2 until 2004: bit position above 0, allocated as the pixels are, no data of its own."""
    base = group << 16
    position = values.numbers(base | 0x0102, b"US")
    allocated = values.numbers(base | 0x0100, b"US")
    if any(number != 0 for number in position) or any(number not in (0, 1) for number in allocated):
        return True
    return base | 0x0010 in tags and base | 0x3000 not in tags


def _regions(values: _Values, rows: int, columns: int) -> tuple[Box, ...] | None:
    """Regions that hold picture; None when any of them cannot be a part of this image."""
    items = values.items(_REGIONS)
    if len(items) > _MAX_REGIONS:
        return None
    boxes = []
    for item in items:
        (picture_format,) = item.numbers(_REGION_FORMAT, b"US")
        corners = [item.numbers(tag, b"UL") for tag in _REGION_CORNERS]
        (top,), (left,), (bottom,), (right,) = corners
        # Some scanners write the first pixel outside. More than that: resized or cropped since, so all
        # of its regions speak of another image.
        if not (0 <= top <= bottom <= rows and 0 <= left <= right <= columns):
            return None
        if picture_format in _PICTURE_FORMATS:
            boxes.append(Box(int(top), int(left), min(int(bottom) + 1, rows), min(int(right) + 1, columns)))
    return tuple(box for box in boxes if box.top < box.bottom and box.left < box.right)
