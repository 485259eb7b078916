"""The three sources against a real PACS: the same cohort, nothing lost, nothing twice, every fault named."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid

from fedward_client.cohort import open_cohort
from fedward_client.index import index_folder
from fedward_client.site_data import SiteData
from fedward_client.sources.checks import check_source
from fedward_client.sources.manifest import Refusal
from fedward_client.sources.refresh import refresh_source
from fedward_client.sources.settings import FolderConfig, RemoteConfig, Selection, Tls
from fedward_client.sources.spool import Spool
from fedward_common.errors import (
    ConnectionLostError,
    FederationError,
    StorageError,
    UsageError,
)
from fedward_common.files import write_new
from tests.builders import a_dicom, a_uid
from tests.integration.pacs import (
    DICOM_PORT,
    EVERYTHING,
    HTTP_PORT,
    OUR_AE_TITLE,
    OUR_PORT,
    PASSWORD,
    Hospital,
    Orthanc,
    a_study,
    bundled_studies,
    everything_in,
    pixels_of,
    private_network,
    skip_unless_installed,
    uid_of,
)
from tests.integration.pacs_faults import (
    Answer,
    Certificates,
    Gateway,
    asking_for_certificates,
    make_certificates,
    relay,
)

pytestmark = pytest.mark.integration

Way = Literal["dicomweb", "get", "move"]
WAYS: tuple[Way, ...] = ("dicomweb", "get", "move")
RELAY_PORT = 15000


@pytest.fixture(scope="module", autouse=True)
def net() -> Iterator[None]:
    skip_unless_installed()
    with private_network():
        yield


@pytest.fixture(scope="module")
def hospital(net: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospital]:
    """A PACS with compressed and uncompressed studies that no test changes."""
    folder = tmp_path_factory.mktemp("hospital")
    orthanc = Orthanc(folder / "orthanc")
    orthanc.start()
    try:
        orthanc.add(STUDIES)
        yield Hospital(orthanc, folder)
    finally:
        orthanc.stop()


@pytest.fixture
def own(net: None, hospital: Hospital, tmp_path: Path) -> Iterator[Hospital]:
    """A PACS of the test's own, empty, which it may kill."""
    hospital.orthanc.stop()
    mine = Hospital(Orthanc(tmp_path / "orthanc"), tmp_path)
    mine.orthanc.start()
    try:
        yield mine
    finally:
        mine.orthanc.stop()
        hospital.orthanc.start()


SYNTHETIC = [*a_study(6, num_series=2), *a_study(3, date="20230115", Modality="MR", AccessionNumber="B-2")]
STUDIES = [*bundled_studies(), *SYNTHETIC]
RADIOGRAPHS = [
    a_dicom(
        Modality="DX",
        PatientID=f"DX-{number}",
        StudyInstanceUID=a_uid(f"dx study {number}"),
        SeriesInstanceUID=a_uid(f"dx series {number}"),
    )
    for number in range(6)
]
"""Without dates, so that `EVERYTHING` leaves them out."""


# --- the same cohort through every source ---


def test_same_studies_come_through_every_source(hospital: Hospital, tmp_path: Path) -> None:
    expected = {uid_of(data): pixels_of(data) for data in STUDIES}
    assert len(expected) == len(STUDIES)

    for way in WAYS:
        retrieved = hospital.refresh(way)
        assert (retrieved.num_new, retrieved.num_missing) == (len(STUDIES), 0)
        assert {uid: pixels_of(data) for uid, data in hospital.files(way).items()} == expected


