"""The label file: every mistake is refused with its row, and no cell is quoted."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward_client.labels import label_index, read_labels
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
