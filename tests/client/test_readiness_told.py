"""No number about few patients is the difference of two answers: surveys, and a survey and training.

Where it can be, this is shown by listing every cohort that gives the same answers, in the case that is worst
for the site: each patient has one case, and the reader knows that, the rules and everything else.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread

from fedward_client.cohort import Case, open_cohort
from fedward_client.index import index_folder
from fedward_client.index_store import CaseIndex
from fedward_client.labels import SPLITS, SplitName
from fedward_client.pseudonyms import load_pseudonym_key, patient_code_of
from fedward_client.readiness import FINDINGS_FILE, SurveyedCase, released, survey, weighted
from fedward_client.readiness_told import (
    TOLD,
    TooCloseError,
    cases_to_train,
    counted,
    differ_by_few,
    forget_told,
    held_back_tables,
    remember_survey,
)
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError, RefusalCode
from fedward_common.plan import ReadinessPlan
from fedward_common.plan_parts import DataPart
from tests.builders import a_site, a_uid, write_labels
from tests.readiness_builders import a_readiness_plan, surveyed

Origins = dict[object, list[tuple[int, ...]]]
"""Cohorts, as patients by cell, by what is told of them."""

SIDES = SPLITS
TWO: tuple[SplitName, ...] = ("train", "test")


def a_bare_plan(floor: int, **survey: Any) -> ReadinessPlan:
    """A plan with as few tables as can be."""
    part = {"age_edges": (), "scanners": (), "spacing_edges_mm": (), "intensity": {"bins": 2}} | survey
    return a_readiness_plan(survey=part, privacy={"min_cases": floor})


@cache
def one_case(patient: int, label: int, side: str, age: int | None = 50) -> SurveyedCase:
    facts: dict[str, Any] = {"label": label, "split": side, "age_years": age, "sex": "F", "scanner": "GE"}
    found = surveyed(0, patient, a_bare_plan(3), **facts, spacing_mm=None)
    return replace(found, intensity=weighted(np.array([0, 1, 1, 0])))


def a_cohort(counts: Sequence[int], kinds: Sequence[tuple[int, str]]) -> list[SurveyedCase]:
    """Patients with one case each, so many of each label and side."""
    return [
        one_case(100 * place + number, *kinds[place])
        for place, count in enumerate(counts)
        for number in range(count)
    ]


def told_by_survey(plan: ReadinessPlan, cases: Sequence[SurveyedCase]) -> tuple[int, ...]:
    state = released(plan, cases, num_refused=0, floor=plan.privacy.min_cases)
    return tuple(np.concatenate([state[name] for name in sorted(state)]).tolist())


def told_by_training(cases: Sequence[Case], floor: int) -> tuple[object, ...]:
    """What the door lets out: cases of each side, and labels of the measured sides unless one is rare."""
    found = counted(cases, floor)
    labels: Counter[tuple[str, int]] = Counter((case.split, case.label) for case in found)
    sides = Counter(case.split for case in found)
    if not sides["train"]:
        return ("refused",)
    measured = [[labels[side, label] for label in (0, 1)] for side in SIDES[1:]]
    rows = [None if any(0 < count < floor for count in row) else tuple(row) for row in measured]
    return (*(sides[side] for side in SIDES), *rows)


def cohorts_up_to(most: int, num_cells: int) -> Iterator[tuple[int, ...]]:
    if num_cells == 0:
        yield ()
        return
    for first in range(most + 1):
        for rest in cohorts_up_to(most - first, num_cells - 1):
            yield (first, *rest)


def leaks(origins: Origins, floor: int, most: int) -> list[tuple[int, ...]]:
    """Sets of cells whose sum is about few patients and the same in every cohort of an origin.

    Cohorts are listed up to `most` patients; those that a reader could take for larger ones are not judged.
    """
    found, judged = [], 0
    for cohorts in origins.values():
        table = np.array(cohorts)
        if table.sum(axis=1).max() > most - 2 * floor:
            continue
        judged += 1
        for size in range(1, table.shape[1] + 1):
            for cells in combinations(range(table.shape[1]), size):
                sums = table[:, cells].sum(axis=1)
                if sums.min() == sums.max() and 0 < sums[0] < floor:
                    found.append((*cells, *cohorts[0]))
    assert judged
    return found


@pytest.mark.parametrize(
    ("floor", "labels", "sides", "most"),
    [(3, (0, 1), ("train", "test"), 13), (3, (0,), SIDES, 15), (4, (0,), SIDES, 20)],
)
def test_a_survey_and_training_together_tell_of_no_few_patients(
    floor: int, labels: tuple[int, ...], sides: tuple[str, ...], most: int
) -> None:
    plan, kinds = a_bare_plan(floor), list(product(labels, sides))
    origins: Origins = defaultdict(list)
    for counts in cohorts_up_to(most, len(kinds)):
        cases = a_cohort(counts, kinds)
        trained = told_by_training([each.case for each in cases], floor)
        origins[told_by_survey(plan, cases), trained].append(counts)
    assert leaks(origins, floor, most) == []


def test_the_check_itself_sees_a_side_given_away_by_subtraction() -> None:
    """Were the total told with a side of two in it, the total less the other sides would be two."""
    origins: Origins = defaultdict(list)
    for counts in cohorts_up_to(14, 3):
        origins[sum(counts), *(count if count >= 3 else 0 for count in counts)].append(counts)
    assert leaks(origins, 3, 14) != []


@pytest.mark.parametrize(("floor", "most"), [(3, 13)])
def test_two_divisions_together_tell_of_no_few_patients(floor: int, most: int) -> None:
    """A survey with one division, then training with another: cells are pairs of sides."""
    plan, pairs = a_bare_plan(floor), list(product(TWO, repeat=2))
    origins: Origins = defaultdict(list)
    for counts in cohorts_up_to(most, 4):
        first, second = [], []
        for place, count in enumerate(counts):
            for number in range(count):
                each = one_case(100 * place + number, 0, pairs[place][0])
                first.append(each)
                second.append(replace(each.case, split=pairs[place][1]))
        then, now = counted([each.case for each in first], floor), counted(second, floor)
        refused = differ_by_few(now, then, floor)
        trained = "refused" if refused else told_by_training(second, floor)
        origins[told_by_survey(plan, first), trained].append(counts)
    # What one of the two tells by itself is not the matter here, but what their difference does.
    assert leaks(origins, floor, most) == []


@pytest.mark.parametrize(
    ("first", "second", "ages", "most"),
    [
        ((), (30,), (20, 40, None), 14),
        ((30,), (), (20, 40, None), 14),
        ((30,), (60,), (20, 40, 70), 13),
        ((30,), (30, 60), (20, 40, 70), 13),
        ((60,), (30,), (20, 40, 70, None), 10),
    ],
)
def test_two_surveys_with_other_cells_together_tell_of_no_few_patients(
    first: tuple[int, ...], second: tuple[int, ...], ages: tuple[int | None, ...], most: int, tmp_path: Path
) -> None:
    floor = 3
    plans = a_bare_plan(floor, age_edges=first), a_bare_plan(floor, age_edges=second)
    site = an_empty_site(tmp_path)
    remember_survey(plans[0], site, held_back_tables(plans[0], site), floor)
    held_back = held_back_tables(plans[1], site)
    origins: Origins = defaultdict(list)
    for counts in cohorts_up_to(most, len(ages)):
        cases = [
            one_case(100 * place + n, 0, "train", ages[place])
            for place, count in enumerate(counts)
            for n in range(count)
        ]
        again = released(plans[1], cases, num_refused=0, floor=floor, held_back=held_back)
        told = tuple(np.concatenate([again[name] for name in sorted(again)]).tolist())
        origins[told_by_survey(plans[0], cases), told].append(counts)
    assert leaks(origins, floor, most) == []


def an_empty_site(folder: Path) -> SiteData:
    (folder / "home").mkdir(parents=True)
    return SiteData(folder / "home", folder / "dicom", folder / "labels.csv")


def test_what_decides_that_a_table_is_held_back_is_the_first_survey_alone(tmp_path: Path) -> None:
    site = an_empty_site(tmp_path)
    first, other = a_readiness_plan(), a_readiness_plan(survey={"age_edges": (18, 41), "scanners": ("GE",)})
    assert held_back_tables(first, site) == set()
    remember_survey(first, site, set(), 5)
    assert held_back_tables(other, site) == {"age", "scanner"}
    remember_survey(other, site, {"age", "scanner"}, 5)
    assert held_back_tables(first, site) == set()  # asked again in its own cells, nothing new is told
    volumes = a_readiness_plan(data={"modalities": ("CT",)}, survey={"age_edges": (50,)})
    assert held_back_tables(volumes, site) == set()  # these are other images


@settings(max_examples=60, deadline=None)
@given(
    patients=st.lists(
        st.tuples(st.sampled_from(SIDES), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
        min_size=1,
        max_size=40,
    ),
    floor=st.integers(3, 6),
)
def test_a_survey_and_training_count_the_same_cases(
    patients: list[tuple[str, list[int]]], floor: int
) -> None:
    plan = a_bare_plan(floor)
    cases = [
        surveyed(number, patient, plan, label=label, split=side)
        for patient, (side, labels) in enumerate(patients)
        for number, label in enumerate(labels)
    ]
    state = released(plan, cases, num_refused=0, floor=floor)
    found = counted([each.case for each in cases], floor)
    if not state["num_cases"][0]:
        return
    sides = Counter(case.split for case in found)
    assert state["split"].tolist() == [sides[side] for side in SIDES]
    by_side = Counter((case.split, case.label) for case in found)
    unseen = {"train"} | {side for (side, _), count in by_side.items() if count < floor}
    for label, told in enumerate(state["label"].tolist()):
        left = {case.patient for case in found if case.split in unseen and case.label == label}
        assert not told or not left or len(left) >= floor
    assert counted(found, floor) == found


def test_training_after_a_survey_uses_what_was_counted(tmp_path: Path) -> None:
    sides = ["train"] * 20 + ["validation"] * 6 + ["test"] * 3
    site = a_site(tmp_path, num_patients=29, images_per_patient=1, split=sides.__getitem__)
    state = survey(a_bare_plan(5), site, min_cases=1)
    assert (state["num_cases"].tolist(), state["split"].tolist()) == ([26], [20, 6, 0])
    held = replace(site, min_patients=5)
    cases = cases_of(site)
    assert Counter(case.split for case in cases_to_train(DataPart(), held, cases)) == {
        "train": 20,
        "validation": 6,
    }
    assert len(cases_to_train(DataPart(), site, cases)) == 29  # without a floor, as in a simulation


def cases_of(site: SiteData, data: DataPart | None = None) -> tuple[Case, ...]:
    return open_cohort(site, data or DataPart()).cases


def test_a_survey_and_training_with_another_division_are_not_both_answered(tmp_path: Path) -> None:
    site = replace(a_site(tmp_path, num_patients=40, images_per_patient=1), min_patients=5)
    other = DataPart(test_fraction=0.05, validation_fraction=0.05)
    survey(a_bare_plan(5), site, min_cases=5)
    cases_to_train(DataPart(), site, cases_of(site))
    with pytest.raises(TooCloseError) as refused:
        cases_to_train(other, site, cases_of(site, other))
    assert refused.value.code is RefusalCode.COHORT_TOO_SMALL
    assert "[data]" in refused.value.remedy


def test_a_survey_after_training_with_another_division_is_not_answered(tmp_path: Path) -> None:
    site = replace(a_site(tmp_path, num_patients=40, images_per_patient=1), min_patients=5)
    other = DataPart(test_fraction=0.05, validation_fraction=0.05)
    survey(a_readiness_plan(), replace(site, home=site.home), min_cases=5)  # builds the index
    for path in (site.home / TOLD).iterdir():
        path.unlink()
    cases_to_train(other, site, cases_of(site, other))
    with pytest.raises(TooCloseError):
        survey(a_bare_plan(5), site, min_cases=5)


def test_surveys_with_other_floors_are_not_both_answered(tmp_path: Path) -> None:
    """With a test side of five, counted at five and left out at six, the two would differ by these five."""
    sides = ["train"] * 40 + ["validation"] * 20 + ["test"] * 5
    site = a_site(tmp_path, num_patients=65, images_per_patient=1, split=sides.__getitem__)
    assert survey(a_bare_plan(5), site, min_cases=5)["num_cases"].tolist() == [65]
    for plan, own in ((a_bare_plan(6), 5), (a_bare_plan(5), 6), (a_bare_plan(3), 3)):
        with pytest.raises(TooCloseError, match="fewer than 5") as refused:
            survey(plan, site, min_cases=own)
        assert "min_cases = 5" in refused.value.remedy
    assert survey(a_bare_plan(3), site, min_cases=5)["num_cases"].tolist() == [65]  # its floor is five too


def test_training_with_another_floor_than_a_survey_is_answered_where_it_counts_the_same(
    tmp_path: Path,
) -> None:
    sides = ["train"] * 40 + ["validation"] * 20 + ["test"] * 7
    site = a_site(tmp_path, num_patients=67, images_per_patient=1, split=sides.__getitem__)
    survey(a_bare_plan(5), site, min_cases=5)
    assert len(cases_to_train(DataPart(), replace(site, min_patients=7), cases_of(site))) == 67
    with pytest.raises(TooCloseError) as refused:
        cases_to_train(DataPart(), replace(site, min_patients=8), cases_of(site))
    assert "min_cases 5" in refused.value.remedy


def divided_site(folder: Path, num_patients: int = 60) -> tuple[SiteData, DataPart, DataPart]:
    """A site, and two divisions that put one patient on different sides."""
    site = replace(a_site(folder, num_patients=num_patients, images_per_patient=1), min_patients=5)
    index_folder(site)
    first = DataPart(test_fraction=0.3, validation_fraction=0.25)
    tests = {case.patient for case in cases_of(site, first) if case.split == "test"}
    for share in range(301, 400):
        other = first.model_copy(update={"test_fraction": share / 1000})
        moved = {case.patient for case in cases_of(site, other) if case.split == "test"} - tests
        if moved:
            assert len(moved) == 1
            return site, first, other
    raise AssertionError


def test_two_trainings_that_divide_a_patient_otherwise_are_not_both_answered(tmp_path: Path) -> None:
    """Metrics of the two would tell the patient's label."""
    site, first, other = divided_site(tmp_path, num_patients=120)
    cases_to_train(first, site, cases_of(site, first))
    with pytest.raises(TooCloseError) as refused:
        cases_to_train(other, site, cases_of(site, other))
    assert "test_fraction 0.3," in refused.value.remedy
    cases_to_train(first, site, cases_of(site, first))
    far = DataPart(split_seed=7, test_fraction=0.3, validation_fraction=0.25)
    cases_to_train(far, site, cases_of(site, far))  # enough change sides


