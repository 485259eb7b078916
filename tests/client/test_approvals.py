"""The gate for plans and rounds: what passes, what does not, with which code, and what is on record."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedward_client.approvals import PlanGate, readable_summary
from fedward_client.config import SiteHome
from fedward_common.audit import AuditLog, verify
from fedward_common.errors import AuditError, PlanRefusedError, PolicyError, RefusalCode, UsageError
from fedward_common.plan import SignedPlan
from tests.federations import a_federation, a_plan, a_signed_plan, a_site
from tests.messages import an_instruction

RUN, OTHER_RUN = "00000000000000aa", "00000000000000bb"
BASE, OTHER_BASE = "ab" * 32, "cd" * 32
APPROVE_ANNA = """
[[approve]]
coordinators = ["anna"]
models = ["cnn2d"]
tasks = ["classification"]
strategies = ["fedavg"]
max_rounds = 5
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_federation(tmp_path_factory.mktemp("federation") / "ours")


@dataclass(frozen=True)
class Site:
    """A site's gate and what is around it."""

    home: SiteHome
    federation: Path

    @property
    def gate(self) -> PlanGate:
        """A gate as a newly started process has it."""
        return PlanGate(self.home, a_site(self.federation).federation, AuditLog(self.home.audit))

    def audited(self) -> list[str]:
        return [entry.event for entry in AuditLog(self.home.audit).entries()]

    def refusal(self, document: bytes, run_id: str = RUN, now: datetime | None = None) -> RefusalCode:
        with pytest.raises(PlanRefusedError) as caught:
            self.gate.decide(document, run_id, now=now)
        assert caught.value.remedy
        return caught.value.code


@pytest.fixture
def site(federation: Path, tmp_path: Path) -> Site:
    return Site(SiteHome(tmp_path), federation)


@pytest.fixture
def signed(federation: Path) -> SignedPlan:
    return a_signed_plan(federation)


def test_plan_waits_until_the_operator_approves_it(site: Site, signed: SignedPlan) -> None:
    assert site.refusal(signed.to_bytes()) == RefusalCode.PLAN_NOT_APPROVED
    (waiting,) = site.gate.plans()
    assert (waiting.signed, waiting.status) == (signed, "pending")

    site.gate.approve(signed.digest)

    assert site.gate.decide(signed.to_bytes(), RUN) == signed
    assert site.audited() == ["plan_pending", "plan_approved", "plan_accepted"]


def test_approval_is_for_exactly_one_plan(site: Site, federation: Path, signed: SignedPlan) -> None:
    site.refusal(signed.to_bytes())
    site.gate.approve(signed.digest)

    again = a_signed_plan(federation)

    assert site.refusal(again.to_bytes(), OTHER_RUN) == RefusalCode.PLAN_NOT_APPROVED


