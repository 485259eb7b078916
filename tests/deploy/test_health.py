"""The health checks, against real listeners and real processes."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedward_client import health as site_health
from fedward_common.identity import load_identity, server_context
from fedward_server import health as server_health
from fedward_server.provisioning import provision

NOW = datetime(2027, 1, 15, 8, tzinfo=UTC)


def make_federation(folder: Path, now: datetime | None = None) -> Path:
    """Provision a federation and return the server's identity directory."""
    provision(folder, name="Health", hosts=["fl.example.org"], site_names=["a"], now=now)
    return folder / "server"


@contextmanager
def listener(identity: Path, *, now: datetime | None = None) -> Iterator[int]:
    """Serve TLS on loopback as the sites' listener does, demanding a client certificate; yields the port."""
    context = server_context(load_identity(identity, now=now))
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    ports: list[int] = []

    async def serve() -> None:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        await server.serve_forever()

    def run() -> None:
        loop.set_exception_handler(
            lambda *_: None
        )  # visitors without a certificate are refused, as they should be
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)

    task = loop.create_task(serve())
    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10)
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_server_is_well_when_its_listener_shows_the_federation_s_certificate(tmp_path: Path) -> None:
    identity = make_federation(tmp_path / "federation")
    with listener(identity) as port:
        assert server_health.faults(identity / "ca.crt", [port]) == []


def test_server_check_passes_a_grpc_listener_that_demands_certificates(tmp_path: Path) -> None:
    grpc = pytest.importorskip("grpc")
    from concurrent.futures import ThreadPoolExecutor

    identity = make_federation(tmp_path / "federation")
    key_and_certificate = ((identity / "tls.key").read_bytes(), (identity / "tls.crt").read_bytes())
    credentials = grpc.ssl_server_credentials([key_and_certificate], (identity / "ca.crt").read_bytes(), True)
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        try:
            assert server_health.faults(identity / "ca.crt", [port]) == []
        finally:
            server.stop(None).wait(10)


def test_server_check_names_each_port_that_does_not_listen(tmp_path: Path) -> None:
    identity = make_federation(tmp_path / "federation")
    first, second = unused_port(), unused_port()
    found = server_health.faults(identity / "ca.crt", [first, second])
    assert [fault.split(":")[0] for fault in found] == [f"port {first}", f"port {second}"]


def test_server_check_fails_when_another_federation_has_the_port(tmp_path: Path) -> None:
    ours, theirs = make_federation(tmp_path / "ours"), make_federation(tmp_path / "theirs")
    with listener(theirs) as port:
        (fault,) = server_health.faults(ours / "ca.crt", [port])
    assert "certificate not accepted" in fault


def test_server_check_fails_when_the_certificate_has_expired(tmp_path: Path) -> None:
    past = datetime.now(UTC) - timedelta(days=100)  # the server's certificate is valid for 90
    identity = make_federation(tmp_path / "federation", now=past)
    with listener(identity, now=past) as port:
        (fault,) = server_health.faults(identity / "ca.crt", [port])
    assert "expired" in fault


def test_server_check_fails_when_the_listener_accepts_but_never_answers(tmp_path: Path) -> None:
    identity = make_federation(tmp_path / "federation")
    with socket.create_server(("127.0.0.1", 0)) as hung:
        (fault,) = server_health.faults(identity / "ca.crt", [hung.getsockname()[1]], timeout_s=0.2)
    assert "timed out" in fault


def test_server_check_fails_without_the_authority_s_certificate(tmp_path: Path) -> None:
    (fault,) = server_health.faults(tmp_path / "ca.crt", [unused_port()])
    assert "ca.crt" in fault


def test_server_check_as_a_command_exits_with_0_or_1_and_says_why(tmp_path: Path) -> None:
    identity = make_federation(tmp_path / "federation")
    command = [sys.executable, "-m", "fedward_server.health", "--ca", str(identity / "ca.crt"), "--port"]
    with listener(identity) as port:
        well = subprocess.run([*command, str(port)], capture_output=True, text=True, timeout=30, check=False)
    gone = subprocess.run([*command, str(port)], capture_output=True, text=True, timeout=30, check=False)
    assert (well.returncode, well.stdout, well.stderr) == (0, "", "")
    assert (gone.returncode, gone.stderr) == (1, "")
    assert f"port {port}" in gone.stdout


def packages_loaded_by(statement: str) -> set[str]:
    program = f"import sys{statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    # coverage would load itself
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env=environment,
    )
    return set(result.stdout.split())


@pytest.mark.parametrize("module", ["fedward_server.health", "fedward_client.health"])
def test_health_check_loads_nothing_but_the_standard_library(module: str) -> None:
    loaded = packages_loaded_by(f", {module}") - packages_loaded_by("")
    assert loaded - set(sys.stdlib_module_names) == {module.partition(".")[0]}


def test_site_is_well_after_its_daemon_recorded_itself(tmp_path: Path) -> None:
    site_health.record(tmp_path)
    assert site_health.fault(tmp_path) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["health.json"]


@pytest.mark.parametrize(("age_s", "well"), [(0, True), (60, True), (60.5, False), (-60, True), (-61, False)])
def test_site_is_unwell_when_last_heard_of_more_than_a_minute_from_now(
    age_s: float, well: bool, tmp_path: Path
) -> None:
    site_health.record(tmp_path, now=NOW - timedelta(seconds=age_s))
    assert (site_health.fault(tmp_path, now=NOW) == "") is well


def test_site_is_unwell_when_its_process_has_ended(tmp_path: Path) -> None:
    program = "import pathlib, sys, fedward_client.health as h; h.record(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=30, check=True)
    assert "has ended" in site_health.fault(tmp_path)


def test_site_is_unwell_before_its_daemon_started(tmp_path: Path) -> None:
    assert "has not started" in site_health.fault(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"pid": 1}',
        '{"pid": "x", "at": 1}',
        '{"pid": 1, "at": null}',
        '{"pid": 1, "at": "yesterday"}',
        '{"pid": 1, "at": "2027-01-15T08:00:00"}',
        '{"pid": -1, "at": "NOW"}',
        '{"pid": 0, "at": "NOW"}',
        '{"pid": 1e400, "at": "NOW"}',
        '{"pid": 99999999999999, "at": "NOW"}',
    ],
)
def test_site_is_unwell_when_the_file_is_damaged(content: str, tmp_path: Path) -> None:
    (tmp_path / "health.json").write_text(content.replace("NOW", NOW.isoformat()))
    assert site_health.fault(tmp_path, now=NOW) != ""


def test_daemon_goes_on_when_the_file_cannot_be_written(tmp_path: Path) -> None:
    site_health.record(tmp_path / "no such folder")
    assert "has not started" in site_health.fault(tmp_path / "no such folder")


def test_site_check_as_a_command_exits_with_0_or_1_and_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedward_client.health", "--home", str(tmp_path)]
    site_health.record(tmp_path)
    well = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    site_health.record(tmp_path, now=datetime.now(UTC) - timedelta(hours=1))
    stale = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (well.returncode, well.stdout, well.stderr) == (0, "", "")
    assert (stale.returncode, stale.stderr) == (1, "")
    assert "last heard of" in stale.stdout
