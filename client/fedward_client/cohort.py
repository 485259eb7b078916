"""Join images and labels into cases, and divide them by patient (hop 3). Identifiers end here.

Above this module a case is a pseudonym, a content digest, a label and a side. Neither the order of
cases (by content digest) nor the division (a hash of the plan's seed and the patient) depends on the
site's secret key or on which patients came later, so a restart, a second site with the same files and
the simulation all see the same cohort.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedward_client.index_store import CaseIndex, IndexedImage
from fedward_client.labels import LabelFile, LabelRow, SplitName, label_index, read_labels, refuse_rows
from fedward_client.pseudonyms import CaseId, case_id_of, load_pseudonym_key
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError
from fedward_common.plan import DataPart

SMALLEST_COUNT_SHOWN = 5
_AGE_BANDS = ((18, "0-17"), (40, "18-39"), (60, "40-59"), (80, "60-79"))
_NUM_IDS_SHOWN = 5


@dataclass(frozen=True)
class Case:
    """One labelled image, without identifiers.

    Args:
        case_id: the site's pseudonym for it.
        content: SHA-256 of its file, hex.
        label: class number.
        split: its patient's side.
        modality: "CR" or "DX".
        study_year: year of the study, if known.
        sex: "M", "F" or "O", if known.
        age_years: at the study, if known.
    """

    case_id: CaseId
    content: str
    label: int
    split: SplitName
    modality: str
    study_year: int | None
    sex: str | None
    age_years: int | None


@dataclass(frozen=True)
class Cohort:
    """A site's cases in the order of their content digest.

    Args:
        cases: every usable, labelled image of the wanted modalities.
        label_names: class names; a case's label is an index into them.
        num_rows_without_image: label rows whose image stands in quarantine.
    """

    cases: tuple[Case, ...]
    label_names: tuple[str, ...]
    num_rows_without_image: int

    def of(self, split: SplitName) -> tuple[Case, ...]:
        """Cases on one side."""
        return tuple(case for case in self.cases if case.split == split)


def open_cohort(
    site: SiteData, data: DataPart | None = None, label_names: tuple[str, ...] | None = None
) -> Cohort:
    """Build the cohort from the index as it stands; run `index_folder` first.

    Args:
        site: whose images and labels.
        data: the plan's wishes; the plan's defaults when absent.
        label_names: the plan's classes; when absent, the distinct labels of the file, sorted.

    Raises:
        CohortError: the label file has rows that fit no image, images without a row, or labels that
            the plan does not know; a patient is on two sides; or there is no case at all.
    """
    data = data or DataPart()
    labels = read_labels(site.labels)
    with CaseIndex(site.home) as index:
        images = index.images()
        excused = index.quarantined_keys(labels.key_column)
        num_unidentified = index.num_unidentified()
    names = label_names or tuple(sorted({row.label for row in labels.rows}))
    num_unmatched = _check_rows(labels, images, excused, num_unidentified, names)
    wanted = [image for image in images if image.modality in data.modalities]
    rows = _row_of_each(wanted, labels)
    key = load_pseudonym_key(site.home)
    sides = _sides(wanted, rows, data, key)
    cases = tuple(
        Case(
            case_id=_case_id(key, image),
            content=image.content,
            label=_known_label(rows[image.content], names),
            split=sides[image.keys["PatientID"]],
            modality=image.modality,
            study_year=image.study_year,
            sex=image.sex,
            age_years=image.age_years,
        )
        for image in wanted
    )
    if not cases:
        raise CohortError(
            f"no usable labelled image of modality {' or '.join(data.modalities)}",
            remedy="See what is in quarantine and why: fedward-site cohort show",
        )
    return Cohort(cases, names, num_unmatched)


def split_of_patient(patient: str, data: DataPart) -> SplitName:
    """Side of a patient: a point in [0, 1) from SHA-256, against the plan's fractions.

    A threshold, not a rank: a patient never changes sides when others arrive.

    >>> split_of_patient("P1", DataPart(split_seed=7)) == split_of_patient("P1", DataPart(split_seed=7))
    True
    """
    digest = hashlib.sha256(f"{data.split_seed}|{patient}".encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64
    if point < data.test_fraction:
        return "test"
    return "validation" if point < data.test_fraction + data.validation_fraction else "train"


def count_cases(cohort: Cohort) -> dict[str, dict[str, str]]:
    """Count cases by split, label, modality, year, sex and age band, for the operator's screen.

    Returns:
        group -> value -> number as text; numbers from 1 to 4 read "<5", so that no row is a person.
    """
    columns: Mapping[str, Callable[[Case], str]] = {
        "split": lambda case: case.split,
        "label": lambda case: cohort.label_names[case.label],
        "modality": lambda case: case.modality,
        "year": lambda case: str(case.study_year or "unknown"),
        "sex": lambda case: case.sex or "unknown",
        "age": lambda case: _age_band(case.age_years),
    }
    return {
        group: {
            value: str(count) if count >= SMALLEST_COUNT_SHOWN else f"<{SMALLEST_COUNT_SHOWN}"
            for value, count in sorted(Counter(map(value_of, cohort.cases)).items())
        }
        for group, value_of in columns.items()
    }


def _check_rows(
    labels: LabelFile,
    images: Sequence[IndexedImage],
    excused: set[str],
    num_unidentified: int,
    names: Sequence[str],
) -> int:
    """Refuse rows that match no image and labels that are no class; return how many rows were excused."""
    known = {image.keys[labels.key_column] for image in images}
    faults = [
        (row.number, "label is neither a class name nor a class number of the plan")
        for row in labels.rows
        if label_index(row.label, names) is None
    ]
    refuse_rows(faults, remedy=f"Classes of the plan, numbered from 0: {', '.join(names)}.")
    unmatched = [row for row in labels.rows if row.key not in known]
    unknown = [row for row in unmatched if row.key not in excused]
    # A file too damaged to tell its UID has a row all the same: as many rows as such files may miss.
    if len(unknown) > num_unidentified:
        refuse_rows(
            [(row.number, f"{labels.key_column} matches no image") for row in unknown],
            remedy="Remove these rows, or add their images and run: fedward-site cohort index",
        )
    return len(unmatched)


def _row_of_each(images: Iterable[IndexedImage], labels: LabelFile) -> dict[str, LabelRow]:
    row_of = {row.key: row for row in labels.rows}
    found = {image.content: row_of.get(image.keys[labels.key_column]) for image in images}
    rows = {content: row for content, row in found.items() if row is not None}
    if len(rows) < len(found):
        raise CohortError(
            f"{len(found) - len(rows)} of {len(found)} images have no row in the label file",
            remedy="Add their rows, or move the images away and run: fedward-site cohort index",
        )
    return rows


def _known_label(row: LabelRow, names: Sequence[str]) -> int:
    label = label_index(row.label, names)
    if label is None:  # refused before; a wrong label must never become class 0
        raise CohortError(f"row {row.number}: unknown label", remedy="Correct the label file.")
    return label


def _sides(
    images: Sequence[IndexedImage], rows: Mapping[str, LabelRow], data: DataPart, key: bytes
) -> dict[str, SplitName]:
    """Side of each patient: the label file's own where it has the column, else by hash."""
    images_of: dict[str, list[IndexedImage]] = defaultdict(list)
    for image in images:
        images_of[image.keys["PatientID"]].append(image)
    sides: dict[str, SplitName] = {}
    torn: list[CaseId] = []
    for patient, members in images_of.items():
        declared = {rows[image.content].split for image in members}
        if len(declared) > 1:
            torn.extend(_case_id(key, image) for image in members)
        side = declared.pop()
        sides[patient] = side or split_of_patient(patient, data)
    if torn:
        raise CohortError(
            f"the label file puts one patient on two sides: {len(torn)} images of such patients, "
            f"among them cases {', '.join(sorted(torn)[:_NUM_IDS_SHOWN])}",
            remedy="Give all images of a patient the same `split`, or leave the column out.",
        )
    return sides


def _case_id(key: bytes, image: IndexedImage) -> CaseId:
    return case_id_of(key, image.keys["SOPInstanceUID"])


def _age_band(age_years: int | None) -> str:
    if age_years is None:
        return "unknown"
    return next((band for limit, band in _AGE_BANDS if age_years < limit), "80+")
