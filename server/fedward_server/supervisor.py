"""Start, stop and resume runs, each in a process of its own, and never lose track of one.

A warm runner waits while nothing happens, so that a launch costs no imports. A run's process may fail,
hang or be killed: the run then ends with a reason that says so and can be resumed after its last
committed round. If the server itself dies, its runners end too, and the next start finds their runs
"interrupted". Whoever starts, stops or resumes a run is in the audit log before it happens. A run that
ends because the disk is full is recorded with space put aside for that; without any, as soon as there is.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedward_common.audit import AuditLog
from fedward_common.errors import AuditError, FederationError, StorageError, UsageError
from fedward_common.federation import read_federation
from fedward_common.identity import verify_plan
from fedward_common.plan import SignedPlan
from fedward_server.config import ServerHome
from fedward_server.disk_reserve import DiskReserve
from fedward_server.home_lock import only_server
from fedward_server.run_records import ACTIVE, RunInfo, RunStatus
from fedward_server.runner_process import COMMAND, RunnerProcess, how_it_ended
from fedward_server.runs import RunStore

_MAX_PAUSE_S = 60.0
_RECORD_PAUSE_S = 2.0
_LEAVING_S = 10.0  # a runner that has said how its run ended is gone after this long
_log = logging.getLogger(__name__)


class FlowerRun(Protocol):
    """A run as Flower knows it, and the token with which its process speaks for it."""

    @property
    def flower_run_id(self) -> int:
        """Flower's id of the run."""

    @property
    def token(self) -> str:
        """Secret; handed to the runner only."""


class FlowerSide(Protocol):
    """What the supervisor needs of the link to the sites."""

    @property
    def runtime_address(self) -> str:
        """host:port on loopback where the runner reaches the sites' mailbox."""

    def open_run(self) -> FlowerRun:
        """Open a mailbox for a run."""

    def close_run(self, flower_run_id: int, *, stopped: bool) -> None:
        """Close it; sites drop the run's work."""


@dataclass
class _Going:
    """A run in progress."""

    run_id: str
    runner: RunnerProcess
    flower_run_id: int
    stop_asked: bool = False
    deadline: threading.Timer | None = None


