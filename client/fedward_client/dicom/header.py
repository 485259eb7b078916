"""Read what the index needs from a header, and decide whether the file may become a case (hop 2).

Two steps, so that a refused file keeps its identity: `read_header` reads facts, the refusals judge
them. `image_refusal_of` admits every usual image; `refusal_of` only radiographs, one grey frame each,
which need no geometry. All else is refused by the name that the DICOM dictionary gives it. Pixels are
never touched. Facts that only describe are None or "" when absent or malformed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pydicom._uid_dict import UID_dictionary

from fedward_client.dicom.diffusion import private_b_value
from fedward_client.dicom.elements import Elements
from fedward_client.dicom.header_facts import Header
from fedward_client.dicom.parser import ParsedFile, contained, parse_file
from fedward_client.dicom.private_grid import is_grid
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.sop_classes import ANY_MODALITY, IMAGE_SOP_CLASSES, RADIOGRAPHS
from fedward_client.dicom.syntaxes import (
    NATIVE_SYNTAXES,
    PLUGIN_OF_SYNTAX,
    can_decode,
    is_permitted,
)
from fedward_client.dicom.values import (
    date_or_none,
    integer,
    integer_or_none,
    is_present,
    number_or_none,
    numbers_or_none,
    raw_text,
    text_or_none,
)

__all__ = [
    "HEADER_KEYWORDS",
    "MAX_PIXEL_BYTES",
    "MODALITY_OF_SOP_CLASS",
    "NATIVE_SYNTAXES",
    "PLUGIN_OF_SYNTAX",
    "Header",
    "can_decode",
    "header_of",
    "image_refusal_of",
    "pixel_refusal_of",
    "read_header",
    "refusal_of",
]

MODALITY_OF_SOP_CLASS = RADIOGRAPHS
UNKNOWN_KIND = "not in the DICOM dictionary"

MAX_ROWS = 16384
MIN_ROWS = 8
MAX_FRAMES = 65536
MAX_PIXEL_BYTES = 128 * 2**20
_LEAST_FRAGMENT_BYTES = 10
"""A compressed frame is one fragment at least: a header and two bytes (PS3.5 A.4)."""

HEADER_KEYWORDS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "PatientID",
    "Modality",
    "StudyDate",
    "PatientSex",
    "PatientAge",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "BurnedInAnnotation",
)
"""Elements that decide whether and where a file counts; all others only describe it."""

_UID = re.compile(r"[0-9]+(\.[0-9]+)+")
_AGE = re.compile(r"([0-9]{3})([DWMY])")
_AGES_PER_YEAR = {"D": 365, "W": 52, "M": 12, "Y": 1}


def read_header(data: bytes) -> Header:
    """Read the facts of one file held in memory, stopping in front of its pixels.

    Raises:
        UnusableImageError: empty, not DICOM, a deflate bomb, or too damaged to identify.
    """
    with contained(Reason.MALFORMED):
        return header_of(parse_file(data))


def header_of(parsed: ParsedFile) -> Header:
    """Take the facts out of a parsed file; call it inside `contained`."""
    of = parsed.elements
    bits_allocated = integer(of, "BitsAllocated", 0)
    bits_stored = integer(of, "BitsStored", bits_allocated)
    modality = raw_text(of, "Modality")
    study_date = text_or_none(of, "StudyDate")
    image_type = text_or_none(of, "ImageType").upper()
    last = next(reversed(of.places), 0)
    return Header(
        sop_class=raw_text(of, "SOPClassUID"),
        transfer_syntax=parsed.syntax,
        sop_instance=raw_text(of, "SOPInstanceUID"),
        series=raw_text(of, "SeriesInstanceUID"),
        study=raw_text(of, "StudyInstanceUID"),
        patient=raw_text(of, "PatientID"),
        modality=modality,
        study_year=_year(study_date),
        sex=_sex(text_or_none(of, "PatientSex")),
        age_years=_age_years(text_or_none(of, "PatientAge")),
        num_frames=integer(of, "NumberOfFrames", 1) or 1,  # some devices write 0 for the only one
        samples=integer(of, "SamplesPerPixel", 1),
        photometric=raw_text(of, "PhotometricInterpretation"),
        rows=integer(of, "Rows", 0),
        columns=integer(of, "Columns", 0),
        bits_allocated=bits_allocated,
        bits_stored=bits_stored,
        high_bit=integer(of, "HighBit", max(bits_stored - 1, 0)),
        signed=integer(of, "PixelRepresentation", 0),
        burned_in=raw_text(of, "BurnedInAnnotation").upper() == "YES",
        pixel_bytes_left=parsed.pixel_bytes_left,
        pixel_kind=_PIXEL_KINDS.get(parsed.pixel_tag or 0, "integer"),
        planar=integer(of, "PlanarConfiguration", 0),
        study_date=date_or_none(study_date),
        study_time=text_or_none(of, "StudyTime"),
        acquisition_time=text_or_none(of, "AcquisitionTime"),
        accession=text_or_none(of, "AccessionNumber"),
        body_part=text_or_none(of, "BodyPartExamined"),
        view_position=text_or_none(of, "ViewPosition"),
        laterality=text_or_none(of, "ImageLaterality") or text_or_none(of, "Laterality"),
        series_description=text_or_none(of, "SeriesDescription"),
        study_description=text_or_none(of, "StudyDescription"),
        image_type=tuple(image_type.split("\\")) if image_type else (),
        manufacturer=text_or_none(of, "Manufacturer"),
        model_name=text_or_none(of, "ManufacturerModelName"),
        series_number=integer_or_none(of, "SeriesNumber"),
        instance_number=integer_or_none(of, "InstanceNumber"),
        acquisition_number=integer_or_none(of, "AcquisitionNumber"),
        temporal_position=integer_or_none(of, "TemporalPositionIdentifier"),
        echo_numbers=integer_or_none(of, "EchoNumbers"),
        echo_time=number_or_none(of, "EchoTime"),
        trigger=number_or_none(of, "TriggerTime"),
        b_value=_b_value(of, modality),
        conversion_type=text_or_none(of, "ConversionType"),
        presentation_intent=text_or_none(of, "PresentationIntentType"),
        has_overlay=last >= 0x60000000 and any(tag >> 24 == 0x60 for tag in of.places),
        num_private=sum([tag >> 16 & 1 for tag in of.places]),
        regions=is_present(of, "SequenceOfUltrasoundRegions"),
        **_surroundings(of),
    )


def _surroundings(of: Elements) -> dict[str, Any]:
    """Where an image lies, and among what."""
    return {
        "is_directory": is_present(of, "DirectoryRecordSequence"),
        "images_in_acquisition": integer_or_none(of, "ImagesInAcquisition"),
        "is_grid": is_grid(of),
        "frame_of_reference": text_or_none(of, "FrameOfReferenceUID"),
        "position": numbers_or_none(of, "ImagePositionPatient", 3),
        "orientation": numbers_or_none(of, "ImageOrientationPatient", 6),
        "pixel_spacing": numbers_or_none(of, "PixelSpacing", 2),
        "imager_pixel_spacing": numbers_or_none(of, "ImagerPixelSpacing", 2),
        "slice_thickness": number_or_none(of, "SliceThickness"),
        "spacing_between": number_or_none(of, "SpacingBetweenSlices"),
        "gantry_tilt": number_or_none(of, "GantryDetectorTilt"),
    }


_PIXEL_KINDS = {0x7FE00010: "integer", 0x7FE00008: "float", 0x7FE00009: "double"}


def refusal_of(header: Header) -> UnusableImageError | None:
    """First reason why the file may not become a radiograph's case, or None."""
    return _first_refusal(header, _RADIOGRAPH_CHECKS)


