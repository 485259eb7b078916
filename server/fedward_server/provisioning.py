"""Make a federation: its own certificate authority, and one directory of keys for every member.

    DIR/federation.json                   the public roster, the same file in every directory below
    DIR/ca/{ca.crt,ca.key}                the authority; keep it off the server once all are provisioned
    DIR/server/                           identity directories: tls.crt tls.key ca.crt signing.key
    DIR/sites/NAME/  DIR/coordinators/NAME/  DIR/observers/NAME/

Run again, it adds the members that are new and touches no existing key or certificate. A member counts as
existing when the roster lists it, even if its directory has been carried away to its owner. Every step is
a rename of something complete: adding members, when interrupted, is finished by running it again.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedward_common.certificates import load_certificate, load_node_key, load_signing_key
from fedward_common.errors import IdentityError, UsageError
from fedward_common.files import flush_directory, write_atomically, write_new
from fedward_common.identity import (
    CA_FILE,
    CERTIFICATE_FILE,
    FEDERATION_FILE,
    KEY_FILE,
    SIGNING_KEY_FILE,
    Federation,
    Peer,
    Role,
    SiteEntry,
    join_address,
    read_federation,
)
from fedward_server.authority import Authority, general_name, issue, new_authority, private_pem

FOLDERS: dict[Role, str] = {"site": "sites", "coordinator": "coordinators", "observer": "observers"}

_CA_KEY_FILE = "ca.key"


def provision(
    directory: Path,
    *,
    name: str = "",
    hosts: Sequence[str] = (),
    site_names: Iterable[str] = (),
    coordinator_names: Iterable[str] = (),
    observer_names: Iterable[str] = (),
    server_port: int | None = None,
    control_port: int | None = None,
    now: datetime | None = None,
) -> Federation:
    """Make a federation in `directory`, or add members to the one that is there.

    Args:
        directory: created 0700; must be empty or hold a federation.
        name: what people call the federation. Needed the first time; later it may only repeat.
        hosts: DNS names and IP addresses of the server, all in its certificate; members connect to the
            first. Needed the first time; later the first may only repeat.
        site_names: sites to have; those already there are left alone. So for the other names.
        coordinator_names: members who sign plans, launch and stop runs.
        observer_names: members who may only watch.
        server_port: where sites connect (8443 the first time).
        control_port: where coordinators connect (8444 the first time).
        now: the moment from which new certificates are valid.

    Returns:
        The roster with all members.

    Raises:
        UsageError: a value is missing, not valid, or differs from what the federation was made with.
        IdentityError: a member's name is not valid, or existing files cannot be read.
    """
    moment = now or datetime.now(UTC)
    roster = directory / FEDERATION_FILE
    if roster.exists():
        federation = read_federation(roster)
        _check_unchanged(federation, name, hosts, server_port, control_port)
    else:
        federation = _new_federation(
            directory, name, hosts, server_port or 8443, control_port or 8444, moment
        )
    wanted = _wanted(federation, site_names, coordinator_names, observer_names)
    if wanted:
        authority = _load_authority(directory)
        for peer in wanted:
            federation = _add_member(directory, federation, authority, peer, moment)
    _spread(directory, federation)
    return federation


def _new_federation(
    directory: Path, name: str, hosts: Sequence[str], server_port: int, control_port: int, now: datetime
) -> Federation:
    """Make the authority and the server's identity, then the roster that says they are complete."""
    _check_settings(name, hosts, (server_port, control_port))
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise UsageError(
            f"{directory} is not empty and holds no {FEDERATION_FILE}",
            remedy="Give a new directory; if an earlier provisioning was interrupted here, remove it first.",
        )
    authority = new_authority(name, now)
    ca_pem = authority.certificate.public_bytes(serialization.Encoding.PEM)
    _make_directory(directory / "ca", {CA_FILE: ca_pem, _CA_KEY_FILE: private_pem(authority.key)})
    federation = Federation(
        federation_id=secrets.token_hex(8),
        name=name,
        server=join_address(hosts[0], server_port),
        control=join_address(hosts[0], control_port),
        ca_pem=ca_pem.decode(),
    )
    server = Peer(federation.federation_id, "server", "server")
    _make_identity(directory / "server", authority, server, now, hosts)
    write_atomically(directory / FEDERATION_FILE, federation.to_bytes(), 0o644)
    return federation


def _check_settings(name: str, hosts: Sequence[str], ports: tuple[int, int]) -> None:
    if not 1 <= len(name) <= 64 or not name.isprintable():
        raise UsageError(
            f"federation name {name!r}: expected 1 to 64 printable characters", remedy="Give --name"
        )
    if not hosts:
        raise UsageError("no host for the server", remedy="Give --host, for example --host fl.example.org")
    for host in hosts:
        general_name(host)
    if not all(1 <= port <= 65535 for port in ports) or ports[0] == ports[1]:
        raise UsageError(f"ports {ports}: expected two different ones of 1-65535", remedy="Give other ports.")


