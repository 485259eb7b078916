"""Which cases a site's numbers are about, and what it has told of them before (hop 6).

One answer is made safe by `suppression`. This module is about several: the total of a survey less the cases
for training and validation that an update and a metric tell is a test side of two patients; the ages of two
surveys whose bands begin at 60 and at 61 differ by the patients who are sixty. Three rules close that:

- A survey and training count the same cases, those of `counted`. A side of the division with few patients
  is left out by both, so no difference of totals shows it.
- Each table is told in one set of cells. The first survey decides it; a later one with other cells gets the
  table held back, whatever the cases are, so that holding it back tells nothing either.
- Where a plan takes other cases than an answered one, by modality, by another division or by another floor,
  and few patients make the difference, in all or on one side, the site does not answer. All surveys have one
  floor: what is held back at five and told at six says which cells have four.

Of two plans that come to differ by few, the one answered first goes on being answered. Were both refused, a
new patient between two thresholds of a division would end all training here.

What is remembered is what was asked and told, never a count or a case. Cases that come or go between two
answers are not hidden by this: a hospital that gets one more patient has one more.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from fedward_client.cohort import Case, EmptyCohortError, open_cohort
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError, RefusalCode
from fedward_common.files import write_atomically
from fedward_common.plan import canonical_bytes
from fedward_common.plan_parts import DataPart, Part
from fedward_common.readiness_plan import ReadinessPlan, SurveyPart

TOLD = "surveys"
"""Folder in the site's home; what plans asked and were told, beside the counts of surveys."""

_PARTS_OF_TABLES = {
    "age": "age_edges",
    "scanner": "scanners",
    "spacing": "spacing_edges_mm",
    "slice": "slice_edges_mm",
    "intensity": "intensity",
}


class AnsweredPlan(Part):
    """What this site told of its cases.

    Attributes:
        data: which cases.
        floor: least number of patients behind a number.
        order: how many records there were before.
        cells: of a survey, the cells of each table that was told; None of training.
    """

    data: DataPart
    floor: int = Field(ge=1)
    order: int = Field(ge=0)
    cells: dict[str, str] | None = None


class TooCloseError(CohortError):
    """An answer could be subtracted from an earlier one, and few patients would be left."""

    code = RefusalCode.COHORT_TOO_SMALL


class TooFewPatientsError(CohortError):
    """Fewer patients than the floor, so that nothing may be told of them."""

    code = RefusalCode.COHORT_TOO_SMALL


def counted(cases: Sequence[Case], floor: int) -> list[Case]:
    """The cases that a site's numbers are about, in a survey and in training alike.

    Left out are sides of the division with fewer patients than the floor, whose results would be held back
    in any case, and what `thinned` leaves out.

    Args:
        cases: every usable case of the site, in an order that does not depend on what they show.
        floor: least number of patients behind a number; with 1 nothing is left out.
    """
    kept = list(cases)
    while True:
        patients_of: dict[str, set[str]] = defaultdict(set)
        for case in kept:
            patients_of[case.split].add(case.patient)
        fewer = thinned([case for case in kept if len(patients_of[case.split]) >= floor], floor)
        if len(fewer) == len(kept):
            return kept
        kept = fewer


def thinned(cases: Sequence[Case], floor: int) -> list[Case]:
    """Leave out further cases of patients who have several, or of several labels, wherever few have.

    Cases less patients is a number too, in all and for each label: a difference of one would say that one
    patient was examined twice, and with which label. And where all are known to have two cases, a label's
    cases less twice its patients would be those of few who have two labels.

    Args:
        cases: of the site, in an order that does not depend on what they show.
        floor: least number of patients of a label who have several cases, or several labels, unless none has.
    """
    kept = list(cases)
    while True:
        labels_of: dict[str, list[int]] = defaultdict(list)
        for case in kept:
            labels_of[case.patient].append(case.label)
        mixed = _few(labels_of, floor, lambda labels: len(set(labels)) > 1)
        several = _few(labels_of, floor, lambda labels: len(labels) > 1)
        if not (mixed or several):
            return kept
        met: set[str] = set()
        fewer = []
        for case in kept:
            if case.patient in several:
                is_kept = case.patient not in met
            else:
                is_kept = case.patient not in mixed or case.label == labels_of[case.patient][0]
            met.add(case.patient)
            fewer += [case] * is_kept
        kept = fewer


