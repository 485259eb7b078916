"""The site as a Flower node: pull a message, run the installed app, push the reply; never fetch code.

Nothing in Flower's public API does this, so the calls to its internals are kept in this one module and
held by contract tests against a real SuperLink (pin: flwr 1.41). `GetFab` is never called: code that a
server might push cannot arrive. The node reconnects for ever, tells the server it leaves on SIGTERM,
and asks once a second, while it trains, whether the run still wants the work.
"""

from __future__ import annotations

import concurrent.futures
import random
import ssl
import threading
from collections.abc import Callable
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, push_objects
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedward_common.transfer import FLEET_PULL, FLEET_PUSH, bundled
from fedward_common.transfer_pb2 import PullReply, PullRequest, PushReply, PushRequest

_Reply = TypeVar("_Reply", PullReply, PushReply)

HEARTBEAT_S = 10.0  # the least that Flower accepts; a killed site is noticed after two of them
_POLL_S = 0.2
_CANCEL_CHECK_S = 1.0
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.25, 30.0


class FleetConnection:
    """One activated session with the server's fleet listener.

    Raises:
        httpx.HTTPError: from every method, when the server cannot be reached or refuses.
    """

    def __init__(self, server: str, context: ssl.SSLContext, node_key: ec.EllipticCurvePrivateKey) -> None:
        """Connect and activate.

        Args:
            server: host:port of the sites' listener.
            context: TLS with the site's client certificate.
            node_key: the certificate's own key; the server refuses any other.
        """
        public_key = node_key.public_key()
        self._client = FleetHttpClient(
            f"https://{server}",
            verify=context,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(node_key, public_key),
            ],
        )
        try:
            reply = self._client.ActivateNode(
                ActivateNodeRequest(
                    public_key=public_key_to_bytes(public_key), heartbeat_interval=HEARTBEAT_S
                )
            )
        except BaseException:
            self._client.close()
            raise
        self._node = Node(node_id=reply.node_id)

    @property
    def node_id(self) -> int:
        """The number Flower gave this node."""
        return int(self._node.node_id)

    def heartbeat(self) -> bool:
        """Say that the site is alive; False when the server does not know it (any more)."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_S)
        return bool(self._client.SendNodeHeartbeat(request).success)

    def pull(self) -> Message | None:
        """Wait for a message (the server holds the request for some seconds) and fetch its content."""
        bundle = self._call(FLEET_PULL, PullRequest(node_id=self._node.node_id), PullReply)
        reply = PullMessagesResponse.FromString(bundle.reply)
        if not reply.messages_list:
            return None
        envelope = message_from_proto(reply.messages_list[0])
        tree = reply.message_object_trees[0]
        there = {each.object_id: each.content for each in bundle.objects}
        fetch = make_pull_object_fn_protobuf(self._client.PullObject, self._node, envelope.metadata.run_id)
        message = pull_and_inflate_object_from_tree(
            tree,
            lambda object_id: there.pop(object_id, b"") or fetch(object_id),
            # Confirmed only with the reply: a site that dies in between is given the message again.
            lambda _: None,
            return_type=Message,
            max_time=120,
            initial_backoff=0.02,  # Flower waits a whole second for objects that are still being stored
            backoff_cap=1.0,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def push(self, reply: Message, seconds: float) -> None:
        """Send a reply and the objects the server does not have yet; with the last, it is confirmed."""
        run_id = reply.metadata.run_id
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            )
            bundle = PushRequest(
                node_id=self._node.node_id,
                request=request.SerializeToString(),
                objects=bundled(objects, lambda object_id: objects[object_id].deflate()),
            )
            answer = PushMessagesResponse.FromString(self._call(FLEET_PUSH, bundle, PushReply).reply)
            if not answer.objects_to_push:
                return
            push_objects(
                objects,
                make_push_object_fn_protobuf(self._client.PushObject, self._node, run_id, answer.session_id),
                object_ids_to_push=set(answer.objects_to_push),
                keep_objects=True,
            )
        confirm = make_confirm_message_received_fn_protobuf(
            self._client.ConfirmMessageReceived, self._node, run_id
        )
        confirm(reply.metadata.reply_to_message_id)

    def run_wants_work(self, run_id: int) -> bool:
        """Whether the run is still going."""
        try:
            self._client.GetRun(GetRunRequest(node=self._node, run_id=run_id))
        except httpx.HTTPStatusError:
            return False
        return True

    def _call(self, path: str, request: PullRequest | PushRequest, kind: type[_Reply]) -> _Reply:
        return self._client._unary_unary(path=path, rpc_method=path, request=request, response_type=kind)

    def close(self) -> None:
        """Tell the server that the site leaves, if it can be told, and close."""
        try:
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        except (httpx.HTTPError, RuntimeError):
            pass  # the server will notice by the missing heartbeat
        finally:
            self._client.close()


class SiteNode:
    """Serves instructions until told to stop, through any number of lost connections."""

    def __init__(
        self,
        connect: Callable[[], FleetConnection],
        app: ClientApp,
        cancel: Callable[[], None],
        report: Callable[..., None],
    ) -> None:
        """Wire a node.

        Args:
            connect: opens and activates a connection.
            app: answers messages.
            cancel: stops the work in progress.
            report: writes one event to the site's own log.
        """
        self._connect = connect
        self._app = app
        self._cancel = cancel
        self._report = report
        self._stop = threading.Event()

    def stop(self) -> None:
        """End `run` soon; safe to call from a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Connect, serve, and connect again after every loss, with growing pauses, until `stop`."""
        backoff = _FIRST_BACKOFF_S
        while not self._stop.is_set():
            try:
                connection = self._connect()
            except (httpx.HTTPError, ssl.SSLError, OSError) as error:
                self._report("server_unreachable", delay_s=round(backoff, 2), where=cause_of(error))
                self._stop.wait(backoff * random.uniform(0.8, 1.2))  # noqa: S311 - spreads reconnects
                backoff = min(backoff * 1.6, _LONGEST_BACKOFF_S)
                continue
            backoff = _FIRST_BACKOFF_S
            self._report("connected", node_id=str(connection.node_id))
            try:
                self._serve(connection)
            except (httpx.HTTPError, OSError, RuntimeError, TypeError, ValueError) as error:
                self._report("connection_lost", where=cause_of(error))
                self._stop.wait(_POLL_S)
            finally:
                connection.close()

    def _serve(self, connection: FleetConnection) -> None:
        """Answer messages until the connection fails or the node is stopped."""
        alive = _Heart(connection)
        with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="work") as executor:
            try:
                while not self._stop.is_set():
                    alive.check()
                    message = connection.pull()
                    if message is not None:
                        self._answer(connection, message, executor)
            finally:
                alive.stop()
                self._cancel_unfinished(executor)

    def _answer(
        self, connection: FleetConnection, message: Message, executor: concurrent.futures.Executor
    ) -> None:
        run_id = message.metadata.run_id
        context = Context(run_id, connection.node_id, {}, RecordDict(), {})
        work = executor.submit(self._app, message, context)
        cancelled = False
        while True:
            try:
                reply = work.result(timeout=_CANCEL_CHECK_S)
                break
            except concurrent.futures.TimeoutError:
                if not cancelled and (self._stop.is_set() or not self._wanted(connection, run_id)):
                    cancelled = True
                    self._report("work_cancelled")
                    self._cancel()
        if cancelled and not self._stop.is_set():
            return  # nobody waits for this answer
        if not self._stop.is_set():
            self._deliver(connection, reply)

    def _wanted(self, connection: FleetConnection, run_id: int) -> bool:
        try:
            return connection.run_wants_work(run_id)
        except httpx.TransportError:
            return True  # the server may be back before the work is done

    def _deliver(self, connection: FleetConnection, reply: Message) -> None:
        """Push a reply, again and again while the network is down; a server that refuses it is final."""
        backoff = _FIRST_BACKOFF_S
        while not self._stop.is_set():
            try:
                connection.push(reply, seconds=0.0)
            except httpx.TransportError as error:
                self._report("delivery_retried", delay_s=round(backoff, 2), where=cause_of(error))
                self._stop.wait(backoff)
                backoff = min(backoff * 1.6, _LONGEST_BACKOFF_S)
            except httpx.HTTPStatusError as error:
                self._report("delivery_refused", where=cause_of(error))
                raise
            else:
                return

    def _cancel_unfinished(self, executor: concurrent.futures.ThreadPoolExecutor) -> None:
        if self._stop.is_set():
            self._cancel()
        executor.shutdown(wait=True, cancel_futures=True)


class _Heart:
    """Sends heartbeats in a thread; remembers when the server stopped knowing this node."""

    def __init__(self, connection: FleetConnection) -> None:
        self._connection = connection
        self._stop = threading.Event()
        self._unknown = False
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()

    def check(self) -> None:
        """Raise ConnectionError once the server has answered that it does not know this node."""
        if self._unknown:
            raise ConnectionError("the server does not know this node any more")

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=6)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S / 2):
            try:
                self._unknown = not self._connection.heartbeat()
            except httpx.HTTPStatusError:
                self._unknown = True
            except (httpx.TransportError, RuntimeError):
                continue
            if self._unknown:
                return


def cause_of(error: BaseException) -> str:
    """Class of a network error and its HTTP status, as one word for the site's log."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP-{error.response.status_code}"
    inner = error.__cause__ or error.__context__
    return type(error).__name__ if inner is None else f"{type(error).__name__}:{type(inner).__name__}"
