"""Read keys and certificates from files, and say what is wrong with them.

The pieces that `identity.load_identity` puts together. A private key that other users of the machine
could read is refused before it is parsed; so is a certificate outside its dates or from another issuer.
"""

from __future__ import annotations

import os
import stat
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedward_common.errors import IdentityError
from fedward_common.federation import URN_PREFIX, Peer

_PROVISION = "Use the directory that `fedward provision` made for this member."


def peer_of(certificate_der: bytes) -> Peer:
    """Read who a certificate belongs to. That it is genuine is for the TLS handshake to establish.

    Raises:
        IdentityError: not a certificate, or not exactly one member is named in it.
    """
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise IdentityError("certificate does not name a member", remedy=_PROVISION) from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    members = [uri for uri in uris if uri.startswith(URN_PREFIX)]
    if len(members) != 1:
        raise IdentityError(f"certificate names {len(members)} members, expected 1", remedy=_PROVISION)
    return Peer.from_urn(members[0])


def node_public_key_pem(certificate_der: bytes) -> bytes:
    """Return a certificate's public key in the bytes by which Flower knows a node.

    Flower 1.41 uses PEM SubjectPublicKeyInfo (`flwr.supercore.primitives.asymmetric`).

    Raises:
        IdentityError: not a certificate with an elliptic-curve key.
    """
    try:
        key = x509.load_der_x509_certificate(certificate_der).public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError("not a certificate", remedy=_PROVISION) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise IdentityError("certificate has no elliptic-curve key", remedy=_PROVISION)
    return _public_pem(key)


def verify(public_key_hex: str, payload: bytes, signature_hex: str) -> bool:
    """Whether a signature is by that key over those bytes; a malformed key or signature is simply not."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key_hex))
        key.verify(bytes.fromhex(signature_hex), payload)
    except (ValueError, InvalidSignature):
        return False
    return True


def validity_of(certificate: Path) -> tuple[datetime, datetime]:
    """First and last moment at which a certificate file is valid; IdentityError if it is not one."""
    loaded = load_certificate(certificate)
    return loaded.not_valid_before_utc, loaded.not_valid_after_utc


def read_private(path: Path) -> bytes:
    """Read a secret file, unless other users could read it too.

    Raises:
        IdentityError: missing, unreadable, or its mode lets group or others in.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise IdentityError(
                    f"{path} is open to other users (mode {mode:04o}, expected 0600)",
                    remedy=f"chmod 600 {path}; if others could have read it, ask for a new identity.",
                )
            return file.read()
    except OSError as error:
        raise IdentityError(f"{path}: {error.strerror}", remedy=_PROVISION) from error


def load_certificate(path: Path) -> x509.Certificate:
    """Read a PEM certificate; IdentityError when it is missing or none."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise IdentityError(f"{path}: {error.strerror}", remedy=_PROVISION) from error
    except ValueError as error:
        raise IdentityError(f"{path} is not a certificate", remedy=_PROVISION) from error


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the key of a member's certificate; see `read_private` for the errors."""
    key = _load_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{path} is not an elliptic-curve key", remedy=_PROVISION)
    return key


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read the key that signs documents; see `read_private` for the errors."""
    key = _load_key(path)
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(f"{path} is not an Ed25519 key", remedy=_PROVISION)
    return key


def check_issued(certificate: x509.Certificate, authority: x509.Certificate, path: Path) -> None:
    """Raise IdentityError unless `authority` itself issued the certificate found at `path`."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise IdentityError(
            f"{path} was not issued by this federation's authority",
            remedy="Copy the whole directory again; do not mix files of two federations.",
        ) from error


def check_valid(certificate: x509.Certificate, path: Path, now: datetime) -> None:
    """Raise IdentityError unless the certificate found at `path` is valid at `now`."""
    if now < certificate.not_valid_before_utc:
        raise IdentityError(
            f"{path} is valid from {certificate.not_valid_before_utc.isoformat()},"
            f" this machine's clock says {now.isoformat()}",
            remedy="Correct this machine's clock.",
        )
    if now > certificate.not_valid_after_utc:
        raise IdentityError(
            f"{path} expired on {certificate.not_valid_after_utc.isoformat()}",
            remedy="Ask the federation's operator for a new certificate: fedward provision",
        )


def _public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _load_key(path: Path) -> object:
    try:
        return serialization.load_pem_private_key(read_private(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"{path} is not a private key", remedy=_PROVISION) from error
