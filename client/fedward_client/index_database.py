"""The connection to the index's SQLite file: made with its mode, written all or nothing, never half read.

What goes wrong with the file itself ends as one of a few errors, each with what to do about it.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedward_client import index_schema
from fedward_common.errors import CohortError

INDEX_FILE = "index.sqlite"
_BUSY_S = 60

Row = tuple[Any, ...]


class IndexDatabase:
    """One open index; the file is made when absent.

    Args:
        home: the site's home.

    Raises:
        CohortError: the file is not an index, cannot be written, or the disk is full.
    """

    def __init__(self, home: Path) -> None:
        path = home / INDEX_FILE
        with _translated():
            # Created with its mode, not changed to it; SQLite gives its journal the same mode.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
            path.chmod(0o600)
            self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            try:
                self._make_tables()
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside is kept, or nothing of it.

        Raises:
            CohortError: the file is damaged or locked, or the disk is full.
        """
        with _translated():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._connection.in_transaction:  # a full disk ends it by itself
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def rows(self, query: str, *values: object) -> list[Row]:
        """All rows of a query."""
        return list(self.each(query, *values))

    def each(self, query: str, *values: object) -> Iterator[Any]:
        """The rows of a query one by one, where there may be many."""
        with _translated():
            yield from self._connection.execute(query, values)

    def count(self, query: str) -> int:
        """The one number that a query gives."""
        return int(self.rows(query)[0][0])

    def write(self, statement: str, *values: object) -> None:
        """Run one statement; inside `transaction`."""
        self._connection.execute(statement, values)

    def write_all(self, statement: str, rows: Iterable[Collection[object]]) -> None:
        """Run one statement for each row; inside `transaction`."""
        self._connection.executemany(statement, rows)  # type: ignore[arg-type]

    def _make_tables(self) -> None:
        """Make the tables that are absent; those of another schema go, with all that is in them."""
        self._connection.executescript(index_schema.SCHEMA.partition(";")[0])
        known = self._connection.execute("SELECT value FROM settings WHERE name = 'schema'").fetchall()
        if known not in ([], [("",)], [(index_schema.SCHEMA_VERSION,)]):
            drop = "".join(f"DROP TABLE IF EXISTS {table};" for table in index_schema.TABLES)
            self._connection.executescript(f"BEGIN IMMEDIATE; {drop} DELETE FROM settings; COMMIT;")  # noqa: S608
        self._connection.executescript(index_schema.SCHEMA)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise _fault(error) from error


def _fault(error: sqlite3.Error | OSError) -> CohortError:
    """What is the matter with the file, and the remedy for exactly that."""
    code = getattr(error, "sqlite_errorcode", None)
    kind = None if code is None else code & 0xFF
    if kind == sqlite3.SQLITE_FULL or getattr(error, "errno", None) in _FULL:
        return CohortError(
            f"the case index, HOME/{INDEX_FILE}, cannot be written: the disk is full",
            remedy="Free space on the disk of the site's home, then run the command again: it continues.",
        )
    if kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return CohortError(
            f"the case index, HOME/{INDEX_FILE}, has been in use by another process for {_BUSY_S} s",
            remedy="Wait until the other fedward-site command or the training step is done, then try again.",
        )
    if kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return CohortError(
            f"the case index, HOME/{INDEX_FILE}, is damaged",
            remedy=f"Delete HOME/{INDEX_FILE}, then: fedward-site cohort index. It is made anew from the"
            " images; exclusions and case ids stay as they are.",
        )
    if kind in _NOT_PERMITTED or isinstance(error, OSError):
        why = error.strerror if isinstance(error, OSError) else "read-only, or of another user"
        return CohortError(
            f"the case index, HOME/{INDEX_FILE}, cannot be opened for writing: {why}",
            remedy="Give HOME to the user that runs the site, on a medium that can be written.",
        )
    return CohortError(
        f"the case index, HOME/{INDEX_FILE}, cannot be read or written: the disk is full or fails",
        remedy=f"Free space and check the disk; if it stays, delete HOME/{INDEX_FILE}: it can be made again.",
    )


_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_PERMITTED = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)
