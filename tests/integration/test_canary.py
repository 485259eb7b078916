"""No identifier leaves a site: canaries in every text of the DICOM files, and a search of all that left.

Three sites whose files, folders and label files are full of canaries take part in a run with everything
that makes software talkative: damaged files, labels that do not fit, a plan not yet approved, a site
killed in the middle of a round. What the sites' processes handed to TLS is recorded before encryption by
a tap that Python loads into them (tests/integration/tap); the processes are otherwise the installed ones.
Every byte recorded, the server's whole folder, all logs and reports are then searched. A site made leaky
on purpose shows that the same search does find what leaves.

What this cannot show: that numbers which may leave, the weights above all, do not encode something. A
million floats can carry a name in a code that nobody looks for; against that stand approved plans,
installed code and bounds, not this test. Nor does it see compressed or encrypted forms, pixels after
any arithmetic but the site's own preparation, values shorter than eight bytes such as an age, what
timing or message sizes tell, and bytes that native code would send past Python's sockets.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom._dicom_dict import DicomDictionary

from fedward_common.audit import AuditLog
from fedward_common.errors import RefusalCode
from fedward_common.plan import parse_signed_plan
from fedward_server.run_records import Event
from tests.integration.canaries import (
    KEPT,
    SHOWN_TO_OPERATOR,
    Finding,
    Haystack,
    Mark,
    Planted,
    a_haystack,
    canary_value,
    plant,
    spellings,
)
from tests.integration.deployment import (
    NAMES,
    SERVER,
    SITE,
    Deployment,
    a_deployment,
    a_plan_file,
    call,
    wait_for,
)

pytestmark = pytest.mark.integration

TAP = Path(__file__).with_name("tap")
ENVELOPE = re.compile(rb'\{"action":"[a-z]+".*?"version":1\}')
# Where a site keeps what must stay: these may hold identifiers, everything else at a site may not.
STAYS = ("index.sqlite", "cache/")
# Long enough that site-1 can be killed in the middle of a round.
SLOW = {"local_epochs": 40, "learning_rate": 0.005}


@dataclass
class Evidence:
    """What a run left behind: name of the source -> bytes.

    Attributes:
        planted: per site.
        wire: what each site handed to TLS; peers: the addresses it connected to.
        server: every file outside the sites' homes and image folders; screens: what commands printed.
        home: files in sites' homes that may not hold identifiers; stays: those that may.
        audited: what a site's audit log says was sent: envelope digest -> bytes of its payload.
    """

    planted: dict[str, Planted]
    report: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    wire: dict[str, bytes] = field(default_factory=dict)
    peers: dict[str, set[str]] = field(default_factory=dict)
    server: dict[str, bytes] = field(default_factory=dict)
    screens: dict[str, bytes] = field(default_factory=dict)
    home: dict[str, bytes] = field(default_factory=dict)
    stays: dict[str, bytes] = field(default_factory=dict)
    audited: dict[str, dict[str, int]] = field(default_factory=dict)

    @cached_property
    def everywhere(self) -> Haystack:
        """What may be nowhere but in the files that stay."""
        return self._haystack(pseudonyms=False)

    @cached_property
    def outside(self) -> Haystack:
        """What may not leave the site: also its own names for its images."""
        return self._haystack(pseudonyms=True)

    def _haystack(self, *, pseudonyms: bool) -> Haystack:
        tensors = [_values(data) for name, data in self.stays.items() if name.endswith(".safetensors")]
        return a_haystack(self.planted.values(), tensors=tensors, pseudonyms=pseudonyms)


class TappedFederation:
    """A deployment of canary sites whose processes are tapped."""

    def __init__(self, place: Deployment) -> None:
        self.place = place
        self.planted = {name: self._plant(name) for name in NAMES}

    def tap(self, name: str) -> Path:
        return self.place.root / "taps" / name

    def start_site(self, name: str, *, leaky: bool = False) -> None:
        self.tap(name).mkdir(parents=True, exist_ok=True)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("PYTHONPATH", str(TAP), prepend=os.pathsep)
            environment.setenv("FEDWARD_TAP", str(self.tap(name)))
            if leaky:
                environment.setenv("FEDWARD_LEAK", str(self.place.home(name)))
            self.place.start_site(name)

    def sent(self, name: str) -> bytes:
        return b"\n".join(path.read_bytes() for path in sorted(self.tap(name).glob("*.tls")))

    def peers(self, name: str) -> set[str]:
        return {
            line for path in self.tap(name).glob("*.peers") for line in path.read_text().splitlines() if line
        }

    def _plant(self, name: str) -> Planted:
        folder = self.place.images(name)
        planted = plant(folder, name)
        settings = self.place.home(name) / "site.toml"
        text = settings.read_text().replace(str(folder / "dicom"), str(planted.dicom))
        settings.write_text(text.replace(str(folder / "labels.csv"), str(planted.labels)))
        return planted


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TappedFederation]:
    with a_deployment(tmp_path_factory.mktemp("canary"), cases_per_site=40) as place:
        federation = TappedFederation(place)
        place.start_server()
        for name in NAMES:
            federation.start_site(name)
        place.await_sites(*NAMES)
        yield federation


@pytest.fixture(scope="module")
def evidence(federation: TappedFederation) -> Evidence:
    """One eventful run, and what is found afterwards."""
    place, evidence = federation.place, Evidence(federation.planted)
    patience = {"quorum": 2, "deadline_s": 90, "gather_s": 90}
    evaluation = {"initial": True}
    plan = a_plan_file(place.root / "plan.toml", participation=patience, training=SLOW, evaluation=evaluation)
    signed = place.sign(plan)
    place.approve(signed, "site-1", "site-3")
    labels, mark = federation.planted["site-3"].labels, Mark("site-3")
    sound = labels.read_text()
    # The text of this site's error would name UIDs, if errors quoted what they are about. One row more
    # than there are files too damaged to tell their UID: one such row is excused.
    rows = "".join(f"{mark.uid}.77{number},1,train,{mark.text} unknown\n" for number in range(2))
    labels.write_text(sound + rows)
    run_id = place.launch(signed)
    place.events(run_id, _two_wait)
    evidence.screens = _screens(place, "site-3")
    labels.write_text(sound)
    digest = parse_signed_plan(signed.read_bytes()).digest
    call(*SITE, "plan", "approve", digest, "--yes", "--home", str(place.home("site-2")))
    place.events(run_id, lambda event: event.kind == "round_started" and event.fields["round"] == 2)
    place.kill("site-1")
    federation.start_site("site-1")
    evidence.report = place.finish(run_id)
    with place.client() as client:
        evidence.events = list(client.watch(run_id))
    evidence.screens |= _screens(place, "site-1", run_id)
    assert place.stop("site-1") == 0  # it takes its leave, which is recorded too
    _collect(federation, evidence)
    return evidence


def _two_wait(event: Event) -> bool:
    return event.kind == "sites" and event.fields["waiting"] == {
        "site-2": int(RefusalCode.PLAN_NOT_APPROVED),
        "site-3": int(RefusalCode.COHORT_UNUSABLE),
    }


def _screens(place: Deployment, site: str, run_id: str | None = None) -> dict[str, bytes]:
    """What a site operator's commands print, and a coordinator's on a run; both streams."""
    home = ("--home", str(place.home(site)))
    commands: dict[str, tuple[str, ...]] = {
        f"{site} cohort index": (*SITE, "cohort", "index", *home),
        f"{site} cohort show": (*SITE, "cohort", "show", *home, "--json"),
    }
    if run_id is not None:
        lead = ("--identity", str(place.coordinator))
        page = ("--out", str(place.root / "report.html"))
        commands |= {
            f"{site} outbound show": (*SITE, "outbound", "show", *home, "--json"),
            f"{site} plan list": (*SITE, "plan", "list", *home, "--json"),
            "run watch": (*SERVER, "run", "watch", run_id, *lead, "--json"),
            "run report": (*SERVER, "run", "report", run_id, *lead, *page, "--json"),
            "run list": (*SERVER, "run", "list", *lead, "--json"),
        }
    screens = {}
    for name, command in commands.items():
        done = subprocess.run(command, capture_output=True, check=False, timeout=120)
        assert done.returncode == (0 if run_id else 6), f"{name}: {done.returncode} {done.stderr!r}"
        screens[name] = done.stdout + done.stderr
    return screens


def _collect(federation: TappedFederation, evidence: Evidence) -> None:
    root = federation.place.root
    homes, aside = root / "homes", (root / "images", root / "taps")
    for path in sorted(root.rglob("*")):
        if not path.is_file() or any(folder in path.parents for folder in aside):
            continue
        if homes not in path.parents:
            evidence.server[str(path.relative_to(root))] = path.read_bytes()
            continue
        site, _, name = str(path.relative_to(homes)).partition("/")
        kept = name.startswith(STAYS)
        # The operator himself wrote there where the images are.
        if name != "site.toml":
            (evidence.stays if kept else evidence.home)[f"{site}/{name}"] = path.read_bytes()
    for name in NAMES:
        evidence.wire[name] = federation.sent(name)
        evidence.peers[name] = federation.peers(name)
        evidence.audited[name] = {
            str(entry.fields["envelope_digest"]): int(entry.fields["payload_bytes"])
            for entry in AuditLog(federation.place.home(name) / "audit.jsonl").entries()
            if entry.event == "outbound"
        }


def _values(cached: bytes) -> bytes:
    """Pixels of a file of prepared images, without what describes them."""
    size = int.from_bytes(cached[:8], "little")
    start, end = json.loads(cached[8 : 8 + size])["values"]["data_offsets"]
    return cached[8 + size + start : 8 + size + end]


def found_in(haystack: Haystack, sources: dict[str, bytes]) -> dict[str, set[Finding]]:
    """Sources in which something was found, and what."""
    found = {name: haystack.find(data) for name, data in sources.items()}
    return {name: findings for name, findings in found.items() if findings}


def test_the_run_was_as_eventful_as_it_should_be(evidence: Evidence) -> None:
    contributed = [
        {site["site"] for site in each["sites"] if site["status"] == "contributed"}
        for each in evidence.report["rounds"]
        if each["round_index"]
    ]
    shown = json.loads(evidence.screens["site-1 cohort show"])

    assert evidence.report["verdict"] == "completed"
    assert contributed == [set(NAMES)] * 3
    assert {each["reason"] for each in shown["quarantine"]} == {"no_pixels", "no_uid", "codestream"}
    assert b"row 43: SOPInstanceUID matches no image" in evidence.screens["site-3 cohort index"]
    assert f'"code": {int(RefusalCode.COHORT_UNUSABLE)}'.encode() in evidence.home["site-3/site.log"]
    assert evidence.home["site-1/site.log"].count(b'"connected"') == 2


def test_no_canary_is_in_any_byte_that_a_site_sends(evidence: Evidence) -> None:
    assert found_in(evidence.outside, evidence.wire) == {}


def test_no_canary_is_in_the_servers_folder_logs_or_report(evidence: Evidence) -> None:
    names = " ".join(evidence.server)

    assert all(
        each in names
        for each in ("runs.sqlite", ".safetensors", "audit.jsonl", "report.html", "server.log", "site-1.log")
    )
    assert found_in(evidence.outside, evidence.server) == {}
    assert not any(planted.mark.text in names for planted in evidence.planted.values())


def test_no_canary_is_in_a_sites_log_audit_plans_or_on_a_screen(evidence: Evidence) -> None:
    haystack = evidence.everywhere

    assert {"site-1/site.log", "site-1/audit.jsonl"} <= set(evidence.home)
    assert found_in(haystack, evidence.home) == {}
    assert found_in(haystack, without_scanners(evidence)) == {}


def without_scanners(evidence: Evidence) -> dict[str, bytes]:
    """The screens, but for the values by which an operator has the site's own cases counted."""
    screens = dict(evidence.screens)
    for site, planted in evidence.planted.items():
        name = f"{site} cohort show"
        for tag in SHOWN_TO_OPERATOR if name in screens else ():
            screens[name] = screens[name].replace(f"{planted.mark.text}{tag}".encode(), b"")
    return screens


