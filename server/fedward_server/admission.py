"""Decide whether a site's answer may be used (hop 8).

Runs before any arithmetic: one NaN admitted is a global model lost. Refusals are values, not
exceptions, because one bad site must not stop the round for the others. Nothing here trusts a length, a
name or a number that the site sent until it agrees with the signed plan and the site's signature.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedward_common.aggregation import largest_of
from fedward_common.envelope import Envelope, Instruction, Numbers, parse_envelope, signed_bytes
from fedward_common.errors import PayloadError, RefusalCode
from fedward_common.evaluation.state import check_state
from fedward_common.identity import verify
from fedward_common.plan import PrivacyPart, ReadinessPlan, SignedPlan, TrainingPlan
from fedward_common.protocol import Up
from fedward_common.readiness_state import check_survey
from fedward_common.state_payload import unpack_state
from fedward_common.weights import Weights, num_bytes, unpack

_BLOCK = 1 << 18  # elements that are converted to float64 at once, and fit the cache


@dataclass(frozen=True)
class Answer:
    """A site's answer after the checks: usable when `code` is OK.

    `delta` is set for an admitted `train`, with the largest absolute value of each of its tensors;
    `state` for an admitted `evaluate`, `baseline` or `survey`, unless the site held it back because it
    rests on too few cases.
    """

    site: str
    code: RefusalCode
    numbers: Numbers = field(default_factory=Numbers)
    delta: Weights | None = None
    largest: Mapping[str, float] | None = None
    state: dict[str, NDArray[np.int64]] | None = None
    payload_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether it may be used."""
        return self.code is RefusalCode.OK


def admit(up: Up, instruction: Instruction, signed: SignedPlan, site: str, signing_key: str) -> Answer:
    """Check one answer.

    Args:
        up: what arrived.
        instruction: what the site was asked.
        signed: the plan of the run.
        site: the name that the connection's certificate proved.
        signing_key: that site's Ed25519 public key (hex) in the federation's roster.
    """
    if not verify(signing_key, signed_bytes(up.envelope), up.signature):
        return Answer(site, RefusalCode.UPDATE_UNSIGNED)
    try:
        envelope = parse_envelope(up.envelope)
    except PayloadError:
        return Answer(site, RefusalCode.UPDATE_MALFORMED)
    if envelope.site != site or not envelope.answers(instruction):
        return Answer(site, RefusalCode.UPDATE_STALE)
    if envelope.code != RefusalCode.OK:
        return Answer(site, _known_code(envelope.code))
    if not _payload_matches(envelope, up.payload):
        return Answer(site, RefusalCode.UPDATE_MALFORMED)
    if instruction.action == "prepare":
        return Answer(
            site, RefusalCode.OK if up.payload is None else RefusalCode.UPDATE_MALFORMED, envelope.numbers
        )
    if instruction.action == "train":
        return _admit_update(envelope, up.payload, signed)
    return _admit_state(envelope, up.payload, signed.content)


def _admit_update(envelope: Envelope, payload: bytes | None, signed: SignedPlan) -> Answer:
    privacy = signed.plan.privacy
    num_cases = envelope.numbers.num_cases
    if payload is None or num_cases is None or len(payload) != num_bytes(signed.body.layout):
        return Answer(envelope.site, RefusalCode.UPDATE_MALFORMED)
    if not privacy.min_cases <= num_cases <= privacy.max_cases:
        return Answer(envelope.site, RefusalCode.UPDATE_OUT_OF_BOUNDS)
    delta = unpack(payload, signed.body.layout)
    largest = largest_of(delta)
    code = _check_values(delta, largest, privacy)
    if code is not RefusalCode.OK:
        return Answer(envelope.site, code)
    return Answer(
        envelope.site,
        RefusalCode.OK,
        envelope.numbers,
        delta=delta,
        largest=largest,
        payload_bytes=len(payload),
    )


def _admit_state(envelope: Envelope, payload: bytes | None, plan: TrainingPlan | ReadinessPlan) -> Answer:
    try:
        state = unpack_state(payload or b"", plan)
        if isinstance(plan, ReadinessPlan):
            check_survey(state, plan)
        else:
            check_state(state, plan, max_cases=plan.privacy.max_cases)
    except PayloadError:
        return Answer(envelope.site, RefusalCode.UPDATE_MALFORMED)
    held_back = envelope.numbers.num_cases is None
    if isinstance(plan, ReadinessPlan) and envelope.numbers.num_cases == 0:
        return Answer(envelope.site, RefusalCode.UPDATE_MALFORMED)  # no site counts nobody
    if int(state["num_cases"][0]) != (envelope.numbers.num_cases or 0):
        return Answer(envelope.site, RefusalCode.UPDATE_MALFORMED)
    return Answer(
        envelope.site,
        RefusalCode.OK,
        envelope.numbers,
        state=None if held_back else state,
        payload_bytes=len(payload or b""),
    )


def _check_values(delta: Weights, largest: Mapping[str, float], privacy: PrivacyPart) -> RefusalCode:
    """Finite and within the plan's bounds. NaN fails every comparison, hence their direction."""
    if not all(value < math.inf for value in largest.values()):
        return RefusalCode.UPDATE_NOT_FINITE
    if not all(value <= privacy.max_abs for value in largest.values()):
        return RefusalCode.UPDATE_OUT_OF_BOUNDS
    return RefusalCode.OK if _norm(delta) <= privacy.max_norm else RefusalCode.UPDATE_OUT_OF_BOUNDS


def _norm(delta: Weights) -> float:
    """Euclidean norm, summed in float64: in float32, 100 million elements lose what a bound is about."""
    total = 0.0
    for array in delta.values():
        flat = array.reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK].astype(np.float64)
            total += float(block @ block)
    return math.sqrt(total)


def _payload_matches(envelope: Envelope, payload: bytes | None) -> bool:
    digest = None if payload is None else hashlib.sha256(payload).hexdigest()
    return envelope.payload_digest == digest


def _known_code(code: int) -> RefusalCode:
    """What the site says; a code that it cannot mean, such as one of the server's own, is INTERNAL."""
    try:
        known = RefusalCode(code)
    except ValueError:
        return RefusalCode.INTERNAL
    return known if known.said_by_site else RefusalCode.INTERNAL
