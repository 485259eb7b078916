"""Follow a run while another process writes it: what `run watch` shows, from the first event on."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from fedward_server.run_records import ENDED, Event
from fedward_server.runs import RunStore


def follow(
    store: RunStore, run_id: str, *, after: int = 0, stop: threading.Event, poll_s: float = 0.2
) -> Iterator[Event]:
    """Yield a run's events as they appear, from the beginning or from `after`, until the run has ended.

    Args:
        stop: set it to end early, for example when the listener has gone.
        poll_s: how often the file is read; the writer is another process.
    """
    grace_polls = 10  # a runner that sets the status before it writes "finished" gets this long
    told_end = False
    while True:
        ended = store.run(run_id).status in ENDED
        events = store.events(run_id, after)
        for event in events:
            yield event
            after, told_end = event.sequence, event.kind == "finished"
        if ended and not events:
            grace_polls -= 1
            if told_end or grace_polls <= 0:
                return
        if stop.wait(0 if events else poll_s):
            return
