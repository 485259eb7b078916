"""The site's policy: a rule approves only what it says, and a limit refuses whoever approved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedward_client.policy import load_policy
from fedward_common.errors import PolicyError
from fedward_common.plan import PlanBody, SignedPlan
from fedward_common.weights import TensorSpec
from tests.federations import A_LAYOUT, a_plan

RULE = """
[[approve]]
coordinators = ["anna"]
models = ["cnn2d", "densenet121"]
tasks = ["classification"]
strategies = ["fedavg"]
max_rounds = 5
max_local_epochs = 2
max_payload_mb = 0.01
min_cases = 5
"""


def a_signed(signer: str = "anna", num_elements: int = 0, **changes: Any) -> SignedPlan:
    """A plan in signed form; policies look at nothing that needs the signature to hold."""
    layout = A_LAYOUT
    if num_elements:
        layout = (TensorSpec(name="weight", shape=(num_elements,), kind="parameter"),)
    body = PlanBody.model_validate(
        {"plan": a_plan(**changes), "layout": layout, "nonce": "0" * 32, "signed_at": "2026-01-01T00:00:00Z"}
    )
    return SignedPlan(body=body, signer=signer, signature="0" * 128)


def training(**changes: Any) -> dict[str, Any]:
    return {"training": {"learning_rate": 0.01} | changes}


# One change each that goes one step beyond RULE, and a word of the objection.
BEYOND = [
    ({"rounds": 6}, "6 rounds, 5 permitted"),
    (training(local_epochs=3), "3 local epochs, 2 permitted"),
    ({"num_elements": 2501}, "MB a message"),
    ({"privacy": {"min_cases": 4}}, "numbers about 4 cases, 5 required"),
    ({"model": {"name": "unet"}}, "model unet is not permitted"),
    ({"task": {"name": "regression", "labels": ("a", "b")}}, "task regression is not permitted"),
    ({"strategy": {"name": "fedadam"}}, "strategy fedadam is not permitted"),
    (training(trainer="plugin"), "trainer plugin is not permitted"),
    ({"data": {"dataset": "plugin"}}, "dataset plugin is not permitted"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "policy.toml"


def test_absent_policy_approves_nothing_and_objects_to_nothing(path: Path) -> None:
    policy = load_policy(path)

    assert not policy.approves(a_signed())
    assert policy.objections(a_signed(rounds=10_000, privacy={"min_cases": 1})) == []


def test_empty_policy_is_like_an_absent_one(path: Path) -> None:
    path.write_text("")

    assert load_policy(path) == load_policy(path.with_name("absent.toml"))


def test_rule_approves_a_plan_at_each_of_its_bounds(path: Path) -> None:
    path.write_text(RULE)
    at_bounds = a_signed(num_elements=2500, rounds=5, privacy={"min_cases": 5}, **training(local_epochs=2))

    assert load_policy(path).approves(at_bounds)


@pytest.mark.parametrize(("changes", "objection"), BEYOND)
def test_rule_does_not_approve_a_plan_one_step_beyond(
    path: Path, changes: dict[str, Any], objection: str
) -> None:
    path.write_text(RULE)

    assert not load_policy(path).approves(a_signed(**changes))


def test_rule_does_not_approve_another_coordinator_s_plan(path: Path) -> None:
    path.write_text(RULE)

    assert load_policy(path).approves(a_signed("anna"))
    assert not load_policy(path).approves(a_signed("bert"))


def test_two_rules_are_not_added_up(path: Path) -> None:
    """Neither rule alone covers bert's fedadam plan."""
    path.write_text(RULE + RULE.replace("anna", "bert") + RULE.replace("fedavg", "fedadam"))

    policy = load_policy(path)

    assert policy.approves(a_signed("bert"))
    assert policy.approves(a_signed("anna", strategy={"name": "fedadam"}))
    assert not policy.approves(a_signed("bert", strategy={"name": "fedadam"}))


@pytest.mark.parametrize(("changes", "objection"), BEYOND)
def test_limit_objects_to_a_plan_one_step_beyond(path: Path, changes: dict[str, Any], objection: str) -> None:
    limits = RULE.replace("[[approve]]", "[limits]").replace('coordinators = ["anna"]', "")
    path.write_text(limits + 'trainers = ["local_epochs"]\ndatasets = ["dicom_folder"]\n')
    policy = load_policy(path)

    (found,) = policy.objections(a_signed(**changes))

    assert objection in found
    assert policy.objections(a_signed()) == []


def test_limit_names_everything_it_objects_to(path: Path) -> None:
    path.write_text('[limits]\nmax_rounds = 4\nmin_cases = 6\nmodels = ["unet"]\n')

    assert len(load_policy(path).objections(a_signed())) == 3


def test_limit_prevails_over_a_rule(path: Path) -> None:
    path.write_text(RULE + "[limits]\nmax_rounds = 4\n")

    assert not load_policy(path).approves(a_signed(rounds=5))
    assert load_policy(path).approves(a_signed(rounds=4))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[limits]\nmax_round = 5\n", "limits.max_round"),
        ("[limits]\nmax_rounds = 0\n", "limits.max_rounds"),
        ("[limits]\nmax_payload_mb = nan\n", "limits.max_payload_mb"),
        ("[limits]\nmodels = []\n", "limits.models"),
        ("[limits]\nmin_cases = -1\n", "limits.min_cases"),
        ('[[approve]]\ncoordinators = ["anna"]\n', "approve.0.models"),
        (RULE.replace('["fedavg"]', '"fedavg"'), "approve.0.strategies"),
        ("approve everything", "not TOML"),
        ("\xff", "not TOML"),
    ],
)
def test_faulty_policy_is_refused_and_the_fault_named(path: Path, text: str, fault: str) -> None:
    path.write_bytes(text.encode("latin-1"))

    with pytest.raises(PolicyError) as caught:
        load_policy(path)

    assert fault in caught.value.message


def test_policy_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="Is a directory"):
        load_policy(tmp_path)
