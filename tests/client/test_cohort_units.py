"""Criteria, gate and geometry decide what may become a case; whatever is refused has a name."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import SecondaryCaptureImageStorage, UltrasoundImageStorage

from fedward_client import cohort_grouping
from fedward_client.cohort import Cohort, open_cohort
from fedward_client.cohort_counts import count_cases, leftovers
from fedward_client.cohort_file import COHORT_FILE, CohortFile
from fedward_client.cohort_units import Selected, select_units
from fedward_client.dicom.refusal import Reason
from fedward_client.exclusions import exclude_case
from fedward_client.index import index_folder
from fedward_client.index_store import INDEX_FILE, CaseIndex
from fedward_client.safe_export import files_of_cohort
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError
from fedward_common.plan import DataPart
from tests.builders import a_dataset, a_dicom, a_site, a_uid, encode, write_labels
from tests.client.series_builder import a_multiframe, a_truth, files_of, set_elements, slices_of

VOLUMES = 'unit = "volume"\nmodalities = ["CT"]\n'
CT = DataPart(modalities=("CT",), validation_fraction=0, test_fraction=0)


def a_place(tmp_path: Path, cohort_file: str = "") -> SiteData:
    """An empty site."""
    site = a_site(tmp_path, num_patients=0)
    (site.home / COHORT_FILE).write_text(cohort_file)
    return site


def add_series(site: SiteData, name: str, datasets: Sequence[Dataset], **elements: Any) -> None:
    """Put a series into the folder, its files named so that they say nothing."""
    for number, dataset in enumerate(datasets):
        dataset.SeriesInstanceUID = a_uid(f"series {name}")
        dataset.StudyInstanceUID = a_uid(f"study {name}")
        dataset.PatientID = f"patient {name}"
        dataset.SOPInstanceUID = a_uid(f"{name} {number}")
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        set_elements(dataset, elements)
        (site.dicom / f"{name}{number:03d}").write_bytes(files_of([dataset])[0])


def label_series(site: SiteData, *names: str) -> None:
    """Label series 0 and 1 by turns."""
    rows = [[a_uid(f"series {name}"), number % 2] for number, name in enumerate(names)]
    write_labels(site.labels, rows, ("SeriesInstanceUID", "label"))


def opened(site: SiteData, data: DataPart | None = None) -> Cohort:
    index_folder(site)
    return open_cohort(site, data)


def selected(site: SiteData, file: CohortFile, *modalities: str) -> Selected:
    index_folder(site)
    with CaseIndex(site.home) as index:
        return select_units(index, file, modalities)


def reasons(cohort: Cohort) -> Counter[str]:
    return Counter(entry.reason.value for entry in cohort.quarantined)


# --- criteria ---


def test_images_that_a_criterion_leaves_aside_are_counted_and_need_no_label(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=8, BodyPartExamined="CHEST", PatientAge="044Y")
    (site.dicom / "hand").write_bytes(a_dicom(PatientID="h", BodyPartExamined="HAND", PatientAge="044Y"))
    (site.dicom / "child").write_bytes(a_dicom(PatientID="c", BodyPartExamined="CHEST", PatientAge="004Y"))
    (site.dicom / "silent").write_bytes(a_dicom(PatientID="s"))
    (site.home / COHORT_FILE).write_text('body_parts = ["CHEST"]\nage_from = 18\n')

    cohort = opened(site)

    assert len(cohort.cases) == 16
    assert cohort.num_unmet == {"body part": 2, "age": 1}
    assert leftovers(cohort) == {"images of another age": "<5", "images of another body part": "<5"}
    assert {(case.body_part, case.view) for case in cohort.cases} == {("CHEST", "")}


def test_rows_of_images_that_are_left_aside_are_no_mistake(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=8, StudyDate="20190101")
    late = a_dataset(PatientID="late", StudyDate="20220101")
    (site.dicom / "late").write_bytes(encode(late))
    with site.labels.open("a") as file:
        file.write(f"{late.SOPInstanceUID},1\n")
    (site.home / COHORT_FILE).write_text("date_to = 2020-12-31\n")

    cohort = opened(site)

    assert len(cohort.cases) == 16
    assert (cohort.num_rows_without_image, cohort.num_rows_unmatched) == (0, 0)


def test_a_plan_and_a_site_both_have_to_want_a_modality(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=8)
    (site.home / COHORT_FILE).write_text('modalities = ["DX"]\n')

    with pytest.raises(CohortError, match="no usable labelled image"):
        opened(site, DataPart(modalities=("CR",)))


# --- the gate ---


def test_the_gate_decides_when_the_cohort_is_opened_and_no_file_is_read_again(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=8, ImageType=["DERIVED", "PRIMARY"])
    assert index_folder(site).num_images == 16
    assert len(open_cohort(site).cases) == 16

    (site.home / COHORT_FILE).write_text('[gate]\nderived = "quarantine"\n')
    summary = index_folder(site)

    assert (summary.num_read, summary.num_images) == (0, 0)
    assert summary.quarantined == {"derived_image": 16}
    with pytest.raises(CohortError, match="no usable"):
        open_cohort(site)


def test_an_image_without_signs_or_with_signs_that_make_no_sense_is_refused(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=8)
    index_folder(site)
    database = sqlite3.connect(site.home / INDEX_FILE)
    with database:
        database.execute("UPDATE contents SET signs_id = NULL WHERE patient = 'P0'")
        database.execute("INSERT INTO signs (id, facts) VALUES (99, '{}')")
        database.execute("UPDATE contents SET signs_id = 99 WHERE patient = 'P1'")
    database.close()

    cohort = open_cohort(site)

    assert len(cohort.cases) == 12
    assert reasons(cohort) == {"unreadable_signs": 4}
    assert cohort.num_rows_without_image == 4


def test_screen_captures_are_refused_by_name_and_lifted_by_name(tmp_path: Path) -> None:
    site = a_place(tmp_path, 'modalities = ["OT"]\n')
    rows = []
    for number in range(6):
        capture = a_dataset(
            np.full((16, 16), number, dtype=np.uint8),
            SOPClassUID=SecondaryCaptureImageStorage,
            Modality="OT",
            PatientID=f"P{number}",
            BurnedInAnnotation="NO",
        )
        (site.dicom / f"{number}").write_bytes(encode(capture))
        rows.append([capture.SOPInstanceUID, number % 2])
    write_labels(site.labels, rows)
    with pytest.raises(CohortError, match="no usable"):
        opened(site)

    with (site.home / COHORT_FILE).open("a") as file:
        file.write('[[gate.accept]]\nsop_class = "SecondaryCaptureImageStorage"\nfindings = ["text_class"]\n')

    assert len(opened(site).cases) == 6


def test_ultrasound_regions_reach_the_case_and_what_has_none_is_refused(tmp_path: Path) -> None:
    site = a_place(tmp_path, 'modalities = ["US"]\n')
    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = 1, 1, 0
    region.RegionLocationMinX0, region.RegionLocationMinY0 = 2, 3
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = 9, 11
    rows = []
    for number in range(4):
        elements: dict[str, Any] = {"Modality": "US", "PatientID": f"P{number}"}
        if number:
            elements["SequenceOfUltrasoundRegions"] = [region]
        pixels = np.full((16, 16), number, dtype=np.uint8)
        image = a_dataset(pixels, SOPClassUID=UltrasoundImageStorage, **elements)
        (site.dicom / f"{number}").write_bytes(encode(image))
        rows.append([image.SOPInstanceUID, number % 2])
    write_labels(site.labels, rows)

    cohort = opened(site)

    assert {case.regions for case in cohort.cases} == {((3, 2, 12, 10),)}
    assert reasons(cohort) == {"regions": 1}


def test_several_frames_are_no_picture(tmp_path: Path) -> None:
    site = a_place(tmp_path)
    add_series(site, "a", [a_multiframe([a_truth()])])
    add_series(site, "b", slices_of(a_truth(num_slices=3)))

    found = selected(site, CohortFile(modalities=("CT",)), "CT")

    assert len(found.units) == 3
    assert [entry.reason for entry in found.quarantined] == [Reason.MULTI_FRAME]


def test_a_mosaic_of_slices_is_no_picture(tmp_path: Path, shared_data: Path) -> None:
    site = a_place(tmp_path)
    mosaics = sorted((shared_data / "dicom-vendors" / "mr_siemens_mosaic").iterdir())
    for path in mosaics:
        shutil.copy(path, site.dicom)

    found = selected(site, CohortFile(modalities=("MR",)), "MR")

    assert found.units == ()
    assert [entry.reason for entry in found.quarantined] == [Reason.MULTI_FRAME] * len(mosaics)


# --- volumes ---


def test_each_series_is_one_volume_with_its_geometry(tmp_path: Path) -> None:
    site = a_place(tmp_path, VOLUMES)
    truth = a_truth(num_slices=7, spacing=(0.8, 0.7))
    for name in "abcdef":
        add_series(site, name, slices_of(truth), StudyDate="20190101", Manufacturer="Maker ", PatientSex="F")
    label_series(site, *"abcdef")

    cohort = opened(site)

    assert len(cohort.cases) == 6
    for case in cohort.cases:
        assert case.geometry is not None
        assert case.geometry.shape == (7, 13, 11)
        assert case.spacing_mm == pytest.approx((2.5, 0.8, 0.7))
        assert case.parts == tuple((each.content, 0) for each in case.geometry.slices)
        assert (case.num_frames, case.day, case.scanner) == (7, 0, "MAKER")
    assert len({case.content for case in cohort.cases}) == 6
    assert count_cases(cohort)["modality"] == {"CT": "6"}
    assert "2.25." not in repr(cohort)


def test_an_excluded_volume_stays_out_whatever_becomes_of_others_of_its_series(tmp_path: Path) -> None:
    site = a_place(tmp_path, VOLUMES)
    times = [
        slices_of(a_truth(seed=time), name=str(time), TemporalPositionIdentifier=time) for time in (1, 2)
    ]
    add_series(site, "a", [*times[0], *times[1]])
    add_series(site, "b", slices_of(a_truth(seed=3)))
    label_series(site, "a", "b")
    one, other = [case for case in opened(site, CT).cases if case.label == 0]
    exclude_case(site, one.case_id)
    assert {case.case_id for case in opened(site, CT).cases if case.label == 0} == {other.case_id}

    with CaseIndex(site.home) as index:
        names = index.file_names()
    for content, _ in other.parts:
        (site.dicom / os.fsdecode(names[content])).unlink()

    assert [case.label for case in opened(site, CT).cases] == [1]


def test_volumes_of_one_multi_frame_file_are_told_apart(tmp_path: Path) -> None:
    site = a_place(tmp_path, VOLUMES)
    add_series(site, "a", [a_multiframe([a_truth(), a_truth(seed=1)])])
    label_series(site, "a")

    cohort = opened(site)

    assert len(cohort.cases) == 2
    assert len({case.case_id for case in cohort.cases}) == 2
    assert len({part for case in cohort.cases for part in case.parts}) == 14
    assert len({content for case in cohort.cases for content, _ in case.parts}) == 1


def test_a_file_that_holds_an_excluded_volume_is_not_exported_for_the_sake_of_another(tmp_path: Path) -> None:
    site = a_place(tmp_path, VOLUMES)
    add_series(site, "a", [a_multiframe([a_truth(), a_truth(seed=1)])])
    add_series(site, "b", slices_of(a_truth(seed=3)))
    label_series(site, "a", "b")
    cohort = opened(site, CT)
    assert len(files_of_cohort(site)) == 8

    exclude_case(site, next(case.case_id for case in cohort.cases if case.label == 0))

    (other,) = [case for case in cohort.cases if case.label == 1]
    assert {each.content for each in files_of_cohort(site)} == {content for content, _ in other.parts}


def test_a_refused_series_is_in_quarantine_by_name_and_its_label_is_no_mistake(tmp_path: Path) -> None:
    site = a_place(tmp_path, VOLUMES)
    truth = a_truth(num_slices=9)
    add_series(site, "good", slices_of(truth))
    add_series(site, "gap", slices_of(truth.part([0, 1, 2, 3, 5, 6, 7, 8])))
    label_series(site, "good", "gap")

    cohort = opened(site)

    assert len(cohort.cases) == 1
    assert reasons(cohort) == {"missing_slices": 8}
    assert cohort.num_rejected() == 1
    assert cohort.num_rows_without_image == 1


def test_a_series_of_more_slices_than_fit_into_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = a_place(tmp_path, VOLUMES)
    add_series(site, "good", slices_of(a_truth(num_slices=9)))
    add_series(site, "huge", slices_of(a_truth(num_slices=12, seed=2)))
    label_series(site, "good", "huge")
    monkeypatch.setattr(cohort_grouping, "MAX_SLICES", 10)

    cohort = opened(site)

    assert len(cohort.cases) == 1
    assert reasons(cohort) == {"over_limit": 12}


def test_a_slice_that_is_left_out_of_a_used_volume_is_listed(tmp_path: Path) -> None:
    site = a_place(tmp_path, VOLUMES)
    slices = slices_of(a_truth(num_slices=9))
    scout = slices_of(a_truth(num_slices=1, origin=(0, 0, 0)), name="scout")
    set_elements(scout[0], {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]})
    add_series(site, "a", [*slices, *scout])
    label_series(site, "a")

    cohort = opened(site)

    (case,) = cohort.cases
    assert case.num_frames == 9
    assert [entry.reason for entry in cohort.left_out] == [Reason.LOCALIZER]
    assert cohort.quarantined == ()


def test_a_damaged_slice_makes_a_gap_and_both_have_a_reason(tmp_path: Path) -> None:
    site = a_place(tmp_path, VOLUMES)
    add_series(site, "a", slices_of(a_truth(num_slices=9)))
    add_series(site, "b", slices_of(a_truth(num_slices=9)))
    broken = site.dicom / "a004"
    broken.write_bytes(broken.read_bytes()[:-50])
    label_series(site, "a", "b")

    cohort = opened(site)

    assert len(cohort.cases) == 1
    assert reasons(cohort) == {"missing_slices": 8, "truncated": 1}


def test_a_series_whose_last_slice_is_damaged_is_no_shorter_volume(tmp_path: Path) -> None:
    site = a_place(tmp_path, VOLUMES)
    add_series(site, "a", slices_of(a_truth(num_slices=7)))
    add_series(site, "b", slices_of(a_truth(num_slices=7)))
    add_series(site, "c", slices_of(a_truth(num_slices=7)))
    broken, written_on = site.dicom / "a006", site.dicom / "b000"
    broken.write_bytes(broken.read_bytes()[:-50])
    image = dcmread(written_on)
    image.BurnedInAnnotation = "YES"
    image.save_as(written_on)
    label_series(site, "a", "b", "c")

    cohort = opened(site)

    assert [len(case.parts) for case in cohort.cases] == [7]
    assert reasons(cohort) == {"missing_slices": 12, "truncated": 1, "burned_in": 1}


@pytest.mark.parametrize("keyword", ["PatientID", "StudyInstanceUID"])
def test_one_series_of_two_patients_or_studies_is_refused(tmp_path: Path, keyword: str) -> None:
    site = a_place(tmp_path, VOLUMES)
    add_series(site, "good", slices_of(a_truth()))
    add_series(site, "torn", slices_of(a_truth()))
    last = slices_of(a_truth(num_slices=8))[7]
    last.SeriesInstanceUID, last.StudyInstanceUID = a_uid("series torn"), a_uid("study torn")
    last.PatientID = "patient torn"
    set_elements(last, {keyword: a_uid("another") if keyword.endswith("UID") else "another"})
    (site.dicom / "last").write_bytes(files_of([last])[0])
    label_series(site, "good", "torn")

    cohort = opened(site)

    assert len(cohort.cases) == 1
    assert reasons(cohort) == {"mixed_series": 8}


def test_a_series_whose_places_the_index_has_lost_is_refused(tmp_path: Path) -> None:
    site = a_place(tmp_path, VOLUMES)
    for name in "abc":
        add_series(site, name, slices_of(a_truth()))
    label_series(site, *"abc")
    index_folder(site)
    database = sqlite3.connect(site.home / INDEX_FILE)
    with database:
        series = {name: a_uid(f"series {name}") for name in "ab"}
        own = "content IN (SELECT content FROM contents WHERE series = ?)"
        database.execute(f"UPDATE slices SET facts = '[]' WHERE {own}", (series["a"],))
        database.execute(f"DELETE FROM slices WHERE {own}", (series["b"],))
    database.close()

    cohort = open_cohort(site)

    assert len(cohort.cases) == 1
    assert reasons(cohort) == {"frame_facts": 7, "no_position": 7}


def test_the_order_and_the_names_of_files_change_nothing(tmp_path: Path) -> None:
    first, second = a_place(tmp_path / "1", VOLUMES), a_place(tmp_path / "2", VOLUMES)
    truth = a_truth()
    add_series(first, "a", slices_of(truth))
    add_series(second, "a", slices_of(truth))
    for path in sorted(second.dicom.iterdir()):
        path.rename(path.with_name(path.name[::-1]))
    for site in (first, second):
        label_series(site, "a")

    one, other = opened(first), opened(second)

    assert [replace(case, case_id=other.cases[0].case_id, patient="") for case in one.cases] == [
        replace(case, patient="") for case in other.cases
    ]


def test_days_count_from_a_patients_first_study(tmp_path: Path) -> None:
    site = a_place(tmp_path, VOLUMES)
    dates = {"a": "20190301", "b": "20190101", "c": "20190101", "d": None}
    for name, date in dates.items():
        patient = "other" if name == "c" else "one"
        add_series(site, name, slices_of(a_truth()), StudyDate=date, PatientID=patient)
    label_series(site, *dates)

    cohort = opened(site)

    day_of = {}
    with CaseIndex(site.home) as index:
        series_of = {image.content: image.series for image in index.images("image")}
    for case in cohort.cases:
        day_of[series_of[case.parts[0][0]]] = case.day
    assert day_of == {
        a_uid(f"series {name}"): day for name, day in zip("abcd", (59, 0, 0, None), strict=True)
    }
    assert len({case.patient for case in cohort.cases}) == 2


def test_a_key_of_single_images_does_not_label_volumes(tmp_path: Path) -> None:
    site = a_place(tmp_path, VOLUMES)
    add_series(site, "a", slices_of(a_truth()))
    write_labels(site.labels, [[a_uid("a 0"), 1]])

    with pytest.raises(CohortError, match="SOPInstanceUID"):
        opened(site)


def test_copies_of_a_slice_are_used_once_and_listed(tmp_path: Path) -> None:
    site = a_place(tmp_path, VOLUMES)
    add_series(site, "a", slices_of(a_truth()))
    (site.dicom / "copy").write_bytes((site.dicom / "a003").read_bytes())
    label_series(site, "a")

    summary = index_folder(site)
    (case,) = open_cohort(site, CT).cases

    assert (summary.num_files, summary.num_copies, case.num_frames) == (8, 1, 7)


def test_limits_on_leftovers_turn_refusals_into_warnings(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=8)
    (site.dicom / "new").write_bytes(a_dicom(PatientID="new"))
    with site.labels.open("a") as file:
        file.write("1.2.3.4,1\n")
    with pytest.raises(CohortError):
        opened(site)

    limits = "[labels.limits]\nrows_without_image = 0.1\nimages_without_row = 0.1\n"
    (site.home / COHORT_FILE).write_text(limits)
    cohort = opened(site)

    assert (len(cohort.cases), cohort.num_rows_unmatched, cohort.num_unlabelled) == (16, 1, 1)
    assert len(cohort.warnings) == 2
