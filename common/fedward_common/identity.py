"""Keys and certificates: who this process is, who it talks to, and whose signature a document carries.

Every member holds one directory: a P-384 key with its certificate (TLS, and at a site also the Flower
node key, so that the certificate vouches for the node), an Ed25519 key for documents, the authority's
certificate and the roster. Loading checks all of it together and refuses to start on any doubt. The
authority is the federation's own; the machine's trusted certificates play no part.
"""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedward_common.certificates import (
    check_issued,
    check_valid,
    load_certificate,
    load_node_key,
    load_signing_key,
    node_public_key_pem,
    peer_of,
    read_private,
    validity_of,
    verify,
)
from fedward_common.errors import IdentityError, PlanError, PlanRefusedError, RefusalCode
from fedward_common.federation import (
    Federation,
    Peer,
    Role,
    SiteEntry,
    fingerprint,
    join_address,
    read_federation,
    split_address,
)
from fedward_common.plan import (
    PlanBody,
    ReadinessPlan,
    SignedPlan,
    TrainingPlan,
    canonical_bytes,
    parse_signed_plan,
)
from fedward_common.weights import Layout

__all__ = [
    "CA_FILE",
    "CERTIFICATE_FILE",
    "FEDERATION_FILE",
    "IDENTITY_FILES",
    "KEY_FILE",
    "PRIVATE_FILES",
    "SIGNING_KEY_FILE",
    "Federation",
    "Identity",
    "Peer",
    "Role",
    "SiteEntry",
    "client_context",
    "fingerprint",
    "join_address",
    "load_identity",
    "new_signer",
    "node_public_key_pem",
    "peer_of",
    "read_federation",
    "read_private",
    "server_context",
    "sign",
    "sign_plan",
    "split_address",
    "validity_of",
    "verify",
    "verify_plan",
]

CERTIFICATE_FILE = "tls.crt"
KEY_FILE = "tls.key"
CA_FILE = "ca.crt"
SIGNING_KEY_FILE = "signing.key"
FEDERATION_FILE = "federation.json"
PRIVATE_FILES = (KEY_FILE, SIGNING_KEY_FILE)
IDENTITY_FILES = (CERTIFICATE_FILE, KEY_FILE, CA_FILE, SIGNING_KEY_FILE, FEDERATION_FILE)

# A signature over a plan is over this text and the plan, so it can never be taken for one over
# another kind of document that happens to have the same bytes.
_PLAN_CONTEXT = b"fedward-plan-v1\n"
_PROVISION = "Use the directory that `fedward provision` made for this member."


@dataclass(frozen=True)
class Identity:
    """A member's own keys, checked against each other and against the federation's authority.

    Attributes:
        certificate, key, ca: paths, for libraries that load the files themselves.
        signing_key: signs documents.
        node_key: the key of the certificate; at a site also the Flower node key.
    """

    peer: Peer
    directory: Path
    certificate: Path
    key: Path
    ca: Path
    federation: Federation
    signing_key: Ed25519PrivateKey
    node_key: ec.EllipticCurvePrivateKey

    @property
    def signing_public_key(self) -> str:
        """The Ed25519 public key, raw bytes as hex."""
        return self.signing_key.public_key().public_bytes_raw().hex()


def load_identity(directory: Path, *, now: datetime | None = None) -> Identity:
    """Load a member's directory, or say what is wrong with it.

    Raises:
        IdentityError: a file is missing or malformed, a key is open to other users, the certificate is
            not valid now, not from this federation's authority or not for this key, or the roster has
            other keys for this member.
    """
    moment = now or datetime.now(UTC)
    federation = read_federation(directory / FEDERATION_FILE)
    authority = load_certificate(directory / CA_FILE)
    certificate = load_certificate(directory / CERTIFICATE_FILE)
    node_key = load_node_key(directory / KEY_FILE)
    signing_key = load_signing_key(directory / SIGNING_KEY_FILE)
    _check_authority(authority, federation, directory)
    check_valid(authority, directory / CA_FILE, moment)
    check_issued(certificate, authority, directory / CERTIFICATE_FILE)
    check_valid(certificate, directory / CERTIFICATE_FILE, moment)
    if certificate.public_key() != node_key.public_key():
        raise IdentityError(
            f"{directory / KEY_FILE} is not the key of {CERTIFICATE_FILE}",
            remedy="Copy both files again from the same directory; see `fedward provision`.",
        )
    identity = Identity(
        peer=peer_of(certificate.public_bytes(serialization.Encoding.DER)),
        directory=directory,
        certificate=directory / CERTIFICATE_FILE,
        key=directory / KEY_FILE,
        ca=directory / CA_FILE,
        federation=federation,
        signing_key=signing_key,
        node_key=node_key,
    )
    _check_roster(identity)
    return identity


def client_context(identity: Identity) -> ssl.SSLContext:
    """Return a TLS context that trusts this federation's authority only and shows our certificate."""
    return _context(identity, ssl.PROTOCOL_TLS_CLIENT)


def server_context(identity: Identity) -> ssl.SSLContext:
    """Return a TLS context for a listener that demands a certificate from this federation's authority."""
    return _context(identity, ssl.PROTOCOL_TLS_SERVER)


def sign(identity: Identity, payload: bytes) -> str:
    """Sign bytes with the member's Ed25519 key; the signature is 128 hex digits."""
    return identity.signing_key.sign(payload).hex()


