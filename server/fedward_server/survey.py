"""One survey of all sites: gather them, ask each for its counts once, keep what was released.

The run of a readiness plan. There is no model and no round: what the sites answer is recorded site by site,
and `readiness_rules` decides on it. Asking again, after a server's restart, brings the same answers, because
a site keeps the one that it gave.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from fedward_common.plan import ReadinessPlan
from fedward_common.readiness_state import State
from fedward_server.fleet import Fleet, Question
from fedward_server.gathering import gather, no_quorum
from fedward_server.readiness_reporting import decision_of, judged


@dataclass(frozen=True)
class SurveyOutcome:
    """What the sites answered.

    Attributes:
        states: released counts by site; None where a site holds everything back.
        absent: code of each site that gave no answer.
    """

    states: dict[str, State | None]
    absent: dict[str, int]

    def document(self) -> dict[str, JsonValue]:
        """What the run store keeps; read back by `readiness_reporting.readiness_report`."""
        states: dict[str, JsonValue] = {
            site: None if state is None else {name: array.tolist() for name, array in state.items()}
            for site, state in self.states.items()
        }
        return {"states": states, "absent": dict(self.absent)}


def run_survey(
    fleet: Fleet, plan: ReadinessPlan, tell: Callable[[str, dict[str, Any]], None]
) -> SurveyOutcome:
    """Survey every site of the fleet.

    Args:
        fleet: the run's sites.
        plan: what is asked.
        tell: takes an event for whoever watches.

    Raises:
        RunFailedError: fewer sites than the quorum answered.
        RunStoppedError: somebody stopped the run.
    """
    gather(fleet, plan.participation, tell)
    clock = time.monotonic()
    states: dict[str, State | None] = {}
    absent: dict[str, int] = {}
    question = Question("survey", 0, None, plan.participation.deadline_s)
    for answer in fleet.ask(fleet.roster, question):
        if answer.ok:
            states[answer.site] = answer.state
            seconds = round(time.monotonic() - clock, 3)
            told = {"site": answer.site, "num_cases": answer.numbers.num_cases, "seconds": seconds}
            tell("site_surveyed", told)
        else:
            absent[answer.site] = int(answer.code)
            tell("site_refused", {"round": 0, "site": answer.site, "code": int(answer.code)})
    if len(states) < plan.participation.quorum:
        raise no_quorum("the survey", len(states), plan.participation.quorum, absent)
    sites = judged(states, plan)
    reasons = [reason.model_dump(mode="json") for site in sites for reason in site.reasons]
    tell("judged", {"decision": decision_of(sites), "reasons": reasons})
    return SurveyOutcome(dict(sorted(states.items())), dict(sorted(absent.items())))
