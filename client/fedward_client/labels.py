"""The label file: a CSV that says, for each image, what it shows and optionally on which side it is.

Columns: one key (`SOPInstanceUID`, else `SeriesInstanceUID`, `StudyInstanceUID` or `PatientID`; the
most specific one counts), `label` (a class name of the plan, or its number from 0), and optionally
`split` (train, validation or test). Other columns are ignored. A mistake is refused with its row as a
spreadsheet numbers it; the cell itself is never quoted, for a shifted column may hold a name.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from fedward_client.index_store import KEY_COLUMNS, KeyColumn
from fedward_common.errors import CohortError

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)

_MAX_FAULTS_SHOWN = 10


@dataclass(frozen=True)
class LabelRow:
    """One row of the label file.

    Args:
        number: as a spreadsheet shows it; the header is row 1.
        key: value of the key column.
        label: text of the label cell.
        split: the file's own side for this image, if it has that column.
    """

    number: int
    key: str = field(repr=False)
    label: str = field(repr=False)
    split: SplitName | None


@dataclass(frozen=True)
class LabelFile:
    """A label file whose form is sound; whether it fits the images is the cohort's question."""

    key_column: KeyColumn
    rows: tuple[LabelRow, ...] = field(repr=False)


def read_labels(path: Path) -> LabelFile:
    """Read a label file: UTF-8, comma, semicolon or tab.

    Raises:
        CohortError: not readable, a column missing, or rows with an empty, repeated or unknown entry;
            every such row is counted and the first ones are named.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = _delimiter(file.readline())
            file.seek(0)
            table = [
                [cell.strip() for cell in row] for row in csv.reader(file, delimiter=delimiter, strict=True)
            ]
    except (OSError, UnicodeDecodeError, csv.Error):
        raise CohortError(  # the exception quotes the path or the cell
            "the label file cannot be read as a CSV in UTF-8",
            remedy="Check `labels` in site.toml, and save the table as CSV UTF-8.",
        ) from None
    header = table[0] if table else []
    key_column = _key_column(header)
    return LabelFile(key_column, _rows(header, table[1:], key_column))


def label_index(text: str, names: Sequence[str]) -> int | None:
    """Class number of a label cell: a class name, else a number from 0; None when it is neither.

    >>> [label_index(text, ("normal", "pneumonia")) for text in ("pneumonia", "0", "2", "yes")]
    [1, 0, None, None]
    """
    if text in names:
        return names.index(text)
    is_number = text.isascii() and text.isdigit() and len(text) <= 6
    return int(text) if is_number and int(text) < len(names) else None


def refuse_rows(faults: Sequence[tuple[int, str]], *, remedy: str) -> None:
    """Raise one CohortError that names the first faulty rows and counts the rest; nothing if none.

    Args:
        faults: (row number, what is wrong with it); no cell contents.
        remedy: what to do about them.
    """
    if not faults:
        return
    shown = "; ".join(f"row {number}: {what}" for number, what in sorted(faults)[:_MAX_FAULTS_SHOWN])
    rest = len(faults) - _MAX_FAULTS_SHOWN
    more = f"; and {rest} more rows" if rest > 0 else ""
    raise CohortError(f"the label file does not fit: {shown}{more}", remedy=remedy)


def _delimiter(first_line: str) -> str:
    return max(",;\t", key=first_line.count)


def _key_column(header: list[str]) -> KeyColumn:
    repeated = len(set(header)) != len(header)
    for column in KEY_COLUMNS:
        if column in header and "label" in header and not repeated:
            return column
    raise CohortError(
        "row 1 of the label file must name each column once: one key column and `label`",
        remedy=f"Key columns: {', '.join(KEY_COLUMNS)}; an optional column `split`.",
    )


def _rows(header: list[str], body: list[list[str]], key_column: KeyColumn) -> tuple[LabelRow, ...]:
    rows: list[LabelRow] = []
    faults: list[tuple[int, str]] = []
    first_row_of: dict[str, int] = {}
    for number, cells in _numbered(body):
        if len(cells) != len(header):
            faults.append((number, f"{len(cells)} cells, {len(header)} expected"))
            continue
        record = dict(zip(header, cells, strict=True))
        key, split = record[key_column], record.get("split")
        first = first_row_of.setdefault(key, number)
        if not key or not record["label"]:
            faults.append((number, f"empty {'label' if key else key_column}"))
        elif first != number:
            faults.append((number, f"duplicate {key_column}, first in row {first}"))
        elif split is not None and split not in SPLITS:
            faults.append((number, f"split is not one of {', '.join(SPLITS)}"))
        else:
            rows.append(LabelRow(number, key, record["label"], split))
    refuse_rows(faults, remedy="Correct these rows; each key once, with a label.")
    return tuple(rows)


def _numbered(body: list[list[str]]) -> Iterator[tuple[int, list[str]]]:
    return ((number, cells) for number, cells in enumerate(body, start=2) if any(cells))
