"""Files made to carry somebody's name or number into a safe copy, one trick each."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import pytest
from pydicom import config, dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from fedward_client.dicom.deidentify import ExportOptions, make_copy
from fedward_client.dicom.kept_numbers import most_values
from tests.builders import a_dataset, encode

NOTE = b"Seen by Kim, born in Ulm"  # of nobody whom the header knows
Build = Callable[[Dataset], None]


def an_element(tag: int, vr: str, value: Any) -> Build:
    return lambda dataset: dataset.add_new(tag, vr, value)


def in_sequence(keyword: str, *elements: tuple[int, str, Any]) -> Build:
    def build(dataset: Dataset) -> None:
        item = Dataset()
        for element in elements:
            item.add_new(*element)
        setattr(dataset, keyword, Sequence([item]))

    return build


def numbers(kind: str) -> list[Any]:
    return [value for (value,) in struct.iter_unpack(f"<{kind}", NOTE)]


def a_creator(dataset: Dataset) -> None:
    dataset.private_block(0x0029, NOTE.decode(), create=True).add_new(1, "LO", "x")


NOTES: dict[str, Build] = {
    "picture in a sequence": in_sequence("ReferencedImageSequence", (0x7FE00010, "OB", NOTE)),
    "icon": in_sequence("IconImageSequence", (0x7FE00010, "OB", NOTE)),
    "longer look-up table": in_sequence(
        "VOILUTSequence", (0x00283002, "US", [2, 0, 16]), (0x00283006, "OW", b"\0\0\1\0" + NOTE)
    ),
    "look-up table without descriptor": in_sequence("VOILUTSequence", (0x00283006, "OW", NOTE)),
    "palette": an_element(0x00281201, "OW", NOTE),
    "segmented palette": an_element(0x00281221, "OW", NOTE),
    "pointer": an_element(
        0x00280009, "AT", [first << 16 | last for first, last in struct.iter_unpack("<HH", NOTE)]
    ),
    "too many descriptor values": an_element(0x00281101, "US", numbers("H")),
    "too many values": an_element(0x00280106, "US", numbers("H")),
    "too many floats": an_element(0x00189087, "FD", numbers("d")),
    "private creator": a_creator,
    "ICC profile": an_element(0x00282000, "OB", NOTE),
    "document": an_element(0x00420011, "OB", NOTE),
    "overlay": an_element(0x60003000, "OW", NOTE),
    "curve": an_element(0x50003000, "OW", NOTE),
    "method of an earlier run": in_sequence("RequestAttributesSequence", (0x00120063, "LO", NOTE.decode())),
    "UID": an_element(0x00081150, "UI", NOTE.decode()),
    "coordinates": an_element(0x00660016, "OF", NOTE),
    "locator": an_element(0x00080120, "UR", NOTE.decode()),
}


@pytest.mark.parametrize("what", NOTES)
def test_note_that_no_rule_lets_through_is_not_in_the_copy(what: str) -> None:
    dataset = a_dataset(BurnedInAnnotation="NO")
    with config.disable_value_validation():
        NOTES[what](dataset)
        data = encode(dataset)
    assert NOTE[:8] in data
    copy = make_copy(data, bytes(32), ExportOptions()).data
    assert NOTE[:8] not in copy
    assert b"Kim" not in copy
    assert dcmread(io.BytesIO(copy)).Rows == 16


LATIN_1, LATIN_2, UTF_8 = "ISO_IR 100", "ISO_IR 101", "ISO_IR 192"
# Character sets, PatientName, and how somebody typed it into a field that stays.
NAMES: dict[str, tuple[str | list[str], str, str]] = {
    "three Chinese letters": (UTF_8, "王^小明", "王小明"),
    "two Chinese letters": (UTF_8, "Li^Ming=李^明", "李明"),
    "GB18030": ("GB18030", "Wang^Xiaodong=王^小东", "王小东"),
    "Japanese": (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう", "太郎"),
    "Korean": (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동", "홍길동"),
    "umlaut in two letters": (LATIN_1, "Müller^Änne", "Mueller"),
    "umlaut without its points": (LATIN_1, "Müller^Änne", "MULLER"),
    "Polish letter": (LATIN_2, "Woźniak^Łukasz", "Lukasz"),
    "Danish letter": (LATIN_1, "Sørensen^Bø", "Soerensen"),
    "apostrophe": (LATIN_1, "O'Brien^Pat", "OBrien"),
}


@pytest.mark.parametrize("what", NAMES)
def test_name_typed_in_another_way_into_a_field_that_stays_is_not_in_the_copy(what: str) -> None:
    character_set, name, typed = NAMES[what]
    dataset = a_dataset(
        BurnedInAnnotation="NO",
        SpecificCharacterSet=character_set,
        PatientName=name,
        ManufacturerModelName=f"Scan {typed}",
    )
    copy = make_copy(encode(dataset), bytes(32), ExportOptions()).data
    assert dcmread(io.BytesIO(copy)).ManufacturerModelName == ""
    honest = a_dataset(BurnedInAnnotation="NO", PatientName="Else^Somebody", ManufacturerModelName="Scan 3")
    kept = make_copy(encode(honest), bytes(32), ExportOptions()).data
    assert dcmread(io.BytesIO(kept)).ManufacturerModelName == "Scan 3"


PLACES: dict[str, tuple[int, str, Any]] = {
    "integer": (0x00200013, "IS", "48151623"),
    "decimal": (0x00180050, "DS", "48151623.0"),
    "exponent": (0x00180050, "DS", "4.8151623e7"),
    "binary": (0x00189073, "FD", 48151623.0),
    "binary, rounded": (0x00189465, "FL", 48151623.0),
    "binary integer": (0x0018601A, "UL", 48151623),
    "birth date": (0x00180050, "DS", "19531122.00"),
    "model": (0x00081090, "LO", "X48151623"),
    "model, grouped": (0x00081090, "LO", "4815 1623"),
}


@pytest.mark.parametrize("what", PLACES)
@pytest.mark.parametrize("identifier", ["48151623", "48-151-623", "MRN48151623"])
def test_number_of_the_patient_is_in_no_field_of_numbers(what: str, identifier: str) -> None:
    if what == "model, grouped":
        identifier = "4815-1623"
    dataset = a_dataset(BurnedInAnnotation="NO", PatientID=identifier, PatientBirthDate="19531122")
    tag, vr, value = PLACES[what]
    dataset.add_new(tag, vr, value)
    copy = dcmread(io.BytesIO(make_copy(encode(dataset), bytes(32), ExportOptions()).data))
    assert not copy[tag].value


def test_ordinary_numbers_of_a_real_scan_stay() -> None:
    from pydicom.data import get_testdata_file

    data = dcmread(str(get_testdata_file("CT_small.dcm")))
    data.BurnedInAnnotation = "NO"
    stream = io.BytesIO()
    data.save_as(stream)
    copy = dcmread(io.BytesIO(make_copy(stream.getvalue(), bytes(32), ExportOptions()).data))
    for keyword in (
        "PixelSpacing",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "KVP",
        "SliceThickness",
    ):
        assert copy[keyword].value == data[keyword].value
    assert most_values(0x00200032) == 3
    assert most_values(0x00091001) == 0
