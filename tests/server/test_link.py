"""The sites' listener: who gets in, to which paths, and that messages survive a dead site.

Contract tests against the real SuperLink and real TLS on loopback: they hold our use of Flower's
internals to the installed version.
"""

from __future__ import annotations

import random
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.common.serde import message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse, RegisterNodeFleetRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.task_identity import TaskIdentity

from fedward_client.node import FleetConnection
from fedward_common.identity import Identity, client_context, load_identity, node_public_key_pem
from fedward_common.transfer import FLEET_PULL, FLEET_PUSH, MAX_BUNDLE, RUNTIME_PULL, RUNTIME_PUSH
from fedward_common.transfer_pb2 import Object, PushReply, PushRequest
from fedward_server.allowance import PER_MESSAGE
from fedward_server.grid import open_grid
from fedward_server.link import Link
from fedward_server.provisioning import provision


@dataclass(frozen=True)
class Place:
    """A federation with a running link."""

    folder: Path
    link: Link
    revoked: set[str]

    def member(self, path: str) -> Identity:
        return load_identity(self.folder / path)

    def connect(self, site: str) -> FleetConnection:
        identity = self.member(f"sites/{site}")
        return FleetConnection(f"127.0.0.1:{self.link.port}", client_context(identity), identity.node_key)

    def client(self, path: str) -> httpx.Client:
        return httpx.Client(
            base_url=f"https://127.0.0.1:{self.link.port}", verify=client_context(self.member(path))
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("link") / "federation"
    provision(
        folder,
        name="test",
        hosts=["127.0.0.1"],
        site_names=["north", "south"],
        coordinator_names=["lead"],
        observer_names=[],
    )
    provision(folder.with_name("other"), name="other", hosts=["127.0.0.1"], site_names=["north"])
    server = load_identity(folder / "server")
    revoked: set[str] = set()

    def trusted() -> dict[str, str]:
        roster = server.federation.sites
        return {name: entry.certificate_sha256 for name, entry in roster.items() if name not in revoked}

    link = Link(server, host="127.0.0.1", port=0, trusted_sites=trusted)
    link.start()
    yield Place(folder, link, revoked)
    link.stop()


FORBIDDEN = [
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/v1/runtime/pull-messages",
    "/health",
    "/docs",
    "/openapi.json",
    "/",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet//../../v1/control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/V1/FLEET/activate-node",
]


@pytest.mark.parametrize("path", FORBIDDEN)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_sites_listener_answers_404_outside_the_fleet_paths_even_with_a_valid_certificate(
    place: Place, path: str, method: str
) -> None:
    with place.client("sites/north") as client:
        request = client.build_request(method, path)
        # httpx tidies paths; an attacker does not
        request.url = request.url.copy_with(raw_path=path.encode())
        assert client.send(request).status_code == 404


def test_local_listener_serves_neither_control_nor_fleet_nor_documentation(place: Place) -> None:
    with httpx.Client(base_url=f"http://{place.link.runtime_address}") as client:
        for path in ("/v1/control/list-runs", "/v1/fleet/pull-messages", "/docs", "/openapi.json"):
            assert client.post(path).status_code == 404


def test_tasks_cannot_be_claimed_on_the_local_listener_without_the_secret(place: Place) -> None:
    with httpx.Client(base_url=f"http://{place.link.runtime_address}") as client:
        answer = client.post("/v1/runtime/acquire-task", headers={"content-type": "application/protobuf"})
        assert answer.status_code == 401


def test_handshake_fails_without_a_client_certificate(place: Place) -> None:
    context = ssl.create_default_context(cafile=str(place.folder / "ca" / "ca.crt"))
    with (
        httpx.Client(verify=context) as client,
        pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)),
    ):
        client.post(f"https://127.0.0.1:{place.link.port}/v1/fleet/pull-messages")


def test_handshake_fails_with_another_federations_certificate(place: Place) -> None:
    other = place.folder.with_name("other") / "sites" / "north"
    context = ssl.create_default_context(cafile=str(place.folder / "ca" / "ca.crt"))
    context.load_cert_chain(other / "tls.crt", other / "tls.key")
    with (
        httpx.Client(verify=context) as client,
        pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)),
    ):
        client.post(f"https://127.0.0.1:{place.link.port}/v1/fleet/pull-messages")


