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
    from fedward_server.supervisor import RunSupervisor

    home = ServerHome(directory)
    identity = load_identity(home.identity)

    def trusted() -> dict[str, str]:
        # read at every connection: a site that was added or removed counts at once
        roster = read_federation(home.federation).sites
        return {name: entry.certificate_sha256 for name, entry in roster.items()}

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    link = Link(identity, host=host, port=port, trusted_sites=trusted)
    link.start()
    supervisor = RunSupervisor(home, link)
    control = ControlServer(identity, supervisor, sites=link.online_sites, host=host, port=control_port)
    control.start()
    ready(f"sites on {host}:{link.port}, coordinators on {host}:{control_port}")
    stop.wait()
    control.stop()
    supervisor.close()
    link.stop()
