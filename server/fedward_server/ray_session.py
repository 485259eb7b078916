"""Ray itself: started for one run and closed to others, or joined where RAY_ADDRESS says; and ended.

Ray's default is to listen on every interface and to run the code that anybody sends it. Started here, it
listens on loopback only and wants a token. On a cluster, its own settings decide who may reach it.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
from collections.abc import Iterable
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

from fedward_common.errors import UsageError

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Without it, a warning on standard error where no GPU is asked for.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
SEE_MORE = "Set FEDWARD_WORKER_STDERR=1 to see what Ray and Flower say."
_CONNECT_S = 5.0
# An actor that the system killed comes back and is asked again once: all that it did is repeatable.
_RESTARTS, _RETRIES = 3, 1


def ray_address() -> str:
    """HOST:PORT of the cluster that RAY_ADDRESS names, or "local"."""
    return os.environ.get("RAY_ADDRESS") or "local"


def require_ray() -> None:
    """Raise UsageError, with the remedy, when Ray is not installed; looks without importing it."""
    if find_spec("ray") is None:
        raise UsageError(
            "--engine ray needs Ray, which is not installed", remedy="Run: pip install 'fedward[ray]'"
        )


class RaySession:
    """Ray: started for this run alone, or joined where RAY_ADDRESS says."""

    def __init__(self, address: str, actors: int, threads: int) -> None:
        """Start or join Ray.

        Args:
            address: HOST:PORT of a cluster's head, or "local".
            actors, threads: a Ray started here gets as many cores as that takes.

        Raises:
            UsageError: Ray does not start, or nobody answers.
        """
        os.environ.update(_QUIET)
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
            # Ray's sockets lie in it, and their paths must be short.
            folder = os.environ.get("RAY_TMPDIR", "/tmp")  # noqa: S108 (a folder of our own is made in it)
            self._folder = TemporaryDirectory(prefix="fedward-ray-", dir=folder, ignore_cleanup_errors=True)
            options |= {
                "num_cpus": actors * threads,
                "include_dashboard": False,
                "_temp_dir": self._folder.name,
            }
        else:
            _check_address(address)
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
                remedy=f"Check RAY_ADDRESS, or unset it to run on this machine. {SEE_MORE}",
            ) from error

    def share_of_an_actor(self, actors: int, threads: int, *, with_gpu: bool) -> dict[str, int | float]:
        """What to set aside for each actor, so that there are no more than `actors`.

        An actor cannot span machines, nor GPUs: the share is never larger than one of them.

        Raises:
            UsageError: no machine has that many cores.
        """
        found = self._ray.cluster_resources()
        cores = [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes()]
        if max(cores) < threads:
            raise UsageError(
                f"no machine of the Ray cluster has {threads} cores", remedy="Give fewer with --threads."
            )
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
    passed_on = ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", *_QUIET)
    own = {name: os.environ[name] for name in passed_on if name in os.environ}
    return own | {"OMP_NUM_THREADS": str(threads)}


def _check_address(address: str) -> None:
    """Raise UsageError if nobody listens there; Ray itself would try for three minutes."""
    host, _, port = address.rpartition(":")
    if address != "auto":
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        except (OSError, ValueError) as error:
            raise UsageError(
                f"no Ray cluster answers at {address}",
                remedy="Set RAY_ADDRESS to HOST:PORT of the cluster's head, or unset it to run here.",
            ) from error


def _close_to_others() -> None:
    """Have Ray listen on loopback, and only to whoever knows a token made here; before it is imported."""
    # The name is of the systems on which loopback is the default; it works on all of them.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