def test_plan_is_approved_from_a_file_before_the_server_sends_it(
    site: Site, signed: SignedPlan, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(signed.to_bytes())

    site.gate.approve(str(file))
    site.gate.approve(file)

    assert site.gate.plans()[0].status == "approved"
    assert site.gate.decide(signed.to_bytes(), RUN) == signed
    assert site.audited() == ["plan_approved", "plan_accepted"]


@pytest.mark.parametrize("num_digits", [12, 64])
def test_plan_is_approved_by_the_beginning_of_its_digest(
    site: Site, signed: SignedPlan, num_digits: int
) -> None:
    site.refusal(signed.to_bytes())

    assert site.gate.approve(signed.digest[:num_digits]) == signed


@pytest.mark.parametrize("source", ["0" * 64, "0" * 12, "abc", "no/such/file"])
def test_unknown_plan_is_not_approved(site: Site, signed: SignedPlan, source: str) -> None:
    site.refusal(signed.to_bytes())

    with pytest.raises(UsageError):
        site.gate.approve(source)
    with pytest.raises(UsageError):
        site.gate.find(signed.digest[:11])

    assert site.gate.plans()[0].status == "pending"


def test_file_that_does_not_verify_is_not_approved(site: Site, signed: SignedPlan, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(signed.to_bytes().replace(b'"rounds":5', b'"rounds":6'))

    with pytest.raises(PlanRefusedError):
        site.gate.approve(file)

    assert site.gate.plans() == []


def test_plan_is_approved_by_a_rule_and_no_longer_when_the_rule_is_gone(
    site: Site, signed: SignedPlan
) -> None:
    site.home.policy.write_text(APPROVE_ANNA)
    gate = site.gate

    assert gate.decide(signed.to_bytes(), RUN) == signed

    site.home.policy.unlink()
    with pytest.raises(PlanRefusedError) as caught:
        gate.decide(signed.to_bytes(), RUN)
    assert caught.value.code == RefusalCode.PLAN_NOT_APPROVED
    (entry, _) = AuditLog(site.home.audit).entries()
    assert entry.fields["approved_by"] == "rule"


def test_changed_foreign_and_expired_plans_are_refused_and_audited(
    site: Site, signed: SignedPlan, tmp_path: Path
) -> None:
    site.refusal(signed.to_bytes())
    site.gate.approve(signed.digest)
    foreign = a_signed_plan(a_federation(tmp_path / "other"))
    changed = signed.to_bytes().replace(b'"rounds":5', b'"rounds":6')
    later = datetime.now(UTC) + timedelta(days=31)

    codes = [
        site.refusal(changed),
        site.refusal(foreign.to_bytes()),
        site.refusal(signed.to_bytes(), now=later),
        site.refusal(b"\x00garbage"),
    ]

    assert codes == [
        RefusalCode.PLAN_SIGNATURE,
        RefusalCode.PLAN_FEDERATION,
        RefusalCode.PLAN_EXPIRED,
        RefusalCode.PLAN_SIGNATURE,
    ]
    entries = list(AuditLog(site.home.audit).entries())[2:]
    assert [(entry.event, entry.fields["code"]) for entry in entries] == [
        ("plan_refused", int(code)) for code in codes
    ]
    assert len(site.gate.plans()) == 1


def test_approved_plan_runs_for_its_first_run_only_also_after_a_restart(
    site: Site, signed: SignedPlan
) -> None:
    site.refusal(signed.to_bytes())
    site.gate.approve(signed.digest)
    site.gate.decide(signed.to_bytes(), RUN)

    assert site.refusal(signed.to_bytes(), OTHER_RUN) == RefusalCode.PLAN_REPLAYED
    assert site.gate.decide(signed.to_bytes(), RUN) == signed
    assert site.gate.plans()[0].run_id == RUN


def test_run_cannot_exchange_its_plan(site: Site, federation: Path, signed: SignedPlan) -> None:
    other = a_signed_plan(federation)
    for plan in (signed, other):
        site.refusal(plan.to_bytes())
        site.gate.approve(plan.digest)
    site.gate.decide(signed.to_bytes(), RUN)

    assert site.refusal(other.to_bytes(), RUN) == RefusalCode.PLAN_REPLAYED


def test_only_one_of_many_runs_at_once_gets_the_plan(site: Site, signed: SignedPlan) -> None:
    site.home.policy.write_text(APPROVE_ANNA)
    gates = [site.gate for _ in range(8)]

    def attempt(index: int) -> RefusalCode:
        try:
            gates[index].decide(signed.to_bytes(), f"{index:016x}")
        except PlanRefusedError as refusal:
            return refusal.code
        return RefusalCode.OK

    with ThreadPoolExecutor(8) as pool:
        codes = sorted(pool.map(attempt, range(8)))

    assert codes == [RefusalCode.OK, *[RefusalCode.PLAN_REPLAYED] * 7]


def test_policy_s_limit_refuses_even_an_approved_plan(site: Site, signed: SignedPlan) -> None:
    site.refusal(signed.to_bytes())
    site.gate.approve(signed.digest)
    site.home.policy.write_text("[limits]\nmax_rounds = 4\n")

    assert site.refusal(signed.to_bytes()) == RefusalCode.PLAN_REFUSED
    assert site.gate.plans()[0].status == "refused"
    with pytest.raises(PlanRefusedError, match="5 rounds, 4 permitted"):
        site.gate.approve(signed.digest)


def test_faulty_policy_refuses_every_plan(site: Site, signed: SignedPlan) -> None:
    site.home.policy.write_text(APPROVE_ANNA + "typo = 1\n")

    assert site.refusal(signed.to_bytes()) == RefusalCode.PLAN_REFUSED


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"name": "of_nobody"}},
        {"strategy": {"name": "of_nobody"}},
        {"transforms": {"name": "of_nobody"}},
        {"data": {"dataset": "of_nobody"}},
        {"training": {"learning_rate": 0.1, "trainer": "of_nobody"}},
    ],
)
def test_plan_that_names_a_part_not_installed_here_is_refused(
    site: Site, federation: Path, changes: dict[str, Any]
) -> None:
    signed = a_signed_plan(federation, a_plan(**changes))
    site.gate.approve(_file(site, signed))

    assert site.refusal(signed.to_bytes()) == RefusalCode.PLAN_UNSUPPORTED


