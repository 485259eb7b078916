"""Asking sites: each one yields exactly one answer, with the reason when it is not the wanted one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from flwr.app import RecordDict

from fedward_common import weights
from fedward_common.envelope import Instruction
from fedward_common.errors import RefusalCode
from fedward_common.identity import new_signer
from fedward_common.protocol import Down, Up
from fedward_server.admission import Answer
from fedward_server.fleet import Fleet, Question, RunStoppedError
from fedward_server.local_grid import LocalGrid
from tests.messages import LAYOUT, a_plan, signed
from tests.server.scripted_sites import PATIENCE_S, ScriptedSite, first_model, refuse

PLAN = signed()
BASE = weights.pack(first_model(), LAYOUT)
TRAIN = Question("train", 1, BASE, PATIENCE_S)


@contextmanager
def a_fleet(
    *sites: ScriptedSite, offline: tuple[str, ...] = (), stop: threading.Event | None = None
) -> Iterator[Fleet]:
    grid = LocalGrid({site.name: site.app() for site in sites}, parallel=8)
    keys = {site.name: site.key for site in sites} | {name: new_signer()[1] for name in offline}
    try:
        yield Fleet(grid, PLAN, "run-1", keys, stop or threading.Event())
    finally:
        grid.close()


def codes(answers: Iterator[Answer]) -> dict[str, RefusalCode]:
    found: dict[str, RefusalCode] = {}
    for answer in answers:
        assert answer.site not in found
        found[answer.site] = answer.code
    return found


def test_every_site_asked_answers_once_and_those_that_are_not_connected_are_named() -> None:
    with a_fleet(ScriptedSite("north"), ScriptedSite("south"), offline=("west",)) as fleet:
        assert fleet.roster == ["north", "south", "west"]
        assert sorted(fleet.online()) == ["north", "south"]
        assert codes(fleet.ask(fleet.roster, TRAIN)) == {
            "north": RefusalCode.OK,
            "south": RefusalCode.OK,
            "west": RefusalCode.SITE_OFFLINE,
        }


def test_a_node_that_is_not_in_the_roster_is_neither_asked_nor_counted() -> None:
    known, stranger = ScriptedSite("north"), ScriptedSite("stranger")
    grid = LocalGrid({site.name: site.app() for site in (known, stranger)}, parallel=2)
    fleet = Fleet(grid, PLAN, "run-1", {"north": known.key}, threading.Event())
    assert list(fleet.online()) == ["north"]
    assert codes(fleet.ask(["north", "stranger"], TRAIN))["stranger"] is RefusalCode.SITE_OFFLINE
    assert stranger.asked == []
    grid.close()


def test_sites_are_told_run_plan_round_action_and_which_model_they_get() -> None:
    site = ScriptedSite("north")
    with a_fleet(site) as fleet:
        list(fleet.ask(["north"], Question("evaluate", 2, BASE, PATIENCE_S, "test")))
        list(fleet.ask(["north"], Question("prepare", 0, None, PATIENCE_S)))
    assert site.asked == [
        Instruction(
            run_id="run-1",
            plan_digest=PLAN.digest,
            action="evaluate",
            round_index=2,
            base_digest=weights.digest(BASE),
            split="test",
        ),
        Instruction(run_id="run-1", plan_digest=PLAN.digest, action="prepare", round_index=0),
    ]


def test_answers_come_as_they_arrive_and_not_in_the_order_of_asking() -> None:
    south_has_been_read = threading.Event()

    def wait(site: ScriptedSite, instruction: Instruction, down: Down) -> Up:
        assert south_has_been_read.wait(PATIENCE_S)
        return site.honest(instruction, down)

    with a_fleet(ScriptedSite("north", scripts={"train": wait}), ScriptedSite("south")) as fleet:
        order = []
        for answer in fleet.ask(["north", "south"], TRAIN):
            order.append(answer.site)
            south_has_been_read.set()
        assert order == ["south", "north"]


@contextmanager
def a_hanging_site() -> Iterator[tuple[ScriptedSite, threading.Event]]:
    """A site that does not answer before the block ends, and an event that says it was asked."""
    go_on, asked = threading.Event(), threading.Event()

    def hang(site: ScriptedSite, instruction: Instruction, down: Down) -> Up:
        asked.set()
        assert go_on.wait(PATIENCE_S)
        return site.honest(instruction, down)

    try:
        yield ScriptedSite("north", scripts={"train": hang}), asked
    finally:
        go_on.set()


def test_a_site_that_does_not_answer_in_time_is_late_and_the_others_are_not() -> None:
    south = ScriptedSite("south")
    grid_ends = []
    with a_hanging_site() as (north, _):
        keys = {site.name: site.key for site in (north, south)}
        grid = LocalGrid({site.name: site.app() for site in (north, south)}, parallel=2)
        grid_ends.append(grid)
        fleet = Fleet(grid, PLAN, "run-1", keys, threading.Event())
        found = codes(fleet.ask(["north", "south"], Question("train", 1, BASE, 0.3)))
        assert found == {"south": RefusalCode.OK, "north": RefusalCode.SITE_LATE}
    grid_ends[0].close()


def test_answers_that_are_there_when_the_deadline_passes_are_in_time() -> None:
    with a_fleet(ScriptedSite("north"), ScriptedSite("south")) as fleet:
        answers = fleet.ask(["north", "south"], Question("train", 1, BASE, 1e-9))
        assert codes(answers) == {"north": RefusalCode.OK, "south": RefusalCode.OK}


def test_a_late_answer_is_not_taken_for_one_to_the_next_question() -> None:
    with a_hanging_site() as (north, _):
        grid = LocalGrid({"north": north.app()}, parallel=2)
        fleet = Fleet(grid, PLAN, "run-1", {"north": north.key}, threading.Event())
        assert codes(fleet.ask(["north"], Question("train", 1, BASE, 0.1))) == {
            "north": RefusalCode.SITE_LATE
        }
    answers = list(fleet.ask(["north"], Question("train", 2, BASE, PATIENCE_S)))
    grid.close()
    assert [answer.code for answer in answers] == [RefusalCode.OK]
    assert [instruction.round_index for instruction in north.asked] == [1, 2]


def test_stopping_ends_the_wait_for_a_hanging_site_within_seconds() -> None:
    stop = threading.Event()
    with a_hanging_site() as (north, asked):
        grid = LocalGrid({"north": north.app()}, parallel=2)
        fleet = Fleet(grid, PLAN, "run-1", {"north": north.key}, stop)

        def stop_once_asked() -> None:
            assert asked.wait(PATIENCE_S)
            stop.set()

        stopper = threading.Thread(target=stop_once_asked)
        stopper.start()
        started = time.monotonic()
        with pytest.raises(RunStoppedError):
            list(fleet.ask(["north"], Question("train", 1, BASE, 3600)))
        assert time.monotonic() - started < 10
        stopper.join()
    grid.close()


def other_signature(site: ScriptedSite, instruction: Instruction, down: Down) -> Up:
    up = site.honest(instruction, down)
    return Up(up.envelope, new_signer()[0](up.envelope), up.payload)


def another_round(site: ScriptedSite, instruction: Instruction, down: Down) -> Up:
    return site.update(instruction, site.honest(instruction, down).payload or b"", round_index=7)


def raising(site: ScriptedSite, instruction: Instruction, down: Down) -> Up:
    raise RuntimeError("DOE^JOHN")


BAD: dict[str, tuple[Callable[..., Any], RefusalCode]] = {
    "refuses": (refuse(RefusalCode.COHORT_UNUSABLE), RefusalCode.COHORT_UNUSABLE),
    "says nothing": (lambda site, instruction, down: RecordDict(), RefusalCode.UPDATE_MALFORMED),
    "garbage": (
        lambda site, instruction, down: site.update(instruction, b"\xff" * 7),
        RefusalCode.UPDATE_MALFORMED,
    ),
    "far too much": (
        lambda site, instruction, down: site.update(instruction, bytes(1_000_000)),
        RefusalCode.UPDATE_MALFORMED,
    ),
    "nan": (
        lambda site, instruction, down: site.update(instruction, b"\xff" * 32),
        RefusalCode.UPDATE_NOT_FINITE,
    ),
    "wrong signature": (other_signature, RefusalCode.UPDATE_UNSIGNED),
    "another round": (another_round, RefusalCode.UPDATE_STALE),
    "its app fails": (raising, RefusalCode.SITE_LOST),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_is_a_code_and_the_other_site_is_heard(case: str) -> None:
    script, code = BAD[case]
    with a_fleet(ScriptedSite("north", scripts={"train": script}), ScriptedSite("south")) as fleet:
        assert codes(fleet.ask(["north", "south"], TRAIN)) == {"north": code, "south": RefusalCode.OK}


def test_the_largest_answer_that_the_plan_allows_is_read_though_the_model_is_smaller() -> None:
    many = a_plan(evaluation={"score_bins": 4096})
    plan, site = signed(many), ScriptedSite("north")
    grid = LocalGrid({"north": site.app()}, parallel=1)
    fleet = Fleet(grid, plan, "run-1", {"north": site.key}, threading.Event())
    (answer,) = fleet.ask(["north"], Question("evaluate", 1, BASE, PATIENCE_S))
    grid.close()
    assert answer.ok
    assert answer.payload_bytes > len(BASE)