def test_a_coordinators_certificate_is_refused(place: Place) -> None:
    with place.client("coordinators/lead") as client:
        assert client.post("/v1/fleet/activate-node").status_code == 403


def test_handshake_fails_with_the_servers_own_certificate(place: Place) -> None:
    with place.client("server") as client, pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        client.post("/v1/fleet/activate-node")


def test_a_site_cannot_use_another_sites_node_key(place: Place) -> None:
    north, south = place.member("sites/north"), place.member("sites/south")
    with pytest.raises(httpx.HTTPStatusError) as caught:
        FleetConnection(f"127.0.0.1:{place.link.port}", client_context(north), south.node_key)
    assert caught.value.response.status_code == 403


def test_a_site_cannot_act_without_flowers_node_signature(place: Place) -> None:
    certificate = ssl.PEM_cert_to_DER_cert((place.folder / "sites/north/tls.crt").read_text())
    headers = {
        "content-type": "application/protobuf",
        "flwr-public-key": b64encode(node_public_key_pem(certificate)).decode(),
    }
    with place.client("sites/north") as client:
        assert client.post("/v1/fleet/pull-messages", headers=headers).status_code == 401


def test_a_site_cannot_act_with_another_sites_node_id(place: Place) -> None:
    north, south = place.connect("north"), place.connect("south")
    try:
        north._node.CopyFrom(south._node)
        with pytest.raises(httpx.HTTPStatusError) as caught:
            north.pull()
        assert caught.value.response.status_code == 401
    finally:
        north._client.close()
        south.close()


def test_a_site_removed_from_the_roster_is_refused_on_its_live_connection(place: Place) -> None:
    south = place.connect("south")
    place.revoked.add("south")
    try:
        with pytest.raises(httpx.HTTPStatusError) as caught:
            south.pull()
        assert caught.value.response.status_code == 403
    finally:
        place.revoked.clear()
        south.close()


def test_sites_can_neither_register_nodes_nor_fetch_code(place: Place) -> None:
    north = place.connect("north")
    run = place.link.open_run()
    try:
        with pytest.raises(httpx.HTTPStatusError):
            north._client.RegisterNode(RegisterNodeFleetRequest(public_key=b"x"))
        with pytest.raises(httpx.HTTPStatusError):
            north._client.GetFab(GetFabRequest(node=north._node, run_id=run.flower_run_id, hash_str=""))
    finally:
        place.link.close_run(run.flower_run_id, stopped=True)
        north.close()


def test_a_message_reaches_the_site_and_its_answer_comes_back(place: Place) -> None:
    north = place.connect("north")
    run = place.link.open_run()
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run.flower_run_id, 1, 1
    try:
        with open_grid(place.link.runtime_address, run.token, run.flower_run_id, 10) as grid:
            (node,) = grid.get_nodes()
            assert node.name == "north"
            content = RecordDict({"body": ConfigRecord({"bytes": bytes(3_000_000)})})
            (message_id,) = grid.push_messages([Message(content, node.node_id, "train")])
            message = north.pull()
            assert message is not None
            assert message.content["body"]["bytes"] == bytes(3_000_000)
            assert north.run_wants_work(run.flower_run_id)
            north.push(Message(RecordDict({"reply": ConfigRecord({"n": 7})}), reply_to=message), 0.1)
            (reply,) = grid.pull_messages([message_id])
            assert reply.metadata.reply_to_message_id == message_id
            assert reply.content["reply"]["n"] == 7
        place.link.close_run(run.flower_run_id, stopped=True)
        assert not north.run_wants_work(run.flower_run_id)
    finally:
        north.close()


def test_a_message_larger_than_a_bundle_goes_piece_by_piece_both_ways(place: Place) -> None:
    north = place.connect("north")
    run = place.link.open_run()
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run.flower_run_id, 1, 1
    large = random.Random(7).randbytes(MAX_BUNDLE + 3_000_000)
    payload = ArrayRecord({"flat": Array("uint8", (len(large),), "test", large)})
    try:
        with open_grid(place.link.runtime_address, run.token, run.flower_run_id, 10) as grid:
            (node,) = grid.get_nodes()
            (message_id,) = grid.push_messages([Message(RecordDict({"p": payload}), node.node_id, "train")])
            message = north.pull()
            assert message is not None
            assert message.content.array_records["p"]["flat"].data == large
            north.push(Message(RecordDict({"p": payload}), reply_to=message), 0.1)
            reply = None
            until = time.monotonic() + 30
            while reply is None and time.monotonic() < until:
                reply = next(iter(grid.pull_messages([message_id])), None)
            assert reply is not None
            assert reply.content.array_records["p"]["flat"].data == large
            assert len(place.link._state.object_store) == 0
    finally:
        place.link.close_run(run.flower_run_id, stopped=True)
        north.close()


