"""When and how a simulation says what failed at which site."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedward_common.errors import RefusalCode
from fedward_server.run_records import Event
from fedward_server.simulated_failures import tell_failures
from tests.server.run_builders import an_event


@dataclass(frozen=True)
class Failed:
    site: str
    round_index: int | None = 1
    action: str = "train"
    code: RefusalCode | None = RefusalCode.TRAINING_FAILED
    where: str = "RuntimeError:fedward_client.trainer:120"
    what: str = ""
    log: Path = Path("out/site.log")


@dataclass
class Logs:
    """What the sites have written down and nobody has read yet."""

    unread: dict[str, list[Failed]]
    looked: list[str] = field(default_factory=list)

    @property
    def sites(self) -> list[str]:
        return sorted(self.unread)

    def new(self, site: str) -> Sequence[Failed]:
        self.looked.append(site)
        found, self.unread[site] = self.unread[site], []
        return found


EVENTS = [
    an_event("status", second=0, status="running", reason=""),
    an_event("sites", second=1, ready=["north"], waiting={"south": 30}),
    an_event("site_update", second=2, round=1, site="north", num_cases=3, loss=0.4, seconds=4),
    an_event("site_refused", second=3, round=1, site="west", code=40),
    an_event("finished", second=4, status="completed", reason="", selected_round=1),
]


def test_failure_is_told_right_after_the_event_that_mentions_its_site(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs = Logs({name: [Failed(name)] for name in ("north", "south", "west")})
    told = []
    passed: list[Event] = []
    for event in tell_failures(EVENTS, logs, as_json=False):
        told.append([line.split(",")[0] for line in capsys.readouterr().err.splitlines()[::2]])
        passed.append(event)
    told.append([line.split(",")[0] for line in capsys.readouterr().err.splitlines()[::2]])

    assert passed == EVENTS
    assert told == [[], [], ["south"], [], ["west"], ["north"]]
    assert logs.looked[:2] == ["south", "west"]


def test_words_name_site_round_meaning_matter_place_and_log(capsys: pytest.CaptureFixture[str]) -> None:
    failure = Failed("south", code=RefusalCode.COHORT_UNUSABLE, what="row 3\x1b[2J: twice")

    list(tell_failures([], Logs({"south": [failure]}), as_json=False))

    assert capsys.readouterr().err.splitlines() == [
        "south, round 1, train: the site's images or labels cannot be used for this plan",
        "  row 3 [2J: twice",
        "  at RuntimeError:fedward_client.trainer:120; more in out/site.log",
    ]


def test_failure_without_an_answer_is_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    failure = Failed("south", round_index=None, action="answer_withheld", code=None)

    list(tell_failures([], Logs({"south": [failure]}), as_json=False))

    assert capsys.readouterr().err.startswith("south, answer_withheld: no answer was given\n")


def test_failures_for_programs_are_a_json_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    list(tell_failures([], Logs({"south": [Failed("south"), Failed("south", code=None)]}), as_json=True))

    printed = capsys.readouterr()
    first, second = map(json.loads, printed.err.splitlines())
    assert printed.out == ""
    assert (first["site"], first["code"], first["log"]) == ("south", 40, "out/site.log")
    assert second["code"] is None


def test_screen_is_not_flooded_when_every_site_fails(capsys: pytest.CaptureFixture[str]) -> None:
    logs = Logs({f"site-{index}": [Failed(f"site-{index}")] for index in range(500)})

    list(tell_failures([], logs, as_json=False))

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 * 20 + 1
    assert lines[-1] == "and 480 more failures; see the sites' logs"


def test_event_about_a_site_that_is_not_simulated_here_is_passed_on() -> None:
    assert list(tell_failures(EVENTS, Logs({}), as_json=False)) == EVENTS
