"""From the record of a survey to its report, and from the report to the coordinator's screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedward_common.evaluation.report import AbsentSite, Provenance
from fedward_common.evaluation.state import merge
from fedward_common.plan import SignedPlan
from fedward_common.readiness_plan import ReadinessPlan
from fedward_common.readiness_state import State, empty_survey, survey_layout, survey_tables
from fedward_server.readiness_report import Decision, ReadinessReport, SiteReadiness
from fedward_server.readiness_rules import compare, judge_site
from fedward_server.run_records import RunInfo


def readiness_report(
    info: RunInfo, signed: SignedPlan, plan: ReadinessPlan, result: Mapping[str, Any], provenance: Provenance
) -> ReadinessReport:
    """Judge what sites released.

    Args:
        info: the run.
        signed: its plan as signed.
        plan: its content.
        result: what `SurveyOutcome.document` gave; empty before the survey has ended.
        provenance: where it comes from.
    """
    states = {site: _state(counts, plan) for site, counts in dict(result.get("states", {})).items()}
    sites = judged(states, plan)
    total = merge([empty_survey(plan), *(state for state in states.values() if state is not None)])
    return ReadinessReport(
        verdict=info.status,
        reason=info.reason,
        decision=decision_of(sites) if info.status == "completed" else "no-go",
        run_id=info.run_id,
        name=plan.name,
        created_at=info.created_at,
        finished_at=info.finished_at,
        seconds=0.0 if info.finished_at is None else (info.finished_at - info.created_at).total_seconds(),
        sites=sites,
        absent=tuple(
            AbsentSite(site=site, code=code) for site, code in sorted(dict(result.get("absent", {})).items())
        ),
        counts=_counts(total),
        tables=survey_tables(plan),
        plan=plan,
        plan_digest=signed.digest,
        provenance=provenance,
    )


def judged(states: Mapping[str, State | None], plan: ReadinessPlan) -> tuple[SiteReadiness, ...]:
    """Hold every site's counts against the plan's rules."""
    told = {site: state for site, state in states.items() if state is not None}
    comparisons = compare(told, plan)
    return tuple(
        SiteReadiness(
            site=site,
            counts=None if state is None else _counts(state),
            comparison=comparisons.get(site),
            reasons=tuple(judge_site(site, state, plan, comparisons.get(site))),
        )
        for site, state in sorted(states.items())
    )


def decision_of(sites: tuple[SiteReadiness, ...]) -> Decision:
    """Go when every site that answered, and there is one, meets every rule."""
    return "go" if sites and all(site.decision == "go" for site in sites) else "no-go"


def terminal_rows(report: ReadinessReport) -> list[tuple[str, ...]]:
    """Rows for a terminal, the first with the column names."""
    labels = report.plan.task.labels
    rows: list[tuple[str, ...]] = [("Site", "Decision", "Cases", "Patients", *labels)]
    for site in report.sites:
        rows.append((site.site, site.decision, *_figures(site.counts, len(labels))))
    return [*rows, ("All sites", report.decision, *_figures(report.counts, len(labels)))]


def terminal_notes(report: ReadinessReport) -> list[str]:
    """Lines below the table: every reason, site by site, and who is absent."""
    reasons = [reason for site in report.sites for reason in site.reasons]
    notes = []
    for each in reasons:
        notes.append(f"{'x' if each.level == 'stop' else '-'} {each.site}: {each.text}")
        notes += [f"    {each.remedy}"] * bool(each.remedy)
    notes += [f"- {absent.site}: {absent.reason}" for absent in report.absent]
    return [*notes, "A dash in the table: held back, or none."]


def _figures(counts: Mapping[str, tuple[int, ...]] | None, num_labels: int) -> tuple[str, ...]:
    if counts is None:
        return ("–",) * (2 + num_labels)
    numbers = (*counts["num_cases"], *counts["num_patients"], *counts["label"])
    return tuple(f"{number:,}" if number else "–" for number in numbers)


def _counts(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(int(count) for count in array) for name, array in state.items()}


def _state(counts: Any, plan: ReadinessPlan) -> State | None:
    if counts is None:
        return None
    return {name: np.array(counts[name], dtype=np.int64) for name in survey_layout(plan)}
