"""The label file: every mistake is refused with its row, and no cell is quoted."""

from __future__ import annotations

import doctest
from datetime import date, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedward_client import contact_sheet, label_file, labels, longitudinal
from fedward_client.dicom import nested, rtstruct
from fedward_client.label_file import read_labels
from fedward_client.labels import (
    Concept,
    LabelConfig,
    LabelFile,
    LabelKey,
    LabelRow,
    classify,
    compact_date,
    label_index,
    measured_value,
)
from fedward_common.errors import CohortError

CANARY = "CNRYNAME"


def write(tmp_path: Path, text: str, encoding: str = "utf-8") -> Path:
    path = tmp_path / f"{CANARY}.csv"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_as_spreadsheets_write_them_are_read(
    tmp_path: Path, encoding: str, delimiter: str, end: str
) -> None:
    lines = ["SOPInstanceUID,note,label,split", "1.2,x,0,train", " 1.3 ,,1,test", "", "1.4,y,1,validation"]
    path = write(tmp_path, end.join(lines).replace(",", delimiter), encoding)

    labels = read_labels(path)

    assert labels.key_column == "SOPInstanceUID"
    assert [(row.number, row.key, row.label, row.split) for row in labels.rows] == [
        (2, "1.2", "0", "train"),
        (3, "1.3", "1", "test"),
        (5, "1.4", "1", "validation"),
    ]


@pytest.mark.parametrize("column", ["SeriesInstanceUID", "StudyInstanceUID", "PatientID"])
def test_other_key_columns_are_accepted_and_the_most_specific_one_counts(tmp_path: Path, column: str) -> None:
    assert read_labels(write(tmp_path, f"{column},label\na,1\n")).key_column == column
    assert (
        read_labels(write(tmp_path, f"{column},SOPInstanceUID,label\na,b,1\n")).key_column == "SOPInstanceUID"
    )


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("SOPInstanceUID", "1.2"),
        ("SeriesInstanceUID", "1.3"),
        ("StudyInstanceUID", "1.4"),
        ("AccessionNumber", "A1"),
        ("PatientID", "P1"),
        ("PatientID+StudyDate", "P1\\20200131"),
    ],
)
def test_declared_key_counts_whatever_else_the_file_has(tmp_path: Path, key: LabelKey, expected: str) -> None:
    header = "StudyDate,PatientID,label,AccessionNumber,StudyInstanceUID,SeriesInstanceUID,SOPInstanceUID"
    path = write(tmp_path, f"{header}\n2020-01-31,P1,1,A1,1.4,1.3,1.2\n")

    labels = read_labels(path, key)

    assert labels.key_column == key
    assert [row.key for row in labels.rows] == [expected]


