"""Errors that tell a person what happened and what to do, and the exit code they end a command with.

Every error raised on purpose is a `FederationError`: a message (what, where, found, expected) and a
remedy (the command or setting that helps). At a process edge the command line prints both and exits
with `exit_code`. What crosses the network is never a text but a `RefusalCode`.
"""

from __future__ import annotations

from enum import IntEnum


class FederationError(Exception):
    """Base of every error that fedward raises on purpose.

    Args:
        message: what happened, where, what was found and what was expected.
        remedy: the command or setting that resolves it.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class UsageError(FederationError):
    """A command was given something it cannot use."""

    exit_code = 2


class PlanError(FederationError):
    """A training plan cannot be read, is out of bounds, or its signature does not hold."""

    exit_code = 3


class PlanRefusedError(PlanError):
    """A site, or the check of a signature, refuses a signed plan or a round of it.

    Args:
        message: why, for the one who reads it on this machine.
        remedy: what resolves it.
        code: all that another machine is told.
    """

    def __init__(self, message: str, *, remedy: str, code: RefusalCode) -> None:
        super().__init__(message, remedy=remedy)
        self.code = code


class IdentityError(FederationError):
    """A key or certificate is missing, unreadable, expired, or belongs to somebody else."""

    exit_code = 4


class PolicyError(FederationError):
    """The site's policy or its operator does not permit what was asked."""

    exit_code = 5


class CohortError(FederationError):
    """The site's images or labels cannot be used as they are."""

    exit_code = 6


class ConnectionLostError(FederationError):
    """A peer cannot be reached or ended the connection."""

    exit_code = 7


class RunFailedError(FederationError):
    """A run ended without completing every round."""

    exit_code = 8


class CheckpointError(FederationError):
    """A checkpoint is missing, corrupt, or could not be written."""

    exit_code = 9


class AuditError(FederationError):
    """An audit log does not verify."""

    exit_code = 10


class OutboundError(FederationError):
    """Something tried to leave the site that the signed plan does not list."""

    exit_code = 11


class PayloadError(FederationError):
    """A message does not have the form that the signed plan lists."""

    exit_code = 12


class StorageError(FederationError):
    """A record kept on this machine (runs, index, ledger) cannot be read or written."""

    exit_code = 13


class EvaluationError(FederationError):
    """Predictions or metric states cannot be counted as they are."""

    exit_code = 14


class NotReadyError(FederationError):
    """A survey of the sites ended with no-go: rules of its plan are not met."""

    exit_code = 16


class RefusalCode(IntEnum):
    """All a site ever says about a failure: a number. The text stays in the site's own log."""

    OK = 0
    INTERNAL = 1
    PLAN_SIGNATURE = 10
    PLAN_FEDERATION = 11
    PLAN_EXPIRED = 12
    PLAN_REPLAYED = 13
    PLAN_NOT_APPROVED = 14
    PLAN_REFUSED = 15
    PLAN_UNSUPPORTED = 16
    ROUND_REPLAYED = 20
    BASE_MISMATCH = 21
    PAYLOAD_MALFORMED = 22
    COHORT_UNUSABLE = 30
    COHORT_TOO_SMALL = 31
    TRAINING_FAILED = 40
    TRAINING_DIVERGED = 41
    OUT_OF_MEMORY = 42
    CANCELLED = 43
    OUTBOUND_BLOCKED = 50
    # What the server finds out about a site by itself:
    UPDATE_UNSIGNED = 60
    UPDATE_MALFORMED = 61
    UPDATE_STALE = 62
    UPDATE_NOT_FINITE = 63
    UPDATE_OUT_OF_BOUNDS = 64
    SITE_OFFLINE = 70
    SITE_LATE = 71
    SITE_LOST = 72

    @property
    def meaning(self) -> str:
        """One sentence for the coordinator's screen and the report."""
        return _MEANINGS[self]

    @property
    def said_by_site(self) -> bool:
        """Whether a site may say this when it refuses; the codes above are what the server finds out."""
        return RefusalCode.OK < self < RefusalCode.UPDATE_UNSIGNED


_MEANINGS: dict[RefusalCode, str] = {
    RefusalCode.OK: "accepted",
    RefusalCode.INTERNAL: "failed for a reason recorded only in the site's own log",
    RefusalCode.PLAN_SIGNATURE: "the plan's signature does not verify at the site",
    RefusalCode.PLAN_FEDERATION: "the plan belongs to another federation",
    RefusalCode.PLAN_EXPIRED: "the plan has expired",
    RefusalCode.PLAN_REPLAYED: "the plan was already used by another run",
    RefusalCode.PLAN_NOT_APPROVED: "waiting for the site's operator to approve the plan",
    RefusalCode.PLAN_REFUSED: "the site's policy refuses the plan",
    RefusalCode.PLAN_UNSUPPORTED: "the site's installation lacks a part that the plan names",
    RefusalCode.ROUND_REPLAYED: "the plan has no such question, or the site answered it for other models",
    RefusalCode.BASE_MISMATCH: "the model received does not match its digest",
    RefusalCode.PAYLOAD_MALFORMED: "the message received does not have the form in the plan",
    RefusalCode.COHORT_UNUSABLE: "the site's images or labels cannot be used for this plan",
    RefusalCode.COHORT_TOO_SMALL: (
        "the site has fewer cases than the plan or its policy requires, or few others than in an earlier plan"
    ),
    RefusalCode.TRAINING_FAILED: "training failed for a reason recorded only in the site's own log",
    RefusalCode.TRAINING_DIVERGED: "training produced numbers that are not finite",
    RefusalCode.OUT_OF_MEMORY: "the site ran out of memory",
    RefusalCode.CANCELLED: "the site cancelled the work because the run was stopped",
    RefusalCode.OUTBOUND_BLOCKED: "the site's outbound check blocked its own message",
    RefusalCode.UPDATE_UNSIGNED: "the update does not carry the site's signature",
    RefusalCode.UPDATE_MALFORMED: "the update does not have the form in the plan",
    RefusalCode.UPDATE_STALE: "the update answers another round or another model",
    RefusalCode.UPDATE_NOT_FINITE: "the update holds numbers that are not finite",
    RefusalCode.UPDATE_OUT_OF_BOUNDS: "the update exceeds the plan's bounds",
    RefusalCode.SITE_OFFLINE: "the site was not connected when the round began",
    RefusalCode.SITE_LATE: "the site did not answer before the deadline",
    RefusalCode.SITE_LOST: "the connection to the site was lost during the round",
}


class TrainingError(FederationError):
    """Training or evaluation at a site ended without a result; `code` is what the server is told."""

    exit_code = 15

    def __init__(self, message: str, *, remedy: str, code: RefusalCode = RefusalCode.TRAINING_FAILED) -> None:
        super().__init__(message, remedy=remedy)
        self.code = code
