"""The coordinators' service over real TLS on loopback: who gets in, who may do what, what comes back."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedward_common.audit import AuditLog
from fedward_common.errors import (
    ConnectionLostError,
    FederationError,
    IdentityError,
    PlanError,
    StorageError,
    UsageError,
)
from fedward_common.evaluation.report import RunReport
from fedward_common.identity import Identity, load_identity
from fedward_server import control, control_pb2, control_pb2_grpc
from fedward_server.config import ServerHome
from fedward_server.control import ControlServer
from fedward_server.control_access import ALLOWED, authorise, peer_of_pem
from fedward_server.control_client import ControlClient
from fedward_server.run_records import Event
from fedward_server.supervisor import RunSupervisor
from tests.federations import a_federation
from tests.server.run_builders import wait_for
from tests.server.supervised import (
    Mailboxes,
    a_control_server,
    a_home,
    a_script,
    a_supervisor,
    serving,
)


@dataclass(frozen=True)
class Place:
    """A running service."""

    home: ServerHome
    supervisor: RunSupervisor
    server: ControlServer
    mailboxes: Mailboxes

    def member(self, folder: str) -> Identity:
        return load_identity(self.home.directory / folder)

    def client(self, folder: str = "coordinators/anna") -> ControlClient:
        return ControlClient(self.member(folder), pause=lambda _: None)

    def channel(self, identity: Identity | None) -> grpc.Channel:
        ca = (self.home.identity / "ca.crt").read_bytes()
        credentials = (
            grpc.ssl_channel_credentials(ca)
            if identity is None
            else grpc.ssl_channel_credentials(
                ca, identity.key.read_bytes(), identity.certificate.read_bytes()
            )
        )
        return grpc.secure_channel(f"127.0.0.1:{self.server.port}", credentials)

    def run(self, script: str, **options: Any) -> str:
        """Start a run, and wait for its end unless it is one that waits."""
        closed = len(self.mailboxes.closed)
        with self.client() as client:
            run_id = client.launch(a_script(self.home, script, **options)).run_id
        if script != "wait":
            self.mailboxes.wait_closed(closed + 1)
        return run_id


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    home, mailboxes = a_home(tmp_path / "federation", settings="stop_grace_s = 5\n"), Mailboxes()
    with (
        a_supervisor(home, mailboxes) as supervisor,
        a_control_server(home, supervisor, online=["south"]) as server,
    ):
        yield Place(home, supervisor, server, mailboxes)


def requests() -> dict[str, Any]:
    run = control_pb2.RunRequest(run_id="run-1")
    return {
        "Launch": control_pb2.LaunchRequest(signed_plan=b"{}"),
        "List": control_pb2.ListRequest(),
        "Describe": run,
        "Watch": control_pb2.WatchRequest(run_id="run-1"),
        "Stop": run,
        "Resume": run,
        "Report": run,
        "Sites": control_pb2.SitesRequest(),
    }


def code_of(stub: Any, method: str) -> grpc.StatusCode:
    """The status of one call, OK included."""
    try:
        reply = getattr(stub, method)(requests()[method], timeout=20)
        if method == "Watch":
            list(reply)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_every_method_has_a_rule_and_no_rule_lacks_its_method() -> None:
    methods = {
        f"/{service.full_name}/{method.name}"
        for service in (
            control_pb2.DESCRIPTOR.services_by_name["Control"],
            health_pb2.DESCRIPTOR.services_by_name["Health"],
        )
        for method in service.methods
    }

    assert set(ALLOWED) == methods
    assert set(requests()) == {name.rpartition("/")[2] for name in methods if "Control" in name}


@pytest.mark.parametrize("shown", [None, [], [b"no certificate"], [b"one", b"two"], [b"\xff"]])
def test_peer_without_one_readable_certificate_is_nobody(shown: list[bytes] | None) -> None:
    with pytest.raises(IdentityError):
        peer_of_pem(shown)


def test_method_without_a_rule_is_refused_to_everybody(tmp_path: Path) -> None:
    anna = load_identity(a_federation(tmp_path / "federation") / "coordinators" / "anna")

    with pytest.raises(IdentityError, match="may not call Erase"):
        authorise("/fedward.control.v1.Control/Erase", anna.peer, anna.federation)


def test_caller_without_a_certificate_gets_no_connection(place: Place) -> None:
    with place.channel(None) as channel:
        stub = control_pb2_grpc.ControlStub(channel)  # type: ignore[no-untyped-call]

        assert {code_of(stub, method) for method in requests()} == {grpc.StatusCode.UNAVAILABLE}


def test_certificate_of_another_authority_gets_no_connection(place: Place, tmp_path: Path) -> None:
    other = load_identity(a_federation(tmp_path / "other") / "coordinators" / "anna")
    with place.channel(other) as channel:
        stub = control_pb2_grpc.ControlStub(channel)  # type: ignore[no-untyped-call]

        assert {code_of(stub, method) for method in requests()} == {grpc.StatusCode.UNAVAILABLE}


@pytest.mark.parametrize("member", ["sites/north", "server"])
def test_certificates_of_sites_and_servers_are_refused_everywhere(place: Place, member: str) -> None:
    identity = place.member(member)
    with place.channel(identity) as channel:
        stub = control_pb2_grpc.ControlStub(channel)  # type: ignore[no-untyped-call]
        codes = {method: code_of(stub, method) for method in requests()}
        with pytest.raises(grpc.RpcError) as caught:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)

    # gRPC itself may end the connection of a certificate that is not for clients
    refused = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE}
    assert set(codes.values()) <= refused
    assert caught.value.code() in refused
    assert place.supervisor.store.runs() == []
    if member == "sites/north":
        assert set(codes.values()) == {grpc.StatusCode.PERMISSION_DENIED}
        refusals = [entry.fields for entry in AuditLog(place.home.audit).entries()]
        assert {"peer": "north", "role": "site", "method": "Launch"} in refusals


def test_observer_may_look_and_do_nothing_else(place: Place) -> None:
    run_id = place.run("complete")
    document = a_script(place.home, "complete")
    with place.client("observers/otto") as otto:
        attempts: list[Callable[[], object]] = [
            lambda: otto.launch(document),
            lambda: otto.stop(run_id),
            lambda: otto.resume(run_id),
        ]
        for forbidden in attempts:
            with pytest.raises(IdentityError, match="observer otto may not call"):
                forbidden()

        assert [info.run_id for info in otto.runs()] == [run_id]
        assert [site.name for site in otto.sites()] == ["north", "south"]
        assert list(otto.watch(run_id))[-1].kind == "finished"
        assert otto.report(run_id)
        assert otto.healthy()
    assert len(place.supervisor.store.runs()) == 1


def test_coordinator_taken_off_the_roster_is_refused_at_once(place: Place) -> None:
    federation = place.member("server").federation
    with place.client() as anna:
        anna.runs()
        place.home.federation.write_bytes(federation.model_copy(update={"coordinators": {}}).to_bytes())

        with pytest.raises(IdentityError, match="coordinator anna is not a coordinator or observer"):
            anna.runs()


def test_coordinator_launches_watches_and_reads_the_run(place: Place) -> None:
    with place.client() as anna:
        info = anna.launch(a_script(place.home, "complete"))
        events = list(anna.watch(info.run_id))
        run, plan = anna.describe(info.run_id)
        report = anna.report(info.run_id)

    assert [event.kind for event in events] == [
        "status",
        "status",
        "round_committed",
        "round_committed",
        "finished",
    ]
    assert (run.status, run.rounds_done, plan.rounds) == ("completed", 2, 2)
    document = RunReport.model_validate_json(report)
    assert (document.verdict, [line.round_index for line in document.rounds]) == ("completed", [1, 2])
    assert ("run_started", "anna") in [
        (entry.event, entry.fields.get("peer")) for entry in AuditLog(place.home.audit).entries()
    ]


def test_watch_shows_events_while_the_run_goes_and_again_from_the_beginning(place: Place) -> None:
    run_id = place.run("wait")
    with place.client() as anna:
        stream = anna.watch(run_id)
        seen: list[Event] = []
        while not seen or seen[-1].kind != "round_committed":
            seen.append(next(stream))
        assert place.supervisor.store.run(run_id).status == "running"

        anna.stop(run_id)
        seen += stream

        assert seen[-1].fields["status"] == "stopped"
        assert list(anna.watch(run_id)) == seen
        assert list(anna.watch(run_id, after=seen[-2].sequence)) == seen[-1:]


def test_stopped_run_is_resumed_over_the_service(place: Place) -> None:
    run_id = place.run("wait")
    wait_for(place.supervisor.store, run_id, "round_committed")
    with place.client() as anna:
        anna.stop(run_id)
        place.mailboxes.wait_closed(1)
        assert anna.resume(run_id).rounds_done == 1
        place.mailboxes.wait_closed(2)

        assert [(info.run_id, info.status) for info in anna.runs()] == [(run_id, "completed")]


def test_errors_arrive_with_their_class_message_and_remedy(place: Place) -> None:
    with place.client() as anna:
        with pytest.raises(PlanError, match="not a signed plan") as plan_error:
            anna.launch(b"{}")
        with pytest.raises(UsageError, match="no run 'x y'") as usage_error:
            anna.stop("x y")
        with pytest.raises(UsageError, match="no run"):
            list(anna.watch("nothing"))

    assert plan_error.value.exit_code == 3
    assert "plan sign" in plan_error.value.remedy
    assert "run list" in usage_error.value.remedy


def test_fault_inside_tells_the_caller_nothing_of_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> list[str]:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(place.server._service, "_sites", broken)
    with place.client() as anna, pytest.raises(FederationError) as caught:
        anna.sites()

    assert "/secret" not in f"{caught.value.message} {caught.value.remedy}"
    assert "INTERNAL" in caught.value.message
    assert "request_failed" in caplog.messages


def test_sites_of_the_roster_and_who_is_connected(place: Place) -> None:
    with place.client() as anna:
        assert [(site.name, site.online) for site in anna.sites()] == [("north", False), ("south", True)]


def test_server_that_is_gone_is_a_clear_error(place: Place) -> None:
    place.server.stop()
    with place.client() as anna, pytest.raises(ConnectionLostError, match="no answer from the server"):
        anna.runs()


def test_watch_survives_a_server_that_restarts(place: Place) -> None:
    """The client takes the stream up again where it broke off: nothing twice, nothing lost."""
    run_id = place.run("wait")
    wait_for(place.supervisor.store, run_id, "round_committed")
    restarted = threading.Event()
    servers = [place.server]

    def restart(_: float) -> None:
        if not restarted.is_set():
            servers.append(serving(place.home, place.supervisor, [], port=place.server.port))
            servers[1].start()
            place.supervisor.stop(run_id)
            restarted.set()

    with ControlClient(place.member("coordinators/anna"), pause=restart) as anna:
        stream = anna.watch(run_id)
        seen = [next(stream) for _ in range(3)]
        place.server.stop()
        seen += stream
    servers[1].stop()

    assert restarted.is_set()
    assert seen == place.supervisor.store.events(run_id)
    assert seen[-1].fields["status"] == "stopped"


def test_client_refuses_a_server_that_shows_a_sites_certificate(place: Place) -> None:
    """A hospital's key must not be able to play the server, even at the right address."""
    impostor = serving(place.home, place.supervisor, [], member="sites/north")
    impostor.start()
    anna = place.member("coordinators/anna")
    aimed = replace(
        anna, federation=anna.federation.model_copy(update={"control": f"127.0.0.1:{impostor.port}"})
    )
    try:
        with ControlClient(aimed) as client, pytest.raises(IdentityError, match="did not show"):
            client.runs()
    finally:
        impostor.stop()


def test_port_in_use_is_a_clear_error(place: Place) -> None:
    with pytest.raises(ConnectionLostError, match="cannot listen"):
        serving(place.home, place.supervisor, [], port=place.server.port)


def test_more_watchers_than_threads_are_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_MAX_WATCHERS", 1)
    run_id = place.run("wait")
    with place.client() as anna:
        first = anna.watch(run_id)
        next(first)
        with pytest.raises(UsageError, match="watching already"):
            next(anna.watch(run_id))
        assert anna.runs()


def test_record_that_cannot_be_read_is_reported_as_such(place: Place) -> None:
    place.run("complete")
    place.supervisor.store.close()
    with place.client() as anna, pytest.raises(StorageError):
        anna.runs()


def test_client_needs_a_private_key_of_its_own(place: Place, tmp_path: Path) -> None:
    copy = shutil.copytree(place.home.directory / "coordinators" / "anna", tmp_path / "anna")
    (copy / "tls.key").chmod(0o644)

    with pytest.raises(IdentityError, match="open to other users"):
        load_identity(copy)
