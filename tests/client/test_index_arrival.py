"""A series that is still arriving is no shorter volume: it waits in quarantine until it is whole."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedward_client.cohort import open_cohort
from fedward_client.cohort_file import COHORT_FILE
from fedward_client.index import index_folder
from fedward_client.index_arrival import arriving_series
from fedward_client.index_records import ContentRecord, FileRecord, Found
from fedward_client.index_store import CaseIndex
from fedward_client.quarantine import quarantine_rows
from fedward_client.site_data import SiteData
from fedward_client.sources.folder import Candidate
from fedward_client.sources.manifest import Announcements, Manifest
from fedward_client.sources.settings import spool_root
from tests.builders import a_uid
from tests.client.series_builder import a_truth, slices_of
from tests.client.test_cohort_units import VOLUMES, a_place, add_series, label_series, reasons

QUICK = VOLUMES + "\n[arrival]\nsettle_s = 0.3\n"


def a_folder_of(tmp_path: Path, declaration: str, *, num_slices: int = 8) -> SiteData:
    site = a_place(tmp_path, declaration)
    add_series(site, "a", slices_of(a_truth(num_slices=num_slices)))
    add_series(site, "b", slices_of(a_truth(num_slices=num_slices)))
    label_series(site, "a", "b")
    return site


def num_slices(site: SiteData) -> list[int]:
    return sorted(case.num_frames for case in open_cohort(site).cases)


@pytest.fixture
def held_back(tmp_path: Path) -> Callable[..., Callable[[float], None]]:
    """Take the last slices of a series away; what it gives brings them when it is called."""

    def hold(site: SiteData, *names: str) -> Callable[[float], None]:
        for name in names:
            shutil.move(site.dicom / name, tmp_path / name)

        def bring(_: float) -> None:
            for name in names:
                shutil.copy2(tmp_path / name, site.dicom / name)

        return bring

    return hold


@pytest.mark.arriving
def test_a_folder_in_which_nothing_moves_is_looked_at_once(tmp_path: Path) -> None:
    site = a_folder_of(tmp_path, VOLUMES + "\n[arrival]\nsettle_s = 0.001\n")

    def waits(_: float) -> None:
        pytest.fail("waited for a folder that is at rest")

    newest_ns = max(each.stat().st_ctime_ns for each in site.dicom.iterdir())
    while time.time_ns() - newest_ns < 2e6:  # nothing moves for two milliseconds
        pass
    index_folder(site, waiting=waits)

    assert num_slices(site) == [8, 8]


@pytest.mark.arriving
def test_a_folder_that_was_just_copied_is_whole_after_a_second_look(tmp_path: Path) -> None:
    site = a_folder_of(tmp_path, QUICK)
    waits: list[float] = []

    summary = index_folder(site, waiting=waits.append)

    assert 0 <= waits[0] <= 0.3
    assert summary.num_read == 16
    assert num_slices(site) == [8, 8]


@pytest.mark.arriving
def test_a_series_that_grows_between_two_looks_is_still_arriving_and_then_is_not(
    tmp_path: Path, held_back: Callable[..., Callable[[float], None]]
) -> None:
    site = a_folder_of(tmp_path, QUICK)
    rest = held_back(site, "b006", "b007")  # copied with the time of the original, as rsync -a does

    summary = index_folder(site, waiting=rest)

    assert summary.num_read == 16
    assert num_slices(site) == [8]
    assert reasons(open_cohort(site)) == {"still_arriving": 8}
    (row,) = quarantine_rows(site)
    assert "still arriving" in row.meaning
    assert "cohort index" in row.remedy

    assert index_folder(site).num_read == 0
    assert num_slices(site) == [8, 8]


@pytest.mark.arriving
def test_a_slice_that_is_still_being_written_holds_up_the_series_of_its_folder(
    tmp_path: Path, held_back: Callable[..., Callable[[float], None]]
) -> None:
    site = a_folder_of(tmp_path, QUICK)
    (site.dicom / "far").mkdir()
    for number in range(8):
        (site.dicom / f"a{number:03d}").rename(site.dicom / "far" / f"{number}")
    whole = (site.dicom / "b007").read_bytes()

    def half(_: float) -> None:
        (site.dicom / "b007").write_bytes(whole[:140])

    index_folder(site, waiting=half)

    assert num_slices(site) == [8]
    assert reasons(open_cohort(site)) == {"no_uid": 1, "still_arriving": 7}


@pytest.mark.arriving
def test_a_log_file_that_grows_beside_the_images_holds_up_nothing(tmp_path: Path) -> None:
    site = a_folder_of(tmp_path, QUICK)

    def log(_: float) -> None:
        (site.dicom / "transfer.log").write_bytes(b"one more\n")

    index_folder(site, waiting=log)

    assert num_slices(site) == [8, 8]


@pytest.mark.arriving
def test_who_wants_to_wait_for_an_hour_is_not_kept_waiting(tmp_path: Path) -> None:
    site = a_folder_of(tmp_path, VOLUMES + "\n[arrival]\nsettle_s = 3600\n")

    index_folder(site, waiting=lambda _: pytest.fail("waited"))

    assert reasons_of_all(site) == {"still_arriving": 16}


@pytest.mark.arriving
def test_nothing_is_waited_for_where_the_site_says_so_or_cases_are_single_images(tmp_path: Path) -> None:
    at_once = a_folder_of(tmp_path / "one", VOLUMES + "\n[arrival]\nsettle_s = 0\n")
    images = a_folder_of(tmp_path / "two", 'modalities = ["CT"]\n')

    for site in (at_once, images):
        index_folder(site, waiting=lambda _: pytest.fail("waited"))

    assert num_slices(at_once) == [8, 8]
    assert reasons_of_all(images) == {}


def reasons_of_all(site: SiteData) -> dict[str, int]:
    """As the list of the operator says, who may have no case yet."""
    rows = quarantine_rows(site)
    return {
        row.reason.value: sum(each.num_files for each in rows if each.reason is row.reason) for row in rows
    }


def test_a_series_of_fewer_images_than_its_archive_announces_is_still_arriving(tmp_path: Path) -> None:
    site = a_folder_of(tmp_path, VOLUMES)
    spool_root(site.home).parent.mkdir()
    site.dicom.rename(spool_root(site.home))
    site = SiteData(site.home, spool_root(site.home), site.labels)
    series = {name: a_uid(f"series {name}") for name in "ab"}
    manifest = Manifest(spool_root(site.home).parent)
    manifest.announce(series["a"], 8)
    manifest.announce(series["b"], 9)

    index_folder(site)

    assert num_slices(site) == [8]
    (row,) = quarantine_rows(site)
    assert (row.reason.value, row.num_files) == ("still_arriving", 8)
    assert "NumberOfSeriesRelatedInstances" in row.meaning
    assert series["b"] not in repr(row)

    manifest.announce(series["b"], 8)
    manifest.close()
    index_folder(site)

    assert num_slices(site) == [8, 8]


def test_a_study_that_its_archive_is_still_receiving_is_still_arriving(tmp_path: Path) -> None:
    site = a_folder_of(tmp_path, VOLUMES)
    spool_root(site.home).parent.mkdir()
    site.dicom.rename(spool_root(site.home))
    site = SiteData(site.home, spool_root(site.home), site.labels)
    manifest = Manifest(spool_root(site.home).parent)
    manifest.may_grow(a_uid("study b"), 8, time.time())

    index_folder(site)

    assert num_slices(site) == [8]
    assert reasons(open_cohort(site)) == {"still_arriving": 8}
    manifest.grows_no_more([a_uid("study b")])
    manifest.close()
    index_folder(site)
    assert num_slices(site) == [8, 8]


def test_a_spool_left_from_before_holds_up_nothing_in_another_folder(tmp_path: Path) -> None:
    site = a_folder_of(tmp_path, VOLUMES)
    spool_root(site.home).mkdir(parents=True)
    manifest = Manifest(spool_root(site.home).parent)
    manifest.announce(a_uid("series a"), 9)
    manifest.may_grow(a_uid("study b"), 8, time.time())
    manifest.close()

    index_folder(site)

    assert num_slices(site) == [8, 8]


def test_an_acquisition_of_which_there_is_less_than_it_says_is_still_arriving(tmp_path: Path) -> None:
    site = a_place(tmp_path, VOLUMES)
    for name, said in (("a", 8), ("b", 9)):
        add_series(site, name, slices_of(a_truth(num_slices=8)), ImagesInAcquisition=said)
    label_series(site, "a", "b")

    index_folder(site)

    assert num_slices(site) == [8]
    (row,) = quarantine_rows(site)
    assert (row.reason.value, row.num_files) == ("still_arriving", 8)
    assert "ImagesInAcquisition" in row.meaning
    (site.home / COHORT_FILE).write_text(VOLUMES + "\n[arrival]\nimages_in_acquisition = false\n")
    index_folder(site)
    assert num_slices(site) == [8, 8]


def test_an_acquisition_may_be_spread_over_series_and_images_made_of_others_are_not_counted_on(
    tmp_path: Path,
) -> None:
    site = a_place(tmp_path, VOLUMES)
    study = {"StudyInstanceUID": "1.2.3", "PatientID": "P", "AcquisitionNumber": 2, "ImagesInAcquisition": 16}
    add_series(site, "a", slices_of(a_truth(num_slices=8)), **study)
    add_series(site, "b", slices_of(a_truth(num_slices=8)), **study)
    derived = {"ImageType": ["DERIVED", "PRIMARY", "REFORMATTED"], "ImagesInAcquisition": 300}
    add_series(site, "c", slices_of(a_truth(num_slices=4)), **derived)
    label_series(site, "a", "b", "c")

    index_folder(site)

    assert num_slices(site) == [4, 8, 8]


def test_numbers_that_no_acquisition_has_do_not_upset_the_count(tmp_path: Path) -> None:
    site = a_place(tmp_path, VOLUMES)
    add_series(site, "a", slices_of(a_truth(num_slices=4)))
    label_series(site, "a")
    huge = ContentRecord(
        *("multi_frame", "", "multi_frame", ""),
        series="1.2.3",
        study="1.2",
        image_type="ORIGINAL",
        images_in_acquisition=2**63 - 1,
        num_frames=2**62,
    )
    with CaseIndex(site.home) as index:
        files = [
            FileRecord(Candidate(b"%d" % number, 1, 1), f"{number:064}", Found(huge)) for number in range(4)
        ]
        index.record(files)
        found = arriving_series(index, [], Announcements(), count_acquisitions=True)

    assert found == {"1.2.3": "ImagesInAcquisition"}
