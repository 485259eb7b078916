"""Volumes out of a real PACS: the same through every source, and none cut short while it is arriving."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from pydicom import dcmread
from pydicom.filebase import DicomBytesIO

from fedward_client.cohort import Cohort, open_cohort
from fedward_client.index import index_folder
from fedward_client.quarantine import quarantine_rows
from fedward_client.site_data import SiteData
from fedward_client.sources.access import PacsAwayError
from fedward_client.sources.refresh import refresh_source
from fedward_client.sources.settings import FolderConfig, RemoteConfig, Selection
from fedward_common.errors import CohortError
from fedward_common.files import write_new
from fedward_common.plan import DataPart
from tests.integration.pacs import (
    HTTP_PORT,
    Hospital,
    Orthanc,
    a_study,
    everything_in,
    private_network,
    skip_unless_installed,
)
from tests.integration.pacs_faults import relay

pytestmark = pytest.mark.integration

Way = Literal["dicomweb", "get", "move"]
WAYS: tuple[Way, ...] = ("dicomweb", "get", "move")
RELAY_PORT = 15000
CT = Selection(modalities=("CT",))
SETTLE_S = 0.4


@pytest.fixture(scope="module", autouse=True)
def net() -> Iterator[None]:
    skip_unless_installed()
    with private_network():
        yield


@pytest.fixture
def hospital(tmp_path: Path) -> Iterator[Hospital]:
    """A PACS, empty."""
    mine = Hospital(Orthanc(tmp_path / "orthanc"), tmp_path)
    mine.orthanc.start()
    try:
        yield mine
    finally:
        mine.orthanc.stop()


def a_site(home: Path, config: FolderConfig | RemoteConfig, studies: list[list[bytes]]) -> SiteData:
    """A site of volumes, with a label for each series; every site has the same secret."""
    home.mkdir(parents=True)
    write_new(home / "pseudonym.key", bytes(range(32)))
    (home / "cohort.toml").write_text(
        f'unit = "volume"\nmodalities = ["CT"]\n[arrival]\nsettle_s = {SETTLE_S}\n'
    )
    series = [str(dcmread(DicomBytesIO(study[0])).SeriesInstanceUID) for study in studies]
    rows = [f"{uid},{number % 2}\n" for number, uid in enumerate(series)]
    (home / "labels.csv").write_text("".join(["SeriesInstanceUID,label\n", *rows]))
    return SiteData(home, config.images(home), home / "labels.csv")


def opened(site: SiteData) -> Cohort:
    return open_cohort(site, DataPart(modalities=("CT",)))


def slices_of(site: SiteData) -> list[int]:
    try:
        return sorted(case.num_frames for case in opened(site).cases)
    except CohortError:
        return []


def refused(site: SiteData) -> dict[str, int]:
    return {row.reason.value: row.num_files for row in quarantine_rows(site)}


def test_the_same_volumes_come_through_every_source(hospital: Hospital, tmp_path: Path) -> None:
    studies = [a_study(number, PatientID=f"P{number}", AccessionNumber=f"A{number}") for number in (5, 6, 8)]
    folder = tmp_path / "images"
    folder.mkdir()
    for number, data in enumerate(data for study in studies for data in study):
        (folder / f"{number}.dcm").write_bytes(data)
        hospital.orthanc.add([data])

    cohorts = []
    configs = {"folder": FolderConfig(path=folder)} | {way: hospital.config(way) for way in WAYS}
    for way, config in configs.items():
        site = a_site(tmp_path / way, config, studies)
        refresh_source(config, site.home, CT, settle_s=SETTLE_S)
        index_folder(site)
        assert quarantine_rows(site) == []
        # The PACS writes the file's own head anew, which no case but its digest depends on.
        cases = [replace(case, content="", parts=()) for case in opened(site).cases]
        cohorts.append(sorted(cases, key=lambda case: case.num_frames))

    assert [case.num_frames for case in cohorts[0]] == [5, 6, 8]
    assert len({case.case_id for case in cohorts[0]}) == 3
    for cohort in cohorts:
        assert cohort == cohorts[0]


@pytest.mark.parametrize("way", WAYS)
def test_a_study_that_the_pacs_itself_is_still_receiving_is_no_shorter_volume(
    hospital: Hospital, tmp_path: Path, way: Way
) -> None:
    study, whole = a_study(8), a_study(5)
    hospital.orthanc.add([*study[:6], *whole])
    site = a_site(tmp_path / "home", hospital.config(way), [study, whole])
    rest = study[6:]

    def the_scanner_sends_on(*_: int) -> None:
        while rest:
            hospital.orthanc.add([rest.pop()])

    refresh_source(hospital.config(way), site.home, CT, the_scanner_sends_on, settle_s=SETTLE_S)
    index_folder(site)

    assert len(everything_in(site.dicom)) == 13
    assert slices_of(site) == [5]
    assert refused(site) == {"still_arriving": 8}

    refresh_source(hospital.config(way), site.home, CT, settle_s=SETTLE_S)
    index_folder(site)
    assert slices_of(site) == [5, 8]


def test_a_series_that_broke_off_half_way_is_no_shorter_volume(hospital: Hospital, tmp_path: Path) -> None:
    study = a_study(40, rows=512)  # 21 MB; a dead process's socket still delivers 4
    hospital.orthanc.add(study)
    config = hospital.config("dicomweb", url=f"http://127.0.0.1:{RELAY_PORT}/dicom-web")
    site = a_site(tmp_path / "home", config, [study])

    with relay(RELAY_PORT, HTTP_PORT, 2_000_000, hospital.orthanc.stop), pytest.raises(PacsAwayError):
        refresh_source(config, site.home, CT, settle_s=SETTLE_S)
    index_folder(site)

    assert 3 <= len(everything_in(site.dicom)) < 40
    assert slices_of(site) == []
    assert set(refused(site)) == {"still_arriving"}

    hospital.orthanc.start()
    with relay(RELAY_PORT, HTTP_PORT, 10**12, lambda: None):
        refresh_source(config, site.home, CT, settle_s=SETTLE_S)
    index_folder(site)
    assert slices_of(site) == [40]
