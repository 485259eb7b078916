"""The index: hostile files stand aside, only changed files are read, nothing identifying gets out."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian

from fedward_client import index as indexing
from fedward_client.cohort import count_cases, open_cohort
from fedward_client.dicom.refusal import Reason
from fedward_client.index import index_folder, list_quarantine
from fedward_client.index_store import INDEX_FILE, CaseIndex
from fedward_client.site_data import SiteData
from fedward_client.sources.folder import Content
from fedward_client.sources.folder import read_content as read_from_folder
from fedward_common.errors import CohortError
from tests.builders import a_dataset, a_dicom, a_disk_of, a_site, a_uid, canary_elements, encode, write_labels


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Names of the files that the index reads, as it reads them."""
    names: list[bytes] = []

    def read_content(root: Path, name: bytes) -> Content:
        names.append(name)
        return read_from_folder(root, name)

    monkeypatch.setattr(indexing, "read_content", read_content)
    return names


HOSTILE = {
    "empty.dcm": (b"", Reason.EMPTY),
    "notes.txt": (b"not an image", Reason.NOT_DICOM),
    "cut.dcm": (a_dicom(PatientID="cut")[:-20], Reason.TRUNCATED),
    "header_only.dcm": (a_dicom(PatientID="header")[:260], Reason.NO_UID),
    "huge.dcm": (a_dicom(PatientID="huge", Rows=65535, Columns=65535), Reason.DIMENSIONS),
    "bomb.dcm": (
        encode(a_dataset(EncapsulatedDocument=b"\0" * 80_000_000), DeflatedExplicitVRLittleEndian),
        Reason.DEFLATED,
    ),
    "ct.dcm": (a_dicom(PatientID="ct", SOPClassUID=CTImageStorage, Modality="CT"), Reason.SOP_CLASS),
    "wrong.dcm": (
        a_dicom(PatientID="wrong", SOPClassUID="1.2.840.10008.5.1.4.1.1.1", Modality="DX"),
        Reason.MISLABELLED,
    ),
}


