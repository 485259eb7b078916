"""The index: hostile files stand aside, only changed files are read, nothing identifying gets out."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian

from fedward_client import index as indexing
from fedward_client.cohort import open_cohort
from fedward_client.cohort_counts import count_cases
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.sandbox import SiteFile
from fedward_client.index import index_folder, list_quarantine
from fedward_client.index_store import INDEX_FILE, CaseIndex
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError
from tests.builders import a_dataset, a_dicom, a_disk_of, a_site, a_uid, canary_elements, encode, write_labels
from tests.integration.deployment import alive, children, wait_for

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


def test_only_changed_files_are_read_again(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    assert index_folder(site).num_read == 16

    assert index_folder(site).num_read == 0
    (site.dicom / "2-1.dcm").write_bytes(a_dicom(PatientID="new"))
    os.utime(site.dicom / "3-0.dcm", ns=(1, 1))
    (site.dicom / "5-0.dcm").unlink()
    summary = index_folder(site)

    assert (summary.num_files, summary.num_read, summary.num_images) == (15, 2, 15)


def test_an_interrupted_run_continues_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "_BATCH", 5)
    site = a_site(tmp_path)

    def stop_at_ten(done: int, total: int) -> None:
        assert total == 16
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_folder(site, stop_at_ten)
    summary = index_folder(site)

    assert (summary.num_read, summary.num_images) == (6, 16)


KILLED = """
import sys
from pathlib import Path
from fedward_client import index
from fedward_client.site_data import SiteData
index._BATCH = 20
root = Path(sys.argv[1])
site = SiteData(root / "home", root / "dicom", root / "labels.csv")
index.index_folder(site, lambda done, total: print(done, flush=True), num_processes=2)
"""


def test_a_run_that_is_killed_continues_where_it_was_and_leaves_no_process(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=200, images_per_patient=2)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        done = next(number for number in map(int, process.stdout) if number >= 40)
        readers = children(process.pid)
        process.kill()
    summary = index_folder(site)

    assert 40 <= done <= 380
    assert 0 < summary.num_read <= 400 - done
    assert summary.num_images == 400
    assert len(readers) == 2
    wait_for(lambda: not any(map(alive, readers)), "the readers to end")


def test_several_processes_find_what_one_finds(tmp_path: Path) -> None:
    one, several = a_site(tmp_path / "1", num_patients=120), a_site(tmp_path / "2", num_patients=120)
    for site in (one, several):
        for name, (data, _) in HOSTILE.items():
            (site.dicom / name).write_bytes(data)

    assert index_folder(one, num_processes=1) == index_folder(several, num_processes=3)
    assert list_quarantine(one.home) == list_quarantine(several.home)
    assert open_cohort(one).of("train")[0].content == open_cohort(several).of("train")[0].content


def test_nothing_is_read_and_no_process_started_when_nothing_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = a_site(tmp_path)
    (site.dicom / "bad.dcm").write_bytes(HOSTILE["cut.dcm"][0])
    first = index_folder(site)

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(CaseIndex, "known_files", refuse)
    monkeypatch.setattr("fedward_client.dicom.sandbox.DecodeSandbox", refuse)
    again = index_folder(site)

    assert again == replace(first, num_read=0)


def test_a_file_that_takes_its_reader_down_is_quarantined_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = a_site(tmp_path)
    (site.dicom / "evil.dcm").write_bytes(a_dicom(PatientID="evil"))
    (site.dicom / "fast.dcm").write_bytes(b"")

    def outcomes(_: object, files: Iterable[SiteFile], what: str) -> Iterator[object]:
        assert what == "facts"
        for file in files:
            if file.name == b"fast.dcm":
                (site.dicom / "fast.dcm").unlink()
            yield UnusableImageError(Reason.OVER_LIMIT)

    with monkeypatch.context() as patched:
        patched.setattr("fedward_client.dicom.sandbox.DecodeSandbox.map", outcomes)
        summary = index_folder(site)

    assert (summary.num_read, summary.num_unreadable) == (18, 1)
    assert summary.quarantined == {Reason.OVER_LIMIT: 17}
    assert index_folder(site).num_read == 0


def test_a_process_with_an_older_listing_cannot_make_images_vanish_unnoticed(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    index_folder(site)
    older = {path.name.encode() for path in site.dicom.iterdir()}
    (site.dicom / "new.dcm").write_bytes(a_dicom(PatientID="new"))
    index_folder(site)

    with CaseIndex(site.home) as index:
        index.settle(older, "older")
    again = index_folder(site)
    with CaseIndex(site.home) as index:
        index.settle(older | {b"newer.dcm"}, "listing with a file that is not known")
        assert index.setting("listing") == ""

    assert (again.num_read, again.num_images) == (1, 17)


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = a_site(tmp_path)
    (site.dicom / "bad.dcm").write_bytes(HOSTILE["cut.dcm"][0])
    index_folder(site)

    monkeypatch.setattr("fedward_client.dicom.decode.decoder_versions", lambda: ("newer",))
    summary = index_folder(site)

    assert (summary.num_read, summary.num_images, summary.num_quarantined) == (1, 16, 1)


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

    with pytest.raises(CohortError, match="is damaged") as caught:
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

    monkeypatch.setattr("fedward_client.index_schema.SCHEMA_VERSION", "next")

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
    counts = count_cases(cohort)
    assert "CNRY" in repr(counts.pop("scanner"))  # what the operator asks for: maker and model, no more
    outputs = [repr(summary), repr(list_quarantine(site.home)), repr(cohort), repr(counts)]
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


def test_a_dicomdir_is_named_as_such(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=1)
    listing = Path(str(pydicom.data.get_testdata_file("DICOMDIR")))
    (site.dicom / "DICOMDIR").write_bytes(listing.read_bytes())

    summary = index_folder(site)

    assert summary.quarantined == {"directory": 1}


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("PRAGMA query_only = 1", "cannot be opened for writing"),
        ("PRAGMA max_page_count = 1", "disk is full"),
    ],
)
def test_each_fault_of_the_index_file_has_its_own_remedy(tmp_path: Path, statement: str, what: str) -> None:
    with CaseIndex(tmp_path) as index:
        index.database.write(statement)
        with pytest.raises(CohortError, match=what) as told:
            index.remember("listing", "x" * 1_000_000)

    assert INDEX_FILE in told.value.message
    assert told.value.remedy


def test_an_index_that_another_process_holds_is_no_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedward_client.index_database._BUSY_S", 0.01)
    with (
        CaseIndex(tmp_path) as first,
        CaseIndex(tmp_path) as second,
        first.database.transaction(),
        pytest.raises(CohortError, match="in use by another process") as told,
    ):
        second.remember("listing", "")

    assert "delete" not in told.value.remedy.lower()
