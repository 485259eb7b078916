"""Simulated sites inside the actors of Flower's Ray engine: the same sessions, one process less.

An actor is a process of its own, so training runs right in it. Flower gives a message to whichever actor
is free; an actor therefore makes a site when it first meets it, from the node configuration that comes
with every message, and keeps the latest ones warm. Two actors may know the same site: its key comes from
a seed, so that both sign alike; its folder is locked while one of them works there; and nothing that the
other one remembers is needed. The Ray engine in the server package finds this module by its name.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedward_client.app import client_app
from fedward_client.simulated import simulated_session, simulated_settings
from fedward_client.worker import Worker
from fedward_client.worker_process import WorkError
from fedward_common.errors import RefusalCode
from fedward_common.identity import new_signer

# Each holds its network and an open cohort (images are mapped from the disk); the rest is opened again.
_WARM_SITES = 32


@dataclass(frozen=True)
class RaySite:
    """One site as its node configuration carries it; `seed` is that of its signing key (hex)."""

    site: str
    folder: str
    threads: int
    device: str
    seed: str


def open_sites(
    folders: Mapping[str, Path], *, threads: int, device: str
) -> tuple[dict[str, dict[str, str | int]], dict[str, str]]:
    """Give every site a key for this run only.

    Args:
        folders: site name -> folder with `dicom/` and `labels.csv`; every actor must be able to reach it.
        threads: CPU threads of each actor.
        device: as in a site's configuration.

    Returns:
        The sites' node configurations, and the public key (hex) with which each of them signs.
    """
    nodes: dict[str, dict[str, str | int]] = {}
    keys: dict[str, str] = {}
    for name, folder in folders.items():
        seed = secrets.token_bytes(32)
        _, keys[name] = new_signer(seed)
        nodes[name] = asdict(RaySite(name, str(folder.resolve()), threads, device, seed.hex()))
    return nodes, keys


def serve() -> Callable[[Message, Context], Message]:
    """Give an actor what answers messages in it; pickled by name, so nothing but the name travels."""
    return _answer


class InProcessWorker:
    """The worker of a site whose process is nobody else's: requests are calls."""

    def __init__(self) -> None:
        self._worker = Worker()

    @property
    def pid(self) -> int | None:
        """The process that calls."""
        return os.getpid()

    def start(self) -> bool:
        """It runs."""
        return False

    def call(
        self, request: dict[str, Any], payload: bytes | memoryview = b""
    ) -> tuple[dict[str, Any], bytes]:
        """Do what `request` asks.

        Raises:
            WorkError: the worker refused or failed; `code` says which.
        """
        header, reply = self._worker.answer(request, bytearray(payload))
        if not header["ok"]:
            raise WorkError(RefusalCode(header["code"]), str(header["where"]))
        return header, reply

    def kill(self) -> None:
        """Leave that to the engine: it ends the actor as a whole."""

    def stop(self) -> None:
        """Nothing to end."""


def _answer(message: Message, context: Context) -> Message:
    values: dict[str, Any] = {field.name: context.node_config[field.name] for field in fields(RaySite)}
    site = RaySite(**values)
    app = _app(site)
    with _alone_in(Path(site.folder) / "home"):
        return app(message, context)


@lru_cache(maxsize=_WARM_SITES)
def _app(site: RaySite) -> ClientApp:
    settings = simulated_settings(site.site, Path(site.folder), threads=site.threads, device=site.device)
    sign, _ = new_signer(bytes.fromhex(site.seed))
    return client_app(simulated_session(settings, sign, InProcessWorker()))


@contextmanager
def _alone_in(home: Path) -> Iterator[None]:
    """Wait for another actor that still works on an older message to the same site."""
    with (home / "actor.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
