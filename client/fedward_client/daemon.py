"""`fedward-site run`: the composition root of a site's daemon, until SIGTERM.

This process holds the keys and the connection and never loads PyTorch or a DICOM parser; the worker it
starts does, and holds neither. A worker that has had nothing to do for a while is ended, so that an idle
site costs a hospital's workstation next to nothing. A home has one daemon: two would count the same rounds.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fedward_client import health
from fedward_client.approvals import PlanGate
from fedward_client.config import SiteConfig, SiteHome, load_config
from fedward_client.outbound import OutboundDoor
from fedward_client.policy import load_policy
from fedward_client.pseudonyms import load_pseudonym_key
from fedward_client.session import SiteSession, SiteSettings
from fedward_client.worker_process import WorkerProcess
from fedward_common import logs
from fedward_common.audit import AuditLog
from fedward_common.errors import IdentityError
from fedward_common.home_lock import lock_home
from fedward_common.identity import Identity, client_context, load_identity, sign

if TYPE_CHECKING:
    from fedward_client.node import SiteNode

_HEALTH_S = 10.0
_IDLE_WORKER_S = 900.0

# Flower's telemetry, update check and dependency installer are on by default.
os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
)
_log = logging.getLogger(__name__)


def run_site(home: SiteHome, *, warm: bool, ready: Callable[[str], None]) -> None:
    """Serve the federation until the process is told to stop.

    Args:
        home: the site's folder, as `fedward-site join` made it.
        warm: load PyTorch now instead of when the first plan arrives.
        ready: told once, with a line for people, before the first connection.

    Raises:
        FederationError: settings, keys or policy cannot be used, or another daemon serves this home;
            nothing was connected.
    """
    config = load_config(home)
    lock = lock_home(
        home.lock,
        holder=f"another daemon already serves {home.root}",
        remedy="Leave it running, or stop it first; a second site needs a home of its own: fedward-site join",
    )
    try:
        _serve(home, config, warm, ready)
    finally:
        os.close(lock)


def _serve(home: SiteHome, config: SiteConfig, warm: bool, ready: Callable[[str], None]) -> None:
    identity = load_identity(home.identity)
    if (identity.peer.role, identity.peer.name) != ("site", config.name):
        raise IdentityError(
            f"certificate of {identity.peer.role} {identity.peer.name}, site.toml says site {config.name}",
            remedy="Correct `name` in site.toml; find out what else is wrong with: fedward-site doctor",
        )
    load_pseudonym_key(home.root)
    audit = AuditLog(home.audit)
    worker = WorkerProcess()
    session = _session(home, config, identity, audit, worker)
    node = _node(home, config, session)
    logs.configure(home.log, site=config.name)  # after Flower, which installs a handler
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: node.stop())
    audit.append("started", pid=os.getpid())
    if warm:
        worker.start()
    keeper = threading.Thread(target=_keep, args=(home, session, ended), daemon=True, name="health")
    keeper.start()
    ready(f"site {config.name} serves {config.server}")
    try:
        node.run()
    finally:
        ended.set()
        session.close()
        audit.append("stopped", pid=os.getpid())


def _session(
    home: SiteHome, config: SiteConfig, identity: Identity, audit: AuditLog, worker: WorkerProcess
) -> SiteSession:
    """The gate, the door and the worker of this site."""
    data = config.site_data(home.root)
    floor = load_policy(home.policy).limits.min_cases
    return SiteSession(
        SiteSettings(config.name, data, config.threads, config.device),
        PlanGate(home, identity.federation, audit),
        OutboundDoor(config.name, lambda body: sign(identity, body), audit.append, floor),
        worker,
        _report,
    )


def _node(home: SiteHome, config: SiteConfig, session: SiteSession) -> SiteNode:
    """The Flower node that hands messages to `session`."""
    from fedward_client.app import client_app
    from fedward_client.node import FleetConnection, SiteNode

    def connect() -> FleetConnection:
        # read anew at every attempt: a renewed certificate counts without a restart
        try:
            member = load_identity(home.identity)
        except IdentityError as error:  # perhaps half copied: a later attempt may find it whole
            raise ConnectionError("own keys or certificate cannot be used") from error
        return FleetConnection(config.server, client_context(member), member.node_key)

    return SiteNode(connect, client_app(session), session.cancel, _report)


def _keep(home: SiteHome, session: SiteSession, ended: threading.Event) -> None:
    """Say now and then that the daemon lives, and end a worker nobody needs."""
    while True:
        health.record(home.root)
        session.rest(_IDLE_WORKER_S)
        if ended.wait(_HEALTH_S):
            return


def _report(event: str, **fields: Any) -> None:
    _log.info(event, extra=fields)
