"""Order of studies in time: a real patient history, every doubt marked, days and no dates."""

from __future__ import annotations

import csv
import hashlib
import random
import re
from collections import defaultdict
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward_client.cohort import open_cohort
from fedward_client.index import index_folder
from fedward_client.longitudinal import DatedImage, OrderedStudy, order_studies, time_of_day
from fedward_client.site_data import SiteData
from tests.builders import a_dicom, a_uid, write_labels

DAY = date(2020, 3, 1)


def image(
    content: str,
    study: str = "T1",
    patient: str = "P1",
    day: date | None = DAY,
    time: str = "",
    acquired: date | None = None,
    series: date | None = None,
) -> DatedImage:
    return DatedImage(content, patient, study, day, time, acquired, series)


def only_history(*images: DatedImage) -> tuple[OrderedStudy, ...]:
    (history,) = order_studies(images)
    return history.studies


@pytest.mark.data
def test_real_patients_are_ordered_as_their_hospital_numbered_the_days(shared_data: Path) -> None:
    """`offset` counts days from admission; it may be negative, and several images share a day."""
    table = shared_data / "hannover-cxr-longitudinal" / "metadata.csv"
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["offset"]]
    offsets: dict[str, set[int]] = defaultdict(set)
    images = []
    for row in rows:
        patient, offset = row["patientid"], int(row["offset"])
        offsets[patient].add(offset)
        admitted = DAY + timedelta(days=37 * int(patient) % 400)
        images.append(
            image(row["filename"], f"{patient}.{offset}", patient, admitted + timedelta(days=offset))
        )
    random.Random(1).shuffle(images)

    histories = order_studies(images)

    assert len(histories) == len(offsets) > 40
    assert sum(len(days) > 1 for days in offsets.values()) > 15
    for history in histories:
        days = sorted(offsets[history.patient])
        assert [study.days for study in history.studies] == [day - days[0] for day in days]
        assert [study.rank for study in history.studies] == list(range(len(days)))
        assert not any(study.is_tied for study in history.studies)
        for study in history.studies:
            names = {row["filename"] for row in rows if f"{row['patientid']}.{row['offset']}" == study.study}
            assert set(study.contents) == names