def test_declared_key_that_the_file_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CohortError) as caught:
        read_labels(write(tmp_path, "SOPInstanceUID,label\n1.2,0\n"), "PatientID+StudyDate")
    assert caught.value.remedy.startswith("Key columns: PatientID+StudyDate")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("P1,03/02/2019,0", "row 2: StudyDate is neither YYYY-MM-DD nor YYYYMMDD"),
        ("P1,2019-02-30,0", "row 2: StudyDate is neither"),
        ("P1,,0", "row 2: empty StudyDate"),
        (",20190203,0", "row 2: empty PatientID"),
        ("P1,20190203,0\nP1,2019-02-03,1", "row 3: duplicate .* first in row 2"),
    ],
)
def test_patient_and_date_need_both_and_a_date_of_no_doubt(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(CohortError, match=message):
        read_labels(write(tmp_path, f"PatientID,StudyDate,label\n{row}\n"))


def test_delimiter_is_the_one_that_yields_the_header(tmp_path: Path) -> None:
    text = 'SOPInstanceUID;label;"note, with, many, commas"\n1.2;0;"x;y"\n'

    assert [row.key for row in read_labels(write(tmp_path, text)).rows] == ["1.2"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le"])
def test_what_programs_put_around_a_cell_is_taken_off(tmp_path: Path, encoding: str) -> None:
    """Empty columns, blanks before quotes, invisible characters, and a formula that keeps zeros."""
    lines = [
        "AccessionNumber,label,,",
        '="00123", "müde",,',
        '"=""00124""",b',
        "\u200b125\u00a0,\u2060c\ufeff,",
        ",,,,",
    ]
    text = ("\ufeff" if encoding == "utf-16-le" else "") + "\r\n".join(lines)
    rows = read_labels(write(tmp_path, text, encoding)).rows
    assert [(row.number, row.key, row.label) for row in rows] == [
        (2, "00123", "müde"),
        (3, "00124", "b"),
        (4, "125", "c"),
    ]


@pytest.mark.parametrize("number", ["1.23457E+11", "1,23457E+11", "2.019e12"])
def test_a_key_of_which_a_spreadsheet_dropped_digits_is_refused(tmp_path: Path, number: str) -> None:
    text = f"AccessionNumber;label\n{number};0\n"
    with pytest.raises(
        CohortError, match="row 2: AccessionNumber is a number that a spreadsheet has shortened"
    ):
        read_labels(write(tmp_path, text))


def test_file_beyond_the_limit_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_file, "MAX_LABEL_BYTES", 2**20)
    path = write(tmp_path, "SOPInstanceUID,label\n")
    with path.open("r+b") as file:
        file.truncate(2**20 + 1)
    with pytest.raises(CohortError, match="larger than 1 MiB"):
        read_labels(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "row 1"),
        ("key,label\n1.2,0\n", "row 1"),
        ("SOPInstanceUID\n1.2\n", "row 1"),
        ("SOPInstanceUID,label,label\n1.2,0,1\n", "row 1"),
        ("SOPInstanceUID,label\n1.2,0\n1.3,1\n1.2,1\n", "row 4: duplicate SOPInstanceUID, first in row 2"),
        ("SOPInstanceUID,label\n1.2,0\n,1\n", "row 3: empty SOPInstanceUID"),
        ("SOPInstanceUID,label\n1.2,\n", "row 2: empty label"),
        ("SOPInstanceUID,label\n1.2,0\n1.3\n", "row 3: 1 cells, 2 expected"),
        ("SOPInstanceUID,label,split\n1.2,0,train\n1.3,0,val\n", "row 3: split is not one of"),
        ("SOPInstanceUID,label,split\n1.2,0,\n", "row 2: split is not one of"),
        ('SOPInstanceUID,label\n1.2,"0\n', "cannot be read"),
    ],
)
def test_mistakes_are_refused_with_their_row(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CohortError, match=message) as caught:
        read_labels(write(tmp_path, text))
    assert caught.value.remedy


def test_all_faulty_rows_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    rows = "".join(f"{number},\n" for number in range(25))

    with pytest.raises(CohortError, match=r"row 2: .*row 11: .*and 15 more rows"):
        read_labels(write(tmp_path, f"SOPInstanceUID,label\n{rows}"))


@pytest.mark.parametrize(
    "text",
    [
        f"SOPInstanceUID,label\n1.2,0\n1.2,{CANARY}\n",
        f"SOPInstanceUID,label,split\n1.2,0,{CANARY}\n",
        f"{CANARY},label\n1.2,0\n",
        f"SOPInstanceUID,label\n{CANARY},0,0\n",
        f'SOPInstanceUID,label\n"{CANARY},0\n',
        f"SOPInstanceUID,label\n{CANARY},{'0' * 200_000}\n",
    ],
)
def test_errors_quote_neither_cells_nor_the_path(tmp_path: Path, text: str) -> None:
    with pytest.raises(CohortError) as caught:
        read_labels(write(tmp_path, text))
    assert CANARY not in f"{caught.value.message}{caught.value.remedy}"
    assert caught.value.__cause__ is None


def test_a_file_in_another_encoding_or_absent_is_refused(tmp_path: Path) -> None:
    latin = write(tmp_path, "SOPInstanceUID,label,note\n1.2,0,Müller\n", "latin-1")
    for path in (latin, tmp_path / "absent.csv", tmp_path):
        with pytest.raises(CohortError, match="cannot be read"):
            read_labels(path)


@settings(deadline=None)
@given(st.text(max_size=12))
def test_a_label_is_a_known_name_a_number_in_range_or_nothing(text: str) -> None:
    names = ("normal", "pneumonia", "2")

    index = label_index(text, names)

    if text in names:
        assert index == names.index(text)
    elif index is not None:
        assert index in range(3)
        assert text.lstrip("0") == (str(index) if index else "")


