"""`HOME/cohort.toml`: what a site declares, named faults, and criteria that headers have to meet."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward_client.cohort_file import COHORT_FILE, CohortFile, read_cohort_file
from fedward_client.index_records import IndexedImage
from fedward_common.errors import UsageError

WHOLE = """
unit = "volume"
modalities = ["ct"]
body_parts = ["Chest", "ABDOMEN"]
views = ["AP"]
date_from = 2019-01-01
date_to = 2020-12-31
age_from = 18
age_to = 90
accessions = ["A1"]
studies = ["1.2.3"]

[series_description]
include = ["*lung*", "thorax ?mm"]
exclude = ["*scout*"]

[labels]
key = "AccessionNumber"

[labels.limits]
images_without_row = 0.1

[gate]
faces = "quarantine"
"""


def an_image(**values: Any) -> IndexedImage:
    """A CT image as indexed."""
    given: dict[str, Any] = dict.fromkeys(IndexedImage.__slots__, "")
    numbers = ("series_number", "instance_number", "row_mm", "column_mm", "study_year", "sex")
    given |= dict.fromkeys(numbers)
    given |= {"num_frames": 1, "rows": 16, "columns": 16, "signs_id": 1}
    given |= {"study_date": "20190615", "age_years": 40, "body_part": "CHEST", "view_position": "AP"}
    given |= {"series_description": "Lung 1.0", "accession": "A1", "study": "1.2.3", "modality": "CT"}
    return IndexedImage(**(given | values))


def test_without_a_file_the_cohort_is_as_ever(tmp_path: Path) -> None:
    file = read_cohort_file(tmp_path)

    assert file == CohortFile()
    assert file.wanted_modalities(("CR", "DX")) == ("CR", "DX")
    assert file.rule(("CR", "DX")) == "radiograph"
    assert file.rule(("CR", "CT")) == "image"
    assert file.unmet(an_image(study_date=None, age_years=None, body_part="")) is None


def test_every_key_of_the_file_is_read(tmp_path: Path) -> None:
    (tmp_path / COHORT_FILE).write_text(WHOLE)

    file = read_cohort_file(tmp_path)

    assert file.wanted_modalities(("MR", "CT")) == ("CT",)
    assert file.rule(("CT",)) == "image"
    assert file.body_parts == ("CHEST", "ABDOMEN")
    assert file.labels.limits.images_without_row == 0.1
    assert file.gate.faces == "quarantine"
    assert file.unmet(an_image()) is None


def test_an_archive_is_asked_for_what_the_file_says(tmp_path: Path) -> None:
    (tmp_path / COHORT_FILE).write_text(WHOLE)

    selection = read_cohort_file(tmp_path).selection(("CR",))

    assert selection.modalities == ("CT",)
    assert selection.date_range == "20190101-20201231"
    assert selection.body_parts == ("CHEST", "ABDOMEN")
    assert (selection.accessions, selection.studies) == (("A1",), ("1.2.3",))
    assert CohortFile().selection(("CR", "DX")).modalities == ("CR", "DX")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("unit = 'slice'", "unit"),
        ("modalitys = ['CT']", "modalitys"),
        ("modalities = []", "modalities"),
        ("date_from = 2020-01-02\ndate_to = 2020-01-01", "date_from"),
        ("age_from = 50\nage_to = 49", "age_from"),
        ("age_from = -1", "age_from"),
        ("[series_description]\ninclude = ['[a-z]*']", "series_description.include"),
        ("[series_description]\ninclude = ['']", "series_description.include"),
        ("[gate]\nfaces = 'ignore'", "gate.faces"),
        ("[labels]\nsource = 'guess'", "labels.source"),
        ("unit = ", "not TOML"),
    ],
)
def test_a_fault_in_the_file_is_named_with_its_key(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / COHORT_FILE).write_text(text)

    with pytest.raises(UsageError, match=COHORT_FILE) as caught:
        read_cohort_file(tmp_path)

    assert named in caught.value.message


def test_a_file_that_cannot_be_read_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / COHORT_FILE).mkdir()

    with pytest.raises(UsageError, match="directory"):
        read_cohort_file(tmp_path)


@pytest.mark.parametrize(
    ("values", "criterion"),
    [
        ({"study": "1.2.4"}, "study"),
        ({"accession": "A2"}, "study"),
        ({"body_part": "HEAD"}, "body part"),
        ({"body_part": ""}, "body part"),
        ({"body_part": " chest "}, None),
        ({"view_position": "PA"}, "view"),
        ({"study_date": "20181231"}, "date"),
        ({"study_date": "20190101"}, None),
        ({"study_date": "20201231"}, None),
        ({"study_date": "20210101"}, "date"),
        ({"study_date": None}, "date"),
        ({"age_years": 17}, "age"),
        ({"age_years": 18}, None),
        ({"age_years": 91}, "age"),
        ({"age_years": None}, "age"),
        ({"series_description": "LUNG SCOUT"}, "description"),
        ({"series_description": "thorax 5mm"}, None),
        ({"series_description": "thorax 10mm"}, "description"),
        ({"series_description": ""}, "description"),
    ],
)
def test_a_criterion_that_a_header_does_not_meet_or_answer_is_named(
    tmp_path: Path, values: dict[str, Any], criterion: str | None
) -> None:
    (tmp_path / COHORT_FILE).write_text(WHOLE)

    assert read_cohort_file(tmp_path).unmet(an_image(**values)) == criterion


def test_one_open_end_of_dates_or_ages_is_enough() -> None:
    since, until = CohortFile(date_from=date(2020, 1, 1)), CohortFile(date_to=date(2020, 1, 1))
    old, young = CohortFile(age_from=60), CohortFile(age_to=17)
    image = an_image()

    assert (since.unmet(image), until.unmet(image)) == ("date", None)
    assert (old.unmet(image), young.unmet(image)) == ("age", "age")
    assert old.unmet(replace(image, age_years=60)) is None


@settings(max_examples=50, deadline=None)
@given(st.text("*?ab", min_size=1, max_size=64), st.text("ab", max_size=64))
def test_no_pattern_takes_long(pattern: str, text: str) -> None:
    file = CohortFile.model_validate({"series_description": {"include": [pattern]}})
    started = time.process_time()

    file.unmet(an_image(series_description=text))

    assert time.process_time() - started < 0.5


def test_the_worst_pattern_takes_no_time() -> None:
    file = CohortFile.model_validate({"series_description": {"include": ["*a" * 31 + "*b"]}})
    started = time.process_time()

    assert file.unmet(an_image(series_description="a" * 1024)) == "description"

    assert time.process_time() - started < 0.5