def test_the_same_studies_make_the_same_cohort_through_every_source(
    hospital: Hospital, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, data in enumerate(RADIOGRAPHS):
        (folder / f"{number}.dcm").write_bytes(data)
    labels = tmp_path / "labels.csv"
    rows = [f"{uid_of(data)},{number % 2}\n" for number, data in enumerate(RADIOGRAPHS)]
    labels.write_text("".join(["SOPInstanceUID,label\n", *rows]))
    hospital.orthanc.add(RADIOGRAPHS)
    wanted = Selection(modalities=("DX",))

    cohorts = []
    configs = {"folder": FolderConfig(path=folder)} | {way: hospital.config(way) for way in WAYS}
    for way, config in configs.items():
        home = tmp_path / way
        home.mkdir()
        write_new(home / "pseudonym.key", bytes(range(32)))
        refresh_source(config, home, wanted)
        site = SiteData(home, config.images(home), labels)
        assert index_folder(site).num_quarantined == 0
        cohorts.append([(case.case_id, case.label, case.split) for case in open_cohort(site).cases])

    assert len(cohorts[0]) == len(RADIOGRAPHS)
    assert all(sorted(cohort) == sorted(cohorts[0]) for cohort in cohorts)


def test_what_the_pacs_does_not_rewrite_has_one_digest_however_it_came(hospital: Hospital) -> None:
    synthetic = {uid_of(data) for data in SYNTHETIC}
    digests = []
    for way in WAYS:
        hospital.refresh(way)
        files = hospital.files(way)
        digests.append({hashlib.sha256(files[uid]).hexdigest() for uid in synthetic})

    assert len(digests[0]) == len(synthetic)
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("way", WAYS)
def test_compressed_studies_stay_as_they_are_stored(hospital: Hospital, way: Way) -> None:
    hospital.refresh(way)
    files = hospital.files(way)

    for data in STUDIES:
        stored, came = dcmread(BytesIO(data)), dcmread(BytesIO(files[uid_of(data)]))
        assert came.file_meta.TransferSyntaxUID == stored.file_meta.TransferSyntaxUID
        assert came.PixelData == stored.PixelData or came.file_meta.TransferSyntaxUID.is_encapsulated


@pytest.mark.parametrize("way", WAYS)
def test_spool_is_private_and_its_names_say_nothing(hospital: Hospital, way: Way) -> None:
    hospital.refresh(way)
    spool = hospital.home(way) / "spool"

    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in (spool, *spool.rglob("*/")))
    files = everything_in(spool / "files")
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in everything_in(spool))
    assert all(path.name == hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    assert len(files) == len(STUDIES)
    assert list((spool / "drafts").iterdir()) == []


# --- only what is new ---


@pytest.mark.parametrize("way", WAYS)
def test_next_run_lists_and_fetches_only_what_is_new(own: Hospital, way: Way) -> None:
    first, second = a_study(4), a_study(2)
    own.orthanc.add(first)
    assert own.refresh(way).num_new == 4

    unchanged = own.refresh(way)
    assert (unchanged.num_studies, unchanged.num_instances, unchanged.num_new) == (1, 0, 0)

    own.orthanc.add(second)
    more = own.refresh(way)
    assert (more.num_studies, more.num_instances, more.num_new) == (2, 2, 2)

    one_more = dcmread(BytesIO(first[0]))
    one_more.SOPInstanceUID = generate_uid()
    buffer = BytesIO()
    one_more.file_meta.MediaStorageSOPInstanceUID = one_more.SOPInstanceUID
    one_more.save_as(buffer)
    own.orthanc.add([buffer.getvalue()])
    grown = own.refresh(way)
    assert (grown.num_instances, grown.num_new) == (5, 1)
    assert set(own.files(way)) == {uid_of(data) for data in (*first, *second, buffer.getvalue())}


@pytest.mark.parametrize("way", WAYS)
def test_what_was_lost_from_the_spool_is_fetched_again(own: Hospital, way: Way) -> None:
    own.orthanc.add(a_study(3))
    own.refresh(way)
    everything_in(own.home(way) / "spool" / "files")[0].unlink()

    assert own.refresh(way).num_new == 1
    assert len(own.files(way)) == 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(modalities=("MR",), date_from=date(2023, 1, 15), date_to=date(2023, 1, 15)), 3),
        (Selection(modalities=("CT", "MR"), date_from=date(2023, 1, 1), date_to=date(2024, 12, 31)), 15),
        (Selection(date_from=date(2023, 1, 16)), 12),
        (Selection(accessions=("B-2", "not there")), 3),
        (Selection(studies=(str(dcmread(BytesIO(SYNTHETIC[0])).StudyInstanceUID),), modalities=("MR",)), 0),
    ],
)
def test_only_the_selected_studies_are_fetched(
    hospital: Hospital, way: Way, selection: Selection, expected: int, tmp_path: Path
) -> None:
    retrieved = refresh_source(hospital.config(way), tmp_path, selection)

    assert (retrieved.num_new, retrieved.num_missing) == (expected, 0)


