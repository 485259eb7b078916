"""Count a site's cases for a readiness plan (hops 1 to 4 without a model), and release the counts.

Runs in the worker process. Every image is decoded once, because only that tells whether it can be used,
which intensities it holds and whether the same pixels occur twice. What is returned holds no cell about
fewer patients than the floor; the exact counts are never handed to the daemon that has the network.
Patients of two sites are never compared: nothing here could tell that one of them is known elsewhere too.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from fedward_client.cohort import Case, open_cohort
from fedward_client.index import Progress, index_folder
from fedward_client.index_store import CaseIndex
from fedward_client.readiness_refused import refused_studies, told_refused
from fedward_client.readiness_told import (
    TOLD,
    check_told,
    counted,
    held_back_tables,
    remember_survey,
)
from fedward_client.site_data import SiteData
from fedward_client.suppression import protected
from fedward_common.errors import CohortError
from fedward_common.files import write_atomically
from fedward_common.readiness_plan import IntensityPart, ReadinessPlan, SurveyPart
from fedward_common.readiness_state import (
    CASE_WEIGHT,
    SEXES,
    SIDES,
    State,
    cell_of,
    empty_survey,
    scanner_cell,
    survey_tables,
)

if TYPE_CHECKING:
    from fedward_client.dicom.frames import Frames
    from fedward_client.dicom.sandbox import Outcome

Counts = NDArray[np.int64]

FINDINGS_FILE = "findings.json"

_MOST_DECODERS = 4
_FILES_A_DECODER = 100  # a process takes about a second to start


@dataclass(frozen=True)
class SurveyedCase:
    """A case that could be decoded.

    Attributes:
        intensity: its pixels in the plan's cells, `CASE_WEIGHT` in all.
        pixels: SHA-256 of its decoded values, before any window.
        study: its StudyInstanceUID, or "".
    """

    case: Case
    intensity: Counts
    pixels: bytes
    study: str = field(default="", repr=False)


def survey(plan: ReadinessPlan, site: SiteData, *, min_cases: int, progress: Progress | None = None) -> State:
    """Bring the index up to date, decode every case and release what the plan asks for.

    Args:
        plan: names the cells.
        site: whose folder and labels.
        min_cases: the site's own floor; the plan's holds too.
        progress: told how many cases are decoded.

    Raises:
        CohortError: folder, index or labels cannot be used, or no case can be decoded.
        TooCloseError: the answer could be subtracted from an earlier one about slightly other cases.
    """
    from fedward_client.dicom.refusal import Reason

    with CaseIndex(site.home) as index:
        index.forget_other_plans(f"survey in {plan.survey.intensity.units} units")
    floor = max(min_cases, plan.privacy.min_cases)
    index_folder(site)
    cohort = open_cohort(site, plan.data, plan.task.labels, torn_patients=True)
    with CaseIndex(site.home) as index:
        studies = index.studies()
        cases = [
            replace(each, study=studies.get(next(iter(_frames_of(each.case))), ""))
            for each in _decoded(plan.survey.intensity, site, index, cohort.cases, progress)
        ]
        usable = {each.case.case_id for each in cases}
        unusable = [next(iter(_frames_of(case))) for case in cohort.cases if case.case_id not in usable]
        undecoded = index.refused(dict.fromkeys(unusable, Reason.DECODE_FAILED))
    if not cases:
        raise CohortError(
            "no case of the cohort can be decoded",
            remedy="See what is in quarantine and why: fedward-site cohort quarantine",
        )
    check_told(plan.data, site, counted([each.case for each in cases], floor), floor, trains=False)
    num_refused = refused_studies(
        [*cohort.quarantined, *undecoded],
        Counter(each.study for each in cases for _ in _frames_of(each.case)),
        spoilt={entry.study or entry.content for entry in undecoded},
    )
    _write_findings(site, cases)
    besides = held_back_tables(plan, site)
    state = released(plan, cases, num_refused=num_refused, floor=floor, held_back=besides)
    remember_survey(plan, site, besides, floor)
    return state


def _write_findings(site: SiteData, cases: Sequence[SurveyedCase]) -> None:
    """Name to the site's operator, by case id, what the coordinator learns as a number at most."""
    same: dict[bytes, list[str]] = defaultdict(list)
    of_patient: dict[str, list[str]] = defaultdict(list)
    torn = _torn_patients(cases)
    for each in cases:
        same[each.pixels].append(each.case.case_id)
        if each.case.patient in torn:
            of_patient[each.case.patient].append(each.case.case_id)
    findings = {
        "same_pixels": [sorted(ids) for ids in same.values() if len(ids) > 1],
        "on_two_sides": [sorted(ids) for ids in of_patient.values()],
    }
    folder = site.home / TOLD
    folder.mkdir(mode=0o700, exist_ok=True)
    write_atomically(folder / FINDINGS_FILE, json.dumps(findings, indent=1).encode())