def rare_in_training(cases: Sequence[Case], floor: int) -> set[int]:
    """Labels that some patients of the training side have, but fewer than the floor.

    All cases of a label less those of validation and test, which metrics tell, are those of training.
    """
    having: dict[int, set[str]] = defaultdict(set)
    for case in cases:
        if case.split == "train":
            having[case.label].add(case.patient)
    return {label for label, patients in having.items() if len(patients) < floor}


def held_back_tables(plan: ReadinessPlan, site: SiteData) -> set[str]:
    """Tables that an earlier survey, which may have been of the same cases, told in other cells."""
    asked = _cells(plan.survey)
    return {
        name
        for told in _answered(site.home)
        if told.cells is not None and _may_overlap(told.data, plan.data)
        for name, cells in told.cells.items()
        if asked.get(name, cells) != cells
    }


def check_told(data: DataPart, site: SiteData, cases: Sequence[Case], floor: int, *, trains: bool) -> None:
    """Refuse to answer about cases that differ by few patients from those answered about before.

    Args:
        data: of the plan that asks.
        site: whose answers.
        cases: that the answer would be about, from `counted`.
        floor: least number of patients behind a number; with 1 nothing is held back, and nothing refused.
        trains: whether the plan trains.

    Raises:
        TooCloseError: a difference of the two would be about few patients.
    """
    if floor == 1:
        return
    answered = [told for told in _answered(site.home) if _may_overlap(told.data, data)]
    for told in answered:
        if not trains and told.cells is not None and told.floor != floor:
            raise TooCloseError(
                f"this survey holds back counts about fewer than {floor} patients, an earlier one about fewer"
                f" than {told.floor}: together they would tell more than either",
                remedy=f"Ask the coordinator for a plan with privacy.min_cases = {told.floor}; where it is"
                " limits.min_cases in HOME/policy.toml that asks for another number, all surveys need one.",
            )
    for told in _answered_before(answered, data, floor):
        if told.data == data and told.floor == 1:
            continue  # it told all there is of these cases
        then = counted(_cases_now(site, told.data), told.floor if told.floor > 1 else floor)
        if differ_by_few(cases, then, max(floor, told.floor)):
            raise TooCloseError(
                "this plan and one answered before take different cases, and few patients differ",
                remedy="Ask the coordinator for a plan whose [data] and privacy.min_cases are those of the"
                f" earlier plan: {_in_words(told)}.",
            )


def _answered_before(answered: Sequence[AnsweredPlan], data: DataPart, floor: int) -> list[AnsweredPlan]:
    """One record for each choice of cases that was answered before this one ever was."""
    found: dict[bytes, AnsweredPlan] = {}
    for told in answered:
        if told.data == data and told.floor == floor:
            break
        found.setdefault(canonical_bytes(told.data) + f"|{told.floor}".encode(), told)
    return list(found.values())


def _cases_now(site: SiteData, data: DataPart) -> Sequence[Case]:
    """What an earlier plan would take today; nothing where the site has no such image any more."""
    try:
        return open_cohort(site, data, torn_patients=True).cases
    except EmptyCohortError:
        return ()


def _in_words(told: AnsweredPlan) -> str:
    data = told.data
    return (
        f"modalities {', '.join(data.modalities)}, validation_fraction {data.validation_fraction:g},"
        f" test_fraction {data.test_fraction:g}, split_seed {data.split_seed}, min_cases {told.floor}"
    )


def cases_to_train(data: DataPart, site: SiteData, cases: Sequence[Case]) -> list[Case]:
    """The cases that a training plan may tell of, and so use; what it tells is remembered.

    Args:
        data: of the plan.
        site: whose floor and answers.
        cases: every usable one.

    Raises:
        CohortError: too few patients are on the training side, code COHORT_TOO_SMALL.
        TooCloseError: the site answered a plan about slightly other cases.
    """
    told = counted(cases, site.min_patients)
    sides = {case.split for case in cases} - {case.split for case in told}
    if "train" in sides:
        raise TooFewPatientsError(
            f"fewer than {site.min_patients} patients for training",
            remedy="Add images, or lower data.validation_fraction and data.test_fraction.",
        )
    check_told(data, site, told, site.min_patients, trains=True)
    _remember(site.home, data, site.min_patients, None)
    return told


