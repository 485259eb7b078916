"""The gate for plans: nothing of a plan is used before it passed here.

A plan passes when its signature, federation and dates hold, this installation has the parts it names, the
site's policy has no objection, no other run has used it, and the operator approved exactly these bytes
(or a rule of the policy did). A plan that only lacks approval is kept, so that the operator can read it.
The policy and the approvals are read anew for every decision: a change holds from the next message on.

Each round is trained with one model, and a few models are measured where the plan says (`questions`). The
same question about the same model may come again, because a resumed run repeats what it lost and the answer
is the same; a round with another model, or one model too many, is refused, whatever the server's reasons.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from fedward_client.config import SiteHome
from fedward_client.plan_ledger import LedgerRow, PlanLedger
from fedward_client.plan_summary import readable_summary
from fedward_client.policy import SitePolicy, load_policy
from fedward_client.questions import is_implied, max_models, place_of_question
from fedward_common.audit import AuditLog
from fedward_common.envelope import Instruction, RunId
from fedward_common.errors import PlanRefusedError, PolicyError, RefusalCode, UsageError
from fedward_common.federation import Federation
from fedward_common.files import write_atomically
from fedward_common.identity import verify_plan
from fedward_common.plan import SignedPlan, TrainingPlan, parse_signed_plan
from fedward_common.registry import DATASETS, MODELS, STRATEGIES, TASKS, TRAINERS, TRANSFORMS, Registry

__all__ = ["PlanGate", "StoredPlan", "readable_summary"]

Status = Literal["pending", "approved", "used", "expired", "refused"]

_DIGEST_START = re.compile(r"[0-9a-f]{12,64}")
_RUN_ID: TypeAdapter[str] = TypeAdapter(RunId)


@dataclass(frozen=True)
class StoredPlan:
    """A plan that this site knows.

    Attributes:
        status: "pending" waits for the operator, "approved" may run, "used" is bound to a run, "expired"
            can no longer run, "refused" exceeds the policy's limits.
        objections: what the policy has against it.
        run_id: the run that uses it.
        last_round: newest round taken part in, 0 for none.
    """

    signed: SignedPlan
    status: Status
    objections: tuple[str, ...]
    received: str
    run_id: str | None
    last_round: int


class PlanGate:
    """Decides about plans and rounds of one site, and writes every decision to the audit log.

    The daemon asks `decide` and `admit`; the operator's commands use `plans`, `find` and `approve`.

    Args:
        home: the site's folder.
        federation: whose coordinators' plans are considered.
        audit: where decisions are written.
    """

    def __init__(self, home: SiteHome, federation: Federation, audit: AuditLog) -> None:
        self._home = home
        self._federation = federation
        self._audit = audit
        self._ledger = PlanLedger(home.plans / "ledger.sqlite")
        self._noted: set[tuple[str, str, str]] = set()
        home.plans.mkdir(mode=0o700, exist_ok=True)

    def decide(self, document: bytes, run_id: str, *, now: datetime | None = None) -> SignedPlan:
        """Return the plan if it may run here as part of that run.

        Every message asks again; that a plan is accepted or waits is audited once a process and run.

        Raises:
            PlanRefusedError: it may not; `code` says why, for the server, and the message for the operator.
            PolicyError, AuditError: the ledger or the audit log cannot be written.
        """
        moment = now or datetime.now(UTC)
        try:
            signed, approved_by = self._judge(document, run_id, moment)
        except PlanRefusedError as refusal:
            if refusal.code != RefusalCode.PLAN_NOT_APPROVED:
                document_digest = hashlib.sha256(document).hexdigest()
                self._audit.append(
                    "plan_refused",
                    document=document_digest,
                    run_id=_run_token(run_id),
                    code=int(refusal.code),
                )
            raise
        self._note("plan_accepted", signed, run_id, approved_by=approved_by)
        return signed

    def admit(self, signed: SignedPlan, instruction: Instruction) -> None:
        """Enter a question about a model before any work for it is done.

        Args:
            signed: the plan that `decide` returned for the instruction's run.
            instruction: what is asked; `base_digest` names the model.

        Raises:
            PlanRefusedError: the plan does not involve that question, or it was answered for another
                model, or the round is older than one taken part in, or the run was never accepted.
            PolicyError, AuditError: the ledger or the audit log cannot be written.
        """
        asked: dict[str, str | int] = {"run_id": instruction.run_id, "round": instruction.round_index}
        if is_implied(signed.content, instruction) and self._entered(signed, instruction):
            if instruction.action == "train":
                self._audit.append("round_admitted", **asked, base=instruction.base_digest or "none")
            return
        self._audit.append(
            "round_refused",
            **asked,
            action=instruction.action,
            split=instruction.split,
            base=instruction.base_digest or "none",
            code=int(RefusalCode.ROUND_REPLAYED),
        )
        raise PlanRefusedError(
            f"run {instruction.run_id} asks to {instruction.action} in round {instruction.round_index}:"
            " not in the plan, or answered already for another model",
            remedy="None is needed here; ask the coordinator to resume the run or to start a new one.",
            code=RefusalCode.ROUND_REPLAYED,
        )

    def _entered(self, signed: SignedPlan, instruction: Instruction) -> bool:
        if instruction.plan_digest != signed.digest:
            return False
        if instruction.action == "survey":
            return True  # every answer is the first one over again: `session` keeps it
        if instruction.base_digest is None:
            return False
        if instruction.action == "train":
            return self._ledger.enter_round(
                instruction.run_id, instruction.round_index, instruction.base_digest
            )
        place = place_of_question(instruction)
        return self._ledger.enter_measurement(instruction, place, max_models=max_models(instruction))

    def plans(self, *, now: datetime | None = None) -> list[StoredPlan]:
        """Every plan this site knows, oldest first."""
        policy = load_policy(self._home.policy)
        return [self._describe(row, policy, now or datetime.now(UTC)) for row in self._ledger.rows()]

    def find(self, start: str) -> StoredPlan:
        """The one plan whose digest begins with `start` (12 hex digits or more).

        Raises:
            UsageError: none or several do, or `start` is too short.
        """
        found = [stored for stored in self.plans() if stored.signed.digest.startswith(start)]
        if _DIGEST_START.fullmatch(start) is None or len(found) != 1:
            raise UsageError(
                f"{len(found)} plans have a digest that begins with {start!r}, expected 1",
                remedy="Give at least 12 digits of a digest that `fedward-site plan list` shows, or a file.",
            )
        return found[0]

    def inspect(self, source: str | Path, *, now: datetime | None = None) -> SignedPlan:
        """Read one plan that could be approved: a signed file, or one that waits, by its digest.

        Raises:
            UsageError: no such plan.
            PlanRefusedError: it does not verify, or the policy refuses it whoever approves it.
        """
        if isinstance(source, Path) or _DIGEST_START.fullmatch(source) is None:
            document = _read_document(Path(source))
        else:
            document = self.find(source).signed.to_bytes()
        signed = verify_plan(document, self._federation, now=now or datetime.now(UTC))
        self._check_permitted(signed)
        return signed

    def approve(self, source: str | Path | SignedPlan, *, now: datetime | None = None) -> SignedPlan:
        """Approve exactly one plan: the one that `inspect` returned and the operator has read.

        Raises:
            UsageError: no such plan.
            PlanRefusedError: it does not verify, or the policy refuses it whoever approves it.
        """
        moment = now or datetime.now(UTC)
        signed = source if isinstance(source, SignedPlan) else self.inspect(source, now=moment)
        verify_plan(signed.to_bytes(), self._federation, now=moment)
        self._check_permitted(signed)
        self._keep(signed, moment)
        if self._ledger.approve(signed.digest, moment):
            self._audit.append("plan_approved", plan=signed.digest, signer=signed.signer)
        return signed

    def _judge(self, document: bytes, run_id: str, now: datetime) -> tuple[SignedPlan, str]:
        signed = verify_plan(document, self._federation, now=now)
        if _run_token(run_id) != run_id:
            raise PlanRefusedError(
                "the run's id is malformed", remedy="Report this.", code=RefusalCode.PAYLOAD_MALFORMED
            )
        self._keep(signed, now)
        rule_approves = self._check_permitted(signed)
        _check_supported(signed)
        row = self._ledger.row(signed.digest)
        if row is not None and row.run_id not in (None, run_id):
            raise _replayed(signed)
        if (row is None or row.approved is None) and not rule_approves:
            self._note("plan_pending", signed, run_id)
            raise PlanRefusedError(
                f"plan {signed.content.name} waits for approval",
                remedy=f"Read and approve it: fedward-site plan approve {signed.digest}",
                code=RefusalCode.PLAN_NOT_APPROVED,
            )
        if not self._ledger.bind(signed.digest, run_id):
            raise _replayed(signed)
        return signed, "rule" if row is None or row.approved is None else "operator"

    def _check_permitted(self, signed: SignedPlan) -> bool:
        """Refuse what the policy's limits or its faults rule out; whether a rule approves the plan."""
        try:
            policy = load_policy(self._home.policy)
        except PolicyError as error:
            raise PlanRefusedError(
                error.message, remedy=error.remedy, code=RefusalCode.PLAN_REFUSED
            ) from error
        objections = policy.objections(signed)
        if objections:
            raise PlanRefusedError(
                f"policy refuses plan {signed.content.name}: {'; '.join(objections)}",
                remedy="Ask for another plan, or change the limits in policy.toml.",
                code=RefusalCode.PLAN_REFUSED,
            )
        return policy.approves(signed)

    def _note(self, event: str, signed: SignedPlan, run_id: str, **fields: str) -> None:
        if (event, signed.digest, run_id) not in self._noted:
            self._audit.append(event, plan=signed.digest, run_id=run_id, signer=signed.signer, **fields)
            self._noted.add((event, signed.digest, run_id))

    def _keep(self, signed: SignedPlan, now: datetime) -> None:
        """Store a genuine plan. The file is complete before the ledger names it."""
        path = self._path(signed.digest)
        if not path.exists():
            write_atomically(path, signed.to_bytes())
        self._ledger.receive(signed.digest, now)

    def _stored(self, digest: str) -> SignedPlan:
        path = self._path(digest)
        signed = parse_signed_plan(_read_document(path))
        if signed.digest != digest:
            raise PolicyError(
                f"{path} was changed: its digest is {signed.digest}",
                remedy="Remove the file; find out who did.",
            )
        return signed

    def _describe(self, row: LedgerRow, policy: SitePolicy, now: datetime) -> StoredPlan:
        signed = self._stored(row.digest)
        objections = tuple(policy.objections(signed))
        status: Status
        if row.run_id is not None:
            status = "used"
        elif signed.expired(now):
            status = "expired"
        elif objections:
            status = "refused"
        else:
            status = "approved" if row.approved is not None or policy.approves(signed) else "pending"
        return StoredPlan(signed, status, objections, row.received, row.run_id, row.last_round)

    def _path(self, digest: str) -> Path:
        return self._home.plans / f"{digest}.json"


