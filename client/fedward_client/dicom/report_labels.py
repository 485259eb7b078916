"""Take the label out of a measurement report (hop 3); `label_sources.py` makes rows of those of all reports.

The site declares by code which concept is the label, under which conditions, and for which level (image,
series or study) it holds. Nothing is converted: two units of one measurement are a refusal, and two
different labels for one image leave it to the join to call them ambiguous.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedward_client.dicom.nested import same_concept
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.structured_report import MeasurementGroup, MeasurementReport, ReportedValue
from fedward_client.labels import Concept, ReportPart


@dataclass(frozen=True)
class ReportLabels:
    """Labels found in one report.

    Args:
        rows: (key at the declared level, label), each once.
        unit: of the numbers; None when there are only codes.
        is_silent: it does not have the concept.
        without_image: it has the concept, but does not say of which image.
    """

    rows: tuple[tuple[str, str], ...] = field(repr=False)
    unit: Concept | None
    is_silent: bool
    without_image: bool


def report_labels(report: MeasurementReport, part: ReportPart) -> ReportLabels:
    """Look the label up in a report.

    Args:
        report: any.
        part: which value.

    Raises:
        UnusableImageError: it is not complete or not verified where that is asked for, or has numbers in
            different units or in another unit than declared.
    """
    unfinished = part.only_complete and not report.is_complete
    if unfinished or (part.only_verified and not report.is_verified):
        raise UnusableImageError(Reason.REPORT_UNFINISHED)
    found = list(_matches(report, part))
    rows: dict[tuple[str, str], None] = {}
    without_image = False
    for group, value in found:
        keys = _keys(report, group, value, part.level)
        without_image |= not keys
        rows |= dict.fromkeys((key, _label_text(value, part.classes)) for key in keys)
    units = [value.unit for _, value in found if not isinstance(value.value, Concept)]
    return ReportLabels(tuple(rows), one_unit(units, part.unit), not found, without_image)


def one_unit(units: Iterable[Concept | None], declared: Concept | None) -> Concept | None:
    """Check that all numbers have one unit, and return it; None without numbers.

    Raises:
        UnusableImageError: they have several, or another one than declared.
    """
    found = sorted(set(units), key=str)
    if not found:
        return None
    expected = declared or found[0]
    if any(unit != expected and not same_concept(unit, expected) for unit in found):
        raise UnusableImageError(Reason.REPORT_UNITS)
    return expected


def _matches(report: MeasurementReport, part: ReportPart) -> Iterator[tuple[MeasurementGroup, ReportedValue]]:
    for group in report.groups:
        codes = group.codes
        open_conditions = [each for each in part.where.items() if not _is_met(each, codes)]
        for value in group.values:
            if same_concept(value.name, part.concept) and all(
                _is_met(condition, value.modifiers) for condition in open_conditions
            ):
                yield group, value


def _is_met(condition: tuple[Concept, Concept], codes: Sequence[tuple[Concept, Concept]]) -> bool:
    name, code = condition
    return any(same_concept(each, name) and same_concept(found, code) for each, found in codes)


def _label_text(value: ReportedValue, classes: Mapping[Concept, str]) -> str:
    if not isinstance(value.value, Concept):
        return repr(float(value.value))
    return next((name for code, name in classes.items() if same_concept(code, value.value)), str(value.value))


def _keys(
    report: MeasurementReport, group: MeasurementGroup, value: ReportedValue, key: str
) -> tuple[str, ...]:
    instances = value.instances or group.instances
    if not (instances or group.series):
        return _only_one_looked_at(report, key)
    if key == "SOPInstanceUID":
        return instances
    series = [report.series_of_instance[each] for each in instances if each in report.series_of_instance]
    found = dict.fromkeys(series or group.series)
    if key == "StudyInstanceUID":
        found = dict.fromkeys(report.study_of_series.get(each, "") for each in found)
    return tuple(each for each in found if each)


def _only_one_looked_at(report: MeasurementReport, key: str) -> tuple[str, ...]:
    """What a group without references is about: all that was looked at, if that is one thing."""
    found: dict[str, Iterable[str]] = {
        "SOPInstanceUID": report.series_of_instance,
        "SeriesInstanceUID": report.study_of_series,
        "StudyInstanceUID": set(report.study_of_series.values()),
    }
    looked_at = tuple(found[key])
    return looked_at if len(looked_at) == 1 else ()
