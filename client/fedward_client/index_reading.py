"""Read everything that the index wants to know of one file, in the process that may be killed (hop 2).

Header only, parsed once: what the file is, why it may not be used, the signs that the gate weighs, and
where its slices lie. What comes out is plain JSON, because it crosses from the sandbox; the other side
rebuilds it field by field (`found_from`), for a file may have taken the sandbox over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from operator import attrgetter, contains
from typing import Any

from fedward_client.dicom.gate_facts import Box, GateFacts, gate_facts
from fedward_client.dicom.header import Header, header_of, image_refusal_of, refusal_of
from fedward_client.dicom.parser import contained, parse_file
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.slice_facts import has_more_to_say, read_slice_facts, slice_facts
from fedward_client.dicom.slice_text import slices_to_text
from fedward_client.dicom.sop_classes import RADIOGRAPHS
from fedward_client.index_records import INTEGERS, REALS, ContentRecord, Found

_SURROGATE = re.compile("[\ud800-\udfff]")

_MAX_TEXT = 1024
"""Of a value in the header; a longer one is no longer a description, and the index has to stay small."""

_MAX_KEPT_TEXT = 8 * _MAX_TEXT
"""The same with what `backslashreplace` makes of it."""


def examine(data: bytes | None, content: str) -> Found:
    """Read one file held in memory.

    Args:
        data: the whole file; None when it is too large to be read.
        content: SHA-256 of it, hex.
    """
    try:
        if data is None:
            raise UnusableImageError(Reason.TOO_LARGE)
        with contained(Reason.MALFORMED):
            parsed = parse_file(data)
            header = header_of(parsed)
            signs = signs_of(gate_facts(parsed.elements))
            refusal, stricter = image_refusal_of(header), refusal_of(header)
    except UnusableImageError as error:
        found = (error.reason.value, error.kind)
        return Found(ContentRecord(*found, *found))
    slices = None
    if refusal is None and header.sop_class not in RADIOGRAPHS:
        try:
            placed = read_slice_facts(data, content) if has_more_to_say(header) else None
            slices = slices_to_text(placed or (slice_facts(header, content),))
        except UnusableImageError as error:
            refusal = error
    return Found(_record(header, refusal, stricter), signs, slices)


def _record(
    header: Header, refusal: UnusableImageError | None, stricter: UnusableImageError | None
) -> ContentRecord:
    spacing = header.pixel_spacing or header.imager_pixel_spacing or (None, None)
    return ContentRecord(
        reason=refusal.reason.value if refusal else None,
        kind=refusal.kind if refusal else "",
        radiograph_reason=stricter.reason.value if stricter else None,
        radiograph_kind=stricter.kind if stricter else "",
        sop_class=_text(header.sop_class),
        sop_instance=_text(header.sop_instance) or None,
        series=_text(header.series),
        study=_text(header.study),
        patient=_text(header.patient),
        accession=_text(header.accession),
        study_date=None if header.study_date is None else header.study_date.isoformat().replace("-", ""),
        study_time=_text(header.study_time),
        modality=_text(header.modality),
        study_year=header.study_year,
        sex=header.sex,
        age_years=header.age_years,
        body_part=_text(header.body_part),
        view_position=_text(header.view_position),
        laterality=_text(header.laterality),
        series_description=_text(header.series_description),
        image_type=_text("\\".join(header.image_type)),
        manufacturer=_text(header.manufacturer),
        model_name=_text(header.model_name),
        series_number=_integer(header.series_number),
        instance_number=_integer(header.instance_number),
        acquisition_number=_integer(header.acquisition_number),
        images_in_acquisition=_integer(header.images_in_acquisition),
        num_frames=_integer(header.num_frames),
        rows=_integer(header.rows),
        columns=_integer(header.columns),
        row_mm=spacing[0],
        column_mm=spacing[1],
    )


def _text(text: str) -> str:
    """A text that SQLite and JSON take: no lone surrogate, and not endless."""
    if text.isascii() and len(text) <= _MAX_TEXT:
        return text
    return text[:_MAX_TEXT].encode("utf-8", "backslashreplace").decode()


def _integer(number: int | None) -> int | None:
    return number if number is not None and -(2**63) <= number < 2**63 else None


@lru_cache(maxsize=4096)  # one scanner's images have a few dozen different ones
def signs_of(facts: GateFacts) -> str:
    """Write the gate's facts as JSON; equal facts give equal text."""
    values = {each.name: getattr(facts, each.name) for each in fields(GateFacts)}
    values["malformed"] = sorted(facts.malformed)
    return json.dumps(values, separators=(",", ":"), sort_keys=True)


