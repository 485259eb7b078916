"""The server's memory: runs, their events, their rounds and their results, in one SQLite file.

Two processes use it at once: `fedward serve` reads and answers coordinators, the runner of a run
writes. WAL keeps readers and the writer out of each other's way; `synchronous=FULL` makes a committed
round survive a power cut. A round is over when `commit_round` returns, not before.

What changes a run's status also writes the event that tells watchers so, in the same transaction
(`finish`), so that nobody sees one without the other. The file must lie on a local disk: SQLite's WAL
does not work over network file systems.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from fedward_common.errors import FederationError, StorageError, UsageError
from fedward_common.plan import parse_signed_plan
from fedward_server.run_records import (
    ENDED,
    FINAL,
    Event,
    EventKind,
    RoundRecord,
    RunInfo,
    RunStatus,
    SiteRecord,
)

__all__ = [
    "ENDED",
    "FINAL",
    "Event",
    "EventKind",
    "RoundRecord",
    "RunInfo",
    "RunStatus",
    "RunStore",
    "SiteRecord",
]

_VERSION = 1
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS runs (
  run_id TEXT PRIMARY KEY, name TEXT NOT NULL, plan_digest TEXT NOT NULL, plan BLOB NOT NULL,
  status TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', created_at REAL NOT NULL, finished_at REAL,
  rounds_total INTEGER NOT NULL, selected_round INTEGER, result TEXT);
CREATE TABLE IF NOT EXISTS events (
  sequence INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL REFERENCES runs, at REAL NOT NULL,
  kind TEXT NOT NULL, fields TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS events_of_run ON events (run_id, sequence);
CREATE TABLE IF NOT EXISTS rounds (
  run_id TEXT NOT NULL REFERENCES runs, round_index INTEGER NOT NULL, record TEXT NOT NULL,
  PRIMARY KEY (run_id, round_index));
PRAGMA user_version = {_VERSION};
COMMIT;
"""
_RUN_COLUMNS = (
    "run_id, name, plan_digest, status, reason, created_at, finished_at, rounds_total, selected_round, "
    "(SELECT COALESCE(MAX(round_index), 0) FROM rounds WHERE rounds.run_id = runs.run_id)"
)


