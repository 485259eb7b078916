"""Build the dataset of a safe copy: a new one, into which only what the rules let through is put.

Nothing is edited in place, so an element that nobody thought of is simply not there. Sequences are
followed to any depth, with the same rules at each. Texts that stay are written in UTF-8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.sr.codedict import codes
from pydicom.tag import BaseTag, Tag

from fedward_client.dicom.deidentify_rules import (
    CODE_TEXTS,
    NUMBER_VRS,
    TEXT_VRS,
    Action,
    action_of,
    is_local_code,
    is_public_uid,
    keyword_of,
    profile,
)
from fedward_client.dicom.kept_numbers import drop_odd_tables, may_stay
from fedward_client.dicom.replacements import Replacements

DUMMY = "REMOVED"
DUMMY_DATE, DUMMY_TIME = "00010101", "000000"
"""Where the standard wants some value: those of dicom-anonymizer."""

METHOD = ("fedward: DICOM PS3.15 Basic Profile, allow-list",)

_MAX_DEPTH = 24
_PIXEL_GROUP = 0x7FE0
_CODE_STRING = re.compile(r"[A-Za-z0-9 _.+/\-]{0,32}")
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")
_TIME = re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?", re.ASCII)
_AGE = re.compile(r"\d{3}[DWMY]", re.ASCII)
_OLDEST = 89  # years; ages above are so rare that they tell

_REPORT_ITEMS = frozenset(
    (
        *("CONTAINER", "CODE", "NUM", "IMAGE", "COMPOSITE", "WAVEFORM", "SCOORD", "SCOORD3D", "TCOORD"),
        *("UIDREF", "TEXT", "PNAME", "DATE", "DATETIME"),
    )
)


@dataclass(frozen=True)
class Retained:
    """What stays by the operator's choice.

    Args:
        times: times of day.
        characteristics: sex, age, size and weight.
        safe_private: private elements, as "GGGG|creator|EE"; numbers only.
    """

    times: bool = False
    characteristics: bool = False
    safe_private: frozenset[str] = frozenset()


def clean(source: Dataset, replacements: Replacements, retained: Retained) -> Dataset:
    """Copy what may stay; call it inside `contained`.

    Returns:
        A new dataset without File Meta Information and with nothing said yet about the method.

    Raises:
        ValueError: sequences nested deeper than in any real file.
    """
    return _Cleaner(replacements, retained).cleaned(source, 0)


def declare(copy: Dataset, retained: Retained, *, masked: bool, report: bool) -> None:
    """Write into the copy what was done to it (PS3.15 E.1.1 step 6, codes of PS3.16 CID 7050)."""
    applied = [
        codes.DCM.BasicApplicationConfidentialityProfile,
        codes.DCM.RetainLongitudinalTemporalInformationModifiedDatesOption,
    ]
    optional = (
        (masked, codes.DCM.CleanPixelDataOption),
        (report, codes.DCM.CleanStructuredContentOption),
        (retained.characteristics, codes.DCM.RetainPatientCharacteristicsOption),
        (bool(retained.safe_private), codes.DCM.RetainSafePrivateOption),
    )
    applied += [code for applies, code in optional if applies]
    copy.PatientIdentityRemoved = "YES"
    copy.LongitudinalTemporalInformationModified = "MODIFIED"
    copy.DeidentificationMethod = list(METHOD)
    items = []
    for code in applied:
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = (
            code.value,
            code.scheme_designator,
            code.meaning,
        )
        items.append(item)
    copy.DeidentificationMethodCodeSequence = Sequence(items)


def own_texts() -> tuple[bytes, ...]:
    """What `declare` writes into every copy, for the byte scan to pass over."""
    names = (
        "BasicApplicationConfidentialityProfile",
        "RetainLongitudinalTemporalInformationModifiedDatesOption",
        "CleanPixelDataOption",
        "CleanStructuredContentOption",
        "RetainPatientCharacteristicsOption",
        "RetainSafePrivateOption",
    )
    meanings = [str(getattr(codes.DCM, name).meaning) for name in names]
    return tuple(text.encode() for text in (*meanings, *METHOD))


class _Cleaner:
    def __init__(self, replacements: Replacements, retained: Retained) -> None:
        self._replacements = replacements
        self._retained = retained
        self._handlers = {
            Action.KEEP: self._kept,
            Action.EMPTY: _emptied,
            Action.DUMMY: self._dummy,
            Action.NEW_UID: self._with_new_uids,
            Action.SHIFT_DATE: self._shifted,
            Action.TIME: self._time,
            Action.PSEUDONYM: self._pseudonym,
            Action.CHARACTERISTIC: self._characteristic,
        }

    def cleaned(self, source: Dataset, depth: int) -> Dataset:
        if depth > _MAX_DEPTH:
            raise ValueError
        copy = Dataset()
        for tag in sorted(source.keys()):
            element = _element(source, tag)
            if element is None or (depth and tag.group == _PIXEL_GROUP):  # a picture inside a sequence
                continue
            if tag.is_private:
                self._copy_private(source, element, copy)
                continue
            self._copy_public(element, copy, depth)
        drop_odd_tables(copy)
        if not _is_ascii(copy):
            copy.SpecificCharacterSet = "ISO_IR 192"
        elif "SpecificCharacterSet" in copy:
            del copy.SpecificCharacterSet
        return copy

    def _copy_public(self, element: DataElement, copy: Dataset, depth: int) -> None:
        action = action_of(int(element.tag), str(element.VR))
        if action in (Action.DESCEND, Action.CONTENT):
            found = element.value
            items = _report_items(found, self._retained) if action is Action.CONTENT else found
            copies = [self.cleaned(item, depth + 1) for item in items]
            for code in copies:
                if is_local_code(element.keyword, str(code.get("CodingSchemeDesignator", ""))):
                    _without_text(code)
            copy.add_new(element.tag, "SQ", Sequence(copies))
        elif action is Action.KEEP and not _values(element):
            copy.add(DataElement(element.tag, element.VR, None))  # many have to be there, even empty
        elif action is not Action.REMOVE:
            try:
                value = self._handlers[action](element)
            except (ValueError, TypeError, OverflowError):  # not what its VR says
                return
            if value is not None:
                copy.add(DataElement(element.tag, element.VR, value))

    def _copy_private(self, source: Dataset, element: DataElement, copy: Dataset) -> None:
        tag = element.tag
        creator = _element(source, Tag(tag.group, tag.element >> 8)) if tag.element > 0xFF else None
        if creator is None or not isinstance(creator.value, str) or element.VR not in NUMBER_VRS:
            return
        name = f"{tag.group:04X}|{creator.value.strip()}|{tag.element & 0xFF:02X}"
        value = self._kept(element)
        if name in self._retained.safe_private and value is not None:
            block = copy.private_block(tag.group, creator.value.strip(), create=True)
            block.add_new(tag.element & 0xFF, str(element.VR), value)

    def _kept(self, element: DataElement) -> Any:
        """The value itself, if it is what its VR says; None when it is not."""
        values = _values(element)
        is_public_number = element.VR in NUMBER_VRS and not element.tag.is_private
        if is_public_number and not may_stay(int(element.tag), str(element.VR), values):
            return None
        if element.VR == "CS":
            return element.value if all(_CODE_STRING.fullmatch(str(value)) for value in values) else None
        if element.VR == "UI":
            return element.value if all(_UID.fullmatch(str(value)) for value in values) else None
        if element.VR in ("DS", "IS", "FL", "FD"):
            return element.value if all(math.isfinite(float(value)) for value in values) else None
        return element.value

    def _dummy(self, element: DataElement) -> Any:
        if element.VR == "UI":
            return self._with_new_uids(element)
        if element.VR in TEXT_VRS - {"AS", "UR"}:
            return DUMMY
        return 0 if element.VR in NUMBER_VRS - {"AT"} else None

    def _with_new_uids(self, element: DataElement) -> Any:
        new = [
            str(uid) if is_public_uid(str(uid)) or not uid else self._replacements.uid(str(uid))
            for uid in _values(element)
        ]
        return _as_found(new)

    def _shifted(self, element: DataElement) -> Any:
        kept = self._retained.times
        original = [str(value) for value in _values(element)]
        if element.VR == "DT":
            shifted = [self._replacements.date_time(value, keep_time=kept) for value in original]
        else:
            shifted = [self._replacements.date(value) for value in original]
        if original and not all(shifted) and profile().get(int(element.tag)) is Action.DUMMY:
            return DUMMY_DATE
        return _as_found(shifted)

    def _time(self, element: DataElement) -> Any:
        values = [str(value).strip() for value in _values(element)]
        if self._retained.times and all(not value or _TIME.fullmatch(value) for value in values):
            self._replacements.written.update(values)
            return _as_found(values)
        action = profile().get(int(element.tag))
        return DUMMY_TIME if action is Action.DUMMY else "" if action is Action.EMPTY else None

    def _pseudonym(self, _element: DataElement) -> Any:
        return self._replacements.patient

    def _characteristic(self, element: DataElement) -> Any:
        keyword = keyword_of(int(element.tag))
        if self._retained.characteristics:
            if keyword == "PatientSex":
                return element.value if element.value in ("M", "F", "O", "") else ""
            if keyword == "PatientAge":
                return _coarse_age(str(element.value))
            return self._kept(element)
        return "" if keyword == "PatientSex" else None


def _without_text(code: Dataset) -> None:
    for keyword in CODE_TEXTS:
        if keyword in code:
            setattr(code, keyword, DUMMY)


def _coarse_age(age: str) -> str | None:
    if not _AGE.fullmatch(age):
        return None
    return f"{_OLDEST + 1:03d}Y" if age.endswith("Y") and int(age[:3]) > _OLDEST else age


def _element(source: Dataset, tag: BaseTag) -> DataElement | None:
    """The converted element; None when it is absent or not what its VR says, and so not copied."""
    try:
        return source.get(tag)
    except (ValueError, TypeError, LookupError, NotImplementedError, OverflowError):
        return None


def _emptied(element: DataElement) -> Any:
    return [] if element.VR == "SQ" else "" if element.VR in TEXT_VRS | {"DA", "DT", "TM"} else None


def _report_items(items: Sequence, retained: Retained) -> Iterator[Dataset]:
    """Content items of a report that may stay; their texts and names become dummies by the rules."""
    for item in items:
        kind = str(item.get("ValueType", ""))
        by_reference = "ReferencedContentItemIdentifier" in item
        if kind in _REPORT_ITEMS or by_reference or (kind == "TIME" and retained.times):
            yield item


def _values(element: DataElement) -> list[Any]:
    value = element.value
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (MultiValue, list, tuple)) else [value]


def _as_found(values: list[str]) -> Any:
    return values if len(values) > 1 else (values[0] if values else "")


def _is_ascii(copy: Dataset) -> bool:
    texts = (element for element in copy if element.VR in TEXT_VRS)
    return all(str(value).isascii() for element in texts for value in _values(element))
