"""Flower's HTTP grid for a runner: the ServerApp's way to the SuperLink on the loopback interface.

Flower's own launcher would fetch and install a FAB first; here the app is the installed one, so only
the connection and the task's heartbeat are needed. Internals of Flower, held by contract tests.

Replies are made by sites, and Flower's own grid trusts them: it fetches them one after the other, waits
minutes for an upload that stalls, and lets whatever a malformed one does to its parsers end the run. Here
each reply is fetched in a thread of its own, is taken apart only when its size is what a reply can have,
and whatever goes wrong is the loss of the site that sent it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
from flwr.app import Array, Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid

_LOOK_S = 0.25  # how long to wait for replies on their way before asking for more
_DOCUMENTS = 8 * 2**20  # envelope, signature and Flower's own records, beside the payload

# A reply is announced before its tensors are stored; Flower then waits a whole second to look again.
(inflatable_utils.pull_objects.__kwdefaults__ or {}).update(initial_backoff=0.02, backoff_cap=0.5)


class RunGrid(HttpGrid):
    """Flower's grid, but no site's reply can stop or delay another's.

    Args:
        address: host:port of the loopback listener.
        token: the claimed task's token.
        max_payload: bytes of the largest payload that a reply can have.
    """

    def __init__(self, address: str, *, token: str, max_payload: int) -> None:
        super().__init__(address, insecure=True, token=token)
        self._max_reply = max_payload + _DOCUMENTS
        self._changed = threading.Condition()
        self._on_the_way: set[str] = set()
        self._there: dict[str, Message] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to `message_ids` that are complete; waits for the server's hold time at most."""
        wanted = set(message_ids)
        if replies := self._complete(wanted):
            return replies
        unannounced = wanted - self._on_the_way
        if not unannounced:
            return []
        answer = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=sorted(unannounced)))
        for announced, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            reply_to = announced.metadata.reply_to_message_id
            self._on_the_way.add(reply_to)
            arguments = (reply_to, announced.metadata.message_id, tree)
            threading.Thread(target=self._fetch, args=arguments, daemon=True, name="reply").start()
        return self._complete(wanted)

    def _complete(self, wanted: set[str]) -> list[Message]:
        """Take out what is there; when something is on its way, wait a moment for it."""
        with self._changed:
            if wanted & self._on_the_way:
                self._changed.wait_for(lambda: wanted & self._there.keys(), timeout=_LOOK_S)
            replies = [self._there[key] for key in wanted & self._there.keys()]
            self._on_the_way -= self._there.keys()
            self._there.clear()  # what is not wanted came after its deadline
            return replies

    def _fetch(self, reply_to: str, message_id: str, tree: ObjectTree) -> None:
        try:
            reply = self._inflated(message_id, tree)
        except Exception:  # thread edge: what a site's bytes do to Flower's parsers costs that site its turn
            reply = _unreadable(self._run_id, self.node.node_id)
        # which question a site answers is what the server recorded, not what the reply says of itself
        reply.metadata.__dict__["_reply_to_message_id"] = reply_to
        with self._changed:
            self._there[reply_to] = reply
            self._changed.notify_all()

    def _inflated(self, message_id: str, tree: ObjectTree) -> Message:
        pull = make_pull_object_fn_protobuf(self._runtime_client.PullObject, self.node, self._run_id)
        contents = inflatable_utils.pull_objects(
            [node.object_id for node in iterate_object_tree(tree)], _bounded(pull, self._max_reply)
        )
        self._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=self._run_id, message_object_id=message_id)
        )
        if _inflated_bytes(contents) > self._max_reply:
            raise ValueError("the reply's tensors are larger than a reply can be")
        reply = inflatable_utils.inflate_object_from_contents(message_id, contents)
        if not isinstance(reply, Message):
            raise TypeError("the reply is not a message")
        return reply

    @property
    def _run_id(self) -> int:
        return int(self.run.run_id)


@contextmanager
def open_grid(
    address: str, token: str, flower_run_id: int, heartbeat_s: float, *, max_payload: int = 2**31
) -> Iterator[RunGrid]:
    """Connect to the SuperLink as the ServerApp of one run.

    Args:
        address: host:port of the loopback listener.
        token: the claimed task's token; every call carries it.
        flower_run_id: the run's number in Flower.
        heartbeat_s: how often to say that the app is alive; Flower gives up after 60 s without.
        max_payload: bytes of the largest payload that a reply can have.
    """
    grid = RunGrid(address, token=token, max_payload=max_payload)
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


def _bounded(pull: Callable[[str], bytes], max_bytes: int) -> Callable[[str], bytes]:
    """Refuse to hold more of one reply than it can have."""
    taken = 0

    def pull_object(object_id: str) -> bytes:
        nonlocal taken
        content = pull(object_id)
        taken += len(content)
        if taken > max_bytes:
            raise ValueError("the reply is larger than a reply can be")
        return content

    return pull_object


def _inflated_bytes(contents: Mapping[str, bytes]) -> int:
    """Bytes of all tensors once put together: a tensor may name the same piece any number of times."""
    total = 0
    for content in contents.values():
        kind, pieces, _ = get_object_head_values_from_object_content(content)
        if kind == "Array":
            order: list[Any] = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            total += sum(len(contents[pieces[index]]) for index in order)
    return total


def _unreadable(run_id: int, node_id: int) -> Message:
    metadata = Metadata(
        run_id=run_id,
        message_id="",
        src_node_id=node_id,
        dst_node_id=node_id,
        message_type=SYSTEM_MESSAGE_TYPE,
        group_id="",
        ttl=0,
        reply_to_message_id="",
        created_at=now().timestamp(),
    )
    return make_message(metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE))
