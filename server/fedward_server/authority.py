"""The federation's certificate authority: its own certificate, and those it issues.

The authority certifies members and no further authority (path length 0). A member's certificate says in
its subject alternative name who the member is and of which kind, and in its extended key usage whether it
may listen (the server) or call (all others): no site can pose as the server.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedward_common.errors import UsageError
from fedward_common.identity import Peer

CA_DAYS = 5 * 365
SERVER_DAYS = 90
MEMBER_DAYS = 365

# Members whose clock runs a little behind must accept a certificate made a moment ago.
_BACKDATE = timedelta(minutes=5)
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")


@dataclass(frozen=True)
class Authority:
    """The authority's certificate with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def new_authority(name: str, now: datetime) -> Authority:
    """Make a self-signed authority that can certify members but no further authority."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = _key_usage(certifies=True)
    builder = _builder(subject, subject, key.public_key(), now, CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage, critical=True)
    builder = builder.add_extension(
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
    )
    return Authority(builder.sign(key, hashes.SHA384()), key)


def issue(
    authority: Authority, peer: Peer, key: ec.EllipticCurvePublicKey, now: datetime, hosts: Sequence[str]
) -> x509.Certificate:
    """Certify a member's key, for listening (the server) or for calling (everyone else).

    Args:
        authority: who certifies.
        peer: who the certificate is for.
        key: the member's public key.
        now: the moment from which the certificate is valid, less five minutes for slow clocks.
        hosts: DNS names and IP addresses at which a server may be reached.
    """
    is_server = peer.role == "server"
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, peer.role),
            x509.NameAttribute(NameOID.COMMON_NAME, peer.name),
        ]
    )
    names = [x509.UniformResourceIdentifier(peer.urn), *(general_name(host) for host in hosts)]
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if is_server else ExtendedKeyUsageOID.CLIENT_AUTH
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = _builder(
        subject, authority.certificate.subject, key, now, SERVER_DAYS if is_server else MEMBER_DAYS
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(certifies=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    builder = builder.add_extension(issuer_key, critical=False)
    return builder.sign(authority.key, hashes.SHA384())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + timedelta(days=days))
    )


def _key_usage(*, certifies: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certifies,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certifies,
        crl_sign=certifies,
        encipher_only=False,
        decipher_only=False,
    )


def general_name(host: str) -> x509.GeneralName:
    """A host as it stands in a certificate; UsageError when it is neither an address nor a DNS name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if _HOST.fullmatch(host) is None:
            raise UsageError(
                f"host {host!r} is neither an IP address nor a DNS name", remedy="Give --host without port."
            ) from None
        return x509.DNSName(host)


def private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    """A private key as PKCS8 PEM, not encrypted: the file's mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
