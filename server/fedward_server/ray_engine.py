"""Simulated sites on Flower's own Ray engine, on this machine or on a cluster.

Flower's runtime for simulations is used as it is (`run_api` and its `RayBackend`): Ray actors answer the
messages, an in-memory link carries them. Underneath `run_simulation`, which is deprecated, names no nodes,
sends telemetry and cannot be stopped before the last message is answered. Here every node has its site's
name, so the round loop works as with hospitals, and each site's settings are its node's configuration.

A cluster is used when RAY_ADDRESS names one, with as many sites at a time as it has room for; else Ray is
started on this machine and ended with the run.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
)

from flwr.app import Message
from flwr.common.constant import (
    HEARTBEAT_INTERVAL_INF,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    NUM_PARTITIONS_KEY,
    PARTITION_ID_KEY,
    SUPERLINK_NODE_ID,
)
from flwr.compat.client.run_info_store import DeprecatedRunInfoStore
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce.metrics import VceMetrics
from flwr.server.superlink.fleet.vce.vce_api import run_api
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from fedward_common.errors import RunFailedError
from fedward_server.local_grid import RUN_ID
from fedward_server.ray_session import SEE_MORE, RaySession, ray_address, require_ray

NodeConfig = Mapping[str, str | int]
_TASK_ID = 1


def start_ray_sites(
    folders: Mapping[str, Path], *, workers: int, cores: int, threads: int, device: str
) -> tuple[RayGrid, dict[str, str]]:
    """Start the engine with one node for each site.

    Args:
        folders: site name -> folder of images and home; on a cluster, the same path on every machine.
        workers: at most so many sites at the same time; 0 is as many as the machine or cluster has room for.
        cores: of this machine.
        threads: CPU threads of each site.
        device: "auto" and "cuda" divide the GPUs that Ray finds among the actors.

    Returns:
        The grid, to be closed, and the public key (hex) with which each site signs.

    Raises:
        UsageError: Ray is not installed, does not start, or has no room.
    """
    require_ray()
    sites = import_module("fedward_client.ray_sites")
    nodes, keys = sites.open_sites(folders, threads=threads, device=device)
    address = ray_address()
    actors = min(len(nodes), workers or (cores if address == "local" else len(nodes)))
    session = RaySession(address, actors, threads)
    try:
        resources = session.share_of_an_actor(actors, threads, with_gpu=device in ("auto", "cuda"))
        return RayGrid(nodes, sites.serve, session, resources), keys
    except BaseException:
        session.close()
        raise


class RayGrid(InMemoryGrid):
    """Flower's grid in memory, and behind it the runtime that hands its messages to Ray actors."""

    def __init__(
        self,
        nodes: Mapping[str, NodeConfig],
        serve: Callable[[], Any],
        session: RaySession,
        resources: dict[str, int | float],
    ) -> None:
        """Register the nodes and start the actors.

        Args:
            nodes: site name -> node configuration.
            serve: called in an actor for each message, gives what answers it.
            session: Ray, started; ended with the grid.
            resources: what Ray sets aside for each actor.
        """
        from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend

        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SUPERLINK_NODE_ID, _TASK_ID
        factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
        super().__init__(factory)
        self.set_run(_register_run(factory.state()))
        stores = _register_nodes(factory.state(), nodes)
        partitions = {node_id: int(store.node_config[PARTITION_ID_KEY]) for node_id, store in stores.items()}
        self._session = session
        self._backend = RayBackend({"client_resources": {**resources}, "init_args": {}, "actor": {}})
        self._ending = threading.Event()
        self._closing = threading.Lock()
        # Its own event: the runtime sets this one as well when it fails.
        self._stop = threading.Event()
        self._runtime = threading.Thread(
            target=_serve,
            args=(serve, lambda: self._backend, partitions, factory, stores, self._stop, VceMetrics()),
            daemon=True,
            name="ray-runtime",
        )
        self._runtime.start()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to `message_ids` that are there.

        Raises:
            RunFailedError: the runtime ended, so there will be no more.
        """
        if not self._runtime.is_alive() and not self._ending.is_set():
            raise RunFailedError("the Ray engine ended in the middle of the run", remedy=SEE_MORE)
        return super().pull_messages(message_ids)

    def close(self) -> None:
        """End the actors, whatever they are doing, the runtime, and Ray; may be called twice."""
        self._ending.set()
        with self._closing:
            self._stop.set()
            self._session.kill(self._actors())
            self._runtime.join()
            self._session.close()

    def _actors(self) -> list[Any]:
        pool = self._backend.pool
        return [] if pool is None else [*pool.pool, *pool._future_to_actor.values()]


def _register_run(state: Any) -> Run:
    """Make the link know the one run there is."""
    run = Run.create_empty(RUN_ID)
    run.primary_task_id, run.federation_id = _TASK_ID, NOOP_FEDERATION_ID
    state.run_ids[RUN_ID] = RunRecord(run=run)
    state.task_store[_TASK_ID] = Task(task_id=_TASK_ID, run_id=RUN_ID)
    return run


def _register_nodes(state: Any, nodes: Mapping[str, NodeConfig]) -> dict[int, DeprecatedRunInfoStore]:
    """Make the link know a node for each site, by the site's name; node id -> where its configuration is."""
    stores = {}
    for partition, (name, config) in enumerate(sorted(nodes.items())):
        node_id = state.create_node(
            NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, secrets.token_bytes(32), HEARTBEAT_INTERVAL_INF, name=name
        )
        state.acknowledge_node_heartbeat(node_id, HEARTBEAT_INTERVAL_INF)
        place = {PARTITION_ID_KEY: partition, NUM_PARTITIONS_KEY: len(nodes)}
        stores[node_id] = DeprecatedRunInfoStore(node_id, {**config, **place})
        stores[node_id].register_context(RUN_ID)
    return stores


def _serve(*arguments: Any) -> None:
    """Run Flower's runtime until it is stopped; that it crashed shows in that it is no longer there."""
    try:
        run_api(*arguments)
    except RuntimeError:
        logging.getLogger(__name__).warning("ray_runtime_crashed")