def _file(site: Site, signed: SignedPlan) -> Path:
    path = site.home.root / "given.json"
    path.write_bytes(signed.to_bytes())
    return path


@pytest.mark.parametrize("run_id", ["", "DOE^JOHN", "A" * 16, "0" * 81, "0" * 15 + "\n"])
def test_malformed_run_id_is_refused_and_not_written_down(
    site: Site, signed: SignedPlan, run_id: str
) -> None:
    site.gate.approve(_file(site, signed))

    assert site.refusal(signed.to_bytes(), run_id) == RefusalCode.PAYLOAD_MALFORMED
    assert list(AuditLog(site.home.audit).entries())[-1].fields["run_id"] == "malformed"


def test_waiting_and_acceptance_are_audited_once_though_every_message_asks(
    site: Site, signed: SignedPlan
) -> None:
    gate = site.gate
    for _ in range(3):
        with pytest.raises(PlanRefusedError):
            gate.decide(signed.to_bytes(), RUN)
    gate.approve(signed.digest)
    gate.approve(signed.digest)
    for _ in range(3):
        gate.decide(signed.to_bytes(), RUN)

    assert site.audited() == ["plan_pending", "plan_approved", "plan_accepted"]
    assert verify(site.home.audit) == 3


def test_plan_is_not_accepted_when_it_cannot_be_audited(site: Site, signed: SignedPlan) -> None:
    site.home.policy.write_text(APPROVE_ANNA)
    site.home.audit.mkdir()

    with pytest.raises(AuditError):
        site.gate.decide(signed.to_bytes(), RUN)


def test_damaged_ledger_refuses_every_plan(site: Site, signed: SignedPlan) -> None:
    site.gate.approve(_file(site, signed))
    (site.home.plans / "ledger.sqlite").write_bytes(b"not a database" * 100)

    with pytest.raises(PolicyError, match="cannot be used"):
        site.gate.decide(signed.to_bytes(), RUN)


def test_stored_plan_that_was_changed_is_noticed(site: Site, federation: Path, signed: SignedPlan) -> None:
    site.refusal(signed.to_bytes())
    (site.home.plans / f"{signed.digest}.json").write_bytes(a_signed_plan(federation).to_bytes())

    with pytest.raises(PolicyError, match="was changed"):
        site.gate.plans()
    with pytest.raises(PolicyError, match="was changed"):
        site.gate.approve(signed.digest)


def test_expired_plan_is_listed_as_such(site: Site, signed: SignedPlan) -> None:
    site.refusal(signed.to_bytes())

    (stored,) = site.gate.plans(now=datetime.now(UTC) + timedelta(days=31))

    assert stored.status == "expired"


def test_files_of_the_gate_are_private(site: Site, signed: SignedPlan) -> None:
    site.refusal(signed.to_bytes())

    assert site.home.plans.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in site.home.plans.iterdir()} == {0o600}


# Rounds


def train(index: int, base: str = BASE) -> dict[str, Any]:
    return {"action": "train", "round_index": index, "base_digest": base}


def measure(index: int, base: str = BASE, split: str = "validation") -> dict[str, Any]:
    return {"action": "evaluate", "round_index": index, "base_digest": base, "split": split}


BASELINE = {"action": "baseline", "round_index": 0, "base_digest": BASE, "split": "test"}


@dataclass(frozen=True)
class Running:
    """A site whose plan is bound to RUN; every question meets a newly started gate."""

    site: Site
    signed: SignedPlan

    def admit(self, question: dict[str, Any], run_id: str = RUN) -> None:
        self.site.gate.admit(self.signed, an_instruction(self.signed, run_id=run_id, **question))

    def refuses(self, question: dict[str, Any], run_id: str = RUN) -> bool:
        with pytest.raises(PlanRefusedError) as caught:
            self.admit(question, run_id)
        assert caught.value.remedy
        return caught.value.code is RefusalCode.ROUND_REPLAYED

    @property
    def last_round(self) -> int:
        return self.site.gate.plans()[0].last_round