def remember_survey(plan: ReadinessPlan, site: SiteData, held_back: Collection[str], floor: int) -> None:
    """Note what a survey is about to tell; on the disk when this returns."""
    cells = {name: cells for name, cells in _cells(plan.survey).items() if name not in held_back}
    _remember(site.home, plan.data, floor, cells)


def forget_told(home: Path) -> None:
    """Forget every answer, as a simulation does: whoever runs it has the cases."""
    if (home / TOLD).is_dir():
        for path in (home / TOLD).iterdir():
            path.unlink()


def _cells(part: SurveyPart) -> dict[str, str]:
    """How each table divides the cases, as text; tables that are left out are not there."""
    found = {name: getattr(part, field) for name, field in _PARTS_OF_TABLES.items()}
    return {
        name: canonical_bytes(value).decode() if isinstance(value, Part) else json.dumps(value)
        for name, value in found.items()
        if value != ()
    }


def _remember(home: Path, data: DataPart, floor: int, cells: dict[str, str] | None) -> None:
    answered = _answered(home)
    if any((told.data, told.floor, told.cells) == (data, floor, cells) for told in answered):
        return
    order = 1 + max((told.order for told in answered), default=-1)
    document = canonical_bytes(AnsweredPlan(data=data, floor=floor, order=order, cells=cells))
    folder = home / TOLD
    folder.mkdir(mode=0o700, exist_ok=True)
    write_atomically(folder / f"{hashlib.sha256(document).hexdigest()}.told", document)


def _answered(home: Path) -> list[AnsweredPlan]:
    """Every record, in the order in which they were made."""
    found = []
    for path in sorted((home / TOLD).glob("*.told")):
        try:
            found.append(AnsweredPlan.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError) as error:
            raise CohortError(
                f"a record of an answered plan in HOME/{TOLD} cannot be read",
                remedy="Restore it from a backup. Without it nobody knows what may still be told.",
            ) from error
    return sorted(found, key=lambda told: told.order)


def _may_overlap(told: DataPart, asked: DataPart) -> bool:
    return bool(set(told.modalities) & set(asked.modalities))


def differ_by_few(now: Sequence[Case], then: Sequence[Case], floor: int) -> bool:
    """Whether few patients have cases in one of the two only, in all or on a side, or train with a label.

    Two sides left out together may each be one below the floor, hence nearly twice the floor.
    """
    rare = rare_in_training(now, floor) | rare_in_training(then, floor)
    common = bool({case.case_id for case in now} & {case.case_id for case in then})
    told = _sides_with_metrics(now, floor) & _sides_with_metrics(then, floor)
    return common and (
        bool(rare) or _has_few_others(now, then, floor, told) or _has_few_others(then, now, floor, told)
    )


def _has_few_others(
    cases: Sequence[Case], besides: Sequence[Case], floor: int, told: Collection[str]
) -> bool:
    """Whether few patients have cases in the first only; `told` are the sides whose labels metrics tell."""
    side_of = {case.case_id: case.split for case in besides}
    groups: dict[str, set[str]] = defaultdict(set)
    labelled: dict[tuple[str, int], set[str]] = defaultdict(set)
    for case in cases:
        if case.case_id not in side_of:
            groups["all"].add(case.patient)
        if side_of.get(case.case_id) != case.split:
            groups[case.split].add(case.patient)
            labelled[case.split, case.label].add(case.patient)
    return any(len(patients) < 2 * floor - 1 for patients in groups.values()) or any(
        len(patients) < floor for (side, _), patients in labelled.items() if side in told
    )


def _sides_with_metrics(cases: Sequence[Case], floor: int) -> set[str]:
    """Sides whose labels metrics may tell: none is rare there (`evaluation.state.suppressed`)."""
    counts = Counter((case.split, case.label) for case in cases)
    return {"validation", "test"} - {side for (side, _), count in counts.items() if count < floor}


def _few(labels_of: Mapping[str, list[int]], floor: int, concerns: Callable[[list[int]], bool]) -> set[str]:
    """Patients whose labels are of a kind that, for some label, fewer than the floor have."""
    having: dict[int, set[str]] = defaultdict(set)
    for patient, labels in labels_of.items():
        for label in set(labels) if concerns(labels) else ():
            having[label].add(patient)
    return set().union(*(patients for patients in having.values() if len(patients) < floor))
