"""What becomes of each element in a copy that leaves the hospital: an allow-list around PS3.15.

The actions of PS3.15 Table E.1-1 (Basic Application Level Confidentiality Profile) come from the
package dicom-anonymizer, which keeps that table up to date. The standard keeps whatever the table does
not name; here such an element stays only when its VR cannot hold free text, or its keyword is listed
below. What neither the table nor the list knows is emptied, or removed.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from functools import cache

from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.uid import UID_dictionary  # type: ignore[attr-defined]


class Action(Enum):
    """What is done to one element."""

    KEEP = auto()
    REMOVE = auto()
    EMPTY = auto()
    DUMMY = auto()
    NEW_UID = auto()
    SHIFT_DATE = auto()
    TIME = auto()
    PSEUDONYM = auto()
    DESCEND = auto()
    CONTENT = auto()
    CHARACTERISTIC = auto()


NUMBER_VRS = frozenset(("DS", "IS", "FL", "FD", "SS", "US", "SL", "UL", "SV", "UV", "AT"))
BINARY_VRS = frozenset(("OB", "OW", "OD", "OF", "OL", "OV", "UN"))
TEXT_VRS = frozenset(("AE", "AS", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"))

CODE_TEXTS = ("CodeValue", "CodeMeaning", "LongCodeValue", "CodingSchemeDesignator", "CodingSchemeVersion")
PSEUDONYMS = frozenset(("PatientID", "PatientName"))
CHARACTERISTICS = frozenset(("PatientSex", "PatientAge", "PatientSize", "PatientWeight"))
"""Kept on demand (PS3.15 E.3.6); ages above 89 years become 90."""

# A shift would not hide them: a birth date is known to others, and its year says the age.
_NEVER_SHIFTED = frozenset(
    (
        *("PatientBirthDate", "PatientDeathDateInAlternativeCalendar"),
        *("PatientBirthDateInAlternativeCalendar", "PatientBirthTime"),
    )
)

TEXT_KEPT = frozenset(
    (
        *("Manufacturer", "ManufacturerModelName", "SoftwareVersions", "SequenceName", "PulseSequenceName"),
        *("CodeValue", "LongCodeValue", "CodeMeaning", "CodingSchemeDesignator", "CodingSchemeVersion"),
        *("CodingSchemeName", "MappingResourceName", "ImagedNucleus", "ConvolutionKernel", "RescaleType"),
        *("ModalityLUTType", "LUTExplanation", "WindowCenterWidthExplanation", "ReceiveCoilName"),
        *("TransmitCoilName", "FilterType", "MultiCoilElementName", "SegmentLabel", "SegmentAlgorithmName"),
        *("DimensionDescriptionLabel", "StackID", "Radiopharmaceutical", "ReconstructionMethod"),
        *("AttenuationCorrectionMethod", "ScatterCorrectionMethod", "ViewName", "TransducerType"),
        *("AcquisitionDeviceProcessingCode", "ReconstructionAlgorithm", "MagneticFieldStrength"),
        *("DetectorConfiguration", "FilterMaterial", "AnatomicStructure", "LUTLabel"),
    )
)
"""Elements of free text that describe the machine or a coded term; the byte scan still looks at them."""

BINARY_KEPT = frozenset(
    (
        *("PixelData", "FloatPixelData", "DoubleFloatPixelData", "ExtendedOffsetTable"),
        *("ExtendedOffsetTableLengths", "LUTData", "RedPaletteColorLookupTableData"),
        *("GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData"),
        *("AlphaPaletteColorLookupTableData", "SegmentedRedPaletteColorLookupTableData"),
        *("SegmentedGreenPaletteColorLookupTableData", "SegmentedBluePaletteColorLookupTableData"),
        *("SegmentedAlphaPaletteColorLookupTableData",),
    )
)

_PUBLIC_SCHEMES = frozenset(
    (
        *("DCM", "SCT", "SRT", "SNM3", "99SDM", "LN", "UCUM", "RADLEX", "RADELEMENT", "FMA", "NCIt", "UMLS"),
        *("ICD10", "I10", "I9C", "ICDO3", "C4", "C5", "ACR", "BI", "NCDR", "LOINC", "RFC5646", "ISO3166_1"),
    )
)
_TYPED_CODES = re.compile(r"Procedure|Protocol|Reason|Diagnos|Institution|Department|Equipment|Admitting")
_TYPED_TEXTS = frozenset(("TextValue", "ContentLabel"))
"""What people type into a report's text item or an object's label; its place must not stay empty."""

# Groups outside the patient's data: commands, file sets, curves, overlays, signatures, padding.
_GROUPS_REMOVED = (
    *((0x0000, 0x0006), (0x4FFE, 0x4FFE), (0x5000, 0x50FF), (0x6000, 0x60FF), (0xFFFA, 0xFFFC)),
)

_ACTION_OF_COLUMN = {
    "X_TAGS": Action.REMOVE,
    "X_Z_TAGS": Action.EMPTY,
    "Z_TAGS": Action.EMPTY,
    "X_D_TAGS": Action.DUMMY,
    "X_Z_D_TAGS": Action.DUMMY,
    "Z_D_TAGS": Action.DUMMY,
    "D_TAGS": Action.DUMMY,
    "U_TAGS": Action.NEW_UID,
    "X_Z_U_STAR_TAGS": Action.DESCEND,
}


def is_local_code(sequence: str, scheme: str) -> bool:
    """Whether a code was typed into a hospital's own list: its value and meaning are free text then.

    Args:
        sequence: keyword of the sequence that holds it; segments and measurements are not meant.
        scheme: CodingSchemeDesignator.

    >>> is_local_code("RequestedProcedureCodeSequence", ""), is_local_code("AnatomicRegionSequence", "99X")
    (True, False)
    """
    return _TYPED_CODES.search(sequence) is not None and scheme not in _PUBLIC_SCHEMES


@cache
def profile() -> dict[int, Action]:
    """PS3.15 Table E.1-1 for single elements: tag -> action of the basic profile."""
    from dicomanonymizer.dicom_anonymization_databases import (
        dicomfields_2026c,
    )

    return {
        entry[0] << 16 | entry[1]: action
        for column, action in _ACTION_OF_COLUMN.items()
        for entry in getattr(dicomfields_2026c, column)
        if len(entry) == 2
    }


@cache
def keyword_of(tag: int) -> str:
    """DICOM keyword, or "" for an element that the dictionary does not know."""
    return str(keyword_for_tag(tag))


@cache
def is_allowed_vr(tag: int, vr: str) -> bool:
    """Whether an element may be written with this VR; a name in a field of numbers is nothing to keep."""
    try:
        expected = str(dictionary_VR(tag))
    except KeyError:
        return False
    return vr == expected or vr in expected.split(" or ")


@cache
def action_of(tag: int, vr: str) -> Action:
    """Action for one public element, at any depth.

    Args:
        tag: group and element number.
        vr: as in the file; one that the dictionary does not give is removed.
    """
    keyword = keyword_of(tag)
    group = tag >> 16
    if group & 1 or not keyword or any(first <= group <= last for first, last in _GROUPS_REMOVED):
        return Action.REMOVE
    if not is_allowed_vr(tag, vr):
        return Action.REMOVE
    if keyword in _TYPED_TEXTS:
        return Action.DUMMY
    if keyword in PSEUDONYMS:
        return Action.PSEUDONYM
    if keyword in CHARACTERISTICS:
        return Action.CHARACTERISTIC
    if vr == "SQ":
        return _action_of_sequence(tag, keyword)
    if vr in ("DA", "DT", "TM"):
        return _action_of_moment(tag, keyword, vr)
    if tag in profile():
        return profile()[tag]
    return _action_outside_profile(keyword, vr)


def is_public_uid(uid: str) -> bool:
    """Whether a UID is one of the standard's own (a class, a syntax, a well-known frame)."""
    return uid in UID_dictionary


def _action_of_sequence(tag: int, keyword: str) -> Action:
    if keyword == "ContentSequence":
        return Action.CONTENT
    action = profile().get(tag, Action.DESCEND)
    return action if action in (Action.DESCEND, Action.EMPTY) else Action.REMOVE


def _action_of_moment(tag: int, keyword: str, vr: str) -> Action:
    if keyword in _NEVER_SHIFTED:
        return Action.REMOVE if profile().get(tag) is Action.REMOVE else Action.EMPTY
    return Action.TIME if vr == "TM" else Action.SHIFT_DATE


def _action_outside_profile(keyword: str, vr: str) -> Action:
    if vr == "UI":  # the standard's own (classes, coding schemes, frames) are known by their value
        return Action.NEW_UID
    if keyword in TEXT_KEPT or keyword in BINARY_KEPT:
        return Action.KEEP
    if vr in TEXT_VRS - {"CS"}:  # many have to be there, even empty
        return Action.EMPTY
    # "US or SS" is how the parser says that the file does not tell which of two numbers it is.
    only_numbers = set(vr.split(" or ")) <= NUMBER_VRS | {"CS"}
    return Action.KEEP if only_numbers else Action.REMOVE
