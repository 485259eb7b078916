"""A Flower `Grid` without a network: messages to nodes become calls of their apps in threads.

Flower's only simulation engine is Ray; for sites on one machine that costs twelve seconds and a
gigabyte before anything happens. The apps, the messages and the round loop are the ones of a real
federation; messages are copied on the way, as a network would.
"""

from __future__ import annotations

import concurrent.futures
import sys
import threading
import traceback
import uuid
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_WAIT_S = 1.0
RUN_ID = 1


class LocalGrid(Grid):
    """Delivers messages to `apps` on a pool of threads; node ids are 2, 3, ... in the order of names."""

    def __init__(self, apps: Mapping[str, ClientApp], *, parallel: int) -> None:
        """Prepare the nodes.

        Args:
            apps: site name -> app.
            parallel: messages handled at the same time.
        """
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, 1, 1
        self._apps = dict(enumerate((apps[name] for name in sorted(apps)), start=2))
        self._nodes = [
            NodeInfo(node_id=node_id, name=name) for node_id, name in enumerate(sorted(apps), start=2)
        ]
        self._pool = concurrent.futures.ThreadPoolExecutor(parallel, thread_name_prefix="site")
        self._replies: dict[str, Message] = {}
        self._arrived = threading.Condition()

    def set_run(self, run: Run) -> None:
        """There is one run."""

    @property
    def run(self) -> Run:
        """The run, as far as it matters to an app."""
        return Run.create_empty(RUN_ID)

    def create_message(self, *_: Any, **__: Any) -> Message:
        """Flower deprecated this; use `Message`."""
        raise NotImplementedError("use flwr.app.Message")

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all nodes."""
        return list(self._apps)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """All nodes with their names."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to their nodes' threads."""
        ids = []
        for message in messages:
            message_id = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = message_id
            self._pool.submit(self._deliver, deepcopy(message), message_id)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to `message_ids` that are there; waits up to a second for the first."""
        wanted = set(message_ids)
        with self._arrived:
            self._arrived.wait_for(lambda: wanted & self._replies.keys(), timeout=_WAIT_S)
            return [self._replies.pop(key) for key in wanted & self._replies.keys()]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Not used: it knows no quorum."""
        raise NotImplementedError("use push_messages and pull_messages")

    def close(self) -> None:
        """End the threads; a message in progress is finished first."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _name_of(self, node_id: int) -> str:
        return next((node.name for node in self._nodes if node.node_id == node_id), "unknown")

    def _deliver(self, message: Message, message_id: str) -> None:
        node_id = message.metadata.dst_node_id
        try:
            reply = self._apps[node_id](message, Context(RUN_ID, node_id, {}, RecordDict(), {}))
        except Exception:  # thread edge: without a reply the server would wait for it until the deadline
            # The reply says nothing of it, as a hospital's would; but this is the researcher's own machine.
            sys.stderr.write(f"site {self._name_of(node_id)}: its app failed\n{traceback.format_exc()}")
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION), reply_to=message)
        with self._arrived:
            self._replies[message_id] = reply
            self._arrived.notify_all()
