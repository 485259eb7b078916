"""The SQLite file behind the index: which file holds which content, and what is known of it.

Mode 0600, in the site's home. It is the only place where file names, UIDs and patient numbers are
kept. Two tables: a file holds a content (SHA-256); a content is a usable image, or stands in
quarantine with a reason. So copies of one image count once, and a bad file is known by what it holds.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.sources.folder import Candidate
from fedward_common.errors import CohortError

INDEX_FILE = "index.sqlite"
SCHEMA_VERSION = "1"

KeyColumn = Literal["SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"]
KEY_COLUMNS: tuple[KeyColumn, ...] = get_args(KeyColumn)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS files (
    name BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    content TEXT              -- SHA-256; NULL when the file could not be read
) STRICT;
CREATE INDEX IF NOT EXISTS files_by_content ON files (content);
CREATE TABLE IF NOT EXISTS contents (
    content TEXT PRIMARY KEY,
    reason TEXT, kind TEXT NOT NULL DEFAULT '',    -- reason NULL: usable; else in quarantine
    SOPInstanceUID TEXT, SeriesInstanceUID TEXT, StudyInstanceUID TEXT, PatientID TEXT,
    modality TEXT, study_year INTEGER, sex TEXT, age_years INTEGER
) STRICT;
"""


@dataclass(frozen=True)
class ContentRecord:
    """What was found in one content: a reason when it is refused, identifiers as far as readable.

    The fields are the columns of the table `contents` after its key, in order.
    """

    reason: Reason | None
    kind: str = ""
    sop_instance: str | None = field(default=None, repr=False)
    series: str | None = field(default=None, repr=False)
    study: str | None = field(default=None, repr=False)
    patient: str | None = field(default=None, repr=False)
    modality: str | None = field(default=None, repr=False)
    study_year: int | None = None
    sex: str | None = None
    age_years: int | None = None


@dataclass(frozen=True)
class FileRecord:
    """One file, the digest of what it holds (None: unreadable), and news about that content."""

    file: Candidate
    content: str | None
    found: ContentRecord | None


@dataclass(frozen=True)
class IndexedImage:
    """One usable image. Its identifiers are for joining labels and dividing patients, nowhere else."""

    content: str
    keys: Mapping[KeyColumn, str] = field(repr=False)
    modality: str
    study_year: int | None
    sex: str | None
    age_years: int | None


@dataclass(frozen=True)
class QuarantinedContent:
    """One content that is not used, why, and what to do.

    Args:
        content: SHA-256 of the file, hex.
        reason: code from the closed list.
        kind: name from the DICOM dictionary, or "".
        num_files: how many files hold it.
    """

    content: str
    reason: Reason
    kind: str
    num_files: int

    @property
    def remedy(self) -> str:
        """What the operator can do."""
        return self.reason.remedy