def test_the_same_search_finds_what_stays_at_the_site(evidence: Evidence) -> None:
    """The needles are those of the data that was really read, so an empty result means something."""
    found = found_in(evidence.outside, evidence.stays)
    index = {(each.name, each.spelling) for each in found["site-1/index.sqlite"]}
    cached = set[Finding]().union(*(found[name] for name in found if name.startswith("site-1/cache/")))

    assert {("site-1 text", "utf-8"), ("site-1 uid", "utf-8"), ("content digest", "utf-8")} <= index
    assert Finding("tensor", "eight bytes") in cached


def test_sites_connect_to_the_server_and_to_nothing_else(
    federation: TappedFederation, evidence: Evidence
) -> None:
    server = f"socket.connect ('127.0.0.1', {federation.place.port})"

    assert evidence.peers == {name: {server} for name in NAMES}


def test_what_was_recorded_is_what_the_audit_log_says_and_nothing_more(evidence: Evidence) -> None:
    for name in NAMES:
        wire, audited = evidence.wire[name], evidence.audited[name]
        on_the_wire = {hashlib.sha256(each).hexdigest() for each in ENVELOPE.findall(wire)}
        assert on_the_wire <= set(audited)
        # A kill can come between an entry and its message; nothing else can.
        assert len(set(audited) - on_the_wire) <= (1 if name == "site-1" else 0)
        payloads = sum(audited[each] for each in on_the_wire)
        assert 300_000 < payloads < len(wire)


