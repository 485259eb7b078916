"""The coordinators' gRPC service: launch, watch, stop, resume and report runs, see sites, ask for health.

Mutual TLS with the federation's own authority; who may call what is in `control_access`, and
`control_gate` stands before every method. The methods themselves only pass on to the supervisor and the
run store, which may be asked from several threads at once.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from pydantic import BaseModel

from fedward_common.audit import AuditLog
from fedward_common.errors import ConnectionLostError, UsageError
from fedward_common.federation import join_address, read_federation
from fedward_common.identity import Identity, read_private
from fedward_common.plan import parse_signed_plan
from fedward_server import control_pb2, control_pb2_grpc
from fedward_server.control_access import SERVICE
from fedward_server.control_gate import Gate, caller
from fedward_server.following import follow
from fedward_server.run_records import RunInfo, SiteStatus
from fedward_server.runs import RunStore
from fedward_server.supervisor import RunSupervisor

_THREADS = 32
_MAX_WATCHERS = 24  # each holds a thread; the rest stay free for calls that end at once
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share it
    ("grpc.max_receive_message_length", 4_200_000),  # a signed plan has 4,000,000 bytes at most
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


class ControlServer:
    """The service on its port.

    Args:
        identity: the server's.
        supervisor: does the work.
        sites: names of the sites connected now.
        host: address to bind.
        port: 0 lets the system choose; see `port`.
        report: makes the document (RunReport as JSON) that `Report` returns.
    """

    def __init__(
        self,
        identity: Identity,
        supervisor: RunSupervisor,
        *,
        sites: Callable[[], list[str]],
        host: str,
        port: int,
        report: Callable[[RunStore, str], bytes],
    ) -> None:
        gate = Gate(supervisor.home.federation, AuditLog(supervisor.home.audit))
        pool = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="control")
        self._server = grpc.server(pool, interceptors=(gate,), options=_OPTIONS)
        self._service = _Service(supervisor, sites, report)
        control_pb2_grpc.add_ControlServicer_to_server(self._service, self._server)  # type: ignore[no-untyped-call]
        self._health = health.HealthServicer(experimental_non_blocking=False)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        address = join_address(host, port)
        try:
            self.port = int(self._server.add_secure_port(address, _credentials(identity)))
        except RuntimeError as error:
            raise ConnectionLostError(
                f"the coordinators' service cannot listen on {address}",
                remedy="Choose another control port, or stop the program that uses this one.",
            ) from error

    def start(self) -> None:
        """Begin to answer, and report good health."""
        self._server.start()
        for name in ("", SERVICE.strip("/")):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> None:
        """Report bad health, end watches, let calls in progress finish, close the port."""
        self._health.enter_graceful_shutdown()
        self._service.end_watches()
        self._server.stop(grace=2).wait()


class _Service(control_pb2_grpc.ControlServicer):
    """The methods, as the gate lets them through; errors raised here are turned into statuses there."""

    def __init__(
        self,
        supervisor: RunSupervisor,
        sites: Callable[[], list[str]],
        report: Callable[[RunStore, str], bytes],
    ) -> None:
        self._supervisor = supervisor
        self._store = supervisor.store
        self._sites = sites
        self._report = report
        self._closing = False
        self._watches: set[threading.Event] = set()
        self._lock = threading.Lock()

    def end_watches(self) -> None:
        """Let every watcher know that the server closes."""
        with self._lock:
            self._closing = True
            for gone in self._watches:
                gone.set()

    def Launch(self, request: Any, context: Any) -> Any:  # noqa: N802 - the name in control.proto
        """Start a run."""
        run_id = self._supervisor.start(request.signed_plan, by=caller(context).name)
        return _document(self._store.run(run_id))

    def List(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """All runs."""
        return _documents(self._store.runs())

    def Describe(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """One run and its plan."""
        return control_pb2.Document(json=_description(self._store, request.run_id))

    def Watch(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        """A run's events until it has ended, the watcher is gone, or the server closes."""
        gone = threading.Event()
        with self._lock:
            if len(self._watches) >= _MAX_WATCHERS:
                raise UsageError(
                    f"{_MAX_WATCHERS} screens are watching already", remedy="Close one, or try again later."
                )
            self._watches.add(gone)
        try:
            if not context.add_callback(gone.set):
                return
            for event in follow(self._store, request.run_id, after=request.after, stop=gone):
                yield _document(event)
            if self._closing:
                raise ConnectionLostError(
                    "the server is shutting down", remedy="Watch again when it is back."
                )
        finally:
            with self._lock:
                self._watches.discard(gone)

    def Stop(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Ask a run to stop."""
        self._supervisor.stop(request.run_id, by=caller(context).name)
        return _document(self._store.run(request.run_id))

    def Resume(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Continue a run."""
        self._supervisor.resume(request.run_id, by=caller(context).name)
        return _document(self._store.run(request.run_id))

    def Report(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """The run's report."""
        return control_pb2.Document(json=self._report(self._store, request.run_id))

    def Sites(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """The roster's sites and whether they are connected."""
        online = set(self._sites())
        roster = read_federation(self._supervisor.home.federation).sites
        return _documents([SiteStatus(name=name, online=name in online) for name in sorted(roster)])


def _description(store: RunStore, run_id: str) -> bytes:
    info = store.run(run_id)
    plan = parse_signed_plan(store.signed_plan(run_id)).content
    document = {"run": info.model_dump(mode="json"), "plan": plan.model_dump(mode="json")}
    return json.dumps(document, separators=(",", ":")).encode()


def _document(record: BaseModel) -> Any:
    return control_pb2.Document(json=record.model_dump_json().encode())


def _documents(records: list[RunInfo] | list[SiteStatus]) -> Any:
    listing = [record.model_dump(mode="json") for record in records]
    return control_pb2.Document(json=json.dumps(listing, separators=(",", ":")).encode())


def _credentials(identity: Identity) -> Any:
    return grpc.ssl_server_credentials(
        [(read_private(identity.key), identity.certificate.read_bytes())],
        root_certificates=identity.ca.read_bytes(),
        require_client_auth=True,
    )
