"""Labels from objects among the images: read by decoder processes, joined, and made cases of."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from fedward_client.cohort import open_cohort
from fedward_client.dicom.refusal import Reason
from fedward_client.dicom.series import VolumeGeometry, group_series
from fedward_client.dicom.slice_facts import read_slice_facts
from fedward_client.index import index_folder
from fedward_client.index_store import CaseIndex
from fedward_client.label_join import join_labels
from fedward_client.label_sources import GatheredLabels, gather_labels
from fedward_client.labels import LabelConfig
from fedward_client.site_data import SiteData
from fedward_client.sources.folder import read_content
from fedward_common.errors import CohortError
from fedward_common.plan import DataPart
from tests.builders import a_uid, write_labels
from tests.label_builders import (
    LIVER,
    SPLEEN,
    a_report,
    a_segmentation,
    a_structure_set,
    a_volume,
    written,
)

LENGTH, MM = Code("410668003", "SCT", "Length"), Code("mm", "UCUM", "millimeter")
LIVER_TEXT, LENGTH_TEXT = "SCT:10200004", "SCT:410668003"
SEGMENTS: dict[str, Any] = {"source": "segmentations", "mask": {"segment": LIVER_TEXT}}
REPORTS: dict[str, Any] = {"source": "reports", "report": {"concept": LENGTH_TEXT}}


@pytest.fixture
def site(tmp_path: Path) -> SiteData:
    found = SiteData(tmp_path / "home", tmp_path / "dicom", tmp_path / "labels.csv")
    found.home.mkdir()
    found.dicom.mkdir()
    return found


def a_study(number: int, **options: Any) -> list[Dataset]:
    """CT of patient P<number>, in a study of its own."""
    slices = a_volume(name=f"ct {number}", **options)
    for each in slices:
        each.PatientID, each.StudyInstanceUID = f"P{number}", a_uid(f"study {number}")
    return slices


def put(site: SiteData, *datasets: Dataset) -> None:
    for dataset in datasets:
        (site.dicom / f"{len(list(site.dicom.iterdir()))}.dcm").write_bytes(written(dataset))


def volumes_of(site: SiteData, index: CaseIndex) -> list[VolumeGeometry]:
    """Volumes of every series, straight from the files."""
    names = index.file_names()
    slices: dict[str, list[Any]] = {}
    for image in index.images("image"):
        data = read_content(site.dicom, names[image.content]).data
        assert data is not None
        slices.setdefault(image.series, []).extend(read_slice_facts(data, image.content))
    return [volume for series in slices.values() for volume in group_series(series).volumes]


def gathered(site: SiteData, table: dict[str, Any], *, as_volumes: bool = False) -> GatheredLabels:
    index_folder(site)
    with CaseIndex(site.home) as index:
        volumes = volumes_of(site, index) if as_volumes else None
        return gather_labels(site, index, LabelConfig.model_validate(table), volumes)


def labels_by_key(found: GatheredLabels) -> dict[str, str]:
    return {row.key: row.label for row in found.labels.rows}


def a_mask(*marked: int, slices: int = 4) -> NDArray[np.uint8]:
    mask = np.zeros((slices, 12, 10), np.uint8)
    mask[list(marked), 3:6, 2:7] = 1
    return mask


def test_segmentation_labels_the_images_that_it_refers_to(site: SiteData) -> None:
    slices = a_study(1)
    put(site, *slices, a_segmentation(slices, a_mask(1, 2), omit_empty_frames=False))

    found = gathered(site, SEGMENTS)

    assert found.labels.key_column == "SOPInstanceUID"
    assert labels_by_key(found) == {
        each.SOPInstanceUID: str(int(index in (1, 2))) for index, each in enumerate(slices)
    }
    assert (found.num_objects, found.refused, found.warnings) == (1, (), ())


@pytest.mark.parametrize(("min_pixels", "label"), [(30, "1"), (31, "0")])
def test_segmentation_labels_the_volume_on_which_it_lies(site: SiteData, min_pixels: int, label: str) -> None:
    slices = a_study(1)
    put(site, *slices[::-1], a_segmentation(slices, a_mask(1, 2)))

    found = gathered(
        site, SEGMENTS | {"mask": {"segment": LIVER_TEXT, "min_pixels": min_pixels}}, as_volumes=True
    )

    assert found.labels.key_column == "SeriesInstanceUID"
    assert labels_by_key(found) == {slices[0].SeriesInstanceUID: label}


def test_structure_set_labels_the_volume_on_which_it_lies(site: SiteData) -> None:
    first, second = a_study(1), a_study(2)
    corners = np.array([[2.5, 2.5], [2.5, 6.5], [6.5, 6.5], [6.5, 2.5]])
    put(site, *first, a_structure_set(first, [(1, corners)]))
    put(site, *second, a_structure_set(second, [(2, corners)], name="PTV"))
    table = {"source": "structures", "mask": {"structure": "GTV"}}

    strict = gathered(site, table, as_volumes=True)
    lenient = gathered(
        site, {**table, "mask": {"structure": "GTV", "absent_is_empty": True}}, as_volumes=True
    )

    assert labels_by_key(strict) == {first[0].SeriesInstanceUID: "1"}
    assert [reason for _, reason in strict.refused] == [Reason.NO_SEGMENT]
    assert strict.warnings == (f"1 of 2 structures cannot be used: {Reason.NO_SEGMENT.meaning}",)
    assert labels_by_key(lenient) == {first[0].SeriesInstanceUID: "1", second[0].SeriesInstanceUID: "0"}


def test_reports_label_studies_and_numbers_become_classes(site: SiteData) -> None:
    studies = [a_study(number) for number in range(3)]
    for number, slices in enumerate(studies):
        put(site, *slices)
        put(site, a_report(slices, [(LENGTH, 10.0 * number, MM)]))

    plain = gathered(site, REPORTS)
    classes = gathered(site, REPORTS | {"cut_points": [10.0, 15.0]})

    def uid(number: int) -> str:
        return str(studies[number][0].StudyInstanceUID)

    assert labels_by_key(plain) == {uid(0): "0.0", uid(1): "10.0", uid(2): "20.0"}
    assert labels_by_key(classes) == {uid(0): "0", uid(1): "1", uid(2): "2"}


def test_reports_that_contradict_one_another_are_ambiguous_and_silent_ones_are_counted(
    site: SiteData,
) -> None:
    slices = a_study(1)
    reports = [a_report(slices, [(LENGTH, value, MM)]) for value in (1.0, 2.0)]
    put(site, *slices, *reports, a_report(slices, evaluations=[(SPLEEN, LIVER)]))

    found = gathered(site, REPORTS)

    assert found.warnings == ("1 of 3 reports do not have the concept that the cohort names",)
    with CaseIndex(site.home) as index:
        join = join_labels(found.labels, index.images("image"))
    assert len(join.ambiguous) == 2
    assert len(join.undecided) == 4


def test_reports_in_different_units_are_refused(site: SiteData) -> None:
    slices, others = a_study(1), a_study(2)
    centimetres = Code("cm", "UCUM", "centimeter")
    put(site, *slices, *others, a_report(slices, [(LENGTH, 1.0, MM)]))
    put(site, a_report(others, [(LENGTH, 1.0, centimetres)]))

    with pytest.raises(CohortError, match="several units"):
        gathered(site, REPORTS)


def _on_another_grid(slices: Sequence[Dataset]) -> Dataset:
    return a_segmentation(a_study(1, rows=14), np.ones((4, 14, 10), np.uint8))


def _of_images_that_are_not_here(slices: Sequence[Dataset]) -> Dataset:
    return a_segmentation(a_study(9), a_mask(1))


def _without_the_segment(slices: Sequence[Dataset]) -> Dataset:
    return a_segmentation(slices, a_mask(1), types=(SPLEEN,))


def _of_too_few_frames(slices: Sequence[Dataset]) -> Dataset:
    dataset = a_segmentation(slices, a_mask(1, 2))
    dataset.NumberOfFrames = 9
    return dataset


@pytest.mark.parametrize("as_volumes", [False, True])
def test_object_that_does_not_fit_labels_nothing_and_says_why(site: SiteData, as_volumes: bool) -> None:
    slices, others = a_study(1), a_study(2)
    broken = {
        _on_another_grid: Reason.LABEL_GRID,
        _of_images_that_are_not_here: Reason.LABEL_SOURCE,
        _without_the_segment: Reason.NO_SEGMENT,
        _of_too_few_frames: Reason.SEGMENTATION_FRAMES,
    }
    put(site, *slices, *others, a_segmentation(others, a_mask(1)))
    for number, make in enumerate(broken):
        dataset = make(slices)
        dataset.SOPInstanceUID = a_uid(f"broken {number}")
        put(site, dataset)

    found = gathered(site, SEGMENTS, as_volumes=as_volumes)

    assert sorted(reason for _, reason in found.refused) == sorted(broken.values())
    labelled = {each.SeriesInstanceUID if as_volumes else each.SOPInstanceUID for each in others}
    assert labels_by_key(found).keys() <= labelled
    assert "1" in labels_by_key(found).values()
    assert len(found.warnings) == len(broken)


def test_what_was_read_is_remembered_until_something_changes(
    site: SiteData, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = a_study(1)
    put(site, *slices, a_segmentation(slices, a_mask(1)), _without_the_segment(a_study(2)))
    first = gathered(site, SEGMENTS)

    with CaseIndex(site.home) as index, monkeypatch.context() as patch:
        patch.setattr("fedward_client.dicom.sandbox.DecodeSandbox", None)
        again = gather_labels(site, index, LabelConfig.model_validate(SEGMENTS))
        changed = SEGMENTS | {"mask": {"segment": LIVER_TEXT, "min_pixels": 2}}
        with pytest.raises(TypeError):
            gather_labels(site, index, LabelConfig.model_validate(changed))

    assert again == first
    other = a_study(3)
    put(site, *other, a_segmentation(other, a_mask(1)))
    assert len(gathered(site, SEGMENTS).labels.rows) > len(first.labels.rows)


def test_no_objects_and_a_key_that_is_no_volume_are_refused(site: SiteData) -> None:
    put(site, *a_study(1))
    with pytest.raises(CohortError, match="labels come from segmentations, and there is none") as caught:
        gathered(site, SEGMENTS)
    assert "cohort index" in caught.value.remedy
    write_labels(site.labels, [[a_uid("x"), 1]])
    with pytest.raises(CohortError, match="cases are volumes of many"):
        gathered(site, {}, as_volumes=True)
    with pytest.raises(CohortError, match="cases are single images"):
        gathered(site, {"source": "structures", "mask": {"structure": "GTV"}})


def test_file_that_changed_since_it_was_indexed_is_not_believed(site: SiteData) -> None:
    slices = a_study(1)
    put(site, *slices, a_segmentation(slices, a_mask(1)))
    index_folder(site)
    (site.dicom / "4.dcm").write_bytes(written(a_segmentation(slices, a_mask(2))))

    with CaseIndex(site.home) as index, pytest.raises(CohortError, match="changed or vanished"):
        gather_labels(site, index, LabelConfig.model_validate(SEGMENTS))


@pytest.mark.data
def test_real_segmentation_labels_its_real_images(site: SiteData, shared_data: Path) -> None:
    """Expected by hand: slices whose z lies where the object has a frame that is not empty."""
    folder = shared_data / "dicom-varied" / "dcmqi" / "segmentations"
    shutil.copytree(folder / "ct-3slice", site.dicom, dirs_exist_ok=True)
    shutil.copy(folder / "liver.dcm", site.dicom)
    dataset = dcmread(folder / "liver.dcm")
    heights = {
        float(group.PlanePositionSequence[0].ImagePositionPatient[2])
        for group, frame in zip(dataset.PerFrameFunctionalGroupsSequence, dataset.pixel_array, strict=True)
        if frame.any()
    }
    images = [dcmread(path, stop_before_pixels=True) for path in (folder / "ct-3slice").glob("*.dcm")]
    expected = {
        each.SOPInstanceUID: str(
            int(any(abs(float(each.ImagePositionPatient[2]) - height) < 0.01 for height in heights))
        )
        for each in images
    }

    assert labels_by_key(gathered(site, SEGMENTS)) == expected
    assert labels_by_key(gathered(site, SEGMENTS, as_volumes=True)) == {images[0].SeriesInstanceUID: "1"}


@pytest.mark.parametrize(
    ("labels", "unit"),
    [
        ('source = "segmentations"\nmask = { segment = "SCT:10200004", absent_is_empty = true }', "volume"),
        ('source = "reports"\ncut_points = [10.0]\nreport = { concept = "SCT:410668003" }', "image"),
        ('source = "csv"\nkey = "PatientID+StudyDate"', "image"),
        ('source = "csv"\nkey = "AccessionNumber"', "volume"),
    ],
)
def test_cohort_is_labelled_from_whatever_source_it_declares(site: SiteData, labels: str, unit: str) -> None:
    rows = []
    for number in range(4):
        slices = a_study(number)
        for each in slices:
            each.AccessionNumber = f"A{number}"
        positive = number % 2
        put(site, *slices, a_segmentation(slices, a_mask(1), types=(LIVER if positive else SPLEEN,)))
        put(site, a_report(slices, [(LENGTH, 20.0 * positive, MM)]))
        rows.append([f"P{number}", "2020-01-02", f"A{number}", positive])
    write_labels(site.labels, rows, ("PatientID", "StudyDate", "AccessionNumber", "label"))
    (site.home / "cohort.toml").write_text(f'unit = "{unit}"\nmodalities = ["CT"]\n[labels]\n{labels}\n')
    index_folder(site)

    cohort = open_cohort(site, DataPart(modalities=("CT",)), ("healthy", "ill"))

    assert [cohort.num_rows_unmatched, cohort.num_rows_ambiguous, cohort.num_unlabelled] == [0, 0, 0]
    assert len(cohort.cases) == (4 if unit == "volume" else 16)
    assert sum(case.label for case in cohort.cases) * 2 == len(cohort.cases)
    assert {case.day for case in cohort.cases} == {0}
    assert len({(case.patient, case.label) for case in cohort.cases}) == 4


def test_a_site_without_a_label_file_takes_labels_from_objects_and_is_told_where_it_needs_one(
    site: SiteData,
) -> None:
    slices = a_study(1)
    put(site, *slices, a_segmentation(slices, a_mask(1), types=(LIVER,)))
    declared = 'unit = "volume"\nmodalities = ["CT"]\n'
    from_masks = '[labels]\nsource = "segmentations"\nmask = { segment = "SCT:10200004" }\n'
    site = replace(site, label_file=None)
    (site.home / "cohort.toml").write_text(declared + from_masks)
    index_folder(site)
    assert len(open_cohort(site, DataPart(modalities=("CT",)), ("healthy", "ill")).cases) == 1

    (site.home / "cohort.toml").write_text(declared)
    with pytest.raises(CohortError, match="names none") as told:
        open_cohort(site, DataPart(modalities=("CT",)), ("healthy", "ill"))
    assert "`labels` in HOME/site.toml" in told.value.remedy