def released(
    plan: ReadinessPlan,
    cases: Sequence[SurveyedCase],
    *,
    num_refused: int,
    floor: int,
    held_back: Collection[str] = (),
) -> State:
    """Count cases, and hold back what is about too few patients; zeros when that is everything.

    Args:
        plan: names the cells.
        cases: every usable case of the site.
        num_refused: studies in quarantine.
        floor: least number of patients behind a released number.
        held_back: tables of which nothing may be told.
    """
    nothing = empty_survey(plan)
    torn = _torn_patients(cases)
    same = {pixels for pixels, count in Counter(each.pixels for each in cases).items() if count > 1}
    kept = {case.case_id for case in counted([each.case for each in cases], floor)}
    cases = [each for each in cases if each.case.case_id in kept]
    members: dict[str, int] = {}
    for each in cases:
        members.setdefault(each.case.patient, len(members))
    if len(members) < 2 * floor - 1:  # fewer could make a table that cannot be held back alone
        return nothing
    patient_of = np.array([members[each.case.patient] for each in cases], dtype=np.int64)
    tables = {
        name: _table(patient_of, cells, len(nothing[name]), len(members))
        for name, cells in _cells(plan, cases, same).items()
    }
    tables["intensity"] = _intensities(patient_of, cases, len(nothing["intensity"]), len(members))
    tables["torn"] = np.array([[name in torn, name not in torn] for name in members], dtype=np.int64)
    told = {name: protected(amounts, floor) for name, amounts in tables.items() if name != "label"}
    told["label"] = protected(tables["label"], floor, _rare_labels(patient_of, cases, tables["label"], floor))
    told["label_patients"] = _told_label_patients(tables["label"], told["label"], floor)
    # A table is held back alone: were it all or nothing, a survey without that table would tell on it.
    state = nothing | {
        name: cells for name, cells in told.items() if cells is not None and name not in held_back
    }
    state["num_cases"][0], state["num_patients"][0] = len(cases), len(members)
    used = {(each.case.patient, each.study or each.case.content) for each in cases}
    state["refused"] = told_refused(num_refused, len(used), floor)
    return state


def _cells(plan: ReadinessPlan, cases: Sequence[SurveyedCase], same: Collection[bytes]) -> dict[str, Counts]:
    """Cell of each case, by table; `same` are the pixels that several cases have."""
    part = plan.survey
    found = {
        name: np.array([_cell(name, each.case, part) for each in cases], dtype=np.int64)
        for name in survey_tables(plan)
    }
    found["repeated"] = np.array([0 if each.pixels in same else 1 for each in cases], dtype=np.int64)
    return found


