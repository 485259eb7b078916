"""`fedward serve`: the sites' listener, the coordinators' service and the runners, until SIGTERM.

Everything a hospital or a coordinator can reach is opened here and nowhere else. The order matters: the
listener for sites first, so that they can reconnect while the rest starts; on the way down runners are
told to stop first, so that the last round is whole.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path

from fedward_common import logs
from fedward_common.federation import read_federation
from fedward_common.identity import load_identity
from fedward_server.config import ServerHome


def serve(directory: Path, *, host: str, port: int, control_port: int, ready: Callable[[str], None]) -> None:
    """Serve until the process is told to stop.

    Args:
        directory: the federation's folder as `fedward provision` made it, or the server's part of it.
        host: address that both listeners bind.
        port: the sites' listener.
        control_port: the coordinators' service.
        ready: told once, with a line for people, when everything listens.
    """
    from fedward_server.control import ControlServer
    from fedward_server.link import Link
    from fedward_server.reports import build_any_report
    from fedward_server.supervisor import RunSupervisor

    logs.configure()
    home = ServerHome(directory)
    identity = load_identity(home.identity)
    federation = identity.federation.name
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    link = Link(identity, host=host, port=port, trusted_sites=_Roster(home.federation))
    link.start()
    supervisor = RunSupervisor(home, link)
    control = ControlServer(
        identity,
        supervisor,
        sites=link.online_sites,
        host=host,
        port=control_port,
        report=lambda store, run_id: (
            build_any_report(store, run_id, federation=federation).model_dump_json().encode()
        ),
    )
    control.start()
    ready(f"sites on {host}:{link.port}, coordinators on {host}:{control.port}")
    stop.wait()
    control.stop()
    supervisor.close()
    link.stop()


class _Roster:
    """The sites of `federation.json`, read again when the file changes: who is added or removed counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._sites: dict[str, str] = {}

    def __call__(self) -> dict[str, str]:
        found = self._path.stat()
        if self._seen != (found.st_mtime_ns, found.st_size):
            roster = read_federation(self._path).sites
            self._sites = {name: entry.certificate_sha256 for name, entry in roster.items()}
            self._seen = (found.st_mtime_ns, found.st_size)
        return self._sites
