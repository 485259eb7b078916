"""Read measurement reports, DICOM SR after template TID 1500, and take labels out of them (hop 3).

A report is a tree of content items. Kept are its measurement groups: numbers with their unit, codes
(findings, sites, qualitative evaluations), and which images each of them is about. Free text, names and
dates of the report are never read. Which concept is the label is the site's declaration, by code; where
the same concept stands in a report several times (mean and maximum, two lesions) conditions, again
codes, tell which one is meant. What is not told apart is ambiguous, and then labels nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pydicom import uid

from fedward_client.dicom.elements import Elements
from fedward_client.dicom.nested import (
    concept,
    decimals,
    first_item,
    items,
    open_object,
    same_concept,
    text,
)
from fedward_client.dicom.parser import contained
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.labels import Concept

REPORT_SOP_CLASSES = (
    uid.EnhancedSRStorage,
    uid.ComprehensiveSRStorage,
    uid.Comprehensive3DSRStorage,
    uid.ExtensibleSRStorage,
)
MAX_REPORT_BYTES = 8 * 2**20

_MAX_DEPTH = 24
_MAX_CONTENT_ITEMS = 100_000
_MEASUREMENT_REPORT = Concept("DCM", "126000")
_MEASUREMENT_GROUP = Concept("DCM", "125007")
_IMAGE_LIBRARY = Concept("DCM", "111028")
_QUALITATIVE_EVALUATIONS = Concept("UMLS", "C0034375")
_SERIES_CONCEPTS = (
    Concept("DCM", "121232"),  # Source series for segmentation
    Concept("DCM", "112002"),  # Series Instance UID
)
# Images of a patient are what labels are joined to; these refer to other things than images.
_NO_IMAGES = (
    "1.2.840.10008.5.1.4.1.1.66",  # raw data, registrations, segmentations
    "1.2.840.10008.5.1.4.1.1.67",  # real world value mapping
    "1.2.840.10008.5.1.4.1.1.88",  # reports
    "1.2.840.10008.5.1.4.1.1.11.",  # presentation states
    "1.2.840.10008.5.1.4.1.1.30",  # parametric maps
    "1.2.840.10008.5.1.4.1.1.481.",  # radiotherapy
)


@dataclass(frozen=True)
class ReportedValue:
    """One number or code of a group.

    Args:
        name: what was measured or evaluated.
        value: finite number, or the code found.
        unit: of a number, usually in UCUM.
        modifiers: (concept, code) pairs below it, such as (derivation, mean).
        instances: SOPInstanceUIDs of the images of this value alone, if it names any.
    """

    name: Concept = field(repr=False)
    value: float | Concept = field(repr=False)
    unit: Concept | None = field(repr=False)
    modifiers: tuple[tuple[Concept, Concept], ...] = field(repr=False)
    instances: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class MeasurementGroup:
    """What was said about one finding.

    Args:
        values: in the order of the report.
        instances: SOPInstanceUIDs of the images it is about.
        series: SeriesInstanceUIDs it is about, where it names them.
    """

    values: tuple[ReportedValue, ...]
    instances: tuple[str, ...] = field(repr=False)
    series: tuple[str, ...] = field(repr=False)

    @property
    def codes(self) -> tuple[tuple[Concept, Concept], ...]:
        """(concept, code) pairs of the group: its finding, site, evaluations."""
        return tuple((each.name, each.value) for each in self.values if isinstance(each.value, Concept))


@dataclass(frozen=True)
class MeasurementReport:
    """One report.

    Args:
        groups: its measurement groups, and what it says of the study as a whole.
        is_complete: CompletionFlag is COMPLETE.
        is_verified: VerificationFlag is VERIFIED.
        series_of_instance: SOPInstanceUID -> SeriesInstanceUID of the images that were looked at.
        study_of_series: SeriesInstanceUID -> StudyInstanceUID of these.
    """

    groups: tuple[MeasurementGroup, ...]
    is_complete: bool
    is_verified: bool
    sop_instance: str = field(repr=False)
    patient: str = field(repr=False)
    series_of_instance: Mapping[str, str] = field(repr=False)
    study_of_series: Mapping[str, str] = field(repr=False)


@dataclass
class _Content:
    """What is gathered from the items below one item."""

    values: list[ReportedValue] = field(default_factory=list)
    instances: list[str] = field(default_factory=list)
    series: list[str] = field(default_factory=list)


class _Budget:
    """Content items that may still be read of one report."""

    def __init__(self) -> None:
        self._left = _MAX_CONTENT_ITEMS

    def children(self, item: Elements, depth: int) -> tuple[Elements, ...]:
        """Content items below an item."""
        found = items(item, "ContentSequence")
        self._left -= len(found)
        if self._left < 0 or depth > _MAX_DEPTH:
            raise UnusableImageError(Reason.OVER_LIMIT)
        return found


def read_report(data: bytes) -> MeasurementReport:
    """Read one measurement report held in memory.

    Raises:
        UnusableImageError: no report, not after TID 1500, damaged, a number that is none, or beyond the
            limits.
    """
    with contained(Reason.MALFORMED):
        header = open_object(data, REPORT_SOP_CLASSES, max_bytes=MAX_REPORT_BYTES).elements
        if not same_concept(concept(header, "ConceptNameCodeSequence"), _MEASUREMENT_REPORT):
            raise UnusableImageError(Reason.REPORT_TEMPLATE)
        series_of, study_of = _evidence(header)
        budget = _Budget()
        groups = [
            _group(_gather(container, budget, 0))
            for container in _containers(header, budget, _MEASUREMENT_GROUP)
        ]
        for container in _containers(header, budget, _QUALITATIVE_EVALUATIONS):
            # About everything that the report looked at: no image of it can be told apart.
            evaluations = _gather(container, budget, 0).values
            groups.append(MeasurementGroup(tuple(evaluations), (), tuple(study_of)))
        return MeasurementReport(
            groups=tuple(groups),
            is_complete=text(header, "CompletionFlag") == "COMPLETE",
            is_verified=text(header, "VerificationFlag") == "VERIFIED",
            sop_instance=text(header, "SOPInstanceUID"),
            patient=text(header, "PatientID"),
            series_of_instance=series_of,
            study_of_series=study_of,
        )


def _evidence(header: Elements) -> tuple[dict[str, str], dict[str, str]]:
    """SOPInstanceUID -> SeriesInstanceUID, and that -> StudyInstanceUID, of the images looked at."""
    series_of: dict[str, str] = {}
    study_of: dict[str, str] = {}
    for keyword in ("CurrentRequestedProcedureEvidenceSequence", "PertinentOtherEvidenceSequence"):
        for study in items(header, keyword):
            for series in items(study, "ReferencedSeriesSequence"):
                images = [each for each in items(series, "ReferencedSOPSequence") if _is_image(each)]
                if images:
                    series_uid = text(series, "SeriesInstanceUID")
                    study_of[series_uid] = text(study, "StudyInstanceUID")
                    series_of |= {text(each, "ReferencedSOPInstanceUID"): series_uid for each in images}
    return series_of, study_of


def _is_image(reference: Elements) -> bool:
    sop_class = text(reference, "ReferencedSOPClassUID")
    return bool(sop_class) and not sop_class.startswith(_NO_IMAGES)


def _containers(header: Elements, budget: _Budget, wanted: Concept) -> Iterator[Elements]:
    """Containers of this name, in order, wherever the template put them; none is looked for inside one."""
    waiting = [(header, 0)]
    while waiting:
        item, depth = waiting.pop()
        name = concept(item, "ConceptNameCodeSequence")
        if same_concept(name, wanted):
            yield item
        elif not same_concept(name, _IMAGE_LIBRARY):
            children = budget.children(item, depth)
            containers = [child for child in children if text(child, "ValueType") == "CONTAINER"]
            waiting += [(child, depth + 1) for child in reversed(containers)]


def _gather(item: Elements, budget: _Budget, depth: int) -> _Content:
    content = _Content()
    for child in budget.children(item, depth):
        value_type = text(child, "ValueType")
        if value_type == "IMAGE":
            content.instances += _images(child)
        elif value_type == "UIDREF":
            name = concept(child, "ConceptNameCodeSequence")
            if any(same_concept(name, each) for each in _SERIES_CONCEPTS):
                content.series.append(text(child, "UID"))
        else:
            below = _gather(child, budget, depth + 1)
            if value_type in ("NUM", "CODE"):
                content.values += _values(child, value_type, below)
            else:  # a region or a container: what it is drawn on, the group is about
                content.values += below.values
                content.instances += below.instances
            content.series += below.series
    return content


def _images(item: Elements) -> list[str]:
    return [
        text(each, "ReferencedSOPInstanceUID")
        for each in items(item, "ReferencedSOPSequence")
        if _is_image(each)
    ]


def _values(item: Elements, value_type: str, below: _Content) -> Iterator[ReportedValue]:
    name = concept(item, "ConceptNameCodeSequence")
    modifiers = tuple((each.name, each.value) for each in below.values if isinstance(each.value, Concept))
    if name is None:
        return
    if value_type == "CODE":
        code = concept(item, "ConceptCodeSequence")
        if code is not None:
            yield ReportedValue(name, code, None, modifiers, tuple(below.instances))
        return
    measured = first_item(item, "MeasuredValueSequence")
    if measured is None:  # measured, but without a result
        return
    numbers = decimals(measured, "NumericValue")
    if len(numbers) != 1:
        raise UnusableImageError(Reason.MALFORMED)
    unit = concept(measured, "MeasurementUnitsCodeSequence")
    yield ReportedValue(name, numbers[0], unit, modifiers, tuple(below.instances))


def _group(content: _Content) -> MeasurementGroup:
    instances, series = dict.fromkeys(content.instances), dict.fromkeys(content.series)
    return MeasurementGroup(tuple(content.values), tuple(instances), tuple(series))
