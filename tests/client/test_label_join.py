"""Joining rows and images: every key against a plain loop; nothing is guessed, no identifier is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward_client.label_join import LabelJoin, check_join, join_labels
from fedward_client.labels import JoinLimits, LabelFile, LabelKey, LabelRow
from fedward_common.errors import CohortError

KEYS: tuple[LabelKey, ...] = get_args(LabelKey)
COLUMNS = (
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "AccessionNumber",
    "PatientID",
    "StudyDate",
)


@dataclass(frozen=True)
class Image:
    content: str
    keys: Mapping[str, str] = field(default_factory=dict)


def an_image(
    content: str,
    instance: str = "",
    series: str = "S1",
    study: str = "T1",
    accession: str = "A1",
    patient: str = "P1",
    day: str = "20200101",
) -> Image:
    return Image(
        content,
        dict(zip(COLUMNS, (instance or content, series, study, accession, patient, day), strict=True)),
    )


def rows(key: LabelKey, *values: tuple[str, str]) -> LabelFile:
    return LabelFile(
        key, tuple(LabelRow(number, *value, None) for number, value in enumerate(values, start=2))
    )


IMAGES = (
    an_image("a", series="S1", study="T1", accession="A1", patient="P1", day="20200101"),
    an_image("b", series="S1", study="T1", accession="A1", patient="P1", day="20200101"),
    an_image("c", series="S2", study="T2", accession="A2", patient="P1", day="20200301"),
    an_image("d", series="S3", study="T3", accession="A3", patient="P2", day="20200101"),
)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("SOPInstanceUID", {"a": "a", "b": "b", "c": "c", "d": "d"}),
        ("SeriesInstanceUID", {"a": "S1", "b": "S1", "c": "S2", "d": "S3"}),
        ("StudyInstanceUID", {"a": "T1", "b": "T1", "c": "T2", "d": "T3"}),
        ("AccessionNumber", {"a": "A1", "b": "A1", "c": "A2", "d": "A3"}),
        (
            "PatientID+StudyDate",
            {"a": "P1\\20200101", "b": "P1\\20200101", "c": "P1\\20200301", "d": "P2\\20200101"},
        ),
        ("PatientID", {"a": "P1", "b": "P1", "c": "P1", "d": "P2"}),
    ],
)
def test_every_key_finds_its_images(key: LabelKey, values: dict[str, str]) -> None:
    labels = rows(key, *((value, f"label of {value}") for value in dict.fromkeys(values.values())))

    join = join_labels(labels, IMAGES)

    assert {content: row.key for content, row in join.rows.items()} == values
    assert check_join(join) == ()
    assert join.num_matched_rows == join.num_rows == len(set(values.values()))


@pytest.mark.parametrize(
    ("key", "images", "found"),
    [
        ("AccessionNumber", [an_image("a", patient="P1"), an_image("b", patient="P2")], "2 patients"),
        ("AccessionNumber", [an_image("a", study="T1"), an_image("b", study="T2")], "2 studies"),
        ("PatientID+StudyDate", [an_image("a", study="T1"), an_image("b", study="T2")], "2 studies"),
        ("StudyInstanceUID", [an_image("a", patient="P1"), an_image("b", patient="P2")], "2 patients"),
        ("SeriesInstanceUID", [an_image("a", study="T1"), an_image("b", study="T2")], "2 studies"),
        ("SOPInstanceUID", [an_image("a", "1"), an_image("b", "1", series="S2")], "2 series"),
    ],
)
def test_key_that_finds_too_much_labels_nothing(key: LabelKey, images: list[Image], found: str) -> None:
    value = {"PatientID+StudyDate": "P1\\20200101"}.get(key, images[0].keys.get(key, ""))

    join = join_labels(rows(key, (value, "1")), images)

    assert join.rows == {}
    assert [(each.row.number, each.found) for each in join.ambiguous] == [(2, f"images of {found}")]
    assert set(join.undecided) == {"a", "b"}
    with pytest.raises(CohortError, match=f"row 2: .*images of {found}") as caught:
        check_join(join)
    assert "more specific key" in caught.value.remedy


def test_patient_key_may_find_many_studies() -> None:
    join = join_labels(rows("PatientID", ("P1", "1"), ("P2", "0")), IMAGES)

    assert set(join.rows) == {"a", "b", "c", "d"}


def test_reports_that_contradict_one_another_label_nothing_and_those_that_agree_do() -> None:
    labels = rows("SOPInstanceUID", ("a", "1"), ("a", "0"), ("b", "1"), ("b", "1"))

    join = join_labels(labels, IMAGES[:2])

    assert {content: row.label for content, row in join.rows.items()} == {"b": "1"}
    assert [each.row.number for each in join.ambiguous] == [2, 3]
    assert join.undecided == ("a",)
    assert join.without_row == ()


def test_rows_and_images_left_over_are_sorted_by_why() -> None:
    labels = rows("SOPInstanceUID", ("a", "1"), ("gone", "1"), ("broken", "0"), ("other", "0"))

    join = join_labels(labels, IMAGES[:2], elsewhere=[an_image("other")], quarantined={"broken"})

    assert [row.number for row in join.unmatched] == [3]
    assert [row.number for row in join.quarantined] == [4]
    assert [row.number for row in join.elsewhere] == [5]
    assert join.without_row == ("b",)
    assert (join.num_rows, join.num_images, join.num_matched_rows) == (4, 2, 1)


def misfit(num_rows: int, num_unmatched: int, num_unlabelled: int, num_ambiguous: int) -> LabelJoin:
    """Join of so many rows; those that fit have one image each."""
    fitting = num_rows - num_unmatched - num_ambiguous
    images = [an_image(f"i{number}") for number in range(fitting + num_unlabelled)]
    values = [(f"i{number}", "0") for number in range(fitting)]
    values += [(f"gone{number}", "0") for number in range(num_unmatched)]
    for number in range(num_ambiguous):
        values.append((f"x{number}", "0"))
        images += [an_image(f"x{number}a", f"x{number}"), an_image(f"x{number}b", f"x{number}", patient="P9")]
    return join_labels(rows("SOPInstanceUID", *values), images)


@pytest.mark.parametrize(
    ("join", "limits", "fits"),
    [
        (misfit(100, 2, 0, 0), JoinLimits(rows_without_image=0.02), True),
        (misfit(100, 3, 0, 0), JoinLimits(rows_without_image=0.02), False),
        (misfit(100, 1, 0, 0), JoinLimits(), False),
        (misfit(90, 0, 10, 0), JoinLimits(images_without_row=0.1), True),
        (misfit(89, 0, 11, 0), JoinLimits(images_without_row=0.1), False),
        (misfit(100, 0, 0, 5), JoinLimits(ambiguous_rows=0.05), True),
        (misfit(100, 0, 0, 6), JoinLimits(ambiguous_rows=0.05), False),
    ],
)
def test_limits_divide_warnings_from_refusals(join: LabelJoin, limits: JoinLimits, fits: bool) -> None:
    if fits:
        (warning,) = check_join(join, limits)
        assert "not used" in warning
    else:
        with pytest.raises(CohortError) as caught:
            check_join(join, limits)
        assert caught.value.remedy


def test_as_many_rows_as_there_are_unidentified_files_may_miss_their_image() -> None:
    join = misfit(10, 2, 0, 0)

    assert "2 rows are not used: row 10:" in check_join(join, num_unidentified=2)[0]
    with pytest.raises(CohortError, match="row 10: SOPInstanceUID matches no image; row 11:"):
        check_join(join, num_unidentified=1)


def test_lost_zeros_are_named_as_the_likely_cause() -> None:
    images = [an_image("a", patient="00123"), an_image("b", patient="00045", study="T2")]

    join = join_labels(rows("PatientID", ("123", "0"), ("45", "1")), images)

    assert join.num_zeros_lost == 2
    with pytest.raises(CohortError) as caught:
        check_join(join, JoinLimits(images_without_row=1))
    assert "leading zeros" in caught.value.remedy
    assert "format the key column as text" in caught.value.remedy


def test_neither_repr_nor_messages_show_identifiers() -> None:
    images = [an_image("a", "CNRYUID", patient="CNRYP"), an_image("b", "CNRYUID", patient="CNRYQ")]
    join = join_labels(rows("SOPInstanceUID", ("CNRYUID", "CNRYL"), ("CNRYGONE", "0")), images)

    shown = repr(join) + "".join(check_join(join, JoinLimits(rows_without_image=1, ambiguous_rows=1)))

    assert "CNRY" not in shown


names = st.text("ab", min_size=0, max_size=2)


@settings(deadline=None)
@given(
    st.lists(st.tuples(*[names] * 5), max_size=8),
    st.lists(names.filter(bool), unique=True, max_size=5),
    st.sampled_from(KEYS),
)
def test_join_equals_a_plain_loop(found: list[tuple[str, ...]], values: list[str], key: LabelKey) -> None:
    images = [an_image(str(number), *facts) for number, facts in enumerate(found)]
    wanted = [f"{value}\\20200101" if key == "PatientID+StudyDate" else value for value in values]

    join = join_labels(rows(key, *((value, "1") for value in wanted)), images)

    ambiguous = {each.row.key for each in join.ambiguous}
    for image in images:
        own = image.keys["PatientID" if key == "PatientID+StudyDate" else key]
        value = f"{own}\\20200101" if own and key == "PatientID+StudyDate" else own
        places = [
            image.content in join.rows,
            image.content in join.without_row,
            image.content in join.undecided,
        ]
        assert sum(places) == 1
        assert places[1] == (value not in wanted)
        assert places[2] == (value in ambiguous)
    assert len(join.unmatched) + len(ambiguous) + join.num_matched_rows == join.num_rows
