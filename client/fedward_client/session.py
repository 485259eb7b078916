"""What a site does with one instruction: check it, have the worker do it, let the answer out.

The order is fixed: signature, federation, expiry, replay, approval and policy (the gate) come before
anything in the message is used; the worker sees only a plan that passed; whatever it returns goes
through the outbound door. Every failure ends as a number to the server and a line in the site's log.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from fedward_client.outbound import OutboundDoor
from fedward_client.site_data import SiteData
from fedward_client.worker import code_of, place_of
from fedward_client.worker_process import WorkError
from fedward_common import weights
from fedward_common.envelope import Instruction, parse_instruction
from fedward_common.errors import FederationError, PayloadError, RefusalCode
from fedward_common.files import write_atomically
from fedward_common.plan import ReadinessPlan, SignedPlan
from fedward_common.protocol import Down, Up

SURVEYS = "surveys"
"""Folder in the site's home with the counts that answered readiness plans."""


_COUNTS = ("train", "validation", "test", "quarantined")


class Gate(Protocol):
    """Decides whether a plan may run here, and which questions of its server are answered."""

    def decide(self, document: bytes, run_id: str) -> SignedPlan:
        """Return the plan if its signature holds and it is approved; raise an error with `code` if not."""

    def admit(self, signed: SignedPlan, instruction: Instruction) -> None:
        """Raise an error with `code` when the plan has no such question, or it was about another model."""


class SiteWorker(Protocol):
    """Opens cohorts, trains, evaluates: a process of its own at a hospital, see `worker_process`."""

    @property
    def pid(self) -> int | None:
        """Process id while it runs; what was opened in another process is not open."""

    def start(self) -> bool:
        """Start it unless it runs; True when nothing is open in it."""

    def call(
        self, request: dict[str, Any], payload: bytes | memoryview = b""
    ) -> tuple[dict[str, Any], bytes | bytearray]:
        """Do what `request` asks; raise an error with `code` when that fails."""

    def kill(self) -> None:
        """End it at once."""

    def stop(self) -> None:
        """Let it end."""


@dataclass(frozen=True)
class SiteSettings:
    """The few values of a site's configuration that its work depends on."""

    name: str
    data: SiteData
    threads: int
    device: str


