"""Bad input, full disks, damaged checkpoints and hostile traffic against real processes.

Each disturbance meets a run of the same plan, and the run must end with the same bits as an undisturbed
one: not merely "completed". One deployment serves all tests; each leaves it as it found it, but for the
damaged image files, which stay in site-1's folder because they must not matter.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import shutil
import socket
import ssl
import struct
import subprocess
import zipfile
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
)

from fedward_common.errors import CohortError, RefusalCode
from fedward_common.identity import client_context, load_identity, node_public_key_pem, sign_plan
from fedward_common.plan import read_plan
from fedward_server.run_records import Event
from tests.builders import a_dataset, a_dicom, a_uid, encode
from tests.integration.deployment import NAMES, SITE, Deployment, a_deployment, a_plan_file, call, children

pytestmark = pytest.mark.integration

DISK_MB = 24
EVERYONE = {index: list(NAMES) for index in (1, 2, 3)}
POLICY = """[[approve]]
coordinators = ["lead"]
models = ["cnn2d"]
tasks = ["classification"]
strategies = ["fedavg", "fedadam"]
max_rounds = 10
max_local_epochs = 100
min_cases = 1
"""
"""The sites approve by rule: approving by hand is tested elsewhere."""


@dataclass(frozen=True)
class Federation:
    """A running deployment, and the weights after each round of an undisturbed run.

    Attributes:
        disk: the server's state lies on a small disk of its own (needs root).
    """

    place: Deployment
    digests: dict[int, str]
    disk: bool

    @property
    def state(self) -> Path:
        return self.place.federation / "server" / "state"

    def launch(self, **tables: Any) -> str:
        return launch(self.place, **tables)


def launch(place: Deployment, **tables: Any) -> str:
    """Sign a plan anew and start it: three rounds, long enough that something can happen in one."""
    training = {"local_epochs": 30, "learning_rate": 0.005}
    defaults = {"training": training, "strategy": {"name": "fedadam"}, "evaluation": {"compare_local": False}}
    plan = read_plan(a_plan_file(place.root / "plan.toml", **(defaults | tables)))
    from fedward_common.models import layout_of

    signed = sign_plan(plan, layout_of(plan), load_identity(place.coordinator), valid_days=1)
    with place.client() as client:
        return client.launch(signed.to_bytes()).run_id


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with a_deployment(tmp_path_factory.mktemp("bad-input"), cases_per_site=40) as place:
        for name in NAMES:
            (place.home(name) / "policy.toml").write_text(POLICY)
        with a_small_disk(place.federation / "server" / "state") as disk:
            place.start_server()
            for name in NAMES:
                place.start_site(name)
            place.await_sites(*NAMES)
            report = place.finish(launch(place))
            assert contributed(report) == EVERYONE
            yield Federation(place, digests(report), disk)
            for name in list(place.processes):
                place.stop(name)


@contextmanager
def a_small_disk(folder: Path) -> Iterator[bool]:
    """Mount one over `folder` where that is permitted; whether it was."""
    folder.mkdir(mode=0o700)
    options = f"size={DISK_MB}m,mode=0700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    may_mount = os.geteuid() == 0 and shutil.which("mount") is not None
    mounted = may_mount and not subprocess.call(mount, stderr=subprocess.DEVNULL)
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.check_call(["umount", "--lazy", str(folder)])


def contributed(report: dict[str, Any]) -> dict[int, list[str]]:
    return {
        each["round_index"]: sorted(site["site"] for site in each["sites"] if site["status"] == "contributed")
        for each in report["rounds"]
        if each["committed"] and each["round_index"]
    }


def digests(report: dict[str, Any]) -> dict[int, str]:
    return {each["round_index"]: each["weights_digest"] for each in report["rounds"] if each["round_index"]}


def is_committed(index: int) -> Callable[[Event], bool]:
    return lambda event: event.kind == "round_committed" and event.fields["round"] == index


def peak_mb(pid: int) -> float:
    """Most memory a process ever held."""
    (line,) = [each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in each]
    return int(line.split()[1]) / 1024


PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)


def a_png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG")
    return stream.getvalue()


def a_zip_bomb() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.dcm", bytes(50_000_000))
    return stream.getvalue()


def a_jpeg2000_bomb(uid: str) -> bytes:
    """A codestream that announces 900 million pixels in a header that says 64 x 64."""
    dataset = a_dataset(PIXELS, SOPInstanceUID=uid, PatientID="BOMB")
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    data = bytearray(encode(dataset, JPEG2000Lossless))
    struct.pack_into(">II", data, data.index(b"\xff\x4f\xff\x51") + 8, 30000, 30000)
    return bytes(data)


def a_jpeg_bomb(uid: str) -> bytes:
    """The same with JPEG: 3600 million pixels."""
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "JPEG")
    jpeg = bytearray(stream.getvalue())
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, 60000, 60000)
    elements = {"SOPInstanceUID": uid, "PatientID": "BOMB", "PixelData": encapsulate([bytes(jpeg)])}
    return encode(a_dataset(PIXELS, **elements), JPEGBaseline8Bit)


def a_damaged_codestream(uid: str) -> bytes:
    """A JPEG-LS image of the right size whose second half is noise."""
    dataset = a_dataset(PIXELS, SOPInstanceUID=uid, PatientID="BOMB")
    dataset.compress(JPEGLSLossless, generate_instance_uid=False)
    data = encode(dataset, JPEGLSLossless)
    noise = random.Random(3).randbytes(len(data) // 4)
    return data[: -len(noise)] + noise


def nested_sequences(depth: int) -> bytes:
    """A header whose sequences contain each other; some parsers recurse until they die."""
    opened = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    closed = b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    data = a_dicom(PIXELS)
    place = data.index(b"\x08\x00\x60\x00CS")
    return data[:place] + opened * depth + closed * depth + data[place:]


def bad_files() -> dict[str, tuple[bytes, set[str]]]:
    """Name -> content, and the reasons that would be right for it."""
    good = a_dicom(PIXELS)
    deflated = a_dataset(PIXELS, EncapsulatedDocument=bytes(80_000_000))
    lying = good.replace(b"\x10\x00\x20\x00LO\x02\x00", b"\x10\x00\x20\x00UT\x00\x00\xf0\xff\xff\xff")
    return {
        "empty.dcm": (b"", {"empty"}),
        "notes.txt": (b"remember to call the PACS people", {"not_dicom"}),
        "noise.dcm": (random.Random(1).randbytes(5000), {"not_dicom"}),
        "picture.dcm": (a_png(), {"not_dicom"}),
        "archive.dcm": (a_zip_bomb(), {"not_dicom"}),
        "only-magic.dcm": (bytes(128) + b"DICM" + random.Random(2).randbytes(500), {"malformed", "no_uid"}),
        "header-cut.dcm": (good[:200], {"no_uid"}),
        "pixels-cut.dcm": (good[:-10], {"truncated"}),
        "no-pixels.dcm": (good[: good.index(b"\xe0\x7f\x10\x00")], {"no_pixels"}),
        "ct.dcm": (a_dicom(PIXELS, Modality="CT", SOPClassUID=CTImageStorage), {"sop_class"}),
        "says-ct.dcm": (a_dicom(PIXELS, Modality="CT"), {"mislabelled"}),
        "film.dcm": (a_dicom(PIXELS, NumberOfFrames=1_000_000), {"multi_frame"}),
        "huge.dcm": (a_dicom(PIXELS, Rows=60000, Columns=60000), {"dimensions"}),
        "deflate-bomb.dcm": (encode(deflated, DeflatedExplicitVRLittleEndian), {"deflated"}),
        "nested.dcm": (nested_sequences(20_000), {"malformed", "no_uid"}),
        "lying-length.dcm": (lying, {"malformed", "no_uid", "no_patient"}),
    }


def labelled_bombs() -> dict[str, tuple[bytes, set[str]]]:
    """Images without fault in their headers, so that they have a row; found out when they are decoded."""
    return {
        a_uid("j2k"): (a_jpeg2000_bomb(a_uid("j2k")), {"codestream"}),
        a_uid("jpeg"): (a_jpeg_bomb(a_uid("jpeg")), {"codestream"}),
        a_uid("jls"): (a_damaged_codestream(a_uid("jls")), {"codestream"}),
    }


def test_damaged_images_are_quarantined_with_a_reason_and_change_nothing(federation: Federation) -> None:
    place = federation.place
    folder, labels = place.images("site-1") / "dicom", place.images("site-1") / "labels.csv"
    bombs = labelled_bombs()
    expected = bad_files() | {f"{uid}.dcm": bomb for uid, bomb in bombs.items()}
    for name, (content, _) in expected.items():
        (folder / name).write_bytes(content)
    with labels.open("a") as file:
        file.writelines(f"{uid},0,train\n" for uid in bombs)
    os.mkfifo(folder / "pipe.dcm")
    (folder / "link.dcm").symlink_to(place.images("site-2") / "dicom")
    report = place.finish(federation.launch())
    shown = json.loads(call(*SITE, "cohort", "show", "--json", "--home", str(place.home("site-1"))).stdout)
    found = {each["content"]: each for each in shown["quarantine"]}
    peaks = {name: peak_mb(children(place.processes[name].pid)[0]) for name in NAMES}

    assert contributed(report) == EVERYONE
    assert digests(report) == federation.digests
    assert set(found) == {hashlib.sha256(content).hexdigest() for content, _ in expected.values()}
    for name, (content, reasons) in expected.items():
        item = found[hashlib.sha256(content).hexdigest()]
        assert item["reason"] in reasons, name
        assert item["remedy"], name
    assert sum(int(count) for count in shown["counts"]["modality"].values()) == 40
    assert peaks["site-1"] < max(peaks["site-2"], peaks["site-3"]) + 200


@contextmanager
def labels_changed(place: Deployment, name: str, change: Callable[[list[str]], list[str]]) -> Iterator[None]:
    """Change the lines of a site's label file for a while."""
    path = place.images(name) / "labels.csv"
    before = path.read_text()
    path.write_text("\n".join(change(before.splitlines())) + "\n")
    try:
        yield
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("change", "message", "remedy"),
    [
        (
            lambda rows: [*rows, "2.25.123456789,1,train"],
            "row 42: SOPInstanceUID matches no image",
            "Remove these rows",
        ),
        (lambda rows: [*rows, rows[4]], "row 42: duplicate SOPInstanceUID, first in row 5", "each key once"),
        (
            lambda rows: [*rows[:6], "," + rows[6].partition(",")[2], *rows[7:]],
            "row 7: empty SOPInstanceUID",
            "each key once",
        ),
        (
            lambda rows: [*rows[:6], rows[6].partition(",")[0], *rows[7:]],
            "row 7: 1 cells, 3 expected",
            "Correct",
        ),
        (lambda rows: [*rows[:6], *rows[7:]], "1 of 40 images have no row", "Add their rows"),
        (lambda rows: ["PatientName,label", *rows[1:]], "row 1", "Key columns: SOPInstanceUID"),
    ],
    ids=["unknown key", "duplicate key", "empty key", "cells missing", "row missing", "no key column"],
)
def test_labels_that_do_not_fit_are_refused_with_their_row_and_a_remedy(
    federation: Federation, change: Callable[[list[str]], list[str]], message: str, remedy: str
) -> None:
    home = str(federation.place.home("site-2"))
    with labels_changed(federation.place, "site-2", change):
        done = call(*SITE, "cohort", "index", "--json", "--home", home, code=CohortError.exit_code)
    told = json.loads(done.stdout or done.stderr)

    assert message in json.dumps(told)
    assert remedy in json.dumps(told)
    assert "Traceback" not in done.stderr