def _cell(table: str, case: Case, part: SurveyPart) -> int:
    spacing = case.spacing_mm
    match table:
        case "label":
            return case.label
        case "split":
            return SIDES.index(case.split)
        case "age":
            return cell_of(case.age_years, part.age_edges)
        case "sex":
            return SEXES.index(case.sex) if case.sex in SEXES else len(SEXES)
        case "scanner":
            return scanner_cell(case.scanner, part.scanners)
        case "spacing":
            return cell_of(None if spacing is None else spacing[-1], part.spacing_edges_mm)
        case _:  # of slices, which images have not
            is_volume = spacing is not None and len(spacing) == 3
            return cell_of(spacing[0] if spacing and is_volume else None, part.slice_edges_mm)


def _table(patient_of: Counts, cell_of_case: Counts, num_cells: int, num_patients: int) -> Counts:
    amounts = np.zeros((num_patients, num_cells), dtype=np.int64)
    np.add.at(amounts, (patient_of, cell_of_case), 1)
    return amounts


def _intensities(
    patient_of: Counts, cases: Sequence[SurveyedCase], num_cells: int, num_patients: int
) -> Counts:
    amounts = np.zeros((num_patients, num_cells), dtype=np.int64)
    for patient, each in zip(patient_of, cases, strict=True):
        amounts[patient] += each.intensity
    return amounts


def _rare_labels(
    patient_of: Counts, cases: Sequence[SurveyedCase], by_label: Counts, floor: int
) -> list[int]:
    """Labels to hold back because of what metrics tell of the sides of the division.

    Metrics tell the labels of validation and test, unless one is rare there (`evaluation.state.suppressed`).
    All cases of a label less those are the cases on training and on the sides not told. Few patients may
    have such, even if many have the label; so these sides together are held to the same rule as all.
    """
    label_of = np.array([each.case.label for each in cases], dtype=np.int64)
    side_of = np.array([SIDES.index(each.case.split) for each in cases], dtype=np.int64)
    counts = [
        np.bincount(label_of[side_of == side], minlength=by_label.shape[1]) for side in range(len(SIDES))
    ]
    unseen = [side for side, found in enumerate(counts) if side == 0 or ((found > 0) & (found < floor)).any()]
    chosen = np.isin(side_of, unseen)
    tables = (by_label, _table(patient_of[chosen], label_of[chosen], by_label.shape[1], len(by_label)))
    hidden: set[int] = set()
    while True:
        found = set(hidden)
        for amounts in tables:
            sums = amounts.sum(axis=0)
            told = protected(amounts, floor, sorted(found))
            found |= set(np.flatnonzero(sums != (0 * sums if told is None else told)).tolist())
        if found == hidden:
            return sorted(hidden)
        hidden = found


def _label_patients(by_label: Counts) -> Counts:
    """Patients with cases of one label only, by label, and those with several: one row a patient."""
    has = by_label > 0
    several = has.sum(axis=1) > 1
    return np.column_stack([has & ~several[:, None], several]).astype(np.int64)


def _told_label_patients(by_label: Counts, label: Counts | None, floor: int) -> Counts | None:
    """Release the table of patients by label; `label` is what is released of the cases by label."""
    amounts = _label_patients(by_label)
    # Where every patient has one case, this table repeats that of labels: what one hides, both must.
    hidden = [] if label is None else np.flatnonzero(label == 0).tolist()
    told = protected(amounts, floor, besides=hidden)
    is_whole = told is None or (told == amounts.sum(axis=0)).all()
    # Where all have two cases, cases and patients by label are equations: one told number may solve them.
    return told if is_whole else np.zeros_like(told)


def _torn_patients(cases: Iterable[SurveyedCase]) -> set[str]:
    """Patients with cases on several sides of the division."""
    sides: dict[str, set[str]] = defaultdict(set)
    for each in cases:
        sides[each.case.patient].add(each.case.split)
    return {patient for patient, found in sides.items() if len(found) > 1}


