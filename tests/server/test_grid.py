"""The runner's grid: a site that sends something else than a message, or nothing, is alone with it.

Contract tests against the real SuperLink; what a hostile site does here, it does below Flower's own
client, object by object.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity

from fedward_client.node import FleetConnection
from fedward_common.identity import client_context, load_identity
from fedward_server.grid import RunGrid, open_grid
from fedward_server.link import Link
from fedward_server.provisioning import provision

MAX_PAYLOAD = 1_000_000


@dataclass
class Place:
    """A run with two connected sites."""

    port: int
    grid: RunGrid
    north: FleetConnection
    south: FleetConnection

    def ask(self) -> dict[str, str]:
        """Send a message to each site; site -> message id."""
        nodes = {node.name: node.node_id for node in self.grid.get_nodes()}
        content = RecordDict({"body": ConfigRecord({"n": 1})})
        return {
            name: next(iter(self.grid.push_messages([Message(content, node, "train")])))
            for name, node in sorted(nodes.items())
        }

    def collect(self, message_ids: dict[str, str]) -> dict[str, Message]:
        """Every site's reply."""
        names = {message_id: name for name, message_id in message_ids.items()}
        found: dict[str, Message] = {}
        until = time.monotonic() + 60
        while len(found) < len(names):
            assert time.monotonic() < until, f"only {sorted(found)} answered"
            for reply in self.grid.pull_messages(set(names) - {message_ids[name] for name in found}):
                found[names[reply.metadata.reply_to_message_id]] = reply
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("grid") / "federation"
    provision(
        made,
        name="test",
        hosts=["127.0.0.1"],
        site_names=["north", "south"],
        coordinator_names=["lead"],
        observer_names=[],
    )
    return made


@pytest.fixture
def place(folder: Path) -> Iterator[Place]:
    server = load_identity(folder / "server")
    roster = {name: entry.certificate_sha256 for name, entry in server.federation.sites.items()}
    link = Link(server, host="127.0.0.1", port=0, trusted_sites=lambda: roster)
    link.start()
    sites = []
    for name in ("north", "south"):
        site = load_identity(folder / "sites" / name)
        sites.append(FleetConnection(f"127.0.0.1:{link.port}", client_context(site), site.node_key))
    run = link.open_run()
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run.flower_run_id, 1, 1
    try:
        with open_grid(
            link.runtime_address, run.token, run.flower_run_id, 10, max_payload=MAX_PAYLOAD
        ) as grid:
            yield Place(link.port, grid, *sites)
    finally:
        for site_connection in sites:
            site_connection.close()
        link.stop()


def received(site: FleetConnection) -> Message:
    message = site.pull()
    assert message is not None
    return message


def honest(site: FleetConnection, n: int = 7) -> None:
    site.push(Message(RecordDict({"reply": ConfigRecord({"n": n})}), reply_to=received(site)), 0.1)


def announce(site: FleetConnection, reply: Message, tree: ObjectTree) -> str:
    """Tell the server of a reply without sending any of its objects; the session's id."""
    reply.metadata.__dict__["_message_id"] = tree.object_id
    answer = site._client.PushMessages(
        PushMessagesRequest(
            node=site._node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[tree],
        )
    )
    return str(answer.session_id)


def upload(site: FleetConnection, session: str, contents: dict[str, bytes]) -> None:
    for object_id, content in contents.items():
        site._client.PushObject(
            PushObjectRequest(
                node=site._node,
                run_id=TaskIdentity.run_id,
                session_id=session,
                object_id=object_id,
                object_content=content,
            )
        )


def a_head(kind: str, children: list[str], body: bytes) -> bytes:
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body


def the_same(contents: dict[str, bytes]) -> dict[str, bytes]:
    assert all(get_object_id(content) == object_id for object_id, content in contents.items())
    return contents


def test_two_honest_sites_are_heard(place: Place) -> None:
    ids = place.ask()
    honest(place.north, 1)
    honest(place.south, 2)
    found = place.collect(ids)
    assert {name: reply.content["reply"]["n"] for name, reply in found.items()} == {"north": 1, "south": 2}


def other_object(question: Message) -> tuple[Message, ObjectTree, dict[str, bytes]]:
    """An object of Flower's that is no message."""
    reply = Message(RecordDict(), reply_to=question)
    record = ConfigRecord({"n": 1})
    return reply, ObjectTree(object_id=record.object_id), {record.object_id: record.deflate()}


def bad_body(question: Message) -> tuple[Message, ObjectTree, dict[str, bytes]]:
    """A message whose inside is no protocol buffer."""
    content = a_head("Message", [], b"\xff\xff\xff\xff")
    object_id = get_object_id(content)
    return (
        Message(RecordDict(), reply_to=question),
        ObjectTree(object_id=object_id),
        the_same({object_id: content}),
    )


def missing_child(question: Message) -> tuple[Message, ObjectTree, dict[str, bytes]]:
    """A message whose content is not among its objects."""
    reply = Message(RecordDict({"reply": ConfigRecord({"n": 1})}), reply_to=question)
    return reply, ObjectTree(object_id=reply.object_id), {reply.object_id: reply.deflate()}