@pytest.fixture(scope="module")
def leaked(federation: TappedFederation, evidence: Evidence) -> tuple[Haystack, bytes, bytes]:
    """The positive control: site-1 leaks past its door; the search, what it sent, what it printed."""
    place = federation.place
    haystack = evidence.outside
    before, printed = len(federation.sent("site-1")), len((place.root / "site-1.log").read_bytes())
    patience = {"quorum": 1, "deadline_s": 30, "gather_s": 1}
    signed = place.sign(a_plan_file(place.root / "leaky.toml", rounds=1, participation=patience))
    place.approve(signed, "site-1", "site-2")
    federation.start_site("site-1", leaky=True)
    place.await_sites(*NAMES)
    place.finish(place.launch(signed))
    wait_for(lambda: len(federation.sent("site-1")) > before, "the leaky site to have sent something")
    sent, log = federation.sent("site-1"), (place.root / "site-1.log").read_bytes()
    return haystack, sent, log[printed:]


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("site-1 text", "utf-8"),  # a patient's number in the envelope
        ("site-1 text", "base64"),  # an exception's text, naming a file, in a record of its own
        ("site-1 text", "utf-16-le"),
        ("sha256 of PatientID", "hex"),  # a plain hash instead of a pseudonym
        ("stored pixels", "eight bytes"),  # an image in the place of an update
    ],
)
def test_a_leaky_sites_bytes_are_caught(
    leaked: tuple[Haystack, bytes, bytes], name: str, spelling: str
) -> None:
    haystack, sent, _ = leaked
    found = haystack.find(sent)

    assert [each for each in found if each.name == name and each.spelling.startswith(spelling)]


