"""`fedward demo`: a whole federation on this machine, made the way its users would make one.

Everything is real except the distance: a certificate authority, one server and one daemon a site as
processes of their own, mutual TLS on loopback, DICOM files, a signed and approved plan. Each step is
the command that a coordinator or a site's operator would type; only the typing is automated.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from fedward_common.errors import ConnectionLostError, RunFailedError, UsageError
from fedward_common.home_lock import lock_home
from fedward_server.console import say

if TYPE_CHECKING:
    from fedward_common.evaluation.report import RunReport

_START_S = 60.0
_STOP_S = 20.0
_LOCK_FILE = ".lock"
_SERVER = (sys.executable, "-P", "-m", "fedward_server.cli")
_SITE = (sys.executable, "-P", "-m", "fedward_client.cli")


def demo(*, data: Path | None, rounds: int, sites: int, out: Path, json_lines: bool) -> str:
    """Make a federation, run a plan on it, and write its report.

    Args:
        data: radiographs (`.npz`); None takes the shared ones if they are at hand, else phantoms.
        rounds: rounds of the plan.
        sites: daemons to start.
        out: folder for everything that is made; must be new, or an earlier demo's.
        json_lines: print each event as a line of JSON.

    Returns:
        "completed" only if every site contributed to every round.

    Raises:
        UsageError: `out` holds something else.
        ConnectionLostError: a process did not start; its log is named.
    """
    from fedward_server.reporting import every_site_in_every_round

    tell = (lambda _: None) if json_lines else say
    place = _Place(out, sites)
    with ExitStack() as processes:
        processes.callback(os.close, place.clear())
        tell(f"Images: {place.write_images(data)}")
        tell(
            f"Federation: authority, server, coordinator and {sites} sites, keys made in {out / 'federation'}"
        )
        place.provision()
        place.start(processes)
        tell(f"Running: one server and {sites} site daemons, mutual TLS on 127.0.0.1:{place.port}")
        signed = place.sign_and_approve(rounds)
        tell("Plan: signed by the coordinator, read and approved by each site's operator")
        report = place.run(signed, json_lines=json_lines)
    if not json_lines:
        place.show(report)
    if not every_site_in_every_round(report):
        raise RunFailedError(
            f"the run ended {report.verdict}, or a site missed a round",
            remedy=f"See {out / 'report.html'} and the logs in {out / 'logs'}.",
        )
    return str(report.verdict)


class _Place:
    """The demo's folder and what runs in it."""

    def __init__(self, out: Path, num_sites: int) -> None:
        from fedward_server.site_folders import site_names

        self.out = out
        self.names = site_names(num_sites)
        self.port, self.control_port = _free_ports(2)

    def clear(self) -> int:
        """Remove an earlier demo's federation and sites; keep the images it wrote.

        Returns:
            Descriptor of the lock that keeps a second demo out of the folder.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        known = {"images", "federation", "homes", "logs", "report.html", "report.json", _LOCK_FILE}
        strange = sorted({path.name for path in self.out.iterdir()} - known - {"plan.toml", "plan.signed"})
        if strange:
            raise UsageError(
                f"{self.out} holds something that no demo made: {strange[0]}",
                remedy="Give a new or empty folder with --out.",
            )
        lock = lock_home(
            self.out / _LOCK_FILE,
            holder=f"another demo runs in {self.out}",
            remedy="Wait until it has ended, or give another folder with --out.",
        )
        for name in ("federation", "homes", "logs"):
            shutil.rmtree(self.out / name, ignore_errors=True)
        (self.out / "logs").mkdir()
        return lock

    def write_images(self, data: Path | None) -> str:
        """Write DICOM files for each site; say which kind of images they are."""
        from fedward_server.site_folders import prepare_folders

        self.images = prepare_folders(data, self.out / "images", self.names)
        return self.images.kind

    def provision(self) -> None:
        """Make everybody's keys, and set up each site with its own."""
        from fedward_server.provisioning import provision

        provision(
            self.out / "federation",
            name="demo",
            hosts=["127.0.0.1", "localhost"],
            site_names=self.names,
            coordinator_names=["lead"],
            server_port=self.port,
            control_port=self.control_port,
        )
        self._each_site(self._join_arguments)

    def start(self, processes: ExitStack) -> None:
        """Start the server and the daemons; they end with `processes`."""
        self._spawn(
            processes, "server", *_SERVER, "serve", str(self.out / "federation"), "--host", "127.0.0.1"
        )
        for name in self.names:
            self._spawn(processes, name, *_SITE, "run", "--warm", "--home", str(self._home(name)))
        self._await_sites()

    def sign_and_approve(self, rounds: int) -> Path:
        """Sign the demo's plan as the coordinator; approve it as each site's operator."""
        plan, signed = self.out / "plan.toml", self.out / "plan.signed"
        text = files("fedward_server").joinpath("demo_plan.toml").read_text(encoding="utf-8")
        text = text.replace("rounds = 5", f"rounds = {rounds}", 1)
        plan.write_text(text.replace("quorum = 2", f"quorum = {min(2, len(self.names))}", 1))
        _call(*_SERVER, "plan", "sign", str(plan), "--identity", str(self._coordinator), "--out", str(signed))
        self._each_site(lambda _: ("plan", "approve", str(signed), "--yes"))
        return signed

    def run(self, signed: Path, *, json_lines: bool) -> RunReport:
        """Launch the plan, show it, fetch its report and write it."""
        from fedward_common.evaluation.report import RunReport, render_html
        from fedward_common.identity import load_identity
        from fedward_server.control_client import ControlClient
        from fedward_server.watch import watch

        with ControlClient(load_identity(self._coordinator)) as client:
            run = client.launch(signed.read_bytes())
            _, content = client.describe(run.run_id)
            watch(client.watch(run.run_id), plan=content, json_lines=json_lines)
            report = RunReport.model_validate_json(client.report(run.run_id))
        provenance = report.provenance.model_copy(update={"data": self.images.kind})
        report = report.model_copy(update={"provenance": provenance})
        (self.out / "report.html").write_text(render_html(report), encoding="utf-8")
        (self.out / "report.json").write_text(report.model_dump_json(indent=2), encoding="utf-8")
        return report

    def show(self, report: RunReport) -> None:
        """Print the result as a table, and where everything is."""
        from fedward_server.console import show_result

        show_result(report)
        say(f"Report: {self.out / 'report.html'}")
        say(f"What left a site: fedward-site outbound show --home {self._home(self.names[0])}")

    @property
    def _coordinator(self) -> Path:
        return self.out / "federation" / "coordinators" / "lead"

    def _home(self, name: str) -> Path:
        return self.out / "homes" / name

    def _join_arguments(self, name: str) -> Sequence[str]:
        folder = self.images.folders[name]
        kit = str(self.out / "federation" / "sites" / name)
        return (
            *("join", kit, "--dicom", str(folder / "dicom"), "--labels", str(folder / "labels.csv")),
            *("--threads", "1"),
        )

    def _each_site(self, arguments: Callable[[str], Sequence[str]]) -> None:
        """Run one command of a site's operator at every site, some at a time."""

        def one(name: str) -> None:
            _call(*_SITE, *arguments(name), "--home", str(self._home(name)))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one, self.names))

    def _spawn(self, processes: ExitStack, name: str, *command: str) -> None:
        log = processes.enter_context((self.out / "logs" / f"{name}.log").open("wb"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
        processes.callback(_end, process)

    def _await_sites(self) -> None:
        """Until the server says that every site is connected."""
        from fedward_common.identity import load_identity
        from fedward_server.control_client import ControlClient

        until = time.monotonic() + _START_S
        missing = list(self.names)
        while missing:
            try:
                with ControlClient(load_identity(self._coordinator)) as client:
                    while missing and time.monotonic() < until:
                        missing = [status.name for status in client.sites() if not status.online]
                        time.sleep(0.1)
            except ConnectionLostError:
                time.sleep(0.2)
            if missing and time.monotonic() >= until:
                raise ConnectionLostError(
                    f"not connected after {_START_S:.0f} s: {', '.join(missing)}",
                    remedy=f"See the logs in {self.out / 'logs'}.",
                )


def _call(*command: str) -> None:
    """Run one command to its end; its own complaint becomes ours."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        complaint = (done.stderr or done.stdout).strip()
        raise UsageError(f"{' '.join(command[3:6])}: {complaint}", remedy="See the message above.")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, on loopback."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
