"""Builders for tests of surveys: readiness plans, surveyed cases, released states."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedward_client.cohort import Case
from fedward_client.labels import SPLITS
from fedward_client.pseudonyms import CaseId
from fedward_client.readiness import SurveyedCase, released, weighted
from fedward_common.plan import ReadinessPlan, SignedPlan, parse_any_plan, readiness_plan
from fedward_common.readiness_state import State
from tests.messages import signed

SCANNERS = ("SIEMENS FD-X", "GE DISCOVERY XR656", "UNHEARD-OF 1", "unknown")


def a_readiness_plan(**changes: Any) -> ReadinessPlan:
    """A plan with few cells; keyword tables are merged over the defaults."""
    document: dict[str, Any] = {
        "kind": "readiness",
        "name": "survey",
        "participation": {"quorum": 2, "deadline_s": 60, "gather_s": 30},
        "task": {"labels": ("normal", "pneumonia")},
        "survey": {"scanners": ("GE", "SIEMENS"), "intensity": {"bins": 4}},
        "privacy": {"min_cases": 5, "max_cases": 10_000},
    }
    for name, change in changes.items():
        default = document.get(name)
        document[name] = {**default, **change} if isinstance(default, dict) else change
    return readiness_plan(parse_any_plan(document))


def signed_survey(plan: ReadinessPlan | None = None) -> SignedPlan:
    """The plan in the form of a signed one."""
    return signed(plan or a_readiness_plan(), layout=())


def surveyed(number: int, patient: int, plan: ReadinessPlan, seed: int = 0, **facts: Any) -> SurveyedCase:
    """A case that depends on its number and patient; `facts` replaces fields of the case."""
    random = np.random.default_rng([seed, patient, number])
    content = hashlib.sha256(f"{seed}|{patient}|{number}".encode()).hexdigest()
    told: dict[str, Any] = {
        "label": int(random.integers(len(plan.task.labels))),
        "split": SPLITS[int(np.random.default_rng([seed, patient, 0, 1]).integers(3))],
        "modality": "DX",
        "study_year": 2020,
        "sex": ("F", "M", "O", None)[int(random.integers(4))],
        "age_years": int(random.integers(0, 100)),
        "scanner": SCANNERS[int(random.integers(len(SCANNERS)))],
        "spacing_mm": (0.14, float(random.choice([0.1, 0.14, 0.25]))),
    }
    case = Case(case_id=CaseId(content[:32]), content=content, patient=f"p{patient}", **(told | facts))
    pixels = random.integers(0, 50, plan.survey.intensity.bins + 2)
    pixels[1] += 1
    return SurveyedCase(case, weighted(pixels), content.encode())


def some_cases(
    num_patients: int, plan: ReadinessPlan, *, seed: int = 0, cases_a_patient: int = 2, **facts: Any
) -> list[SurveyedCase]:
    """Cases of several patients."""
    return [
        surveyed(number, patient, plan, seed, **facts)
        for patient in range(num_patients)
        for number in range(cases_a_patient)
    ]


def a_survey(
    plan: ReadinessPlan, cases: Sequence[SurveyedCase] | None = None, *, num_refused: int = 0, seed: int = 0
) -> State:
    """What a site of sixty patients, or with these cases, releases."""
    found = some_cases(60, plan, seed=seed) if cases is None else cases
    return released(plan, found, num_refused=num_refused, floor=plan.privacy.min_cases)
