"""The simulation on Flower's Ray engine: the same bits as on our own, nothing left open or behind."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from fedward_client.dicom.synthetic import write_phantom_sites
from fedward_server.cli import main
from tests.integration.deployment import NAMES, a_plan_file

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None and not os.environ.get("CI"), reason="Ray is not installed: make setup-dev"
)
LISTENS = "0A"  # state of a socket in /proc/net/tcp


def command(plan: Path, images: Path, out: Path, engine: str) -> list[str]:
    return [
        *(sys.executable, "-m", "fedward_server.cli", "simulate", str(plan), "--sites", "3", "--json"),
        *("--data", str(images), "--out", str(out), "--threads", "1", "--workers", "2", "--engine", engine),
    ]


def processes(mark: str) -> list[int]:
    """Ids of the processes that have `mark` in the environment they began with."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def listening(pids: list[int]) -> list[str]:
    """Addresses on which these processes listen, as the kernel writes them: hexadecimal, low byte first."""
    owned = set()
    for pid in pids:
        with suppress(OSError):
            owned |= {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    tables = (Path("/proc/net") / name for name in ("tcp", "tcp6"))
    lines = [line.split() for table in tables for line in table.read_text().splitlines()]
    return [line[1].split(":")[0] for line in lines if line[3] == LISTENS and f"socket:[{line[9]}]" in owned]


@dataclass
class RayRun:
    """One run on the Ray engine, as seen from outside."""

    events: list[dict[str, Any]]
    errors: str
    exit_code: int
    num_processes: int
    addresses: list[str]
    left: list[int]
    files: list[str]


def run_on_ray(arguments: list[str]) -> RayRun:
    """Run to the end; look at processes and sockets while the first round is on."""
    mark = f"FEDWARD_TEST_MARK={secrets.token_hex(8)}"
    name, _, value = mark.partition("=")
    # Ray's sockets lie in it: pytest's own folder would be too long a path
    with TemporaryDirectory(prefix="ray") as temporary:
        environment = {**os.environ, name: value, "RAY_TMPDIR": temporary}
        environment.pop("RAY_ADDRESS", None)
        pids: list[int] = []
        addresses: list[str] = []
        events = []
        process = subprocess.Popen(
            arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        for line in process.stdout:
            events.append(json.loads(line))
            if events[-1]["kind"] == "round_started" and not pids:
                pids = processes(mark)
                addresses = listening(pids)
        _, errors = process.communicate(timeout=60)
        left, files = processes(mark), [entry.name for entry in Path(temporary).iterdir()]
    return RayRun(events, errors, process.returncode, len(pids), addresses, left, files)


@pytest.fixture(scope="module")
def plan_and_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("ray")
    write_phantom_sites(root / "images", NAMES, cases_per_site=40, size=28, seed=4)
    return a_plan_file(root / "plan.toml", rounds=2, strategy={"name": "fedadam"}), root / "images"


@needs_ray
def test_ray_gives_the_same_bits_as_our_own_engine_and_is_closed_to_others_and_gone_afterwards(
    plan_and_images: tuple[Path, Path], tmp_path: Path
) -> None:
    ours = subprocess.run(command(*plan_and_images, tmp_path / "local", "local"), capture_output=True)
    assert ours.returncode == 0, ours.stderr

    ray = run_on_ray(command(*plan_and_images, tmp_path / "ray", "ray"))

    assert (ray.exit_code, ray.errors) == (0, "")
    local, other = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("local", "ray"))
    assert [each["weights_digest"] for each in other["rounds"]] == [
        each["weights_digest"] for each in local["rounds"]
    ]
    assert len(other["rounds"]) == 2
    assert (other["test"], other["local_sites"]) == (local["test"], local["local_sites"])
    assert {event["fields"]["site"] for event in ray.events if event["kind"] == "site_update"} == set(NAMES)
    # driver, Ray's own services, two actors
    assert ray.num_processes >= 5
    assert len(ray.addresses) >= 3
    assert {address for address in ray.addresses if not address.endswith("0100007F")} == set()
    assert (ray.left, ray.files) == ([], [])


def test_without_ray_the_command_says_how_to_get_it_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    plan = a_plan_file(tmp_path / "plan.toml")

    code = main(["simulate", str(plan), "--sites", "3", "--engine", "ray", "--out", str(tmp_path / "out")])

    assert code == 2
    assert "pip install 'fedward[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