def test_of_two_plans_that_come_to_differ_the_first_goes_on(tmp_path: Path) -> None:
    """Patients arrive one by one: were both refused then, the site could train no more."""
    site, first, other = divided_site(tmp_path)
    (site.home / "cohort.toml").write_text("[labels.limits]\nimages_without_row = 0.1\n")
    whole = site.labels.read_text()
    far = {case.case_id: case.split for case in cases_of(site, other)}
    (moved,) = (case for case in cases_of(site, first) if far[case.case_id] != case.split)
    with CaseIndex(site.home) as index:
        uid = next(each.sop_instance for each in index.images() if each.content == moved.content)
    site.labels.write_text("".join(row for row in whole.splitlines(keepends=True) if uid not in row))
    for data in (first, other):  # they are the same as long as that patient is not there
        cases_to_train(data, site, cases_of(site, data))
    site.labels.write_text(whole)
    assert survey(a_readiness_plan(data=first.model_dump()), site, min_cases=5)["num_cases"].any()
    assert len(cases_to_train(first, site, cases_of(site, first))) == 60
    with pytest.raises(TooCloseError):
        cases_to_train(other, site, cases_of(site, other))


def test_few_of_a_label_that_change_sides_are_few() -> None:
    """Twenty patients more are tested, but three of them have the label."""
    kinds = [(0, "train")] * 60 + [(1, "train")] * 40 + [(0, "test")] * 20 + [(1, "test")] * 20
    then = [one_case(number, *kind).case for number, kind in enumerate(kinds)]

    def moved(zeros: int, ones: int) -> list[Case]:
        chosen = {*range(zeros), *range(60, 60 + ones)}
        return [replace(case, split="test") if n in chosen else case for n, case in enumerate(then)]

    assert differ_by_few(moved(17, 3), then, 5)
    assert differ_by_few(then, moved(17, 3), 5)
    assert differ_by_few(moved(4, 4), then, 5)
    assert not differ_by_few(moved(15, 5), then, 5)
    assert not differ_by_few(then, then, 5)