def test_a_site_with_unusable_labels_is_refused_by_number_and_the_others_go_on(
    federation: Federation,
) -> None:
    patience = {"quorum": 2, "deadline_s": 60, "gather_s": 1}
    with labels_changed(federation.place, "site-3", lambda rows: [*rows, rows[4]]):
        run_id = federation.launch(rounds=1, participation=patience)
        report = federation.place.finish(run_id)

    assert report["verdict"] == "completed"
    assert contributed(report) == {1: ["site-1", "site-2"]}
    refused = {"site": "site-3", "code": int(RefusalCode.COHORT_UNUSABLE)}
    (absent,) = report["absent"]
    assert {key: absent[key] for key in refused} == refused
    (row,) = [site for site in report["rounds"][-1]["sites"] if site["site"] == "site-3"]
    assert (row["status"], row["code"]) == ("refused", refused["code"])


@contextmanager
def a_full_disk(federation: Federation, free_kb: int) -> Iterator[None]:
    """Next to no space where the server keeps its state; without a disk of its own, files may not grow."""
    if federation.disk:
        ballast = federation.state / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.truncate(ballast, max(0, ballast.stat().st_size - 1024 * free_kb))
        try:
            yield
        finally:
            ballast.unlink()
    else:
        for pid in children(federation.place.processes["server"].pid):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024 * free_kb, 1024 * free_kb))
        yield  # the next run has a process of its own, without the limit