def image_refusal_of(header: Header) -> UnusableImageError | None:
    """First reason why the file may not become part of any case, or None."""
    return _first_refusal(header, _IMAGE_CHECKS)


def pixel_refusal_of(header: Header, max_pixel_bytes: int = MAX_PIXEL_BYTES) -> UnusableImageError | None:
    """First reason why the pixels may not be decoded, whatever the object is, or None."""
    refusal = _first_refusal(header, _PIXEL_CHECKS)
    if refusal is None and header.num_pixel_bytes > max_pixel_bytes:
        return UnusableImageError(Reason.OVER_LIMIT)
    return refusal


def _pixels_missing(header: Header) -> bool:
    return header.pixel_bytes_left is not None and header.pixel_bytes_left <= 0


def _pixels_truncated(header: Header) -> bool:
    left = header.pixel_bytes_left
    if left is None:
        return False
    if header.transfer_syntax in NATIVE_SYNTAXES:
        return left < header.num_native_bytes
    return left < _LEAST_FRAGMENT_BYTES * header.num_frames


def _out_of_bounds(header: Header) -> bool:
    sides = (header.rows, header.columns)
    within = all(MIN_ROWS <= side <= MAX_ROWS for side in sides) and 1 <= header.num_frames <= MAX_FRAMES
    return not within or header.num_pixel_bytes > MAX_PIXEL_BYTES


def _beyond_decoding(header: Header) -> bool:
    sides = (header.rows, header.columns)
    return not (all(1 <= side <= MAX_ROWS for side in sides) and 1 <= header.num_frames <= MAX_FRAMES)


def _odd_pixels(header: Header) -> bool:
    return (
        header.bits_allocated not in (8, 16)
        or not 1 <= header.bits_stored <= header.bits_allocated
        or header.high_bit != header.bits_stored - 1
        or header.signed not in (0, 1)
    )


