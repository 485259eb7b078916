"""THE ONE DOOR: everything that leaves the site is made here, and nowhere else (hop 6).

A reply is an envelope of enumerated numbers and at most one payload, whose length, dtype and order come
from the signed plan. The door checks what it is given against that list, signs it, writes an audit line
saying what left, and only then hands it to the network. There is no argument through which a text,
a path or a pixel could pass; what does not fit is not sent, and the server learns a number instead.

What this cannot stop: numbers that encode something else. A model's weights are such numbers; that is
why only approved plans with installed code run (see README, "What leaves a site").
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedward_common.envelope import (
    Envelope,
    Instruction,
    Numbers,
    envelope_bytes,
    parse_envelope,
    signed_bytes,
)
from fedward_common.errors import OutboundError, PayloadError, RefusalCode
from fedward_common.evaluation.state import check_state, suppressed
from fedward_common.plan import ReadinessPlan, SignedPlan, TrainingPlan, readiness_plan
from fedward_common.protocol import Up
from fedward_common.readiness_state import check_survey
from fedward_common.state_payload import unpack_state
from fedward_common.weights import num_bytes

_BLOCK = 1 << 20


@dataclass(frozen=True)
class OutboundDoor:
    """Makes, signs and records every message that leaves.

    Args:
        site: the site's name, as in its certificate.
        sign: Ed25519 over bytes, as hex.
        record: appends one audit line; called before the message is handed over.
        min_cases: the site's own floor for the number of cases behind a released number.
    """

    site: str
    sign: Callable[[bytes], str]
    record: Callable[..., None]
    min_cases: int = 1

    def refusal(self, instruction: Instruction, code: RefusalCode) -> Up:
        """Say no, with a number that a site may say; any other, "yes" above all, becomes INTERNAL."""
        said = code if code.said_by_site else RefusalCode.INTERNAL
        return self._send(instruction, said, Numbers(), None)

    def again(self, up: Up) -> Up:
        """Let a message that left before leave once more, with an audit line of its own."""
        self._record(parse_envelope(up.envelope), up.envelope, up.payload)
        return up

    def counts(self, instruction: Instruction, signed: SignedPlan, counts: dict[str, int]) -> Up:
        """Say how many cases the site has for each purpose, and how many studies it refuses.

        A small count is not released.

        A site with fewer training cases than the floor must not train: its update would be about them.
        """
        floor = self.floor(signed.plan)
        if counts["train"] < floor:
            return self.refusal(instruction, RefusalCode.COHORT_TOO_SMALL)
        released = {f"num_{name}": self._count(value, floor) for name, value in counts.items()}
        return self._send(instruction, RefusalCode.OK, Numbers(**released), None)

    def update(
        self,
        instruction: Instruction,
        signed: SignedPlan,
        payload: bytes,
        num_cases: int,
        mean_loss: float,
        num_quarantined: int | None = None,
    ) -> Up:
        """Let a weight update out.

        Args:
            instruction: the message being answered.
            signed: the plan whose layout the payload must have.
            payload: packed float32 delta (local minus global).
            num_cases: training cases behind it.
            mean_loss: training loss per case.
            num_quarantined: studies of which something is refused; a small count is not released, nor is
                one that is not known.

        Raises:
            OutboundError: wrong length, not finite, out of bounds, or too few cases.
        """
        privacy = signed.plan.privacy
        if num_cases < self.floor(signed.plan) or num_cases > privacy.max_cases:
            raise self._blocked(f"update rests on {num_cases} cases")
        if len(payload) != num_bytes(signed.body.layout):
            raise self._blocked(
                f"update has {len(payload)} bytes, the layout {num_bytes(signed.body.layout)}"
            )
        largest, norm = magnitude(np.frombuffer(payload, dtype="<f4"))
        if not math.isfinite(norm):
            raise self._blocked("update is not finite")
        if largest > privacy.max_abs or norm > privacy.max_norm:
            raise self._blocked(f"update exceeds the plan's bounds: max {largest:.3g}, norm {norm:.3g}")
        loss = round(min(max(mean_loss, 0.0), 1e6), 4) if math.isfinite(mean_loss) else None
        numbers = Numbers(
            num_cases=num_cases,
            mean_loss=loss,
            num_quarantined=(
                None if num_quarantined is None else self._count(num_quarantined, self.floor(signed.plan))
            ),
        )
        return self._send(instruction, RefusalCode.OK, numbers, payload)

    def states(self, instruction: Instruction, signed: SignedPlan, payload: bytes) -> Up:
        """Let additive metric counts out, or a state of zeros when they rest on too few cases.

        Raises:
            OutboundError: the counts do not have the plan's layout or contradict each other.
        """
        plan = signed.plan
        try:
            state = unpack_state(payload, plan)
            check_state(state, plan, max_cases=plan.privacy.max_cases)
        except PayloadError as error:
            raise self._blocked(f"metric state: {error.message}") from error
        num_cases = int(state["num_cases"].sum())
        if suppressed(state, plan, min_cases=self.floor(plan)):
            return self._send(instruction, RefusalCode.OK, Numbers(), bytes(len(payload)))
        return self._send(instruction, RefusalCode.OK, Numbers(num_cases=num_cases), payload)

    def ready(self, instruction: Instruction) -> Up:
        """Say that the site takes part in a survey, and nothing about its cases."""
        return self._send(instruction, RefusalCode.OK, Numbers(), None)

    def survey(self, instruction: Instruction, signed: SignedPlan, payload: bytes) -> Up:
        """Let a survey's counts out, of which the worker has held small cells back.

        Raises:
            OutboundError: the counts do not have the plan's layout, contradict each other, or a small cell
                could be had from them.
        """
        plan = readiness_plan(signed.content)
        try:
            state = unpack_state(payload, plan)
            check_survey(state, plan, min_cases=self.floor(plan))
        except PayloadError as error:
            raise self._blocked(error.message) from error
        num_cases = int(state["num_cases"][0]) or None
        return self._send(instruction, RefusalCode.OK, Numbers(num_cases=num_cases), payload)

    def floor(self, plan: TrainingPlan | ReadinessPlan) -> int:
        """Least number of cases behind a released number: the plan's or the site's own."""
        return max(self.min_cases, plan.privacy.min_cases)

    def _count(self, value: int, floor: int) -> int | None:
        return value if value >= floor or value == 0 else None

    def _blocked(self, what: str) -> OutboundError:
        return OutboundError(
            f"outbound check: {what}", remedy="Nothing left the site. See: fedward-site outbound show"
        )

    def _send(
        self, instruction: Instruction, code: RefusalCode, numbers: Numbers, payload: bytes | None
    ) -> Up:
        envelope = Envelope(
            site=self.site,
            run_id=instruction.run_id,
            plan_digest=instruction.plan_digest,
            action=instruction.action,
            round_index=instruction.round_index,
            base_digest=instruction.base_digest,
            split=instruction.split,
            code=int(code),
            numbers=numbers,
            payload_digest=None if payload is None else hashlib.sha256(payload).hexdigest(),
        )
        body = envelope_bytes(envelope)
        up = Up(envelope=body, signature=self.sign(signed_bytes(body)), payload=payload)
        self._record(envelope, body, payload)
        return up

    def _record(self, envelope: Envelope, body: bytes, payload: bytes | None) -> None:
        """Write the audit line; a message whose line cannot be written does not leave."""
        numbers = envelope.numbers.model_dump()
        self.record(
            "outbound",
            run_id=envelope.run_id,
            plan=envelope.plan_digest,
            round=envelope.round_index,
            action=envelope.action,
            split=envelope.split,
            code=envelope.code,
            payload_bytes=0 if payload is None else len(payload),
            payload_digest=envelope.payload_digest or "none",
            envelope_digest=hashlib.sha256(body).hexdigest(),
            **{name: value for name, value in numbers.items() if value is not None},
        )


def magnitude(flat: NDArray[np.float32]) -> tuple[float, float]:
    """Largest absolute element and L2 norm (float64) of a flat update, block by block.

    A NaN or infinity anywhere makes the norm not finite.
    """
    largest = total = 0.0
    for start in range(0, len(flat), _BLOCK):
        with np.errstate(invalid="ignore"):  # a signalling NaN is about to be refused, not to be warned of
            block = flat[start : start + _BLOCK].astype(np.float64)
        total += float(block @ block)
        largest = max(largest, float(np.abs(block, out=block).max(initial=0.0)))
    return largest, math.sqrt(total) if total >= 0 else math.nan