def started(site: Site, signed: SignedPlan) -> Running:
    site.gate.approve(_file(site, signed))
    site.gate.decide(signed.to_bytes(), RUN)
    return Running(site, signed)


@pytest.fixture
def running(site: Site, signed: SignedPlan) -> Running:
    """A plan of five rounds that measures each of them, the last ones on the test cases too."""
    return started(site, signed)


def test_rounds_go_forward_and_may_be_left_out(running: Running) -> None:
    for index in (1, 2, 5):
        running.admit(train(index))

    assert running.site.audited()[-3:] == ["round_admitted"] * 3
    assert running.last_round == 5


def test_round_may_be_repeated_with_the_same_model_also_after_a_restart(running: Running) -> None:
    running.admit(train(2))

    running.admit(train(2))

    assert running.last_round == 2


def test_older_round_may_be_repeated_with_its_own_model_when_the_server_goes_back(running: Running) -> None:
    running.admit(train(2))
    running.admit(train(3, OTHER_BASE))

    running.admit(train(2))
    running.admit(train(3, OTHER_BASE))

    assert running.refuses(train(2, OTHER_BASE))
    assert running.refuses(train(3))
    assert running.last_round == 3


@pytest.mark.parametrize(("index", "base"), [(2, OTHER_BASE), (1, BASE), (1, OTHER_BASE)])
def test_round_is_refused_when_it_is_older_or_has_another_model(
    running: Running, index: int, base: str
) -> None:
    running.admit(train(2))

    assert running.refuses(train(index, base))

    entry = list(AuditLog(running.site.home.audit).entries())[-1]
    assert (entry.event, entry.fields["round"], entry.fields["base"]) == ("round_refused", index, base)
    running.admit(train(2))


@pytest.mark.parametrize("index", [0, 6])
def test_round_outside_the_plan_is_refused(running: Running, index: int) -> None:
    assert running.refuses(train(index))


@pytest.mark.parametrize("question", [train(1), measure(1), BASELINE])
def test_question_of_a_run_that_was_never_accepted_is_refused(
    running: Running, question: dict[str, Any]
) -> None:
    assert running.refuses(question, OTHER_RUN)


@pytest.mark.parametrize(
    ("question", "num_answered"),
    [(train(1), 1), (measure(1), 3), (measure(5, split="test"), 3), (BASELINE, 1)],
)
def test_only_a_few_of_many_models_at_once_get_an_answer(
    running: Running, question: dict[str, Any], num_answered: int
) -> None:
    def attempt(index: int) -> bool:
        try:
            running.admit(question | {"base_digest": f"{index:064x}"})
        except PlanRefusedError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == num_answered


# Measuring: what a server could use to find out who is among the cases


def crafted(model: int) -> str:
    return f"{model:064x}"


@pytest.mark.parametrize(
    ("question", "num_models"),
    [(measure(1), 3), (measure(5), 3), (measure(3, split="test"), 3), (BASELINE, 1)],
)
def test_one_model_too_many_is_refused_and_audited_also_after_a_restart(
    running: Running, question: dict[str, Any], num_models: int
) -> None:
    for model in range(num_models):
        running.admit(question | {"base_digest": crafted(model)})

    assert running.refuses(question | {"base_digest": OTHER_BASE})

    entry = list(AuditLog(running.site.home.audit).entries())[-1]
    assert entry.event == "round_refused"
    assert entry.fields == {
        "run_id": RUN,
        "round": question["round_index"],
        "action": question["action"],
        "split": question["split"],
        "base": OTHER_BASE,
        "code": int(RefusalCode.ROUND_REPLAYED),
    }
    for model in range(num_models):  # a resumed server repeats its questions
        running.admit(question | {"base_digest": crafted(model)})


def test_no_more_models_are_measured_than_a_repeated_run_would_have(running: Running) -> None:
    """A hostile server tries a hundred crafted models in every round on every side."""
    answered: Counter[tuple[str, int]] = Counter()
    for index in range(8):
        for split in ("validation", "test"):
            for model in range(100):
                question = measure(index, crafted(1000 * index + model), split)
                try:
                    running.admit(question)
                except PlanRefusedError:
                    continue
                answered[split, index] += 1

    assert answered == {("test", 1): 3} | {("validation", index): 3 for index in (1, 2, 3, 4, 5)}


