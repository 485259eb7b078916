"""Pull and push a message with its objects in one request, on top of Flower's own handlers.

The routes belong to the same application as Flower's, behind the same listeners, certificates and node
signatures; what they do is a message handler of Flower and then its object handler, once for each object.
A message whose objects came or went completely is confirmed here, so no request is needed for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException
from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from flwr.supercore.dependencies.runtime import TaskDependency
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.protobuf.routing import ProtobufRoute
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_DEPENDENCY, PROTOBUF_REQUEST_TYPES
from flwr.superlink.dependencies.linkstate import get_linkstate
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from google.protobuf.message import DecodeError, Message

from fedward_common.transfer import FLEET_PULL, FLEET_PUSH, RUNTIME_PULL, RUNTIME_PUSH, bundled
from fedward_common.transfer_pb2 import Object, PullReply, PullRequest, PushReply, PushRequest

_State = Annotated[Any, Depends(get_linkstate)]
_Pull = Annotated[PullRequest, PROTOBUF_REQUEST_DEPENDENCY]
_Push = Annotated[PushRequest, PROTOBUF_REQUEST_DEPENDENCY]
_router = APIRouter(route_class=ProtobufRoute)


def add_bundle_routes(app: FastAPI) -> None:
    """Serve the bundled requests beside Flower's."""
    for path, kind in _KINDS.items():
        PROTOBUF_REQUEST_TYPES["POST", path] = kind
    app.include_router(_router)


@_router.post(FLEET_PULL)
def fleet_pull_bundle(request: _Pull, state: _State) -> PullReply:
    """Give a site its next message."""
    own = PullMessagesRequest(node=Node(node_id=request.node_id))
    return _with_objects(fleet_handlers.pull_messages(own, state, state.object_store), state)


@_router.post(FLEET_PUSH)
def fleet_push_bundle(request: _Push, state: _State) -> PushReply:
    """Take a site's reply, and confirm the message that it answers once the reply is whole."""
    inner = _parsed(PushMessagesRequest, request.request)
    if len(inner.messages_list) != 1 or inner.messages_list[0].metadata.src_node_id != request.node_id:
        raise HTTPException(status_code=403)  # one reply at a time, and nobody answers for another site
    node, metadata = Node(node_id=request.node_id), inner.messages_list[0].metadata
    answer = fleet_handlers.push_messages(inner, state)
    requests = _object_requests(request, node, metadata.run_id, answer.session_id)
    _store(answer, requests, lambda put: fleet_handlers.push_object(put, state))
    if not answer.objects_to_push:
        answered = ConfirmMessageReceivedRequest(
            node=node, run_id=metadata.run_id, message_object_id=metadata.reply_to_message_id
        )
        fleet_handlers.confirm_message_received(answered, state, state.object_store)
    return PushReply(reply=answer.SerializeToString())


@_router.post(RUNTIME_PULL)
def runtime_pull_bundle(request: _Pull, state: _State, task: TaskDependency) -> PullReply:
    """Give a runner the replies that have come."""
    inner = _parsed(PullAppMessagesRequest, request.request)
    reply = runtime_handlers.pull_messages(inner, state, task)
    bundle = _with_objects(reply, state)
    for message_id in _whole(reply.message_object_trees, bundle.objects):
        taken = ConfirmMessageReceivedRequest(message_object_id=message_id)
        runtime_handlers.confirm_message_received(taken, state, task)
    return bundle


@_router.post(RUNTIME_PUSH)
def runtime_push_bundle(request: _Push, state: _State, task: TaskDependency) -> PushReply:
    """Take a runner's messages."""
    answer = runtime_handlers.push_messages(_parsed(PushAppMessagesRequest, request.request), state, task)
    requests = _object_requests(request, Node(node_id=request.node_id), task.run_id, answer.session_id)
    _store(answer, requests, lambda put: runtime_handlers.push_object(put, state, task))
    return PushReply(reply=answer.SerializeToString())


_KINDS: dict[str, type[Message]] = {
    FLEET_PULL: PullRequest,
    FLEET_PUSH: PushRequest,
    RUNTIME_PULL: PullRequest,
    RUNTIME_PUSH: PushRequest,
}


def _with_objects(reply: PullMessagesResponse | PullAppMessagesResponse, state: Any) -> PullReply:
    """Add the objects of the messages in `reply`, as far as they are there and fit."""
    if not reply.messages_list:
        return PullReply()
    owners = {
        node.object_id: message.metadata.run_id
        for message, tree in zip(reply.messages_list, reply.message_object_trees, strict=True)
        for node in iterate_object_tree(tree)
    }
    objects = bundled(owners, lambda object_id: state.get_object(owners[object_id], object_id))
    return PullReply(reply=reply.SerializeToString(), objects=objects)


def _whole(trees: Iterable[ObjectTree], objects: Iterable[Object]) -> Iterator[str]:
    """Ids of the messages of which every object is among `objects`."""
    there = {each.object_id for each in objects}
    for tree in trees:
        if all(node.object_id in there for node in iterate_object_tree(tree)):
            yield tree.object_id


def _object_requests(
    request: PushRequest, node: Node, run_id: int, session_id: str
) -> Iterator[PushObjectRequest]:
    for each in request.objects:
        yield PushObjectRequest(
            node=node,
            run_id=run_id,
            session_id=session_id,
            object_id=each.object_id,
            object_content=each.content,
        )


def _store(
    answer: PushMessagesResponse | PushAppMessagesResponse,
    requests: Iterable[PushObjectRequest],
    put: Callable[[PushObjectRequest], Any],
) -> None:
    """Store the objects that came along; `answer` is left with those that are still missing."""
    missing = dict.fromkeys(answer.objects_to_push)
    try:
        for request in requests:
            if put(request).stored:
                missing.pop(request.object_id, None)
    except (ValueError, NoObjectInStoreError):  # not what its id says, or not part of the message
        raise HTTPException(status_code=400) from None
    del answer.objects_to_push[:]
    answer.objects_to_push.extend(missing)


def _parsed(kind: type[Any], body: bytes) -> Any:
    try:
        return kind.FromString(body)
    except DecodeError:
        raise HTTPException(status_code=400) from None
