"""A site's commands beside a real PACS: index it, go on watching it, end when told to, say what is wrong."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedward_client.sources.settings import spool_root
from tests.builders import a_dicom, a_uid
from tests.integration.pacs import (
    AE_TITLE,
    DICOM_PORT,
    HTTP_PORT,
    OUR_AE_TITLE,
    OUR_PORT,
    PASSWORD,
    USER,
    Orthanc,
    a_study,
    everything_in,
    private_network,
    skip_unless_installed,
    uid_of,
)
from tests.integration.pacs_faults import relay

pytestmark = pytest.mark.integration

RELAY_PORT = 15000
IMAGES = [
    a_dicom(
        Modality="DX",
        PatientID=f"P{number}",
        StudyInstanceUID=a_uid(f"study {number}"),
        SeriesInstanceUID=a_uid(f"series {number}"),
    )
    for number in range(6)
]
WEB = {"kind": "dicomweb", "url": f"http://127.0.0.1:{HTTP_PORT}/dicom-web", "user": USER}
NODE = {
    "kind": "dimse",
    "host": "127.0.0.1",
    "port": DICOM_PORT,
    "pacs_ae_title": AE_TITLE,
    "ae_title": OUR_AE_TITLE,
    "listen": f"127.0.0.1:{OUR_PORT}",
}


@pytest.fixture(scope="module", autouse=True)
def net() -> Iterator[None]:
    skip_unless_installed()
    with private_network():
        yield


@pytest.fixture
def orthanc(tmp_path: Path) -> Iterator[Orthanc]:
    """A PACS, empty."""
    running = Orthanc(tmp_path / "orthanc")
    running.start()
    try:
        yield running
    finally:
        running.stop()


def a_home(folder: Path, source: dict[str, Any], num_labelled: int = len(IMAGES)) -> Path:
    """A site's home with a `[source]` table; what the server is called plays no part here."""
    home = folder / "home"
    home.mkdir(mode=0o700)
    (home / "password").write_text(PASSWORD)
    (home / "password").chmod(0o600)
    secret = {"password_file": "password"} if "user" in source else {}
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in {**source, **secret, "poll_s": 0.1}.items()]
    (home / "site.toml").write_text(
        "".join(
            ['name = "north"\nserver = "127.0.0.1:9"\nlabels = "labels.csv"\n', "[source]\n", *lines],
        )
    )
    label(home, num_labelled)
    return home


def label(home: Path, num_labelled: int) -> None:
    """Write the labels of the first images."""
    rows = [f"{uid_of(data)},{number % 2}\n" for number, data in enumerate(IMAGES[:num_labelled])]
    (home / "labels.csv").write_text("".join(["SOPInstanceUID,label\n", *rows]))


def command(home: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "fedward_client.cli", *words, "--home", str(home), "--json"]


