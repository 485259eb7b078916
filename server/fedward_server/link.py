"""Flower's SuperLink behind two listeners (FLOWER facts: its own port serves everything to everybody).

The sites' listener asks for a client certificate of the federation, serves `/v1/fleet/` and nothing
else, and insists that certificate, role and Flower node key belong together. The loopback listener
serves `/v1/runtime/` to the ServerApp processes that this server itself started. Flower's control API,
its documentation pages and its task queue are reachable from neither: runs are opened here, by calls on
the state, without any uploaded code.

Both listeners hold a request for messages until there is one (long polling), so that neither sites nor
ServerApp poll, and a message is on its way within milliseconds. All use of Flower's internals on the
server is in this module and `rounds`; contract tests hold it to flwr 1.41.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import ssl
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# Telemetry, the update check and the dependency installer are on by default in Flower.
os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
)

import uvicorn
from flwr.common.constant import NOOP_FLWR_AID, SubStatus
from flwr.supercore.constant import (
    FLWR_IN_MEMORY_DB_NAME,
    NOOP_FEDERATION_ID,
    NodeStatus,
    TaskType,
)
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app

from fedward_common.errors import ConnectionLostError, FederationError
from fedward_common.identity import Identity, Peer, node_public_key_pem, peer_of
from fedward_server.allowance import Allowances
from fedward_server.bundles import Bundles, node_key_of
from fedward_server.listeners import (
    PEER,
    App,
    BoundedBody,
    Listener,
    LongPoll,
    News,
    OnlyPaths,
    PeerProtocol,
    Receive,
    Scope,
    Send,
    answer,
    header,
)

_CONCURRENCY = 512
_HANDOVER_S = 10.0  # from a site's introduction to its activation, both in one request
_IDLE_MIDDLEWARE = frozenset(
    {
        "ControlSensitiveResponseMiddleware",
        "ControlAuthenticationMiddleware",
        "ControlLicenseMiddleware",
        "ControlEventLogMiddleware",
        "RuntimeTracingMiddleware",
        "FleetEventLogMiddleware",
    }
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlowerRun:
    """A run as Flower knows it, and the token with which its ServerApp speaks for it."""

    flower_run_id: int
    token: str


class Link:
    """Owns the SuperLink state and both listeners; everything Flower does on the server passes here."""

    def __init__(
        self, identity: Identity, *, host: str, port: int, trusted_sites: Callable[[], Mapping[str, str]]
    ) -> None:
        """Prepare the listeners.

        Args:
            identity: the server's certificate and the federation's CA.
            host: address of the sites' listener.
            port: its port.
            trusted_sites: sites that may connect now, with the SHA-256 (hex) of their certificate; asked
                at every request.
        """
        # The package hides this module behind a function of the same name.
        import flwr.superlink.cli.flower_superlink  # noqa: F401

        superlink = sys.modules["flwr.superlink.cli.flower_superlink"]
        app = create_app(_superlink_config(), superlink.SuperLinkLifespan)
        _without_idle_middleware(app)
        allowances = Allowances()
        bundles = Bundles(app, allowances)
        self._state = app.state.linkstate_factory.state()
        self._tasks: dict[int, int] = {}
        instructions, replies = News(), News()
        register = _Registrar(self._state, trusted_sites)
        sites = uvicorn.Config(
            OnlyPaths(
                "/v1/fleet/",
                register.guard(
                    BoundedBody(
                        LongPoll(bundles, awaits=instructions, tells=replies), permits=_pushes(allowances)
                    )
                ),
            ),
            host=host,
            port=port,
            lifespan="off",
            log_config=None,
            access_log=False,
            http=PeerProtocol,
            ws="none",
            server_header=False,
            limit_concurrency=_CONCURRENCY,
            ssl_certfile=identity.certificate,
            ssl_keyfile=str(identity.key),
            ssl_ca_certs=str(identity.ca),
            ssl_cert_reqs=ssl.CERT_REQUIRED,
            timeout_graceful_shutdown=1,
        )
        local = uvicorn.Config(
            OnlyPaths("/v1/runtime/", BoundedBody(LongPoll(bundles, awaits=replies, tells=instructions))),
            host="127.0.0.1",
            port=0,
            log_config=None,
            access_log=False,
            ws="none",
            timeout_graceful_shutdown=1,
        )
        self._sites, self._local = Listener(sites), Listener(local)
        self._thread = threading.Thread(target=self._serve, daemon=True, name="link")
        self._failure: BaseException | None = None

    @property
    def runtime_address(self) -> str:
        """host:port of the loopback listener, for ServerApp processes."""
        return f"127.0.0.1:{self._local.port}"

    @property
    def port(self) -> int:
        """Port of the sites' listener."""
        return self._sites.port

    def start(self) -> None:
        """Open both listeners.

        Raises:
            ConnectionLostError: a port is taken or the certificate cannot be used.
        """
        self._thread.start()
        for listener in (self._local, self._sites):
            while not listener.ready.wait(0.05):
                if not self._thread.is_alive():
                    raise ConnectionLostError(
                        f"the sites' listener did not open: {self._failure!r}",
                        remedy="Choose another --port, or stop the program that uses this one.",
                    )

    def stop(self) -> None:
        """Close both listeners."""
        for listener in (self._sites, self._local):
            listener.should_exit = True
        self._thread.join(timeout=10)

    def open_run(self) -> FlowerRun:
        """Create a run without any code in it, already claimed for our own ServerApp."""
        run_id = self._state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task_id = self._state.get_run_info(run_ids=[run_id])[0].primary_task_id
        token = self._state.claim_task(task_id)
        if not run_id or token is None:
            raise FederationError("Flower did not open a run", remedy="Restart: fedward serve")
        self._state.activate_task(task_id)
        self._tasks[run_id] = task_id
        return FlowerRun(run_id, token)

    def close_run(self, flower_run_id: int, *, stopped: bool) -> None:
        """End a run; from now on sites are told that it wants no work."""
        task_id = self._tasks.pop(flower_run_id, None)
        if task_id is not None:
            self._state.finish_task(task_id, SubStatus.STOPPED if stopped else SubStatus.COMPLETED, "")
            self._state.cleanup_run(flower_run_id)

    def online_sites(self) -> list[str]:
        """Names of the sites with a live connection."""
        nodes = self._state.get_node_info(statuses=[NodeStatus.ONLINE])
        return sorted(node.name for node in nodes)

    def _serve(self) -> None:
        async def both() -> None:
            await asyncio.gather(self._local.serve(), self._sites.serve())

        try:
            asyncio.run(both())
        except (SystemExit, Exception) as error:  # uvicorn exits the process when it cannot bind
            self._failure = error


