"""Reports of made-up runs, with metrics from real counting, for tests of the page and its pictures."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import numpy as np

from fedward_common.evaluation.report import AbsentSite, Provenance, RoundReport, RunReport, SiteRound
from fedward_common.evaluation.state import MetricSummary, State, merge, state_of, summarise, suppress
from fedward_common.plan import TrainingPlan, parse_plan

START = datetime(2026, 5, 4, 9, 30, tzinfo=UTC)
HOSPITALS = (
    *("st-anna", "nordklinik", "uz-meer", "hopital-du-lac", "city-general", "santa-lucia", "riverside"),
    *("kantonsspital", "tartu-kliinikum", "princess-margaret-memorial", "oslo-vest", "ospedale-maggiore"),
)


def a_plan(
    *, rounds: int = 5, labels: Iterable[str] = ("NORMAL", "PNEUMONIA"), quorum: int = 2
) -> TrainingPlan:
    return parse_plan(
        {
            "name": "chest-pneumonia",
            "description": "Pneumonia on chest radiographs of three hospitals.",
            "federation_id": "5d0c1f0e",
            "expires": START + timedelta(days=30),
            "rounds": rounds,
            "participation": {"quorum": quorum},
            "task": {"labels": list(labels)},
            "model": {"name": "cnn2d", "options": {"channels": [16, 32, 64], "dropout": 0.2}},
            "transforms": {"size": [28, 28], "augmentation": {"rotate_degrees": 10, "zoom": 0.1}},
            "training": {"learning_rate": 0.05, "batch_size": 32},
        }
    )


def a_state(plan: TrainingPlan, *, cases: int, skill: float, seed: int, positives: float = 0.6) -> State:
    """Count made-up predictions: `skill` moves the true label's logit up."""
    random, num_labels = np.random.default_rng(seed), len(plan.task.labels)
    shares = [1 - positives] + [positives / (num_labels - 1)] * (num_labels - 1)
    labels = random.choice(num_labels, size=cases, p=shares)
    logits = random.normal(size=(cases, num_labels)) + skill * np.eye(num_labels)[labels]
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return state_of(scores, labels, plan)


def a_report(
    *,
    num_sites: int = 3,
    rounds: int = 5,
    labels: Iterable[str] = ("NORMAL", "PNEUMONIA"),
    without_positives: Iterable[str] = (),
    too_few_cases: Iterable[str] = (),
    absent: dict[tuple[str, int], int] | None = None,
    names: tuple[str, ...] = HOSPITALS,
) -> RunReport:
    """Report of a completed run.

    Args:
        without_positives: sites whose cases all are negative.
        too_few_cases: sites whose counts are held back.
        absent: (site, round) -> RefusalCode.
    """
    plan, sites = a_plan(rounds=rounds, labels=labels), names[:num_sites]
    small, negative = set(too_few_cases), set(without_positives)

    def measure(
        skill: float, cases: int, seed: int
    ) -> tuple[MetricSummary | None, dict[str, MetricSummary | None]]:
        counted = {}
        for index, site in enumerate(sites):
            state = a_state(
                plan,
                cases=3 if site in small else cases + 37 * index,
                skill=skill - 0.12 * (index % 4),
                seed=seed + index,
                positives=0.0 if site in negative else 0.6,
            )
            counted[site] = suppress(state, plan)
        released = [state for state in counted.values() if state is not None]
        each = {site: summarise(state, plan) if state else None for site, state in counted.items()}
        return (summarise(merge(released), plan) if released else None), each

    reports = []
    for index in range(1, rounds + 1):
        total, per_site = measure(0.3 + 1.5 * (1 - 0.6**index), 60, 7)
        told = tuple(a_site_round(site, index, (absent or {}).get((site, index), 0)) for site in sites)
        reports.append(
            RoundReport(
                round_index=index,
                seconds=4.2 + index / 10,
                sites=told,
                weights_digest=f"{index:064x}"[::-1],
                validation=total,
                validation_sites=per_site,
            )
        )
    test, test_sites = measure(1.7, 160, 99)
    _, local_sites = measure(1.3, 160, 99)
    return RunReport(
        verdict="completed",
        run_id="r-20260504-0930-7f3a",
        name=plan.name,
        created_at=START,
        finished_at=START + timedelta(seconds=61),
        seconds=61.4,
        sites=sites,
        plan=plan,
        plan_digest="9f2c" * 16,
        rounds=tuple(reports),
        selected_round=max(1, rounds - 1),
        test=test,
        test_sites=test_sites,
        local_sites=local_sites,
        provenance=Provenance(
            federation="Chest imaging network",
            signer="dr-lind",
            data="synthetic chest phantoms",
            initial_weights_digest="ab12" * 16,
            model_file="round-00004-3fe01b7c2a90.safetensors",
            model_sha256="3fe0" * 16,
            versions={
                "fedward": "0.1.0",
                "python": "3.11.9",
                "torch": "2.13.0",
                "monai": "1.6.1",
                "flwr": "1.41.0",
            },
            machine="Linux x86-64, 2 cores, no accelerator",
        ),
    )


def a_site_round(site: str, round_index: int, code: int) -> SiteRound:
    if code:
        return SiteRound(site=site, status="missing" if code >= 70 else "refused", code=code)
    return SiteRound(
        site=site,
        status="contributed",
        num_cases=400 + len(site) * 11,
        loss=0.7 * 0.8**round_index,
        seconds=3.1 + len(site) / 20,
        bytes_up=412_000,
        bytes_down=411_000,
    )


def a_failed_report() -> RunReport:
    """Report of a run that lost its quorum in round 3."""
    full = a_report(absent={("st-anna", 2): 30, ("st-anna", 3): 71, ("uz-meer", 3): 70})
    lost = full.rounds[2].model_copy(
        update={"committed": False, "validation": None, "validation_sites": {}, "weights_digest": ""}
    )
    return full.model_copy(
        update={
            "verdict": "failed",
            "reason": "Round 3 had 1 of 3 sites; the plan's quorum is 2.",
            "rounds": (*full.rounds[:2], lost),
            "absent": (AbsentSite(site="st-anna", code=71), AbsentSite(site="uz-meer", code=70)),
            "selected_round": None,
            "test": None,
            "test_sites": {},
            "local_sites": {},
        }
    )
