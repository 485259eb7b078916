"""The one door: what may leave, what is refused, and that the audit line is written first and says it all."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward_client.outbound import OutboundDoor, magnitude
from fedward_common.envelope import Envelope, Instruction, parse_envelope, signed_bytes
from fedward_common.errors import AuditError, FederationError, OutboundError, RefusalCode
from fedward_common.identity import new_signer, verify
from fedward_common.protocol import Up
from fedward_common.state_payload import state_bytes
from tests.messages import NUM_ELEMENTS, a_plan, a_state, an_instruction, packed, signed

PLAN = signed()  # min_cases 5, max_cases 100, max_abs 4, max_norm 8
SIGN, KEY = new_signer()
TRAIN = an_instruction(PLAN, "train", base=packed(1.0))
EVALUATE = an_instruction(PLAN, "evaluate", base=packed(1.0))
PREPARE = an_instruction(PLAN, "prepare")


@dataclass
class Site:
    """A door with a memory of the order of things."""

    min_cases: int = 1
    acts: list[str] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def door(self) -> OutboundDoor:
        return OutboundDoor("north", self._sign, self._record, self.min_cases)

    def _sign(self, body: bytes) -> str:
        self.acts.append("sign")
        return SIGN(body)

    def _record(self, event: str, **fields: Any) -> None:
        assert event == "outbound"
        self.acts.append("record")
        self.lines.append(fields)


def envelope_of(up: Up) -> Envelope:
    assert verify(KEY, signed_bytes(up.envelope), up.signature)
    return parse_envelope(up.envelope)


def test_an_update_leaves_signed_and_bound_to_its_instruction_and_its_payload() -> None:
    up = Site().door.update(TRAIN, PLAN, packed(0.5, -0.25), 12, 0.123456)
    envelope = envelope_of(up)
    assert envelope.answers(TRAIN)
    assert envelope.site == "north"
    assert envelope.code == 0
    assert up.payload == packed(0.5, -0.25)
    assert envelope.payload_digest == hashlib.sha256(packed(0.5, -0.25)).hexdigest()
    assert envelope.numbers.model_dump(exclude_none=True) == {"num_cases": 12, "mean_loss": 0.1235}


@pytest.mark.parametrize(
    ("payload", "num_cases", "why"),
    [
        (packed()[:-1], 12, "31 bytes"),
        (packed() + b"DOE^", 12, "36 bytes"),
        (b"", 12, "0 bytes"),
        (packed(float("nan")), 12, "not finite"),
        (packed(float("inf")), 12, "not finite"),
        (packed(0, 0, float("-inf")), 12, "not finite"),
        (packed(float("inf"), float("nan")), 12, "not finite"),
        (packed(4.0001), 12, "bounds"),
        (packed(-4.0001), 12, "bounds"),
        (packed(3.5, 3.5, 3.5, 3.5, 3.5, 3.5), 12, "bounds"),  # norm 8.57
        (packed(3e38, 3e38, 3e38), 12, "bounds"),
        (packed(0.1), 4, "4 cases"),
        (packed(0.1), 0, "0 cases"),
        (packed(0.1), -5, "-5 cases"),
        (packed(0.1), 101, "101 cases"),
    ],
)
def test_an_update_that_breaks_a_bound_does_not_leave(payload: bytes, num_cases: int, why: str) -> None:
    site = Site()
    with pytest.raises(OutboundError, match=why) as caught:
        site.door.update(TRAIN, PLAN, payload, num_cases, 0.5)
    assert caught.value.remedy
    assert site.acts == []


@pytest.mark.parametrize(
    ("payload", "num_cases"), [(packed(4.0), 5), (packed(-4.0, 4.0, 4.0, -4.0), 100), (packed(), 50)]
)
def test_an_update_on_the_bounds_leaves(payload: bytes, num_cases: int) -> None:
    assert Site().door.update(TRAIN, PLAN, payload, num_cases, 0.5).payload == payload


def test_the_sites_own_floor_counts_when_it_is_higher_than_the_plans_and_never_lowers_it() -> None:
    with pytest.raises(OutboundError, match="9 cases"):
        Site(min_cases=10).door.update(TRAIN, PLAN, packed(0.1), 9, 0.5)
    with pytest.raises(OutboundError, match="4 cases"):
        Site(min_cases=1).door.update(TRAIN, PLAN, packed(0.1), 4, 0.5)


@pytest.mark.parametrize(
    ("loss", "left"),
    [(float("nan"), None), (float("inf"), None), (-3.0, 0.0), (1e300, 1e6), (0.70004, 0.7), (0.0, 0.0)],
)
def test_a_loss_leaves_rounded_and_bounded_or_not_at_all(loss: float, left: float | None) -> None:
    up = Site().door.update(TRAIN, PLAN, packed(0.1), 12, loss)
    assert envelope_of(up).numbers.mean_loss == left


def test_counts_below_the_floor_are_not_released_and_none_at_all_is() -> None:
    up = Site().door.counts(PREPARE, PLAN, {"train": 5, "validation": 4, "test": 0, "quarantined": 4})
    assert envelope_of(up).numbers.model_dump() == {
        "num_train": 5,
        "num_validation": None,
        "num_test": 0,
        "num_quarantined": None,
        "num_cases": None,
        "mean_loss": None,
        "seconds": None,
    }
    assert up.payload is None


@pytest.mark.parametrize(("num_quarantined", "said"), [(0, 0), (1, None), (4, None), (5, 5), (50, 50)])
def test_how_many_studies_are_refused_leaves_with_an_update_unless_they_are_few(
    num_quarantined: int, said: int | None
) -> None:
    site = Site()
    up = site.door.update(TRAIN, PLAN, packed(0.5, -0.25), 20, 0.5, num_quarantined)
    assert envelope_of(up).numbers.num_quarantined == said
    assert site.lines[0].get("num_quarantined") == said


@pytest.mark.parametrize("num_train", [0, 1, 4])
def test_a_site_with_too_few_training_cases_says_so_and_how_many_it_does_not_say(num_train: int) -> None:
    site = Site()
    envelope = envelope_of(
        site.door.counts(PREPARE, PLAN, {"train": num_train, "validation": 50, "test": 50})
    )
    assert envelope.code == RefusalCode.COHORT_TOO_SMALL
    assert envelope.numbers.model_dump(exclude_none=True) == {}
    assert site.lines[0]["code"] == 31


def test_metric_counts_leave_as_they_are_with_their_number_of_cases() -> None:
    state = a_state(PLAN.plan, num_cases=20, num_positives=8)
    up = Site().door.states(EVALUATE, PLAN, state)
    assert up.payload == state
    assert envelope_of(up).numbers.model_dump(exclude_none=True) == {"num_cases": 20}


@pytest.mark.parametrize(
    ("num_cases", "num_positives"),
    [(4, 2), (1, 0), (20, 1), (20, 4), (20, 19), (9, 5)],
)
def test_counts_about_too_few_cases_or_too_few_of_one_label_leave_as_zeros_of_the_same_length(
    num_cases: int, num_positives: int
) -> None:
    state = a_state(PLAN.plan, num_cases=num_cases, num_positives=num_positives)
    site = Site()
    up = site.door.states(EVALUATE, PLAN, state)
    assert up.payload == bytes(state_bytes(PLAN.plan))
    assert envelope_of(up).numbers.model_dump(exclude_none=True) == {}
    assert "num_cases" not in site.lines[0]


def test_counts_of_no_cases_and_of_one_label_only_are_released() -> None:
    for num_cases, num_positives in ((0, 0), (20, 0), (20, 20)):
        up = Site().door.states(
            EVALUATE, PLAN, a_state(PLAN.plan, num_cases=num_cases, num_positives=num_positives)
        )
        assert envelope_of(up).numbers.num_cases == num_cases


def test_two_messages_held_back_differ_in_nothing() -> None:
    states = [a_state(PLAN.plan, num_cases=n, num_positives=n // 2, skill=n / 5) for n in (1, 3, 4)]
    held_back = {(up.envelope, up.payload) for up in (Site().door.states(EVALUATE, PLAN, s) for s in states)}
    assert len(held_back) == 1


def an_edited_state(index: int, value: int) -> bytes:
    """The state of 20 cases with one count replaced.

    Cases are at 0, the confusion matrix at 1 to 4, histograms at 5 to 36, log loss at 37, Brier at 38.
    """
    counts = np.frombuffer(a_state(PLAN.plan), dtype="<i8").copy()
    counts[index] = value
    return counts.tobytes()


@pytest.mark.parametrize(
    "state",
    [
        b"",
        a_state(PLAN.plan)[:-8],
        a_state(PLAN.plan) + bytes(8),
        an_edited_state(0, -1),
        an_edited_state(0, 21),
        an_edited_state(0, 2**62),
        an_edited_state(1, -1),
        an_edited_state(2, 1_000),
        an_edited_state(7, 5),
        an_edited_state(37, -1),
        an_edited_state(38, 2**60),
        a_state(PLAN.plan, num_cases=101, num_positives=50),
    ],
)
def test_counts_that_could_not_come_from_counting_do_not_leave(state: bytes) -> None:
    site = Site()
    with pytest.raises(OutboundError):
        site.door.states(EVALUATE, PLAN, state)
    assert site.acts == []


@given(index=st.integers(0, 38), value=st.integers(-(2**63), 2**63 - 1))
def test_any_single_count_replaced_is_blocked_or_leaves_as_it_is(index: int, value: int) -> None:
    state = an_edited_state(index, value)
    try:
        up = Site().door.states(EVALUATE, PLAN, state)
    except OutboundError:
        return
    assert up.payload in (state, bytes(len(state)))


def test_the_audit_line_is_written_before_the_message_is_handed_over_and_describes_exactly_it() -> None:
    site = Site()
    up = site.door.update(TRAIN, PLAN, packed(0.5), 12, 0.25)
    assert site.acts[-1] == "record"
    (line,) = site.lines
    envelope = json.loads(up.envelope)
    assert line.pop("payload_bytes") == len(up.payload or b"")
    assert line.pop("payload_digest") == hashlib.sha256(up.payload or b"").hexdigest()
    assert line.pop("envelope_digest") == hashlib.sha256(up.envelope).hexdigest()
    assert line.pop("plan") == envelope["plan_digest"]
    assert line.pop("round") == envelope["round_index"]
    assert line.pop("num_cases") == envelope["numbers"]["num_cases"]
    assert line.pop("mean_loss") == envelope["numbers"]["mean_loss"]
    assert line == {key: envelope[key] for key in ("run_id", "action", "split", "code")}


def test_a_message_without_payload_is_audited_as_such() -> None:
    site = Site()
    site.door.refusal(TRAIN, RefusalCode.CANCELLED)
    assert site.lines[0]["payload_bytes"] == 0
    assert site.lines[0]["payload_digest"] == "none"
    assert site.lines[0]["code"] == 43


def test_nothing_leaves_when_the_audit_line_cannot_be_written() -> None:
    def full(event: str, **fields: Any) -> None:
        raise AuditError("no space", remedy="Free disk space.")

    door = OutboundDoor("north", SIGN, full)
    with pytest.raises(AuditError):
        door.update(TRAIN, PLAN, packed(0.5), 12, 0.5)
    with pytest.raises(AuditError):
        door.states(EVALUATE, PLAN, a_state(PLAN.plan))
    with pytest.raises(AuditError):
        door.counts(PREPARE, PLAN, {"train": 9, "validation": 9, "test": 9})
    with pytest.raises(AuditError):
        door.refusal(TRAIN, RefusalCode.CANCELLED)


def test_a_message_that_leaves_again_is_the_same_and_gets_a_line_of_its_own() -> None:
    site = Site()
    first = site.door.update(TRAIN, PLAN, packed(0.5), 12, 0.25)
    assert site.door.again(first) == first
    assert len(site.lines) == 2
    assert site.lines[0] == site.lines[1]


@pytest.mark.parametrize("code", list(RefusalCode))
def test_a_refusal_says_a_number_that_a_site_may_say_and_never_yes(code: RefusalCode) -> None:
    envelope = envelope_of(Site().door.refusal(TRAIN, code))
    expected = code if 0 < code < 60 else RefusalCode.INTERNAL
    assert envelope.code == expected
    assert envelope.numbers.model_dump(exclude_none=True) == {}


CANARY = "DOE^JOHN"
TOKENS = re.compile(
    r'\{"action":"(prepare|train|evaluate|baseline)","base_digest":(null|"[0-9a-f]{64}"),"code":\d+,'
    r'"numbers":\{"mean_loss":(null|[0-9.e+]+),"num_cases":(null|\d+),"num_quarantined":(null|\d+),'
    r'"num_test":(null|\d+),"num_train":(null|\d+),'
    r'"num_validation":(null|\d+),"seconds":(null|[0-9.]+)\},"payload_digest":(null|"[0-9a-f]{64}"),'
    r'"plan_digest":"[0-9a-f]{64}","round_index":\d+,"run_id":"run-1","site":"north",'
    r'"split":"(validation|test)","version":1\}'
)
HOSTILE: st.SearchStrategy[Any] = st.one_of(
    st.text(max_size=30).map(lambda text: CANARY + text),
    st.floats(),
    st.integers(),
    st.none(),
    st.lists(st.just(CANARY)),
    st.dictionaries(st.just(CANARY), st.just(CANARY)),
)


@given(
    payload=st.binary(max_size=64)
    | st.lists(st.floats(width=32), min_size=8, max_size=8).map(lambda values: struct.pack("<8f", *values)),
    num_cases=st.integers() | HOSTILE,
    loss=st.floats() | HOSTILE,
)
def test_whatever_a_worker_says_about_an_update_only_the_listed_numbers_leave(
    payload: bytes, num_cases: Any, loss: Any
) -> None:
    site = Site()
    try:
        up = site.door.update(TRAIN, PLAN, payload, num_cases, loss)
    except (FederationError, TypeError, ValueError, OverflowError):
        assert site.lines == []
        return
    assert TOKENS.fullmatch(up.envelope.decode())
    assert len(up.payload or b"") == 4 * NUM_ELEMENTS
    assert CANARY not in json.dumps(site.lines)


@given(
    counts=st.dictionaries(
        st.sampled_from(["train", "validation", "test", CANARY]), st.integers(-9, 99) | HOSTILE
    )
)
def test_whatever_a_worker_says_about_its_counts_only_the_listed_numbers_leave(
    counts: dict[str, Any],
) -> None:
    site = Site()
    try:
        up = site.door.counts(PREPARE, PLAN, counts)
    except (FederationError, TypeError, ValueError, KeyError):
        assert site.lines == []
        return
    assert TOKENS.fullmatch(up.envelope.decode())
    assert CANARY not in json.dumps(site.lines)


@given(st.lists(st.floats(width=32), max_size=20))
def test_magnitude_equals_numpys_own_largest_element_and_norm(values: list[float]) -> None:
    flat = np.array(values, dtype=np.float32)
    largest, norm = magnitude(flat)
    if not np.isfinite(flat).all():
        assert not np.isfinite(norm)
        return
    assert largest == (np.abs(flat).max() if values else 0.0)
    np.testing.assert_allclose(norm, np.linalg.norm(flat.astype(np.float64)), rtol=1e-12)


def test_magnitude_finds_a_single_bad_element_in_any_block() -> None:
    flat = np.zeros(2 * (1 << 20) + 3, dtype=np.float32)
    for place in (0, (1 << 20) - 1, 1 << 20, len(flat) - 1):
        flat[place] = np.nan
        assert not np.isfinite(magnitude(flat)[1])
        flat[place] = 7.0
        assert magnitude(flat) == (7.0, 7.0)
        flat[place] = 0.0


def test_a_plan_with_the_widest_bounds_still_stops_what_is_not_finite() -> None:
    wide = signed(a_plan(privacy={"max_norm": 1e308, "max_abs": 1024.0}))
    instruction: Instruction = an_instruction(wide, base=packed())
    with pytest.raises(OutboundError):
        Site().door.update(instruction, wide, packed(float("inf")), 12, 0.5)
    assert Site().door.update(instruction, wide, packed(1024.0), 12, 0.5).payload == packed(1024.0)