def run(home: Path, *words: str) -> tuple[int, Any, str]:
    """Run a command to its end: exit code, the document it printed, and all its output."""
    done = subprocess.run(command(home, *words), capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, json.loads(done.stdout or "null"), done.stdout + done.stderr


class Watching:
    """`cohort index --watch`, running; it logs to a file."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log

    def next_pass(self) -> Any:
        """What the next pass printed."""
        assert self.process.stdout is not None
        text = ""
        for line in self.process.stdout:
            text += line
            if line == "}\n":
                return json.loads(text)
        raise AssertionError(f"it ended: {text}{self.log.read_text()}")

    def wait_for(self, event: str) -> None:
        """Wait until its log has an event."""
        self.wait_for_text(f'"event": "{event}"')

    def wait_for_text(self, text: str) -> None:
        """Wait until its log has some words."""
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def stop(self) -> int:
        """End it as systemd does; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


@contextmanager
def watching(home: Path) -> Iterator[Watching]:
    """Watch the source of a home; killed when left, or after a minute."""
    log = home.parent / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command(home, "cohort", "index", "--watch"), stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        patience = threading.Timer(60, process.kill)
        patience.start()
        try:
            yield Watching(process, log)
        finally:
            patience.cancel()
            process.kill()


@pytest.mark.parametrize(
    "source", [WEB, {**NODE, "retrieve": "get"}, {**NODE, "retrieve": "move"}], ids=["web", "get", "move"]
)
def test_index_fetches_and_the_images_become_cases(
    orthanc: Orthanc, source: dict[str, Any], tmp_path: Path
) -> None:
    orthanc.add(IMAGES)
    orthanc.add(a_study(2))  # CT: not asked for unless the cohort's file says so
    home = a_home(tmp_path, source)

    code, document, output = run(home, "cohort", "index")

    assert code == 0, output
    assert (document["fetched"], document["not_fetched"]) == (6, {})
    assert (document["files"], document["images"], document["labelled_cases"]) == (6, 6, 6)
    assert run(home, "cohort", "index")[1]["fetched"] == 0

    (home / "cohort.toml").write_text('modalities = ["CT"]\ndate_from = 2024-01-01\n')
    run(home, "cohort", "index")
    assert len(everything_in(spool_root(home))) == 8


def test_watching_an_archive_finds_what_is_new_and_ends_when_told(orthanc: Orthanc, tmp_path: Path) -> None:
    orthanc.add(IMAGES[:2])
    home = a_home(tmp_path, {**WEB, "attempts": 1, "timeout_s": 5.0}, num_labelled=2)

    with watching(home) as site:
        assert site.next_pass()["images"] == 2
        orthanc.stop()
        site.wait_for("pacs_away")
        label(home, len(IMAGES))
        orthanc.start()
        orthanc.add(IMAGES[2:])
        found = site.next_pass()["images"]
        while found < len(IMAGES):
            found = site.next_pass()["images"]
        assert site.stop() == 0


def test_a_watch_follows_the_cohorts_file_and_names_what_it_cannot_follow(
    orthanc: Orthanc, tmp_path: Path
) -> None:
    orthanc.add(IMAGES)
    orthanc.add(a_study(2))
    home = a_home(tmp_path, WEB)

    with watching(home) as site:
        assert (site.next_pass()["files"], len(everything_in(spool_root(home)))) == (6, 6)
        (home / "cohort.toml").write_text("modalities = [")
        site.wait_for_text("HOME/cohort.toml is not TOML")
        (home / "cohort.toml").write_text(
            'modalities = ["CT", "DX"]\n[labels.limits]\nimages_without_row = 1'
        )
        while site.next_pass()["files"] < 8:
            pass
        with (home / "site.toml").open("a") as settings:
            settings.write("spool_gb = 1\n")
        site.wait_for_text("site.toml changed since this watch began")
        assert site.stop() == 0


def test_watching_receives_what_is_pushed_and_ends_when_told(orthanc: Orthanc, tmp_path: Path) -> None:
    orthanc.add(IMAGES)
    home = a_home(tmp_path, {**NODE, "retrieve": "push"})

    with watching(home) as site:
        site.wait_for("receiver_started")
        orthanc.ask("/modalities/site/store", json.dumps(orthanc.ask("/instances")).encode())
        found = 0
        while found < len(IMAGES):
            found = site.next_pass()["images"]
        assert site.stop() == 0
        assert "receiver_stopped" in site.log.read_text()


def test_a_watch_that_is_ended_while_it_fetches_leaves_whole_files(orthanc: Orthanc, tmp_path: Path) -> None:
    orthanc.add(a_study(40, rows=256))
    home = a_home(tmp_path, {**WEB, "url": f"http://127.0.0.1:{RELAY_PORT}/dicom-web"})
    (home / "cohort.toml").write_text('modalities = ["CT"]\n')

    with watching(home) as site:

        def end() -> None:
            while len(everything_in(spool_root(home))) < 3:
                time.sleep(0.01)
            site.process.terminate()

        with relay(RELAY_PORT, HTTP_PORT, 2_000_000, end):
            assert site.process.wait(30) == 0

    kept = everything_in(spool_root(home))
    assert 3 <= len(kept) < 40
    assert all(path.name == hashlib.sha256(path.read_bytes()).hexdigest() for path in kept)
    with relay(RELAY_PORT, HTTP_PORT, 10**12, lambda: None):
        run(home, "cohort", "index")
    assert len(everything_in(spool_root(home))) == 40


def test_doctor_checks_the_source_and_quotes_no_secret(orthanc: Orthanc, tmp_path: Path) -> None:
    home = a_home(tmp_path, WEB)
    checks = {check["name"]: check for check in run(home, "doctor")[1]["checks"]}
    assert checks["PACS reachable"]["ok"]
    assert checks["PACS search"]["ok"]

    (home / "password").write_text("no-such-password")
    code, document, output = run(home, "doctor")

    (failed,) = [
        check for check in document["checks"] if check["name"].startswith("PACS") and not check["ok"]
    ]
    assert (code, failed["name"], "password_file" in failed["remedy"]) == (1, "PACS search", True)
    assert "no-such-password" not in output
