"""Join images and labels into cases, and divide them by patient (hop 3). Identifiers end here.

Above this module a case is a pseudonym, a content digest, a label and a side, with a few facts that
describe it. Neither the order of cases (by content digest) nor the division (a hash of the plan's seed and
the patient) depends on the site's secret key or on which patients came later, so a restart, a second site
with the same files and the simulation all see the same cohort.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date

from fedward_client.cohort_file import CohortFile, read_cohort_file
from fedward_client.cohort_grouping import CohortUnit, Part
from fedward_client.cohort_units import Selected, select_units
from fedward_client.dicom.gate import Box
from fedward_client.dicom.series import VolumeGeometry
from fedward_client.exclusions import is_excluded, read_exclusions
from fedward_client.index_records import IndexedImage, QuarantinedContent
from fedward_client.index_store import CaseIndex
from fedward_client.label_join import LabelJoin, check_join, join_labels
from fedward_client.label_sources import gather_labels
from fedward_client.labels import LabelFile, LabelRow, SplitName, join_key, label_index, refuse_rows
from fedward_client.longitudinal import DatedImage, order_studies
from fedward_client.pseudonyms import CaseId, case_id_of, load_pseudonym_key, patient_code_of
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError
from fedward_common.plan import DataPart

_NUM_IDS_SHOWN = 5


class EmptyCohortError(CohortError):
    """Nothing is wrong but that no image can become a case."""


@dataclass(frozen=True)
class Case:
    """One labelled image or volume, without identifiers.

    Args:
        case_id: the site's pseudonym for it.
        content: SHA-256 of its file, hex; for a volume, of its ordered contents and frames.
        label: class number.
        split: its patient's side.
        modality: as in the header: "CR", "DX", "CT" ...
        study_year: year of the study, if known.
        sex: "M", "F" or "O", if known.
        age_years: at the study, if known.
        parts: (content, frame index) of each of its frames, in order.
        patient: the site's pseudonym for the patient.
        day: days since the patient's first study here; None when the date is unknown or contradictory.
        scanner: manufacturer and model, or "unknown".
        body_part: BodyPartExamined, or "".
        view: ViewPosition, or "".
        spacing_mm: (row, column), or (slice, row, column) of a volume, if known.
        num_frames: frames of the image, slices of the volume.
        regions: what must stay of its pictures, everything else black; None for all of it.
        geometry: of a volume.
    """

    case_id: CaseId
    content: str
    label: int
    split: SplitName
    modality: str
    study_year: int | None
    sex: str | None
    age_years: int | None
    parts: tuple[Part, ...] = field(default=(), repr=False)
    patient: str = ""
    day: int | None = None
    scanner: str = field(default="unknown", repr=False)
    body_part: str = field(default="", repr=False)
    view: str = field(default="", repr=False)
    spacing_mm: tuple[float, ...] | None = None
    num_frames: int = 1
    regions: tuple[Box, ...] | None = None
    geometry: VolumeGeometry | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Cohort:
    """A site's cases in the order of their content digest.

    Args:
        cases: every usable, labelled image or volume that is wanted.
        label_names: class names; a case's label is an index into them.
        num_rows_without_image: label rows whose image stands in quarantine.
        quarantined: what is refused, and why.
        left_out: images that are left out of volumes that are used, and why.
        num_rows_unmatched: label rows that find no image at all, or one too damaged to tell its UID.
        num_rows_ambiguous: label rows that find too much, and label nothing.
        num_unlabelled: wanted images or volumes without a row.
        num_excluded: those that the operator took out by name.
        num_unmet: criterion of the cohort file -> images that do not meet it.
        warnings: what does not fit between labels and images, within the limits; rows by number.
    """

    cases: tuple[Case, ...]
    label_names: tuple[str, ...]
    num_rows_without_image: int
    quarantined: tuple[QuarantinedContent, ...] = ()
    left_out: tuple[QuarantinedContent, ...] = ()
    num_rows_unmatched: int = 0
    num_rows_ambiguous: int = 0
    num_unlabelled: int = 0
    num_excluded: int = 0
    num_unmet: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def of(self, split: SplitName) -> tuple[Case, ...]:
        """Cases on one side."""
        return tuple(case for case in self.cases if case.split == split)

    def num_rejected(self, also: Iterable[QuarantinedContent] = ()) -> int:
        """Studies of which something is refused; a file that does not tell its study counts as one.

        Args:
            also: what turned out to be unusable after the cohort was opened.
        """
        return len({entry.study or entry.content for entry in (*self.quarantined, *also)})


def open_cohort(
    site: SiteData,
    data: DataPart | None = None,
    label_names: tuple[str, ...] | None = None,
    *,
    torn_patients: bool = False,
) -> Cohort:
    """Build the cohort from the index as it stands; run `index_folder` first.

    Args:
        site: whose images and labels.
        data: the plan's wishes; without a plan, whatever the site declares, or radiographs.
        label_names: the plan's classes; when absent, the distinct labels of the file, sorted.
        torn_patients: let a patient be on two sides, to be counted; nothing may train on such a cohort.

    Raises:
        CohortError: the label file has rows that fit no image, images without a row, or labels that
            the plan does not know; a patient is on two sides; or there is no case at all.
        UsageError: HOME/cohort.toml is not sound.
    """
    file = read_cohort_file(site.home)
    asked = asked_modalities(file, data)
    data = data or DataPart()
    key = load_pseudonym_key(site.home)
    excluded = read_exclusions(site.home)
    with CaseIndex(site.home) as index:
        selected = select_units(index, file, asked)
        volumes = [unit.geometry for unit in selected.units if unit.geometry is not None]
        gathered = gather_labels(site, index, file.labels, volumes if file.unit == "volume" else None)
        labels = gathered.labels
        rule = file.rule(file.wanted_modalities(asked))
        excused = index.quarantined_keys(labels.key_column, rule)
        num_unidentified = index.num_unidentified(rule)
        refused = index.refused(dict(gathered.refused))
    names = label_names or tuple(sorted({row.label for row in labels.rows}))
    _refuse_unknown_labels(labels, names)
    units = [unit for unit in selected.units if not is_excluded(unit, key, excluded)]
    join = _join(labels, units, selected, excused)
    warnings = check_join(join, file.labels.limits, num_unidentified=num_unidentified)
    labelled = [unit for unit in units if unit.content in join.rows]
    cases = _cases(labelled, join.rows, names, data, key, torn_patients)
    if not cases:
        raise EmptyCohortError(
            f"no usable labelled image of modality {' or '.join(asked)}",
            remedy="See what is in quarantine and why: fedward-site cohort quarantine. If nothing is, the"
            " plan or HOME/cohort.toml wants other images than there are.",
        )
    return Cohort(
        cases=cases,
        label_names=names,
        num_rows_without_image=len(join.quarantined),
        quarantined=(*selected.quarantined, *refused),
        left_out=selected.left_out,
        num_rows_unmatched=len(join.unmatched),
        num_rows_ambiguous=len(join.ambiguous),
        num_unlabelled=len(units) - len(labelled),
        num_excluded=len(selected.units) - len(units),
        num_unmet=selected.unmet,
        warnings=(*gathered.warnings, *warnings),
    )


def unit_ids(site: SiteData) -> frozenset[CaseId]:
    """Case ids of everything that may become a case, labelled or not, excluded or not."""
    file = read_cohort_file(site.home)
    key = load_pseudonym_key(site.home)
    with CaseIndex(site.home) as index:
        selected = select_units(index, file, asked_modalities(file, None))
    return frozenset(case_id_of(key, unit.name) for unit in selected.units)


def asked_modalities(file: CohortFile, data: DataPart | None) -> tuple[str, ...]:
    """Modalities that a plan asks for; without a plan, those of the cohort file, else radiographs."""
    if data is not None:
        return data.modalities
    return DataPart().modalities if file.modalities is None else file.modalities


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


def _refuse_unknown_labels(labels: LabelFile, names: Sequence[str]) -> None:
    faults = [
        (row.number, "label is neither a class name nor a class number of the plan")
        for row in labels.rows
        if label_index(row.label, names) is None
    ]
    refuse_rows(faults, remedy=f"Classes of the plan, numbered from 0: {', '.join(names)}.")


def _join(labels: LabelFile, units: Sequence[CohortUnit], selected: Selected, excused: set[str]) -> LabelJoin:
    taken_out = [unit.image for unit in selected.units]
    refused = {join_key(image.keys, labels.key_column) for image in selected.refused} - {""}
    return join_labels(labels, units, elsewhere=[*selected.others, *taken_out], quarantined=excused | refused)


def _cases(
    units: Sequence[CohortUnit],
    rows: Mapping[str, LabelRow],
    names: Sequence[str],
    data: DataPart,
    key: bytes,
    torn_patients: bool,
) -> tuple[Case, ...]:
    sides = _sides(units, rows, data, key, torn_patients=torn_patients)
    day_of = _days(units)
    return tuple(
        Case(
            case_id=case_id_of(key, unit.name),
            content=unit.content,
            label=_known_label(rows[unit.content], names),
            split=sides[unit.content],
            modality=unit.image.modality,
            study_year=unit.image.study_year,
            sex=unit.image.sex,
            age_years=unit.image.age_years,
            parts=unit.parts,
            patient=patient_code_of(key, unit.image.patient),
            day=day_of.get(unit.content),
            scanner=_scanner(unit.image),
            body_part=" ".join(unit.image.body_part.upper().split()),
            view=" ".join(unit.image.view_position.upper().split()),
            spacing_mm=_spacing(unit),
            num_frames=unit.image.num_frames,
            regions=unit.regions,
            geometry=unit.geometry,
        )
        for unit in units
    )


def _scanner(image: IndexedImage) -> str:
    return " ".join(f"{image.manufacturer} {image.model_name}".upper().split()) or "unknown"


def _spacing(unit: CohortUnit) -> tuple[float, ...] | None:
    if unit.geometry is not None:
        return unit.geometry.spacing_mm
    row_mm, column_mm = unit.image.row_mm, unit.image.column_mm
    return None if row_mm is None or column_mm is None else (row_mm, column_mm)


def _days(units: Sequence[CohortUnit]) -> dict[str, int]:
    """Days since the patient's first study, by content; what has no certain date is absent."""
    dated = (
        DatedImage(
            content=unit.content,
            patient=unit.image.patient,
            study=unit.image.study,
            study_date=date.fromisoformat(unit.image.study_date) if unit.image.study_date else None,
            study_time=unit.image.study_time,
        )
        for unit in units
    )
    return {
        content: study.days
        for history in order_studies(dated)
        for study in history.studies
        for content in study.contents
    }


