"""`doctor`: each fault is found by its own check, and none keeps the other checks from running."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedward_client.approvals import PlanGate
from fedward_client.config import SiteHome
from fedward_client.joining import join
from fedward_client.preflight import Check, checks
from fedward_common.audit import AuditLog
from fedward_common.errors import PlanRefusedError
from fedward_common.identity import load_identity, server_context
from tests.federations import a_federation, a_listener, a_signed_plan, a_site

NAMES = [
    "settings",
    "private keys",
    "identity",
    "certificate",
    "clock",
    "server reachable",
    "server accepts this site",
    "DICOM folder",
    "labels",
    "home writable",
    "disk space",
    "training software",
    "policy",
    "plans",
    "audit log",
]
NEED_SERVER = {"server reachable", "server accepts this site"}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_federation(tmp_path_factory.mktemp("federation") / "ours")


@pytest.fixture
def home(federation: Path, tmp_path: Path) -> SiteHome:
    """A site that has joined, with one file of data; nothing listens at its server's address."""
    (tmp_path / "dicom" / "deep").mkdir(parents=True)
    (tmp_path / "dicom" / "deep" / "image.dcm").write_bytes(b"DICM")
    (tmp_path / "labels.csv").write_text("key,label\n1,0\n")
    join(federation / "sites" / "north", tmp_path / "home", tmp_path / "dicom", tmp_path / "labels.csv")
    home = SiteHome(tmp_path / "home")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        point_to(home, unused.getsockname()[1])
    return home


def point_to(home: SiteHome, port: int) -> None:
    lines = home.config.read_text().splitlines()
    kept = [line for line in lines if not line.startswith("server")]
    home.config.write_text("\n".join([*kept, f'server = "127.0.0.1:{port}"\n']))


def run(home: SiteHome, now: datetime | None = None) -> dict[str, Check]:
    found = checks(home.root, now=now)
    assert [check.name for check in found] == NAMES
    assert all(check.ok or check.remedy for check in found)
    return {check.name: check for check in found}


def failing(home: SiteHome, now: datetime | None = None) -> set[str]:
    """Failing checks besides the two that need a server."""
    return {name for name, check in run(home, now).items() if not check.ok} - NEED_SERVER


def test_every_check_passes_when_the_server_runs(home: SiteHome, federation: Path) -> None:
    context = server_context(load_identity(federation / "server"))
    with a_listener(context, date=datetime.now(UTC)) as listener:
        point_to(home, listener.port)
        found = run(home)

    assert [check for check in found.values() if not check.ok] == []
    assert "TLSv1.3" in found["server accepts this site"].detail
    assert found["certificate"].detail == "valid for 364 more days"
    assert len(listener.accepted) == 1


def test_absent_server_fails_two_checks_only(home: SiteHome) -> None:
    found = run(home)

    assert {name for name, check in found.items() if not check.ok} == NEED_SERVER
    assert "Connection refused" in found["server reachable"].detail


def test_every_check_runs_in_a_folder_that_is_no_home(tmp_path: Path) -> None:
    found = run(SiteHome(tmp_path / "nowhere"))

    assert {name for name, check in found.items() if check.ok} == {"training software", "policy"}
    assert "fedward-site join" in found["settings"].remedy


@pytest.mark.parametrize("name", ["identity/tls.key", "identity/signing.key", "pseudonym.key"])
def test_key_that_others_can_read_is_found(home: SiteHome, name: str) -> None:
    (home.root / name).chmod(0o644)

    assert "private keys" in failing(home)
    assert f"chmod 600 {home.root / name}" in run(home)["private keys"].remedy


def test_every_open_key_is_named(home: SiteHome) -> None:
    for path in home.root.rglob("*.key"):
        path.chmod(0o640)

    assert run(home)["private keys"].detail.count("open to other users") == 3


def test_key_of_another_certificate_is_found(home: SiteHome, federation: Path) -> None:
    shutil.copy(federation / "sites" / "south" / "tls.key", home.identity / "tls.key")

    assert failing(home) == {"identity"}


def test_identity_of_another_site_is_found(home: SiteHome, federation: Path) -> None:
    for path in (federation / "sites" / "south").iterdir():
        shutil.copy(path, home.identity / path.name)

    assert failing(home) == {"identity"}


@pytest.mark.parametrize(
    ("days", "expected", "detail"),
    [
        (349, set(), "valid for 15 more days"),
        (352, {"certificate"}, "certificate expires in 12 days"),
        (370, {"certificate", "identity"}, "certificate expired 6 days ago"),
    ],
)
def test_certificate_near_or_past_its_end_is_found(
    home: SiteHome, days: int, expected: set[str], detail: str
) -> None:
    now = datetime.now(UTC) + timedelta(days=days)

    assert failing(home, now) == expected
    assert run(home, now)["certificate"].detail == detail


