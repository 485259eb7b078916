"""Read the label file of a site (hop 3): a CSV with one declared key, `label`, and optionally `split`.

The key is `SOPInstanceUID`, `SeriesInstanceUID`, `StudyInstanceUID`, `AccessionNumber`, the two columns
`PatientID` and `StudyDate`, or `PatientID`: the one that the site declares, else the most specific one of
the file. Other columns are ignored. A mistake is refused with its row as a spreadsheet numbers it; the
cell itself is never quoted, for a shifted column may hold a name.

What spreadsheets and hospital systems add around a cell is taken off where it means nothing else: blanks,
invisible characters, empty columns at the right, and ="00123", which keeps a number a text.
"""

from __future__ import annotations

import codecs
import csv
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from fedward_client.labels import (
    LABEL_KEYS,
    SPLITS,
    LabelFile,
    LabelKey,
    LabelRow,
    columns_of,
    compact_date,
    join_key,
    refuse_rows,
)
from fedward_common.errors import CohortError

MAX_LABEL_BYTES = 512 * 2**20
"""A larger label file is refused unread; a million rows take a tenth of it."""

_DELIMITERS = ",;\t"
_INVISIBLE = "\ufeff\u200b\u200e\u200f\u2060\0"
_TEXT_FORMULA = re.compile(r'="([^"]*)"')
_SHORTENED = re.compile(r"[+-]?\d[.,]\d+[eE]\+?\d+", re.ASCII)


def read_labels(path: Path, key: LabelKey | None = None) -> LabelFile:
    """Read a label file: UTF-8, or UTF-16 with BOM; comma, semicolon or tab, whichever yields the header.

    Args:
        path: of the file.
        key: the declared key; None takes the most specific one that the file has.

    Raises:
        CohortError: not readable, a column missing, or rows with an empty, repeated or unknown entry;
            every such row is counted and the first ones are named.
    """
    try:
        with path.open(encoding=_encoding(path), newline="") as file:
            _refuse_too_large(file)
            reader = csv.reader(file, delimiter=_delimiter(file), strict=True, skipinitialspace=True)
            header = _cells(next(reader, []), 0)
            key_column = _key_column(header, key)
            return LabelFile(key_column, _rows(header, reader, key_column))
    except OSError as error:
        raise CohortError(
            f"the label file cannot be read: {error.strerror}",
            remedy="Correct `labels` in site.toml, and see that this user may read the file.",
        ) from None  # the exception quotes the path
    except (UnicodeDecodeError, csv.Error):
        raise CohortError(  # the exception quotes the path or the cell
            "the label file cannot be read as a CSV in UTF-8",
            remedy="Check `labels` in site.toml, and save the table as CSV UTF-8.",
        ) from None


def _encoding(path: Path) -> str:
    """UTF-16 where a byte order mark says so: what Excel calls Unicode text."""
    with path.open("rb") as file:
        return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _cells(row: list[str], num_columns: int) -> list[str]:
    """Cells without what means nothing: surrounding blanks, and empty cells beyond the last column."""
    cells = [_plain(cell) for cell in row]
    while len(cells) > num_columns and not cells[-1]:
        del cells[-1]
    return cells


def _plain(cell: str) -> str:
    if cell.isascii() and "=" not in cell and "\0" not in cell:  # nearly all of them
        return cell.strip()
    cell = cell.strip(f"{_INVISIBLE} \t\r\n\u00a0")
    formula = _TEXT_FORMULA.fullmatch(cell)
    return formula[1].strip() if formula else cell


def _refuse_too_large(file: IO[str]) -> None:
    if os.fstat(file.fileno()).st_size > MAX_LABEL_BYTES:
        raise CohortError(
            f"the label file is larger than {MAX_LABEL_BYTES // 2**20} MiB",
            remedy="Leave out the columns that are neither key, label nor split.",
        )


def _delimiter(file: IO[str]) -> str:
    """Find the delimiter with which row 1 names a key and `label`; leaves the file at its start.

    Counting characters would be a guess: a note's heading may hold more commas than the table semicolons.
    """
    line = file.readline(MAX_LABEL_BYTES)
    file.seek(0)
    for delimiter in _DELIMITERS:
        try:
            header = _cells(next(csv.reader([line], delimiter=delimiter, strict=True), []), 0)
        except csv.Error:
            continue
        if "label" in header:
            return delimiter
    return ","


def _key_column(header: list[str], declared: LabelKey | None) -> LabelKey:
    sound = "label" in header and len(set(header)) == len(header)
    for key in LABEL_KEYS if declared is None else (declared,):
        if sound and set(columns_of(key)) <= set(header):
            return key
    keys = LABEL_KEYS if declared is None else (declared,)
    raise CohortError(
        "row 1 of the label file must name each column once: one key column and `label`",
        remedy=f"Key columns: {', '.join(keys)} (a + joins two columns); an optional column `split`.",
    )


def _key_reader(header: list[str], key: LabelKey) -> Callable[[list[str]], tuple[str, str]]:
    """Return the function that takes (key, fault) out of a row's cells; exactly one of them is empty."""
    columns = columns_of(key)
    places = [header.index(column) for column in columns]
    if len(places) == 1:
        (place,), fault = places, f"empty {key}"

        def read_one(cells: list[str]) -> tuple[str, str]:
            value = cells[place]
            if _SHORTENED.fullmatch(value):
                return "", f"{key} is a number that a spreadsheet has shortened"
            return value, "" if value else fault

        return read_one

    def read_pair(cells: list[str]) -> tuple[str, str]:
        values = dict(zip(columns, (cells[place] for place in places), strict=True))
        if not all(values.values()):
            return "", f"empty {next(column for column in columns if not values[column])}"
        if compact_date(values["StudyDate"]) is None:
            return "", "StudyDate is neither YYYY-MM-DD nor YYYYMMDD"
        return join_key(values, key), ""

    return read_pair


def _rows(header: list[str], body: Iterable[list[str]], key_column: LabelKey) -> tuple[LabelRow, ...]:
    rows: list[LabelRow] = []
    faults: list[tuple[int, str]] = []
    first_row_of: dict[str, int] = {}
    label_texts: dict[str, str] = {}  # one string for each label, not one for each row
    read_key = _key_reader(header, key_column)
    label_place = header.index("label")
    split_place = header.index("split") if "split" in header else None
    for number, row in enumerate(body, start=2):
        cells = _cells(row, len(header))
        if not any(cells):
            continue
        if len(cells) != len(header):
            faults.append((number, f"{len(cells)} cells, {len(header)} expected"))
            continue
        key, fault = read_key(cells)
        label = cells[label_place]
        split = None if split_place is None else cells[split_place]
        first = first_row_of.setdefault(key, number) if key else number
        if fault or not label:
            faults.append((number, fault or "empty label"))
        elif first != number:
            faults.append((number, f"duplicate {key_column}, first in row {first}"))
        elif split is None:
            rows.append(LabelRow(number, key, label_texts.setdefault(label, label), None))
        elif split in SPLITS:
            side = SPLITS[SPLITS.index(split)]
            rows.append(LabelRow(number, key, label_texts.setdefault(label, label), side))
        else:
            faults.append((number, f"split is not one of {', '.join(SPLITS)}"))
    refuse_rows(faults, remedy="Correct these rows; each key once, with a label.")
    return tuple(rows)