def _undecodable_pixels(header: Header) -> bool:
    if header.pixel_kind != "integer":
        bits = {"float": 32, "double": 64}[header.pixel_kind]
        return header.bits_allocated != bits or header.samples != 1
    return (
        header.bits_allocated not in (1, 8, 16, 32)
        or not 1 <= header.bits_stored <= header.bits_allocated
        or header.high_bit != header.bits_stored - 1
        or header.signed not in (0, 1)
        or (header.samples != 1 and (header.bits_allocated == 1 or header.signed != 0))
        or (header.samples != 1 and header.bits_stored < 8)
    )


_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def _odd_colour(header: Header) -> bool:
    if header.samples == 1:
        return header.photometric not in (*_GREY, "PALETTE COLOR")
    return header.samples != 3 or header.photometric not in _COLOUR or header.planar not in (0, 1)


def _no_valid_uid(header: Header) -> bool:
    uids = (header.sop_instance, header.series, header.study)
    return not all(len(text) <= 64 and _UID.fullmatch(text) for text in uids)


def _mislabelled(header: Header) -> bool:
    if header.sop_class in ANY_MODALITY:
        return not header.modality
    return header.modality not in IMAGE_SOP_CLASSES[header.sop_class]


def _unknown_kind(header: Header) -> bool:
    return header.sop_class not in IMAGE_SOP_CLASSES and header.sop_class not in ANY_MODALITY


_Checks = tuple[tuple[Reason, Callable[[Header], bool]], ...]

_CAN_BE_READ: _Checks = (
    (Reason.TRANSFER_SYNTAX, lambda header: not is_permitted(header.transfer_syntax)),
    (Reason.DECODER_MISSING, lambda header: not can_decode(header.transfer_syntax)),
)
_ARE_THERE: _Checks = (
    (Reason.DIMENSIONS, _out_of_bounds),
    (Reason.NO_PIXELS, _pixels_missing),
    (Reason.TRUNCATED, _pixels_truncated),
)
_PIXEL_CHECKS: _Checks = (
    *_CAN_BE_READ,
    (Reason.NO_PIXELS, _pixels_missing),
    (Reason.PIXEL_FORMAT, _undecodable_pixels),
    (Reason.PHOTOMETRIC, _odd_colour),
    (Reason.DIMENSIONS, _beyond_decoding),
    (Reason.TRUNCATED, _pixels_truncated),
)

# Order matters: what the object is, then whether it is damaged, then whether it can be decoded.
_RADIOGRAPH_CHECKS: _Checks = (
    (Reason.DIRECTORY, lambda header: header.is_directory),
    (Reason.NO_UID, _no_valid_uid),
    (Reason.SOP_CLASS, lambda header: header.sop_class not in RADIOGRAPHS),
    (Reason.MISLABELLED, lambda header: header.modality != RADIOGRAPHS[header.sop_class]),
    (Reason.NO_PATIENT, lambda header: not header.patient),
    (Reason.BURNED_IN, lambda header: header.burned_in),
    *_CAN_BE_READ,
    (Reason.NO_PIXELS, _pixels_missing),  # of a file cut off in its header; whatever else that lacks
    (Reason.MULTI_FRAME, lambda header: header.num_frames != 1),
    (Reason.COLOUR, lambda header: header.samples != 1 or header.photometric not in _GREY),
    (Reason.PIXEL_FORMAT, _odd_pixels),
    *_ARE_THERE,
)
_IMAGE_CHECKS: _Checks = (
    (Reason.DIRECTORY, lambda header: header.is_directory),
    (Reason.NO_UID, _no_valid_uid),
    (Reason.SOP_CLASS, _unknown_kind),
    (Reason.MISLABELLED, _mislabelled),
    (Reason.NO_PATIENT, lambda header: not header.patient),
    *_PIXEL_CHECKS,
)


def _first_refusal(header: Header, checks: _Checks) -> UnusableImageError | None:
    for reason, applies in checks:
        if applies(header):
            return UnusableImageError(reason, _kind(header, reason))
    return None


def _kind(header: Header, reason: Reason) -> str:
    named = {
        Reason.SOP_CLASS: header.sop_class,
        Reason.TRANSFER_SYNTAX: header.transfer_syntax,
        Reason.DECODER_MISSING: header.transfer_syntax,
    }
    if reason not in named:
        return ""
    entry = UID_dictionary.get(named[reason])  # `uid.UID` would put a hostile value in a warning
    return entry[0] if entry else UNKNOWN_KIND


def _b_value(elements: Elements, modality: str) -> float | None:
    if modality != "MR":
        return None
    declared = number_or_none(elements, "DiffusionBValue")
    return private_b_value(elements) if declared is None else declared


def _year(date: str) -> int | None:
    year = date[:4]
    return int(year) if year.isascii() and year.isdigit() and 1895 <= int(year) <= 2199 else None


def _sex(text: str) -> str | None:
    return text if text in ("M", "F", "O") else None


def _age_years(text: str) -> int | None:
    match = _AGE.fullmatch(text)
    return None if match is None else int(match[1]) // _AGES_PER_YEAR[match[2]]
