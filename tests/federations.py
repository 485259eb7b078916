"""Builders for tests that need members of a federation, signed plans, or a TLS listener on loopback."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

from fedward_common.identity import Identity, load_identity, sign_plan
from fedward_common.plan import SignedPlan, TrainingPlan, parse_plan
from fedward_common.weights import Layout, TensorSpec
from fedward_server.provisioning import provision

A_LAYOUT: Layout = (
    TensorSpec(name="conv.weight", shape=(8, 1, 3, 3), kind="parameter"),
    TensorSpec(name="norm.running_mean", shape=(8,), kind="buffer"),
)


def a_plan(**changes: Any) -> TrainingPlan:
    """A small valid plan; `changes` replace whole tables or top-level keys."""
    document: dict[str, Any] = {
        "name": "pneumonia",
        "rounds": 5,
        "participation": {"quorum": 2},
        "task": {"labels": ("normal", "pneumonia")},
        "model": {"name": "cnn2d"},
        "training": {"learning_rate": 0.01},
    }
    return parse_plan(document | changes)


def a_federation(directory: Path, *, now: datetime | None = None, **changes: Any) -> Path:
    """Provision one server, two sites, one coordinator and one observer on loopback."""
    settings: dict[str, Any] = {
        "name": "Test federation",
        "hosts": ("127.0.0.1", "localhost"),
        "site_names": ("north", "south"),
        "coordinator_names": ("anna",),
        "observer_names": ("otto",),
    }
    provision(directory, now=now, **(settings | changes))
    return directory


def a_signed_plan(
    federation: Path, plan: TrainingPlan | None = None, *, now: datetime | None = None, valid_days: float = 30
) -> SignedPlan:
    """A plan signed by coordinator anna of a provisioned federation."""
    anna = load_identity(federation / "coordinators" / "anna", now=now)
    return sign_plan(plan or a_plan(), A_LAYOUT, anna, valid_days=valid_days, now=now)


def a_site(federation: Path, name: str = "north") -> Identity:
    """A provisioned site's identity."""
    return load_identity(federation / "sites" / name)


@dataclass
class Listener:
    """A TLS listener that answers every request with an empty HTTP answer.

    Attributes:
        port: on 127.0.0.1.
        accepted: certificates (DER) of the clients whose handshake succeeded.
        refusals: reasons of failed handshakes.
    """

    port: int
    accepted: list[bytes] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


@contextmanager
def a_listener(context: ssl.SSLContext, *, date: datetime | None = None) -> Iterator[Listener]:
    """Listen on loopback until the block ends; `date` is what the answers claim as the time."""
    server = socket.create_server(("127.0.0.1", 0))
    listener = Listener(server.getsockname()[1])
    head = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n"
    head += f"Date: {format_datetime(date, usegmt=True)}\r\n" if date else ""

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connection.settimeout(10)
            with connection:
                try:
                    channel = context.wrap_socket(connection, server_side=True)
                except (ssl.SSLError, OSError) as error:
                    listener.refusals.append(getattr(error, "reason", None) or type(error).__name__)
                    continue
                with channel, suppress(OSError):
                    listener.accepted.append(channel.getpeercert(binary_form=True) or b"")
                    channel.recv(4096)
                    channel.sendall(f"{head}\r\n".encode())

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()