def _known_label(row: LabelRow, names: Sequence[str]) -> int:
    label = label_index(row.label, names)
    if label is None:  # refused before; a wrong label must never become class 0
        raise CohortError(f"row {row.number}: unknown label", remedy="Correct the label file.")
    return label


def _sides(
    units: Sequence[CohortUnit],
    rows: Mapping[str, LabelRow],
    data: DataPart,
    key: bytes,
    *,
    torn_patients: bool,
) -> dict[str, SplitName]:
    """Side of each unit by content: the label file's own where it has the column, else by hash."""
    units_of: dict[str, list[CohortUnit]] = defaultdict(list)
    for unit in units:
        units_of[unit.image.patient].append(unit)
    sides: dict[str, SplitName] = {}
    torn: list[CaseId] = []
    for patient, members in units_of.items():
        hashed = split_of_patient(patient, data)
        own = {unit.content: rows[unit.content].split or hashed for unit in members}
        if len(set(own.values())) > 1:
            torn.extend(case_id_of(key, unit.name) for unit in members)
        sides |= own
    if torn and not torn_patients:
        raise CohortError(
            f"the label file puts one patient on two sides: {len(torn)} images of such patients, "
            f"among them cases {', '.join(sorted(torn)[:_NUM_IDS_SHOWN])}",
            remedy="Give all images of a patient the same `split`, or leave the column out.",
        )
    return sides
