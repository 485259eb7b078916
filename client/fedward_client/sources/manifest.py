"""What the spool holds and where it came from: one small SQLite file, mode 0600, beside the images.

It lets the next run fetch only what is new. It is an account, not the truth: the files are. A row is
written after its file is safe on the disk, so that a crash costs at most a second retrieval, and rows whose
file is gone are dropped when a run begins.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from fedward_client.sources.settings import spool_root
from fedward_common.errors import StorageError

MANIFEST_FILE = "manifest.sqlite"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS instances (
    sop_instance TEXT PRIMARY KEY,
    content TEXT,             -- SHA-256 of the file; NULL: refused
    size INTEGER NOT NULL, refused TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS instances_by_content ON instances (content);
CREATE TABLE IF NOT EXISTS studies (
    study TEXT PRIMARY KEY, num_instances INTEGER NOT NULL, selection TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS announced (series TEXT PRIMARY KEY, num_instances INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS growing (
    study TEXT PRIMARY KEY, num_instances INTEGER NOT NULL, since_s REAL NOT NULL
) STRICT;
"""


class Refusal(StrEnum):
    """Why an instance that arrived, or should have, is not in the spool: a closed list."""

    TOO_LARGE = "too_large"
    NOT_DICOM = "not_dicom"
    OTHER_INSTANCE = "other_instance"
    INCOMPLETE = "incomplete"
    ABSENT = "absent"

    @property
    def meaning(self) -> str:
        """What was found, in one sentence."""
        return _TEXTS[self][0]

    @property
    def remedy(self) -> str:
        """What the operator can do."""
        return _TEXTS[self][1]


_AGAIN = "Run the retrieval again; if it stays, ask the PACS administrator to check the study."
_TEXTS = {
    Refusal.TOO_LARGE: (
        "larger than `max_object_mb`",
        "Raise `max_object_mb` in [source], or leave such series out of the cohort.",
    ),
    Refusal.NOT_DICOM: ("not a DICOM object", _AGAIN),
    Refusal.OTHER_INSTANCE: ("another instance than the one asked for", _AGAIN),
    Refusal.INCOMPLETE: ("fewer bytes than announced", _AGAIN),
    Refusal.ABSENT: ("listed by the PACS, but it did not send it", _AGAIN),
}


@dataclass(frozen=True)
class Kept:
    """One instance that stands in the manifest.

    Args:
        content: SHA-256 of its file; None when it was refused.
        size: bytes of the file, or what was too large.
    """

    sop_instance: str = field(repr=False)
    content: str | None
    size: int
    refused: Refusal | None = None


@dataclass(frozen=True)
class Announcements:
    """What an archive says there is to come.

    Args:
        num_instances: SeriesInstanceUID -> number of instances.
        growing: StudyInstanceUID of those whose number was still rising, or may have been.
    """

    num_instances: Mapping[str, int] = field(default_factory=dict, repr=False)
    growing: frozenset[str] = field(default=frozenset(), repr=False)


