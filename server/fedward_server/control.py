"""The coordinators' gRPC service: launch, watch, stop, resume and report runs, see sites, ask for health.

Mutual TLS with the federation's own authority; who may call what is in `control_access`. One gate stands
before every method, health included: it refuses, records the refusal, and turns errors into statuses.
What leaves here about an error is its message and remedy when it was raised on purpose, and nothing at
all when it was not.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from pydantic import BaseModel

from fedward_common.audit import AuditLog
from fedward_common.errors import ConnectionLostError, FederationError, IdentityError
from fedward_common.federation import Peer, join_address, read_federation
from fedward_common.identity import Identity, read_private
from fedward_common.plan import parse_signed_plan
from fedward_server import control_pb2, control_pb2_grpc
from fedward_server.control_access import SERVICE, authorise, peer_of_pem
from fedward_server.following import follow
from fedward_server.run_records import RunInfo, SiteStatus
from fedward_server.runs import RunStore
from fedward_server.supervisor import RunSupervisor

ERROR_KEY = "fedward-error-bin"
_THREADS = 32
_MAX_WATCHERS = 24  # each holds a thread; the rest stay free for calls that end at once
_REFUSAL_PAUSE_S = 60.0
_MAX_TEXT = 3000  # gRPC carries 8 KiB of metadata by default
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share it
    ("grpc.max_receive_message_length", 4_200_000),  # a signed plan has 4,000,000 bytes at most
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
_log = logging.getLogger(__name__)


class ControlServer:
    """The service on its port.

    Args:
        identity: the server's.
        supervisor: does the work.
        sites: names of the sites connected now.
        host: address to bind.
        port: 0 lets the system choose; see `port`.
        report: the document that `Report` returns; the run's plain records when not given.
    """

    def __init__(
        self,
        identity: Identity,
        supervisor: RunSupervisor,
        *,
        sites: Callable[[], list[str]],
        host: str,
        port: int,
        report: Callable[[RunStore, str], bytes] | None = None,
    ) -> None:
        self._closing = threading.Event()
        gate = _Gate(supervisor.home.federation, AuditLog(supervisor.home.audit))
        pool = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="control")
        self._server = grpc.server(pool, interceptors=(gate,), options=_OPTIONS)
        service = _Service(supervisor, sites, report or records_document, self._closing)
        control_pb2_grpc.add_ControlServicer_to_server(service, self._server)  # type: ignore[no-untyped-call]
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
        self._closing.set()
        self._server.stop(grace=2).wait()


class _Service(control_pb2_grpc.ControlServicer):
    """The methods, as the gate lets them through; errors raised here are turned into statuses there."""

    def __init__(
        self,
        supervisor: RunSupervisor,
        sites: Callable[[], list[str]],
        report: Callable[[RunStore, str], bytes],
        closing: threading.Event,
    ) -> None:
        self._supervisor = supervisor
        self._store = supervisor.store
        self._sites = sites
        self._report = report
        self._closing = closing
        self._watchers = threading.BoundedSemaphore(_MAX_WATCHERS)

    def Launch(self, request: Any, context: Any) -> Any:  # noqa: N802 - the name in control.proto
        """Start a run."""
        run_id = self._supervisor.start(request.signed_plan, by=_peer(context).name)
        return _document(self._store.run(run_id))

    def List(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """All runs."""
        return _documents(self._store.runs())

    def Describe(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """One run and its plan."""
        return control_pb2.Document(json=_description(self._store, request.run_id))

    def Watch(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        """A run's events until it has ended, the watcher is gone, or the server closes."""
        self._store.run(request.run_id)
        if not self._watchers.acquire(blocking=False):
            raise FederationError(
                f"{_MAX_WATCHERS} screens are watching already", remedy="Close one, or try again later."
            )
        gone = threading.Event()
        context.add_callback(gone.set)
        try:
            for event in follow(self._store, request.run_id, after=request.after, stop=gone):
                yield _document(event)
                if self._closing.is_set():
                    return
        finally:
            self._watchers.release()

    def Stop(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Ask a run to stop."""
        self._supervisor.stop(request.run_id, by=_peer(context).name)
        return _document(self._store.run(request.run_id))

    def Resume(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Continue a run."""
        self._supervisor.resume(request.run_id, by=_peer(context).name)
        return _document(self._store.run(request.run_id))

    def Report(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """The run's report."""
        return control_pb2.Document(json=self._report(self._store, request.run_id))

    def Sites(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """The roster's sites and whether they are connected."""
        online = set(self._sites())
        roster = read_federation(self._supervisor.home.federation).sites
        return _documents([SiteStatus(name=name, online=name in online) for name in sorted(roster)])


class _Gate(grpc.ServerInterceptor):  # type: ignore[misc]
    """Stands before every method: refuses by role, and translates errors."""

    def __init__(self, federation: Path, audit: AuditLog) -> None:
        self._federation = federation
        self._audit = audit
        self._told: dict[tuple[str, str], float] = {}

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Wrap the method's handler; None, "not implemented", for unknown methods and other kinds."""
        handler = continuation(details)
        if handler is None:
            return None
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary is not None:
            call = self._guarded_call(details.method, handler.unary_unary)
            return grpc.unary_unary_rpc_method_handler(call, **codec)
        if handler.unary_stream is not None:
            stream = self._guarded_stream(details.method, handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(stream, **codec)
        return None

    def _guarded_call(self, method: str, call: Any) -> Any:
        def guarded(request: Any, context: Any) -> Any:
            self._admit(method, context)
            try:
                return call(request, context)
            except Exception as error:  # process edge
                failure = error
            return _abort(context, failure)

        return guarded

    def _guarded_stream(self, method: str, stream: Any) -> Any:
        def guarded(request: Any, context: Any) -> Iterator[Any]:
            self._admit(method, context)
            try:
                yield from stream(request, context)
                return
            except Exception as error:  # process edge
                failure = error
            _abort(context, failure)

        return guarded

    def _admit(self, method: str, context: Any) -> None:
        peer: Peer | None = None
        try:
            peer = _peer(context)
            authorise(method, peer, read_federation(self._federation))
            return
        except FederationError as error:
            refusal = error
        self._record(method.rpartition("/")[2], peer)
        _refuse(context, grpc.StatusCode.PERMISSION_DENIED, refusal)

    def _record(self, method: str, peer: Peer | None) -> None:
        """Write a refusal down, the same one once a minute: a caller must not fill the disk."""
        name = peer.name if peer else "unknown"
        now = time.monotonic()
        if now - self._told.get((name, method), -_REFUSAL_PAUSE_S) < _REFUSAL_PAUSE_S:
            return
        self._told[name, method] = now
        role = peer.role if peer else "none"
        _log.warning("request_refused", extra={"peer": name, "role": role, "method": method})
        try:
            self._audit.append("request_refused", peer=name, role=role, method=method)
        except FederationError:
            _log.exception("audit_unwritten")


def records_document(store: RunStore, run_id: str) -> bytes:
    """The run's records as they are: {"run", "plan", "rounds", "result"}."""
    document = {
        **json.loads(_description(store, run_id)),
        "rounds": [record.model_dump(mode="json") for record in store.rounds(run_id)],
        "result": store.result(run_id),
    }
    return json.dumps(document, separators=(",", ":")).encode()


def _description(store: RunStore, run_id: str) -> bytes:
    info = store.run(run_id)
    plan = parse_signed_plan(store.signed_plan(run_id)).plan
    document = {"run": info.model_dump(mode="json"), "plan": plan.model_dump(mode="json")}
    return json.dumps(document, separators=(",", ":")).encode()


def _document(record: BaseModel) -> Any:
    return control_pb2.Document(json=record.model_dump_json().encode())


def _documents(records: list[RunInfo] | list[SiteStatus]) -> Any:
    listing = [record.model_dump(mode="json") for record in records]
    return control_pb2.Document(json=json.dumps(listing, separators=(",", ":")).encode())


def _peer(context: Any) -> Peer:
    return peer_of_pem(context.auth_context().get("x509_pem_cert"))


def _abort(context: Any, error: Exception) -> None:
    if isinstance(error, IdentityError):
        _refuse(context, grpc.StatusCode.PERMISSION_DENIED, error)
    if isinstance(error, FederationError):
        _refuse(context, grpc.StatusCode.FAILED_PRECONDITION, error)
    _log.error("request_failed", exc_info=error)
    context.abort(grpc.StatusCode.INTERNAL, "internal fault; see the server's log")


def _refuse(context: Any, code: grpc.StatusCode, error: FederationError) -> None:
    told = {
        "kind": type(error).__name__,
        "message": error.message[:_MAX_TEXT],
        "remedy": error.remedy[:_MAX_TEXT],
    }
    context.set_trailing_metadata(((ERROR_KEY, json.dumps(told, ensure_ascii=False).encode()),))
    context.abort(code, error.message[:500])


def _credentials(identity: Identity) -> Any:
    return grpc.ssl_server_credentials(
        [(read_private(identity.key), identity.certificate.read_bytes())],
        root_certificates=identity.ca.read_bytes(),
        require_client_auth=True,
    )
