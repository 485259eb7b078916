"""Flower's HTTP grid for a runner: the ServerApp's way to the SuperLink on the loopback interface.

Flower's own launcher would fetch and install a FAB first; here the app is the installed one, so only
the connection and the task's heartbeat are needed. Internals of Flower, held by contract tests.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid

# A reply is announced before its tensors are stored; Flower then waits a whole second to look again.
(inflatable_utils.pull_objects.__kwdefaults__ or {}).update(initial_backoff=0.02, backoff_cap=0.5)


@contextmanager
def open_grid(address: str, token: str, flower_run_id: int, heartbeat_s: float) -> Iterator[HttpGrid]:
    """Connect to the SuperLink as the ServerApp of one run.

    Args:
        address: host:port of the loopback listener.
        token: the claimed task's token; every call carries it.
        flower_run_id: the run's number in Flower.
        heartbeat_s: how often to say that the app is alive; Flower gives up after 60 s without.
    """
    grid = HttpGrid(address, insecure=True, token=token)
    grid.set_run(Run.create_empty(flower_run_id))
    stop = threading.Event()
    heart = threading.Thread(target=_beat, args=(grid, stop, heartbeat_s), daemon=True, name="heartbeat")
    heart.start()
    try:
        yield grid
    finally:
        stop.set()
        heart.join(timeout=5)
        grid.close()


def _beat(grid: HttpGrid, stop: threading.Event, every_s: float) -> None:
    while not stop.wait(every_s):
        try:
            grid._runtime_client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            continue  # the server's end shows as the end of standard input