def _check_unchanged(
    federation: Federation, name: str, hosts: Sequence[str], server_port: int | None, control_port: int | None
) -> None:
    """Refuse settings that differ from the existing federation's; ignoring them would mislead."""
    host = hosts[0] if hosts else None
    differing = [
        f"name is {federation.name!r}" if name not in ("", federation.name) else "",
        _address_difference("server", federation.server, host, server_port),
        _address_difference("control", federation.control, host, control_port),
    ]
    if any(differing):
        raise UsageError(
            f"the federation exists with other settings: {', '.join(filter(None, differing))}",
            remedy="Leave these settings out to add members, or make a new federation elsewhere.",
        )


def _address_difference(what: str, address: str, host: str | None, port: int | None) -> str:
    known_host, _, known_port = address.rpartition(":")
    wanted = join_address(host, 0).rpartition(":")[0] if host is not None else known_host
    return "" if wanted == known_host and port in (None, int(known_port)) else f"{what} is {address}"


def _wanted(
    federation: Federation, sites: Iterable[str], coordinators: Iterable[str], observers: Iterable[str]
) -> list[Peer]:
    """Members asked for and not in the roster; every name is checked before anything is made."""
    asked: dict[Role, Iterable[str]] = {"site": sites, "coordinator": coordinators, "observer": observers}
    known: dict[Role, Iterable[str]] = {
        "site": federation.sites,
        "coordinator": federation.coordinators,
        "observer": federation.observers,
    }
    peers = [
        Peer(federation.federation_id, role, name) for role in asked for name in dict.fromkeys(asked[role])
    ]
    return [peer for peer in peers if peer.name not in known[peer.role]]


def _add_member(
    directory: Path, federation: Federation, authority: Authority, peer: Peer, now: datetime
) -> Federation:
    """Make a member's identity, or take over the one an interrupted run left, and enter it in the roster."""
    folder = directory / FOLDERS[peer.role] / peer.name
    if not folder.exists():
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        _make_identity(folder, authority, peer, now)
    signing_key = load_signing_key(folder / SIGNING_KEY_FILE).public_key().public_bytes_raw().hex()
    certificate = load_certificate(folder / CERTIFICATE_FILE).public_bytes(serialization.Encoding.DER)
    entry = SiteEntry(signing_key=signing_key, certificate_sha256=hashlib.sha256(certificate).hexdigest())
    update: dict[str, object]
    if peer.role == "site":
        update = {"sites": {**federation.sites, peer.name: entry}}
    elif peer.role == "coordinator":
        update = {"coordinators": {**federation.coordinators, peer.name: signing_key}}
    else:
        update = {"observers": (*federation.observers, peer.name)}
    grown = federation.model_copy(update=update)
    write_atomically(directory / FEDERATION_FILE, grown.to_bytes(), 0o644)
    return grown


def _spread(directory: Path, federation: Federation) -> None:
    """Give every identity directory that is still here the current roster."""
    for folder in (
        directory / "server",
        *(path for name in FOLDERS.values() for path in (directory / name).glob("*")),
    ):
        if (folder / CERTIFICATE_FILE).is_file() and not folder.name.startswith("."):
            write_atomically(folder / FEDERATION_FILE, federation.to_bytes(), 0o644)


def _make_identity(
    folder: Path, authority: Authority, peer: Peer, now: datetime, hosts: Sequence[str] = ()
) -> None:
    """Make keys and certificate of one member; the directory appears complete or not at all."""
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = issue(authority, peer, key.public_key(), now, hosts)
    _make_directory(
        folder,
        {
            CERTIFICATE_FILE: certificate.public_bytes(serialization.Encoding.PEM),
            KEY_FILE: private_pem(key),
            CA_FILE: authority.certificate.public_bytes(serialization.Encoding.PEM),
            SIGNING_KEY_FILE: private_pem(Ed25519PrivateKey.generate()),
        },
    )


def _make_directory(folder: Path, files: dict[str, bytes]) -> None:
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    draft.mkdir(mode=0o700)
    try:
        for name, data in files.items():
            write_new(draft / name, data, 0o600 if name.endswith(".key") else 0o644)
        draft.rename(folder)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    flush_directory(folder.parent)


def _load_authority(directory: Path) -> Authority:
    folder = directory / "ca"
    if not (folder / _CA_KEY_FILE).exists():
        raise IdentityError(
            f"{folder / _CA_KEY_FILE} is not here, so no member can be added",
            remedy="Put the authority's folder back from where it is kept, then run this again.",
        )
    return Authority(load_certificate(folder / CA_FILE), load_node_key(folder / _CA_KEY_FILE))
