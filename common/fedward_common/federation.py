"""Who belongs to a federation: the public facts every member holds, and the name inside a certificate.

`federation.json` names the server, the authority that certifies members, and the signing keys of
coordinators and sites. It holds no secret. A member receives it with its keys, out of band, and trusts
nothing that the network says about who is who.
"""

from __future__ import annotations

import hashlib
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, Field, ValidationError

from fedward_common.errors import IdentityError
from fedward_common.plan import Name

Role = Literal["server", "site", "coordinator", "observer"]
FederationId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Address = Annotated[str, Field(pattern=r"^(\[[0-9a-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}$")]

URN_PREFIX = "urn:fedward:"
_URN = re.compile(
    rf"{URN_PREFIX}([a-z0-9][a-z0-9-]{{0,62}}):({'|'.join(get_args(Role))}):([a-z0-9][a-z0-9_.-]{{0,62}})"
)
_ROLES: dict[str, Role] = {role: role for role in get_args(Role)}


@dataclass(frozen=True)
class Peer:
    """A member of a federation as its certificate names it.

    Raises:
        IdentityError: the name or federation id holds other characters than a-z 0-9 _ . - or is too long.
    """

    federation_id: str
    role: Role
    name: str

    def __post_init__(self) -> None:
        if _URN.fullmatch(self.urn) is None:
            raise IdentityError(
                f"{self.urn!r} is not the name of a member",
                remedy="Names have 1 to 63 characters of a-z 0-9 _ . - and begin with a letter or digit.",
            )

    @property
    def urn(self) -> str:
        """The one form in which a certificate holds a peer: a URI in its subject alternative name."""
        return f"{URN_PREFIX}{self.federation_id}:{self.role}:{self.name}"

    @classmethod
    def from_urn(cls, urn: str) -> Peer:
        """Read a certificate's URI; IdentityError when it is not a member's."""
        found = _URN.fullmatch(urn)
        if found is None:
            raise IdentityError(
                "certificate names a member in an unknown form",
                remedy="Use the certificate that `fedward provision` made.",
            )
        return cls(found[1], _ROLES[found[2]], found[3])


class SiteEntry(BaseModel, frozen=True, extra="forbid"):
    """What the others know of a site: its Ed25519 key (raw, hex) and its certificate's SHA-256 (DER)."""

    signing_key: Hex64
    certificate_sha256: Hex64


class Federation(BaseModel, frozen=True, extra="forbid"):
    """The public roster.

    Attributes:
        server: "host:port" that sites connect to.
        control: "host:port" that coordinators and observers connect to.
        ca_pem: certificate of the federation's own authority; nothing else is trusted.
        coordinators: name -> Ed25519 public key (raw, hex) whose plans a site may consider.
        sites: name -> what the server checks a site's messages against.
        observers: names of those who may watch and nothing more.
    """

    federation_id: FederationId
    name: str = Field(min_length=1, max_length=64)
    server: Address
    control: Address
    ca_pem: str = Field(max_length=16_384)
    coordinators: dict[Name, Hex64] = {}
    sites: dict[Name, SiteEntry] = {}
    observers: tuple[Name, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the authority's certificate in groups of four, to be compared by phone."""
        return fingerprint(ssl.PEM_cert_to_DER_cert(self.ca_pem))

    def to_bytes(self) -> bytes:
        """The file's content."""
        return (self.model_dump_json(indent=2) + "\n").encode()


def fingerprint(certificate_der: bytes) -> str:
    """SHA-256 of a certificate in groups of four hex digits.

    >>> fingerprint(b"")[:19]
    'e3b0 c442 98fc 1c14'
    """
    digits = hashlib.sha256(certificate_der).hexdigest()
    return " ".join(digits[start : start + 4] for start in range(0, len(digits), 4))


def read_federation(path: Path) -> Federation:
    """Read `federation.json`.

    Raises:
        IdentityError: missing, or not a roster.
    """
    remedy = "Copy federation.json from the folder that `fedward provision` made."
    try:
        return Federation.model_validate_json(path.read_bytes())
    except OSError as error:
        raise IdentityError(f"{path}: {error.strerror}", remedy=remedy) from error
    except ValidationError as error:
        places = sorted({".".join(str(step) for step in fault["loc"]) for fault in error.errors()})
        raise IdentityError(f"{path}: faults at {', '.join(places) or 'the top'}", remedy=remedy) from error


def split_address(address: str) -> tuple[str, int]:
    """Divide "host:port"; brackets around an IPv6 host are dropped.

    >>> split_address("[::1]:8443")
    ('::1', 8443)
    """
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    """Write "host:port", with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
