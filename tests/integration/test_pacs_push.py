"""Our storage node against real senders: what a PACS pushes is kept as it is, and strangers keep out."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pynetdicom import AE
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode

from fedward_client.sources.receiver import MAX_ASSOCIATIONS, receiving
from fedward_client.sources.settings import DimseConfig, Tls
from tests.integration.pacs import (
    AE_TITLE,
    OUR_AE_TITLE,
    OUR_PORT,
    Hospital,
    Orthanc,
    a_study,
    bundled_studies,
    dcmtk,
    everything_in,
    pixels_of,
    private_network,
    skip_unless_installed,
    uid_of,
)
from tests.integration.pacs_faults import Certificates, make_certificates

pytestmark = pytest.mark.integration

SYNTHETIC = a_study(4)
ELSEWHERE = {"sender_hosts": ["192.0.2.7"]}
STUDIES = [*bundled_studies(), *SYNTHETIC]


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospital]:
    """A PACS with compressed and uncompressed studies, and a site."""
    skip_unless_installed()
    folder = tmp_path_factory.mktemp("hospital")
    with private_network():
        orthanc = Orthanc(folder / "orthanc")
        orthanc.start()
        try:
            orthanc.add(STUDIES)
            yield Hospital(orthanc, folder)
        finally:
            orthanc.stop()


@contextmanager
def receiver(hospital: Hospital, home: str, **changes: Any) -> Iterator[dict[str, int]]:
    """Our storage node, listening; yields its counts, filled when it has stopped."""
    config = hospital.config("push", **changes)
    assert isinstance(config, DimseConfig)
    counts: dict[str, int] = {}
    with receiving(config, hospital.home(home)) as listening:
        yield counts
    counts.update(listening.counts)


def push(
    files: list[bytes], folder: Path, *options: str, ours: str = OUR_AE_TITLE, theirs: str = AE_TITLE
) -> int:
    """Send files with dcmtk's storescu; returns its exit code."""
    folder.mkdir(exist_ok=True)
    for number, data in enumerate(files):
        (folder / f"{number}.dcm").write_bytes(data)
    # each file with the syntax it has: storescu proposes one family for all
    command = [dcmtk("storescu"), "-aet", theirs, "-aec", ours, *options, "127.0.0.1", str(OUR_PORT)]
    paths = [str(folder / f"{number}.dcm") for number in range(len(files))]
    done = subprocess.run([*command, *paths], capture_output=True, timeout=60, check=False)
    return done.returncode


_SYNTAX_OPTION = {
    "1.2.840.10008.1.2.4.50": "-xy",
    "1.2.840.10008.1.2.4.51": "-xx",
    "1.2.840.10008.1.2.4.80": "-xt",
    "1.2.840.10008.1.2.4.90": "-xv",
    "1.2.840.10008.1.2.4.91": "-xw",
    "1.2.840.10008.1.2.5": "-xr",
    "1.2.840.10008.1.2.1.99": "-xd",
}


def test_pushed_studies_arrive_as_they_are_in_any_syntax(hospital: Hospital, tmp_path: Path) -> None:
    with receiver(hospital, "pushed") as counts:
        for number, data in enumerate(STUDIES):
            syntax = str(dcmread(BytesIO(data)).file_meta.TransferSyntaxUID)
            option = [_SYNTAX_OPTION[syntax]] if syntax in _SYNTAX_OPTION else []
            assert push([data], tmp_path / str(number), *option) == 0
    hospital.refresh("get")

    files = hospital.files("pushed")
    assert {uid: pixels_of(data) for uid, data in files.items()} == {
        uid_of(data): pixels_of(data) for data in STUDIES
    }
    assert len(set(files.values()) & set(hospital.files("get").values())) >= len(SYNTHETIC)
    assert counts == {"stored": len(STUDIES)}


def test_the_pacs_itself_can_push(hospital: Hospital) -> None:
    ids = hospital.orthanc.ask("/instances")

    with receiver(hospital, "by-itself") as counts:
        hospital.orthanc.ask("/modalities/site/store", json.dumps(ids).encode())

    assert counts == {"stored": len(STUDIES)}
    assert len(everything_in(hospital.home("by-itself") / "spool" / "files")) == len(STUDIES)


def test_the_same_object_pushed_twice_is_one_file(hospital: Hospital, tmp_path: Path) -> None:
    with receiver(hospital, "twice") as counts:
        assert push(SYNTHETIC[:1], tmp_path / "a") == 0
        assert push(SYNTHETIC[:1], tmp_path / "b") == 0

    assert counts == {"stored": 2}
    assert len(everything_in(hospital.home("twice") / "spool" / "files")) == 1


@pytest.mark.parametrize(
    ("titles", "changes"),
    [
        ({"theirs": "STRANGER"}, {}),
        ({"ours": "NOTUS"}, {}),
        ({}, ELSEWHERE),
        ({}, {"senders": ["OTHER"]}),
    ],
)
def test_strangers_are_refused(
    hospital: Hospital, titles: dict[str, str], changes: dict[str, Any], tmp_path: Path
) -> None:
    home = f"strangers-{len(titles)}-{'-'.join([*titles, *changes])}"
    with receiver(hospital, home, **changes) as counts:
        assert push(SYNTHETIC[:1], tmp_path / "files", **titles) != 0

    assert counts == {"rejected": 1}
    assert everything_in(hospital.home(home) / "spool" / "files") == []