def test_an_earlier_plan_whose_images_are_gone_stands_in_nobody_s_way(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=40, images_per_patient=1, split=lambda _: "train", Modality="CR")
    survey(a_readiness_plan(data={"modalities": ("CR",)}), site, min_cases=5)
    shutil.rmtree(site.dicom)
    newer = a_site(
        tmp_path / "n", num_patients=40, images_per_patient=1, split=lambda _: "train", Modality="DX"
    )
    shutil.move(newer.dicom, site.dicom)
    assert survey(a_readiness_plan(data={"modalities": ("CR", "DX")}), site, min_cases=5)["num_cases"].any()


def test_a_survey_holds_back_what_an_earlier_one_told_in_other_cells(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=40, images_per_patient=1, split=lambda _: "train", PatientAge="050Y")
    first = survey(a_readiness_plan(survey={"age_edges": (40,)}), site, min_cases=5)
    again = survey(a_readiness_plan(survey={"age_edges": (45,)}), site, min_cases=5)
    assert first["age"].tolist() == [0, 40, 0]
    assert again["age"].tolist() == [0, 0, 0]
    assert again["sex"].tolist() == first["sex"].tolist() != [0, 0, 0]


def test_patients_on_two_sides_are_named_to_the_operator(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=20, images_per_patient=2)
    rows = [
        [a_uid(f"{patient}-{image}"), 0, "test" if image and patient == 3 else "train"]
        for patient in range(20)
        for image in range(2)
    ]
    write_labels(site.labels, rows, ["SOPInstanceUID", "label", "split"])
    survey(a_bare_plan(5), site, min_cases=5)
    findings = json.loads((site.home / TOLD / FINDINGS_FILE).read_text())
    (torn,) = patients_of(site, (3,))
    cases = open_cohort(site, DataPart(), torn_patients=True).cases
    assert findings["on_two_sides"] == [sorted(case.case_id for case in cases if case.patient == torn)]


