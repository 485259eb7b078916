"""What the index keeps of a header survives the way through JSON, and nothing else comes through."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pydicom.data
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward_client.dicom.gate_facts import read_gate_facts
from fedward_client.dicom.header import image_refusal_of, read_header, refusal_of
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.slice_facts import read_slice_facts
from fedward_client.dicom.slice_text import slices_from_text
from fedward_client.index_reading import (
    examine,
    facts_from,
    found_from,
    found_message,
    signs_of,
)
from fedward_client.index_records import ContentRecord, Found
from tests.builders import a_dicom
from tests.client.series_builder import a_truth, files_of
from tests.client.series_builder import slices_of as a_series


def known_kind(kind: Any) -> str:
    return kind if kind == "CT Image Storage" else ""


def real_files(shared_data: Path) -> list[Path]:
    """Pydicom's own files and those of scanners."""
    packaged = Path(pydicom.data.__file__).parent / "test_files"
    folders = (packaged, shared_data / "dicom-varied", shared_data / "dicom-vendors")
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]


def test_real_files_give_what_their_own_readers_give_before_and_after_json(shared_data: Path) -> None:
    num_placed = num_signs = 0
    for path in real_files(shared_data):
        data = path.read_bytes()
        content = hashlib.sha256(data).hexdigest()
        found = examine(data, content)
        again = found_from(json.loads(json.dumps(found_message(found))), lambda kind: str(kind))
        assert again == found, path.name
        if found.signs is None:
            continue
        header = read_header(data)
        assert facts_from(found.signs) == read_gate_facts(data)
        num_signs += 1
        stricter = refusal_of(header)
        assert found.record.radiograph_reason == (stricter.reason.value if stricter else None)
        if found.slices is not None:
            slices = slices_from_text(
                found.slices,
                content=content,
                series=header.series,
                study=header.study,
                modality=header.modality,
            )
            assert slices == list(read_slice_facts(data, content)), path.name
            num_placed += 1
        elif image_refusal_of(header) is None and found.record.radiograph_reason is not None:
            with pytest.raises(UnusableImageError):
                read_slice_facts(data, content)
    assert num_signs > 80
    assert num_placed > 40


def test_a_classic_slice_and_a_radiograph_are_read_alike() -> None:
    (slice_file, *_) = files_of(a_series(a_truth()))

    ct, cr = examine(slice_file, "a"), examine(a_dicom(), "b")

    assert (ct.record.reason, ct.record.radiograph_reason) == (None, "sop_class")
    assert ct.record.radiograph_kind == "CT Image Storage"
    assert ct.slices is not None
    assert (cr.record.reason, cr.record.radiograph_reason, cr.slices) == (None, None, None)
    assert "PatientID" not in repr(ct)
    assert "P1" not in repr(ct)


@pytest.mark.parametrize(
    ("data", "reason"), [(None, Reason.TOO_LARGE), (b"", Reason.EMPTY), (b"x" * 500, Reason.NOT_DICOM)]
)
def test_what_cannot_be_read_has_a_reason_and_nothing_else(data: bytes | None, reason: Reason) -> None:
    found = examine(data, "0")

    assert found == Found(ContentRecord(reason.value, "", reason.value, ""))


SOUND = examine(files_of(a_series(a_truth()))[0], "0")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reason", "because"),
        ("radiograph_reason", 7),
        ("patient", 7),
        ("patient", ["P1"]),
        ("rows", "16"),
        ("rows", True),
        ("row_mm", "0.8"),
        ("study_year", 2019.5),
    ],
)
def test_a_record_of_other_types_is_refused(field: str, value: object) -> None:
    message = found_message(SOUND)
    message[0][ContentRecord._fields.index(field)] = value

    with pytest.raises(ValueError, match="not"):
        found_from(message, known_kind)


def test_a_kind_that_is_no_name_of_the_dictionary_does_not_come_through() -> None:
    message = found_message(SOUND)
    message[0][ContentRecord._fields.index("radiograph_kind")] = "DOE^JOHN"

    assert found_from(message, known_kind).record.radiograph_kind == ""


@pytest.mark.parametrize(
    "change",
    [
        {"burned_in": "maybe"},
        {"burned_in": None},
        {"rows": -1},
        {"rows": True},
        {"says_capture": 0},
        {"sop_class": 5},
        {"regions": [[1, 2, 3]]},
        {"regions": [[1.5, 2, 3, 4]]},
        {"image_type": "ORIGINAL"},
        {"malformed": [["x"]]},
        {"more": 1},
    ],
)
def test_signs_of_other_types_are_refused(change: dict[str, object]) -> None:
    assert SOUND.signs is not None
    signs = json.dumps(json.loads(SOUND.signs) | change, separators=(",", ":"), sort_keys=True)

    with pytest.raises(ValueError, match="not the gate's facts"):
        facts_from(signs)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_any_message_is_refused_by_value_error_or_becomes_news(message: Any) -> None:
    for text in (json.dumps(message), str(message)):
        with suppress(ValueError):
            facts_from(text)
            raise AssertionError("taken for the gate's facts")
    for candidate in (message, [message, None, None], [list(SOUND.record), message, message]):
        try:
            found = found_from(candidate, known_kind)
        except ValueError:
            continue
        assert isinstance(found, Found)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_header_with_any_bytes_changed_gives_news_that_come_through(draw: st.DataObject) -> None:
    data = bytearray(DAMAGED)
    for _ in range(draw.draw(st.integers(1, 6))):
        place = draw.draw(st.integers(128, len(data) - 1))
        data[place] = draw.draw(st.integers(0, 255))

    found = examine(bytes(data), "0")

    assert (
        found_from(json.loads(json.dumps(found_message(found))), known_kind).record.rows == found.record.rows
    )
    if found.signs is not None:
        assert signs_of(facts_from(found.signs)) == found.signs


DAMAGED = files_of(a_series(a_truth(num_slices=1)))[0][:2000]


@pytest.mark.parametrize(
    "values",
    [
        {"row_mm": 10**30},
        {"row_mm": float("inf")},
        {"column_mm": float("nan")},
        {"rows": 2**63},
        {"rows": -(2**63) - 1},
        {"rows": True},
        {"patient": 3},
        {"patient": "\ud800"},
        {"patient": "x" * 8193},
        {"signs": "\udc00"},
        {"slices": "\udc00"},
    ],
    ids=str,
)
def test_what_the_index_cannot_hold_is_no_news(values: dict[str, Any]) -> None:
    news = {"signs": None, "slices": None} | values
    signs, slices = news.pop("signs"), news.pop("slices")
    with pytest.raises(ValueError, match="not news about a content"):
        found_from([list(ContentRecord(None)._replace(**news)), signs, slices], str)


@pytest.mark.parametrize(
    "values", [{"row_mm": 1e300}, {"rows": -(2**63)}, {"patient": "x" * 8192}, {"patient": "\U0001f600"}]
)
def test_what_the_index_can_hold_is_news(values: dict[str, Any]) -> None:
    record = ContentRecord(None)._replace(**values)
    assert found_from([list(record), None, None], str).record == record
