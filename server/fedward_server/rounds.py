"""One run, round after round (hop 9): select, send, collect, admit, aggregate, evaluate, record.

A round exists once its checkpoint and its record are on disk; a crash at any point leaves the last such
round to continue from. The sum over sites is exact, so neither the order of arrival nor the number of
sites changes the result's bits or the memory it takes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from numpy.typing import NDArray

from fedward_common import weights
from fedward_common.aggregation import RunningSum
from fedward_common.envelope import SplitName
from fedward_common.errors import CheckpointError, RefusalCode, RunFailedError
from fedward_common.evaluation.state import MetricSummary, State, empty_state, merge, summarise
from fedward_common.plan import SignedPlan, TrainingPlan
from fedward_common.registry import STRATEGIES
from fedward_common.weights import Weights
from fedward_server.admission import Answer
from fedward_server.fleet import Fleet, Question
from fedward_server.gathering import gather, no_quorum, pause
from fedward_server.runs import RoundRecord, SiteRecord

StrategyState = dict[str, NDArray[Any]]
_log = logging.getLogger(__name__)


class Recorder(Protocol):
    """Where a run leaves its traces; durable before it returns."""

    def event(self, kind: str, fields: dict[str, Any]) -> None:
        """Tell whoever watches."""

    def commit(self, model: GlobalModel, record: RoundRecord, keep: int) -> None:
        """Write checkpoint and record, naming the checkpoint in the record; never prune round `keep`."""

    def model_of(self, round_index: int) -> GlobalModel:
        """Read a committed round's model back."""


@dataclass(frozen=True)
class GlobalModel:
    """The global model after a round, with everything the next round depends on."""

    round_index: int
    values: Weights
    strategy_state: StrategyState


@dataclass(frozen=True)
class Measurement:
    """Metrics of one model on one split, global and per site (None: held back or not answered)."""

    total: MetricSummary | None
    sites: dict[str, MetricSummary | None]


@dataclass
class RunOutcome:
    """What a finished run found."""

    selected_round: int
    initial_digest: str
    test: Measurement
    local: dict[str, MetricSummary | None] = field(default_factory=dict)


