"""What the events of a run add up to: which round, which sites, how good, how long still.

A plain fold: `apply(progress, event)` returns the next progress and changes nothing, so a screen may be
drawn from one thread while events arrive in another, and a watcher who joins late sees the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from statistics import median
from typing import Any, Literal

from fedward_server.run_records import ENDED, Event, RunStatus

SiteState = Literal["unknown", "ready", "waiting", "training", "contributed", "refused"]
_RECENT = 3


@dataclass(frozen=True)
class SiteProgress:
    """One site as last heard of; None where nothing is known."""

    state: SiteState = "unknown"
    code: int = 0
    num_cases: int | None = None
    num_quarantined: int | None = None
    loss: float | None = None
    auroc: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class RoundProgress:
    """One round: mean loss of its contributions weighted by cases, AUROC on the validation split."""

    index: int
    num_sites: int = 0
    loss: float | None = None
    auroc: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Progress:
    """The state of a run.

    Attributes:
        rounds_total: rounds in the plan.
        rounds_after: the work after the last round, as a number of rounds: final test and comparison.
        mark: when the current round, or what follows the last one, began.
        decision: of a survey, "go" or "no-go"; empty before and otherwise.
    """

    rounds_total: int
    rounds_after: float = 1.0
    status: RunStatus = "waiting"
    reason: str = ""
    started_at: datetime | None = None
    last_at: datetime | None = None
    mark: datetime | None = None
    round_index: int = 0
    committed: int = 0
    sites: Mapping[str, SiteProgress] = field(default_factory=dict)
    rounds: tuple[RoundProgress, ...] = ()
    test_auroc: float | None = None
    selected_round: int | None = None
    decision: str = ""

    def elapsed_s(self, now: datetime) -> float:
        """Seconds since the first event; up to the last one once the run has ended."""
        if self.started_at is None:
            return 0.0
        end = self.last_at if self.status in ENDED and self.last_at else now
        return max(0.0, (end - self.started_at).total_seconds())

    def left_s(self, now: datetime) -> float | None:
        """Estimated seconds to the end, from the last rounds; None before the first round is over."""
        recent = [line.seconds for line in self.rounds if line.seconds is not None][-_RECENT:]
        if not recent or self.status in ENDED:
            return None
        ahead = median(recent) * (self.rounds_total - self.committed + self.rounds_after)
        since = (now - self.mark).total_seconds() if self.mark else 0.0
        return max(0.0, ahead - max(0.0, since))


def apply(progress: Progress, event: Event) -> Progress:
    """Return the progress after one more event."""
    started_at = progress.started_at or event.at
    known = replace(progress, started_at=started_at, last_at=event.at)
    return _STEPS[event.kind](known, event.fields, event.at)


def _status(progress: Progress, fields: Mapping[str, Any], at: datetime) -> Progress:
    return replace(progress, status=fields["status"], reason=fields.get("reason", ""), mark=at)


def _sites(progress: Progress, fields: Mapping[str, Any], _: datetime) -> Progress:
    told = {name: SiteProgress("ready") for name in fields["ready"]}
    told |= {name: SiteProgress("waiting", code=int(code)) for name, code in fields["waiting"].items()}
    return replace(progress, sites={**progress.sites, **told})


def _round_started(progress: Progress, fields: Mapping[str, Any], at: datetime) -> Progress:
    sites = dict(progress.sites)
    for name in fields["sites"]:
        sites[name] = replace(sites.get(name, SiteProgress()), state="training", code=0)
    index = int(fields["round"])
    rounds = (*(line for line in progress.rounds if line.index < index), RoundProgress(index))
    return replace(progress, round_index=index, mark=at, sites=sites, rounds=rounds)


def _site_update(progress: Progress, fields: Mapping[str, Any], _: datetime) -> Progress:
    site = replace(
        progress.sites.get(fields["site"], SiteProgress()),
        state="contributed",
        code=0,
        num_cases=fields["num_cases"],
        num_quarantined=fields.get("num_quarantined"),
        loss=fields["loss"],
        seconds=fields["seconds"],
    )
    return replace(progress, sites={**progress.sites, fields["site"]: site})


def _site_refused(progress: Progress, fields: Mapping[str, Any], _: datetime) -> Progress:
    site = replace(
        progress.sites.get(fields["site"], SiteProgress()), state="refused", code=int(fields["code"])
    )
    return replace(progress, sites={**progress.sites, fields["site"]: site})


def _aggregated(progress: Progress, fields: Mapping[str, Any], _: datetime) -> Progress:
    gave = [site for site in progress.sites.values() if site.state == "contributed"]
    weighed = [(site.loss, site.num_cases) for site in gave if site.loss is not None and site.num_cases]
    num_cases = sum(cases for _, cases in weighed)
    loss = sum(loss * cases for loss, cases in weighed) / num_cases if num_cases else None
    return _on_round(progress, int(fields["round"]), num_sites=int(fields["num_sites"]), loss=loss)


def _evaluated(progress: Progress, fields: Mapping[str, Any], _: datetime) -> Progress:
    total = (fields["global"] or {}).get("auroc")
    if fields["split"] == "test":
        return replace(progress, test_auroc=total)
    sites = dict(progress.sites)
    for name, summary in fields["sites"].items():
        sites[name] = replace(sites.get(name, SiteProgress()), auroc=(summary or {}).get("auroc"))
    return _on_round(replace(progress, sites=sites), int(fields["round"]), auroc=total)


def _round_committed(progress: Progress, fields: Mapping[str, Any], at: datetime) -> Progress:
    index = int(fields["round"])
    return _on_round(replace(progress, committed=index, mark=at), index, seconds=float(fields["seconds"]))


def _site_surveyed(progress: Progress, fields: Mapping[str, Any], _: datetime) -> Progress:
    site = SiteProgress("contributed", num_cases=fields["num_cases"], seconds=fields["seconds"])
    return replace(progress, sites={**progress.sites, fields["site"]: site})


def _judged(progress: Progress, fields: Mapping[str, Any], _: datetime) -> Progress:
    return replace(progress, decision=str(fields["decision"]))


def _finished(progress: Progress, fields: Mapping[str, Any], _: datetime) -> Progress:
    return replace(
        progress,
        status=fields["status"],
        reason=fields.get("reason", ""),
        selected_round=fields.get("selected_round"),
    )


def _on_round(progress: Progress, index: int, **known: Any) -> Progress:
    """Add what is known to a round's line, which is made when it is new (the untrained model is round 0)."""
    lines = {line.index: line for line in progress.rounds}
    lines[index] = replace(lines.get(index, RoundProgress(index)), **known)
    return replace(progress, rounds=tuple(lines[key] for key in sorted(lines)))


_STEPS: dict[str, Callable[[Progress, Mapping[str, Any], datetime], Progress]] = {
    "status": _status,
    "sites": _sites,
    "round_started": _round_started,
    "site_update": _site_update,
    "site_refused": _site_refused,
    "aggregated": _aggregated,
    "evaluated": _evaluated,
    "round_committed": _round_committed,
    "site_surveyed": _site_surveyed,
    "judged": _judged,
    "finished": _finished,
}
