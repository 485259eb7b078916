"""Keys, certificates and signatures: everything that does not belong together is refused."""

from __future__ import annotations

import hashlib
import shutil
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

from fedward_common.errors import IdentityError, PlanError, PlanRefusedError, RefusalCode
from fedward_common.identity import (
    IDENTITY_FILES,
    Peer,
    join_address,
    load_identity,
    new_signer,
    node_public_key_pem,
    peer_of,
    read_federation,
    sign,
    sign_plan,
    split_address,
    verify,
    verify_plan,
)
from fedward_common.plan import SignedPlan
from tests.federations import A_LAYOUT, a_federation, a_plan, a_signed_plan, a_site


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_federation(tmp_path_factory.mktemp("federation") / "ours")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another federation whose members have the same names."""
    return a_federation(tmp_path_factory.mktemp("federation") / "other")


@pytest.fixture
def north(federation: Path, tmp_path: Path) -> Path:
    """A copy of a site's directory that a test may damage."""
    return shutil.copytree(federation / "sites" / "north", tmp_path / "north")


def der_of(certificate: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(certificate.read_text())


def test_certificate_names_federation_role_and_member(federation: Path) -> None:
    federation_id = read_federation(federation / "federation.json").federation_id

    peers = [peer_of(der_of(path)) for path in sorted(federation.glob("*/*/tls.crt"))]

    assert peers == [
        Peer(federation_id, "coordinator", "anna"),
        Peer(federation_id, "observer", "otto"),
        Peer(federation_id, "site", "north"),
        Peer(federation_id, "site", "south"),
    ]
    assert peers[0].urn == f"urn:fedward:{federation_id}:coordinator:anna"


@pytest.mark.parametrize("which", ["ca/ca.crt", None])
def test_peer_is_refused_when_the_certificate_names_no_member(federation: Path, which: str | None) -> None:
    certificate = der_of(federation / which) if which else b"not a certificate"

    with pytest.raises(IdentityError):
        peer_of(certificate)


@pytest.mark.parametrize("name", ["", "North", "a b", "../x", "a:b", "a/b", "x" * 64, "north\n", "ä"])
def test_member_name_is_refused_when_it_could_mean_something_else(name: str) -> None:
    with pytest.raises(IdentityError):
        Peer("f", "site", name)
    with pytest.raises(IdentityError):
        Peer.from_urn(f"urn:fedward:f:site:{name}")


def test_node_key_has_the_bytes_by_which_flower_knows_it(federation: Path) -> None:
    identity = a_site(federation)

    pem = node_public_key_pem(der_of(identity.certificate))

    assert pem == public_key_to_bytes(identity.node_key.public_key())
    assert uses_nist_ec_curve(identity.node_key.public_key())


def test_identity_loads_for_every_member(federation: Path) -> None:
    loaded = [load_identity(path.parent) for path in sorted(federation.rglob("tls.crt"))]

    assert [identity.peer.role for identity in loaded] == [
        "coordinator",
        "observer",
        "server",
        "site",
        "site",
    ]
    assert loaded[3].signing_public_key == loaded[0].federation.sites["north"].signing_key


@pytest.mark.parametrize("name", IDENTITY_FILES)
@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_identity_is_refused_when_a_file_is_missing_or_garbage(
    north: Path, name: str, content: bytes | None
) -> None:
    if content is None:
        (north / name).unlink()
    else:
        (north / name).write_bytes(content)

    with pytest.raises(IdentityError) as caught:
        load_identity(north)

    assert name in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["tls.key", "signing.key"])
@pytest.mark.parametrize("mode", [0o640, 0o620, 0o610, 0o604, 0o602, 0o601])
def test_identity_is_refused_when_others_have_any_access_to_a_key(north: Path, name: str, mode: int) -> None:
    (north / name).chmod(mode)

    with pytest.raises(IdentityError, match=f"{name} is open to other users"):
        load_identity(north)


