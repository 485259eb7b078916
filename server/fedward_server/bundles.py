"""Pull and push a message with its objects in one request, on top of Flower's own handlers.

What these requests do is a message handler of Flower and then its object handler, once for each object;
who may make them is decided by Flower's own functions too. Flower's web framework is left out: its layers
cost every request some milliseconds, and between two rounds a server answers one for every site at once.
A message whose objects came or went completely is confirmed here, so no request is needed for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response
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
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.dependencies.task import authenticate_task
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from google.protobuf.message import DecodeError
from starlette.concurrency import run_in_threadpool

from fedward_common.transfer import FLEET_PULL, FLEET_PUSH, RUNTIME_PULL, RUNTIME_PUSH, bundled
from fedward_common.transfer_pb2 import Object, PullReply, PullRequest, PushReply, PushRequest
from fedward_server.allowance import Allowances
from fedward_server.listeners import Receive, Scope, Send, header


class Bundles:
    """Answers the bundled requests, and leaves all others to Flower's application."""

    def __init__(self, app: FastAPI, allowances: Allowances) -> None:
        self._app = app
        app.state.allowances = allowances

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        handler = _HANDLERS.get(scope["path"]) if scope["type"] == "http" else None
        if handler is None:
            await self._app(scope, receive, send)
            return
        scope["app"] = self._app  # where Flower's functions look for the state

        async def answered(request: Request[Any]) -> Response:
            reply = await run_in_threadpool(handler, request, await request.body())
            return Response(reply.SerializeToString(), media_type=PROTOBUF_MEDIA_TYPE)

        response = await http_error_translator(Request(scope, receive), answered)
        await response(scope, receive, send)


def _fleet_pull(request: Request[Any], body: bytes) -> PullReply:
    """Give a site its next message."""
    asked = _from_site(request, _parsed(PullRequest, body))
    own = PullMessagesRequest(node=Node(node_id=asked.node_id))
    state = _state(request)
    reply = fleet_handlers.pull_messages(own, state, state.object_store)
    bundle = _with_objects(reply, state)
    for tree in reply.message_object_trees:
        contents = (state.object_store.get(node.object_id) or b"" for node in iterate_object_tree(tree))
        request.app.state.allowances.renew(
            node_key_of(request.scope), tree.object_id, sum(map(len, contents))
        )
    return bundle


def _fleet_push(request: Request[Any], body: bytes) -> PushReply:
    """Take a site's reply, and confirm the message that it answers once the reply is whole."""
    given = _from_site(request, _parsed(PushRequest, body))
    inner = _parsed(PushMessagesRequest, given.request)
    if len(inner.messages_list) != 1 or inner.messages_list[0].metadata.src_node_id != given.node_id:
        raise HTTPException(status_code=403)  # one reply at a time, and nobody answers for another site
    state, node, metadata = _state(request), Node(node_id=given.node_id), inner.messages_list[0].metadata
    answer = fleet_handlers.push_messages(inner, state)
    requests = _object_requests(given, node, metadata.run_id, answer.session_id)
    _store(answer, requests, lambda put: fleet_handlers.push_object(put, state))
    if not answer.objects_to_push:
        answered = ConfirmMessageReceivedRequest(
            node=node, run_id=metadata.run_id, message_object_id=metadata.reply_to_message_id
        )
        fleet_handlers.confirm_message_received(answered, state, state.object_store)
    return PushReply(reply=answer.SerializeToString())


def _runtime_pull(request: Request[Any], body: bytes) -> PullReply:
    """Give a runner the replies that have come."""
    state, task = _state(request), _task(request)
    inner = _parsed(PullAppMessagesRequest, _parsed(PullRequest, body).request)
    reply = runtime_handlers.pull_messages(inner, state, task)
    bundle = _with_objects(reply, state)
    for message_id in _whole(reply.message_object_trees, bundle.objects):
        taken = ConfirmMessageReceivedRequest(message_object_id=message_id)
        runtime_handlers.confirm_message_received(taken, state, task)
    return bundle


def _runtime_push(request: Request[Any], body: bytes) -> PushReply:
    """Take a runner's messages."""
    state, task = _state(request), _task(request)
    given = _parsed(PushRequest, body)
    answer = runtime_handlers.push_messages(_parsed(PushAppMessagesRequest, given.request), state, task)
    requests = _object_requests(given, Node(node_id=given.node_id), task.run_id, answer.session_id)
    _store(answer, requests, lambda put: runtime_handlers.push_object(put, state, task))
    return PushReply(reply=answer.SerializeToString())


_HANDLERS: dict[str, Callable[[Request[Any], bytes], PullReply | PushReply]] = {
    FLEET_PULL: _fleet_pull,
    FLEET_PUSH: _fleet_push,
    RUNTIME_PULL: _runtime_pull,
    RUNTIME_PUSH: _runtime_push,
}


def node_key_of(scope: Scope) -> bytes:
    """The Flower node key that a site's request carries; the guard has compared it with the certificate."""
    return header(scope, b"flwr-public-key") or b""


def _state(request: Request[Any]) -> Any:
    return request.app.state.linkstate_factory.state()


def _from_site(request: Request[Any], message: Any) -> Any:
    """The message, if the caller proved with its node key that it is the node named in it."""
    request.state.protobuf_request = message
    authenticate_node(request)
    return message


def _task(request: Request[Any]) -> Any:
    """The task whose token the caller shows."""
    return authenticate_task(request, request.headers.get(TASK_TOKEN_HEADER), _state(request))


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
    for request in requests:
        if put(request).stored:  # not if its content is not what its id says, or not part of the message
            missing.pop(request.object_id, None)
    del answer.objects_to_push[:]
    answer.objects_to_push.extend(missing)


def _parsed(kind: type[Any], body: bytes) -> Any:
    try:
        return kind.FromString(body)
    except DecodeError:
        raise HTTPException(status_code=400) from None