@pytest.mark.parametrize("free_kb", [0, 120], ids=["no space at all", "no space for a checkpoint"])
def test_a_full_disk_fails_the_run_with_a_reason_and_resume_completes_it(
    federation: Federation, free_kb: int
) -> None:
    place = federation.place
    run_id = federation.launch()
    place.events(run_id, is_committed(1))
    with a_full_disk(federation, free_kb):
        report = place.finish(run_id)

        assert report["verdict"] == "failed"
        assert "ree space" in report["reason"]
        assert "fedward run resume" in report["reason"]
        whole = contributed(report)
        assert 1 in whole
        assert 3 not in whole
        assert {index: digests(report)[index] for index in whole} == {
            index: federation.digests[index] for index in whole
        }
    with place.client() as client:
        client.resume(run_id)
    report = place.finish(run_id)

    assert report["verdict"] == "completed", report["reason"]
    assert digests(report) == federation.digests


def test_a_damaged_checkpoint_costs_a_round_and_not_a_bit(federation: Federation) -> None:
    place = federation.place
    run_id = federation.launch()
    place.events(run_id, is_committed(2))
    with place.client() as client:
        client.stop(run_id)
    assert place.finish(run_id)["verdict"] == "stopped"
    newest = max((federation.state / "checkpoints" / run_id).glob("*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    seen = _last_sequence(place, run_id)
    with place.client() as client:
        client.resume(run_id)
        events = list(client.watch(run_id, after=seen))
    report = place.finish(run_id)

    assert "round-00002" in newest.name
    assert [event.fields["round"] for event in events if event.kind == "round_started"] == [2, 3], events
    assert report["verdict"] == "completed", report["reason"]
    assert digests(report) == federation.digests


def _last_sequence(place: Deployment, run_id: str) -> int:
    with place.client() as client:
        return list(client.watch(run_id))[-1].sequence


NUM_NOISY = 40
BODY_MB = 300


def test_hostile_traffic_does_not_disturb_a_run(federation: Federation) -> None:
    place = federation.place
    server = place.processes["server"].pid
    before = peak_mb(server)
    with ExitStack() as stack:
        run_id = federation.launch()
        stack.enter_context(half_open(place.port, NUM_NOISY))
        stack.enter_context(slow_headers(place))
        noise(place.port, NUM_NOISY)
        answers = [oversized(place, path) for path in ("push-object", "pull-messages", "nothing-of-ours")]
        with place.client() as client:
            assert client.healthy()
        report = place.finish(run_id)

    assert contributed(report) == EVERYONE
    assert digests(report) == federation.digests
    assert all(answer is None or answer in (403, 404, 413) for answer in answers), answers
    assert peak_mb(server) < before + 150


def noise(port: int, count: int) -> None:
    """Connections that send random bytes where TLS should be."""
    for seed in range(count):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(random.Random(seed).randbytes(seed * 100 + 1))
            connection.recv(100)


@contextmanager
def half_open(port: int, count: int) -> Iterator[None]:
    """Connections that begin a TLS handshake and say no more."""
    with ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
            connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        yield


@contextmanager
def slow_headers(place: Deployment) -> Iterator[None]:
    """A member whose request never gets past its first header."""
    identity = load_identity(place.federation / "sites" / "site-3")
    with (
        socket.create_connection(("127.0.0.1", place.port), timeout=5) as connection,
        client_context(identity).wrap_socket(connection, server_hostname="127.0.0.1") as channel,
    ):
        channel.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        yield


def oversized(place: Deployment, path: str) -> int | None:
    """Send far more than any message can be with a valid certificate; the answer, None when cut off."""
    identity = load_identity(place.federation / "sites" / "site-2")
    certificate = ssl.PEM_cert_to_DER_cert(identity.certificate.read_text())
    headers = {
        "content-type": "application/protobuf",
        "flwr-public-key": b64encode(node_public_key_pem(certificate)).decode(),
    }

    def body() -> Iterator[bytes]:
        for _ in range(BODY_MB):
            yield bytes(2**20)

    with httpx.Client(verify=client_context(identity), timeout=30) as client:
        try:
            url = f"https://127.0.0.1:{place.port}/v1/fleet/{path}"
            return client.post(url, headers=headers, content=body()).status_code
        except httpx.TransportError:
            return None
