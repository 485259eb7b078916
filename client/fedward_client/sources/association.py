"""Associations with a PACS over DIMSE: opened with our limits, and with a reason when they do not come about.

pynetdicom's own log quotes identifiers; it is shut.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, cast

from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.transport import AssociationSocket

from fedward_client.sources.access import PacsAwayError, client_context, handshake, unreachable
from fedward_client.sources.meter import Meter
from fedward_client.sources.part10 import Instance
from fedward_client.sources.settings import DimseConfig
from fedward_common.errors import ConnectionLostError, FederationError, IdentityError

MAX_PDU = 128 * 2**10
"""What we ask a peer to put into one PDU: eight times the usual, for fewer turns of the loop."""

_MAX_IDENTIFIER, _MAX_ANSWERS = 2**20, 2**40

logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
_config.LOG_HANDLER_LEVEL = "none"
_config.LOG_RESPONSE_IDENTIFIERS = False
_config.LOG_REQUEST_IDENTIFIERS = False


def _close(connection: AssociationSocket) -> None:
    """Close a socket also when its peer was first: pynetdicom 3.0 then leaves it open."""
    channel = connection.socket
    if channel is not None:
        with suppress(OSError):
            channel.shutdown(socket.SHUT_RDWR)
        channel.close()


# These are replaced, here and in `meter`: a version without them would ignore our limits and say nothing.
for _owner, _names in (
    (AssociationSocket, ("_shutdown_socket", "recv")),
    (DIMSEServiceProvider, ("get_msg", "receive_primitive")),
):
    if any(_name not in vars(_owner) for _name in _names):
        raise ImportError("this version of pynetdicom is built differently; fedward needs 3.0")

AssociationSocket._shutdown_socket = _close  # type: ignore[method-assign,assignment]


def new_entity(config: DimseConfig) -> AE:
    """Our application entity with its timeouts."""
    entity = AE(config.ae_title)
    entity.maximum_pdu_size = MAX_PDU
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = config.timeout_s
    entity.connection_timeout = config.timeout_s
    return entity


def associate(
    config: DimseConfig,
    contexts: Sequence[PresentationContext | str],
    *,
    roles: Sequence[SCP_SCU_RoleSelectionNegotiation] = (),
    handlers: Sequence[tuple[evt.EventType, Callable[[evt.Event], Any]]] = (),
    meter: Meter | None = None,
) -> Association:
    """Open an association with the PACS.

    Args:
        config: where it is and who we are.
        contexts: to propose; a SOP class alone stands for one in the usual uncompressed syntaxes.
        roles: for the storage classes of a C-GET.
        handlers: of pynetdicom's events.
        meter: for what it sends; a search's answers when absent.

    Raises:
        PacsAwayError: no connection, or the PACS is busy.
        ConnectionLostError: TLS does not come about.
        IdentityError: the PACS does not know one of the two AE titles.
    """
    meter = meter or Meter(_MAX_IDENTIFIER, _MAX_ANSWERS, config.timeout_s)
    try:
        address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise unreachable(config.host, config.port, error) from None
    for _ in range(2):  # a rejection that comes with the end of the connection is overlooked now and then
        opened = new_entity(config).associate(
            str(address),
            config.port,
            contexts=[build_context(each) if isinstance(each, str) else each for each in contexts],
            ae_title=config.pacs_ae_title,
            max_pdu=MAX_PDU,
            ext_neg=list(roles),
            tls_args=None if config.tls is None else (client_context(config.tls), config.host),
            evt_handlers=[(evt.EVT_CONN_OPEN, meter.install), *handlers],
        )
        if opened.is_established:
            _leave_answers(opened)
            return opened
        if opened.dul.socket is not None:
            _close(opened.dul.socket)
        if opened.is_rejected:
            raise _rejected(opened, config)
    raise _diagnosed(config)


def _leave_answers(association: Association) -> None:
    """Have every message left to the request that waits for it.

    pynetdicom's own thread looks for messages too, without waiting; it is paused during a request, but not
    without fail: of some hundred searches one lost an answer.
    """
    messages: Any = association.dimse
    take = messages.get_msg
    messages.get_msg = lambda block=False: take(block=True) if block else (None, None)


def received(event: evt.Event) -> Instance:
    """The object of a C-STORE, as it was encoded; nothing of it is parsed."""
    request = cast(C_STORE, event.request)
    return Instance(
        str(request.AffectedSOPClassUID),
        str(request.AffectedSOPInstanceUID),
        str(event.context.transfer_syntax),
        event.encoded_dataset(include_meta=False),
    )


def broken_off() -> PacsAwayError:
    """The PACS ended an association while it was needed."""
    return PacsAwayError(
        "the PACS broke off the association",
        remedy="Run it again: what has arrived is kept, only the rest is fetched.",
    )


def _rejected(association: Association, config: DimseConfig) -> FederationError:
    """Why the PACS rejected the association, as far as it says (PS3.8 9.3.4)."""
    answer = association.acceptor.primitive
    source = getattr(answer, "result_source", None)
    reason = getattr(answer, "diagnostic", None)
    if source == 1 and reason == 7:
        return IdentityError(
            f"the PACS is not called {config.pacs_ae_title}: it rejects that called AE title",
            remedy="Correct `pacs_ae_title` in [source]; capitals and blanks count.",
        )
    if source == 1 and reason == 3:
        return IdentityError(
            f"the PACS does not know this site: it rejects the calling AE title {config.ae_title}",
            remedy=f"Have {config.ae_title} with this machine's address entered at the PACS, or correct"
            " `ae_title` in [source].",
        )
    if source == 3:
        return PacsAwayError(
            "the PACS is too busy for another association",
            remedy="Try again later, or ask for a higher limit.",
        )
    return IdentityError(
        "the PACS rejects the association without saying why",
        remedy="Check both AE titles in [source], and ask the PACS administrator to look at its log.",
    )


def _diagnosed(config: DimseConfig) -> FederationError:
    """What is wrong with a connection that brought no association, found out step by step."""
    context: ssl.SSLContext | None = None
    try:
        if config.tls is not None:
            context = client_context(config.tls)
            handshake(context, config.host, config.port, config.timeout_s)
        else:
            socket.create_connection((config.host, config.port), timeout=config.timeout_s).close()
    except ConnectionLostError as error:
        return error
    except OSError as error:
        return unreachable(config.host, config.port, error)
    hint = "" if context else " If the PACS speaks TLS on this port, add [source.tls]."
    return PacsAwayError(
        "something listens there, but it does not answer as a DICOM node does",
        remedy=f"Check host and port in [source].{hint}",
    )
