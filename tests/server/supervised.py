"""A server's folder and a supervisor with scripted runners, for tests of supervisor, service and commands."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedward_common.errors import RunFailedError
from fedward_common.federation import read_federation
from fedward_common.identity import load_identity
from fedward_server.config import ServerHome
from fedward_server.control import ControlServer
from fedward_server.reporting import build_report
from fedward_server.supervisor import RunSupervisor
from tests.federations import a_federation, a_plan, a_signed_plan

ROOT = Path(__file__).resolve().parents[2]
_START = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.server.scripted_runner import main; main()"
)
RUNNER = (sys.executable, "-c", _START)


@dataclass(frozen=True)
class OpenedRun:
    flower_run_id: int
    token: str


@dataclass
class Mailboxes:
    """Stands where the link to the sites is; remembers which runs were opened and closed."""

    runtime_address: str = "127.0.0.1:9"
    refuse: bool = False
    opened: list[int] = field(default_factory=list)
    closed: dict[int, bool] = field(default_factory=dict)
    told: threading.Condition = field(default_factory=threading.Condition)

    def open_run(self) -> OpenedRun:
        if self.refuse:
            raise RunFailedError("no mailbox", remedy="Restart.")
        self.opened.append(100 + len(self.opened))
        return OpenedRun(self.opened[-1], f"token-{self.opened[-1]}")

    def close_run(self, flower_run_id: int, *, stopped: bool) -> None:
        with self.told:
            self.closed[flower_run_id] = stopped
            self.told.notify_all()

    def wait_closed(self, count: int) -> None:
        """Until so many runs were closed: the supervisor's last act for a run."""
        with self.told:
            assert self.told.wait_for(lambda: len(self.closed) >= count, timeout=30), self.closed


def a_home(folder: Path, *, settings: str = "") -> ServerHome:
    """A provisioned federation's server."""
    home = ServerHome(a_federation(folder))
    if settings:
        (home.root / "server.toml").write_text(settings)
    return home


def a_script(home: ServerHome, script: str, *, rounds: int = 2) -> bytes:
    """A signed plan that makes the scripted runner do something."""
    return a_signed_plan(home.directory, a_plan(description=script, rounds=rounds)).to_bytes()


@contextmanager
def a_supervisor(home: ServerHome, mailboxes: Mailboxes | None = None) -> Iterator[RunSupervisor]:
    """A supervisor whose runners are scripted."""
    supervisor = RunSupervisor(home, mailboxes or Mailboxes(), command=RUNNER)
    try:
        yield supervisor
    finally:
        supervisor.close()


def serving(
    home: ServerHome,
    supervisor: RunSupervisor,
    online: list[str],
    *,
    member: str = "server",
    port: int = 0,
) -> ControlServer:
    """The coordinators' service, not started yet, with a member's certificate."""
    return ControlServer(
        load_identity(home.directory / member),
        supervisor,
        sites=lambda: online,
        host="127.0.0.1",
        port=port,
        report=lambda store, run_id: build_report(store, run_id).model_dump_json().encode(),
    )


@contextmanager
def a_control_server(
    home: ServerHome, supervisor: RunSupervisor, online: list[str]
) -> Iterator[ControlServer]:
    """The coordinators' service on a free port, which every member's federation.json then names."""
    server = serving(home, supervisor, online)
    server.start()
    for path in home.directory.rglob("federation.json"):
        federation = read_federation(path).model_copy(update={"control": f"127.0.0.1:{server.port}"})
        path.write_bytes(federation.to_bytes())
    try:
        yield server
    finally:
        server.stop()
