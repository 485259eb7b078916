"""A real federation for tests: server and site daemons as processes, mutual TLS on loopback, real DICOM.

Everything is started and ended by its own process id; ports are chosen by the system.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedward_client.dicom.synthetic import write_phantom_sites
from fedward_common.identity import load_identity
from fedward_server.control_client import ControlClient
from fedward_server.provisioning import provision
from fedward_server.run_records import Event

SERVER = (sys.executable, "-m", "fedward_server.cli")
SITE = (sys.executable, "-m", "fedward_client.cli")
NAMES = ("site-1", "site-2", "site-3")
PATIENCE_S = 90.0


@dataclass
class Deployment:
    """A provisioned federation of three joined sites, and the processes that run now."""

    root: Path
    port: int
    control_port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def federation(self) -> Path:
        return self.root / "federation"

    @property
    def coordinator(self) -> Path:
        return self.federation / "coordinators" / "lead"

    def home(self, name: str) -> Path:
        return self.root / "homes" / name

    def images(self, name: str) -> Path:
        return self.root / "images" / name

    def client(self) -> ControlClient:
        return ControlClient(load_identity(self.coordinator))

    def start_server(self) -> None:
        self._spawn("server", *SERVER, "serve", str(self.federation), "--host", "127.0.0.1")

    def start_site(self, name: str, *options: str) -> None:
        self._spawn(name, *SITE, "run", "--home", str(self.home(name)), *options)

    def await_sites(self, *names: str) -> None:
        """Until exactly these sites are connected."""

        def connected() -> bool:
            with suppress(Exception), self.client() as client:
                return {site.name for site in client.sites() if site.online} == set(names)
            return False

        wait_for(connected, f"sites {names} to be connected")

    def kill(self, name: str) -> None:
        """Kill -9."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def stop(self, name: str) -> int:
        """SIGTERM; returns the exit code."""
        process = self.processes.pop(name)
        process.terminate()
        try:
            return process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def sign(self, plan: Path) -> Path:
        signed = plan.with_suffix(".signed")
        call(*SERVER, "plan", "sign", str(plan), "--identity", str(self.coordinator), "--out", str(signed))
        return signed

    def approve(self, signed: Path, *names: str) -> None:
        for name in names or NAMES:
            call(*SITE, "plan", "approve", str(signed), "--yes", "--home", str(self.home(name)))

    def launch(self, signed: Path) -> str:
        with self.client() as client:
            return client.launch(signed.read_bytes()).run_id

    def events(self, run_id: str, until: Callable[[Event], bool]) -> list[Event]:
        """Events up to the first that satisfies `until`; fails when the run ends without it."""
        seen = []
        with self.client() as client:
            for event in client.watch(run_id):
                seen.append(event)
                if until(event):
                    return seen
        raise AssertionError(f"the run ended first: {seen[-1]}")

    def finish(self, run_id: str) -> dict[str, Any]:
        """Wait until a run has ended, for the last time if it was resumed; its report."""
        with self.client() as client:
            for _ in client.watch(run_id):
                pass
            return dict(json.loads(client.report(run_id)))

    def _spawn(self, name: str, *command: str) -> None:
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )


@contextmanager
def a_deployment(root: Path, *, cases_per_site: int = 60, size: int = 28) -> Iterator[Deployment]:
    """Provision, write phantoms, join three sites; on leaving, end every process."""
    port, control_port = free_ports(2)
    place = Deployment(root, port, control_port)
    provision(
        place.federation,
        name="test",
        hosts=["127.0.0.1"],
        site_names=NAMES,
        coordinator_names=["lead"],
        observer_names=["eye"],
        server_port=port,
        control_port=control_port,
    )
    write_phantom_sites(root / "images", NAMES, cases_per_site=cases_per_site, size=size, seed=3)
    for name in NAMES:
        images = place.images(name)
        call(
            *(*SITE, "join", str(place.federation / "sites" / name), "--home", str(place.home(name))),
            *("--dicom", str(images / "dicom"), "--labels", str(images / "labels.csv"), "--threads", "1"),
        )
    try:
        yield place
    finally:
        for name in list(place.processes):
            with suppress(subprocess.TimeoutExpired):
                place.stop(name)


def a_plan_file(path: Path, **tables: Any) -> Path:
    """Write a small plan; keyword tables are merged over the defaults."""
    document: dict[str, Any] = {
        "name": "small",
        "rounds": 3,
        "seed": 5,
        "participation": {"quorum": 2, "deadline_s": 60, "gather_s": 30},
        "task": {"labels": ["normal", "abnormal"]},
        "transforms": {"size": [28, 28]},
        "model": {"name": "cnn2d", "options": {"channels": [8, 16], "dense": 16}},
        "training": {"learning_rate": 0.02, "batch_size": 16},
        "privacy": {"min_cases": 1},
    }
    for key, value in tables.items():
        if isinstance(value, dict):
            document[key] = {**document.get(key, {}), **value}
        else:
            document[key] = value
    lines = [f"{key} = {json.dumps(value)}" for key, value in document.items() if not isinstance(value, dict)]
    for key, table in document.items():
        if isinstance(table, dict):
            lines += [f"[{key}]", *_table(key, table)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _table(name: str, table: dict[str, Any]) -> list[str]:
    plain = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, inner in table.items():
        if isinstance(inner, dict):
            plain += [f"[{name}.{key}]", *(f"{k} = {json.dumps(v)}" for k, v in inner.items())]
    return plain


def call(*command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and insist on its exit code."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == code, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Look every tenth of a second; fail with `what` when it takes too long."""
    until = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < until, f"waited {patience_s:.0f} s for {what}"
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    """Process ids of a process's direct children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if int(fields[1]) == pid:
                    found.append(int(entry.name))
    return found


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    with suppress(OSError):
        os.kill(pid, signal.SIG_DFL)
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False