def test_a_wider_selection_completes_studies_that_were_complete_for_the_narrower(own: Hospital) -> None:
    ct, mr = a_study(2), a_study(1)
    study = str(dcmread(BytesIO(ct[0])).StudyInstanceUID)
    changed = dcmread(BytesIO(mr[0]))
    changed.StudyInstanceUID, changed.Modality = study, "MR"
    buffer = BytesIO()
    changed.save_as(buffer)
    own.orthanc.add([*ct, buffer.getvalue()])

    assert own.refresh("get", Selection(modalities=("CT",))).num_new == 2
    assert own.refresh("get", Selection(modalities=("CT", "MR"))).num_new == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_whole_archive_is_never_copied(hospital: Hospital, way: Way, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="whole archive"):
        refresh_source(hospital.config(way), tmp_path, Selection())


# --- a PACS that stops half-way ---


@contextmanager
def half_way(way: Way, then: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """Do something when 2 MB of images are through; yields how the site must be configured for that."""
    port, target = {
        "dicomweb": (RELAY_PORT, HTTP_PORT),
        "get": (RELAY_PORT, DICOM_PORT),
        "move": (OUR_PORT, RELAY_PORT),  # here the PACS comes to us
    }[way]
    settings: dict[Way, dict[str, Any]] = {
        "dicomweb": {"url": f"http://127.0.0.1:{RELAY_PORT}/dicom-web"},
        "get": {"port": RELAY_PORT},
        "move": {"listen": f"127.0.0.1:{RELAY_PORT}"},
    }
    with relay(port, target, 2_000_000, then):
        yield settings[way]


@pytest.mark.parametrize("way", WAYS)
def test_a_pacs_killed_half_way_loses_nothing_and_the_next_run_completes(own: Hospital, way: Way) -> None:
    study = a_study(40, num_series=2, rows=256)
    own.orthanc.add(study)

    with half_way(way, own.orthanc.stop) as changes, pytest.raises(ConnectionLostError) as caught:
        own.refresh(way, **changes)
    assert "instances of 1 studies are kept" in caught.value.message
    assert "next run" in caught.value.remedy
    kept = own.files(way)
    assert 0 < len(kept) < len(study)
    originals = {uid_of(data): pixels_of(data) for data in study}
    assert all(pixels_of(data) == originals[uid] for uid, data in kept.items())
    assert list((own.home(way) / "spool" / "drafts").iterdir()) == []

    own.orthanc.start()
    again = own.refresh(way)
    assert (again.num_new, again.num_missing) == (len(study) - len(kept), 0)
    assert {uid: pixels_of(data) for uid, data in own.files(way).items()} == originals


@pytest.mark.parametrize("way", WAYS)
def test_a_pacs_that_comes_back_in_time_is_waited_for(own: Hospital, way: Way) -> None:
    study = a_study(40, num_series=2, rows=256)
    own.orthanc.add(study)

    def restart() -> None:
        own.orthanc.stop()
        own.orthanc.start()

    with half_way(way, restart) as changes:
        retrieved = own.refresh(way, **changes, attempts=6)

    assert retrieved.num_missing == 0
    assert set(own.files(way)) == {uid_of(data) for data in study}


@pytest.mark.parametrize("way", ["get", "move"])
def test_an_instance_that_the_pacs_cannot_send_is_counted_and_the_others_come(
    own: Hospital, way: Way
) -> None:
    own.orthanc.add(a_study(5))
    lost = own.orthanc.ask("/instances")[0]
    info = own.orthanc.ask(f"/instances/{lost}/attachments/dicom/info")["Uuid"]
    path = own.orthanc.folder / "store" / info[:2] / info[2:4] / info
    own.orthanc.stop()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    own.orthanc.start()

    partial = own.refresh(way)
    assert partial.num_new == 4
    assert partial.missing == {Refusal.ABSENT: 1}

    own.orthanc.stop()
    path.write_bytes(whole)
    own.orthanc.start()
    healed = own.refresh(way)
    assert (healed.num_new, healed.num_missing) == (1, 0)


@pytest.mark.parametrize("way", WAYS)
def test_an_instance_over_the_limit_is_refused_and_the_others_come(own: Hospital, way: Way) -> None:
    study = [*a_study(3), *a_study(1, rows=1024)]
    own.orthanc.add(study)

    first = own.refresh(way, max_object_mb=1)
    assert (first.num_new, dict(first.missing)) == (3, {Refusal.TOO_LARGE: 1})
    # known by then: not fetched again, but still counted
    again = own.refresh(way, max_object_mb=1, full=True)
    assert (again.num_new, dict(again.missing)) == (0, {Refusal.TOO_LARGE: 1})
    raised = own.refresh(way, max_object_mb=8)
    assert (raised.num_new, raised.num_missing) == (1, 0)


@pytest.mark.parametrize("way", WAYS)
def test_a_full_spool_ends_the_run_with_a_clear_error_and_keeps_what_fits(own: Hospital, way: Way) -> None:
    own.orthanc.add(a_study(20, rows=128))

    with pytest.raises(StorageError, match="spool is full") as caught:
        own.refresh(way, spool_gb=0.0002)
    assert "spool_gb" in caught.value.remedy
    kept = own.files(way)
    assert 0 < len(kept) < 20
    assert sum(map(len, kept.values())) <= 200_000
    assert own.refresh(way).num_new == 20 - len(kept)


@pytest.mark.parametrize("way", WAYS)
def test_names_in_tags_lead_nowhere_and_appear_nowhere(own: Hospital, way: Way, tmp_path: Path) -> None:
    hostile = "../../../../tmp/owned"
    own.orthanc.add(
        [
            *a_study(1, PatientID=hostile, PatientName="Canary^Zebra", AccessionNumber="../x"),
            *a_study(1, StudyDescription="; rm -rf /", SeriesDescription="\a", StudyID="/etc/passwd"),
        ]
    )
    assert own.refresh(way).num_new == 2

    home = own.home(way)
    for path in home.rglob("*"):
        relative = path.relative_to(home).as_posix()
        assert path.is_dir() or relative.startswith(("spool/files/", "spool/manifest", "spool/lock"))
        assert "owned" not in relative
        assert "Zebra" not in relative
    manifest = (home / "spool" / "manifest.sqlite").read_bytes()
    assert b"Zebra" not in manifest
    assert b"owned" not in manifest


def test_two_runs_at_once_are_refused(hospital: Hospital) -> None:
    with (
        Spool(hospital.home("get"), max_bytes=10**9, max_object_bytes=10**8) as spool,
        spool.retrieving(),
        pytest.raises(StorageError, match="another process"),
    ):
        hospital.refresh("get")


# --- every fault has its own sentence, and no secret in it ---


def first_fault(config: RemoteConfig, home: Path) -> tuple[str, str, str]:
    """Name, sentence and remedy of the first check that fails."""
    outcomes = check_source(config, home)
    failed = [outcome for outcome in outcomes if not outcome.ok]
    assert len(failed) == 1
    assert failed == outcomes[-1:]
    for outcome in outcomes:
        assert PASSWORD not in repr(outcome)
        assert "no-such" not in repr(outcome)
    assert failed[0].remedy
    return failed[0].name, failed[0].detail, failed[0].remedy


@pytest.mark.parametrize("way", WAYS)
def test_every_check_passes_when_all_is_well(hospital: Hospital, way: Way, tmp_path: Path) -> None:
    outcomes = check_source(hospital.config(way), tmp_path)

    assert all(outcome.ok and not outcome.remedy for outcome in outcomes)
    assert len(outcomes) == {"dicomweb": 2, "get": 3, "move": 4}[way]


@pytest.mark.parametrize(
    ("way", "changes", "sentence", "remedy"),
    [
        (
            "dicomweb",
            {"url": "http://127.0.0.1:9/dicom-web"},
            "nothing listens on 127.0.0.1:9",
            "host and port",
        ),
        ("get", {"port": 9}, "nothing listens on 127.0.0.1:9", "host and port"),
        ("get", {"host": "pacs.invalid", "unencrypted": True}, "no address is known", "name server"),
        ("get", {"host": "192.0.2.1", "unencrypted": True}, "no way to 192.0.2.1", "network"),
        ("get", {"pacs_ae_title": "WRONG"}, "not called WRONG", "pacs_ae_title"),
        ("get", {"port": HTTP_PORT}, "not answer as a DICOM node", "port"),
        ("get", {"ae_title": "STRANGER"}, "hangs up on a search", "STRANGER"),
        ("move", {"ae_title": "STRANGER"}, "hangs up on a search", "STRANGER"),
        ("dicomweb", {"user": "nobody"}, "does not accept this site's credentials", "password_file"),
        ("dicomweb", {"url": f"http://127.0.0.1:{HTTP_PORT}/wrong"}, "no such DICOMweb service", "`url`"),
        ("dicomweb", {"url": f"http://127.0.0.1:{HTTP_PORT}/app"}, "no such DICOMweb service", "`url`"),
        ("move", {"listen": f"127.0.0.1:{HTTP_PORT}"}, "cannot listen", "free port"),
        (
            "dicomweb",
            {"url": f"https://127.0.0.1:{HTTP_PORT}/dicom-web"},
            "does not speak TLS",
            "port",
        ),
    ],
)
def test_doctor_names_each_fault(
    hospital: Hospital, way: str, changes: dict[str, Any], sentence: str, remedy: str, tmp_path: Path
) -> None:
    config = hospital.config(way, **changes)

    _, found, what_to_do = first_fault(config, tmp_path)

    assert sentence in found
    assert remedy in what_to_do
    with pytest.raises(FederationError) as caught:
        refresh_source(config, tmp_path, EVERYTHING)
    assert sentence in caught.value.message
    assert caught.value.__cause__ is None


def test_wrong_password_is_refused_without_being_shown(hospital: Hospital, tmp_path: Path) -> None:
    config = hospital.config("dicomweb")
    secret = hospital.folder / "password"
    secret.write_text("no-such-password\n")

    name, found, remedy = first_fault(config, tmp_path)

    assert (name, "credentials" in found, "password_file" in remedy) == ("PACS search", True, True)


def test_a_secret_open_to_others_is_not_used(hospital: Hospital, tmp_path: Path) -> None:
    config = hospital.config("dicomweb")
    (hospital.folder / "password").chmod(0o640)

    _, found, remedy = first_fault(config, tmp_path)

    assert "open to other users" in found
    assert "chmod 600" in remedy


def test_an_unknown_move_destination_is_named(own: Hospital) -> None:
    own.orthanc.stop()
    own.orthanc.settings = {
        "DicomModalities": {},
        "DicomAlwaysAllowFind": True,
        "DicomAlwaysAllowMove": True,
    }
    own.orthanc.start()
    own.orthanc.add(a_study(1))

    with pytest.raises(FederationError) as caught:
        own.refresh("move")

    assert OUR_AE_TITLE in caught.value.message + caught.value.remedy


# --- TLS and tokens ---


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls") / "pki", "pacs", "site")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls") / "others", "pacs", "site")