@pytest.mark.data
def test_days_of_real_patients_reach_the_cases_and_their_dates_do_not(
    tmp_path: Path, shared_data: Path
) -> None:
    """From files through index and cohort: days between the images of one patient are those of the table."""
    site = SiteData(tmp_path / "home", tmp_path / "dicom", tmp_path / "labels.csv")
    site.home.mkdir()
    site.dicom.mkdir()
    with (shared_data / "hannover-cxr-longitudinal" / "metadata.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["offset"]]
    labels = []
    offset_of: dict[str, tuple[str, int]] = {}
    for number, row in enumerate(rows):
        patient, offset = row["patientid"], int(row["offset"])
        data = a_dicom(
            np.random.default_rng(number).integers(0, 255, (16, 16), dtype=np.uint8),
            PatientID=patient,
            StudyInstanceUID=a_uid(f"{patient}.{offset}"),
            SOPInstanceUID=a_uid(row["filename"]),
            StudyDate=f"{DAY + timedelta(days=11 * int(patient) % 500 + offset):%Y%m%d}",
        )
        (site.dicom / f"{number}.dcm").write_bytes(data)
        offset_of[hashlib.sha256(data).hexdigest()] = (patient, offset)
        labels.append([a_uid(row["filename"]), row["view"]])
    write_labels(site.labels, labels)
    index_folder(site)

    cases = open_cohort(site).cases

    first: dict[str, int] = {}
    for patient, offset in offset_of.values():
        first[patient] = min(offset, first.get(patient, offset))
    assert {case.content: case.day for case in cases} == {
        content: offset - first[patient] for content, (patient, offset) in offset_of.items()
    }
    assert max(case.day or 0 for case in cases) > 10
    groups = defaultdict(set)
    for case in cases:
        groups[case.patient].add(offset_of[case.content][0])
    assert len(groups) == len(first)
    assert all(len(patients) == 1 for patients in groups.values())
    assert not re.search(r"20(19|20|21)-?[01]\d", repr(cases))


def test_time_orders_studies_of_one_day_and_an_interval_is_whole_days() -> None:
    first, second, third = only_history(
        image("c", "T3", day=DAY + timedelta(30), time="0001"),
        image("b", "T2", time="173000.5"),
        image("a", "T1", time="1200"),
    )

    assert [each.contents for each in (first, second, third)] == [("a",), ("b",), ("c",)]
    assert [each.days for each in (first, second, third)] == [0, 0, 30]
    assert [each.rank for each in (first, second, third)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("one", "other", "tied"),
    [
        ("1200", "1201", False),
        ("12", "1259", True),
        ("12", "1300", False),
        ("", "1200", True),
        ("120000", "120000.5", True),
        ("120000.1", "120000.2", False),
        ("12:30:00", "123001", False),
        ("noon", "1200", True),
    ],
)
def test_times_that_overlap_cannot_be_told_apart(one: str, other: str, tied: bool) -> None:
    studies = only_history(image("b", "T1", time=one), image("a", "T2", time=other))

    assert [each.is_tied for each in studies] == [tied, tied]
    assert [each.rank for each in studies] == ([0, 0] if tied else [0, 1])


def test_a_tie_may_chain_and_ends_where_the_next_is_clearly_later() -> None:
    studies = only_history(
        image("a", "T1", time="1200"),
        image("b", "T2", time="12"),
        image("c", "T3", time="125959"),
        image("d", "T4", time="13"),
    )

    assert [(each.rank, each.is_tied) for each in sorted(studies, key=lambda each: each.contents)] == [
        (0, True),
        (0, True),
        (0, True),
        (1, False),
    ]


def test_other_dates_stand_in_for_a_missing_study_date_and_say_so() -> None:
    studies = only_history(
        image("a", "T1", day=None, series=DAY),
        image("b", "T2", day=None, acquired=DAY + timedelta(2), series=DAY),
        image("c", "T3", day=DAY + timedelta(9), acquired=DAY),
    )

    assert [(each.days, each.dated_by) for each in studies] == [
        (0, "SeriesDate"),
        (2, "AcquisitionDate"),
        (9, "StudyDate"),
    ]


def test_a_study_around_midnight_is_one_study() -> None:
    night = only_history(
        image("a", day=None, acquired=DAY), image("b", day=None, acquired=DAY + timedelta(1))
    )

    assert [(each.contents, each.days) for each in night] == [(("a", "b"), 0)]


@pytest.mark.parametrize(
    ("images", "why"),
    [
        ([image("a", day=None)], "no date"),
        ([image("a"), image("b", day=DAY + timedelta(1))], "contradictory dates"),
        (
            [image("a", day=None, acquired=DAY), image("b", day=None, acquired=DAY + timedelta(2))],
            "contradictory dates",
        ),
    ],
)
def test_study_without_a_certain_day_is_left_out_with_its_reason(images: list[DatedImage], why: str) -> None:
    (history,) = order_studies([*images, image("z", "T9")])

    assert [each.study for each in history.studies] == ["T9"]
    assert [(each.study, each.why) for each in history.unordered] == [("T1", why)]


def test_study_of_two_patients_has_no_place_with_either() -> None:
    histories = order_studies([image("a", patient="P1"), image("b", patient="P2"), image("c", "T2", "P1")])

    assert [[each.why for each in history.unordered] for history in histories] == [
        ["study of several patients"],
        ["study of several patients"],
    ]
    assert [len(history.studies) for history in histories] == [1, 0]


def test_repr_shows_neither_patients_nor_dates() -> None:
    shown = repr(image("a", "CNRYSTUDY", "CNRYPATIENT")) + repr(
        order_studies([image("a", "CNRYSTUDY", "CNRYPATIENT"), image("b", "CNRYOTHER", "CNRYPATIENT", None)])
    )

    assert "CNRY" not in shown
    assert "2020" not in shown


@pytest.mark.parametrize("text", ["24", "1260", "120061", "1", "12000", "abcd", "12:3", "120000.1234567"])
def test_what_is_no_time_leaves_the_whole_day_open(text: str) -> None:
    assert time_of_day(text) == (0, 86_400_000_000)


facts = st.tuples(
    st.sampled_from("PQ"),
    st.integers(0, 5),
    st.none() | st.integers(0, 4),
    st.sampled_from(["", "09", "0930", "093015", "10", "235959.999999"]),
)


@settings(deadline=None)
@given(st.lists(facts, max_size=12), st.randoms())
def test_order_of_files_never_matters_and_every_image_has_one_place(
    found: list[tuple[str, int, int | None, str]], shuffler: random.Random
) -> None:
    images = [
        image(str(number), f"{patient}{study}", patient, None if day is None else DAY + timedelta(day), time)
        for number, (patient, study, day, time) in enumerate(found)
    ]
    shuffled = list(images)
    shuffler.shuffle(shuffled)

    histories = order_studies(images)

    assert order_studies(shuffled) == histories
    places = [content for history in histories for each in history.studies for content in each.contents]
    places += [content for history in histories for each in history.unordered for content in each.contents]
    assert sorted(places) == sorted(each.content for each in images)
    for history in histories:
        days = [each.days for each in history.studies]
        ranks = [each.rank for each in history.studies]
        assert days == sorted(days)
        assert ranks == sorted(ranks)
        assert not days or days[0] == 0
        for earlier, later in zip(history.studies, history.studies[1:], strict=False):
            assert earlier.days == later.days or earlier.rank < later.rank
