"""What the index keeps: a file holds a content, a content is an image or a reason why not.

Identifiers and the header's own texts stay out of every `repr`, so that no log line can show them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from fedward_client.dicom.refusal import Reason
from fedward_client.sources.folder import Candidate

Rule = Literal["radiograph", "image"]
"""Which refusals count: those of radiographs of one grey frame each, or those of every usual image."""

_COUNTS = ("num_frames", "rows", "columns")
_NUMBERS = ("series_number", "instance_number", "acquisition_number", "images_in_acquisition")
INTEGERS = frozenset(("study_year", "age_years", *_NUMBERS, *_COUNTS))
REALS = frozenset(("row_mm", "column_mm"))


class ContentRecord(NamedTuple):
    """What was found in one content; the fields are the columns of the table `contents`, in order.

    Attributes:
        reason: why it is no usual image, a code from the closed list; None when it is one.
        kind: name from the DICOM dictionary, or "".
        radiograph_reason: why it is no radiograph of one grey frame; None when it is one.
        radiograph_kind: name from the DICOM dictionary, or "".
        study_date: YYYYMMDD.
        image_type: values joined by a backslash.
        row_mm: distance between rows, mm, of PixelSpacing or else of ImagerPixelSpacing.
        column_mm: distance between columns, likewise.
    """

    reason: str | None
    kind: str = ""
    radiograph_reason: str | None = None
    radiograph_kind: str = ""
    sop_class: str | None = None
    sop_instance: str | None = None
    series: str | None = None
    study: str | None = None
    patient: str | None = None
    accession: str | None = None
    study_date: str | None = None
    study_time: str | None = None
    modality: str | None = None
    study_year: int | None = None
    sex: str | None = None
    age_years: int | None = None
    body_part: str | None = None
    view_position: str | None = None
    laterality: str | None = None
    series_description: str | None = None
    image_type: str | None = None
    manufacturer: str | None = None
    model_name: str | None = None
    series_number: int | None = None
    instance_number: int | None = None
    acquisition_number: int | None = None
    images_in_acquisition: int | None = None
    num_frames: int | None = None
    rows: int | None = None
    columns: int | None = None
    row_mm: float | None = None
    column_mm: float | None = None

    @staticmethod
    def kinds(name: str) -> tuple[type, ...]:
        """Python's types of a column."""
        return (int,) if name in INTEGERS else (float, int) if name in REALS else (str,)

    def __repr__(self) -> str:
        return f"ContentRecord(reason={self.reason}, radiograph_reason={self.radiograph_reason})"


class Found(NamedTuple):
    """News about one content.

    Attributes:
        record: what the index asks for.
        signs: facts for the gate, as JSON; None when the header could not be read.
        slices: places of the slices, as JSON; None for what is no usual image, and for radiographs.
    """

    record: ContentRecord
    signs: str | None = None
    slices: str | None = None

    def __repr__(self) -> str:
        return f"Found({self.record!r})"


@dataclass(frozen=True)
class FileRead:
    """What reading one file gave.

    Args:
        sha256: of the whole content, hex.
        size: bytes.
        mtime_ns: time of last change of exactly what was read.
        found: news about the content.
    """

    sha256: str
    size: int
    mtime_ns: int
    found: Found


@dataclass(frozen=True)
class FileRecord:
    """One file, the digest of what it holds (None: unreadable), and news about that content."""

    file: Candidate
    content: str | None
    found: Found | None


@dataclass(frozen=True, slots=True)
class IndexedImage:
    """One usable image. Its identifiers are for joining labels and dividing patients, nowhere else.

    Attributes:
        content: SHA-256 of its file, hex.
        signs_id: its facts for the gate; see `CaseIndex.signs`.

    All others are those of `ContentRecord`.
    """

    content: str
    sop_class: str = field(repr=False)
    sop_instance: str = field(repr=False)
    series: str = field(repr=False)
    study: str = field(repr=False)
    patient: str = field(repr=False)
    accession: str = field(repr=False)
    study_date: str | None = field(repr=False)
    study_time: str = field(repr=False)
    modality: str
    study_year: int | None
    sex: str | None
    age_years: int | None
    body_part: str = field(repr=False)
    view_position: str = field(repr=False)
    laterality: str = field(repr=False)
    series_description: str = field(repr=False)
    image_type: str = field(repr=False)
    manufacturer: str = field(repr=False)
    model_name: str = field(repr=False)
    series_number: int | None
    instance_number: int | None
    num_frames: int
    rows: int
    columns: int
    row_mm: float | None
    column_mm: float | None
    signs_id: int | None

    @property
    def keys(self) -> Mapping[str, str]:
        """DICOM keyword -> identifier, for joining labels."""
        return {
            "SOPInstanceUID": self.sop_instance,
            "SeriesInstanceUID": self.series,
            "StudyInstanceUID": self.study,
            "PatientID": self.patient,
            "AccessionNumber": self.accession,
            "StudyDate": self.study_date or "",
        }


IMAGE_COLUMNS = tuple(name for name in IndexedImage.__slots__ if name != "content")


@dataclass(frozen=True)
class QuarantinedContent:
    """One content that is not used, why, and what to do.

    Args:
        content: SHA-256 of the file, hex.
        reason: code from the closed list.
        kind: name from the DICOM dictionary, or "".
        num_files: how many files hold it.
        sop_instance: its SOPInstanceUID, where that could be read.
        study: its StudyInstanceUID, likewise.
    """

    content: str
    reason: Reason
    kind: str
    num_files: int
    sop_instance: str = field(default="", repr=False)
    study: str = field(default="", repr=False)

    @property
    def remedy(self) -> str:
        """What the operator can do."""
        return self.reason.remedy
