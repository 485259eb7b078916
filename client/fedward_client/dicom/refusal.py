"""Why a file is not used, as a closed list, and what the operator can do about it.

A reason is a code from this list, never a text from a parser: parser messages quote the header, and
the header names the patient. The only addition is a name out of the DICOM dictionary itself.
"""

from __future__ import annotations

from enum import StrEnum

from fedward_common.errors import CohortError


class Reason(StrEnum):
    """Why a file stands in quarantine."""

    EMPTY = "empty"
    TOO_LARGE = "too_large"
    NOT_DICOM = "not_dicom"
    MALFORMED = "malformed"
    TRANSFER_SYNTAX = "transfer_syntax"
    DEFLATED = "deflated"
    DECODER_MISSING = "decoder_missing"
    SOP_CLASS = "sop_class"
    MISLABELLED = "mislabelled"
    NO_UID = "no_uid"
    NO_PATIENT = "no_patient"
    SAME_UID = "same_uid"
    MULTI_FRAME = "multi_frame"
    COLOUR = "colour"
    PIXEL_FORMAT = "pixel_format"
    DIMENSIONS = "dimensions"
    BURNED_IN = "burned_in"
    NO_PIXELS = "no_pixels"
    TRUNCATED = "truncated"
    CODESTREAM = "codestream"
    DISPLAY_VALUES = "display_values"
    DECODE_FAILED = "decode_failed"

    @property
    def meaning(self) -> str:
        """What was found, in one sentence."""
        return _TEXTS[self][0]

    @property
    def remedy(self) -> str:
        """What the operator can do."""
        return _TEXTS[self][1]


class UnusableImageError(CohortError):
    """One file cannot be used; the others go on.

    Args:
        reason: from the closed list.
        kind: name of a SOP class or transfer syntax from the DICOM dictionary, or "".
    """

    def __init__(self, reason: Reason, kind: str = "") -> None:
        super().__init__(f"{reason.meaning}{f' ({kind})' if kind else ''}", remedy=reason.remedy)
        self.reason = reason
        self.kind = kind


_RESEND = "Send the image from the PACS again; if it stays, export it as Explicit VR Little Endian."
_EXPORT = "Export CR or DX images for presentation, one frame each, in grey."

_TEXTS: dict[Reason, tuple[str, str]] = {
    Reason.EMPTY: ("the file is empty", "Send the image from the PACS again, or delete the file."),
    Reason.TOO_LARGE: ("the file is larger than any radiograph", "Keep only CR and DX images in the folder."),
    Reason.NOT_DICOM: ("not a DICOM file", "Move it out of the image folder, or send the image again."),
    Reason.MALFORMED: ("the DICOM header cannot be read", _RESEND),
    Reason.TRANSFER_SYNTAX: (
        "this transfer syntax is not on the list of permitted ones",
        "Convert it, for example: dcmdjpeg IN OUT, or gdcmconv --raw IN OUT.",
    ),
    Reason.DEFLATED: (
        "a deflated file of this size could fill the memory when it is inflated",
        "Convert it first: dcmconv +te IN OUT.",
    ),
    Reason.DECODER_MISSING: (
        "the decoder for this transfer syntax is not installed",
        "pip install python-gdcm (JPEG Lossless), then index again; or convert with dcmdjpeg IN OUT.",
    ),
    Reason.SOP_CLASS: ("this kind of object is not supported", _EXPORT),
    Reason.MISLABELLED: (
        "Modality contradicts the SOP class",
        "Correct Modality at its source; send again.",
    ),
    Reason.NO_UID: ("a UID is missing or not valid", _RESEND),
    Reason.NO_PATIENT: (
        "PatientID is empty, so the image cannot be kept on one side of the split",
        "Give each patient a PatientID (a pseudonym will do) and export again.",
    ),
    Reason.SAME_UID: (
        "other files with different content have the same SOPInstanceUID",
        "Keep the right one; give edited copies a UID of their own.",
    ),
    Reason.MULTI_FRAME: ("more than one frame", _EXPORT),
    Reason.COLOUR: ("not a grey image", _EXPORT),
    Reason.PIXEL_FORMAT: ("pixels in a form that radiographs do not have", _EXPORT),
    Reason.DIMENSIONS: ("rows, columns or bits out of bounds", "Check the header; export the image again."),
    Reason.BURNED_IN: (
        "BurnedInAnnotation is YES: text may be part of the pixels",
        "Export the image without annotation.",
    ),
    Reason.NO_PIXELS: ("no pixel data", _RESEND),
    Reason.TRUNCATED: ("fewer pixels than the header announces", _RESEND),
    Reason.CODESTREAM: ("the compressed image contradicts the header", _RESEND),
    Reason.DISPLAY_VALUES: (
        "rescale or window values cannot be used",
        "Correct RescaleSlope, WindowWidth or the look-up table at their source.",
    ),
    Reason.DECODE_FAILED: ("the pixels cannot be decoded", _RESEND),
}