@contextmanager
def with_tls(own: Hospital, certificates: Certificates) -> Iterator[dict[str, Any]]:
    """Have the PACS speak TLS and ask for a certificate; yields how the site finds its DICOMweb service.

    A gateway stands in front of that one: Orthanc 1.10 ends when it accepts a certificate over HTTPS.
    """
    own.orthanc.stop()
    own.orthanc.settings = {
        "DicomTlsEnabled": True,
        "DicomTlsCertificate": str(certificates.certificate("pacs")),
        "DicomTlsPrivateKey": str(certificates.key("pacs")),
        "DicomTlsTrustedCertificates": str(certificates.ca),
        "DicomModalities": {
            "site": {"AET": OUR_AE_TITLE, "Host": "127.0.0.1", "Port": OUR_PORT, "UseDicomTls": True}
        },
    }
    own.orthanc.start()
    with Gateway(RELAY_PORT, tls=asking_for_certificates(certificates)) as gateway:
        yield {"url": gateway.url}


def tls_of(certificates: Certificates, name: str = "site") -> Tls:
    return Tls(
        ca_file=certificates.ca, certificate=certificates.certificate(name), key=certificates.key(name)
    )


def test_mutual_tls_works_for_every_source(own: Hospital, certificates: Certificates) -> None:
    study = a_study(3)
    own.orthanc.add(study)
    with with_tls(own, certificates) as web:
        for way in WAYS:
            changes = {"tls": tls_of(certificates), **(web if way == "dicomweb" else {})}
            outcomes = check_source(own.config(way, **changes), own.folder)
            assert [outcome for outcome in outcomes if not outcome.ok] == []
            assert own.refresh(way, **changes).num_new == 3


