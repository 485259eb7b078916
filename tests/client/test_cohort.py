"""The cohort: labels joined by key, patients on one side, nothing depending on the secret key."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward_client.cohort import Cohort, open_cohort, split_of_patient
from fedward_client.cohort_counts import count_cases
from fedward_client.index import index_folder
from fedward_client.index_store import CaseIndex
from fedward_client.pseudonyms import KEY_FILE
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError
from fedward_common.plan import DataPart
from tests.builders import a_dataset, a_dicom, a_site, a_uid, encode, write_labels

NAMES = ("normal", "pneumonia")


def cohort_of(site: SiteData, data: DataPart | None = None) -> Cohort:
    index_folder(site)
    return open_cohort(site, data, NAMES)


def rows_of(site: SiteData) -> list[list[str]]:
    with site.labels.open(newline="") as file:
        return list(csv.reader(file))[1:]


def patients_of_sides(site: SiteData, cohort: Cohort) -> dict[str, set[str]]:
    """Side -> patients, by looking the contents up in the index."""
    with CaseIndex(site.home) as index:
        patient_of = {image.content: image.keys["PatientID"] for image in index.images()}
    sides: dict[str, set[str]] = defaultdict(set)
    for case in cohort.cases:
        sides[case.split].add(patient_of[case.content])
    return sides


def test_labels_are_joined_by_key_and_cases_come_in_order_of_content(tmp_path: Path) -> None:
    site = a_site(tmp_path)

    cohort = cohort_of(site)

    with CaseIndex(site.home) as index:
        patient_of = {image.content: image.keys["PatientID"] for image in index.images()}
    assert len(cohort.cases) == 16
    assert [case.content for case in cohort.cases] == sorted(patient_of)
    assert all(case.label == int(patient_of[case.content][1:]) % 2 for case in cohort.cases)


def test_labels_may_be_names(tmp_path: Path) -> None:
    by_number, by_name = a_site(tmp_path / "a"), a_site(tmp_path / "b")
    write_labels(by_name.labels, [[uid, NAMES[int(label)]] for uid, label in rows_of(by_number)])

    labels = [[case.label for case in cohort_of(site).cases] for site in (by_number, by_name)]

    assert labels[0] == labels[1]


@pytest.mark.parametrize("column", ["PatientID", "StudyInstanceUID"])
def test_one_row_may_label_all_images_of_a_patient_or_study(tmp_path: Path, column: str) -> None:
    site = a_site(tmp_path, num_patients=0)
    rows = []
    for patient in range(6):
        study = a_uid(f"study {patient}")
        for image in range(2):
            data = a_dicom(
                PatientID=f"P{patient}", StudyInstanceUID=study, SOPInstanceUID=a_uid(f"{patient}.{image}")
            )
            (site.dicom / f"{patient}{image}").write_bytes(data)
        rows.append([f"P{patient}" if column == "PatientID" else study, patient % 2])
    write_labels(site.labels, rows, (column, "label"))

    cohort = cohort_of(site)

    assert len(cohort.cases) == 12
    assert sum(case.label for case in cohort.cases) == 6


def test_a_patient_is_never_on_two_sides(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=60, images_per_patient=3)

    sides = patients_of_sides(site, cohort_of(site))

    assert set(sides) == {"train", "validation", "test"}
    assert sum(len(patients) for patients in sides.values()) == 60


def test_division_order_and_labels_do_not_depend_on_the_secret_key(tmp_path: Path) -> None:
    first, second = a_site(tmp_path / "a", num_patients=30), a_site(tmp_path / "b", num_patients=30)

    one, other = cohort_of(first), cohort_of(second)

    assert (first.home / KEY_FILE).read_bytes() != (second.home / KEY_FILE).read_bytes()
    assert [(case.content, case.label, case.split) for case in one.cases] == [
        (case.content, case.label, case.split) for case in other.cases
    ]
    assert not {case.case_id for case in one.cases} & {case.case_id for case in other.cases}


def test_division_is_the_same_after_a_restart_and_when_patients_arrive(tmp_path: Path) -> None:
    small, large = a_site(tmp_path / "a", num_patients=20), a_site(tmp_path / "b", num_patients=40)
    before = {case.content: case.split for case in cohort_of(small).cases}

    after = {case.content: case.split for case in cohort_of(large).cases}

    assert {content: after[content] for content in before} == before
    assert {case.content: case.split for case in cohort_of(small).cases} == before


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 0.4), st.floats(0, 0.5), st.integers(0, 2**32 - 1), st.text(min_size=1, max_size=8))
def test_fractions_hold_over_many_patients(validation: float, test: float, seed: int, prefix: str) -> None:
    data = DataPart(validation_fraction=validation, test_fraction=test, split_seed=seed)

    sides = [split_of_patient(f"{prefix}{number}", data) for number in range(2000)]

    assert abs(sides.count("validation") / 2000 - validation) < 0.06
    assert abs(sides.count("test") / 2000 - test) < 0.06


def test_another_seed_divides_differently(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=40)

    sides = [[case.split for case in cohort_of(site, DataPart(split_seed=seed)).cases] for seed in (0, 1)]

    assert sides[0] != sides[1]


def test_the_label_files_own_split_wins(tmp_path: Path) -> None:
    site = a_site(tmp_path, split=lambda patient: ("train", "validation", "test")[patient % 3])

    sides = patients_of_sides(site, cohort_of(site))

    assert sides == {"train": {"P0", "P3", "P6"}, "validation": {"P1", "P4", "P7"}, "test": {"P2", "P5"}}


def test_a_patient_on_two_sides_is_refused_by_pseudonym(tmp_path: Path) -> None:
    site = a_site(tmp_path, split=lambda patient: "train")
    rows = rows_of(site)
    rows[4][2] = "test"
    write_labels(site.labels, rows, ("SOPInstanceUID", "label", "split"))

    with pytest.raises(CohortError, match="one patient on two sides: 2 images") as caught:
        cohort_of(site)

    for row in rows:
        row[2] = "train"
    write_labels(site.labels, rows, ("SOPInstanceUID", "label", "split"))
    case_ids = [case.case_id for case in cohort_of(site).cases]
    assert sum(case_id in caught.value.message for case_id in case_ids) == 2
    assert rows[4][0] not in caught.value.message
    assert "P2" not in caught.value.message


def test_rows_without_image_and_bad_labels_are_refused_with_their_row(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    good = rows_of(site)

    write_labels(site.labels, [*good, ["1.2.3.4", 0]])
    with pytest.raises(CohortError, match="row 18: SOPInstanceUID matches no image") as caught:
        cohort_of(site)
    assert "1.2.3.4" not in caught.value.message

    write_labels(site.labels, [*good[:3], [good[3][0], "2"], *good[4:]])
    with pytest.raises(CohortError, match="row 5: label is neither") as caught:
        cohort_of(site)
    assert "normal, pneumonia" in caught.value.remedy

    write_labels(site.labels, [*good, good[0]])
    with pytest.raises(CohortError, match="row 18: duplicate SOPInstanceUID, first in row 2"):
        cohort_of(site)


def test_images_without_a_row_are_refused_and_counted(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    write_labels(site.labels, rows_of(site)[3:])

    with pytest.raises(CohortError, match="3 of 16 images have no row"):
        cohort_of(site)


def test_rows_of_quarantined_images_are_no_mistake(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    cut = site.dicom / "0-0.dcm"
    cut.write_bytes(cut.read_bytes()[:-30])  # header still readable
    (site.dicom / "1-0.dcm").write_bytes(b"")  # nothing readable: one row more may miss its image

    cohort = cohort_of(site)

    assert len(cohort.cases) == 14
    assert (cohort.num_rows_without_image, cohort.num_rows_unmatched) == (1, 1)  # no row counts twice
    write_labels(site.labels, [*rows_of(site), ["1.2.3.4", 0]])
    with pytest.raises(CohortError, match="row 18"):
        cohort_of(site)


def test_quarantined_images_need_no_row(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    (site.dicom / "burned.dcm").write_bytes(a_dicom(BurnedInAnnotation="YES"))
    (site.dicom / "stray.txt").write_text("notes")

    assert len(cohort_of(site).cases) == 16


def test_a_stray_text_file_excuses_no_row(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    (site.dicom / "stray.txt").write_text("notes")
    write_labels(site.labels, [*rows_of(site), ["1.2.3.4", 0]])

    with pytest.raises(CohortError, match="row 18"):
        cohort_of(site)


def test_only_wanted_modalities_become_cases(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    data = a_dicom(Modality="DX", PatientID="D", SOPInstanceUID="1.2.3")
    (site.dicom / "dx.dcm").write_bytes(data)
    write_labels(site.labels, [*rows_of(site), ["1.2.3", 1]])

    assert len(cohort_of(site, DataPart(modalities=("DX",))).cases) == 1
    assert len(cohort_of(site, DataPart(modalities=("CR",))).cases) == 16
    with pytest.raises(CohortError, match="no usable labelled image of modality MG"):
        cohort_of(site, DataPart(modalities=("MG",)))


def test_without_a_plan_the_files_own_labels_are_the_classes(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    index_folder(site)

    cohort = open_cohort(site)

    assert cohort.label_names == ("0", "1")
    assert count_cases(cohort)["label"] == {"0": "8", "1": "8"}
    assert count_cases(cohort)["age"] == {"unknown": "16"}


def test_patient_numbers_with_odd_bytes_do_not_stop_the_site(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    data = encode(a_dataset(PatientID="ODDBYTES", SOPInstanceUID="1.2.3"))
    (site.dicom / "odd.dcm").write_bytes(data.replace(b"ODDBYTES", b"\xff\xfe\xed\xa0\x80\x00AB"))
    write_labels(site.labels, [*rows_of(site), ["1.2.3", 1]])

    assert len(cohort_of(site).cases) == 17