def test_a_record_that_cannot_be_read_stops_every_answer(tmp_path: Path) -> None:
    site = an_empty_site(tmp_path)
    remember_survey(a_bare_plan(5), site, set(), 5)
    (record,) = (site.home / TOLD).iterdir()
    assert record.stat().st_mode & 0o777 == 0o600
    record.write_text("{")
    with pytest.raises(CohortError, match="cannot be read"):
        held_back_tables(a_bare_plan(5), site)


def test_too_few_patients_for_training_are_said_as_such(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=4, images_per_patient=5, split=lambda _: "train")
    survey(a_bare_plan(5), site, min_cases=5)
    with pytest.raises(CohortError, match="fewer than 5 patients") as refused:
        cases_to_train(DataPart(), replace(site, min_patients=5), cases_of(site))
    assert getattr(refused.value, "code", None) is RefusalCode.COHORT_TOO_SMALL


def test_equal_pixels_under_other_uids_are_named_to_the_operator_alone(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=12, images_per_patient=1, split=lambda _: "train")
    first = dcmread(site.dicom / "0-0.dcm")
    for patient in (1, 2):
        copy = dcmread(site.dicom / f"{patient}-0.dcm")
        copy.PixelData = first.PixelData
        copy.WindowCenter, copy.WindowWidth = 100 + patient, 200  # what is shown differs
        copy.save_as(site.dicom / f"{patient}-0.dcm")
    state = survey(a_bare_plan(5), site, min_cases=5)
    assert state["repeated"].tolist() == [0, 0]  # of three patients: held back
    path = site.home / TOLD / FINDINGS_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    findings = json.loads(path.read_text())
    named = {case.case_id for case in cases_of(site) if case.patient in patients_of(site, (0, 1, 2))}
    assert [set(ids) for ids in findings["same_pixels"]] == [named]
    assert findings["on_two_sides"] == []


def patients_of(site: SiteData, numbers: Sequence[int]) -> set[str]:
    key = load_pseudonym_key(site.home)
    return {patient_code_of(key, f"P{number}") for number in numbers}


def test_a_simulation_begins_anew(tmp_path: Path) -> None:
    site = an_empty_site(tmp_path)
    remember_survey(a_readiness_plan(), site, set(), 5)
    forget_told(site.home)
    assert held_back_tables(a_readiness_plan(survey={"age_edges": (50,)}), site) == set()
    forget_told(tmp_path / "nowhere")
