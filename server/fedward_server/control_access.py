"""Who may call what on the coordinators' service, decided from the certificate of the connection.

That the certificate is genuine is established by the TLS handshake, which knows the federation's
authority only. Here its role and the roster decide: a coordinator may do everything, an observer may
look, and sites and servers have no business here. A method that is not in the table is refused.
"""

from __future__ import annotations

import ssl

from fedward_common.errors import IdentityError
from fedward_common.federation import Federation, Peer, Role
from fedward_common.identity import peer_of

SERVICE = "/fedward.control.v1.Control/"
_EVERYBODY: frozenset[Role] = frozenset({"coordinator", "observer"})
_COORDINATORS: frozenset[Role] = frozenset({"coordinator"})
ALLOWED: dict[str, frozenset[Role]] = {
    f"{SERVICE}Launch": _COORDINATORS,
    f"{SERVICE}Stop": _COORDINATORS,
    f"{SERVICE}Resume": _COORDINATORS,
    f"{SERVICE}List": _EVERYBODY,
    f"{SERVICE}Describe": _EVERYBODY,
    f"{SERVICE}Watch": _EVERYBODY,
    f"{SERVICE}Report": _EVERYBODY,
    f"{SERVICE}Sites": _EVERYBODY,
    "/grpc.health.v1.Health/Check": _EVERYBODY,
    "/grpc.health.v1.Health/Watch": _EVERYBODY,
}


def peer_of_pem(certificates: list[bytes] | None) -> Peer:
    """Name the peer of a connection from its certificate in PEM, as gRPC hands it over.

    Raises:
        IdentityError: not exactly one certificate, or it names no member of a federation.
    """
    if not certificates or len(certificates) != 1:
        raise IdentityError("no certificate was shown", remedy="Use a coordinator's directory: --identity")
    try:
        der = ssl.PEM_cert_to_DER_cert(certificates[0].decode("ascii"))
    except ValueError as error:
        raise IdentityError(
            "the certificate is not readable", remedy="Use the directory that `fedward provision` made."
        ) from error
    return peer_of(der)


def authorise(method: str, peer: Peer, federation: Federation) -> None:
    """Let the call pass, or say why not.

    Args:
        method: full name, "/package.Service/Method".

    Raises:
        IdentityError: the peer's role, or its absence from the roster, forbids the call.
    """
    name = method.rpartition("/")[2]
    if peer.federation_id != federation.federation_id or not _listed(peer, federation):
        raise IdentityError(
            f"{peer.role} {peer.name} is not a coordinator or observer of this federation",
            remedy="Use a coordinator's or observer's directory (--identity) that the server's roster lists.",
        )
    if peer.role not in ALLOWED.get(method, frozenset()):
        raise IdentityError(
            f"{peer.role} {peer.name} may not call {name}", remedy="Ask a coordinator of this federation."
        )


def _listed(peer: Peer, federation: Federation) -> bool:
    if peer.role == "coordinator":
        return peer.name in federation.coordinators
    return peer.role == "observer" and peer.name in federation.observers