@given(st.dates(min_value=date(1900, 1, 1)))
def test_both_forms_of_a_date_are_one(day: date) -> None:
    assert compact_date(f"{day:%Y-%m-%d}") == compact_date(f"{day:%Y%m%d}") == f"{day:%Y%m%d}"
    assert compact_date(f"{day:%d.%m.%Y}") is None
    assert compact_date(f"{day + timedelta(1):%Y-%m%d}") is None


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_that_python_writes_is_read_back(value: float) -> None:
    assert measured_value(repr(value)) == value


@pytest.mark.parametrize("text", ["", "1,5", "nan", "inf", "1e999", "0x10", "1_0", "٣", "1" * 65, "--1"])
def test_what_is_no_number_is_none(text: str) -> None:
    assert measured_value(text) is None


def test_numbers_become_classes_at_the_cut_points() -> None:
    rows = tuple(
        LabelRow(n, f"{n}", text, None) for n, text in enumerate(("-1", "10", "29.99", "30", "1e3"), 2)
    )

    found = classify(LabelFile("PatientID", rows), (10.0, 30.0))

    assert [(row.number, row.label) for row in found.rows] == [
        (2, "0"),
        (3, "1"),
        (4, "1"),
        (5, "2"),
        (6, "2"),
    ]
    with pytest.raises(CohortError, match="row 9: no number"):
        classify(LabelFile("PatientID", (*rows, LabelRow(9, "k", "large", None))), (10.0,))


CONCEPT = {"concept": "SCT:10200004"}


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"key": "PatientID+StudyDate", "limits": {"rows_without_image": 0.02}},
        {"cut_points": [-1.5, 0, 3]},
        {
            "source": "reports",
            "report": CONCEPT | {"where": {"DCM:121401": "SCT:373098007"}, "unit": "UCUM:mm"},
        },
        {"source": "segmentations", "mask": {"segment": "SCT:10200004", "min_pixels": 20}},
        {"source": "segmentations", "mask": {"segment": 3}},
        {"source": "structures", "mask": {"structure": "GTV"}},
    ],
)
def test_sound_tables_are_read_and_survive_json(table: dict[str, Any]) -> None:
    config = LabelConfig.model_validate(table)

    assert LabelConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError):
        config.source = "csv"  # type: ignore[misc]


@pytest.mark.parametrize(
    "table",
    [
        {"sources": "csv"},
        {"source": "guess"},
        {"key": "PatientName"},
        {"limits": {"rows_without_image": 1.5}},
        {"limits": {"rows_without_image": float("nan")}},
        {"cut_points": [3, 1]},
        {"cut_points": [1, 1]},
        {"cut_points": [float("inf")]},
        {"source": "reports"},
        {"report": CONCEPT},
        {"source": "reports", "report": {"concept": "liver"}},
        {"source": "reports", "report": {"concept": ":1"}},
        {"source": "reports", "report": CONCEPT, "key": "PatientID"},
        {"source": "segmentations"},
        {"source": "segmentations", "mask": {"structure": "GTV"}},
        {"source": "structures", "mask": {"segment": 3}},
        {"source": "structures", "mask": {"segment": 3, "structure": "GTV"}},
        {"source": "segmentations", "mask": {"segment": 0}},
        {"source": "segmentations", "mask": {"segment": 3}, "cut_points": [1]},
        {"mask": {"segment": 3}},
    ],
)
def test_tables_that_make_no_sense_are_refused(table: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LabelConfig.model_validate(table)


def test_codes_are_written_as_scheme_and_value() -> None:
    config = LabelConfig.model_validate({"source": "reports", "report": CONCEPT})

    assert config.report is not None
    assert config.report.concept == Concept("SCT", "10200004")


@pytest.mark.parametrize("module", [labels, longitudinal, contact_sheet, nested, rtstruct])
def test_examples_in_docstrings_hold(module: ModuleType) -> None:
    found = doctest.testmod(module)

    assert found.attempted > 0
    assert found.failed == 0


def test_a_label_file_that_is_not_there_is_told_from_one_that_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="No such file") as told:
        read_labels(tmp_path / "CNRY.csv")
    assert "CNRY" not in told.value.message + told.value.remedy
