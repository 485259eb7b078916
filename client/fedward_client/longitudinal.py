"""Order the studies of each patient in time (hop 3); what comes out are days between them, no dates.

A date of a study may single out a patient, and training needs differences only: the number of days since
the patient's first study, and which study came before which. Where the header cannot tell the order of
two studies of one day, they are marked as tied and share a rank; a study whose date is missing, or which
contradicts itself, is left out by name of the reason. Nothing here guesses, and no clock is read.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Literal, get_args

DateKeyword = Literal["StudyDate", "AcquisitionDate", "SeriesDate"]
DATE_KEYWORDS: tuple[DateKeyword, ...] = get_args(DateKeyword)
"""The first that a study has counts; devices may have clocks of their own, so the study's comes first."""

WhyUnordered = Literal["no date", "contradictory dates", "study of several patients"]

_TIME = re.compile(r"(\d\d)(?::?(\d\d)(?::?(\d\d)(?:\.(\d{1,6}))?)?)?", re.ASCII)
_DAY_US = 86_400_000_000
# How much a time leaves open: an hour, a minute, a second; a fraction says all that is to be said.
_PRECISION_US = (3_600_000_000, 60_000_000, 1_000_000, 1)
_MAX_NIGHT_DAYS = 1  # a study begun before midnight ends on the next day


@dataclass(frozen=True)
class DatedImage:
    """What the order needs to know of an image.

    Args:
        content: SHA-256 of its file, hex.
        patient: PatientID.
        study: StudyInstanceUID.
        study_date: None when absent or malformed, as the other dates.
        study_time: as in the header, "" when absent.
    """

    content: str
    patient: str = field(repr=False)
    study: str = field(repr=False)
    study_date: date | None = field(default=None, repr=False)
    study_time: str = field(default="", repr=False)
    acquisition_date: date | None = field(default=None, repr=False)
    series_date: date | None = field(default=None, repr=False)


@dataclass(frozen=True)
class OrderedStudy:
    """One study in its patient's history.

    Args:
        study: StudyInstanceUID.
        contents: its images, sorted.
        rank: 0 for the first; studies that cannot be told apart in time share one.
        days: whole days since the patient's first study.
        is_tied: another study has the same rank.
        dated_by: which date it was ordered by.
    """

    study: str = field(repr=False)
    contents: tuple[str, ...]
    rank: int
    days: int
    is_tied: bool
    dated_by: DateKeyword


@dataclass(frozen=True)
class UnorderedStudy:
    """A study that has no place in the history, and why."""

    study: str = field(repr=False)
    contents: tuple[str, ...]
    why: WhyUnordered


@dataclass(frozen=True)
class PatientHistory:
    """The studies of one patient.

    Args:
        patient: PatientID.
        studies: by rank; tied ones by the content of their images, so that the order stays.
        unordered: the others.
    """

    patient: str = field(repr=False)
    studies: tuple[OrderedStudy, ...]
    unordered: tuple[UnorderedStudy, ...]


@dataclass(frozen=True)
class _When:
    """Day of a study and the part of it, in microseconds, within which it began: [earliest, latest)."""

    day: date
    earliest: int
    latest: int
    dated_by: DateKeyword


def order_studies(images: Iterable[DatedImage]) -> tuple[PatientHistory, ...]:
    """Order the studies of every patient.

    Args:
        images: of any number of patients, in any order.

    Returns:
        One history a patient, sorted by PatientID.
    """
    studies: dict[str, dict[str, list[DatedImage]]] = defaultdict(lambda: defaultdict(list))
    patients_of: dict[str, set[str]] = defaultdict(set)
    for image in images:
        studies[image.patient][image.study].append(image)
        patients_of[image.study].add(image.patient)
    shared = {study for study, patients in patients_of.items() if len(patients) > 1}
    return tuple(_history(patient, studies[patient], shared) for patient in sorted(studies))


def time_of_day(text: str) -> tuple[int, int]:
    """Part of the day that a TM value leaves open, in microseconds: [earliest, latest); all day if none.

    >>> [limit // 60_000_000 for limit in time_of_day("1730")]
    [1050, 1051]
    >>> time_of_day("noon") == time_of_day("") == (0, 86_400_000_000)
    True

    Source: DICOM PS3.5 6.2, TM; colons as before 1993 are accepted.
    """
    match = _TIME.fullmatch(text.strip(" \0"))
    if match is None:
        return 0, _DAY_US
    hour, minute, second = (int(part or 0) for part in match.group(1, 2, 3))
    if hour > 23 or minute > 59 or second > 60:
        return 0, _DAY_US
    start = ((hour * 60 + minute) * 60 + second) * 1_000_000 + int((match[4] or "0").ljust(6, "0"))
    num_parts = sum(part is not None for part in match.groups())
    return start, start + _PRECISION_US[num_parts - 1]


def _history(patient: str, studies: dict[str, list[DatedImage]], shared: set[str]) -> PatientHistory:
    dated: list[tuple[_When, tuple[str, ...], str]] = []
    unordered: list[UnorderedStudy] = []
    for study, images in studies.items():
        contents = tuple(sorted({image.content for image in images}))
        when = "study of several patients" if study in shared else _when(images)
        if isinstance(when, _When):
            dated.append((when, contents, study))
        else:
            unordered.append(UnorderedStudy(study, contents, when))
    dated.sort(key=lambda each: (each[0].day, each[0].earliest, each[0].latest, each[1]))
    ranks = _ranks([when for when, _, _ in dated])
    num_of_rank = Counter(ranks)
    ordered = tuple(
        OrderedStudy(
            study=study,
            contents=contents,
            rank=rank,
            days=(when.day - dated[0][0].day).days,
            is_tied=num_of_rank[rank] > 1,
            dated_by=when.dated_by,
        )
        for (when, contents, study), rank in zip(dated, ranks, strict=True)
    )
    return PatientHistory(patient, ordered, tuple(sorted(unordered, key=lambda each: each.contents)))


def _when(images: Sequence[DatedImage]) -> _When | WhyUnordered:
    days_of: dict[DateKeyword, set[date | None]] = {
        "StudyDate": {image.study_date for image in images},
        "AcquisitionDate": {image.acquisition_date for image in images},
        "SeriesDate": {image.series_date for image in images},
    }
    for keyword in DATE_KEYWORDS:
        days = sorted(day for day in days_of[keyword] if day is not None)
        if not days:
            continue
        # One study has one StudyDate; its images may be taken around midnight.
        if (days[-1] - days[0]).days > (0 if keyword == "StudyDate" else _MAX_NIGHT_DAYS):
            return "contradictory dates"
        times = [time_of_day(image.study_time) for image in images if image.study_time.strip(" \0")]
        times = times or [(0, _DAY_US)]
        return _When(days[0], min(start for start, _ in times), max(end for _, end in times), keyword)
    return "no date"


def _ranks(sorted_times: Sequence[_When]) -> list[int]:
    """Rank of each study; those whose times overlap cannot be told apart and share one."""
    ranks: list[int] = []
    end: tuple[date, int] | None = None
    for when in sorted_times:
        is_later = end is None or (when.day, when.earliest) >= end
        ranks.append((ranks[-1] + 1 if ranks else 0) if is_later else ranks[-1])
        latest = (when.day, when.latest)
        end = latest if is_later or end is None else max(end, latest)
    return ranks