def test_test_cases_are_for_few_models_because_a_resumed_run_may_select_another_round(
    running: Running,
) -> None:
    for index in (2, 4, 5):
        running.admit(measure(index, crafted(index), split="test"))

    assert running.refuses(measure(3, crafted(3), split="test"))
    for index in (2, 4, 5):
        running.admit(measure(index, crafted(index), split="test"))
        running.admit(measure(index))


@pytest.mark.parametrize(
    ("evaluation", "questions"),
    [
        ({}, [measure(0), measure(6), measure(0, split="test"), measure(6, split="test")]),
        ({"every": 2}, [measure(1), measure(3)]),
        ({"select": "last"}, [measure(index, split="test") for index in (1, 2, 3, 4)]),
        ({"compare_local": False}, [BASELINE]),
        ({}, [BASELINE | {"round_index": 1}, BASELINE | {"split": "validation"}]),
        ({}, [measure(1) | {"base_digest": None}, BASELINE | {"base_digest": None}]),
    ],
)
def test_measurement_that_the_plan_does_not_involve_is_refused(
    site: Site, federation: Path, evaluation: dict[str, Any], questions: list[dict[str, Any]]
) -> None:
    running = started(site, a_signed_plan(federation, a_plan(evaluation=evaluation)))

    assert all(running.refuses(question) for question in questions)


def test_measurements_of_a_plan_that_leaves_rounds_out_are_admitted(site: Site, federation: Path) -> None:
    plan = a_plan(evaluation={"every": 2, "initial": True, "select": "last"})
    running = started(site, a_signed_plan(federation, plan))

    for question in (*map(measure, (0, 2, 4, 5)), measure(5, split="test"), BASELINE):
        running.admit(question)


def test_two_runs_do_not_use_up_each_other_s_measurements(running: Running, federation: Path) -> None:
    other = a_signed_plan(federation)
    running.site.gate.approve(_file(running.site, other))
    running.site.gate.decide(other.to_bytes(), OTHER_RUN)
    for model in range(3):
        running.admit(measure(1, crafted(model)))

    Running(running.site, other).admit(measure(1, OTHER_BASE), OTHER_RUN)

    assert running.refuses(measure(1, OTHER_BASE))


def test_question_is_not_admitted_when_it_cannot_be_entered(running: Running) -> None:
    (running.site.home.plans / "ledger.sqlite").write_bytes(b"not a database" * 100)

    with pytest.raises(PolicyError, match="cannot be used"):
        running.admit(measure(1))


# What the operator reads


def test_summary_states_what_is_trained_on_what_and_what_leaves(signed: SignedPlan) -> None:
    summary = dict(readable_summary(signed))

    assert summary["Digest"] == signed.digest
    assert summary["Signed by"].startswith("coordinator anna, 20")
    assert "normal, pneumonia" in summary["Learns"]
    assert "CR, DX" in summary["Data used"]
    assert summary["Model"] == "cnn2d, 80 numbers"
    assert summary["How long"].startswith("5 rounds, 5 epochs")
    # 80 float32 of A_LAYOUT; int64 counts: cases, 2 x 2 confusion, two histograms of 4096, two sums
    assert "320 bytes" in summary["Leaves each round"]
    assert f"{8 * (1 + 4 + 2 * 4096 + 2):,} bytes" in summary["Leaves each round"]
    assert "4096 cells" in summary["Numbers that leave"]
    assert "fewer than 5 cases" in summary["Kept back"]


def test_summary_holds_no_control_characters(federation: Path) -> None:
    hostile = a_signed_plan(federation, a_plan(description="harmless\x1b[2J\r\nApproved by: nobody\x07"))

    texts = [text for _, text in readable_summary(hostile)]

    assert all(text.isprintable() for text in texts)
    assert "harmless" in texts[1]


def test_gate_needs_none_of_the_heavy_libraries() -> None:
    """The daemon and the operator's commands import the gate; torch is the worker's."""
    script = """
        import sys
        import fedward_client.approvals, fedward_client.joining, fedward_client.preflight
        import fedward_server.provisioning
        heavy = {"torch", "monai", "pydicom", "sklearn", "scipy", "flwr", "grpc"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)
