"""Flower's HTTP grid for a runner: the ServerApp's way to the SuperLink on the loopback interface.

Flower's own launcher would fetch and install a FAB first; here the app is the installed one, so only
the connection and the task's heartbeat are needed. Internals of Flower, held by contract tests.

Replies are made by sites, and Flower's own grid trusts them: it fetches them one after the other, waits
minutes for an upload that stalls, and lets whatever a malformed one does to its parsers end the run. Here
a reply whose parts did not come along is fetched in a thread of its own, each is taken apart only when
its size is what a reply can have, and whatever goes wrong is the loss of the site that sent it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
from flwr.app import Array, Error, Message, Metadata
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid

from fedward_common.transfer import RUNTIME_PULL, RUNTIME_PUSH, bundled
from fedward_common.transfer_pb2 import PullReply, PullRequest, PushReply, PushRequest

_Reply = TypeVar("_Reply", PullReply, PushReply)

_LOOK_S = 0.25  # how long to wait for replies on their way before asking for more
_LAST_FETCH_S = 5.0  # how long to wait, at the end, for an answer from the server on this machine
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
        self._fetching = 0
        self._closed = False

    def close(self) -> None:
        """Disconnect; a fetch under way ends first, and none begins anew, for it would connect again."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: self._fetching == 0, timeout=_LAST_FETCH_S)
        super().close()

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to `message_ids` that are complete; waits for the server's hold time at most."""
        wanted = set(message_ids)
        if replies := self._complete(wanted):
            return replies
        unannounced = wanted - self._on_the_way
        if not unannounced:
            return []
        inner = PullAppMessagesRequest(message_ids=sorted(unannounced))
        request = PullRequest(node_id=self.node.node_id, request=inner.SerializeToString())
        bundle = self._call(RUNTIME_PULL, request, PullReply)
        there = {each.object_id: each.content for each in bundle.objects}
        answer = PullAppMessagesResponse.FromString(bundle.reply)
        for announced, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            reply_to = announced.metadata.reply_to_message_id
            self._on_the_way.add(reply_to)
            own = {key: there[key] for key in _object_ids(tree) if key in there}
            arguments = (reply_to, announced.metadata.message_id, tree, own)
            if len(own) == len(_object_ids(tree)):
                self._take(*arguments)
            else:
                threading.Thread(target=self._take, args=arguments, daemon=True, name="reply").start()
        return self._complete(wanted)

    def _try_push_messages(self, run_id: int, messages: Iterable[Message]) -> list[str]:
        """Push messages with their objects in one request; what does not fit follows one by one."""
        messages = list(messages)
        objects: dict[str, InflatableObject] = {}
        for message in messages:
            objects.update(get_all_nested_objects(message))
        inner = PushAppMessagesRequest(
            messages_list=[message_to_proto(remove_content_from_message(message)) for message in messages],
            message_object_trees=[get_object_tree(message) for message in messages],
        )
        bundle = PushRequest(
            node_id=self.node.node_id,
            request=inner.SerializeToString(),
            objects=bundled(objects, lambda object_id: objects[object_id].deflate()),
        )
        answer = PushAppMessagesResponse.FromString(self._call(RUNTIME_PUSH, bundle, PushReply).reply)
        if answer.objects_to_push:
            inflatable_utils.push_objects(
                objects,
                make_push_object_fn_protobuf(
                    self._runtime_client.PushObject, self.node, run_id, answer.session_id
                ),
                object_ids_to_push=set(answer.objects_to_push),
            )
        return list(answer.message_ids)

    def _call(self, path: str, request: PullRequest | PushRequest, kind: type[_Reply]) -> _Reply:
        client = self._runtime_client
        return client._unary_unary(path=path, rpc_method=path, request=request, response_type=kind)

    def _complete(self, wanted: set[str]) -> list[Message]:
        """Take out what is there; when something is on its way, wait a moment for it."""
        with self._changed:
            if wanted & self._on_the_way:
                self._changed.wait_for(lambda: wanted & self._there.keys(), timeout=_LOOK_S)
            replies = [self._there[key] for key in wanted & self._there.keys()]
            self._on_the_way -= self._there.keys()
            self._there.clear()  # what is not wanted came after its deadline
            return replies

    def _take(self, reply_to: str, message_id: str, tree: ObjectTree, there: dict[str, bytes]) -> None:
        try:
            reply = self._inflated(message_id, tree, there)
        except Exception:  # thread edge: what a site's bytes do to Flower's parsers costs that site its turn
            reply = _unreadable(self._run_id, self.node.node_id)
        # which question a site answers is what the server recorded, not what the reply says of itself
        reply.metadata.__dict__["_reply_to_message_id"] = reply_to
        with self._changed:
            self._there[reply_to] = reply
            self._changed.notify_all()

    def _inflated(self, message_id: str, tree: ObjectTree, there: dict[str, bytes]) -> Message:
        fetch = make_pull_object_fn_protobuf(self._runtime_client.PullObject, self.node, self._run_id)

        def pull_object(object_id: str) -> bytes:
            if object_id in there:
                return there[object_id]
            with self._one_fetch():
                return fetch(object_id)

        pull = _bounded(pull_object, self._max_reply)
        wanted = _object_ids(tree)
        if len(there) == len(wanted):  # the server has confirmed it
            contents = {object_id: pull(object_id) for object_id in wanted}
        else:
            received = ConfirmMessageReceivedRequest(
                node=self.node, run_id=self._run_id, message_object_id=message_id
            )
            try:
                contents = inflatable_utils.pull_objects(wanted, pull)
            finally:  # whatever it was: it need not stay in the server's memory
                with self._one_fetch():
                    self._runtime_client.ConfirmMessageReceived(received)
        if _inflated_bytes(contents) > self._max_reply:
            raise ValueError("the reply's tensors are larger than a reply can be")
        reply = inflatable_utils.inflate_object_from_contents(message_id, contents)
        if not isinstance(reply, Message):
            raise TypeError("the reply is not a message")
        return reply

    @contextmanager
    def _one_fetch(self) -> Iterator[None]:
        with self._changed:
            if self._closed:
                raise ConnectionError("the grid is closed")
            self._fetching += 1
        try:
            yield
        finally:
            with self._changed:
                self._fetching -= 1
                self._changed.notify_all()

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


def _object_ids(tree: ObjectTree) -> list[str]:
    """Ids of a message's objects, each once."""
    return list(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)))


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