class Manifest:
    """The manifest of one spool; several threads may use one, several processes may have one each.

    Args:
        folder: the spool's; the file is created in it when absent.

    Raises:
        StorageError: it cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / MANIFEST_FILE
        self._lock = threading.Lock()
        self._waiting: list[Kept] = []
        with _translated():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
            self._database = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            try:
                self._database.execute("PRAGMA synchronous = NORMAL")
                self._database.executescript(_SCHEMA)
            except sqlite3.Error:
                self._database.close()
                raise

    def close(self) -> None:
        """Write what is waiting, and close."""
        try:
            self.flush()
        finally:
            self._database.close()

    def note(self, entry: Kept) -> None:
        """Remember an entry; it is written with the next hundred, or by `flush`."""
        with self._lock:
            self._waiting.append(entry)
            full = len(self._waiting) >= 100
        if full:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        with self._lock, _translated():
            rows = [(entry.sop_instance, entry.content, entry.size, entry.refused) for entry in self._waiting]
            if rows:
                self._write("INSERT OR REPLACE INTO instances VALUES (?, ?, ?, ?)", rows)
                self._waiting.clear()

    def among(self, sop_instances: Sequence[str]) -> dict[str, Kept]:
        """Entries of those of the instances that stand here."""
        self.flush()
        with self._lock, _translated():
            rows = self._database.execute(
                "SELECT sop_instance, content, size, refused FROM instances"
                " WHERE sop_instance IN (SELECT value FROM json_each(?))",
                (json.dumps(sop_instances),),
            ).fetchall()
        return {
            sop_instance: Kept(sop_instance, content, size, Refusal(refused) if refused else None)
            for sop_instance, content, size, refused in rows
        }

    def is_complete(self, study: str, num_instances: int, selection: str) -> bool:
        """Whether all that this selection takes of a study was here when it had so many instances."""
        with self._lock, _translated():
            row = self._database.execute(
                "SELECT num_instances, selection FROM studies WHERE study = ?", (study,)
            ).fetchone()
        return bool(row == (num_instances, selection))

    def mark_complete(self, study: str, num_instances: int, selection: str) -> None:
        """Remember that all that this selection takes of a study is here."""
        self.flush()
        with self._lock, _translated():
            self._write(
                "INSERT OR REPLACE INTO studies VALUES (?, ?, ?)", [(study, num_instances, selection)]
            )

    def announce(self, series: str, num_instances: int) -> None:
        """Remember how many instances of a series there are to come, by the archive's own count."""
        with self._lock, _translated():
            self._write("INSERT OR REPLACE INTO announced VALUES (?, ?)", [(series, num_instances)])

    def announced(self) -> dict[str, int]:
        """Number of instances that the archive says each series has."""
        with self._lock, _translated():
            return dict(self._database.execute("SELECT series, num_instances FROM announced").fetchall())

    def may_grow(self, study: str, num_instances: int, since_s: float) -> None:
        """Remember a study whose number of instances may still rise.

        Args:
            study: its StudyInstanceUID.
            num_instances: by the archive's count.
            since_s: when it was found to have so many, seconds since 1970.
        """
        with self._lock, _translated():
            self._write("INSERT OR REPLACE INTO growing VALUES (?, ?, ?)", [(study, num_instances, since_s)])

    def growing(self) -> dict[str, tuple[int, float]]:
        """Studies that may still grow: number of instances, and since when it is that many."""
        with self._lock, _translated():
            rows = self._database.execute("SELECT study, num_instances, since_s FROM growing").fetchall()
        return {study: (num_instances, since_s) for study, num_instances, since_s in rows}

    def grows_no_more(self, studies: Iterable[str]) -> None:
        """Drop studies that have not been seen to grow for long enough."""
        with self._lock, _translated():
            self._write("DELETE FROM growing WHERE study = ?", [(study,) for study in studies])

    def keep_only(self, contents: set[bytes]) -> int:
        """Drop entries whose file is gone, and with them every claim to be complete; returns how many.

        Args:
            contents: SHA-256 of the files that are there, hex.
        """
        self.flush()
        with self._lock, _translated():
            listed = self._database.execute("SELECT content FROM instances WHERE content IS NOT NULL")
            gone = [(content,) for (content,) in listed if content.encode() not in contents]
            if gone:
                self._write("DELETE FROM instances WHERE content = ?", gone)
                self._write("DELETE FROM studies", [()])
        return len(gone)

    def _write(self, statement: str, rows: Iterable[tuple[object, ...]]) -> None:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            self._database.executemany(statement, rows)
            self._database.execute("COMMIT")
        except BaseException:
            self._database.execute("ROLLBACK")
            raise


def read_announcements(home: Path) -> Announcements:
    """What the archive behind a site's spool announced; nothing where there is no spool.

    Raises:
        StorageError: the manifest cannot be read.
    """
    folder = spool_root(home).parent
    if not (folder / MANIFEST_FILE).is_file():
        return Announcements()
    manifest = Manifest(folder)
    try:
        return Announcements(manifest.announced(), frozenset(manifest.growing()))
    finally:
        manifest.close()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        full = isinstance(error, sqlite3.OperationalError) and "full" in str(error)
        raise StorageError(
            "the spool's manifest cannot be written: the disk is full"
            if full
            else "the spool's manifest cannot be read or written",
            remedy="Free space on the disk of the site's home; if the manifest is damaged, purge the spool.",
        ) from None