def _decoded(
    part: IntensityPart,
    site: SiteData,
    index: CaseIndex,
    cases: Sequence[Case],
    progress: Progress | None,
) -> Iterator[SurveyedCase]:
    """Decode the cases in their order; an image that cannot be used joins the quarantine."""
    from fedward_client.decoders import decoders
    from fedward_client.preparation import Files

    known = Files(site, index.file_names(), index.quarantine)
    contents = [content for case in cases for content in _frames_of(case)]
    files = map(known.of, contents)
    with decoders(max(1, min(_MOST_DECODERS, len(contents) // _FILES_A_DECODER))) as sandbox:
        outcomes = zip(contents, sandbox.map(files, "frames"), strict=True)
        for number, case in enumerate(cases, start=1):
            found = _examined(part, index, case, islice(outcomes, len(_frames_of(case))))
            if progress is not None:
                progress(number, len(cases))
            if found is not None:
                yield found


def _examined(
    part: IntensityPart, index: CaseIndex, case: Case, outcomes: Iterable[tuple[str, Outcome]]
) -> SurveyedCase | None:
    """Count the pixels of one case, whose files come decoded one by one; None when one cannot be used."""
    from fedward_client.dicom.refusal import UnusableImageError

    counts, pixels, usable = np.zeros(part.bins + 2, dtype=np.int64), hashlib.sha256(), True
    places = _frames_of(case)
    for content, outcome in outcomes:
        try:
            if isinstance(outcome, CohortError):
                raise outcome
            frames = as_kept(cast("Frames", outcome), case)
            values = values_of(frames, part)[places[content]]
        except UnusableImageError as error:
            index.quarantine(content, error)
            usable = False
            continue
        stored = frames.values[places[content]]  # a copy may come with another window
        pixels.update(f"{stored.shape}".encode())
        for frame, seen in zip(stored, values, strict=True):  # one at a time: a file may hold hundreds
            counts += pixel_counts(seen, part)
            pixels.update(np.ascontiguousarray(frame).data)
    return SurveyedCase(case, weighted(counts), pixels.digest()) if usable else None


def pixel_counts(values: NDArray[Any], part: IntensityPart) -> Counts:
    """Count pixels below the range, in each of its cells, and above; what is no number counts as below.

    >>> pixel_counts(np.array([-1, 0, 0.4, 0.5, 1, 2]), IntensityPart(bins=2))
    array([1, 2, 2, 1])
    """
    place = np.nan_to_num((values.ravel() - part.low) * (part.bins / (part.high - part.low)), nan=-1.0)
    cells = np.clip(np.floor(place), -1, part.bins).astype(np.int64) + 1
    cells[values.ravel() == part.high] = part.bins  # the last cell holds its upper end
    return np.bincount(cells, minlength=part.bins + 2)


def weighted(counts: Counts) -> Counts:
    """Bring the counts of one case to `CASE_WEIGHT` in all; what rounding leaves goes to the largest cell.

    >>> weighted(np.array([1, 2, 0])).tolist(), CASE_WEIGHT
    ([349525, 699051, 0], 1048576)
    """
    shares = counts * CASE_WEIGHT // max(1, int(counts.sum()))
    shares[counts.argmax()] += CASE_WEIGHT - shares.sum()
    return shares


def _frames_of(case: Case) -> dict[str, list[int]]:
    """Frames of a case by the content that holds them, in the case's order."""
    found: dict[str, list[int]] = defaultdict(list)
    for content, place in case.parts or ((case.content, 0),):
        found[content].append(place)
    return found


def as_kept(frames: Frames, case: Case) -> Frames:
    """Make black what the gate blackens."""
    from fedward_client.dicom.gate import mask

    if case.regions is None:
        return frames
    return replace(frames, values=mask(frames.values, case.regions, inverted=frames.inverted))


def values_of(frames: Frames, part: IntensityPart) -> NDArray[Any]:
    """Values `(frames, rows, columns)` in the plan's units; colour as its mean."""
    from fedward_client.dicom.intensity import FILE, frames_in_unit_interval

    values = frames_in_unit_interval(frames, FILE) if part.units == "display" else frames.values
    return values.mean(axis=-1) if frames.is_colour else values
