"""What left, read back from the audit log in plain words."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedward_client.outbound import OutboundDoor
from fedward_client.outbound_log import explain, sent_messages
from fedward_common.audit import AuditLog
from fedward_common.errors import AuditError, RefusalCode
from fedward_common.identity import new_signer
from tests.messages import a_state, an_instruction, packed, signed

PLAN = signed()


@pytest.fixture
def audit(tmp_path: Path) -> Path:
    """The log of a site that prepared, trained twice, evaluated, held back once and refused once."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append("joined", site="north")
    door = OutboundDoor("north", new_signer()[0], log.append)
    counts = {"train": 40, "validation": 3, "test": 9}
    door.counts(an_instruction(PLAN, "prepare", round_index=0), PLAN, counts)
    for index in (1, 2):
        train = an_instruction(PLAN, base=packed(), round_index=index)
        door.update(train, PLAN, packed(0.5), 40, 0.6931)
    evaluate = an_instruction(PLAN, "evaluate", base=packed(), round_index=2)
    door.states(evaluate, PLAN, a_state(PLAN.plan))
    door.states(
        evaluate.model_copy(update={"split": "test"}), PLAN, a_state(PLAN.plan, num_cases=3, num_positives=1)
    )
    other = an_instruction(PLAN, base=packed(), run_id="run-2")
    door.refusal(other, RefusalCode.PLAN_NOT_APPROVED)
    log.append("stopped", pid=7)
    return path


def test_every_message_that_left_is_listed_in_order_and_nothing_else(audit: Path) -> None:
    found = [entry.fields["action"] for entry in sent_messages(audit, run_id=None, round_index=None)]
    assert found == ["prepare", "train", "train", "evaluate", "evaluate", "train"]


def test_messages_can_be_limited_to_a_run_and_a_round(audit: Path) -> None:
    assert len(sent_messages(audit, run_id="run-1", round_index=None)) == 5
    assert len(sent_messages(audit, run_id=None, round_index=2)) == 3
    assert len(sent_messages(audit, run_id="run-1", round_index=0)) == 1
    assert len(sent_messages(audit, run_id="run-2", round_index=1)) == 1
    assert sent_messages(audit, run_id="run-3", round_index=None) == []


def test_messages_are_explained_with_every_number_that_was_released(audit: Path) -> None:
    told = [explain(entry) for entry in sent_messages(audit, run_id=None, round_index=None)]
    assert "run run-1, round 0: how many cases the site has for this plan" in told[0]
    assert told[0].endswith("numbers released: num train 40, num test 9")
    assert (
        "round 1: a weight update; numbers released: num cases 40, mean loss 0.6931; 32 bytes, SHA-256"
        in told[1]
    )
    assert "counts for the global model's metrics; numbers released: num cases 20" in told[3]
    assert "numbers released: none" in told[4]
    assert "a refusal (train): waiting for the site's operator to approve the plan [code 14]" in told[5]


def test_a_changed_log_is_not_explained(audit: Path) -> None:
    audit.write_text(audit.read_text().replace('"num_cases":40', '"num_cases":41', 1))
    with pytest.raises(AuditError, match="line 3"):
        sent_messages(audit, run_id=None, round_index=None)


def test_a_log_that_is_gone_does_not_mean_that_nothing_left(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="not known") as caught:
        sent_messages(tmp_path / "audit.jsonl", run_id=None, round_index=None)
    assert caught.value.remedy