def test_unusable_files_are_quarantined_by_content_and_the_others_go_on(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    for name, (data, _) in HOSTILE.items():
        (site.dicom / name).write_bytes(data)

    summary = index_folder(site)

    assert summary.num_images == 16
    found = {entry.content: entry.reason for entry in list_quarantine(site.home)}
    assert found == {hashlib.sha256(data).hexdigest(): reason for data, reason in HOSTILE.values()}
    assert summary.num_quarantined == len(HOSTILE)
    assert summary.quarantined[Reason.EMPTY] == 1
    assert all(entry.remedy and entry.num_files == 1 for entry in list_quarantine(site.home))


def test_pydicoms_own_test_files_never_stop_the_index(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    site = a_site(tmp_path)
    packaged = Path(pydicom.data.__file__).parent / "test_files"
    shutil.copytree(packaged, site.dicom / "packaged")
    files = [path for path in packaged.rglob("*") if path.is_file()]
    distinct = {hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    summary = index_folder(site)

    assert len(files) > 70
    assert summary.num_files == 16 + len(files)
    assert summary.num_images + summary.num_quarantined == 16 + len(distinct)
    assert "CT Image Storage" in {entry.kind for entry in list_quarantine(site.home)}
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_only_changed_files_are_read_again(tmp_path: Path, reads: list[bytes]) -> None:
    site = a_site(tmp_path)
    assert index_folder(site).num_read == len(reads) == 16

    reads.clear()
    assert index_folder(site).num_read == 0
    (site.dicom / "2-1.dcm").write_bytes(a_dicom(PatientID="new"))
    os.utime(site.dicom / "3-0.dcm", ns=(1, 1))
    (site.dicom / "5-0.dcm").unlink()
    summary = index_folder(site)

    assert reads == [b"2-1.dcm", b"3-0.dcm"]
    assert (summary.num_files, summary.num_read, summary.num_images) == (15, 2, 15)


def test_an_interrupted_run_continues_where_it_was(
    tmp_path: Path, reads: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "_BATCH", 5)
    site = a_site(tmp_path)

    def stop_at_ten(done: int, total: int) -> None:
        assert total == 16
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_folder(site, stop_at_ten)
    assert len(reads) == 10
    index_folder(site)

    assert len(reads) == 16
    assert len(set(reads)) == 16


def test_progress_counts_up_to_all_files(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    index_folder(a_site(tmp_path), lambda done, total: seen.append((done, total)))

    assert seen[-1] == (16, 16)
    assert seen == sorted(seen)


def test_copies_count_once_and_edited_copies_are_refused(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    shutil.copy(site.dicom / "0-0.dcm", site.dicom / "copy.dcm")
    assert index_folder(site).num_images == 16

    edited = a_dicom(np.ones((16, 16), dtype=np.uint8), SOPInstanceUID=a_uid("0-0"), PatientID="P0")
    (site.dicom / "edited.dcm").write_bytes(edited)
    summary = index_folder(site)
    assert (summary.num_images, dict(summary.quarantined)) == (15, {Reason.SAME_UID: 2})
    assert sorted(entry.num_files for entry in list_quarantine(site.home)) == [1, 2]

    (site.dicom / "edited.dcm").unlink()
    assert index_folder(site).num_images == 16


def test_a_file_that_vanishes_while_indexing_is_counted_and_tried_again(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    data = (site.dicom / "0-0.dcm").read_bytes()

    summary = index_folder(site, lambda done, _: (site.dicom / "0-0.dcm").unlink(missing_ok=True))
    assert (summary.num_unreadable, summary.num_images) == (1, 15)

    (site.dicom / "0-0.dcm").write_bytes(data)
    summary = index_folder(site)
    assert (summary.num_unreadable, summary.num_images, summary.num_read) == (0, 16, 1)


def test_quarantine_is_judged_again_when_decoders_change(
    tmp_path: Path, reads: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = a_site(tmp_path)
    (site.dicom / "bad.dcm").write_bytes(HOSTILE["cut.dcm"][0])
    index_folder(site)
    reads.clear()

    monkeypatch.setattr("fedward_client.dicom.decode.decoder_versions", lambda: ("newer",))
    summary = index_folder(site)

    assert reads == [b"bad.dcm"]
    assert (summary.num_images, summary.num_quarantined) == (16, 1)


def test_an_empty_folder_leaves_the_index_as_it_was(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    index_folder(site)
    unmounted = SiteData(site.home, tmp_path / "empty", site.labels)
    unmounted.dicom.mkdir()

    with pytest.raises(CohortError, match="no files"):
        index_folder(unmounted)

    with CaseIndex(site.home) as index:
        assert len(index.images()) == 16


def test_the_index_is_private_even_when_it_was_not(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    (site.home / INDEX_FILE).touch(0o666)

    index_folder(site)

    assert [stat.S_IMODE(path.stat().st_mode) for path in site.home.iterdir()] == [0o600]


def test_a_damaged_index_is_named_with_a_remedy(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    (site.home / INDEX_FILE).write_bytes(b"this is not a database" * 100)

    with pytest.raises(CohortError, match="index cannot be used") as caught:
        index_folder(site)

    assert INDEX_FILE in caught.value.remedy


def test_a_full_disk_is_a_clear_error_and_the_old_index_stays(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    index_folder(site)
    for number in range(300):
        data = a_dicom(np.full((16, 16), number, dtype=np.uint16), PatientID=f"N{number}")
        (site.dicom / f"new{number}.dcm").write_bytes(data)
    size = (site.home / INDEX_FILE).stat().st_size

    with a_disk_of(size), pytest.raises(CohortError, match="disk is full"):
        index_folder(site)

    with CaseIndex(site.home) as index:
        assert len(index.images()) == 16
    assert index_folder(site).num_images == 316


def test_an_index_of_another_schema_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = a_site(tmp_path)
    index_folder(site)

    monkeypatch.setattr("fedward_client.index_store.SCHEMA_VERSION", "next")

    assert index_folder(site).num_read == 16
    assert index_folder(site).num_read == 0


def test_no_text_of_a_header_and_no_file_name_leaves_the_index(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    site = a_site(tmp_path, num_patients=1, images_per_patient=1)
    canaries = canary_elements()
    folder = site.dicom / "CNRYFOLDER"
    folder.mkdir()
    rows: list[list[object]] = [[a_uid("0-0"), 0]]
    for number in range(3):
        dataset = a_dataset(np.full((16, 16), number, dtype=np.uint8), **canaries)
        data = encode(dataset, preamble=b"CNRYPREAMBLE")
        assert data.count(b"CNRY") > 300
        (folder / f"CNRYFILE{number}.dcm").write_bytes(data if number else data[:-9])
        rows.append([dataset.SOPInstanceUID, 1])
    write_labels(site.labels, rows)

    summary = index_folder(site)
    cohort = open_cohort(site)
    outputs = [repr(summary), repr(list_quarantine(site.home)), repr(cohort), repr(count_cases(cohort))]
    with CaseIndex(site.home) as index:
        outputs.append(repr(index.images()))

    assert summary.num_images == 3
    assert "CNRY" not in "".join(outputs)
    assert "2.25." not in "".join(outputs)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert b"CNRY" in (site.home / INDEX_FILE).read_bytes()  # the control: the index itself knows them


def test_counts_hide_small_numbers(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=3, PatientSex="F", StudyDate="20210405", PatientAge="044Y")
    index_folder(site)

    counts = count_cases(open_cohort(site))

    assert counts["label"] == {"0": "<5", "1": "<5"}
    assert counts["sex"] == {"F": "6"}
    assert counts["year"] == {"2021": "6"}
    assert counts["age"] == {"40-59": "6"}
    assert counts["modality"] == {"CR": "6"}