class RunStore:
    """Runs on disk; safe for several threads and for two processes.

    Args:
        path: the SQLite file; its folder must exist.
        clock: Unix time in seconds.

    Raises:
        StorageError: the file cannot be opened, or a newer fedward wrote it.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._lock = threading.RLock()
        with self._translated():
            self._connection = sqlite3.connect(
                path, timeout=30, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("PRAGMA foreign_keys = ON")
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if version > _VERSION:
                raise StorageError(
                    f"{path.name} has format {version}, this installation knows up to {_VERSION}",
                    remedy="Install the fedward that wrote it, or a newer one.",
                )
            if version < _VERSION:
                self._connection.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file; the store cannot be used afterwards."""
        with self._lock:
            self._connection.close()

    def create(self, run_id: str, signed_plan: bytes, digest: str, name: str) -> RunInfo:
        """Record a new run with status "waiting".

        Raises:
            PlanError: `signed_plan` is not a signed plan in canonical form.
            StorageError: the id is taken.
        """
        signed = parse_signed_plan(signed_plan)
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO runs (run_id, name, plan_digest, plan, status, created_at, rounds_total)"
                " VALUES (?, ?, ?, ?, 'waiting', ?, ?)",
                (run_id, name, digest, signed_plan, self._clock(), signed.content.rounds),
            )
            self._insert_event(run_id, "status", {"status": "waiting", "reason": ""})
        return self.run(run_id)

    def set_status(self, run_id: str, status: RunStatus, reason: str = "") -> None:
        """Change a run's status without an event; to end a run, prefer `finish`."""
        with self._transaction():
            self._set_status(run_id, status, reason)

    def finish(
        self, run_id: str, status: RunStatus, reason: str = "", selected_round: int | None = None
    ) -> bool:
        """End a run and tell its watchers, at once.

        Returns:
            False, and nothing is changed, when the run has already been completed, failed or stopped: the
            first word is the last, whichever process speaks it.
        """
        with self._transaction() as connection:
            if self.run(run_id).status in FINAL:
                return False
            self._set_status(run_id, status, reason)
            if selected_round is not None:
                connection.execute(
                    "UPDATE runs SET selected_round = ? WHERE run_id = ?", (selected_round, run_id)
                )
            chosen = self.run(run_id).selected_round
            self._insert_event(
                run_id, "finished", {"status": status, "reason": reason, "selected_round": chosen}
            )
        return True

    def reopen(self, run_id: str) -> None:
        """Put an ended run back to "waiting", for a resume."""
        with self._transaction():
            self._set_status(run_id, "waiting", "")
            self._insert_event(run_id, "status", {"status": "waiting", "reason": ""})

    def run(self, run_id: str) -> RunInfo:
        """What is known of one run.

        Raises:
            UsageError: there is no such run.
        """
        rows = self._rows(f"SELECT {_RUN_COLUMNS} FROM runs WHERE run_id = ?", run_id)  # noqa: S608 - constant
        if not rows:
            raise UsageError(f"there is no run {run_id!r}", remedy="List the runs with: fedward run list")
        return _run_info(rows[0])

    def runs(self) -> list[RunInfo]:
        """All runs, newest first."""
        query = f"SELECT {_RUN_COLUMNS} FROM runs ORDER BY created_at DESC, rowid DESC"  # noqa: S608 - constant
        return [_run_info(row) for row in self._rows(query)]

    def signed_plan(self, run_id: str) -> bytes:
        """The signed plan a run was launched with, byte for byte."""
        self.run(run_id)
        return bytes(self._rows("SELECT plan FROM runs WHERE run_id = ?", run_id)[0][0])

    def add_event(self, run_id: str, kind: EventKind, fields: Mapping[str, JsonValue]) -> int:
        """Append an event and return its sequence number, which grows over all runs."""
        with self._transaction():
            return self._insert_event(run_id, kind, fields)

    def events(self, run_id: str, after: int = 0) -> list[Event]:
        """Events of a run with a sequence number above `after`, oldest first."""
        self.run(run_id)
        rows = self._rows(
            "SELECT sequence, at, kind, fields FROM events"
            " WHERE run_id = ? AND sequence > ? ORDER BY sequence",
            run_id,
            after,
        )
        return [Event(sequence=row[0], at=row[1], kind=row[2], fields=json.loads(row[3])) for row in rows]

    def commit_round(self, run_id: str, record: RoundRecord) -> None:
        """Record a round as done; when this returns, a resumed run continues after it.

        Raises:
            StorageError: the round does not follow the last committed one.
        """
        with self._transaction() as connection:
            done = self._rows("SELECT MAX(round_index) FROM rounds WHERE run_id = ?", run_id)[0][0]
            expected = (0, 1) if done is None else (done + 1,)
            if record.round_index not in expected:
                raise StorageError(
                    f"run {run_id}: round {record.round_index} cannot follow round {done or 0}",
                    remedy=f"Continue from the last committed round: fedward run resume {run_id}",
                )
            connection.execute(
                "INSERT INTO rounds VALUES (?, ?, ?)", (run_id, record.round_index, record.model_dump_json())
            )

    def rounds(self, run_id: str) -> list[RoundRecord]:
        """Committed rounds of a run, in order."""
        self.run(run_id)
        rows = self._rows("SELECT record FROM rounds WHERE run_id = ? ORDER BY round_index", run_id)
        return [RoundRecord.model_validate_json(row[0]) for row in rows]

    def discard_rounds_after(self, run_id: str, round_index: int) -> int:
        """Forget rounds whose checkpoint is lost, so that they are run again; returns how many."""
        with self._transaction() as connection:
            cursor = connection.execute(
                "DELETE FROM rounds WHERE run_id = ? AND round_index > ?", (run_id, round_index)
            )
            return cursor.rowcount

    def set_result(self, run_id: str, result: Mapping[str, JsonValue]) -> None:
        """Store the run's result document: test metrics, comparison, versions."""
        with self._transaction() as connection:
            self.run(run_id)
            connection.execute("UPDATE runs SET result = ? WHERE run_id = ?", (_json(result), run_id))

    def result(self, run_id: str) -> dict[str, JsonValue] | None:
        """The run's result document, or None while there is none."""
        self.run(run_id)
        document = self._rows("SELECT result FROM runs WHERE run_id = ?", run_id)[0][0]
        return None if document is None else dict(json.loads(document))

    def _set_status(self, run_id: str, status: RunStatus, reason: str) -> None:
        self.run(run_id)
        self._connection.execute(
            "UPDATE runs SET status = ?, reason = ?, finished_at = ? WHERE run_id = ?",
            (status, reason, self._clock() if status in ENDED else None, run_id),
        )

    def _insert_event(self, run_id: str, kind: EventKind, fields: Mapping[str, JsonValue]) -> int:
        cursor = self._connection.execute(
            "INSERT INTO events (run_id, at, kind, fields) VALUES (?, ?, ?, ?)",
            (run_id, self._clock(), kind, _json(fields)),
        )
        return int(cursor.lastrowid or 0)

    def _rows(self, query: str, *values: str | int) -> list[Any]:
        with self._lock, self._translated(), closing(self._connection.execute(query, values)) as cursor:
            return cursor.fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._translated():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except FederationError:
            raise
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"the record of runs {self.path.name}: {error}",
                remedy="Check that its disk has free space and is writable; what was committed is kept.",
            ) from error


def _run_info(row: tuple[Any, ...]) -> RunInfo:
    def when(seconds: float | None) -> datetime | None:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC)

    return RunInfo.model_validate(
        {
            "run_id": row[0],
            "name": row[1],
            "plan_digest": row[2],
            "status": row[3],
            "reason": row[4],
            "created_at": when(row[5]),
            "finished_at": when(row[6]),
            "rounds_total": row[7],
            "selected_round": row[8],
            "rounds_done": row[9],
        }
    )


def _json(document: Mapping[str, JsonValue]) -> str:
    return json.dumps(document, separators=(",", ":"), allow_nan=False)