@lru_cache(maxsize=4096)
def facts_from(signs: str) -> GateFacts:
    """Undo `signs_of`.

    Raises:
        ValueError: it is none.
    """
    try:
        values = dict(json.loads(signs))
        values["image_type"] = tuple(map(str, values["image_type"]))
        values["regions"] = tuple(Box(*map(int, corners)) for corners in values["regions"])
        values["malformed"] = frozenset(map(str, values["malformed"]))
        facts = GateFacts(**values)
    except (TypeError, KeyError, RecursionError):
        raise ValueError("not the gate's facts") from None
    if signs != signs_of(facts) or not all(fits(getattr(facts, name)) for name, fits in _SIGNS.items()):
        raise ValueError("not the gate's facts")
    return facts


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_answer(value: object) -> bool:
    return value in ("yes", "no", "absent")


_SIGNS: Mapping[str, Callable[[object], bool]] = {
    **dict.fromkeys(("sop_class", "modality", "conversion_type"), _is_text),
    **dict.fromkeys(("burned_in", "recognizable", "identity_removed"), _is_answer),
    **dict.fromkeys(("rows", "columns", "overlay_planes", "num_private"), _is_count),
    **dict.fromkeys(
        (
            "says_capture",
            "capture_device",
            "overlay_in_pixels",
            "regions_unusable",
            "head",
            "colour",
            "placeless",
        ),
        _is_bool,
    ),
}


_KINDS = tuple(frozenset({type(None), *ContentRecord.kinds(name)}) for name in ContentRecord._fields)
_INTEGERS, _REALS = attrgetter(*sorted(INTEGERS)), attrgetter(*sorted(REALS))
_TEXTS = attrgetter(*sorted(set(ContentRecord._fields) - INTEGERS - REALS))


def found_message(found: Found) -> list[Any]:
    """Put news about one content into JSON's types."""
    return [list(found.record), found.signs, found.slices]


def _can_be_kept(record: ContentRecord, signs: str | None, slices: str | None) -> bool:
    """Whether SQLite takes it: whole numbers of 64 bits, finite ones, and short text without lone surrogates.

    Asked for every file of a folder: so for all texts of a record at once.
    """
    texts = [text for text in _TEXTS(record) if text]
    together = "".join(texts)
    if len(together) > _MAX_KEPT_TEXT and max(map(len, texts)) > _MAX_KEPT_TEXT:
        return False
    integers = [number for number in _INTEGERS(record) if number is not None]
    if integers and not -(2**63) <= min(integers) <= max(integers) < 2**63:
        return False
    reals = [number for number in _REALS(record) if number is not None]
    if not all(abs(number) < (float("inf") if type(number) is float else 2**63) for number in reals):
        return False
    written = (together, signs or "", slices or "")
    return all(text.isascii() or not _SURROGATE.search(text) for text in written)


def found_from(message: Any, known_kind: Callable[[Any], str]) -> Found:
    """Undo `found_message`, field by field.

    Args:
        message: as the sandbox gave it.
        known_kind: admits names out of the DICOM dictionary alone.

    Raises:
        ValueError: it is none.
    """
    try:
        values, signs, slices = message
        record = ContentRecord(*values)
    except (TypeError, ValueError):
        raise ValueError("not news about a content") from None
    for reason in (record.reason, record.radiograph_reason):
        if reason is not None:
            Reason(reason)
    if not all(map(contains, _KINDS, map(type, record))):
        raise ValueError("not news about a content")
    if not all(text is None or isinstance(text, str) for text in (signs, slices)):
        raise ValueError("not news about a content")
    if not _can_be_kept(record, signs, slices):
        raise ValueError("not news about a content")
    if signs is not None:
        facts_from(signs)
    return Found(
        record._replace(kind=known_kind(record.kind), radiograph_kind=known_kind(record.radiograph_kind)),
        signs,
        slices,
    )
