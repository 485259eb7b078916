"""Simulated sites on Flower's own Ray engine, on this machine or on a cluster.

Flower's runtime for simulations is used as it is (`run_api` and its `RayBackend`): Ray actors answer the
messages, an in-memory link carries them. Underneath `run_simulation`, which is deprecated, names no nodes,
sends telemetry and cannot be stopped before the last message is answered. Here every node has its site's
name, so the round loop works as with hospitals, and each site's settings are its node's configuration.

A cluster is used when RAY_ADDRESS names one; its own settings then decide who may reach it. Else Ray is
started here for this run alone: it listens on loopback only and wants a token, where its default is any
interface and no check of who sends it code to run.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    # Without a share in a GPU, a warning on standard error.
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
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

from fedward_common.errors import RunFailedError, UsageError
from fedward_server.local_grid import RUN_ID

NodeConfig = Mapping[str, str | int]
_SEE = "Set FEDWARD_WORKER_STDERR=1 to see what Ray and Flower say."
_TASK_ID = 1
# An actor that the system killed comes back and is asked again once: all that it did is repeatable.
_RESTARTS, _RETRIES = 3, 1


def require_ray() -> None:
    """Raise UsageError, with the remedy, when Ray is not installed; looks without importing it."""
    if find_spec("ray") is None:
        raise UsageError(
            "--engine ray needs Ray, which is not installed", remedy="Run: pip install 'fedward[ray]'"
        )


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
        UsageError: Ray is not installed or does not start.
    """
    require_ray()
    sites = import_module("fedward_client.ray_sites")
    nodes, keys = sites.open_sites(folders, threads=threads, device=device)
    address = os.environ.get("RAY_ADDRESS", "local")
    actors = min(len(nodes), workers or (cores if address == "local" else len(nodes)))
    session = _RaySession(address, actors, threads)
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
        session: _RaySession,
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
            raise RunFailedError("the Ray engine ended in the middle of the run", remedy=_SEE)
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


class _RaySession:
    """Ray: started for this run alone, or joined where RAY_ADDRESS says."""

    def __init__(self, address: str, actors: int, threads: int) -> None:
        loud = os.environ.get("FEDWARD_WORKER_STDERR") == "1"
        options: dict[str, Any] = {
            "address": address,
            # On a cluster, what this process has in its environment would not be in that of the actors.
            "runtime_env": {"env_vars": _actor_environment(threads)},
            "log_to_driver": loud,
            "logging_level": logging.INFO if loud else logging.CRITICAL,
        }
        self._folder: TemporaryDirectory[str] | None = None
        if address == "local":
            _close_to_others()
            self._folder = TemporaryDirectory(prefix="fedward-ray-", ignore_cleanup_errors=True)
            options |= {
                "num_cpus": actors * threads,
                "include_dashboard": False,
                "_temp_dir": self._folder.name,
            }
        if not loud:
            logging.getLogger("flwr").setLevel(logging.CRITICAL)
            # What Ray has to say of processes that died goes to standard output, where our events go.
            os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = "."
        import ray

        self._ray = ray
        try:
            ray.init(**options)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            self.close()
            raise UsageError(
                f"Ray does not start ({type(error).__name__})",
                remedy=f"Check RAY_ADDRESS, or unset it to run on this machine. {_SEE}",
            ) from error

    def share_of_an_actor(self, actors: int, threads: int, *, with_gpu: bool) -> dict[str, int | float]:
        """What to set aside for each actor, so that there are no more than `actors`.

        An actor cannot span machines, nor GPUs: the share is never larger than one of them.
        """
        found = self._ray.cluster_resources()
        cores = [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes()]
        gpus = int(found.get("GPU", 0)) if with_gpu else 0
        return {
            "num_cpus": max(threads, min(sum(cores) // actors, max(cores))),
            # Ray counts in steps of 1/10000.
            "num_gpus": math.floor(10_000 / math.ceil(actors / gpus)) / 10_000 if gpus else 0.0,
            "max_restarts": _RESTARTS,
            "max_task_retries": _RETRIES,
        }

    def kill(self, actors: Iterable[Any]) -> None:
        """End actors at once."""
        for actor in actors:
            if self._ray.is_initialized():
                self._ray.kill(actor)

    def close(self) -> None:
        """Leave the cluster, or end the Ray started here and remove its files."""
        self._ray.shutdown()
        if self._folder is not None:
            self._folder.cleanup()


def _actor_environment(threads: int) -> dict[str, str]:
    passed_on = ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")
    return {name: os.environ[name] for name in passed_on} | {"OMP_NUM_THREADS": str(threads)}


def _close_to_others() -> None:
    """Have Ray listen on loopback, and only to whoever knows a token made here; before it is imported."""
    # The name is of the systems on which loopback is the default; it works on all of them.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


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
