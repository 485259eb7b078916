"""What labels are (hop 3): what a site declares of them, their rows, and the keys that join them to images.

A label is a class of the plan, by name or by number from 0. Wherever labels come from, they take the form
of rows: `label_file.py` reads the CSV, `label_sources.py` brings all sources into this form, and
`label_join.py` joins rows and images. No cell is ever quoted, for a shifted column may hold a name.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import pairwise
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from fedward_common.errors import CohortError

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)

LabelKey = Literal[
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "AccessionNumber",
    "PatientID+StudyDate",
    "PatientID",
]
LABEL_KEYS: tuple[LabelKey, ...] = get_args(LabelKey)
"""The most specific one first."""

_MAX_FAULTS_SHOWN = 10
_DATE = re.compile(r"(\d{4})(-?)(\d\d)\2(\d\d)", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)


@dataclass(frozen=True)
class Concept:
    """A coded concept, such as SCT 10200004 (liver): scheme designator and code value, no free text."""

    scheme: str
    value: str

    def __str__(self) -> str:
        return f"{self.scheme}:{self.value}"


def parse_concept(text: object) -> Concept:
    """Concept from text as `str` of it gives.

    Raises:
        ValueError: neither a concept nor such a text.

    >>> parse_concept("SCT:10200004")
    Concept(scheme='SCT', value='10200004')
    """
    if isinstance(text, Concept):
        return text
    scheme, colon, value = str(text).partition(":")
    if not (colon and scheme and value) or len(str(text)) > 256:
        raise ValueError("a code is written as scheme and value, such as SCT:10200004")
    return Concept(scheme, value)


_Code = Annotated[Concept, BeforeValidator(parse_concept), PlainSerializer(str)]


class _Part(BaseModel):
    # TOML lets nan and inf through; as a limit, either would permit everything.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class JoinLimits(_Part):
    """Which share of misfits is a warning; more is a refusal. By default any misfit is a refusal.

    Args:
        rows_without_image: of all rows; rows of quarantined images do not count.
        images_without_row: of all images.
        ambiguous_rows: of all rows, those that contradict the level of their key or one another.
    """

    rows_without_image: float = Field(default=0.0, ge=0, le=1)
    images_without_row: float = Field(default=0.0, ge=0, le=1)
    ambiguous_rows: float = Field(default=0.0, ge=0, le=1)


class ReportPart(_Part):
    """Which value of a measurement report is the label.

    Args:
        concept: that was measured or evaluated.
        level: at which the label holds.
        where: concept -> code that the value or its group must have, such as the derivation (mean) or
            the finding (tumour).
        unit: of a number; None accepts any one unit.
        classes: code -> class name of the plan; other codes fit no class.
        only_complete: refuse reports whose CompletionFlag is not COMPLETE; many programs write PARTIAL.
        only_verified: refuse reports that nobody has signed.
    """

    concept: _Code
    level: Literal["SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"] = "StudyInstanceUID"
    where: dict[_Code, _Code] = {}
    unit: _Code | None = None
    classes: dict[_Code, str] = {}
    only_complete: bool = False
    only_verified: bool = False


class MaskPart(_Part):
    """Which segment or structure, where it is marked, makes a case positive: class 1, else class 0.

    Args:
        segment: its property type in a segmentation, or its number there.
        structure: ROIName in a structure set.
        min_pixels: so many marked pixels make a case positive.
        threshold: from which fraction on a pixel of a fractional segmentation is marked.
        absent_is_empty: an object without the segment says that it was looked for and not found; without
            this such an object is refused, for it may as well never have been looked for.
    """

    segment: Annotated[int, Field(ge=1, le=65535)] | _Code | None = None
    structure: str = Field(default="", max_length=64)
    min_pixels: int = Field(default=1, ge=1)
    threshold: float = Field(default=0.5, gt=0, le=1)
    absent_is_empty: bool = False


LabelSource = Literal["csv", "reports", "segmentations", "structures"]


class LabelConfig(_Part):
    """Where labels come from, and what may be left over: the table `[labels]` of `cohort.toml`.

    Args:
        source: the label file, or objects among the images: measurement reports (DICOM SR TID 1500),
            segmentations (SEG), or structure sets (RTSTRUCT).
        key: of the label file; None takes the most specific one that it has.
        cut_points: labels are numbers, and a number's class is how many of these it reaches.
        limits: for what does not fit.
        report: needed for `reports`.
        mask: needed for `segmentations` and `structures`.

    >>> LabelConfig.model_validate({"cut_points": [10.0, 30.0]}).cut_points
    (10.0, 30.0)
    """

    source: LabelSource = "csv"
    key: LabelKey | None = None
    cut_points: tuple[float, ...] = Field(default=(), max_length=63)
    limits: JoinLimits = JoinLimits()
    report: ReportPart | None = None
    mask: MaskPart | None = None

    @model_validator(mode="after")
    def _whole(self) -> LabelConfig:
        from_masks = self.source in ("segmentations", "structures")
        if (self.report is not None) != (self.source == "reports"):
            raise ValueError('the table labels.report goes with source = "reports", and only with it')
        if (self.mask is not None) != from_masks:
            raise ValueError(
                "the table labels.mask goes with segmentations and structures, and only with them"
            )
        if self.mask is not None:
            named = (self.mask.segment is not None, bool(self.mask.structure))
            if named != (self.source == "segmentations", self.source == "structures"):
                raise ValueError("labels.mask needs `segment` for segmentations, `structure` for structures")
        if self.key is not None and self.source != "csv":
            raise ValueError("labels.key is the key of the label file; reports have labels.report.level")
        if any(low >= high for low, high in pairwise(self.cut_points)):
            raise ValueError("labels.cut_points must ascend")
        if self.cut_points and from_masks:
            raise ValueError("labels.cut_points are for numbers; a mask has min_pixels")
        return self


@dataclass(frozen=True, slots=True)
class LabelRow:
    """One row of the label file, or one finding of a report.

    Args:
        number: as a spreadsheet shows it, the header being row 1; or of the report, from 1.
        key: value of the key in the form of `join_key`.
        label: text of the label cell.
        split: the file's own side for this image, if it has that column.
    """

    number: int
    key: str = field(repr=False)
    label: str = field(repr=False)
    split: SplitName | None


@dataclass(frozen=True)
class LabelFile:
    """Label rows whose form is sound; whether they fit the images is decided by `join_labels`."""

    key_column: LabelKey
    rows: tuple[LabelRow, ...] = field(repr=False)


def join_key(identifiers: Mapping[str, str], key: LabelKey) -> str:
    """Key of an image or a row in the one form that is compared; "" when an identifier is missing.

    Args:
        identifiers: DICOM keyword -> value; StudyDate as YYYYMMDD or YYYY-MM-DD.
        key: which key.

    >>> join_key({"PatientID": "P1", "StudyDate": "2019-02-03"}, "PatientID+StudyDate")
    'P1\\\\20190203'
    """
    if key != "PatientID+StudyDate":
        return identifiers.get(key) or ""
    patient, day = identifiers.get("PatientID"), compact_date(identifiers.get("StudyDate") or "")
    return f"{patient}\\{day}" if patient and day else ""  # no DICOM value holds a backslash


def compact_date(text: str) -> str | None:
    """Calendar date as YYYYMMDD from that or from YYYY-MM-DD; None for anything else.

    Day and month change places between countries, so no other form is guessed at.

    >>> [compact_date(text) for text in ("2019-02-03", "20190203", "03/02/2019", "2019-02-30")]
    ['20190203', '20190203', None, None]
    """
    match = _DATE.fullmatch(text)
    if match is None:
        return None
    try:
        date(int(match[1]), int(match[3]), int(match[4]))
    except ValueError:
        return None
    return f"{match[1]}{match[3]}{match[4]}"


def label_index(text: str, names: Sequence[str]) -> int | None:
    """Class number of a label cell: a class name, else a number from 0; None when it is neither.

    >>> [label_index(text, ("normal", "pneumonia")) for text in ("pneumonia", "0", "2", "yes")]
    [1, 0, None, None]
    """
    if text in names:
        return names.index(text)
    is_number = text.isascii() and text.isdigit() and len(text) <= 6
    return int(text) if is_number and int(text) < len(names) else None


def measured_value(text: str) -> float | None:
    """Number in a label cell, with a decimal point; None when it is none or is not finite.

    A decimal comma is not taken: "1,250" is a thousand in some countries and one in others.

    >>> [measured_value(text) for text in ("12.5", "-3e2", "1,250", "nan", "")]
    [12.5, -300.0, None, None, None]
    """
    value = float(text) if len(text) <= 64 and _NUMBER.fullmatch(text) else math.nan
    return value if math.isfinite(value) else None


def classify(labels: LabelFile, cut_points: Sequence[float]) -> LabelFile:
    """Replace numbers by their classes: how many of the cut points each reaches.

    Raises:
        CohortError: a label is no number.

    >>> rows = (LabelRow(2, "1.2", "29.9", None), LabelRow(3, "1.3", "30", None))
    >>> [row.label for row in classify(LabelFile("SOPInstanceUID", rows), (30.0,)).rows]
    ['0', '1']
    """
    values = [measured_value(row.label) for row in labels.rows]
    refuse_rows(
        [(row.number, "no number") for row, value in zip(labels.rows, values, strict=True) if value is None],
        remedy="Write numbers with a decimal point, or leave out `cut_points` in cohort.toml.",
    )
    classes = [bisect_right(cut_points, value) for value in values if value is not None]
    rows = (replace(row, label=str(each)) for row, each in zip(labels.rows, classes, strict=True))
    return LabelFile(labels.key_column, tuple(rows))


def refuse_rows(faults: Sequence[tuple[int, str]], *, remedy: str) -> None:
    """Raise one CohortError that names the first faulty rows and counts the rest; nothing if none.

    Args:
        faults: (row number, what is wrong with it); no cell contents.
        remedy: what to do about them.
    """
    if faults:
        raise CohortError(f"the label file does not fit: {list_rows(faults)}", remedy=remedy)


def list_rows(faults: Sequence[tuple[int, str]]) -> str:
    """One line that names the first faulty rows and counts the rest.

    >>> list_rows([(7, "empty label"), (3, "2 cells, 3 expected")])
    'row 3: 2 cells, 3 expected; row 7: empty label'
    """
    shown = "; ".join(f"row {number}: {what}" for number, what in sorted(faults)[:_MAX_FAULTS_SHOWN])
    rest = len(faults) - _MAX_FAULTS_SHOWN
    return shown + (f"; and {rest} more rows" if rest > 0 else "")


def columns_of(key: LabelKey) -> tuple[str, ...]:
    """DICOM keywords that make up a key."""
    return tuple(key.split("+"))