def test_a_leaky_sites_log_is_caught(leaked: tuple[Haystack, bytes, bytes]) -> None:
    haystack, _, log = leaked

    assert Finding("site-1 text", "hex") in haystack.find(log)


SECRET = "QXZKNRYZ0010"


@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize(
    ("spelling", "written"),
    [
        ("utf-8", SECRET.encode()),
        ("lower case", SECRET.lower().encode()),
        ("reversed", SECRET[::-1].encode()),
        ("utf-16-le", SECRET.encode("utf-16-le")),
        ("utf-16-be", SECRET.encode("utf-16-be")),
        ("hex", SECRET.encode().hex().encode()),
        ("HEX", SECRET.encode().hex().upper().encode()),
    ],
)
def test_search_finds_a_text_in_each_spelling_at_any_place(
    before: int, spelling: str, written: bytes
) -> None:
    haystack = Haystack()
    haystack.add_text("secret", SECRET)
    random = np.random.default_rng(before).bytes(100_000)

    assert haystack.find(random) == set()
    assert haystack.find(random[: 997 + before] + written + random[2000:]) == {Finding("secret", spelling)}
    assert haystack.find(random + written) == {Finding("secret", spelling)}


@pytest.mark.parametrize("before", range(6))
def test_search_finds_a_text_inside_a_base64_document_at_any_offset(before: int) -> None:
    haystack = Haystack()
    haystack.add_text("secret", SECRET)
    document = base64.b64encode(b"x" * before + SECRET.encode() + b"and more")

    assert haystack.find(document) == {Finding("secret", f"base64 after {before % 3}")}


