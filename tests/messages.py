"""Builders for tests of what travels: signed plans, instructions, sites' answers, Flower messages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from flwr.app import Message, Metadata, RecordDict
from flwr.app.message import make_message

from fedward_common import weights
from fedward_common.envelope import Action, Envelope, Instruction, Numbers, envelope_bytes, signed_bytes
from fedward_common.evaluation.state import state_of
from fedward_common.plan import PlanBody, ReadinessPlan, SignedPlan, TrainingPlan, parse_any_plan, parse_plan
from fedward_common.protocol import Up
from fedward_common.state_payload import pack_state
from fedward_common.weights import Layout, TensorSpec

LAYOUT: Layout = (
    TensorSpec(name="weight", shape=(2, 3), kind="parameter"),
    TensorSpec(name="mean", shape=(2,), kind="buffer"),
)
NUM_ELEMENTS = 8


def a_message(content: RecordDict, message_type: str = "train") -> Message:
    """A Flower message with this content, from the server to node 2."""
    moment = datetime.now(UTC).timestamp()
    metadata = Metadata(1, "question", 1, 2, "", "", moment, 3600.0, message_type)
    return make_message(metadata, content=content)


def a_plan(**changes: Any) -> TrainingPlan:
    """A plan with narrow bounds; keyword tables are merged over the defaults."""
    document: dict[str, Any] = {
        "name": "small",
        "rounds": 3,
        "participation": {"quorum": 2, "deadline_s": 20, "gather_s": 20},
        "task": {"labels": ("normal", "pneumonia")},
        "transforms": {"size": (16, 16)},
        "model": {"name": "cnn2d"},
        "training": {"learning_rate": 0.01},
        "privacy": {"min_cases": 5, "max_cases": 100, "max_abs": 4.0, "max_norm": 8.0},
        "evaluation": {"score_bins": 16, "compare_local": False},
    }
    for name, change in changes.items():
        default = document.get(name)
        document[name] = {**default, **change} if isinstance(default, dict) else change
    return parse_plan(document)


def signed(plan: TrainingPlan | ReadinessPlan | None = None, layout: Layout = LAYOUT) -> SignedPlan:
    """The plan in the form of a signed one; who signed is not what these tests are about."""
    moment = datetime(2026, 1, 31, tzinfo=UTC)
    complete = (plan or a_plan()).model_dump() | {
        "federation_id": "test",
        "expires": moment + timedelta(days=36500),
    }
    body = PlanBody(plan=parse_any_plan(complete), layout=layout, nonce="0" * 32, signed_at=moment)
    return SignedPlan(body=body, signer="anna", signature="0" * 128)


def an_instruction(
    plan: SignedPlan, action: Action = "train", *, base: bytes | None = None, **changes: Any
) -> Instruction:
    """What the server asks of a site in round 1 of run-1."""
    values: dict[str, Any] = {
        "run_id": "run-1",
        "plan_digest": plan.digest,
        "action": action,
        "round_index": 1,
        "base_digest": None if base is None else weights.digest(base),
    }
    return Instruction.model_validate(values | changes)


def packed(*values: float) -> bytes:
    """An update with these elements, the rest zero."""
    flat = np.zeros(NUM_ELEMENTS, dtype="<f4")
    flat[: len(values)] = values
    return flat.tobytes()


def a_state(plan: TrainingPlan, *, num_cases: int = 20, num_positives: int = 8, skill: float = 0.7) -> bytes:
    """Packed counts of predictions; `skill` is how well the scores of the two classes are apart."""
    labels = np.array([1] * num_positives + [0] * (num_cases - num_positives), dtype=np.int64)
    ramp = np.linspace(0, 1, num_cases) if num_cases else np.zeros(0)
    positive = np.clip((1 - skill) * ramp + skill * labels, 0, 1)
    return pack_state(state_of(np.stack([1 - positive, positive], axis=1), labels, plan), plan)


def an_answer(
    instruction: Instruction,
    sign: Callable[[bytes], str],
    *,
    site: str = "north",
    payload: bytes | None = None,
    numbers: Numbers | None = None,
    **changes: Any,
) -> Up:
    """What an honest site would send; `changes` replace keys of the envelope before it is signed."""
    values: dict[str, Any] = {
        **instruction.model_dump(),
        "site": site,
        "code": 0,
        "numbers": numbers or Numbers(),
        "payload_digest": None if payload is None else hashlib.sha256(payload).hexdigest(),
    }
    body = envelope_bytes(Envelope.model_validate(values | changes))
    return Up(body, sign(signed_bytes(body)), payload)
