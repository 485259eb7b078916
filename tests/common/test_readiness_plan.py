"""Readiness plans and released states: what is accepted, and that a state no site may release is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedward_common.errors import PayloadError, PlanError, PlanRefusedError, RefusalCode
from fedward_common.evaluation.state import merge
from fedward_common.plan import (
    ReadinessPlan,
    TrainingPlan,
    check_names,
    parse_any_plan,
    parse_plan,
    parse_signed_plan,
    read_any_plan,
    readiness_plan,
)
from fedward_common.readiness_state import (
    CASE_WEIGHT,
    State,
    check_survey,
    empty_survey,
    survey_layout,
    survey_tables,
)
from fedward_common.state_payload import pack_state, state_bytes, unpack_state
from tests.messages import a_plan
from tests.readiness_builders import a_readiness_plan, a_survey, signed_survey

PLAN = a_readiness_plan()
PLANS = Path(__file__).parents[2] / "deploy" / "plans"


def test_the_example_plan_is_a_readiness_plan_of_known_parts() -> None:
    plan = read_any_plan(PLANS / "readiness.toml")
    check_names(plan)
    assert isinstance(plan, ReadinessPlan)
    assert plan.rounds == 0


def test_a_plan_that_does_not_say_its_kind_trains() -> None:
    document = a_plan().model_dump()
    del document["kind"]
    assert isinstance(parse_any_plan(document), TrainingPlan)


def test_what_only_knows_training_refuses_a_readiness_plan() -> None:
    signed = signed_survey()
    assert signed.content == signed.body.plan
    with pytest.raises(PlanRefusedError, match="is a readiness plan") as refused:
        _ = signed.plan
    assert refused.value.code is RefusalCode.PLAN_UNSUPPORTED
    with pytest.raises(PlanRefusedError, match="is a readiness plan"):
        parse_plan(PLAN.model_dump())
    with pytest.raises(PlanRefusedError, match="is a training plan"):
        readiness_plan(a_plan())


def test_a_signed_readiness_plan_is_read_back_byte_for_byte() -> None:
    signed = signed_survey()
    assert parse_signed_plan(signed.to_bytes()) == signed
    changed = signed.to_bytes().replace(b'"min_cases":5', b'"min_cases":6')
    assert parse_signed_plan(changed).digest != signed.digest


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"kind": "gossip"}, "gossip"),
        ({"model": {"name": "cnn2d"}}, "model: Extra inputs"),
        ({"privacy": {"min_cases": 2}}, "privacy.min_cases: "),
        ({"survey": {"age_edges": [40, 18]}}, "age_edges must ascend"),
        ({"survey": {"spacing_edges_mm": [0.2, 0.2]}}, "spacing_edges_mm must ascend"),
        ({"survey": {"scanners": ["GE", "GE"]}}, "scanners must differ"),
        ({"survey": {"scanners": ["<b>"]}}, "survey.scanners.0: "),
        ({"survey": {"intensity": {"low": 1.0, "high": 1.0}}}, "low must be below high"),
        ({"survey": {"intensity": {"bins": 10**6}}}, "survey.intensity.bins: "),
        ({"survey": {"free_text": True}}, "free_text"),
        ({"rules": {"max_age_distance": 2}}, "rules.max_age_distance: "),
        ({"rules": {"max_age_distance": float("nan")}}, "rules.max_age_distance: "),
    ],
)
def test_a_plan_with_a_fault_is_refused_by_name(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(PlanError) as refused:
        a_readiness_plan(**changes)
    assert fault in refused.value.message


def test_a_dataset_without_a_survey_is_refused() -> None:
    plan = a_readiness_plan(data={"dataset": "tables"})
    with pytest.raises(PlanError, match="tables"):
        check_names(plan)


def test_tables_without_edges_are_left_out() -> None:
    plan = a_readiness_plan(survey={"age_edges": [], "scanners": [], "slice_edges_mm": [1.0, 5.0]})
    assert set(survey_tables(plan)) == {"label", "split", "sex", "spacing", "slice"}
    assert survey_tables(plan)["slice"] == ("below 1", "1 to 5", "5 and more", "unknown")


def test_states_travel_in_the_layout_of_the_plan() -> None:
    state = a_survey(PLAN)
    packed = pack_state(state, PLAN)
    assert (
        len(packed)
        == state_bytes(PLAN)
        == 8 * sum(int(np.prod(each)) for each in survey_layout(PLAN).values())
    )
    again = unpack_state(packed, PLAN)
    assert all((again[name] == state[name]).all() for name in state)
    with pytest.raises(PayloadError):
        unpack_state(packed[:-8], PLAN)


def test_a_site_s_state_is_admissible_and_adding_states_adds_every_number() -> None:
    states = [a_survey(PLAN, seed=seed) for seed in range(3)]
    for state in states:
        check_survey(state, PLAN)
    for order in (states, states[::-1]):
        total = merge([empty_survey(PLAN), *order])
        for name, array in total.items():
            assert (array == sum(state[name] for state in states)).all()


def test_a_state_that_says_nothing_is_admissible() -> None:
    check_survey(empty_survey(PLAN), PLAN)


def _set(name: str, *values: int) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name][: len(values)] = values

    return change


def _move(name: str, amount: int) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name][0] += amount

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("num_cases", 0),
        _set("num_cases", 10**6),
        _set("num_cases", -1),
        _set("num_patients", 4),
        _set("num_patients", 121),
        _set("label", 1),
        _set("label", 0),  # alone, so it is the total less the rest
        _move("label", 1),
        _move("split", -1),
        _set("label", 2**62, 2**62),
        _set("sex", 0, 0, 119),
        _set("torn", 3, 57),
        _set("torn", 0, 57),
        _set("repeated", 2, 118),
        _set("refused", 4),
        _set("label_patients", 60, 60),
        _set("num_patients", 119),  # one patient has two cases
        _set("intensity", -1),
        _set("intensity", 2**63 - 1),
        _move("intensity", 1),
        lambda state: state.update(label=state["label"].astype(np.int32)),
        lambda state: state.update(label=np.zeros(3, dtype=np.int64)),
        lambda state: state.pop("sex"),
        lambda state: state.update(diagnosis=np.zeros(1, dtype=np.int64)),
    ],
)
def test_a_state_that_no_site_may_release_is_refused(change: Callable[[State], None]) -> None:
    state = a_survey(PLAN)
    change(state)
    with pytest.raises(PayloadError, match="survey: "):
        check_survey(state, PLAN)


def test_patients_of_a_label_that_is_held_back_are_refused() -> None:
    state = a_survey(PLAN)
    state["label"][:] = 0
    with pytest.raises(PayloadError, match="label_patients"):
        check_survey(state, PLAN)


def test_a_site_s_own_floor_is_enforced_as_well() -> None:
    state = a_survey(PLAN)
    smallest = min(int(cells[cells > 0].min()) for cells in (state[name] for name in survey_tables(PLAN)))
    check_survey(
        state, PLAN, min_cases=min(smallest, int(state["label_patients"][state["label_patients"] > 0].min()))
    )
    with pytest.raises(PayloadError, match="below the floor"):
        check_survey(state, PLAN, min_cases=smallest + 1)


def test_every_case_weighs_the_same_in_the_intensities() -> None:
    state = a_survey(PLAN)
    assert int(state["intensity"].sum()) == int(state["num_cases"][0]) * CASE_WEIGHT