def test_identity_is_refused_with_the_key_of_another_certificate(federation: Path, north: Path) -> None:
    shutil.copy(federation / "sites" / "south" / "tls.key", north / "tls.key")

    with pytest.raises(IdentityError, match=r"is not the key of tls\.crt"):
        load_identity(north)


def test_identity_is_refused_with_the_signing_key_of_another_site(federation: Path, north: Path) -> None:
    shutil.copy(federation / "sites" / "south" / "signing.key", north / "signing.key")

    with pytest.raises(IdentityError, match="not the key listed for site north"):
        load_identity(north)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("tls.crt", "tls.key"), "was not issued by this federation's authority"),
        (("ca.crt",), "different authorities"),
        (("federation.json",), "different authorities"),
        (("ca.crt", "federation.json"), "was not issued by this federation's authority"),
        (("signing.key",), "not the key listed"),
    ],
)
def test_identity_is_refused_when_files_of_two_federations_are_mixed(
    north: Path, other: Path, names: tuple[str, ...], message: str
) -> None:
    for name in names:
        shutil.copy(other / "sites" / "north" / name, north / name)

    with pytest.raises(IdentityError, match=message):
        load_identity(north)


def test_identity_is_refused_when_its_certificate_poses_as_the_authority(north: Path) -> None:
    """A member's certificate in place of the authority's: it has signed nothing and may not."""
    shutil.copy(north / "tls.crt", north / "ca.crt")
    roster = read_federation(north / "federation.json").model_copy(
        update={"ca_pem": (north / "tls.crt").read_text()}
    )
    (north / "federation.json").write_bytes(roster.to_bytes())

    with pytest.raises(IdentityError, match="not an authority's certificate"):
        load_identity(north)


@pytest.mark.parametrize(("days", "message"), [(400, "expired on"), (-1, "is valid from")])
def test_identity_is_refused_outside_the_certificate_s_dates(north: Path, days: int, message: str) -> None:
    with pytest.raises(IdentityError, match=message):
        load_identity(north, now=datetime.now(UTC) + timedelta(days=days))


