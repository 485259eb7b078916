"""Count a site's cases for a readiness plan (hops 1 to 4 without a model), and release the counts.

Runs in the worker process. Every image is decoded once, because only that tells whether it can be used,
which intensities it holds and whether the same pixels occur twice. What is returned holds no cell about
fewer patients than the floor; the exact counts are never handed to the daemon that has the network.
Patients of two sites are never compared: nothing here could tell that one of them is known elsewhere too.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from fedward_client.cohort import Case, open_cohort
from fedward_client.index import Progress, index_folder
from fedward_client.index_store import CaseIndex
from fedward_client.site_data import SiteData
from fedward_client.suppression import protected
from fedward_common.errors import CohortError
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

_MOST_DECODERS = 4
_FILES_A_DECODER = 100  # a process takes about a second to start


@dataclass(frozen=True)
class SurveyedCase:
    """A case that could be decoded.

    Attributes:
        intensity: its pixels in the plan's cells, `CASE_WEIGHT` in all.
        pixels: SHA-256 of its decoded values.
    """

    case: Case
    intensity: Counts
    pixels: bytes


def survey(plan: ReadinessPlan, site: SiteData, *, min_cases: int, progress: Progress | None = None) -> State:
    """Bring the index up to date, decode every case and release what the plan asks for.

    Args:
        plan: names the cells.
        site: whose folder and labels.
        min_cases: the site's own floor; the plan's holds too.
        progress: told how many cases are decoded.

    Raises:
        CohortError: folder, index or labels cannot be used, or no case can be decoded.
    """
    from fedward_client.dicom.refusal import Reason

    with CaseIndex(site.home) as index:
        index.forget_other_plans(f"survey in {plan.survey.intensity.units} units")
    index_folder(site)
    cohort = open_cohort(site, plan.data, plan.task.labels, torn_patients=True)
    with CaseIndex(site.home) as index:
        cases = list(_decoded(plan.survey.intensity, site, index, cohort.cases, progress))
        usable = {each.case.case_id for each in cases}
        unusable = [next(iter(_frames_of(case))) for case in cohort.cases if case.case_id not in usable]
        undecoded = index.refused(dict.fromkeys(unusable, Reason.DECODE_FAILED))
    if not cases:
        raise CohortError(
            "no case of the cohort can be decoded",
            remedy="See what is in quarantine and why: fedward-site cohort quarantine",
        )
    floor = max(min_cases, plan.privacy.min_cases)
    num_refused = len(cohort.quarantined) + len(undecoded)
    # Who a refused image is of is often not known; a study is the least that one patient has.
    is_told = cohort.num_rejected(undecoded) >= floor
    return released(plan, cases, num_refused=num_refused if is_told else 0, floor=floor)


def released(plan: ReadinessPlan, cases: Sequence[SurveyedCase], *, num_refused: int, floor: int) -> State:
    """Count cases, and hold back what is about too few patients; zeros when that is everything.

    Args:
        plan: names the cells.
        cases: every usable case of the site.
        num_refused: images in quarantine.
        floor: least number of patients behind a released number.
    """
    nothing = empty_survey(plan)
    torn = _torn_patients(cases)
    same = {pixels for pixels, count in Counter(each.pixels for each in cases).items() if count > 1}
    cases = thinned(cases, floor)
    members: dict[str, int] = {}
    for each in cases:
        members.setdefault(each.case.patient, len(members))
    if len(members) < floor:
        return nothing
    patient_of = np.array([members[each.case.patient] for each in cases], dtype=np.int64)
    tables = {
        name: _table(patient_of, cells, len(nothing[name]), len(members))
        for name, cells in _cells(plan, cases, same).items()
    }
    tables["intensity"] = _intensities(patient_of, cases, len(nothing["intensity"]), len(members))
    tables["torn"] = np.array([[name in torn, name not in torn] for name in members], dtype=np.int64)
    told = {name: protected(amounts, floor) for name, amounts in tables.items()}
    told["label_patients"] = _told_label_patients(tables["label"], told["label"], floor)
    if any(cells is None for cells in told.values()):
        return nothing
    state = nothing | {name: cells for name, cells in told.items() if cells is not None}
    state["num_cases"][0], state["num_patients"][0] = len(cases), len(members)
    state["refused"][0] = num_refused if num_refused >= floor else 0
    return state


def thinned(cases: Sequence[SurveyedCase], floor: int) -> list[SurveyedCase]:
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
        for each in kept:
            labels_of[each.case.patient].append(each.case.label)
        mixed = _few(labels_of, floor, lambda labels: len(set(labels)) > 1)
        several = _few(labels_of, floor, lambda labels: len(labels) > 1)
        if not (mixed or several):
            return kept
        met: set[str] = set()
        fewer = []
        for each in kept:
            patient, label = each.case.patient, each.case.label
            if patient in several:
                is_kept = patient not in met
            else:
                is_kept = patient not in mixed or label == labels_of[patient][0]
            met.add(patient)
            fewer += [each] * is_kept
        kept = fewer


def _few(labels_of: Mapping[str, list[int]], floor: int, concerns: Callable[[list[int]], bool]) -> set[str]:
    """Patients whose labels are of a kind that, for some label, fewer than the floor have."""
    having: dict[int, set[str]] = defaultdict(set)
    for patient, labels in labels_of.items():
        for label in set(labels) if concerns(labels) else ():
            having[label].add(patient)
    return set().union(*(patients for patients in having.values() if len(patients) < floor))


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
    # Where all have two cases, cases and patients by two labels are equations: one told number solves them.
    return told if is_whole or by_label.shape[1] > 2 else np.zeros_like(told)


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
            values = values_of(cast("Frames", outcome), case, part)[places[content]]
        except UnusableImageError as error:
            index.quarantine(content, error)
            usable = False
            continue
        pixels.update(f"{values.shape}".encode())
        for frame in values:  # one at a time: a file may hold hundreds
            counts += pixel_counts(frame, part)
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


def values_of(frames: Frames, case: Case, part: IntensityPart) -> NDArray[Any]:
    """Values `(frames, rows, columns)` in the plan's units; what the gate blackens is black here too."""
    from fedward_client.dicom.gate import mask
    from fedward_client.dicom.intensity import FILE, frames_in_unit_interval

    if case.regions is not None:
        frames = replace(frames, values=mask(frames.values, case.regions, inverted=frames.inverted))
    values = frames_in_unit_interval(frames, FILE) if part.units == "display" else frames.values
    return values.mean(axis=-1) if frames.is_colour else values
