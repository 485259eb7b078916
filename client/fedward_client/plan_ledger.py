"""What a site remembers about plans: approved or not, used by which run, and how far that run got.

A small SQLite file, because the daemon and the operator's commands use it at the same time, and because
each answer must be on the disk before it is acted on. One row a plan; a plan is bound to the first run
that uses it and to no other, ever, and a run is bound to one plan. One row a round taken part in, with
the one model that this site ever trained in it; and one row for each model measured.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedward_common.envelope import Instruction
from fedward_common.errors import PolicyError

_SCHEMA = (
    """
CREATE TABLE IF NOT EXISTS plans (
  digest TEXT PRIMARY KEY,
  received TEXT NOT NULL,
  approved TEXT,
  run_id TEXT UNIQUE,
  last_round INTEGER NOT NULL DEFAULT 0,
  base_digest TEXT NOT NULL DEFAULT ''
) STRICT
""",
    """
CREATE TABLE IF NOT EXISTS rounds (
  run_id TEXT NOT NULL,
  round_index INTEGER NOT NULL,
  base_digest TEXT NOT NULL,
  PRIMARY KEY (run_id, round_index)
) STRICT
""",
    """
CREATE TABLE IF NOT EXISTS measurements (
  run_id TEXT NOT NULL,
  place TEXT NOT NULL,
  base_digest TEXT NOT NULL,
  PRIMARY KEY (run_id, place, base_digest)
) STRICT
""",
)
_COLUMNS = "digest, received, approved, run_id, last_round, base_digest"


@dataclass(frozen=True)
class LedgerRow:
    """One plan.

    Attributes:
        received, approved: UTC, ISO 8601; `approved` is None until the operator has approved it.
        run_id: the run that uses it, None before.
        last_round: newest round taken part in, 0 for none.
        base_digest: SHA-256 of the global model of that round.
    """

    digest: str
    received: str
    approved: str | None
    run_id: str | None
    last_round: int
    base_digest: str


class PlanLedger:
    """The ledger file; every method is one transaction that is on the disk when it returns.

    All methods raise PolicyError when the file cannot be read or written: no ledger, no plan.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def receive(self, digest: str, now: datetime) -> None:
        """Enter a plan, unless it is entered already."""
        with self._transaction() as database:
            values = (digest, _iso(now))
            database.execute("INSERT OR IGNORE INTO plans (digest, received) VALUES (?, ?)", values)

    def approve(self, digest: str, now: datetime) -> bool:
        """Mark a plan that was entered as approved by the operator; whether it was not before."""
        with self._transaction() as database:
            marked = database.execute(
                "UPDATE plans SET approved = ? WHERE digest = ? AND approved IS NULL", (_iso(now), digest)
            )
            return marked.rowcount == 1

    def bind(self, digest: str, run_id: str) -> bool:
        """Bind a plan that was entered to a run; False when either is bound to another already."""
        with self._transaction() as database:
            holders = database.execute(
                "SELECT digest, run_id FROM plans WHERE run_id = ? OR (digest = ? AND run_id IS NOT NULL)",
                (run_id, digest),
            ).fetchall()
            if holders:
                return holders == [(digest, run_id)]
            bound = database.execute("UPDATE plans SET run_id = ? WHERE digest = ?", (run_id, digest))
            return bound.rowcount == 1

    def enter_round(self, run_id: str, round_index: int, base_digest: str) -> bool:
        """Enter a round of a bound run; False when it is neither newer nor one entered with this model.

        A server that lost its newest model goes back and asks for rounds again. With the same model the
        answer is the same as before and tells it nothing new; with another it is refused.
        """
        with self._transaction() as database:
            newer = database.execute(
                "UPDATE plans SET last_round = ?1, base_digest = ?2 WHERE run_id = ?3 AND last_round < ?1",
                (round_index, base_digest, run_id),
            )
            entry = (run_id, round_index, base_digest)
            if newer.rowcount == 1:
                database.execute("INSERT INTO rounds VALUES (?, ?, ?)", entry)
                return True
            entered = "SELECT 1 FROM rounds WHERE run_id = ? AND round_index = ? AND base_digest = ?"
            return database.execute(entered, entry).fetchone() is not None

    def enter_measurement(self, instruction: Instruction, place: str, *, max_models: int) -> bool:
        """Enter that a model is measured; False when other models have used up its place.

        The same question comes again when an answer was lost, or a run is resumed.

        Args:
            instruction: names run, plan and model.
            place: where in the plan the question belongs.
            max_models: how many models may be measured there.
        """
        with self._transaction() as database:
            bound = "SELECT 1 FROM plans WHERE run_id = ? AND digest = ?"
            if database.execute(bound, (instruction.run_id, instruction.plan_digest)).fetchone() is None:
                return False
            measured = "SELECT base_digest FROM measurements WHERE run_id = ? AND place = ?"
            entered = {digest for (digest,) in database.execute(measured, (instruction.run_id, place))}
            if instruction.base_digest in entered:
                return True
            if len(entered) >= max_models:
                return False
            entry = (instruction.run_id, place, instruction.base_digest)
            database.execute("INSERT INTO measurements VALUES (?, ?, ?)", entry)
            return True

    def row(self, digest: str) -> LedgerRow | None:
        """One plan, None if it was never entered."""
        return next((row for row in self.rows() if row.digest == digest), None)

    def rows(self) -> list[LedgerRow]:
        """All plans, oldest first."""
        with self._transaction() as database:
            found = database.execute(f"SELECT {_COLUMNS} FROM plans ORDER BY received, digest")  # noqa: S608
            return [LedgerRow(*row) for row in found]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            database = sqlite3.connect(self._path, timeout=30, isolation_level=None)
            try:
                # EXTRA also flushes the folder once the journal is deleted: a commit survives a power cut.
                database.execute("PRAGMA synchronous = EXTRA")
                database.execute("BEGIN IMMEDIATE")
                for statement in _SCHEMA:
                    database.execute(statement)
                yield database
                database.execute("COMMIT")
            finally:
                database.close()
        except (OSError, sqlite3.Error) as error:
            raise PolicyError(
                f"{self._path} cannot be used: {error}",
                remedy="Free disk space, or restore the file from a backup. Without it no plan runs.",
            ) from error


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
