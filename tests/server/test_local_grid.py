"""Flower's grid without a network: every message is answered once, whatever the app does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedward_server.local_grid import LocalGrid
from tests.integration.deployment import wait_for
from tests.server.scripted_sites import PATIENCE_S


def an_app(answer: Any) -> ClientApp:
    app = ClientApp()
    app.train()(answer)
    return app


def echo(message: Message, context: Context) -> Message:
    content = RecordDict({"node": ConfigRecord({"id": context.node_id}), **message.content})
    return Message(content, reply_to=message)


def broken(message: Message, _: Context) -> Message:
    raise RuntimeError("DOE^JOHN")


@pytest.fixture
def grid() -> Iterator[LocalGrid]:
    made = LocalGrid({"south": an_app(broken), "north": an_app(echo)}, parallel=2)
    yield made
    made.close()


def a_question(node_id: int, **values: Any) -> Message:
    return Message(RecordDict({"body": ConfigRecord(values)}), node_id, "train")


def collect(grid: LocalGrid, message_ids: list[str]) -> list[Message]:
    pending, found = set(message_ids), []
    while pending:
        for reply in grid.pull_messages(pending):
            pending.remove(reply.metadata.reply_to_message_id)
            found.append(reply)
    return found


def test_nodes_are_numbered_in_the_order_of_their_names(grid: LocalGrid) -> None:
    assert [(node.name, node.node_id) for node in grid.get_nodes()] == [("north", 2), ("south", 3)]
    assert list(grid.get_node_ids()) == [2, 3]


def test_every_message_gets_its_own_reply_once(grid: LocalGrid) -> None:
    ids = list(grid.push_messages([a_question(2, n=number) for number in range(20)]))
    replies = collect(grid, ids)
    by_id = {reply.metadata.reply_to_message_id: reply for reply in replies}
    assert [by_id[key].content["body"]["n"] for key in ids] == list(range(20))
    assert list(grid.pull_messages(ids)) == []


def test_an_app_that_raises_answers_with_an_error_that_quotes_nothing_and_the_screen_shows_it(
    grid: LocalGrid, capsys: pytest.CaptureFixture[str]
) -> None:
    (reply,) = collect(grid, list(grid.push_messages([a_question(3)])))
    assert reply.has_error()
    assert not reply.error.reason
    told = capsys.readouterr().err
    assert told.startswith("site south: its app failed\nTraceback")
    assert "RuntimeError: DOE^JOHN" in told


def test_an_app_cannot_change_the_senders_message(grid: LocalGrid) -> None:
    def spoil(message: Message, _: Context) -> Message:
        message.content["body"] = ConfigRecord({"n": 99})
        return Message(RecordDict(), reply_to=message)

    one = LocalGrid({"north": an_app(spoil)}, parallel=1)
    question = a_question(2, n=1)
    collect(one, list(one.push_messages([question])))
    one.close()
    assert question.content["body"]["n"] == 1


def test_no_more_messages_than_allowed_are_handled_at_a_time() -> None:
    working, most, lock = 0, 0, threading.Lock()
    two_at_work = threading.Event()

    def work(message: Message, _: Context) -> Message:
        nonlocal working, most
        with lock:
            working += 1
            most = max(most, working)
            if working == 2:
                two_at_work.set()
        assert two_at_work.wait(PATIENCE_S)
        with lock:
            working -= 1
        return Message(RecordDict(), reply_to=message)

    grid = LocalGrid({"north": an_app(work)}, parallel=2)
    collect(grid, list(grid.push_messages([a_question(2) for _ in range(8)])))
    grid.close()
    assert most == 2


def test_messages_that_wait_are_dropped_when_the_grid_is_closed() -> None:
    begun, go_on, handled = threading.Event(), threading.Event(), []

    def work(message: Message, _: Context) -> Message:
        handled.append(message)
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return Message(RecordDict(), reply_to=message)

    grid = LocalGrid({"north": an_app(work)}, parallel=1)
    grid.push_messages([a_question(2) for _ in range(5)])
    assert begun.wait(PATIENCE_S)
    closing = threading.Thread(target=grid.close)
    closing.start()
    wait_for(lambda: grid._pool._work_queue.qsize() <= 1, "the waiting messages to be dropped")
    go_on.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert len(handled) == 1


def test_flowers_own_ways_of_asking_are_not_offered(grid: LocalGrid) -> None:
    with pytest.raises(NotImplementedError):
        grid.send_and_receive([])
    with pytest.raises(NotImplementedError):
        grid.create_message(RecordDict(), "train", 2, "")