def new_signer(seed: bytes | None = None) -> tuple[Callable[[bytes], str], str]:
    """Make a signing key for a simulated site: a sign function and its public key (hex).

    Args:
        seed: 32 secret bytes that give the same key in every process; None makes a fresh key.
    """
    key = Ed25519PrivateKey.generate() if seed is None else Ed25519PrivateKey.from_private_bytes(seed)
    return lambda payload: key.sign(payload).hex(), key.public_key().public_bytes_raw().hex()


def sign_plan(
    plan: TrainingPlan | ReadinessPlan,
    layout: Layout,
    identity: Identity,
    *,
    valid_days: float = 30,
    now: datetime | None = None,
) -> SignedPlan:
    """Sign a plan as a coordinator, for this federation only and with an end date.

    Args:
        plan: its own `federation_id` and `expires` are kept where given.
        layout: the tensors that may travel, as the plan's model has them.
        identity: a coordinator's.
        valid_days: days until the plan expires, when the plan itself does not say.
        now: the moment of signing.

    Raises:
        IdentityError: only a coordinator may sign a plan.
        PlanError: the plan is for another federation, has expired, or is too large to be read again.
    """
    moment = (now or datetime.now(UTC)).replace(microsecond=0)
    if identity.peer.role != "coordinator":
        raise IdentityError(
            f"a {identity.peer.role} may not sign plans", remedy="Give a coordinator's directory: --identity"
        )
    federation_id = identity.federation.federation_id
    if plan.federation_id not in ("", federation_id):
        raise PlanError(
            f"plan is for federation {plan.federation_id}, this coordinator belongs to {federation_id}",
            remedy="Remove federation_id from the plan, or use that federation's coordinator.",
        )
    expires = plan.expires or moment + timedelta(days=valid_days)
    if expires <= moment:
        raise PlanError(
            f"plan expired on {expires.isoformat()}", remedy="Set a later `expires`, or remove it."
        )
    complete = plan.model_copy(update={"federation_id": federation_id, "expires": expires})
    body = PlanBody(plan=complete, layout=layout, nonce=secrets.token_hex(16), signed_at=moment)
    signature = sign(identity, _PLAN_CONTEXT + canonical_bytes(body))
    signed = SignedPlan(body=body, signer=identity.peer.name, signature=signature)
    return parse_signed_plan(signed.to_bytes())


def verify_plan(document: bytes, federation: Federation, *, now: datetime | None = None) -> SignedPlan:
    """Read a signed plan and check that it is genuine, for this federation, and still valid.

    Raises:
        PlanRefusedError: with the code PLAN_SIGNATURE, PLAN_FEDERATION or PLAN_EXPIRED.
    """
    try:
        signed = parse_signed_plan(document)
    except PlanError as error:
        raise PlanRefusedError(error.message, remedy=error.remedy, code=RefusalCode.PLAN_SIGNATURE) from error
    if signed.content.federation_id != federation.federation_id:
        raise PlanRefusedError(
            f"plan is for federation {signed.content.federation_id or 'none'},"
            f" not {federation.federation_id}",
            remedy="Ask the coordinator of this federation for a plan.",
            code=RefusalCode.PLAN_FEDERATION,
        )
    key = federation.coordinators.get(signed.signer, "")
    if not verify(key, _PLAN_CONTEXT + canonical_bytes(signed.body), signed.signature):
        raise PlanRefusedError(
            f"signature of coordinator {signed.signer} does not hold, or federation.json does not list them",
            remedy="Ask the coordinator to sign again; if they are new, get the current federation.json.",
            code=RefusalCode.PLAN_SIGNATURE,
        )
    if signed.expired(now):
        raise PlanRefusedError(
            f"plan {signed.content.name} expired on {signed.content.expires}",
            remedy="Ask the coordinator to sign it again, or correct this machine's clock.",
            code=RefusalCode.PLAN_EXPIRED,
        )
    return signed


def _context(identity: Identity, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cafile=identity.ca)
    context.load_cert_chain(identity.certificate, identity.key)
    return context


def _check_authority(authority: x509.Certificate, federation: Federation, directory: Path) -> None:
    if authority.public_bytes(serialization.Encoding.PEM).decode().split() != federation.ca_pem.split():
        raise IdentityError(
            f"{directory / CA_FILE} and {FEDERATION_FILE} name different authorities",
            remedy="Copy both again from the same directory, and compare the fingerprint by phone.",
        )
    try:
        is_authority = authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, x509.ExtensionNotFound):
        is_authority = False
    if not is_authority:
        raise IdentityError(f"{directory / CA_FILE} is not an authority's certificate", remedy=_PROVISION)


def _check_roster(identity: Identity) -> None:
    """Where the roster knows this member, it must know these very keys."""
    federation, peer = identity.federation, identity.peer
    if peer.federation_id != federation.federation_id:
        raise IdentityError(
            f"certificate is for federation {peer.federation_id},"
            f" {FEDERATION_FILE} is {federation.federation_id}",
            remedy="Copy the whole directory again; do not mix files of two federations.",
        )
    known: str | None = None
    if peer.role == "coordinator":
        known = federation.coordinators.get(peer.name)
    elif peer.role == "site" and peer.name in federation.sites:
        known = federation.sites[peer.name].signing_key
    if known is not None and known != identity.signing_public_key:
        raise IdentityError(
            f"{identity.directory / SIGNING_KEY_FILE} is not the key listed for {peer.role} {peer.name}",
            remedy="Copy the whole directory again; do not mix files of two members.",
        )