@pytest.mark.parametrize("way", ["dicomweb", "get"])
def test_tls_faults_are_told_apart(
    own: Hospital, certificates: Certificates, strangers: Certificates, way: str, tmp_path: Path
) -> None:
    ours, theirs = tls_of(certificates), tls_of(strangers)
    cases = [
        (Tls(ca_file=strangers.ca), "certificate of the PACS is not accepted"),
        (theirs.model_copy(update={"ca_file": ours.ca_file}), "does not accept this site's certificate"),
        (Tls(ca_file=certificates.ca), "does not accept this site's certificate"),
        (Tls(ca_file=certificates.key("site")), "not a certificate"),
        (ours.model_copy(update={"key": certificates.key("pacs")}), "not a certificate with its key"),
    ]
    with with_tls(own, certificates) as web:
        for tls, sentence in cases:
            changes = {"tls": tls, **(web if way == "dicomweb" else {})}
            name, found, _ = first_fault(own.config(way, **changes), tmp_path)
            assert sentence in found, found
            assert name in ("PACS accepts this site", "PACS search")
            with pytest.raises(FederationError) as caught:
                own.refresh(way, **changes)
            assert sentence in caught.value.message


def test_a_pacs_that_wants_tls_is_named_when_we_speak_without(
    own: Hospital, certificates: Certificates, tmp_path: Path
) -> None:
    with with_tls(own, certificates):
        _, found, remedy = first_fault(own.config("get"), tmp_path)

    assert "does not answer as a DICOM node" in found
    assert "[source.tls]" in remedy


