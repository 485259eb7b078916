"""Talk to a federation's server as a coordinator or observer.

The address and the authority come from the identity directory; the machine's trusted certificates play
no part. Every failure becomes a FederationError: those the server raised arrive with their own message
and remedy, the rest says what could not be reached and what to check.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedward_common.errors import ConnectionLostError, FederationError, IdentityError, PlanError
from fedward_common.federation import split_address
from fedward_common.identity import Identity, read_private
from fedward_common.plan import ReadinessPlan, TrainingPlan, parse_any_plan
from fedward_server import control_pb2, control_pb2_grpc
from fedward_server.control_gate import ERROR_KEY
from fedward_server.run_records import Event, RunInfo, SiteStatus

_PATIENCE_S = 60.0
_PAUSE_S = 1.0
_KINDS: dict[str, type[FederationError]] = {kind.__name__: kind for kind in FederationError.__subclasses__()}
_KINDS["PlanRefusedError"] = PlanError
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ControlClient:
    """A connection to the coordinators' service; use it as a context manager.

    Args:
        identity: a coordinator's or an observer's.
        timeout_s: seconds a call may take; watching is not limited.
        pause: waits that many seconds between attempts to take up a lost watch again.
    """

    def __init__(
        self, identity: Identity, *, timeout_s: float = 20, pause: Callable[[float], None] = time.sleep
    ) -> None:
        self._address = identity.federation.control
        self._who = f"{identity.peer.role} {identity.peer.name}"
        self._timeout_s = timeout_s
        self._pause = pause
        options = [
            ("grpc.max_receive_message_length", 256 * 2**20),  # a report of ten thousand rounds
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.enable_retries", 0),
        ]
        if split_address(self._address)[0] in _LOOPBACK:
            options.append(("grpc.enable_http_proxy", 0))
        credentials = grpc.ssl_channel_credentials(
            root_certificates=identity.ca.read_bytes(),
            private_key=read_private(identity.key),
            certificate_chain=identity.certificate.read_bytes(),
        )
        self._channel = grpc.secure_channel(self._address, credentials, options=options)
        self._stub = control_pb2_grpc.ControlStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> ControlClient:
        """Return the client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection."""
        self._channel.close()

    def launch(self, signed_plan: bytes) -> RunInfo:
        """Start a run from a signed plan, given byte for byte."""
        return self._run_info(self._stub.Launch, control_pb2.LaunchRequest(signed_plan=signed_plan))

    def runs(self) -> list[RunInfo]:
        """All runs, newest first."""
        listing = json.loads(self._call(self._stub.List, control_pb2.ListRequest()))
        return [RunInfo.model_validate(document) for document in listing]

    def describe(self, run_id: str) -> tuple[RunInfo, TrainingPlan | ReadinessPlan]:
        """One run and its plan."""
        document = json.loads(self._call(self._stub.Describe, control_pb2.RunRequest(run_id=run_id)))
        return RunInfo.model_validate(document["run"]), parse_any_plan(document["plan"])

    def stop(self, run_id: str) -> RunInfo:
        """Ask a run to stop; it may take a moment until its status says so."""
        return self._run_info(self._stub.Stop, control_pb2.RunRequest(run_id=run_id))

    def resume(self, run_id: str) -> RunInfo:
        """Continue an ended run after its last committed round."""
        return self._run_info(self._stub.Resume, control_pb2.RunRequest(run_id=run_id))

    def report(self, run_id: str) -> bytes:
        """The run's report, as JSON."""
        return self._call(self._stub.Report, control_pb2.RunRequest(run_id=run_id))

    def sites(self) -> list[SiteStatus]:
        """The roster's sites and whether each is connected."""
        listing = json.loads(self._call(self._stub.Sites, control_pb2.SitesRequest()))
        return [SiteStatus.model_validate(document) for document in listing]

    def healthy(self) -> bool:
        """Whether the server says that it serves."""
        check = health_pb2_grpc.HealthStub(self._channel).Check
        try:
            reply = check(health_pb2.HealthCheckRequest(), timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._translated(error) from error
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def watch(self, run_id: str, *, after: int = 0) -> Iterator[Event]:
        """Yield a run's events, from the first or from `after`, until the run has ended.

        A connection lost on the way is taken up again where it broke off, for up to a minute.
        """
        lost_at: float | None = None
        while True:
            request = control_pb2.WatchRequest(run_id=run_id, after=after)
            opened_at = time.monotonic()
            try:
                for document in self._stub.Watch(request):
                    event = Event.model_validate_json(document.json)
                    after, lost_at = event.sequence, None
                    yield event
                return
            except grpc.RpcError as error:
                failure = self._translated(error)
                now = time.monotonic()
                # An attempt that lasted so long had connected: a round can be silent for hours.
                lost_at = now if lost_at is None or now - opened_at > _PATIENCE_S else lost_at
                started = after > 0 and isinstance(failure, ConnectionLostError)
                if not started or now - lost_at > _PATIENCE_S:
                    raise failure from error
            self._pause(_PAUSE_S)

    def _run_info(self, method: Any, request: Any) -> RunInfo:
        return RunInfo.model_validate_json(self._call(method, request))

    def _call(self, method: Any, request: Any) -> bytes:
        try:
            return bytes(method(request, timeout=self._timeout_s).json)
        except grpc.RpcError as error:
            raise self._translated(error) from error

    def _translated(self, error: Any) -> FederationError:
        told = _told_by_server(error)
        if told is not None:
            return told
        code, details = error.code(), str(error.details() or "")
        if code is grpc.StatusCode.UNAVAILABLE and _certificate_failed(details):
            return IdentityError(
                f"the server at {self._address} did not show a certificate of this federation for that name",
                remedy="Check --identity, and that federation.json names the right server.",
            )
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return FederationError(
                f"the server at {self._address} does not know this request",
                remedy="Install the same version of fedward on both sides.",
            )
        if code in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.CANCELLED,
        ):
            return ConnectionLostError(
                f"no answer from the server at {self._address}",
                remedy="Check that `fedward serve` runs there and that this machine may reach the port; if it"
                f" does, it did not accept the certificate of {self._who}.",
            )
        return FederationError(
            f"the server at {self._address} failed: {code.name}", remedy="See the server's log."
        )


def _told_by_server(error: Any) -> FederationError | None:
    """Rebuild the error that the server raised, with the class that decides the exit code."""
    for key, value in error.trailing_metadata() or ():
        if key != ERROR_KEY:
            continue
        try:
            told = json.loads(value)
            message, remedy = str(told["message"]), str(told["remedy"])
            kind = _KINDS.get(told["kind"], FederationError)
        except (ValueError, KeyError, TypeError):
            return None
        return kind(message, remedy=remedy)
    return None


def _certificate_failed(details: str) -> bool:
    return "CERTIFICATE_VERIFY_FAILED" in details or "Peer name" in details or "not in peer cert" in details
