"""Records of runs for tests, and waiting for an event without sleeping."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from fedward_server.following import follow
from fedward_server.run_records import Event, EventKind, RoundRecord, SiteRecord
from fedward_server.runs import RunStore

PATIENCE_S = 30.0
NOON = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


def a_round(index: int, **changes: Any) -> RoundRecord:
    """A committed round of two sites."""
    record: dict[str, Any] = {
        "round_index": index,
        "base_digest": "b" * 64,
        "weights_digest": "c" * 64,
        "started_at": NOON,
        "seconds": 2.5,
        "sites": (
            SiteRecord(site="north", status="contributed", num_cases=100, loss=0.5, seconds=2.0),
            SiteRecord(site="south", status="missing", code=70),
        ),
        "checkpoint_file": f"round-{index:05d}-0123456789ab.safetensors",
        "checkpoint_sha256": "d" * 64,
    }
    return RoundRecord.model_validate(record | changes)


def an_event(kind: EventKind, *, second: float = 0, total: Any = None, **fields: Any) -> Event:
    """An event so many seconds after noon; `total` is the field "global" of "evaluated"."""
    if kind == "evaluated":
        fields["global"] = total
    at = datetime.fromtimestamp(NOON.timestamp() + second, UTC)
    return Event(sequence=1, at=at, kind=kind, fields=fields)


@contextmanager
def patience(seconds: float = PATIENCE_S) -> Iterator[threading.Event]:
    """An event that is set when a test has waited too long, so that it fails instead of hanging."""
    stop = threading.Event()
    timer = threading.Timer(seconds, stop.set)
    timer.start()
    try:
        yield stop
    finally:
        timer.cancel()


def wait_for(store: RunStore, run_id: str, kind: EventKind, **fields: Any) -> Event:
    """The first event of a kind with these fields, waiting for another process to write it."""
    seen = []
    with patience() as stop:
        for event in follow(store, run_id, stop=stop, poll_s=0.02):
            if event.kind == kind and fields.items() <= event.fields.items():
                return event
            seen.append(event.kind)
    raise AssertionError(f"no event {kind} {fields} of {run_id} among {seen}")