def test_bearer_token_is_read_anew_and_a_wrong_one_refused(own: Hospital, tmp_path: Path) -> None:
    own.orthanc.add(a_study(2))
    own.orthanc.stop()
    script = tmp_path / "token.lua"
    script.write_text(
        "function IncomingHttpRequestFilter(method, uri, ip, username, headers)\n"
        "  return headers['authorization'] == 'Bearer fresh-token'\n"
        "end\n"
    )
    own.orthanc.settings = {"AuthenticationEnabled": False, "LuaScripts": [str(script)]}
    own.orthanc.start()
    token = tmp_path / "token"
    token.write_text("stale-token")
    token.chmod(0o600)
    changes: dict[str, Any] = {"user": None, "password_file": None, "token_file": token}

    _, found, remedy = first_fault(own.config("dicomweb", **changes), tmp_path)
    assert "does not permit this site" in found
    assert "stale-token" not in found + remedy

    token.write_text("fresh-token")
    assert own.refresh("dicomweb", **changes).num_new == 2


# --- a DICOMweb service that misbehaves ---


def through(
    own: Hospital, rule: Callable[[str, dict[str, str], Callable[[], Answer]], Answer], **changes: Any
) -> tuple[Any, list[str]]:
    """Refresh through a gateway with a rule; what came of it, and the paths that were asked for."""
    with Gateway(RELAY_PORT, rule) as gateway:
        return own.refresh("dicomweb", url=gateway.url, **changes), gateway.paths