class SiteSession:
    """Answers instructions one at a time; `cancel` may be called from another thread."""

    def __init__(
        self,
        settings: SiteSettings,
        gate: Gate,
        door: OutboundDoor,
        worker: SiteWorker,
        report: Callable[..., None],
    ) -> None:
        """Wire a session.

        Args:
            settings: the site's name, folders and machine share.
            gate: plan approval and policy.
            door: the only maker of outgoing messages.
            worker: what touches images; may be shared by several simulated sites.
            report: writes one event to the site's own log.
        """
        self._settings = settings
        self._gate = gate
        self._door = door
        self._worker = worker
        self._report = report
        self._opened: tuple[int | None, str, str] | None = None
        self._counts: dict[str, int] = {}
        self._last: tuple[Instruction, Up] | None = None
        self._busy = threading.Lock()
        self._cancelled = False
        self._last_work = time.monotonic()

    @property
    def max_payload(self) -> int:
        """Bytes of the largest message this site reads."""
        return 2**31 - 1

    def handle(self, down: Down) -> Up | None:
        """Answer one message.

        None, which says nothing at all, when it is not even an instruction (there is nothing to refer to)
        and when the audit log cannot be written.
        """
        try:
            instruction = parse_instruction(down.instruction)
        except PayloadError as error:
            self._report("instruction_malformed", where=place_of(error))
            return None
        with self._busy:
            started = time.monotonic()
            self._cancelled = False
            try:
                up = self._answer(instruction, down)
            except Exception as error:  # the edge of the site: a number leaves, the place is logged here
                code = code_of(error, otherwise=RefusalCode.INTERNAL)
                self._report(
                    "instruction_refused",
                    run_id=instruction.run_id,
                    round=instruction.round_index,
                    action=instruction.action,
                    code=int(code),
                    where=getattr(error, "where", None) or place_of(error),
                )
                return self._refused(instruction, code)
            finally:
                self._last_work = time.monotonic()
            self._report(
                "instruction_done",
                run_id=instruction.run_id,
                round=instruction.round_index,
                action=instruction.action,
                seconds=round(time.monotonic() - started, 3),
            )
            return up

    def rest(self, idle_s: float) -> None:
        """End the worker, and forget the last answer, after so many seconds without work."""
        if self._busy.acquire(blocking=False):
            try:
                if time.monotonic() - self._last_work >= idle_s:
                    self._worker.stop()
                    self._last = None
            finally:
                self._busy.release()

    def cancel(self) -> None:
        """Stop whatever the worker is doing, now, and what this instruction would still have it do."""
        self._cancelled = True
        self._worker.kill()

    def close(self) -> None:
        """End the worker."""
        self._worker.stop()

    def _answer(self, instruction: Instruction, down: Down) -> Up:
        signed = self._gate.decide(down.signed_plan, instruction.run_id)
        if signed.digest != instruction.plan_digest:
            raise PayloadError(
                "instruction and plan do not belong together", remedy="Report this as a fault."
            )
        if self._last is not None and self._last[0] == instruction:
            # The server lost our answer (a restart, a cut connection): the same question, the same answer.
            return self._door.again(self._last[1])
        if isinstance(signed.content, ReadinessPlan):
            return self._take_part(instruction, signed)
        if instruction.action == "prepare":
            self._open(signed)
            return self._door.counts(instruction, signed, self._counts)
        payload = self._checked(instruction, down.payload, signed)
        self._gate.admit(signed, instruction)
        self._open(signed)
        up = self._work(instruction, signed, payload)
        self._last = (instruction, up)
        return up

    def _take_part(self, instruction: Instruction, signed: SignedPlan) -> Up:
        """Answer a survey, which has two questions: is the site ready, and what are its counts."""
        if instruction.action == "prepare":
            return self._door.ready(instruction)
        self._gate.admit(signed, instruction)
        return self._door.survey(instruction, signed, self._counted(signed))

    def _counted(self, signed: SignedPlan) -> bytes:
        """The released counts of a survey, made once and kept.

        Whoever asks a second time gets the same answer, whatever came into the folder since: from the
        difference of two answers the newest patient could be read.
        """
        kept = self._settings.data.home / SURVEYS / f"{signed.digest}.counts"
        if kept.exists():
            return kept.read_bytes()
        floor = self._door.floor(signed.content)
        _, reply = self._ask({"op": "survey", **self._place(signed), "min_cases": floor})
        kept.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomically(kept, bytes(reply))
        return bytes(reply)

    def _work(self, instruction: Instruction, signed: SignedPlan, payload: bytes) -> Up:
        request = {
            "op": instruction.action,
            "site": self._settings.name,
            "round_index": instruction.round_index,
            "split": instruction.split,
        }
        header, reply = self._ask(request, payload)
        if instruction.action == "train":
            return self._door.update(
                instruction,
                signed,
                bytes(reply),
                int(header["num_cases"]),
                float(header["mean_loss"]),
                self._counts["quarantined"],
            )
        return self._door.states(instruction, signed, bytes(reply))

    def _checked(self, instruction: Instruction, payload: bytes | None, signed: SignedPlan) -> bytes:
        if payload is None or len(payload) != weights.num_bytes(signed.body.layout):
            raise PayloadError(
                "the model sent does not have the plan's layout", remedy="Report this as a fault."
            )
        if weights.digest(payload) != instruction.base_digest:
            raise BaseMismatchError
        return payload

    def _open(self, signed: SignedPlan) -> None:
        """Open the cohort for this plan in the worker, unless this very process has it open.

        A case that the operator took out, or a stricter rule of the gate, holds from the next round on.
        """
        self._worker.start()
        declaration = self._settings.data.declaration()
        if self._opened == (self._worker.pid, signed.digest, declaration):
            return
        floor = self._door.floor(signed.plan)
        header, _ = self._ask({"op": "open", **self._place(signed), "min_cases": floor})
        if header.get("left_out"):  # for the operator: the coordinator's counts are without them
            self._report("cases_left_out", num_cases=int(header["left_out"]))
        self._opened = (self._worker.pid, signed.digest, declaration)
        self._counts = {name: int(header["counts"].get(name, 0)) for name in _COUNTS}

    def _place(self, signed: SignedPlan) -> dict[str, Any]:
        """What the worker is told of the plan and of the site."""
        data = self._settings.data
        return {
            "site": self._settings.name,
            "plan": signed.content.model_dump(mode="json"),
            "home": str(data.home),
            "dicom": str(data.dicom),
            "labels": None if data.label_file is None else str(data.label_file),
            "threads": self._settings.threads,
            "device": self._settings.device,
        }

    def _ask(self, request: dict[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytes | bytearray]:
        if self._cancelled:
            raise WorkError(RefusalCode.CANCELLED, "cancelled-before-work")
        return self._worker.call(request, payload)

    def _refused(self, instruction: Instruction, code: RefusalCode) -> Up | None:
        try:
            return self._door.refusal(instruction, code)
        except FederationError as error:
            self._report("answer_withheld", where=place_of(error))
            return None


class BaseMismatchError(FederationError):
    """The model received does not match the digest in the instruction."""

    code = RefusalCode.BASE_MISMATCH

    def __init__(self) -> None:
        super().__init__("model received does not match its digest", remedy="The server will send it again.")
