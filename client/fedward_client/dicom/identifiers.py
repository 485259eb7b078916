"""Collect what identifies a patient in one file: the list that a copy is searched for afterwards.

Independent of the rules that made the copy: an element counts here because of what it is (its VR, the
table of PS3.15, private or not), whatever was done to it. Values are read both as text and as the very
bytes of the file, so that a copy in the file's own character set is found too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from fedward_client.dicom.deidentify_rules import (
    BINARY_KEPT,
    BINARY_VRS,
    CODE_TEXTS,
    NUMBER_VRS,
    TEXT_KEPT,
    TEXT_VRS,
    is_local_code,
    is_public_uid,
    keyword_of,
    profile,
)

DIRECT = frozenset(("PatientID", "OtherPatientIDs", "AccessionNumber", "MedicalRecordLocator", "AdmissionID"))
_OF_SOFTWARE = frozenset(
    (
        *("ImplementationVersionName", "ImplementationClassUID", "DeidentificationMethod"),
        *("LongitudinalTemporalInformationModified", "DeidentificationMethodCodeSequence"),
    )
)
"""What programs say about themselves; a copy says the like, and it names nobody."""

Kind = Literal["name", "text", "date", "time", "uid", "bytes"]

MAX_IDENTIFIERS = 20_000
_MAX_DEPTH = 24
_PRINTABLE = re.compile(rb"[\x20-\x7e\x80-\xff\r\n\t\x1b]{3,}")


@dataclass(frozen=True)
class Identifier:
    """One value that must not be found in the copy.

    Args:
        keyword: DICOM keyword, or "private element", "unknown element", "preamble".
        kind: how it is written and searched for.
        text: the value; "" when it is not text.
        raw: the value's bytes in the file.
        encodings: Python names of the file's character sets.
        direct: tells by itself who the patient is, so it is searched for even if a kept element, such
            as SeriesNumber, happens to say the same.
    """

    keyword: str
    kind: Kind
    text: str = field(repr=False)
    raw: bytes = field(repr=False, default=b"")
    encodings: tuple[str, ...] = field(repr=False, default=())
    direct: bool = False


@dataclass(frozen=True)
class SourceText:
    """What one file says: identifiers, and words that its copy keeps on purpose.

    Args:
        identifiers: without repetition, in the order of the file.
        kept: values of elements that stay and their words, in small letters; a description that only
            repeats one of them ("SIEMENS", "AXIAL") cannot be searched for.
        num_numbers: removed values that are numbers (weight, coordinates): too common to search for.
    """

    identifiers: tuple[Identifier, ...] = field(repr=False)
    kept: frozenset[str] = field(repr=False)
    num_numbers: int


def collect(
    dataset: Dataset,
    *,
    preamble: bytes = b"",
    meta: Dataset | None = None,
    exempt: frozenset[str] = frozenset(),
    creators: Iterable[str] = (),
) -> SourceText:
    """List the identifiers of a source file; call it inside `contained`.

    Args:
        dataset: as parsed, at any depth, private elements included.
        preamble: the 128 bytes in front.
        meta: File Meta Information.
        exempt: keywords that stay by the operator's choice, such as PatientAge.
        creators: of private elements that stay by the operator's choice.

    Raises:
        ValueError: more identifiers than any real file has; the copy could not be proven.
    """
    found: dict[tuple[str, str, bytes], Identifier] = {}
    kept = {creator.lower() for creator in creators}
    num_numbers = 0
    sources = [*_walk(dataset, 0), *(_walk(meta, 0) if meta is not None else ())]
    for element in sources:
        if element.keyword in exempt or element.keyword in _OF_SOFTWARE:
            continue
        if _stays(element):
            kept.update(_words(element.values))
        elif element.vr in NUMBER_VRS:
            num_numbers += 1
        else:
            for identifier in _identifiers(element):
                key = (identifier.kind, identifier.text, identifier.raw)
                if identifier.direct or key not in found:
                    found[key] = identifier
        if len(found) > MAX_IDENTIFIERS:
            raise ValueError
    for run in _PRINTABLE.findall(preamble):
        text = run.decode("latin-1").strip()
        if len(text) > 3:
            found.setdefault(("text", text, run), Identifier("preamble", "text", text, run))
    return SourceText(tuple(found.values()), frozenset(kept), num_numbers)


def _words(values: Iterable[str]) -> Iterator[str]:
    """Values and their words: AGFA, a private creator, is no secret beside the maker Agfa-Gevaert AG."""
    for value in values:
        yield value.strip().lower()
        yield from re.findall(r"[a-z0-9]{4,}", value.lower())


@dataclass(frozen=True)
class _Element:
    tag: int
    vr: str
    keyword: str
    values: tuple[str, ...]
    raw: bytes
    encodings: tuple[str, ...]
    typed: bool = False  # into a hospital's own list of codes


def _walk(dataset: Dataset, depth: int, within: str = "") -> Iterator[_Element]:
    local = _is_local(dataset, within)
    if depth > _MAX_DEPTH:
        raise ValueError
    encodings = _encodings(dataset)
    for tag in list(dataset.keys()):
        stored = dataset.get_item(tag)
        raw = stored.value if isinstance(stored, RawDataElement) and isinstance(stored.value, bytes) else b""
        keyword = _keyword(int(tag))
        try:
            element = dataset[tag]
            if element.VR == "SQ" and keyword not in _OF_SOFTWARE:
                for item in element.value:
                    yield from _walk(item, depth + 1, keyword)
                continue
            typed = local and keyword in CODE_TEXTS
            yield _Element(int(tag), str(element.VR), keyword, _texts(element.value), raw, encodings, typed)
        except (ValueError, TypeError, LookupError, NotImplementedError, OverflowError):
            # Not what its VR says: its bytes are searched for as they are.
            yield _Element(int(tag), "UN", keyword, (), raw, encodings)


def _is_local(dataset: Dataset, within: str) -> bool:
    try:
        return is_local_code(within, str(dataset.get("CodingSchemeDesignator") or ""))
    except (ValueError, TypeError, LookupError, NotImplementedError, OverflowError):
        return True


def _keyword(tag: int) -> str:
    if tag >> 16 & 1:
        return "private element"
    return keyword_of(tag) or "unknown element"


def _encodings(dataset: Dataset) -> tuple[str, ...]:
    found = dataset.original_character_set or ()
    return tuple(dict.fromkeys([found] if isinstance(found, str) else [str(name) for name in found]))


def _texts(value: object) -> tuple[str, ...]:
    if value is None or isinstance(value, bytes):
        return ()
    values: Iterable[object] = value if isinstance(value, (MultiValue, list, tuple)) else (value,)
    return tuple(str(part) for part in values)


def _stays(element: _Element) -> bool:
    """Whether an element of this kind may stand in a copy as it is."""
    if (
        element.typed
        or element.tag >> 16 & 1
        or element.keyword == "unknown element"
        or element.tag in profile()
    ):
        return False
    if element.vr == "UI":
        return all(map(is_public_uid, element.values))
    if element.vr in BINARY_VRS or " or " in element.vr:
        return element.keyword in BINARY_KEPT or element.vr == "US or SS"
    if element.vr in TEXT_VRS - {"CS"}:
        return element.keyword in TEXT_KEPT
    return element.vr == "CS" or element.vr in NUMBER_VRS


def _identifiers(element: _Element) -> Iterator[Identifier]:
    if element.vr in BINARY_VRS or not element.values:
        yield from _from_bytes(element)
        return
    kinds: dict[str, Kind] = {"PN": "name", "DA": "date", "DT": "date", "TM": "time", "UI": "uid"}
    kind = kinds.get(element.vr, "text")
    parts = element.raw.split(b"\\")
    whole = len(parts) == len(element.values)
    for number, text in enumerate(element.values):
        stripped = text.strip(" \0\r\n\t")
        if not stripped or (kind == "uid" and is_public_uid(stripped)):
            continue
        raw = parts[number].strip(b" \0") if whole else b""
        yield Identifier(element.keyword, kind, stripped, raw, element.encodings, element.keyword in DIRECT)


def _from_bytes(element: _Element) -> Iterator[Identifier]:
    """A value of unknown form: as text where it is text throughout, else as bytes."""
    raw = element.raw.strip(b" \0")
    if not raw:
        return
    if _PRINTABLE.fullmatch(raw) and len(raw) <= 1024:
        for part in raw.split(b"\\"):
            yield Identifier(
                element.keyword, "text", part.decode("latin-1").strip(), part.strip(), element.encodings
            )
    elif len(raw) >= 16:
        yield Identifier(element.keyword, "bytes", "", raw)