def test_a_busy_service_is_waited_for_as_long_as_it_asks(own: Hospital) -> None:
    own.orthanc.add(a_study(2))
    busy = iter([503, 429])

    def rule(path: str, headers: dict[str, str], ask: Callable[[], Answer]) -> Answer:
        status = next(busy, 0)
        return Answer(status, {"Retry-After": "0"}, b"") if status else ask()

    retrieved, _ = through(own, rule, attempts=3)

    assert (retrieved.num_new, retrieved.num_missing) == (2, 0)


def test_a_series_that_breaks_off_comes_instance_by_instance(own: Hospital) -> None:
    own.orthanc.add(a_study(5))

    def rule(path: str, headers: dict[str, str], ask: Callable[[], Answer]) -> Answer:
        answer = ask()
        is_series = "/series/" in path and "/instances" not in path
        return Answer(200, answer.headers, answer.body, len(answer.body) // 2) if is_series else answer

    retrieved, paths = through(own, rule)

    assert (retrieved.num_new, retrieved.num_missing) == (5, 0)
    assert any("/instances/" in path for path in paths)


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [
        (Answer(404, {}, b""), Refusal.ABSENT),
        (Answer(200, {"Content-Type": "application/dicom"}, b"no DICOM"), Refusal.NOT_DICOM),
        (Answer(200, {"Content-Type": "application/dicom"}, b"x" * 1_100_000), Refusal.TOO_LARGE),
        (Answer(200, {"Content-Type": "application/dicom"}, a_study(1)[0]), Refusal.OTHER_INSTANCE),
    ],
    ids=["absent", "not DICOM", "too large", "another"],
)
def test_what_does_not_come_as_asked_is_counted_with_its_reason(
    own: Hospital, answer: Answer, refusal: Refusal
) -> None:
    own.orthanc.add(a_study(2))

    def rule(path: str, headers: dict[str, str], ask: Callable[[], Answer]) -> Answer:
        return ask() if "json" in headers["Accept"] else answer

    retrieved, _ = through(own, rule, max_object_mb=1)

    assert (retrieved.num_new, dict(retrieved.missing)) == (0, {refusal: 2})


def test_no_redirect_is_followed(own: Hospital) -> None:
    elsewhere = Answer(302, {"Location": f"http://127.0.0.1:{HTTP_PORT}/dicom-web/studies"}, b"")

    with pytest.raises(FederationError) as caught:
        through(own, lambda path, headers, ask: elsewhere)
    assert "redirect" in caught.value.remedy


@pytest.mark.parametrize("body", [b"[1]", b"<html>", b"[" * 100_000], ids=range(3))
def test_a_search_answered_with_something_else_is_named(own: Hospital, body: bytes) -> None:
    answer = Answer(200, {"Content-Type": "application/dicom+json"}, body)

    with pytest.raises(FederationError, match="not what a DICOMweb service sends"):
        through(own, lambda path, headers, ask: answer)


def test_a_service_that_ignores_pages_is_not_asked_for_ever(own: Hospital) -> None:
    own.orthanc.add(a_study(3))

    def rule(path: str, headers: dict[str, str], ask: Callable[[], Answer]) -> Answer:
        answer = ask()
        return answer if "offset=0" in path or "offset" not in path else rows

    with Gateway(RELAY_PORT) as first:
        own.refresh("dicomweb", url=first.url)
    rows = Answer(200, {"Content-Type": "application/dicom+json"}, b"[]")
    retrieved, paths = through(own, rule)

    assert retrieved.num_missing == 0
    assert len(paths) < 10