class CaseIndex:
    """The index of one site; open it with `with`.

    Args:
        home: the site's home; the file is created in it when absent.

    Raises:
        CohortError: the file is not an index, or the disk is full.
    """

    def __init__(self, home: Path) -> None:
        path = home / INDEX_FILE
        with _translated():
            # Created with its mode, not changed to it; SQLite gives its journal the same mode.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
            path.chmod(0o600)
            self._database = sqlite3.connect(path, timeout=60, isolation_level=None)
            try:
                self._database.executescript(_SCHEMA)
            except sqlite3.Error:
                self._database.close()
                raise

    def __enter__(self) -> CaseIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def forget_if_outdated(self, decoders: str) -> None:
        """Drop all when the schema changed, and the quarantine when decoders were installed or updated.

        Raise `SCHEMA_VERSION` when columns change, or when a rule refuses what it used to accept.
        """
        settings = dict(self._rows("SELECT name, value FROM settings"))
        if settings == {"schema": SCHEMA_VERSION, "decoders": decoders}:
            return
        with _translated():
            if settings.get("schema") != SCHEMA_VERSION:
                self._database.executescript("DROP TABLE files; DROP TABLE contents;" + _SCHEMA)
        with self._transaction():
            self._database.execute(
                "DELETE FROM files WHERE content IN (SELECT content FROM contents WHERE reason NOT NULL)"
            )
            self._database.execute("DELETE FROM contents WHERE reason NOT NULL")
            self._database.executemany(
                "INSERT OR REPLACE INTO settings VALUES (?, ?)",
                [("schema", SCHEMA_VERSION), ("decoders", decoders)],
            )

    def known_files(self) -> dict[bytes, Candidate]:
        """Files that were read and may be passed over when their size and time are unchanged."""
        rows = self._rows("SELECT name, size, mtime_ns FROM files WHERE content IS NOT NULL")
        return {name: Candidate(name, size, mtime_ns) for name, size, mtime_ns in rows}

    def knows(self, content: str) -> bool:
        """Whether a content was parsed before."""
        return bool(self._rows("SELECT 1 FROM contents WHERE content = ?", content))

    def record(self, records: Sequence[FileRecord]) -> None:
        """Remember what files hold and what was found in contents not seen before, all or nothing."""
        files = [(each.file.name, each.file.size, each.file.mtime_ns, each.content) for each in records]
        contents = [(each.content, *astuple(each.found)) for each in records if each.found is not None]
        marks = ", ".join("?" * (1 + len(fields(ContentRecord))))
        with self._transaction():
            self._database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", files)
            self._database.executemany(f"INSERT OR REPLACE INTO contents VALUES ({marks})", contents)  # noqa: S608

    def forget_absent(self, present: set[bytes]) -> None:
        """Drop files that are gone, contents that no file holds, and judge shared UIDs afresh."""
        known = (name for (name,) in self._rows("SELECT name FROM files"))
        gone = [(name,) for name in known if name not in present]
        with self._transaction():
            self._database.executemany("DELETE FROM files WHERE name = ?", gone)
            self._database.execute(
                "DELETE FROM contents WHERE content NOT IN (SELECT content FROM files WHERE content NOT NULL)"
            )
            same = Reason.SAME_UID.value
            self._database.execute("UPDATE contents SET reason = NULL WHERE reason = ?", (same,))
            self._database.execute(
                "UPDATE contents SET reason = ? WHERE reason IS NULL AND SOPInstanceUID IN ("
                " SELECT SOPInstanceUID FROM contents WHERE reason IS NULL"
                " GROUP BY SOPInstanceUID HAVING COUNT(*) > 1)",
                (same,),
            )

    def quarantine(self, content: str, error: UnusableImageError) -> None:
        """Take one image out of use until its file, the rules or the decoders change."""
        with self._transaction():
            self._database.execute(
                "UPDATE contents SET reason = ?, kind = ? WHERE content = ?",
                (error.reason.value, error.kind, content),
            )

    def images(self) -> list[IndexedImage]:
        """Every usable image, in the order of its content digest."""
        rows = self._rows("SELECT * FROM contents WHERE reason IS NULL ORDER BY content")
        return [IndexedImage(row[0], dict(zip(KEY_COLUMNS, row[3:7], strict=True)), *row[7:]) for row in rows]

    def quarantined(self) -> list[QuarantinedContent]:
        """Everything in quarantine, in the order of its content digest."""
        rows = self._rows(
            "SELECT content, reason, kind, COUNT(*) FROM contents JOIN files USING (content)"
            " WHERE reason IS NOT NULL GROUP BY content ORDER BY content"
        )
        return [
            QuarantinedContent(content, Reason(reason), kind, count) for content, reason, kind, count in rows
        ]

    def quarantined_keys(self, column: KeyColumn) -> set[str]:
        """Keys of images in quarantine whose header could be read; their label rows are no mistake."""
        rows = self._rows(f"SELECT {column} FROM contents WHERE reason IS NOT NULL")  # noqa: S608
        return {key for (key,) in rows if key}

    def num_unidentified(self) -> int:
        """Files that look like DICOM but whose UID cannot be read: as many label rows may be theirs."""
        rows = self._rows(
            "SELECT files.name, contents.reason FROM files LEFT JOIN contents USING (content)"
            " WHERE files.content IS NULL"
            " OR (contents.reason IS NOT NULL AND contents.SOPInstanceUID IS NULL)"
        )
        stray = Reason.NOT_DICOM.value
        return sum(reason != stray or name.lower().endswith(b".dcm") for name, reason in rows)

    def num_unreadable(self) -> int:
        """Files that could not be read at all."""
        return int(self._rows("SELECT COUNT(*) FROM files WHERE content IS NULL")[0][0])

    def file_names(self) -> dict[str, bytes]:
        """For each content, the first file that holds it. Only for reading that file."""
        rows = self._rows("SELECT content, MIN(name) FROM files WHERE content NOT NULL GROUP BY content")
        return dict(rows)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _translated():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._database.in_transaction:  # a full disk ends it by itself
                    self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _rows(self, query: str, *values: str) -> list[tuple]:  # type: ignore[type-arg]
        with _translated():
            return self._database.execute(query, values).fetchall()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise CohortError(
            "the case index cannot be used: damaged, locked, or the disk is full",
            remedy=f"Free disk space; if it stays, delete HOME/{INDEX_FILE}: it can be made again.",
        ) from error