def test_nothing_stays_on_the_server_once_a_reply_was_fetched(place: Place) -> None:
    north = place.connect("north")
    run = place.link.open_run()
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run.flower_run_id, 1, 1
    try:
        with open_grid(place.link.runtime_address, run.token, run.flower_run_id, 10) as grid:
            (node,) = grid.get_nodes()
            content = RecordDict({"body": ConfigRecord({"bytes": bytes(100)})})
            (message_id,) = grid.push_messages([Message(content, node.node_id, "train")])
            message = north.pull()
            assert message is not None
            assert len(place.link._state.object_store) > 0
            north.push(Message(RecordDict({"reply": ConfigRecord({"n": 7})}), reply_to=message), 0.1)
            (_,) = grid.pull_messages([message_id])
            assert len(place.link._state.object_store) == 0
    finally:
        place.link.close_run(run.flower_run_id, stopped=True)
        north.close()


def test_a_site_cannot_answer_for_another(place: Place) -> None:
    north, south = place.connect("north"), place.connect("south")
    run = place.link.open_run()
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run.flower_run_id, 1, 1
    try:
        with open_grid(place.link.runtime_address, run.token, run.flower_run_id, 10) as grid:
            content = RecordDict({"body": ConfigRecord({"n": 1})})
            (message_id,) = grid.push_messages([Message(content, south.node_id, "train")])
            message = south.pull()
            assert message is not None
            forged = Message(RecordDict({"reply": ConfigRecord({"n": 666})}), reply_to=message)
            with pytest.raises(httpx.HTTPStatusError) as caught:
                north.push(forged, 0.1)
            assert caught.value.response.status_code == 403
            south.push(Message(RecordDict({"reply": ConfigRecord({"n": 7})}), reply_to=message), 0.1)
            (reply,) = grid.pull_messages([message_id])
            assert reply.content["reply"]["n"] == 7
    finally:
        place.link.close_run(run.flower_run_id, stopped=True)
        north.close()
        south.close()


@pytest.mark.parametrize("path", [FLEET_PULL, FLEET_PUSH])
def test_bundled_requests_need_flowers_node_signature(place: Place, path: str) -> None:
    certificate = ssl.PEM_cert_to_DER_cert((place.folder / "sites/north/tls.crt").read_text())
    headers = {"flwr-public-key": b64encode(node_public_key_pem(certificate)).decode()}
    with place.client("sites/north") as client:
        assert client.post(path, headers=headers).status_code == 401


@pytest.mark.parametrize("path", [RUNTIME_PULL, RUNTIME_PUSH])
def test_bundled_runtime_requests_need_a_tasks_token_and_are_not_served_to_sites(
    place: Place, path: str
) -> None:
    with httpx.Client(base_url=f"http://{place.link.runtime_address}") as client:
        assert client.post(path).status_code == 401
        assert client.post(path, headers={"flwr-task-token": "guess"}).status_code == 401
    with place.client("sites/north") as client:
        assert client.post(path).status_code == 404


@pytest.mark.parametrize("content", [b"", b"other bytes than its id says"])
def test_objects_that_are_not_what_they_say_are_not_stored(place: Place, content: bytes) -> None:
    north = place.connect("north")
    run = place.link.open_run()
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run.flower_run_id, 1, 1
    try:
        with open_grid(place.link.runtime_address, run.token, run.flower_run_id, 10) as grid:
            message_body = RecordDict({"body": ConfigRecord({"n": 1})})
            grid.push_messages([Message(message_body, north.node_id, "train")])
            message = north.pull()
            assert message is not None
            reply = Message(RecordDict({"reply": ConfigRecord({"n": 7})}), reply_to=message)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            request = PushMessagesRequest(
                node=north._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
            )
            lying = PushRequest(
                node_id=north.node_id,
                request=request.SerializeToString(),
                objects=[Object(object_id=reply.object_id, content=content)],
            )
            answer = PushMessagesResponse.FromString(north._call(FLEET_PUSH, lying, PushReply).reply)
            assert reply.object_id in answer.objects_to_push
            assert place.link._state.object_store.get(reply.object_id) == b""
    finally:
        place.link.close_run(run.flower_run_id, stopped=True)
        north.close()


