"""Wait for a run's sites: until all are ready, or the plan's patience ends with a quorum."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from fedward_common.errors import RefusalCode, RunFailedError
from fedward_common.plan import Participation
from fedward_server.fleet import Fleet, Question, RunStoppedError

_APPROVAL_PAUSE_S = 1.0

NEVER_READY = frozenset(
    {
        RefusalCode.PLAN_SIGNATURE,
        RefusalCode.PLAN_FEDERATION,
        RefusalCode.PLAN_EXPIRED,
        RefusalCode.PLAN_REPLAYED,
        RefusalCode.PLAN_UNSUPPORTED,
        RefusalCode.COHORT_UNUSABLE,
        RefusalCode.COHORT_TOO_SMALL,
    }
)
"""What a site says that no waiting changes; an approval, or a site that is away, may still come."""


def gather(fleet: Fleet, part: Participation, tell: Callable[[str, dict[str, Any]], None]) -> None:
    """Wait until every site of the roster is ready, or the plan's patience ends with a quorum.

    Args:
        fleet: the run's sites.
        part: the plan's patience and quorum.
        tell: takes an event for whoever watches.

    Raises:
        RunFailedError: fewer sites than the quorum were ready in time, or can ever be.
        RunStoppedError: somebody stopped the run.
    """
    if len(fleet.roster) < part.quorum:
        raise RunFailedError(
            f"the plan asks for {part.quorum} sites, and {len(fleet.roster)} are there",
            remedy="Sign a plan whose participation.quorum is no larger, or add sites first.",
        )
    until = time.monotonic() + part.gather_s
    ready: set[str] = set()
    told: tuple[list[str], dict[str, int]] | None = None
    while True:
        missing = [site for site in fleet.roster if site not in ready]
        question = Question("prepare", 0, None, max(1.0, until - time.monotonic()))
        waiting: dict[str, int] = {}
        for answer in fleet.ask(missing, question):
            if answer.ok:
                ready.add(answer.site)
            else:
                waiting[answer.site] = int(answer.code)
        if (now := (sorted(ready), waiting)) != told:
            told = now
            tell("sites", {"ready": now[0], "waiting": waiting})
        possible = len(fleet.roster) - sum(1 for code in waiting.values() if code in NEVER_READY)
        if not waiting or possible < part.quorum or time.monotonic() >= until:
            break
        pause(fleet, _APPROVAL_PAUSE_S)
    if len(ready) < part.quorum:
        raise no_quorum("the run could not start", len(ready), part.quorum, waiting)


def pause(fleet: Fleet, seconds: float) -> None:
    """Wait; RunStoppedError when the run is to end meanwhile."""
    if fleet.stopping(seconds):
        raise RunStoppedError


def no_quorum(what: str, num_sites: int, quorum: int, absent: Mapping[str, int]) -> RunFailedError:
    """The error for too few sites, which names the absent ones and why they are."""
    named = "; ".join(f"{site}: {RefusalCode(code).meaning}" for site, code in sorted(absent.items()))
    return RunFailedError(
        f"{what}: {num_sites} of at least {quorum} sites ({named})",
        remedy="Bring the named sites back, then: fedward run resume RUN",
    )