def piece_repeated(question: Message) -> tuple[Message, ObjectTree, dict[str, bytes]]:
    """A tensor that names the same small piece so often that it would fill the server's memory."""
    flat = Array("uint8", (1,), "fedward.flat.v1", b"x" * 900_000)
    reply = Message(RecordDict({"payload": ArrayRecord({"flat": flat})}), reply_to=question)
    objects = get_all_nested_objects(reply)
    (piece,) = flat.children
    form = {"dtype": "uint8", "shape": [1], "stype": "x", "arraychunk_ids": [0] * 500_000}
    bomb = a_head("Array", [piece], json.dumps(form).encode())
    record = a_head("ArrayRecord", [get_object_id(bomb)], json.dumps({"flat": get_object_id(bomb)}).encode())
    inside = a_head(
        "RecordDict", [get_object_id(record)], json.dumps({"payload": get_object_id(record)}).encode()
    )
    body = reply.deflate().split(b"\0", 1)[1]
    whole = a_head("Message", [get_object_id(inside)], body)
    contents = {get_object_id(content): content for content in (bomb, record, inside, whole)}
    contents[piece] = objects[piece].deflate()
    tree = ObjectTree(object_id=piece)
    for content in (bomb, record, inside, whole):
        tree = ObjectTree(object_id=get_object_id(content), children=[tree])
    return reply, tree, contents


def too_large(question: Message) -> tuple[Message, ObjectTree, dict[str, bytes]]:
    """A tensor of more bytes than any reply can have, honestly sent."""
    flat = Array("uint8", (1,), "fedward.flat.v1", bytes(range(256)) * 80_000)
    reply = Message(RecordDict({"payload": ArrayRecord({"flat": flat})}), reply_to=question)
    contents = {key: part.deflate() for key, part in get_all_nested_objects(reply).items()}
    return reply, get_object_tree(reply), contents


HOSTILE = [other_object, bad_body, missing_child, piece_repeated, too_large]


@pytest.mark.parametrize("make", HOSTILE)
def test_a_reply_that_is_no_message_is_an_error_of_its_sender_and_the_other_site_is_heard(
    place: Place, make: object
) -> None:
    assert callable(make)
    ids = place.ask()
    reply, tree, contents = make(received(place.north))
    upload(place.north, announce(place.north, reply, tree), contents)
    honest(place.south)
    found = place.collect(ids)
    assert found["north"].has_error()
    assert found["south"].content["reply"]["n"] == 7


def test_a_reply_that_is_announced_and_never_sent_holds_up_nobody(place: Place) -> None:
    ids = place.ask()
    reply = Message(RecordDict({"reply": ConfigRecord({"n": 1})}), reply_to=received(place.north))
    announce(place.north, reply, get_object_tree(reply))
    assert list(place.grid.pull_messages(ids.values())) == []
    started = time.monotonic()
    honest(place.south)
    assert list(place.collect({"south": ids["south"]})) == ["south"]
    assert list(place.grid.pull_messages([ids["north"]])) == []
    assert time.monotonic() - started < 10


def test_a_closed_grid_does_not_connect_again_for_a_reply_still_on_its_way(place: Place) -> None:
    ids = place.ask()
    reply = Message(RecordDict({"reply": ConfigRecord({"n": 1})}), reply_to=received(place.north))
    announce(place.north, reply, get_object_tree(reply))
    assert list(place.grid.pull_messages(ids.values())) == []
    (fetching,) = (thread for thread in threading.enumerate() if thread.name == "reply")
    place.grid.close()
    fetching.join(timeout=8)  # the next heartbeat comes after ten seconds
    assert not fetching.is_alive()
    assert not place.grid._is_connected


def test_a_reply_that_is_sent_slowly_is_heard_when_it_is_complete(place: Place) -> None:
    ids = place.ask()
    reply = Message(RecordDict({"reply": ConfigRecord({"n": 1})}), reply_to=received(place.north))
    tree = get_object_tree(reply)
    contents = {key: part.deflate() for key, part in get_all_nested_objects(reply).items()}
    session = announce(place.north, reply, tree)
    honest(place.south)
    assert list(place.collect({"south": ids["south"]})) == ["south"]
    upload(place.north, session, contents)
    assert place.collect({"north": ids["north"]})["north"].content["reply"]["n"] == 1


def test_a_reply_counts_for_the_question_that_the_server_recorded_whatever_it_says_itself(
    place: Place,
) -> None:
    ids = place.ask()
    question = received(place.north)
    lie = Message(RecordDict({"reply": ConfigRecord({"n": 6})}), reply_to=question)
    lie.metadata.__dict__["_reply_to_message_id"] = ids["south"]
    tree, contents = (
        get_object_tree(lie),
        {key: part.deflate() for key, part in get_all_nested_objects(lie).items()},
    )
    envelope = Message(RecordDict(), reply_to=question)
    upload(place.north, announce(place.north, envelope, tree), contents)
    honest(place.south)
    found = place.collect(ids)
    assert found["north"].content["reply"]["n"] == 6
    assert found["south"].content["reply"]["n"] == 7


def test_a_site_that_is_coming_back_is_not_given_up_before_it_is_there(place: Place, folder: Path) -> None:
    ids = place.ask()
    received(place.north)
    north = load_identity(folder / "sites" / "north")
    key = public_key_to_bytes(north.node_key.public_key())
    with pytest.raises(httpx.HTTPStatusError):  # introduced, but not activated: the moment in between
        place.north._client.ActivateNode(ActivateNodeRequest(public_key=key, heartbeat_interval=0.001))
    assert list(place.grid.pull_messages([ids["north"]])) == []
    honest(place.south)
    again = FleetConnection(f"127.0.0.1:{place.port}", client_context(north), north.node_key)
    honest(again)
    found = place.collect(ids)
    again.close()
    assert not any(reply.has_error() for reply in found.values())


def test_an_answer_that_comes_after_nobody_wants_it_is_not_kept(place: Place) -> None:
    ids = place.ask()
    honest(place.north)
    place.collect({"north": ids["north"]})
    honest(place.south)
    second = place.ask()
    honest(place.north)
    place.collect({"north": second["north"]})
    assert place.grid._there == {}
    assert place.grid._on_the_way == set()