def test_a_site_cannot_fill_the_servers_memory(place: Place) -> None:
    north, south = place.connect("north"), place.connect("south")
    run = place.link.open_run()
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run.flower_run_id, 1, 1
    try:
        with open_grid(place.link.runtime_address, run.token, run.flower_run_id, 10) as grid:
            content = RecordDict({"body": ConfigRecord({"n": 1})})
            asked = grid.push_messages([Message(content, each.node_id, "train") for each in (north, south)])
            message = north.pull()
            assert message is not None
            large = PushObjectRequest(
                node=north._node, run_id=run.flower_run_id, object_id="0" * 64, object_content=bytes(2**25)
            )
            for _ in range(PER_MESSAGE // 2**25):
                north._client.PushObject(large)  # not stored: it belongs to no message
            with pytest.raises(httpx.HTTPStatusError, match="413"):
                north._client.PushObject(large)
            other = south.pull()
            assert other is not None
            south.push(Message(RecordDict({"reply": ConfigRecord({"n": 7})}), reply_to=other), 0.1)
            assert len(grid.pull_messages(asked)) == 1
            grid.push_messages([Message(content, north.node_id, "train", group_id="2")])
            again = north.pull()
            assert again is not None
            north.push(Message(RecordDict({"reply": ConfigRecord({"n": 7})}), reply_to=again), 0.1)
    finally:
        place.link.close_run(run.flower_run_id, stopped=True)
        north.close()
        south.close()


def test_a_site_that_died_with_a_message_gets_it_again(place: Place) -> None:
    first = place.connect("north")
    run = place.link.open_run()
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run.flower_run_id, 1, 1
    try:
        with open_grid(place.link.runtime_address, run.token, run.flower_run_id, 10) as grid:
            (node,) = grid.get_nodes()
            content = RecordDict({"body": ConfigRecord({"bytes": b"again"})})
            grid.push_messages([Message(content, node.node_id, "train")])
            assert first.pull() is not None
            first._client.close()  # as after kill -9: nobody says goodbye
            second = place.connect("north")
            message = second.pull()
            assert message is not None
            assert message.content["body"]["bytes"] == b"again"
            second.close()
    finally:
        place.link.close_run(run.flower_run_id, stopped=True)


def test_an_empty_pull_is_held_until_there_is_a_message(place: Place) -> None:
    north = place.connect("north")
    run = place.link.open_run()
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run.flower_run_id, 1, 1
    got: list[Message | None] = []
    waiting = threading.Thread(target=lambda: got.append(north.pull()))
    try:
        with open_grid(place.link.runtime_address, run.token, run.flower_run_id, 10) as grid:
            (node,) = grid.get_nodes()
            waiting.start()
            content = RecordDict({"body": ConfigRecord({"bytes": b"news"})})
            grid.push_messages([Message(content, node.node_id, "train")])
            waiting.join(timeout=10)
        assert got
        assert got[0] is not None
        assert got[0].content["body"]["bytes"] == b"news"
    finally:
        place.link.close_run(run.flower_run_id, stopped=True)
        north.close()


def test_replayed_node_signature_of_another_site_is_refused(place: Place) -> None:
    """Flower signs only a time stamp; with the certificate bound to the key a stolen header is no use."""
    north, south = place.member("sites/north"), place.member("sites/south")
    timestamp = now().isoformat()
    certificate = ssl.PEM_cert_to_DER_cert(north.certificate.read_text())
    headers = {
        "content-type": "application/protobuf",
        "flwr-public-key": b64encode(node_public_key_pem(certificate)).decode(),
        "flwr-signature": b64encode(sign_message(north.node_key, timestamp.encode())).decode(),
        TIMESTAMP_HEADER: timestamp,
    }
    with httpx.Client(
        base_url=f"https://127.0.0.1:{place.link.port}", verify=client_context(south)
    ) as client:
        assert client.post("/v1/fleet/pull-messages", headers=headers).status_code == 403