@pytest.mark.parametrize(("changes", "num_heard"), [({}, 2 * MAX_ASSOCIATIONS + 1), (ELSEWHERE, 0)])
def test_silent_strangers_keep_few_threads(
    hospital: Hospital, changes: dict[str, Any], num_heard: int
) -> None:
    before = threading.active_count()
    with (
        receiver(hospital, f"silent-{num_heard}", **changes) as counts,
        ExitStack() as open_ones,
    ):
        for _ in range(60):
            open_ones.enter_context(socket.create_connection(("127.0.0.1", OUR_PORT)))
        with socket.create_connection(("127.0.0.1", OUR_PORT)) as last:  # accepted after all others
            last.settimeout(20)
            assert last.recv(1) == b""
        assert threading.active_count() - before <= 1 + 2 * num_heard
    assert counts["rejected"] >= 61 - num_heard


def test_a_listed_host_may_send(hospital: Hospital, tmp_path: Path) -> None:
    with receiver(hospital, "listed", sender_hosts=["127.0.0.1"]) as counts:
        assert push(SYNTHETIC[:1], tmp_path / "files") == 0

    assert counts == {"stored": 1}


def test_an_object_over_the_limit_is_refused_and_the_association_goes_on(
    hospital: Hospital, tmp_path: Path
) -> None:
    files = [SYNTHETIC[0], *a_study(1, rows=1024), SYNTHETIC[1]]
    with receiver(hospital, "oversize", max_object_mb=1) as counts:
        # --no-halt: storescu gives up at the first refusal unless told not to
        push(files, tmp_path / "files", "--no-halt")

    assert counts == {"stored": 2, "refused": 1}
    kept = everything_in(hospital.home("oversize") / "spool" / "files")
    assert {uid_of(path.read_bytes()) for path in kept} == {uid_of(SYNTHETIC[0]), uid_of(SYNTHETIC[1])}


def test_an_association_over_the_limit_is_ended(hospital: Hospital, tmp_path: Path) -> None:
    with receiver(hospital, "too-much", max_association_gb=0.001) as counts:
        assert push(a_study(20, rows=256), tmp_path / "files") != 0

    assert 0 < counts["stored"] < 8


def test_pushing_into_a_full_spool_is_refused_and_nothing_is_lost(hospital: Hospital, tmp_path: Path) -> None:
    with receiver(hospital, "full", spool_gb=0.00002) as counts:
        push(a_study(10), tmp_path / "files", "--no-halt")

    kept = everything_in(hospital.home("full") / "spool" / "files")
    assert counts["stored"] == len(kept) > 0
    assert counts["stored"] + counts["refused"] == 10


def test_an_object_that_is_not_what_its_command_says_is_refused(hospital: Hospital) -> None:
    dataset = dcmread(BytesIO(SYNTHETIC[0]))
    with receiver(hospital, "mislabelled") as counts:
        entity = AE(AE_TITLE)
        entity.add_requested_context(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
        association = entity.associate("127.0.0.1", OUR_PORT, ae_title=OUR_AE_TITLE)
        assert association.is_established
        request = C_STORE()
        request.MessageID, request.Priority = 1, 2
        request.AffectedSOPClassUID = dataset.SOPClassUID
        request.AffectedSOPInstanceUID = "1.2.3.4"
        encoded = encode(dataset, False, True)
        assert encoded is not None
        request.DataSet = BytesIO(encoded)
        association._reactor_checkpoint.clear()
        association.dimse.send_msg(request, association.accepted_contexts[0].context_id or 1)
        _, answer = association.dimse.get_msg(block=True)
        association._reactor_checkpoint.set()
        association.release()

    assert answer is not None
    assert answer.Status == 0xA900
    assert counts == {"refused": 1}


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x01\x00\xff\xff\xff\xff" + b"\x00" * 4096,
        b"\x04\x00\x7f\xff\xff\xff" + b"\x00" * 4096,
        b"\x01\x00\x00\x00\x00\x10" + b"\xff" * 16,
        b"",
    ],
    ids=["http", "endless request", "endless data", "nonsense", "nothing"],
)
def test_garbage_on_the_line_does_no_harm(hospital: Hospital, garbage: bytes, tmp_path: Path) -> None:
    with (
        receiver(hospital, "garbage") as counts,
        socket.create_connection(("127.0.0.1", OUR_PORT), timeout=10) as line,
    ):
        line.sendall(garbage)
        assert push(SYNTHETIC[:1], tmp_path / "files") == 0

    assert counts["stored"] == 1


def test_push_over_tls_needs_a_certificate_of_our_authority(hospital: Hospital, tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "pki", "pacs", "site")
    strangers = make_certificates(tmp_path / "others", "pacs")

    def options(shown: Certificates) -> list[str]:
        return ["+tls", str(shown.key("pacs")), str(shown.certificate("pacs")), "+cf", str(certificates.ca)]

    ours = Tls(
        ca_file=certificates.ca, certificate=certificates.certificate("site"), key=certificates.key("site")
    )
    with receiver(hospital, "tls", tls=ours) as counts:
        silent = socket.create_connection(("127.0.0.1", OUR_PORT), timeout=10)
        with silent:  # a stranger that says nothing keeps nobody waiting
            assert push(SYNTHETIC[:2], tmp_path / "a", *options(certificates)) == 0
        assert push(SYNTHETIC[2:3], tmp_path / "b", *options(strangers)) != 0
        assert push(SYNTHETIC[2:3], tmp_path / "c") != 0

    assert counts.get("stored") == 2
