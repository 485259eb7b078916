"""Read what the index needs from a header, and decide whether the file may become a case (hop 2).

Two steps, so that a refused file keeps its identity: `read_header` reads facts, `refusal_of` judges
them. Supported here: Computed Radiography and Digital X-Ray for presentation, one grey frame. All
else is refused by the name that the DICOM dictionary gives it. Pixels are never touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydicom import uid
from pydicom.dataset import FileDataset
from pydicom.pixels.decoders.base import get_decoder

from fedward_client.dicom.parser import contained, parse
from fedward_client.dicom.refusal import Reason, UnusableImageError

MODALITY_OF_SOP_CLASS: dict[str, str] = {
    uid.ComputedRadiographyImageStorage: "CR",
    uid.DigitalXRayImageStorageForPresentation: "DX",
}

MAX_ROWS = 16384
MIN_ROWS = 8
MAX_PIXEL_BYTES = 128 * 2**20

NATIVE_SYNTAXES = frozenset(
    {
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
    }
)

# One plugin a syntax, never "whichever is there": lossy decoders differ by a grey level, and two
# sites must see the same pixels. gdcm is installed by the operator (JPEG Lossless only). RLE is not
# left to pydicom itself: it expands whatever a segment holds before it looks at the size.
PLUGIN_OF_SYNTAX: dict[str, str] = {
    uid.RLELossless: "pylibjpeg",
    uid.JPEGBaseline8Bit: "pillow",
    uid.JPEGLossless: "gdcm",
    uid.JPEGLosslessSV1: "gdcm",
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEGLSNearLossless: "pyjpegls",
    uid.JPEG2000Lossless: "pylibjpeg",
    uid.JPEG2000: "pylibjpeg",
}

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

_MAX_TEXT = 1024
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")
_AGE = re.compile(r"([0-9]{3})([DWMY])")
_AGES_PER_YEAR = {"D": 365, "W": 52, "M": 12, "Y": 1}


@dataclass(frozen=True)
class Header:
    """Facts from one header. Identifiers stay out of `repr`, so no log line can show them.

    Attributes:
        study_year: year of StudyDate, or None.
        sex: "M", "F", "O", or None.
        age_years: completed years from PatientAge, or None.
        pixel_bytes_left: bytes of the file from the pixel data on; None when unknown (deflated).
    """

    sop_class: str
    transfer_syntax: str
    sop_instance: str = field(repr=False)
    series: str = field(repr=False)
    study: str = field(repr=False)
    patient: str = field(repr=False)
    modality: str = field(repr=False)
    study_year: int | None
    sex: str | None
    age_years: int | None
    num_frames: int
    samples: int
    photometric: str = field(repr=False)
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: int
    burned_in: bool
    pixel_bytes_left: int | None

    @property
    def num_pixel_bytes(self) -> int:
        """Bytes of the uncompressed pixels."""
        return self.rows * self.columns * self.samples * self.num_frames * (self.bits_allocated // 8)


def read_header(data: bytes) -> Header:
    """Read the facts of one file held in memory, stopping in front of its pixels.

    Raises:
        UnusableImageError: empty, not DICOM, a deflate bomb, or too damaged to identify.
    """
    with contained(Reason.MALFORMED):
        dataset, num_left = parse(data, HEADER_KEYWORDS, pixels=False)
        return header_of(dataset, num_left)


def header_of(dataset: FileDataset, pixel_bytes_left: int | None) -> Header:
    """Take the facts out of a parsed dataset; call it inside `contained`."""
    syntax = _text(dataset.file_meta.get("TransferSyntaxUID"))
    bits_allocated = _integer(dataset, "BitsAllocated", 0)
    bits_stored = _integer(dataset, "BitsStored", bits_allocated)
    return Header(
        sop_class=_text(dataset.get("SOPClassUID")),
        transfer_syntax=syntax,
        sop_instance=_text(dataset.get("SOPInstanceUID")),
        series=_text(dataset.get("SeriesInstanceUID")),
        study=_text(dataset.get("StudyInstanceUID")),
        patient=_text(dataset.get("PatientID")),
        modality=_text(dataset.get("Modality")),
        study_year=_year(_text(dataset.get("StudyDate"))),
        sex=_sex(_text(dataset.get("PatientSex"))),
        age_years=_age_years(_text(dataset.get("PatientAge"))),
        num_frames=_integer(dataset, "NumberOfFrames", 1),
        samples=_integer(dataset, "SamplesPerPixel", 1),
        photometric=_text(dataset.get("PhotometricInterpretation")),
        rows=_integer(dataset, "Rows", 0),
        columns=_integer(dataset, "Columns", 0),
        bits_allocated=bits_allocated,
        bits_stored=bits_stored,
        high_bit=_integer(dataset, "HighBit", bits_stored - 1),
        signed=_integer(dataset, "PixelRepresentation", 0),
        burned_in=_text(dataset.get("BurnedInAnnotation")).upper() == "YES",
        pixel_bytes_left=None if syntax == uid.DeflatedExplicitVRLittleEndian else pixel_bytes_left,
    )


def refusal_of(header: Header) -> UnusableImageError | None:
    """First reason why the file may not become a case, or None."""
    for reason, applies in _CHECKS:
        if applies(header):
            return UnusableImageError(reason, _kind(header, reason))
    return None


def _pixels_missing(header: Header) -> bool:
    return header.pixel_bytes_left is not None and header.pixel_bytes_left <= 8


def _pixels_truncated(header: Header) -> bool:
    native = header.transfer_syntax in NATIVE_SYNTAXES
    left = header.pixel_bytes_left
    return native and left is not None and left < 8 + header.num_pixel_bytes


def _out_of_bounds(header: Header) -> bool:
    sides = (header.rows, header.columns)
    return not all(MIN_ROWS <= side <= MAX_ROWS for side in sides) or header.num_pixel_bytes > MAX_PIXEL_BYTES


def _odd_pixels(header: Header) -> bool:
    return (
        header.bits_allocated not in (8, 16)
        or not 1 <= header.bits_stored <= header.bits_allocated
        or header.high_bit != header.bits_stored - 1
        or header.signed not in (0, 1)
    )


def _no_valid_uid(header: Header) -> bool:
    uids = (header.sop_instance, header.series, header.study)
    return not all(len(text) <= 64 and _UID.fullmatch(text) for text in uids)


@cache
def can_decode(transfer_syntax: str) -> bool:
    """Whether the one plugin that is pinned for this syntax is installed."""
    plugin = PLUGIN_OF_SYNTAX.get(transfer_syntax)
    return plugin is None or plugin in get_decoder(transfer_syntax).available_plugins


# Order matters: what the object is, then whether it is damaged, then whether it can be decoded.
_CHECKS: tuple[tuple[Reason, Callable[[Header], bool]], ...] = (
    (Reason.NO_UID, _no_valid_uid),
    (Reason.SOP_CLASS, lambda header: header.sop_class not in MODALITY_OF_SOP_CLASS),
    (Reason.MISLABELLED, lambda header: header.modality != MODALITY_OF_SOP_CLASS[header.sop_class]),
    (Reason.NO_PATIENT, lambda header: not header.patient),
    (Reason.BURNED_IN, lambda header: header.burned_in),
    (
        Reason.TRANSFER_SYNTAX,
        lambda header: (
            header.transfer_syntax not in NATIVE_SYNTAXES and header.transfer_syntax not in PLUGIN_OF_SYNTAX
        ),
    ),
    (Reason.DECODER_MISSING, lambda header: not can_decode(header.transfer_syntax)),
    (Reason.MULTI_FRAME, lambda header: header.num_frames != 1),
    (
        Reason.COLOUR,
        lambda header: header.samples != 1 or header.photometric not in ("MONOCHROME1", "MONOCHROME2"),
    ),
    (Reason.PIXEL_FORMAT, _odd_pixels),
    (Reason.DIMENSIONS, _out_of_bounds),
    (Reason.NO_PIXELS, _pixels_missing),
    (Reason.TRUNCATED, _pixels_truncated),
)


def _kind(header: Header, reason: Reason) -> str:
    named = {
        Reason.SOP_CLASS: header.sop_class,
        Reason.TRANSFER_SYNTAX: header.transfer_syntax,
        Reason.DECODER_MISSING: header.transfer_syntax,
    }
    if reason not in named:
        return ""
    name = str(uid.UID(named[reason]).name)
    return "not in the DICOM dictionary" if name == named[reason] else name


def _text(value: Any) -> str:
    if value is None:
        return ""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    text = "\\".join(str(part) for part in value) if several else str(value)
    if len(text) > _MAX_TEXT:
        raise UnusableImageError(Reason.MALFORMED)
    # Undecodable bytes come out of the parser as lone surrogates, which no database or hash accepts.
    return text.strip(" \0").encode("utf-8", "replace").decode("utf-8")


def _integer(dataset: FileDataset, keyword: str, default: int) -> int:
    value = dataset.get(keyword)
    if value is None or value == "":
        return default
    number = int(value)
    if number < 0:
        raise UnusableImageError(Reason.MALFORMED)
    return number


def _year(date: str) -> int | None:
    year = date[:4]
    return int(year) if year.isascii() and year.isdigit() and 1895 <= int(year) <= 2199 else None


def _sex(text: str) -> str | None:
    return text if text in ("M", "F", "O") else None


def _age_years(text: str) -> int | None:
    match = _AGE.fullmatch(text)
    return None if match is None else int(match[1]) // _AGES_PER_YEAR[match[2]]