def test_search_finds_plain_hashes_in_binary_hex_and_base64() -> None:
    haystack = Haystack()
    haystack.add_digests("PatientID", "P1")
    digest = hashlib.sha256(b"P1").digest()

    def spelling(data: bytes) -> set[str]:
        return {
            each.spelling for each in haystack.find(b"{" + data + b"}") if each.name == "sha256 of PatientID"
        }

    assert spelling(digest) == {"bytes"}
    assert spelling(digest.hex().encode()) == {"hex"}
    assert spelling(digest.hex().upper().encode()) == {"HEX"}
    assert "base64" in spelling(base64.b64encode(digest))
    assert "base64url" in spelling(base64.urlsafe_b64encode(digest))
    assert spelling(hashlib.sha256(b"P2").digest()) == set()


def test_search_finds_eight_bytes_of_an_image_and_passes_over_dull_ones() -> None:
    pixels = np.random.default_rng(1).integers(0, 4096, 100, dtype=np.uint16).tobytes()
    haystack = Haystack()
    haystack.add_ngrams("pixels", bytes(50) + pixels, 1)

    assert haystack.find(b"abc" + pixels[17:25] + b"def") == {Finding("pixels", "eight bytes")}
    assert haystack.find(bytes(1000)) == set()


def test_search_takes_a_number_only_as_a_whole() -> None:
    haystack = Haystack()
    haystack.add_text("date", "18970611")

    assert haystack.find(b'{"auroc":0.6189706112}') == set()
    assert haystack.find(b'{"date":18970611}') == {Finding("date", "utf-8")}
    assert haystack.find(b"18970611") == {Finding("date", "utf-8")}


def test_search_refuses_needles_that_chance_would_find() -> None:
    with pytest.raises(ValueError, match="by chance"):
        Haystack().add_text("age", "097Y")


def test_every_spelling_is_long_enough_for_every_mark() -> None:
    for name in NAMES:
        for text in Mark(name).texts().values():
            assert min(len(each) for each in spellings(text).values()) >= 8


def test_planted_files_hold_a_canary_in_every_text_element_of_the_dictionary(evidence: Evidence) -> None:
    planted = evidence.planted["site-1"]
    (path,) = planted.dicom.rglob(f"{planted.mark.text} 0000.dcm")
    image = dcmread(path)
    texts = tuple(planted.mark.texts().values())
    bare = {
        keyword
        for tag, (vr, *_, keyword) in DicomDictionary.items()
        if 0x0008 <= tag >> 16 < 0x7FE0 and tag & 0xFFFF and canary_value(planted.mark, vr, tag)
        if tag not in image or not any(text in str(image[tag].value) for text in texts)
    }

    assert len(image) > 3500
    assert bare <= KEPT
    assert planted.mark.text.encode() in path.read_bytes()[:128]
    assert planted.mark.text in str(image.file_meta)
    assert planted.mark.text in str(image.OtherPatientIDsSequence[0].PatientName)