def _check_supported(signed: SignedPlan) -> None:
    """Refuse names that this installation does not have; nothing is imported to find out."""
    plan = signed.content
    named: list[tuple[Registry, str]] = [(DATASETS, plan.data.dataset)]
    if isinstance(plan, TrainingPlan):
        named += [
            (TASKS, plan.task.name),
            (TRANSFORMS, plan.transforms.name),
            (MODELS, plan.model.name),
            (TRAINERS, plan.training.trainer),
            (STRATEGIES, plan.strategy.name),
        ]
    # Installed packages are searched, at some milliseconds each, only for a name that is not built in.
    missing = [
        f"{registry.kind}: {name}"
        for registry, name in named
        if name not in registry.builtin and name not in registry.names()
    ]
    if missing:
        raise PlanRefusedError(
            f"plan {plan.name} names parts that are not installed here: {', '.join(missing)}",
            remedy="Install the package that offers them, or ask for another plan.",
            code=RefusalCode.PLAN_UNSUPPORTED,
        )


def _read_document(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"plan {path}: {error.strerror}", remedy="Give a digest from `fedward-site plan list`, or a file."
        ) from error


def _run_token(run_id: str) -> str:
    """The run's id as it may stand in the audit log; "malformed" for anything else."""
    try:
        return _RUN_ID.validate_python(run_id)
    except ValidationError:
        return "malformed"


def _replayed(signed: SignedPlan) -> PlanRefusedError:
    return PlanRefusedError(
        f"plan {signed.content.name} and this run are already bound to another run or plan",
        remedy="Ask the coordinator to sign the plan again for a new run; a plan runs once.",
        code=RefusalCode.PLAN_REPLAYED,
    )