class _Registrar:
    """Lets a site in when certificate, role, roster and Flower node key agree, and introduces it.

    A site that proves its identity anew is the only one of that name: whatever session Flower still
    holds for it is ended first, so a killed daemon can come back at once, and messages that the dead
    session took with it are delivered again.
    """

    def __init__(self, state: Any, trusted_sites: Callable[[], Mapping[str, str]]) -> None:
        self._state = state
        self._trusted = trusted_sites

    def guard(self, app: App) -> App:
        """Wrap `app`: 403 unless the caller is who it says it is."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return
            refusal = self._refusal(scope)
            if refusal is not None:
                _log.warning("site_refused", extra={"reason": refusal})
                await answer(send, 403)
                return
            if scope["path"] == "/v1/fleet/activate-node":
                self._introduce(scope)
            await app(scope, receive, send)

        return guarded

    def _refusal(self, scope: Scope) -> str | None:
        certificate = scope.get(PEER)
        if certificate is None:
            return "no_certificate"
        try:
            claims = _claims_of(certificate)
        except FederationError:
            return "foreign_certificate"
        if claims.peer.role != "site":
            return "not_a_site"
        if self._trusted().get(claims.peer.name) != claims.fingerprint:
            return "not_in_roster"
        if header(scope, b"flwr-public-key") != b64encode(claims.node_key):
            return "foreign_node_key"
        return None

    def _introduce(self, scope: Scope) -> None:
        claims = _claims_of(scope[PEER])
        node_id = self._state.get_node_id_by_public_key(claims.node_key)
        if node_id is None:
            name = claims.peer.name
            self._state.create_node(NOOP_FLWR_AID, name, claims.node_key, 0, name=name)
            return
        with self._state.lock:
            self._state.deactivate_node(node_id)
            # Activation follows in a moment; a runner that looks in between must not find the site gone.
            self._state.nodes[node_id].online_until = time.time() + _HANDOVER_S
            for message in self._state.message_ins_store.values():
                answered = message.metadata.message_id in self._state.message_ins_id_to_message_res_id
                if message.metadata.dst_node_id == node_id and not answered:
                    message.metadata.delivered_at = ""


@dataclass(frozen=True)
class _Claims:
    """What a certificate says: who, its SHA-256 (hex), and its key in the form that Flower uses."""

    peer: Peer
    fingerprint: str
    node_key: bytes


@lru_cache(maxsize=4096)
def _claims_of(certificate: bytes) -> _Claims:
    """Read a certificate (DER), once for all requests of its connections."""
    return _Claims(
        peer_of(certificate), hashlib.sha256(certificate).hexdigest(), node_public_key_pem(certificate)
    )


def _pushes(allowances: Allowances) -> Callable[[Scope, int], bool]:
    """Permit a site's request unless it pushes more than its messages allow."""

    def permits(scope: Scope, num_bytes: int) -> bool:
        if not scope["path"].endswith(("/push-messages", "/push-object")):
            return True
        permitted = allowances.spend(node_key_of(scope), num_bytes)
        if not permitted:
            _log.warning("site_refused", extra={"reason": "too_many_bytes"})
        return permitted

    return permits


def _without_idle_middleware(app: Any) -> None:
    """Take out what only concerns paths that no listener of ours serves, and event logs that are off.

    Each layer costs every request about half a millisecond. What authenticates nodes, translates
    messages and errors stays, and the number of layers is checked: an unknown one is an unknown Flower.
    """
    layers = [layer for layer in app.user_middleware if layer.cls.__name__ not in _IDLE_MIDDLEWARE]
    if len(layers) != len(app.user_middleware) - len(_IDLE_MIDDLEWARE):
        raise FederationError(
            "this version of Flower has other middleware than the one fedward was made for",
            remedy="Install the pinned version: pip install 'flwr==1.41.*'",
        )
    app.user_middleware = layers


def _superlink_config() -> SuperLinkLifespanConfig:
    """Node authentication on, no code, no control access, tasks claimable only with a secret nobody has.

    State is in memory: what must survive a crash is in our own run store, and tensors never reach a disk.
    """
    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="127.0.0.1",
        port=0,
        insecure=False,
        certificates=None,
        superexec_auth_secret=secrets.token_bytes(32),
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=FLWR_IN_MEMORY_DB_NAME,
        isolation="process",
        runtime_dependency_install=False,
    )
