"""A server and a site as docker-compose.yml confines them: they start, work together, and stop."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedward_client.dicom.synthetic import write_phantom_sites
from fedward_server.provisioning import provision
from tests.deploy.confinement import Confined, network, skip_unless_possible
from tests.deploy.test_compose import DOCUMENT, SITES

pytestmark = pytest.mark.integration

PLAN = """\
name = "one-round"
description = "One round at one site."
rounds = 1
[participation]
quorum = 1
deadline_s = 120
gather_s = 60
[task]
labels = ["normal", "abnormal"]
[transforms]
size = [28, 28]
[model]
name = "cnn2d"
[training]
batch_size = 16
learning_rate = 0.001
"""


@dataclass(frozen=True)
class Place:
    """Server and one site, started; `folder` is where docker-compose.yml would be."""

    server: Confined
    site: Confined
    folder: Path

    def coordinate(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a coordinator's command on the host of the containers."""
        enter = ["nsenter", f"--target={self.server.network}", "--net"]
        command = [*enter, sys.executable, "-m", "fedward_server.cli", *arguments]
        return subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, timeout=120, check=False
        )


def await_true(happened: Callable[[], bool], service: Confined, patience_s: float = 60) -> None:
    until = time.monotonic() + patience_s
    while not happened():
        assert service.process is not None
        ended = service.process.poll()
        if ended is not None or time.monotonic() > until:
            pytest.fail(f"{service.name}: exit code {ended}, log: {service.log.read_text()[-2000:]}")
        time.sleep(0.1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    skip_unless_possible()
    folder = tmp_path_factory.mktemp("compose")
    # as in the head of docker-compose.yml
    provision(
        folder / "federation", name="Demo", hosts=["localhost", "server"], site_names=SITES[:1],
        coordinator_names=["coordinator"],
    )  # fmt: skip
    write_phantom_sites(folder / "data", SITES[:1], cases_per_site=40, size=28)
    with network() as holder:
        server, site = (Confined(name, DOCUMENT, folder, holder) for name in ("server", "site-a"))
        try:
            server.start()
            await_true(server.is_healthy, server)
            site.start()
            await_true(site.is_healthy, site)
            yield Place(server, site, folder)
        finally:
            for service in (site, server):
                if service.process is not None:
                    service.process.kill()
                    service.process.wait()


@pytest.mark.parametrize(
    "path",
    ["/x", "/usr/x", "/data/x", "/data/dicom/x", "/etc/hosts", "/var/lib/fedward-site/site.toml",
     "/var/lib/fedward-site/identity/tls.key", "/var/lib/fedward-site/identity/federation.json"],
)  # fmt: skip
def test_site_cannot_write_outside_its_volume(path: str, place: Place) -> None:
    assert place.site.run("sh", "-c", f"echo >> {path}").returncode != 0


def test_site_can_write_to_its_volume_and_tmp(place: Place) -> None:
    # the control of the test above
    assert (
        place.site.run("sh", "-c", "echo > /var/lib/fedward-site/probe && echo > /tmp/probe").returncode == 0
    )
    assert (place.site.volume / "probe").exists()


def test_service_has_no_privileges_and_no_way_to_get_any(place: Place) -> None:
    for service in (place.server, place.site):
        assert service.process is not None
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        values = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert set(values["Uid"].split()) == set(values["Gid"].split()) == {"10001"}
        assert {int(values[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")} == {0}
        assert values["NoNewPrivs"] == "1"


def test_doctor_finds_nothing_wrong_at_the_site_once_its_images_are_indexed(place: Place) -> None:
    indexed = place.site.run("fedward-site", "cohort", "index")
    assert indexed.returncode == 0, indexed.stderr
    result = place.site.run("fedward-site", "doctor", "--json")
    assert [check for check in json.loads(result.stdout)["checks"] if not check["ok"]] == []
    assert result.returncode == 0


def test_a_plan_is_signed_approved_and_run(place: Place) -> None:
    (place.folder / "plan.toml").write_text(PLAN)
    identity = ("--identity", "federation/coordinators/coordinator")
    signed = place.coordinate("plan", "sign", "plan.toml", *identity, "--out", "plan.signed")
    assert signed.returncode == 0, signed.stderr
    document = (place.folder / "plan.signed").read_bytes()
    approve = "cat > /tmp/plan && fedward-site plan approve /tmp/plan --yes"
    approved = place.site.run("sh", "-c", approve, given=document)
    assert approved.returncode == 0, approved.stderr
    run = place.coordinate("run", "start", "plan.signed", *identity, "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    kept = {path.suffix for path in (place.server.volume / "state").rglob("*")}
    assert {".sqlite", ".safetensors", ".jsonl"} <= kept


def test_services_stop_on_sigterm_within_their_grace_period(place: Place) -> None:
    # last in this file: it ends what the others use
    assert place.site.stop() == 0
    assert place.server.stop() == 0
