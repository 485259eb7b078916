"""What a watcher sees: rounds, sites, figures and time left, on a terminal, in a log and as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import reduce

import pytest
from rich.console import Console

from fedward_server.progress import Progress, apply
from fedward_server.run_records import Event
from fedward_server.watch import screen, watch
from tests.federations import a_plan
from tests.server.run_builders import NOON, an_event


def a_story(*, rounds: int = 3, until: int = 2) -> list[Event]:
    """Two sites; south misses round 2; each round takes ten seconds and begins as the last one ends."""
    story = [
        an_event("status", second=0, status="waiting", reason=""),
        an_event("status", second=0, status="running", reason=""),
        an_event("sites", second=1, ready=["north"], waiting={"south": 14}),
        an_event("sites", second=2, ready=["north", "south"], waiting={}),
    ]
    for index in range(1, until + 1):
        start = 10.0 * index
        story += [
            an_event("round_started", second=start, round=index, sites=["north", "south"]),
            an_event(
                "site_update", second=start + 4, round=index, site="north", num_cases=300, loss=0.4, seconds=4
            ),
            an_event(
                "site_update", second=start + 5, round=index, site="south", num_cases=100, loss=0.8, seconds=5
            )
            if index != 2
            else an_event("site_refused", second=start + 5, round=index, site="south", code=71),
            an_event("aggregated", second=start + 6, round=index, num_sites=2, num_cases=400),
            an_event(
                "evaluated",
                second=start + 8,
                round=index,
                split="validation",
                sites={"north": {"auroc": 0.75}, "south": None},
                total={"auroc": 0.7 + index / 100},
            ),
            an_event("round_committed", second=start + 10, round=index, seconds=10.0),
        ]
    return story


def an_end(second: float, status: str = "completed", reason: str = "") -> list[Event]:
    return [
        an_event(
            "evaluated",
            second=second,
            round=2,
            split="test",
            sites={"north": None, "south": None},
            total={"auroc": 0.8125},
        ),
        an_event("finished", second=second + 1, status=status, reason=reason, selected_round=2),
    ]


def at(second: float) -> datetime:
    return NOON + timedelta(seconds=second)


def told(events: Sequence[Event], *, after: float = 1.0) -> Progress:
    return reduce(apply, events, Progress(rounds_total=3, rounds_after=after))


def shown(events: Sequence[Event], *, second: float) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(screen("pneumonia", told(events), at(second)))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_loss_of_a_round_is_weighted_by_cases() -> None:
    progress = told(a_story(until=1))

    assert progress.rounds[0].loss == pytest.approx((300 * 0.4 + 100 * 0.8) / 400)
    assert progress.rounds[0].auroc == pytest.approx(0.71)


def test_loss_of_a_round_leaves_out_the_site_that_missed_it() -> None:
    assert told(a_story(until=2)).rounds[1].loss == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("until", "second", "left"), [(0, 5, None), (1, 20, 30.0), (1, 24, 26.0), (2, 30, 20.0), (2, 99, 0.0)]
)
def test_time_left_counts_rounds_to_come_and_what_follows_them(
    until: int, second: float, left: float | None
) -> None:
    """Ten seconds a round, three rounds and the work of one more after them."""
    assert told(a_story(until=until)).left_s(at(second)) == left


def test_time_stands_still_after_the_end() -> None:
    progress = told([*a_story(until=3), *an_end(42)])

    assert progress.left_s(at(500)) is None
    assert progress.elapsed_s(at(500)) == 43.0


def test_resumed_run_shows_its_rounds_once_and_goes_on() -> None:
    resumed = [
        an_event("finished", second=31, status="interrupted", reason="the server ended", selected_round=None),
        an_event("status", second=90, status="waiting", reason=""),
        an_event("status", second=91, status="running", reason=""),
        an_event("round_started", second=95, round=3, sites=["north", "south"]),
    ]
    progress = told([*a_story(until=2), *resumed])

    assert (progress.status, progress.reason, progress.round_index) == ("running", "", 3)
    assert [line.index for line in progress.rounds] == [1, 2, 3]
    assert progress.left_s(at(95)) == 20.0


def test_round_that_is_run_again_replaces_the_lost_one() -> None:
    again = [an_event("round_started", second=60, round=2, sites=["north"])]

    rounds = told([*a_story(until=3), *again]).rounds

    assert [line.index for line in rounds] == [1, 2]
    assert rounds[1].auroc is None


def test_screen_shows_round_sites_loss_auroc_and_time() -> None:
    text = shown(a_story(until=2), second=30)

    assert "round 2/3" in text
    assert "0:30 elapsed, about 0:20 left" in text
    assert "0.720" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert lines["north"].split() == ["north", "contributed", "300", "0.4000", "0.750", "4.0"]
    assert "did not answer before the deadline" in lines["south"]


def test_screen_of_a_site_that_waits_says_for_what() -> None:
    assert "waiting for the site's operator to approve the plan" in shown(a_story(until=0)[:3], second=1)


def test_screen_of_the_end_shows_the_test_and_marks_the_chosen_round() -> None:
    text = shown([*a_story(until=3), *an_end(42)], second=50)

    assert "completed" in text
    assert "test AUROC 0.81" in text
    assert "2 *" in text


def test_screen_and_lines_carry_nothing_that_steers_a_terminal() -> None:
    hostile = "\x1b[2Jno \x07[bold red]quorum[/]"
    events = [*a_story(until=1), *an_end(42, "failed", hostile)]
    console = Console(file=io.StringIO(), width=200)
    watch(events, plan=a_plan(rounds=3), json_lines=False, console=console, now=lambda: at(50))
    file = console.file
    assert isinstance(file, io.StringIO)

    for text in (shown(events, second=50), file.getvalue()):
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "[bold red]quorum[/]" in text


def test_output_that_is_no_terminal_gets_one_line_an_event() -> None:
    console = Console(file=io.StringIO(), width=40)
    events = [*a_story(until=2), *an_end(42)]

    status = watch(events, plan=a_plan(rounds=3), json_lines=False, console=console, now=lambda: at(30))

    file = console.file
    assert isinstance(file, io.StringIO)
    lines = [line.partition("  ")[2] for line in file.getvalue().splitlines()]
    assert status == "completed"
    assert len(lines) == len(events)
    assert "round 1: north contributed 300 cases, loss 0.4000, 4.0 s" in lines
    assert "round 2: south refused: the site did not answer before the deadline" in lines
    assert "round 1: validation AUROC 0.710 (north 0.750, south -)" in lines
    assert lines[-2:] == ["model of round 2: test AUROC 0.812", "run completed, result: model of round 2"]


def test_json_lines_are_the_events(capsys: pytest.CaptureFixture[str]) -> None:
    events = [*a_story(until=1), *an_end(42, "stopped")]

    status = watch(events, plan=a_plan(), json_lines=True)

    lines = capsys.readouterr().out.splitlines()
    assert status == "stopped"
    assert [Event.model_validate_json(line) for line in lines] == events
    assert json.loads(lines[0])["fields"] == {"status": "waiting", "reason": ""}


def test_live_screen_is_drawn_on_a_terminal_and_stays() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)

    status = watch(
        [*a_story(until=3), *an_end(42)],
        plan=a_plan(rounds=3),
        json_lines=False,
        console=console,
        now=lambda: at(50),
    )

    file = console.file
    assert isinstance(file, io.StringIO)
    assert status == "completed"
    assert "test AUROC 0.81" in file.getvalue().rpartition("elapsed")[2]


def test_events_that_break_off_leave_the_run_going() -> None:
    console = Console(file=io.StringIO())

    assert watch(a_story(), plan=a_plan(), json_lines=False, console=console) == "running"