class RoundLoop:
    """Runs a plan to its end on a fleet."""

    def __init__(self, fleet: Fleet, signed: SignedPlan, recorder: Recorder) -> None:
        self._fleet = fleet
        self._signed = signed
        self._plan: TrainingPlan = signed.plan
        self._layout = signed.body.layout
        self._recorder = recorder
        self._strategy = STRATEGIES.load(self._plan.strategy.name)

    def run(self, start: GlobalModel, initial: Weights, history: list[RoundRecord]) -> RunOutcome:
        """Train from `start` to the plan's last round, then measure the selected model.

        Args:
            start: round 0 for a new run, the last committed round for a resumed one.
            initial: the untrained model, from which the local comparison starts.
            history: records of the rounds committed so far.

        Raises:
            RunFailedError: fewer sites than the quorum.
            RunStoppedError: somebody stopped the run.
        """
        model = start
        gather(self._fleet, self._plan.participation, self._recorder.event)
        if model.round_index == 0 and self._plan.evaluation.initial:
            self._measure(model, 0, "validation")
        while model.round_index < self._plan.rounds:
            model, record = self._round(model)
            history = [*history, record]
            self._recorder.commit(model, record, keep=self._selected(history))
            self._recorder.event("round_committed", {"round": record.round_index, "seconds": record.seconds})
        return self._finish(model, initial, history)

    def _round(self, model: GlobalModel) -> tuple[GlobalModel, RoundRecord]:
        started, clock = datetime.now(UTC), time.monotonic()
        index = model.round_index + 1
        base = weights.pack(model.values, self._layout)
        online = self._await_quorum(index)
        self._recorder.event("round_started", {"round": index, "sites": sorted(online)})
        total = RunningSum(
            self._layout, max_abs=self._plan.privacy.max_abs, max_cases=self._plan.privacy.max_cases
        )
        sites: list[SiteRecord] = []
        question = Question("train", index, base, self._plan.participation.deadline_s)
        for answer in self._fleet.ask(self._fleet.roster, question, online):
            seconds = round(time.monotonic() - clock, 3)
            if answer.ok and answer.delta is not None and answer.numbers.num_cases is not None:
                total.add(answer.delta, answer.numbers.num_cases, answer.largest)
            sites.append(_site_record(answer, seconds, len(base)))
            self._tell_update(index, answer, seconds)
        if total.num_sites < self._plan.participation.quorum:
            absent = {site.site: site.code for site in sites if site.status != "contributed"}
            raise self._no_quorum(f"round {index}", total.num_sites, absent)
        self._recorder.event(
            "aggregated", {"round": index, "num_sites": total.num_sites, "num_cases": total.num_cases}
        )
        values, state = self._strategy.server_step(
            model.values, total.mean(), model.strategy_state, self._plan.strategy.options, self._layout
        )
        after = GlobalModel(index, values, state)
        measured = self._measure_if_due(after)
        record = RoundRecord(
            round_index=index,
            base_digest=weights.digest(base),
            weights_digest=weights.digest(weights.pack(values, self._layout)),
            started_at=started,
            seconds=round(time.monotonic() - clock, 3),
            sites=tuple(sorted(sites, key=lambda site: site.site)),
            validation=_dump(measured.total),
            validation_sites={name: _dump(summary) for name, summary in measured.sites.items()},
            checkpoint_file="",
            checkpoint_sha256="",
        )
        return after, record

    def _measure_if_due(self, model: GlobalModel) -> Measurement:
        every, last = self._plan.evaluation.every, model.round_index == self._plan.rounds
        if model.round_index % every == 0 or last:
            return self._measure(model, model.round_index, "validation")
        return Measurement(None, {})

    def _measure(self, model: GlobalModel, round_index: int, split: SplitName) -> Measurement:
        """Have every connected site measure the model on its own held-out cases, and add the counts."""
        payload = weights.pack(model.values, self._layout)
        deadline = self._plan.participation.deadline_s
        question = Question("evaluate", round_index, payload, deadline, split)
        measured = self._collect(question)
        self._recorder.event(
            "evaluated",
            {
                "round": round_index,
                "split": split,
                "global": _dump(measured.total),
                "sites": {name: _dump(summary) for name, summary in measured.sites.items()},
            },
        )
        return measured

    def _collect(self, question: Question) -> Measurement:
        states = []
        sites: dict[str, MetricSummary | None] = {}
        online = self._fleet.online()
        for answer in self._fleet.ask(sorted(online), question, online):
            sites[answer.site] = None
            if not answer.ok:
                refused = {"round": question.round_index, "site": answer.site, "code": int(answer.code)}
                self._recorder.event("site_refused", refused)
            if answer.state is not None:
                states.append(answer.state)
                sites[answer.site] = self._summary(answer.state, question)
        total = self._summary(merge([empty_state(self._plan), *states]), question) if states else None
        return Measurement(total, dict(sorted(sites.items())))

    def _summary(self, state: State, question: Question) -> MetricSummary:
        """Figures of a state; only the final test's keep the points of the ROC curve."""
        return summarise(state, self._plan, num_roc_points=101 if question.split == "test" else 0)

    def _finish(self, model: GlobalModel, initial: Weights, history: list[RoundRecord]) -> RunOutcome:
        chosen = self._chosen(model, history)
        payload = weights.pack(initial, self._layout)
        tested = self._measure(chosen, chosen.round_index, "test")
        outcome = RunOutcome(chosen.round_index, weights.digest(payload), tested)
        if self._plan.evaluation.compare_local:
            deadline = self._plan.participation.deadline_s * self._plan.rounds
            outcome.local = self._collect(Question("baseline", 0, payload, deadline, "test")).sites
        return outcome

    def _chosen(self, model: GlobalModel, history: list[RoundRecord]) -> GlobalModel:
        """The selected round's model; when its checkpoint is lost, the best of those that are left."""
        left = history
        while (selected := self._selected(left)) != model.round_index:
            try:
                return self._recorder.model_of(selected)
            except CheckpointError:
                _log.warning("selected_model_lost", extra={"round": selected})
                left = [record for record in left if record.round_index != selected]
        return model

    def _selected(self, history: list[RoundRecord]) -> int:
        """The round whose model is the result: best validation AUROC, the earlier one on a tie."""
        best, best_score = history[-1].round_index, -1.0
        if self._plan.evaluation.select == "best":
            for record in history:
                score = (record.validation or {}).get("auroc")
                if isinstance(score, int | float) and score > best_score:
                    best, best_score = record.round_index, float(score)
        return best

    def _tell_update(self, index: int, answer: Answer, seconds: float) -> None:
        if answer.ok:
            fields = {
                "round": index,
                "site": answer.site,
                "num_cases": answer.numbers.num_cases,
                "num_quarantined": answer.numbers.num_quarantined,
                "loss": answer.numbers.mean_loss,
                "seconds": seconds,
            }
            self._recorder.event("site_update", fields)
        else:
            fields = {"round": index, "site": answer.site, "code": int(answer.code)}
            self._recorder.event("site_refused", fields)

    def _await_quorum(self, index: int) -> dict[str, int]:
        """Give sites that are just reconnecting a moment, so that one lost connection ends no run."""
        until = time.monotonic() + min(60.0, self._plan.participation.deadline_s)
        while len(online := self._fleet.online()) < self._plan.participation.quorum:
            if time.monotonic() >= until:
                absent = {s: int(RefusalCode.SITE_OFFLINE) for s in self._fleet.roster if s not in online}
                raise self._no_quorum(f"round {index} could not begin", len(online), absent)
            pause(self._fleet, 0.5)
        return online

    def _no_quorum(self, what: str, num_sites: int, absent: Mapping[str, int]) -> RunFailedError:
        return no_quorum(what, num_sites, self._plan.participation.quorum, absent)


def first_model(signed: SignedPlan, initial: Weights) -> GlobalModel:
    """Round 0: the untrained model and the strategy's fresh state."""
    strategy = STRATEGIES.load(signed.plan.strategy.name)
    return GlobalModel(0, initial, strategy.initial_state(signed.body.layout))


def _site_record(answer: Answer, seconds: float, bytes_down: int) -> SiteRecord:
    unreached = answer.code in (RefusalCode.SITE_OFFLINE, RefusalCode.SITE_LATE, RefusalCode.SITE_LOST)
    return SiteRecord(
        site=answer.site,
        status="contributed" if answer.ok else "missing" if unreached else "refused",
        code=int(answer.code),
        num_cases=answer.numbers.num_cases or 0,
        num_quarantined=answer.numbers.num_quarantined,
        loss=answer.numbers.mean_loss,
        seconds=seconds,
        bytes_up=answer.payload_bytes,
        bytes_down=0 if answer.code is RefusalCode.SITE_OFFLINE else bytes_down,
    )


def _dump(summary: MetricSummary | None) -> dict[str, Any] | None:
    return None if summary is None else summary.model_dump(mode="json")