class RunSupervisor:
    """Owns the run store and the runner processes.

    Args:
        home: the server's folder.
        flower: the link to the sites.
        command: starts a runner; tests give their own.

    Raises:
        UsageError: another server uses this folder, or it cannot be written.
        StorageError: the record of runs cannot be opened.
    """

    def __init__(self, home: ServerHome, flower: FlowerSide, *, command: Sequence[str] = COMMAND) -> None:
        self.home = home
        self._flower = flower
        self._command = tuple(command)
        self._config = home.config()
        home.prepare()
        self._lock_file = only_server(home)
        self._reserve = DiskReserve(home.state / "reserve")
        self.store = RunStore(home.runs)
        self._audit = AuditLog(home.audit)
        self._reserve.hold()
        self._lock = threading.RLock()
        self._warm: RunnerProcess | None = None
        self._going: dict[str, _Going] = {}
        self._failures = 0
        self._retry: threading.Timer | None = None
        self._closing = False
        self._mark_interrupted()
        self._warm_up()

    def start(self, signed_plan: bytes, *, by: str = "server") -> str:
        """Start a run and return its id.

        Args:
            signed_plan: the document exactly as signed.
            by: name of who asked, for the audit log.

        Raises:
            PlanRefusedError: the signature does not hold, the plan is another federation's or has expired.
            UsageError: as many runs are going as may, or the plan was already used by another run.
        """
        signed = self._verified(signed_plan)
        with self._lock:
            self._check_room()
            self._reserve.hold()
            self._check_unused(signed.digest)
            run_id = f"{signed.content.name}-{secrets.token_hex(4)}"
            self._audit.append("run_started", run_id=run_id, plan=signed.digest, peer=by)
            self.store.create(run_id, signed_plan, signed.digest, signed.content.name)
            self._launch(run_id, resume=False)
        return run_id

    def resume(self, run_id: str, *, by: str = "server") -> None:
        """Continue an ended run after its last committed round.

        Raises:
            UsageError: there is no such run, it is going, or it was completed; or no room for it now.
            PlanRefusedError: its plan has expired, or its signer is no longer a coordinator.
        """
        leaving = self._going.get(run_id)
        if leaving is not None and self.store.run(run_id).status not in ACTIVE:
            leaving.runner.join(_LEAVING_S)
        with self._lock:
            info = self.store.run(run_id)
            if info.status in ACTIVE or info.status == "completed":
                raise UsageError(
                    f"run {run_id} is {info.status}", remedy="Only a run that ended early can be resumed."
                )
            self._check_room()
            self._reserve.hold()
            self._verified(self.store.signed_plan(run_id))
            self._audit.append("run_resumed", run_id=run_id, plan=info.plan_digest, peer=by)
            self.store.reopen(run_id)
            self._launch(run_id, resume=True)

    def stop(self, run_id: str, *, by: str = "server") -> None:
        """Ask a run to stop; it ends between two looks at its mailbox, or is ended after a grace period.

        Raises:
            UsageError: there is no such run, or it has ended already.
        """
        with self._lock:
            info = self.store.run(run_id)
            going = self._going.get(run_id)
            if going is None and info.status != "interrupted":
                raise UsageError(f"run {run_id} is {info.status}", remedy="There is nothing to stop.")
            self._audit.append("run_stopped", run_id=run_id, plan=info.plan_digest, peer=by)
            if going is None:
                self.store.finish(run_id, "stopped", "stopped by a coordinator")
            elif not going.stop_asked:
                going.stop_asked = True
                going.runner.tell({"stop": True})
                going.deadline = threading.Timer(self._config.stop_grace_s, going.runner.kill)
                going.deadline.daemon = True
                going.deadline.start()

    def close(self) -> None:
        """End all runners; runs that were going become "interrupted" and can be resumed."""
        with self._lock:
            self._closing = True
            if self._retry is not None:
                self._retry.cancel()
            runners = [going.runner for going in self._going.values()]
            if self._warm is not None:
                runners.append(self._warm)
        for runner in runners:
            runner.release()
        until = time.monotonic() + self._config.stop_grace_s
        for runner in runners:
            if not runner.join(max(0.0, until - time.monotonic())):
                runner.kill()
                runner.join(5)
        self.store.close()
        os.close(self._lock_file)

    def _verified(self, document: bytes) -> SignedPlan:
        return verify_plan(document, read_federation(self.home.federation))

    def _check_room(self) -> None:
        if self._closing:
            raise UsageError("the server is shutting down", remedy="Try again when it is back.")
        # a run that has said its last word is no longer going, though its process may still be ending
        busy = [run_id for run_id in self._going if self.store.run(run_id).status in ACTIVE]
        if len(busy) >= self._config.max_runs:
            names = ", ".join(busy)
            raise UsageError(
                f"{len(busy)} of at most {self._config.max_runs} runs are going: {names}",
                remedy="Wait for its end, stop it with: fedward run stop - or raise max_runs in server.toml.",
            )

    def _check_unused(self, digest: str) -> None:
        for info in self.store.runs():
            used = info.rounds_done or info.status == "completed" or info.run_id in self._going
            if info.plan_digest == digest and used:
                raise UsageError(
                    f"this signed plan was already used by run {info.run_id} ({info.status})",
                    remedy=f"Continue it with: fedward run resume {info.run_id} - or sign the plan again.",
                )

    def _launch(self, run_id: str, *, resume: bool) -> None:
        """Hand the run to the warm runner, or to a new one when there is none."""
        try:
            flower_run = self._flower.open_run()
            warm, self._warm = self._warm, None
            runner = warm if warm is not None and warm.alive else self._spawn()
        except (FederationError, OSError) as error:
            self.store.finish(run_id, "failed", f"the run could not be launched: {error}")
            raise
        self._going[run_id] = _Going(run_id, runner, flower_run.flower_run_id)
        runner.tell(
            {
                "run_id": run_id,
                "flower_run_id": flower_run.flower_run_id,
                "token": flower_run.token,
                "runtime_address": self._flower.runtime_address,
                "home": str(self.home.directory.resolve()),
                "resume": resume,
            }
        )
        _log.info("run_launched", extra={"run_id": run_id, "pid": runner.pid})

    def _spawn(self) -> RunnerProcess:
        return RunnerProcess(self._command, lock=self._lock_file, ended=self._runner_ended)

    def _warm_up(self) -> None:
        """Have a runner ready, unless as many runs are going as may."""
        with self._lock:
            if not self._closing and self._warm is None and len(self._going) < self._config.max_runs:
                self._warm = self._spawn()

    def _runner_ended(self, runner: RunnerProcess, code: int) -> None:
        with self._lock:
            going = next((one for one in self._going.values() if one.runner is runner), None)
            if going is None:
                self._warm = None if self._warm is runner else self._warm
                self._warm_up_later(code)
                return
            del self._going[going.run_id]
            self._failures = 0
            if going.deadline is not None:
                going.deadline.cancel()
            try:
                self._record_end(going, code)
            finally:
                self._warm_up()

    def _warm_up_later(self, code: int) -> None:
        """After a runner that ended before it had a run: wait longer each time."""
        if self._closing:
            return
        self._failures += 1
        pause_s = min(_MAX_PAUSE_S, 2.0**self._failures)
        _log.error("warm_runner_ended", extra={"code": code, "delay_s": pause_s})
        self._retry = threading.Timer(pause_s, self._warm_up)
        self._retry.daemon = True
        self._retry.start()

    def _record_end(self, going: _Going, code: int) -> None:
        status, reason = self._verdict(going, code)
        try:
            self._write_end(going.run_id, status, reason, code)
        finally:
            self._flower.close_run(going.flower_run_id, stopped=not self._completed(going.run_id))

    def _write_end(self, run_id: str, status: RunStatus, reason: str, code: int) -> None:
        """Record how a run ended; when the disk has no space even for that, again and again."""
        with self._lock:
            if not self._written(lambda: self.store.finish(run_id, status, reason)):
                _log.error("run_end_unrecorded", extra={"run_id": run_id, "delay_s": _RECORD_PAUSE_S})
                if not self._closing:  # else the next start finds the run unfinished and says so
                    retry = (run_id, status, reason, code)
                    again = threading.Timer(_RECORD_PAUSE_S, self._write_end, retry)
                    again.daemon = True
                    again.start()
                return
            ended = self.store.run(run_id).status
            if not self._written(lambda: self._audit.append("run_finished", run_id=run_id, outcome=ended)):
                _log.error("run_end_not_audited", extra={"run_id": run_id})
            _log.info("run_ended", extra={"run_id": run_id, "status": ended, "code": code})

    def _written(self, write: Callable[[], object]) -> bool:
        """Do one write, if need be with the space put aside; whether it was done."""
        for _ in range(2):
            try:
                write()
            except (StorageError, AuditError):
                self._reserve.release()
            else:
                return True
        return False

    def _verdict(self, going: _Going, code: int) -> tuple[RunStatus, str]:
        """How the run ended, should the runner not have said so itself."""
        again = f"continue with: fedward run resume {going.run_id}"
        if self._closing:
            return "interrupted", f"the server was shut down; {again}"
        if going.stop_asked:
            return "stopped", "stopped by a coordinator"
        if code == StorageError.exit_code:
            return "failed", (
                "the run's record could not be written: the server's disk is full or not writable; "
                f"what was committed is kept. Free space there, then {again}"
            )
        return "failed", f"the run's process ended {how_it_ended(code)}; see the server's log, then {again}"

    def _completed(self, run_id: str) -> bool:
        try:
            return self.store.run(run_id).status == "completed"
        except FederationError:
            return False

    def _mark_interrupted(self) -> None:
        for info in self._unfinished():
            self.store.finish(
                info.run_id,
                "interrupted",
                f"the server ended during the run; continue with: fedward run resume {info.run_id}",
            )

    def _unfinished(self) -> list[RunInfo]:
        return [info for info in self.store.runs() if info.status in ACTIVE]
