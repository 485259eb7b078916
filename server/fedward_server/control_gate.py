"""The gate before every method of the coordinators' service, health included.

It refuses by certificate, role and roster, records the refusal, and turns errors into gRPC statuses. What
leaves here about an error is its message and remedy when it was raised on purpose, and nothing at all
when it was not.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from fedward_common.audit import AuditLog
from fedward_common.errors import ConnectionLostError, FederationError, IdentityError
from fedward_common.federation import Peer, read_federation
from fedward_server.control_access import authorise, peer_of_pem

ERROR_KEY = "fedward-error-bin"
_REFUSAL_PAUSE_S = 60.0
_MAX_TEXT = 3000  # gRPC carries 8 KiB of metadata by default
_log = logging.getLogger(__name__)


class Gate(grpc.ServerInterceptor):  # type: ignore[misc]
    """Stands before every method: refuses by role, and translates errors.

    Args:
        federation: path of the roster, read at every call: who is taken off it is refused at once.
        audit: where refusals are recorded.
    """

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
            peer = caller(context)
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


def caller(context: Any) -> Peer:
    """Name the peer of a call; see `peer_of_pem` for the errors."""
    return peer_of_pem(context.auth_context().get("x509_pem_cert"))


def _abort(context: Any, error: Exception) -> None:
    if isinstance(error, IdentityError):
        _refuse(context, grpc.StatusCode.PERMISSION_DENIED, error)
    if isinstance(error, ConnectionLostError):
        _refuse(context, grpc.StatusCode.UNAVAILABLE, error)
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
