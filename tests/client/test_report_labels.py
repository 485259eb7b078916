"""Measurement reports: a real one and ones that highdicom writes, against what highdicom reads in them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from fedward_client.dicom import structured_report
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.report_labels import ReportLabels, one_unit, report_labels
from fedward_client.dicom.structured_report import MeasurementReport, read_report
from fedward_client.labels import Concept, ReportPart
from tests.label_builders import LIVER, SPLEEN, TUMOUR, a_report, a_segmentation, a_volume, written

LENGTH = Code("410668003", "SCT", "Length")
VOLUME = Code("118565006", "SCT", "Volume")
MEAN = Code("373098007", "SCT", "Mean")
MAXIMUM = Code("56851009", "SCT", "Maximum")
STAGE = Code("384625004", "SCT", "T stage")
STAGE_1, STAGE_2 = Code("369897008", "SCT", "T1"), Code("369900003", "SCT", "T2")
MM, CM = Code("mm", "UCUM", "millimeter"), Code("cm", "UCUM", "centimeter")


def refusal(action: Any, *args: Any, **options: Any) -> Reason:
    with pytest.raises(UnusableImageError) as caught:
        action(*args, **options)
    assert caught.value.__cause__ is None
    return caught.value.reason


def asked(concept: Code, **options: Any) -> ReportPart:
    return ReportPart.model_validate({"concept": f"{concept.scheme_designator}:{concept.value}"} | options)


def text(code: Code) -> str:
    return f"{code.scheme_designator}:{code.value}"


def labels_of(dataset: Dataset, concept: Code, **options: Any) -> ReportLabels:
    return report_labels(read_report(written(dataset)), asked(concept, **options))


@pytest.fixture
def real(shared_data: Path) -> Path:
    return shared_data / "dicom-varied" / "dcmqi" / "sr-example" / "sr.dcm"


@pytest.mark.data
def test_real_report_holds_the_numbers_that_its_content_items_show(real: Path) -> None:
    """Walked here by hand with pydicom: every NUM item but those of the image library."""

    def numbers(item: Dataset) -> list[tuple[str, float, str]]:
        found = []
        for child in item.get("ContentSequence", []):
            if child.ConceptNameCodeSequence[0].CodeValue == "111028":
                continue
            if child.ValueType == "NUM":
                name, value = child.ConceptNameCodeSequence[0], child.MeasuredValueSequence[0]
                unit = value.MeasurementUnitsCodeSequence[0].CodeValue
                found.append((name.CodeValue, float(value.NumericValue), unit))
            found += numbers(child)
        return found

    report = read_report(real.read_bytes())

    values = [each for group in report.groups for each in group.values if each.unit is not None]
    assert len(values) > 10
    assert [(each.name.value, each.value, each.unit.value) for each in values if each.unit] == numbers(
        dcmread(real)
    )


@pytest.mark.data
def test_value_of_the_real_report_is_found_by_its_derivation_and_belongs_to_its_series(real: Path) -> None:
    report = read_report(real.read_bytes())
    suv = {"concept": "DCM:126401", "level": "SeriesInstanceUID", "unit": "UCUM:{SUVbw}g/ml"}
    evidence = dcmread(real).CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    series = [each.SeriesInstanceUID for each in evidence if len(each.ReferencedSOPSequence) > 100]

    found = report_labels(report, ReportPart.model_validate(suv | {"where": {"DCM:121401": "SRT:G-A437"}}))

    assert found.rows == tuple((each, "10.3814") for each in series)
    # The same derivation by its SNOMED CT code, which replaced the retired one.
    assert found == report_labels(
        report, ReportPart.model_validate(suv | {"where": {"DCM:121401": text(MAXIMUM)}})
    )


@pytest.mark.parametrize("name", ["reportsi.dcm", "reportsi_with_empty_number_tags.dcm", "test-SR.dcm"])
def test_reports_that_are_no_measurement_reports_are_refused(name: str) -> None:
    path = get_testdata_file(name)
    assert isinstance(path, str)

    assert refusal(read_report, Path(path).read_bytes()) in (Reason.SOP_CLASS, Reason.REPORT_TEMPLATE)


def test_all_that_highdicom_reads_is_there(tmp_path: Path) -> None:
    slices = a_volume()
    dataset = a_report(
        slices,
        [(LENGTH, 12.5, MM), (VOLUME, 0.25, Code("ml", "UCUM", "ml"))],
        about=slices[1:3],
        evaluations=[(STAGE, STAGE_2)],
        derivation=MEAN,
        finding=TUMOUR,
    )
    dataset.save_as(tmp_path / "sr.dcm")
    content: Any = hd.sr.srread(tmp_path / "sr.dcm").content
    (expected,) = content.get_image_measurement_groups()

    report = read_report((tmp_path / "sr.dcm").read_bytes())

    (group,) = report.groups
    numbers = [each for each in group.values if not isinstance(each.value, Concept)]
    assert [(each.name.value, each.value, each.unit) for each in numbers] == [
        (each.name.value, each.value, Concept(each.unit.scheme_designator, each.unit.value))
        for each in expected.get_measurements()
    ]
    assert all((Concept("DCM", "121401"), Concept("SCT", MEAN.value)) in each.modifiers for each in numbers)
    assert (Concept("SCT", STAGE.value), Concept("SCT", STAGE_2.value)) in group.codes
    assert Concept("SCT", TUMOUR.value) in [code for _, code in group.codes]
    assert group.instances == tuple(each.SOPInstanceUID for each in slices[1:3])
    assert report.series_of_instance == {each.SOPInstanceUID: each.SeriesInstanceUID for each in slices}
    assert report.study_of_series == {slices[0].SeriesInstanceUID: slices[0].StudyInstanceUID}


@pytest.mark.parametrize("level", ["SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"])
def test_label_holds_at_the_declared_level(level: str) -> None:
    slices = a_volume()
    dataset = a_report(slices, [(LENGTH, 12.5, MM)], about=slices[:2])

    found = labels_of(dataset, LENGTH, level=level)

    assert dict(found.rows) == {each[level].value: "12.5" for each in slices[:2]}
    assert found.unit == Concept("UCUM", "mm")
    assert not found.is_silent


def test_region_drawn_on_an_image_is_about_that_image() -> None:
    """Planar and volumetric regions: the images hang below the region, not below the group."""
    slices = a_volume()
    identifier = hd.sr.TrackingIdentifier(slices[0].SOPInstanceUID, "region")

    def region(image: Dataset) -> hd.sr.ImageRegion:
        source = hd.sr.SourceImageForRegion(image.SOPClassUID, image.SOPInstanceUID)
        corners = np.array([[1.0, 1.0], [5.0, 1.0], [5.0, 5.0], [1.0, 1.0]])
        return hd.sr.ImageRegion(hd.sr.GraphicTypeValues.POLYLINE, corners, source_image=source)

    measured = [hd.sr.Measurement(LENGTH, 3.5, MM)]
    planar = hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        identifier, referenced_region=region(slices[1]), measurements=measured
    )
    volumetric = hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        identifier, referenced_regions=[region(each) for each in slices[2:]], measurements=measured
    )

    for group, drawn_on in ((planar, slices[1:2]), (volumetric, slices[2:])):
        found = labels_of(a_report(slices, group=group), LENGTH, level="SOPInstanceUID")
        assert found.rows == tuple((each.SOPInstanceUID, "3.5") for each in drawn_on)


def test_codes_become_the_names_of_classes_and_others_stay_codes() -> None:
    slices = a_volume()
    classes = {text(STAGE_1): "small"}

    labels = [
        labels_of(a_report(slices, evaluations=[(STAGE, code)]), STAGE, classes=classes).rows[0][1]
        for code in (STAGE_1, STAGE_2)
    ]

    assert labels == ["small", text(STAGE_2)]


def test_conditions_tell_values_of_one_concept_apart() -> None:
    slices = a_volume()
    mean = a_report(slices, [(LENGTH, 1.0, MM)], derivation=MEAN, finding=TUMOUR)

    def labels(**where: str) -> ReportLabels:
        return labels_of(mean, LENGTH, where={key.replace("_", ":"): code for key, code in where.items()})

    assert labels(DCM_121401=text(MEAN)).rows
    assert labels(DCM_121401=text(MAXIMUM)).is_silent
    assert labels(DCM_121071=text(TUMOUR), DCM_121401=text(MEAN)).rows
    assert labels(DCM_121071=text(LIVER)).is_silent


def test_two_values_for_one_image_are_two_rows_which_the_join_calls_ambiguous() -> None:
    slices = a_volume()
    dataset = a_report(slices, [(LENGTH, 1.0, MM), (LENGTH, 2.0, MM)])

    assert [label for _, label in labels_of(dataset, LENGTH).rows] == ["1.0", "2.0"]


def test_report_that_says_nothing_of_the_concept_or_of_no_image() -> None:
    slices = a_volume()
    silent = labels_of(a_report(slices, [(LENGTH, 1.0, MM)]), VOLUME)
    nowhere = labels_of(a_report(slices, [(LENGTH, 1.0, MM)], about=()), LENGTH, level="SOPInstanceUID")

    assert (silent.rows, silent.is_silent, silent.without_image) == ((), True, False)
    assert (nowhere.rows, nowhere.is_silent, nowhere.without_image) == ((), False, True)


def test_report_about_no_image_in_particular_labels_what_it_looked_at_if_that_is_one_thing() -> None:
    """As highdicom reads the template; of several images, or series, none can be told apart."""
    slices, others = a_volume(), a_volume(name="other")
    one = a_report(slices, [(LENGTH, 1.0, MM)], about=())
    two = a_report([*slices, *others], [(LENGTH, 1.0, MM)], about=())

    assert labels_of(one, LENGTH).rows == ((slices[0].StudyInstanceUID, "1.0"),)
    assert labels_of(one, LENGTH, level="SeriesInstanceUID").rows == ((slices[0].SeriesInstanceUID, "1.0"),)
    assert labels_of(two, LENGTH, level="SeriesInstanceUID").without_image
    assert labels_of(two, LENGTH).rows == ((slices[0].StudyInstanceUID, "1.0"),)


def test_units_are_never_mixed_nor_converted() -> None:
    slices = a_volume()
    mixed = a_report(slices, [(LENGTH, 1.0, MM), (LENGTH, 0.2, CM)])

    assert refusal(labels_of, mixed, LENGTH) is Reason.REPORT_UNITS
    plain = a_report(slices, [(LENGTH, 1.0, MM)])
    assert refusal(labels_of, plain, LENGTH, unit="UCUM:cm") is Reason.REPORT_UNITS
    assert labels_of(plain, LENGTH, unit="UCUM:mm").rows
    assert one_unit([], None) is None


def test_unfinished_reports_count_unless_the_site_asks_for_finished_ones() -> None:
    slices = a_volume()
    partial = a_report(slices, [(LENGTH, 1.0, MM)], is_complete=False)
    complete = a_report(slices, [(LENGTH, 1.0, MM)])
    verified = a_report(slices, [(LENGTH, 1.0, MM)], is_verified=True)

    assert labels_of(partial, LENGTH).rows
    assert refusal(labels_of, partial, LENGTH, only_complete=True) is Reason.REPORT_UNFINISHED
    assert refusal(labels_of, complete, LENGTH, only_verified=True) is Reason.REPORT_UNFINISHED
    assert labels_of(verified, LENGTH, only_complete=True, only_verified=True).rows


def broken(change: Any) -> bytes:
    dataset = dcmread(io.BytesIO(written(a_report(a_volume(), [(LENGTH, 12.5, MM)]))))
    change(dataset)
    return written(dataset)


def _number_item(dataset: Dataset) -> Dataset:
    def search(item: Dataset) -> Dataset | None:
        for child in item.get("ContentSequence", []):
            found = child if child.ValueType == "NUM" else search(child)
            if found is not None:
                return found
        return None

    found = search(dataset)
    assert found is not None
    return found


def _no_number(dataset: Dataset) -> None:
    _number_item(dataset).MeasuredValueSequence[0]["NumericValue"]._value = "many"


def _two_numbers(dataset: Dataset) -> None:
    _number_item(dataset).MeasuredValueSequence[0].NumericValue = ["1", "2"]


def _another_template(dataset: Dataset) -> None:
    dataset.ConceptNameCodeSequence[0].CodeValue = "126001"


def _deep(dataset: Dataset) -> None:
    group = _number_item(dataset)
    for _ in range(40):
        inner = Dataset()
        inner.ValueType = "CONTAINER"
        group.ContentSequence = [inner]
        group = inner


def _wide(dataset: Dataset) -> None:
    item = Dataset()
    item.ValueType = "TEXT"
    _number_item(dataset).ContentSequence = [item] * 300


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_no_number, Reason.MALFORMED),
        (_two_numbers, Reason.MALFORMED),
        (_another_template, Reason.REPORT_TEMPLATE),
        (_deep, Reason.OVER_LIMIT),
        (_wide, Reason.OVER_LIMIT),
    ],
)
def test_damaged_reports_are_refused_by_name(
    change: Any, reason: Reason, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured_report, "_MAX_CONTENT_ITEMS", 250)

    assert refusal(read_report, broken(change)) is reason


def test_measurement_without_a_result_is_no_label() -> None:
    def without_result(dataset: Dataset) -> None:
        _number_item(dataset).MeasuredValueSequence = []

    found = report_labels(read_report(broken(without_result)), asked(LENGTH))

    assert found.is_silent


def test_other_objects_and_cut_files_are_refused() -> None:
    whole = broken(lambda dataset: None)

    assert refusal(read_report, written(a_segmentation(a_volume(), _mask()))) is Reason.SOP_CLASS
    for length in range(0, len(whole), 97):
        try:
            report: MeasurementReport | None = read_report(whole[:length])
        except UnusableImageError:
            report = None
        assert report is None or not report.groups


def _mask() -> Any:
    return np.ones((4, 12, 10), np.uint8)


def test_no_free_text_and_no_identifier_is_in_what_was_read() -> None:
    slices = a_volume()
    dataset = a_report(slices, [(LENGTH, 12.5, MM)], evaluations=[(STAGE, STAGE_1)], finding=SPLEEN)
    dataset.PatientID = "CNRYPATIENT"

    report = read_report(written(dataset))

    shown = repr(report) + repr(report_labels(report, asked(LENGTH)))
    assert "CNRY" not in shown
    assert slices[0].SOPInstanceUID not in shown
    assert "Length" not in shown
