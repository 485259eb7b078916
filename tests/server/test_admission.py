"""Admission: every way in which an answer can be wrong has its code, and no bytes raise an exception."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward_common.envelope import Instruction, Numbers, envelope_bytes, parse_envelope, signed_bytes
from fedward_common.errors import RefusalCode
from fedward_common.identity import new_signer
from fedward_common.protocol import Up
from fedward_common.state_payload import state_bytes, unpack_state
from fedward_server.admission import Answer, admit
from tests.messages import a_plan, a_state, an_answer, an_instruction, packed, signed

PLAN = signed()  # min_cases 5, max_cases 100, max_abs 4, max_norm 8
SIGN, KEY = new_signer()
OTHER_SIGN, OTHER_KEY = new_signer()
TRAIN = an_instruction(PLAN, "train", base=packed(1.0))
EVALUATE = an_instruction(PLAN, "evaluate", base=packed(1.0))
PREPARE = an_instruction(PLAN, "prepare")


def judged(up: Up, instruction: Instruction = TRAIN) -> Answer:
    return admit(up, instruction, PLAN, "north", KEY)


def an_update(payload: bytes | None = packed(0.5), num_cases: int | None = 12, **changes: Any) -> Up:
    return an_answer(TRAIN, SIGN, payload=payload, numbers=Numbers(num_cases=num_cases), **changes)


def a_measurement(payload: bytes | None, num_cases: int | None = 20) -> Up:
    return an_answer(EVALUATE, SIGN, payload=payload, numbers=Numbers(num_cases=num_cases))


def resigned(up: Up, body: bytes) -> Up:
    return Up(body, SIGN(signed_bytes(body)), up.payload)


def test_an_honest_update_is_admitted_with_its_values_and_numbers() -> None:
    answer = judged(an_update(packed(0.5, -0.25)))
    assert answer.ok
    assert answer.site == "north"
    assert answer.delta is not None
    np.testing.assert_array_equal(answer.delta["weight"], [[0.5, -0.25, 0], [0, 0, 0]])
    np.testing.assert_array_equal(answer.delta["mean"], [0, 0])
    assert answer.numbers.num_cases == 12
    assert answer.payload_bytes == 32


@pytest.mark.parametrize("payload", [packed(4.0), packed(-4.0, 4.0, 4.0, -4.0), packed()])
@pytest.mark.parametrize("num_cases", [5, 100])
def test_an_update_on_the_bounds_is_admitted(payload: bytes, num_cases: int) -> None:
    assert judged(an_update(payload, num_cases)).ok


def test_honest_counts_are_admitted() -> None:
    state = a_state(PLAN.plan)
    answer = judged(a_measurement(state), EVALUATE)
    assert answer.ok
    assert answer.state is not None
    for name, array in unpack_state(state, PLAN.plan).items():
        np.testing.assert_array_equal(answer.state[name], array)


def test_counts_held_back_are_admitted_as_nothing() -> None:
    answer = judged(a_measurement(bytes(state_bytes(PLAN.plan)), None), EVALUATE)
    assert answer.ok
    assert answer.state is None


def test_counts_of_no_cases_are_a_state_of_their_own() -> None:
    answer = judged(a_measurement(bytes(state_bytes(PLAN.plan)), 0), EVALUATE)
    assert answer.ok
    assert answer.state is not None


def test_prepared_site_is_admitted_with_the_numbers_it_released() -> None:
    numbers = Numbers(num_train=40, num_test=9)
    answer = judged(an_answer(PREPARE, SIGN, numbers=numbers), PREPARE)
    assert answer.ok
    assert answer.numbers == numbers


REFUSED: dict[str, tuple[Up, Instruction, RefusalCode]] = {
    "unsigned": (Up(an_update().envelope, "0" * 128, packed(0.5)), TRAIN, RefusalCode.UPDATE_UNSIGNED),
    "signature is no hex": (
        Up(an_update().envelope, "zz" * 64, packed(0.5)),
        TRAIN,
        RefusalCode.UPDATE_UNSIGNED,
    ),
    "signed by another key": (
        an_answer(TRAIN, OTHER_SIGN, payload=packed(0.5), numbers=Numbers(num_cases=12)),
        TRAIN,
        RefusalCode.UPDATE_UNSIGNED,
    ),
    "signature over the bare body": (
        Up(an_update().envelope, SIGN(an_update().envelope), packed(0.5)),
        TRAIN,
        RefusalCode.UPDATE_UNSIGNED,
    ),
    "one byte changed after signing": (
        Up(an_update().envelope.replace(b'"num_cases":12', b'"num_cases":13'), an_update().signature, b""),
        TRAIN,
        RefusalCode.UPDATE_UNSIGNED,
    ),
    "another site's envelope": (an_update(site="south"), TRAIN, RefusalCode.UPDATE_STALE),
    "older round": (an_update(round_index=0), TRAIN, RefusalCode.UPDATE_STALE),
    "newer round": (an_update(round_index=2), TRAIN, RefusalCode.UPDATE_STALE),
    "other run": (an_update(run_id="run-2"), TRAIN, RefusalCode.UPDATE_STALE),
    "other plan": (an_update(plan_digest="0" * 64), TRAIN, RefusalCode.UPDATE_STALE),
    "other base model": (an_update(base_digest="0" * 64), TRAIN, RefusalCode.UPDATE_STALE),
    "no base model": (an_update(base_digest=None), TRAIN, RefusalCode.UPDATE_STALE),
    "other action": (an_update(action="evaluate"), TRAIN, RefusalCode.UPDATE_STALE),
    "other split": (
        an_answer(EVALUATE, SIGN, payload=a_state(PLAN.plan), numbers=Numbers(num_cases=20), split="test"),
        EVALUATE,
        RefusalCode.UPDATE_STALE,
    ),
    "not canonical": (
        resigned(an_update(), an_update().envelope + b"\n"),
        TRAIN,
        RefusalCode.UPDATE_MALFORMED,
    ),
    "unknown key": (
        resigned(an_update(), json.dumps({**json.loads(an_update().envelope), "note": "x"}).encode()),
        TRAIN,
        RefusalCode.UPDATE_MALFORMED,
    ),
    "no document": (resigned(an_update(), b"\xff\x00"), TRAIN, RefusalCode.UPDATE_MALFORMED),
    "wrong payload digest": (an_update(payload_digest="0" * 64), TRAIN, RefusalCode.UPDATE_MALFORMED),
    "payload exchanged": (
        Up(an_update().envelope, an_update().signature, packed(0.25)),
        TRAIN,
        RefusalCode.UPDATE_MALFORMED,
    ),
    "payload taken away": (
        Up(an_update().envelope, an_update().signature, None),
        TRAIN,
        RefusalCode.UPDATE_MALFORMED,
    ),
    "no payload": (an_update(None), TRAIN, RefusalCode.UPDATE_MALFORMED),
    "payload too short": (an_update(packed()[:-4]), TRAIN, RefusalCode.UPDATE_MALFORMED),
    "payload too long": (an_update(packed() + bytes(4)), TRAIN, RefusalCode.UPDATE_MALFORMED),
    "no number of cases": (an_update(num_cases=None), TRAIN, RefusalCode.UPDATE_MALFORMED),
    "nan": (an_update(packed(0, float("nan"))), TRAIN, RefusalCode.UPDATE_NOT_FINITE),
    "infinity": (an_update(packed(0, float("-inf"))), TRAIN, RefusalCode.UPDATE_NOT_FINITE),
    "infinity and nan": (
        an_update(packed(float("inf"), float("nan"))),
        TRAIN,
        RefusalCode.UPDATE_NOT_FINITE,
    ),
    "element above max_abs": (an_update(packed(-4.0001)), TRAIN, RefusalCode.UPDATE_OUT_OF_BOUNDS),
    "norm above max_norm": (an_update(packed(*[3.5] * 6)), TRAIN, RefusalCode.UPDATE_OUT_OF_BOUNDS),
    "largest float": (an_update(packed(3.4e38)), TRAIN, RefusalCode.UPDATE_OUT_OF_BOUNDS),
    "too few cases": (an_update(num_cases=4), TRAIN, RefusalCode.UPDATE_OUT_OF_BOUNDS),
    "no cases": (an_update(num_cases=0), TRAIN, RefusalCode.UPDATE_OUT_OF_BOUNDS),
    "too many cases": (an_update(num_cases=101), TRAIN, RefusalCode.UPDATE_OUT_OF_BOUNDS),
    "counts too short": (a_measurement(a_state(PLAN.plan)[:-8]), EVALUATE, RefusalCode.UPDATE_MALFORMED),
    "no counts": (a_measurement(None), EVALUATE, RefusalCode.UPDATE_MALFORMED),
    "counts contradict each other": (
        a_measurement(struct.pack("<q", 21) + a_state(PLAN.plan)[8:], 21),
        EVALUATE,
        RefusalCode.UPDATE_MALFORMED,
    ),
    "negative count": (
        a_measurement(a_state(PLAN.plan)[:8] + struct.pack("<q", -1) + a_state(PLAN.plan)[16:]),
        EVALUATE,
        RefusalCode.UPDATE_MALFORMED,
    ),
    "counts of more cases than a site may have": (
        a_measurement(a_state(PLAN.plan, num_cases=101), 101),
        EVALUATE,
        RefusalCode.UPDATE_MALFORMED,
    ),
    "counts differ from the number of cases": (
        a_measurement(a_state(PLAN.plan), 19),
        EVALUATE,
        RefusalCode.UPDATE_MALFORMED,
    ),
    "held back, but the counts are there": (
        a_measurement(a_state(PLAN.plan), None),
        EVALUATE,
        RefusalCode.UPDATE_MALFORMED,
    ),
    "payload where none belongs": (
        an_answer(PREPARE, SIGN, payload=packed()),
        PREPARE,
        RefusalCode.UPDATE_MALFORMED,
    ),
    "the site's own refusal": (an_update(None, code=30), TRAIN, RefusalCode.COHORT_UNUSABLE),
    "unknown code": (an_update(None, code=99), TRAIN, RefusalCode.INTERNAL),
    "a code that only the server may use": (an_update(None, code=70), TRAIN, RefusalCode.INTERNAL),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_answer_is_refused_with_its_own_code_and_nothing_of_it_is_used(case: str) -> None:
    up, instruction, code = REFUSED[case]
    answer = judged(up, instruction)
    assert answer.code is code
    assert not answer.ok
    assert answer.delta is None
    assert answer.state is None


def test_refusal_names_the_site_that_the_connection_proved_and_not_the_one_in_the_envelope() -> None:
    assert judged(an_update(site="south")).site == "north"


def test_an_update_cannot_be_replayed_by_the_site_it_was_stolen_from_or_by_another() -> None:
    up = an_update()
    assert admit(up, TRAIN, PLAN, "south", OTHER_KEY).code is RefusalCode.UPDATE_UNSIGNED
    assert admit(up, TRAIN, PLAN, "south", KEY).code is RefusalCode.UPDATE_STALE


def test_bounds_too_large_to_square_do_not_raise() -> None:
    wide = signed(a_plan(privacy={"max_norm": 1e300, "max_abs": 1024.0}))
    instruction = an_instruction(wide, base=packed())
    up = an_answer(instruction, SIGN, payload=packed(1024.0), numbers=Numbers(num_cases=12))
    assert admit(up, instruction, wide, "north", KEY).ok


def test_a_malformed_key_in_the_roster_refuses_and_does_not_raise() -> None:
    for key in ("", "zz", "00", "ab" * 32):
        assert admit(an_update(), TRAIN, PLAN, "north", key).code is RefusalCode.UPDATE_UNSIGNED


INSTRUCTIONS = st.sampled_from([TRAIN, EVALUATE, PREPARE])


@given(
    body=st.binary(max_size=200),
    signature=st.text(max_size=140),
    payload=st.none() | st.binary(max_size=64),
    instruction=INSTRUCTIONS,
)
def test_no_bytes_of_a_stranger_are_admitted_or_raise(
    body: bytes, signature: str, payload: bytes | None, instruction: Instruction
) -> None:
    answer = judged(Up(body, signature, payload), instruction)
    assert answer.code is RefusalCode.UPDATE_UNSIGNED


@given(body=st.binary(max_size=200), payload=st.none() | st.binary(max_size=64), instruction=INSTRUCTIONS)
def test_no_bytes_signed_by_the_site_itself_raise(
    body: bytes, payload: bytes | None, instruction: Instruction
) -> None:
    answer = judged(Up(body, SIGN(signed_bytes(body)), payload), instruction)
    assert answer.code is RefusalCode.UPDATE_MALFORMED


@given(
    payload=st.binary(min_size=32, max_size=32),
    num_cases=st.integers(0, 2**24),
)
def test_any_update_of_the_right_length_is_admitted_exactly_when_it_is_within_the_bounds(
    payload: bytes, num_cases: int
) -> None:
    answer = judged(an_update(payload, num_cases))
    values = np.array(struct.unpack("<8f", payload))
    within = bool(np.isfinite(values).all() and np.abs(values).max() <= 4 and np.linalg.norm(values) <= 8)
    assert answer.ok == (within and 5 <= num_cases <= 100)


@given(index=st.integers(0, 38), value=st.integers(-(2**63), 2**63 - 1), num_cases=st.integers(0, 100))
def test_any_counts_are_admitted_or_malformed_and_never_raise(index: int, value: int, num_cases: int) -> None:
    counts = np.frombuffer(a_state(PLAN.plan), dtype="<i8").copy()
    counts[index] = value
    answer = judged(a_measurement(counts.tobytes(), num_cases), EVALUATE)
    assert answer.code in (RefusalCode.OK, RefusalCode.UPDATE_MALFORMED)
    assert answer.ok <= (num_cases == counts[0])


def test_what_the_builders_make_is_what_a_site_makes() -> None:
    envelope = parse_envelope(an_update().envelope)
    assert envelope_bytes(envelope) == an_update().envelope