def test_verify_accepts_the_first_test_vector_of_rfc_8032() -> None:
    key = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    signature = (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555"
        "fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )

    assert verify(key, b"", signature)
    assert not verify(key, b"x", signature)


def test_signature_holds_for_its_key_and_bytes_only(federation: Path) -> None:
    north, south = a_site(federation, "north"), a_site(federation, "south")
    signature = sign(north, b"payload")

    assert verify(north.signing_public_key, b"payload", signature)
    assert not verify(north.signing_public_key, b"payloae", signature)
    assert not verify(south.signing_public_key, b"payload", signature)
    assert not verify(north.signing_public_key, b"payload", "zz")
    assert not verify("", b"payload", signature)


def test_signer_of_a_simulated_site_makes_signatures_that_verify() -> None:
    make, public_key = new_signer()

    assert verify(public_key, b"payload", make(b"payload"))


def test_signed_plan_verifies_at_a_site_and_keeps_the_plan(federation: Path) -> None:
    signed = a_signed_plan(federation, valid_days=2)

    verified = verify_plan(signed.to_bytes(), a_site(federation).federation)

    assert verified == signed
    assert verified.signer == "anna"
    assert verified.body.layout == A_LAYOUT
    assert verified.plan.expires == verified.body.signed_at + timedelta(days=2)
    assert verified.plan == a_plan(
        federation_id=a_site(federation).federation.federation_id, expires=verified.plan.expires
    )


def test_signing_the_same_plan_twice_gives_two_digests(federation: Path) -> None:
    assert a_signed_plan(federation).digest != a_signed_plan(federation).digest


def test_signed_plan_is_refused_with_any_one_byte_changed(federation: Path) -> None:
    document = a_signed_plan(federation).to_bytes()
    roster = a_site(federation).federation
    codes: set[RefusalCode] = set()

    for position in range(len(document)):
        changed = bytearray(document)
        changed[position] ^= 1 << (position % 7)
        with pytest.raises(PlanRefusedError) as caught:
            verify_plan(bytes(changed), roster)
        codes.add(caught.value.code)

    assert codes == {RefusalCode.PLAN_SIGNATURE, RefusalCode.PLAN_FEDERATION}


def refusal(document: bytes, federation: Path, now: datetime | None = None) -> RefusalCode:
    with pytest.raises(PlanRefusedError) as caught:
        verify_plan(document, a_site(federation).federation, now=now)
    return caught.value.code


def test_signed_plan_of_another_federation_is_refused(federation: Path, other: Path) -> None:
    assert refusal(a_signed_plan(other).to_bytes(), federation) == RefusalCode.PLAN_FEDERATION


def test_signed_plan_is_refused_when_another_federation_s_coordinator_claims_this_one(
    federation: Path, other: Path
) -> None:
    """Same name, own key, and a roster in which the federation id was exchanged."""
    anna = load_identity(other / "coordinators" / "anna")
    ours = read_federation(federation / "federation.json").federation_id
    claimed = anna.federation.model_copy(update={"federation_id": ours})
    forger = type(anna)(**(vars(anna) | {"federation": claimed}))

    forged = sign_plan(a_plan(), A_LAYOUT, forger)

    assert refusal(forged.to_bytes(), federation) == RefusalCode.PLAN_SIGNATURE


def test_signed_plan_is_refused_when_its_signer_is_not_in_the_roster(federation: Path) -> None:
    signed = a_signed_plan(federation)
    renamed = SignedPlan(body=signed.body, signer="bert", signature=signed.signature)

    assert refusal(renamed.to_bytes(), federation) == RefusalCode.PLAN_SIGNATURE


def test_signature_over_the_bare_document_does_not_make_a_plan(federation: Path) -> None:
    """A signature that the coordinator's key gave for another purpose must not pass as one for a plan."""
    from fedward_common.plan import canonical_bytes

    signed = a_signed_plan(federation)
    anna = load_identity(federation / "coordinators" / "anna")
    bare = sign(anna, canonical_bytes(signed.body))
    reused = SignedPlan(body=signed.body, signer="anna", signature=bare)

    assert refusal(reused.to_bytes(), federation) == RefusalCode.PLAN_SIGNATURE


def test_signed_plan_is_refused_from_the_second_it_expires(federation: Path) -> None:
    signed = a_signed_plan(federation, valid_days=1)
    expires = signed.plan.expires
    assert expires is not None

    verify_plan(signed.to_bytes(), a_site(federation).federation, now=expires - timedelta(seconds=1))

    assert refusal(signed.to_bytes(), federation, now=expires) == RefusalCode.PLAN_EXPIRED


@pytest.mark.parametrize("member", ["sites/north", "observers/otto", "server"])
def test_only_a_coordinator_signs_plans(federation: Path, member: str) -> None:
    with pytest.raises(IdentityError, match="may not sign plans"):
        sign_plan(a_plan(), A_LAYOUT, load_identity(federation / member))


def test_plan_for_another_federation_or_of_the_past_is_not_signed(federation: Path) -> None:
    anna = load_identity(federation / "coordinators" / "anna")

    with pytest.raises(PlanError, match="is for federation elsewhere"):
        sign_plan(a_plan(federation_id="elsewhere"), A_LAYOUT, anna)
    with pytest.raises(PlanError, match="expired on"):
        sign_plan(a_plan(expires=datetime(2020, 1, 1, tzinfo=UTC)), A_LAYOUT, anna)


def test_fingerprint_is_the_sha256_of_the_authority_s_certificate(federation: Path) -> None:
    fingerprint = a_site(federation).federation.fingerprint

    assert fingerprint.replace(" ", "") == hashlib.sha256(der_of(federation / "ca" / "ca.crt")).hexdigest()
    assert {len(group) for group in fingerprint.split()} == {4}


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [
        ("127.0.0.1", 8443, "127.0.0.1:8443"),
        ("::1", 1, "[::1]:1"),
        ("fl.example.org", 443, "fl.example.org:443"),
    ],
)
def test_address_is_joined_and_split(host: str, port: int, address: str) -> None:
    assert join_address(host, port) == address
    assert split_address(address) == (host, port)
