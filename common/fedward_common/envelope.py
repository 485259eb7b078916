"""The two documents that accompany every payload: the server's instruction and the site's envelope.

Both are small JSON documents with a closed list of keys. The envelope is all the text that ever leaves
a site: enumerated actions, digests, an integer code and bounded numbers. There is no key that could
carry a sentence, a path or a name other than the site's own.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedward_common.errors import PayloadError
from fedward_common.plan import Name, TrainingPlan, canonical_bytes

PROTOCOL_VERSION: Literal[1] = 1
Action = Literal["prepare", "train", "evaluate", "baseline", "survey"]
SplitName = Literal["validation", "test"]
Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RunId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,79}$")]
MAX_COUNT = 2**24


class Instruction(BaseModel):
    """What the server asks of one site in one message.

    Attributes:
        base_digest: SHA-256 of the packed global weights sent along; None when none are.
        split: which held-out cases an `evaluate` measures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = PROTOCOL_VERSION
    run_id: RunId
    plan_digest: Hex64
    action: Action
    round_index: int = Field(ge=0, le=10_000)
    base_digest: Hex64 | None = None
    split: SplitName = "validation"


class Numbers(BaseModel):
    """Every number that may accompany a payload; None is "not released".

    Attributes:
        num_train, num_validation, num_test: cases the site has for each purpose.
        num_quarantined: studies of which the site refuses something.
        num_cases: cases behind this payload.
        mean_loss: training loss per case, rounded.
        seconds: time the site worked on the message, rounded to tenths.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_train: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    num_validation: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    num_test: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    num_quarantined: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    num_cases: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    mean_loss: float | None = Field(default=None, ge=0, le=1e6)
    seconds: float | None = Field(default=None, ge=0, le=1e7)


class Envelope(BaseModel):
    """What a site says, signed as a whole with its Ed25519 key.

    The payload itself travels beside the envelope and is bound to it by `payload_digest`; run, round,
    plan, base model and site are all under the signature, so nothing can be replayed elsewhere.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = PROTOCOL_VERSION
    site: Name
    run_id: RunId
    plan_digest: Hex64
    action: Action
    round_index: int = Field(ge=0, le=10_000)
    base_digest: Hex64 | None
    split: SplitName
    code: int = Field(ge=0, le=255)
    numbers: Numbers = Numbers()
    payload_digest: Hex64 | None = None

    def answers(self, instruction: Instruction) -> bool:
        """Whether this envelope replies to exactly that instruction."""
        keys = ("version", "run_id", "plan_digest", "action", "round_index", "base_digest", "split")
        return all(getattr(self, key) == getattr(instruction, key) for key in keys)


def envelope_bytes(envelope: Envelope) -> bytes:
    """The canonical bytes that are signed and sent."""
    return canonical_bytes(envelope)


def signed_bytes(body: bytes) -> bytes:
    """What a site's signature covers: never to be taken for a signature over another kind of document."""
    return b"fedward-update-v1\n" + body


def parse_envelope(document: bytes) -> Envelope:
    """Read an envelope; PayloadError unless it is one, in canonical form."""
    remedy = "The site runs another version of fedward; bring both to the same version."
    try:
        envelope = Envelope.model_validate_json(document)
    except ValidationError as error:
        raise PayloadError(f"not an envelope: {error.error_count()} faults", remedy=remedy) from error
    if envelope_bytes(envelope) != document:
        raise PayloadError("envelope is not in canonical form", remedy=remedy)
    return envelope


def parse_instruction(document: bytes) -> Instruction:
    """Read an instruction; PayloadError unless it is one."""
    try:
        return Instruction.model_validate_json(document)
    except ValidationError as error:
        raise PayloadError(
            f"not an instruction: {error.error_count()} faults",
            remedy="The server runs another version of fedward; bring both to the same version.",
        ) from error


def job_seed(plan: TrainingPlan, site: str, round_index: int, purpose: str = "train") -> int:
    """Seed of one site's work in one round: the same in a simulation and at the real site.

    Depends on the plan's seed, the site's name, the round and the purpose only.
    """
    key = f"fedward-seed-v1|{plan.seed}|{site}|{round_index}|{purpose}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