def test_clock_before_the_certificate_was_made_is_found(home: SiteHome) -> None:
    assert failing(home, datetime.now(UTC) - timedelta(days=2)) == {"clock", "identity"}


@pytest.mark.parametrize("minutes", [-10, 10])
def test_clock_that_differs_from_the_server_s_is_found(
    home: SiteHome, federation: Path, minutes: int
) -> None:
    date = datetime.now(UTC) + timedelta(minutes=minutes)
    with a_listener(server_context(load_identity(federation / "server")), date=date) as listener:
        point_to(home, listener.port)
        check = run(home)["server accepts this site"]

    assert not check.ok
    assert "clock" in check.detail


def test_server_that_does_not_trust_this_site_is_found(
    home: SiteHome, federation: Path, tmp_path: Path
) -> None:
    """With TLS 1.3 the client's own handshake succeeds; only the answer tells."""
    server, other = load_identity(federation / "server"), a_federation(tmp_path / "other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate, server.key)
    context.load_verify_locations(other / "ca" / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED

    with a_listener(context) as listener:
        point_to(home, listener.port)
        found = run(home)

    assert found["server reachable"].ok
    assert "does not accept this site's certificate" in found["server accepts this site"].detail
    assert listener.accepted == []


def test_server_of_another_federation_is_found(home: SiteHome, tmp_path: Path) -> None:
    other = load_identity(a_federation(tmp_path / "other") / "server")

    with a_listener(server_context(other)) as listener:
        point_to(home, listener.port)
        check = run(home)["server accepts this site"]

    assert not check.ok
    assert "the server's certificate is not accepted" in check.detail


def test_listener_without_tls_is_found(home: SiteHome) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        point_to(home, server.getsockname()[1])
        server.settimeout(10)

        def hang_up() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        found = run(home)
        thread.join()

    assert found["server reachable"].ok
    assert not found["server accepts this site"].ok


def test_empty_and_absent_dicom_folder_is_found(home: SiteHome, tmp_path: Path) -> None:
    (tmp_path / "dicom" / "deep" / "image.dcm").unlink()
    assert failing(home) == {"DICOM folder"}

    shutil.rmtree(tmp_path / "dicom")
    assert failing(home) == {"DICOM folder"}


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00binary", b"one column\n"])
def test_unusable_label_file_is_found(home: SiteHome, tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        (tmp_path / "labels.csv").unlink()
    else:
        (tmp_path / "labels.csv").write_bytes(content)

    assert failing(home) == {"labels"}


def test_faulty_policy_is_found(home: SiteHome) -> None:
    home.policy.write_text("[limits]\nmax_round = 1\n")

    found = run(home)

    assert {"policy", "plans"} == failing(home)
    assert "max_round" in found["policy"].detail


def test_waiting_plan_is_named(home: SiteHome, federation: Path) -> None:
    signed = a_signed_plan(federation)
    gate = PlanGate(home, a_site(federation).federation, AuditLog(home.audit))
    with pytest.raises(PlanRefusedError):
        gate.decide(signed.to_bytes(), "0" * 16)

    check = run(home)["plans"]

    assert check.ok
    assert f"1 wait for approval; read it: fedward-site plan approve {signed.digest[:12]}" in check.detail


def test_changed_audit_log_is_found(home: SiteHome) -> None:
    home.audit.write_bytes(home.audit.read_bytes().replace(b"north", b"south"))

    assert failing(home) == {"audit log"}
    assert "line 1 was changed" in run(home)["audit log"].detail


def test_doctor_changes_nothing(home: SiteHome) -> None:
    before = {path: path.stat().st_mtime_ns for path in home.root.rglob("*") if path.is_file()}
    content = {path: path.read_bytes() for path in before}

    run(home)
    after = {path: path.read_bytes() for path in home.root.rglob("*") if path.is_file()}

    assert {path: after[path] for path in content} == content
    assert {path.name for path in after} - {path.name for path in content} <= {"ledger.sqlite"}


def test_a_label_file_is_asked_for_only_where_the_cohort_takes_labels_from_one(home: SiteHome) -> None:
    text = home.config.read_text()
    home.config.write_text("".join(line for line in text.splitlines(True) if not line.startswith("labels")))
    assert failing(home) == {"labels"}
    assert "names none" in run(home)["labels"].detail

    (home.root / "cohort.toml").write_text(
        'unit = "volume"\nlabels.source = "segmentations"\nlabels.mask = { segment = "SCT:10200004" }\n'
    )
    assert failing(home) == set()
    assert "segmentations among the images" in run(home)["labels"].detail
    home.config.write_text(text)
    assert "`labels` in site.toml is not used" in run(home)["labels"].detail
