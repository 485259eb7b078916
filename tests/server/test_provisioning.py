"""A provisioned federation: what its files allow and refuse, judged by independent TLS and X.509 code."""

from __future__ import annotations

import shutil
import socket
import ssl
import stat
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import DNSName, IPAddress, verification

from fedward_common.errors import FederationError, IdentityError, UsageError
from fedward_common.identity import (
    IDENTITY_FILES,
    Identity,
    client_context,
    load_identity,
    peer_of,
    read_federation,
    server_context,
)
from fedward_server.provisioning import provision
from tests.federations import a_federation, a_listener, a_site


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_federation(tmp_path_factory.mktemp("federation") / "ours")


@pytest.fixture
def growing(federation: Path, tmp_path: Path) -> Path:
    """A copy that a test may add to."""
    return shutil.copytree(federation, tmp_path / "growing")


def content_of(directory: Path, *, without: str = "federation.json") -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != without
    }


def certificate_of(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_folder_has_one_complete_directory_for_each_member(federation: Path) -> None:
    members = ["server", "sites/north", "sites/south", "coordinators/anna", "observers/otto"]
    expected = {f"{member}/{name}" for member in members for name in IDENTITY_FILES}
    expected |= {"ca/ca.crt", "ca/ca.key", "federation.json"}

    assert {str(path.relative_to(federation)) for path in federation.rglob("*") if path.is_file()} == expected


def test_keys_are_private_and_so_are_folders(federation: Path) -> None:
    for path in [federation, *federation.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.suffix == ".key":
            assert mode == 0o600, path
        elif (path.is_dir() and path.parent != federation) or path in (federation, federation / "ca"):
            assert mode == 0o700, path


def test_roster_lists_every_member_and_is_the_same_everywhere(federation: Path) -> None:
    roster = read_federation(federation / "federation.json")

    assert (roster.name, roster.server, roster.control) == (
        "Test federation",
        "127.0.0.1:8443",
        "127.0.0.1:8444",
    )
    assert (set(roster.sites), set(roster.coordinators), roster.observers) == (
        {"north", "south"},
        {"anna"},
        ("otto",),
    )
    assert len({path.read_bytes() for path in federation.rglob("federation.json")}) == 1
    for path in federation.rglob("*.key"):
        secret = path.read_text().splitlines()[1]
        assert secret not in (federation / "federation.json").read_text()


def test_authority_certifies_members_only_and_for_five_years(federation: Path) -> None:
    authority = certificate_of(federation / "ca" / "ca.crt")
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    key = authority.public_key()

    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp384r1"
    assert timedelta(days=1824) < authority.not_valid_after_utc - datetime.now(UTC) < timedelta(days=1826)


def test_independent_verifier_accepts_each_certificate_for_its_purpose_only(federation: Path) -> None:
    """Cryptography's path validation (RFC 5280 and the browsers' rules), another code than OpenSSL's."""
    store = verification.Store([certificate_of(federation / "ca" / "ca.crt")])
    builder = verification.PolicyBuilder().store(store)
    server = certificate_of(federation / "server" / "tls.crt")
    site = certificate_of(federation / "sites" / "north" / "tls.crt")

    for name in (DNSName("localhost"), IPAddress(ip_address("127.0.0.1"))):
        assert len(builder.build_server_verifier(name).verify(server, [])) == 2
    with pytest.raises(verification.VerificationError):
        builder.build_server_verifier(DNSName("example.org")).verify(server, [])
    with pytest.raises(verification.VerificationError):
        builder.build_server_verifier(DNSName("localhost")).verify(site, [])
    for member in ("sites/north", "coordinators/anna", "observers/otto"):
        leaf = certificate_of(federation / member / "tls.crt")
        assert len(builder.build_client_verifier().verify(leaf, []).chain) == 2
    with pytest.raises(verification.VerificationError):
        builder.build_client_verifier().verify(server, [])
    later = builder.time(datetime.now(UTC) + timedelta(days=91))
    with pytest.raises(verification.VerificationError):
        later.build_server_verifier(DNSName("localhost")).verify(server, [])


def test_adding_members_leaves_existing_files_as_they_are(growing: Path) -> None:
    before = content_of(growing)

    roster = provision(growing, site_names=("north", "west"), coordinator_names=("bert",))

    after = content_of(growing)
    assert {name: after[name] for name in before} == before
    assert set(roster.sites) == {"north", "south", "west"}
    assert set(roster.coordinators) == {"anna", "bert"}
    assert {path.read_bytes() for path in growing.rglob("federation.json")} == {roster.to_bytes()}
    assert len(list(growing.rglob("federation.json"))) == 8
    assert load_identity(growing / "sites" / "west").peer.name == "west"


def test_adding_nothing_changes_nothing(growing: Path) -> None:
    before = content_of(growing, without="")

    provision(
        growing,
        name="Test federation",
        hosts=("127.0.0.1", "localhost"),
        site_names=("south",),
        server_port=8443,
        control_port=8444,
    )

    assert content_of(growing, without="") == before


def test_member_whose_directory_was_carried_away_is_not_made_again(growing: Path, tmp_path: Path) -> None:
    shutil.move(growing / "sites" / "north", tmp_path / "stick")
    shutil.move(growing / "observers" / "otto", tmp_path / "other stick")

    roster = provision(growing, site_names=("north", "west"), observer_names=("otto",))

    assert not (growing / "sites" / "north").exists()
    assert not (growing / "observers" / "otto").exists()
    carried = load_identity(tmp_path / "stick")
    assert roster.sites["north"].signing_key == carried.signing_public_key


def test_interrupted_addition_is_finished_by_the_next(growing: Path) -> None:
    """The state after a kill between the member's directory and the roster."""
    before = (growing / "federation.json").read_bytes()
    provision(growing, site_names=("west",))
    made = (growing / "sites" / "west" / "tls.crt").read_bytes()
    (growing / "federation.json").write_bytes(before)
    (growing / "sites" / "west" / "federation.json").unlink()

    roster = provision(growing, site_names=("west",))

    assert (growing / "sites" / "west" / "tls.crt").read_bytes() == made
    assert roster.sites["west"].signing_key == load_identity(growing / "sites" / "west").signing_public_key


@pytest.mark.parametrize(
    "settings",
    [{"name": "Other"}, {"hosts": ("10.0.0.1",)}, {"server_port": 9000}, {"control_port": 8443}],
)
def test_settings_that_differ_from_the_federation_s_are_refused(
    growing: Path, settings: dict[str, Any]
) -> None:
    before = content_of(growing, without="")

    with pytest.raises(UsageError, match="exists with other settings"):
        provision(growing, site_names=("west",), **settings)

    assert content_of(growing, without="") == before


@pytest.mark.parametrize("name", ["", "../x", "a/b", "North", ".hidden", "a b", "a\n"])
def test_invalid_member_name_is_refused_before_anything_is_made(growing: Path, name: str) -> None:
    before = content_of(growing, without="")

    with pytest.raises(IdentityError):
        provision(growing, site_names=("west", name))

    assert content_of(growing, without="") == before


@pytest.mark.parametrize(
    "settings",
    [
        {"name": ""},
        {"name": "x" * 65},
        {"hosts": ()},
        {"hosts": ("https://example.org",)},
        {"hosts": ("example.org:8443",)},
        {"hosts": ("-example.org",)},
        {"hosts": ("exa mple.org",)},
        {"server_port": 70000},
        {"server_port": 8444},
    ],
)
def test_invalid_settings_of_a_new_federation_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        a_federation(tmp_path / "new", **settings)

    assert not (tmp_path / "new").exists()


def test_folder_with_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")

    with pytest.raises(UsageError, match="is not empty"):
        a_federation(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_no_member_is_added_without_the_authority_s_key(growing: Path) -> None:
    (growing / "ca" / "ca.key").unlink()

    with pytest.raises(IdentityError, match="no member can be added"):
        provision(growing, site_names=("west",))

    provision(growing, site_names=("north",))


def test_federation_on_ipv6_has_brackets_in_its_addresses(tmp_path: Path) -> None:
    roster = provision(tmp_path / "v6", name="Six", hosts=("::1",))

    assert (roster.server, roster.control) == ("[::1]:8443", "[::1]:8444")
    provision(tmp_path / "v6", hosts=("::1",))
    names = certificate_of(tmp_path / "v6" / "server" / "tls.crt").extensions
    addresses = names.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
        IPAddress
    )
    assert addresses == [ip_address("::1")]


# Real handshakes over loopback: OpenSSL decides.


def talk(port: int, context: ssl.SSLContext, host: str = "localhost") -> bytes:
    """Ask a listener for something; an answer means that both certificates were accepted."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=host) as channel,
    ):
        channel.sendall(b"GET / HTTP/1.1\r\n\r\n")
        return channel.recv(4096)


def unverified_context(identity: Identity) -> ssl.SSLContext:
    """A client that shows a certificate although our own loading would refuse it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(identity.ca)
    return context


def server_of(federation: Path) -> Identity:
    return load_identity(federation / "server")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
@pytest.mark.parametrize("member", ["sites/north", "coordinators/anna", "observers/otto"])
def test_members_and_server_accept_each_other(federation: Path, member: str, host: str) -> None:
    identity = load_identity(federation / member)

    with a_listener(server_context(server_of(federation))) as listener:
        answer = talk(listener.port, client_context(identity), host)

    assert answer.startswith(b"HTTP/1.1")
    assert [peer_of(der) for der in listener.accepted] == [identity.peer]


def test_connection_uses_tls_1_3(federation: Path) -> None:
    with (
        a_listener(server_context(server_of(federation))) as listener,
        socket.create_connection(("127.0.0.1", listener.port), timeout=10) as plain,
        client_context(a_site(federation)).wrap_socket(plain, server_hostname="localhost") as channel,
    ):
        assert channel.version() == "TLSv1.3"


def test_client_below_tls_1_2_is_refused(federation: Path) -> None:
    assert client_context(a_site(federation)).minimum_version == ssl.TLSVersion.TLSv1_2
    assert server_context(server_of(federation)).minimum_version == ssl.TLSVersion.TLSv1_2


def refused_by_server(listening: Path, context: ssl.SSLContext) -> list[str]:
    """Try to talk; return what the listener said about the handshake."""
    with a_listener(server_context(server_of(listening))) as listener:
        try:
            answer = talk(listener.port, context)
        except OSError:  # ssl.SSLError is one: the alert arrives, or the connection is reset before it
            answer = b""
    assert answer == b""
    assert listener.accepted == []
    return listener.refusals


def test_client_without_certificate_is_refused(federation: Path) -> None:
    reasons = refused_by_server(federation, unverified_context(a_site(federation)))

    assert reasons == ["PEER_DID_NOT_RETURN_A_CERTIFICATE"]


def test_client_of_another_federation_is_refused(federation: Path, tmp_path: Path) -> None:
    other = a_site(a_federation(tmp_path / "other"))
    context = unverified_context(a_site(federation))
    context.load_cert_chain(other.certificate, other.key)

    assert refused_by_server(federation, context) == ["CERTIFICATE_VERIFY_FAILED"]


def test_client_with_expired_certificate_is_refused(growing: Path) -> None:
    provision(growing, site_names=("late",), now=datetime.now(UTC) - timedelta(days=366))
    folder = growing / "sites" / "late"
    context = unverified_context(server_of(growing))
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")

    assert refused_by_server(growing, context) == ["CERTIFICATE_VERIFY_FAILED"]
    with pytest.raises(FederationError, match="expired"):
        load_identity(folder)


def test_client_with_the_server_s_certificate_is_refused(federation: Path) -> None:
    assert refused_by_server(federation, client_context(server_of(federation))) == [
        "CERTIFICATE_VERIFY_FAILED"
    ]


def listening_as(identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.certificate, identity.key)
    return context


def test_site_refuses_a_site_that_poses_as_the_server(federation: Path) -> None:
    with (
        a_listener(listening_as(a_site(federation, "south"))) as listener,
        pytest.raises(ssl.SSLCertVerificationError, match="unsuitable certificate purpose"),
    ):
        talk(listener.port, client_context(a_site(federation)))


def test_site_refuses_the_server_of_another_federation(federation: Path, tmp_path: Path) -> None:
    other = server_of(a_federation(tmp_path / "other"))

    with (
        a_listener(listening_as(other)) as listener,
        pytest.raises(ssl.SSLCertVerificationError, match=r"self-signed|unable to get"),
    ):
        talk(listener.port, client_context(a_site(federation)))


def test_site_refuses_the_server_under_a_name_that_its_certificate_lacks(federation: Path) -> None:
    with (
        a_listener(server_context(server_of(federation))) as listener,
        pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"),
    ):
        talk(listener.port, client_context(a_site(federation)), "fl.example.org")


def test_site_refuses_a_server_with_expired_certificate(tmp_path: Path) -> None:
    """Made 91 days ago: the server's 90 days are over, the site's year and the authority's are not."""
    then = datetime.now(UTC) - timedelta(days=91)
    old = a_federation(tmp_path / "old", now=then)
    server = load_identity(old / "server", now=then)

    with (
        a_listener(listening_as(server)) as listener,
        pytest.raises(ssl.SSLCertVerificationError, match="expired"),
    ):
        talk(listener.port, client_context(a_site(old)))
