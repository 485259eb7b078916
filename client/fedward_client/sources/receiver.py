"""Our own storage node: receives what a PACS pushes (C-STORE), or sends on our C-MOVE (hop 1).

Who may send is listed by AE title and, better, by network address or certificate. An object goes to its taker
as it was encoded, nothing of it is parsed; the answer "stored" is given when it is safe on the disk, because
a PACS sends a pushed object once.

Source: DICOM PS3.4 B.2 (storage service and its statuses), PS3.8 9.3.4 (rejections).
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.association import Association
from pynetdicom.transport import ThreadedAssociationServer

from fedward_client.sources.access import server_context
from fedward_client.sources.association import new_entity, received
from fedward_client.sources.dimse_status import MISMATCH, NOT_UNDERSTOOD, OUT_OF_RESOURCES, STORED
from fedward_client.sources.manifest import Refusal
from fedward_client.sources.meter import Meter
from fedward_client.sources.part10 import Instance, is_uid, sop_instance_of
from fedward_client.sources.settings import DimseConfig
from fedward_client.sources.spool import Spool
from fedward_client.sources.syntaxes import TRANSFER_SYNTAXES
from fedward_common.errors import FederationError, UsageError
from fedward_common.federation import split_address

MAX_ASSOCIATIONS = 10
"""Open at one time; a connection beyond twice as many is not even listened to."""

_VERIFICATION = "1.2.840.10008.1.1"
_log = logging.getLogger(__name__)

Taker = Callable[[Instance], Refusal | None]
"""Takes each instance that arrives; says whether it was kept."""

TooLarge = Callable[[str, int], None]
"""Told the SOPInstanceUID and the size of each object that was over the limit."""


class Receiver:
    """A listening storage node; it listens while it is open with `with`.

    Args:
        config: our AE title, where to listen, who may send, and the limits.
        take: for what arrives; called from several threads.
        too_large: for what is over the limit.

    Raises:
        UsageError: the address is taken or not ours.
        IdentityError: the certificate or key cannot be used.
    """

    def __init__(self, config: DimseConfig, take: Taker, too_large: TooLarge) -> None:
        self._config, self._take, self._too_large = config, take, too_large
        self._meters: WeakKeyDictionary[Association, Meter] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._arriving: set[socket.socket] = set()  # admitted, not yet among the active associations

    @property
    def counts(self) -> Mapping[str, int]:
        """Events so far: "stored", "refused", "rejected" (associations)."""
        with self._lock:
            return dict(self._counts)

    def __enter__(self) -> Receiver:
        host, port = split_address(self._config.listen or "")
        entity = new_entity(self._config)
        entity.require_called_aet = True
        entity.require_calling_aet = list(self._config.allowed_senders)
        entity.maximum_associations = MAX_ASSOCIATIONS
        entity.add_supported_context(_VERIFICATION)
        for context in AllStoragePresentationContexts:
            if context.abstract_syntax is not None:
                entity.add_supported_context(context.abstract_syntax, list(TRANSFER_SYNTAXES))
        tls = None if self._config.tls is None else _Listening(server_context(self._config.tls), self._config)
        try:
            server = entity.start_server(
                (host, port),
                block=False,
                ssl_context=tls,  # type: ignore[arg-type]
                evt_handlers=[
                    (evt.EVT_CONN_OPEN, self._opened),
                    (evt.EVT_REJECTED, self._rejected),
                    (evt.EVT_C_STORE, self._store),
                ],
            )
        except OSError as error:
            raise UsageError(
                f"cannot listen on {self._config.listen}: {error.strerror}",
                remedy="Give a free port of this machine as `listen`; is another receiver running?",
            ) from None
        assert server is not None  # it is with block=False
        self._server = server
        self._watch_over(server, entity)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        associations = self._server.active_associations
        self._server.shutdown()
        for association in associations:
            association.abort()

    def _watch_over(self, server: ThreadedAssociationServer, entity: AE) -> None:
        """Have every connection judged before threads are spent on it, one after the other."""
        process = server.process_request_thread

        def admit(request: Any, address: tuple[str, int]) -> bool:
            if not self._admits(entity, address):
                return False
            with self._lock:
                self._arriving.add(request)
            return True

        def process_admitted(request: Any, client_address: Any) -> None:
            try:
                process(request, client_address)
            finally:
                with self._lock:
                    self._arriving.discard(request)

        server.verify_request = admit  # type: ignore[method-assign,assignment]
        server.process_request_thread = process_admitted  # type: ignore[method-assign]

    def _opened(self, event: evt.Event) -> None:
        meter = Meter(
            self._config.max_object_bytes, self._config.max_association_bytes, self._config.timeout_s
        )
        meter.install(event)
        with self._lock:
            self._meters[event.assoc] = meter
        address: tuple[str, int] = event.address  # type: ignore[attr-defined]
        if not self._is_allowed(address):
            self._note("rejected")
            meter.hang_up()  # it came before `_watch_over`

    def _admits(self, entity: AE, address: tuple[str, int]) -> bool:
        """Whether to listen to a connection at all: one that stays silent keeps two threads for a while."""
        with self._lock:
            num_arriving = len(self._arriving)
        is_crowded = len(entity.active_associations) + num_arriving > 2 * MAX_ASSOCIATIONS
        if is_crowded or not self._is_allowed(address):
            self._note("rejected")
            return False
        return True

    def _is_allowed(self, address: tuple[str, int]) -> bool:
        allowed = self._config.sender_hosts
        host = address[0].removeprefix("::ffff:").partition("%")[0]
        return not allowed or host in map(str, allowed)

    def _rejected(self, _: evt.Event) -> None:
        self._note("rejected")
        _log.warning("association_rejected", extra={"count": self.counts["rejected"]})

    def _note(self, event: str) -> None:
        with self._lock:
            self._counts[event] += 1

    def _store(self, event: evt.Event) -> int:
        status = self._status_of(event)
        self._note("stored" if status == STORED else "refused")
        return status

    def _status_of(self, event: evt.Event) -> int:
        """Hand one object over; the status that its sender is told."""
        instance = received(event)
        with self._lock:
            meter = self._meters.get(event.assoc)
        num_bytes = meter.take_oversize() if meter is not None else 0
        if not (is_uid(instance.sop_class) and is_uid(instance.sop_instance)):
            return MISMATCH
        if num_bytes:
            self._too_large(instance.sop_instance, num_bytes)
            return OUT_OF_RESOURCES
        if sop_instance_of(instance) not in (None, instance.sop_instance):
            return MISMATCH
        try:
            refusal = self._take(instance)
        except FederationError as error:
            _log.error("object_not_stored", extra={"kind": type(error).__name__})
            return OUT_OF_RESOURCES
        if refusal is None:
            return STORED
        return OUT_OF_RESOURCES if refusal is Refusal.TOO_LARGE else NOT_UNDERSTOOD


class _Listening:
    """Wraps connections so that the handshake happens in the association's own thread, with a time limit.

    pynetdicom would shake hands where it accepts: one silent stranger would stop all others.
    """

    def __init__(self, context: ssl.SSLContext, config: DimseConfig) -> None:
        self._context, self._timeout_s = context, config.timeout_s

    def wrap_socket(self, plain: socket.socket, server_side: bool) -> ssl.SSLSocket:
        """As SSLContext.wrap_socket, but without waiting for the peer."""
        plain.settimeout(self._timeout_s)
        return self._context.wrap_socket(plain, server_side=server_side, do_handshake_on_connect=False)


@contextmanager
def receiving(config: DimseConfig, home: Path) -> Iterator[Receiver]:
    """Receive into the site's spool while open with `with`.

    Args:
        config: paths resolved.
        home: the site's.

    Raises:
        UsageError: the address to listen on cannot be used.
        IdentityError: the certificate or key cannot be used.
        StorageError: the spool cannot be used, or another process fills it.
    """
    with Spool(home, max_bytes=config.max_spool_bytes, max_object_bytes=config.max_object_bytes) as spool:

        def too_large(sop_instance: str, num_bytes: int) -> None:
            spool.refuse(sop_instance, num_bytes, Refusal.TOO_LARGE)

        with spool.retrieving(), Receiver(config, spool.add, too_large) as receiver:
            _log.info("receiver_started", extra={"address": config.listen})
            try:
                yield receiver
            finally:
                _log.info("receiver_stopped", extra={"count": receiver.counts.get("stored", 0)})
