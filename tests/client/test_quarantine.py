"""What an operator reads about refused studies: label objects, left-out slices, ultrasound of many masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset

from fedward_client.cohort import open_cohort
from fedward_client.cohort_file import COHORT_FILE
from fedward_client.dicom.refusal import Reason
from fedward_client.index import index_folder
from fedward_client.pseudonyms import load_pseudonym_key, study_code_of
from fedward_client.quarantine import quarantine_rows, standing_of
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError
from tests.builders import a_dicom, a_site, a_uid
from tests.label_builders import LIVER, SPLEEN, a_segmentation, a_volume, written

SEGMENTS = """
unit = "volume"
modalities = ["CT"]
[labels]
source = "segmentations"
mask = { segment = "SCT:10200004" }
[labels.limits]
images_without_row = 0.9
"""


@pytest.fixture
def site(tmp_path: Path) -> SiteData:
    """Four CT studies with a segmentation each; that of study 3 marks another organ."""
    site = a_site(tmp_path, num_patients=0)
    for number in range(4):
        slices: list[Dataset] = a_volume(name=f"ct {number}")
        for each in slices:
            each.PatientID, each.StudyInstanceUID = f"P{number}", a_uid(f"study {number}")
        mask = np.zeros((4, 12, 10), np.uint8)
        mask[1, 3:6, 2:7] = 1
        marked = a_segmentation(slices, mask, types=(SPLEEN if number == 3 else LIVER,))
        for place, dataset in enumerate([*slices, marked]):
            (site.dicom / f"{number}-{place}.dcm").write_bytes(written(dataset))
    (site.home / COHORT_FILE).write_text(SEGMENTS)
    index_folder(site)
    return site


def test_label_objects_that_are_used_are_not_in_quarantine_and_others_have_a_reason(site: SiteData) -> None:
    (row,) = quarantine_rows(site, names=True)

    assert (row.reason, row.names) == (Reason.NO_SEGMENT, ("3-4.dcm",))
    assert row.study == study_code_of(load_pseudonym_key(site.home), a_uid("study 3"))


def test_the_cohort_counts_the_same_studies(site: SiteData) -> None:
    cohort = open_cohort(site)

    assert len(cohort.cases) == 3
    assert cohort.num_rejected() == 1
    assert cohort.num_unlabelled == 1
    assert [entry.reason for entry in cohort.quarantined] == [Reason.NO_SEGMENT]


def test_what_is_refused_is_listed_although_no_label_can_be_had(site: SiteData) -> None:
    for path in site.dicom.glob("*-4.dcm"):
        path.unlink()
    broken = site.dicom / "0-1.dcm"
    broken.write_bytes(broken.read_bytes()[:-20])
    index_folder(site)

    with pytest.raises(CohortError, match="none among the images"):
        open_cohort(site)

    assert {row.reason for row in quarantine_rows(site)} == {Reason.TRUNCATED, Reason.MISSING_SLICES}


def test_many_files_that_are_no_image_make_one_line(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    for number in range(30):
        (site.dicom / f"notes{number}.txt").write_bytes(b"no image %d" % number)
    (site.dicom / "empty.dcm").touch()
    index_folder(site)

    rows = quarantine_rows(site, names=True)

    assert sorted((row.reason.value, row.num_files) for row in rows) == [("empty", 1), ("not_dicom", 30)]
    (strays,) = (row for row in rows if row.num_files == 30)
    assert (strays.study, len(strays.names)) == ("", 30)


def test_what_is_counted_is_what_is_listed(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    (site.dicom / "notes.txt").write_bytes(b"no image")
    (site.dicom / "again.txt").write_bytes(b"no image")
    (site.dicom / "screen.dcm").write_bytes(a_dicom(PatientID="b", BurnedInAnnotation="YES"))
    index_folder(site, lambda *_: (site.dicom / "0-0.dcm").unlink(missing_ok=True))

    standing = standing_of(site)

    assert standing.quarantined == {"not_dicom": 2, "burned_in": 1, "changed": 1}
    assert (standing.num_quarantined, standing.num_images, standing.num_left_out) == (4, 15, 0)
    listed = {row.reason.value: row.num_files for row in quarantine_rows(site)}
    assert listed == standing.quarantined
