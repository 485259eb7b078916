"""The audit log: what was decided and what left, in a form in which later changes show.

One JSON object a line. Each entry carries the SHA-256 of the entry before it, so an edited, removed,
inserted or moved line breaks the chain at that line. Values are numbers or short tokens (names, digests,
enumerated words): there is no room for a sentence, a path or a patient's name. An entry is on the disk
before `append` returns, and whoever acts on it acts afterwards.

What the chain cannot show: the last entries cut off as a whole, or all of it computed anew by somebody
who may write the file. For that, keep a copy of the newest digest elsewhere.

A process killed while it wrote leaves a part of a line. What that entry stood for never happened, so the
next `append` removes the part and says so in an entry of its own.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path

from fedward_common.errors import AuditError
from fedward_common.files import flush_directory

Scalar = str | int | float | bool

EVENTS = frozenset(
    {
        "joined",
        "started",
        "stopped",
        "connected",
        "disconnected",
        "cohort_indexed",
        "plan_pending",
        "plan_approved",
        "plan_accepted",
        "plan_refused",
        "round_admitted",
        "round_refused",
        "run_cancelled",
        "outbound",
        "outbound_blocked",
        "run_started",
        "run_stopped",
        "run_resumed",
        "run_finished",
        "update_admitted",
        "update_refused",
        "request_refused",
        "audit_repaired",
    }
)

_GENESIS = "0" * 64
_MAX_LINE = 8192
_TOKEN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:+-]{0,127}")
_FIELD = re.compile(r"[a-z][a-z0-9_]{0,31}")


def is_token(text: str) -> bool:
    """Whether a text is one short word without spaces or slashes: a name, digest, date or enumerated word.

    >>> is_token("north"), is_token("2026-01-31T10:00:00+00:00"), is_token("DOE^JOHN"), is_token("/data/x")
    (True, True, False, False)
    """
    return _TOKEN.fullmatch(text) is not None


@dataclass(frozen=True)
class AuditEntry:
    """One line of the log.

    Attributes:
        sequence: 1 for the first line.
        time: UTC, ISO 8601.
        previous: digest of the entry before, zeros for the first.
        digest: SHA-256 (hex) over all the other attributes.
    """

    sequence: int
    time: str
    event: str
    fields: dict[str, Scalar]
    previous: str
    digest: str


class AuditLog:
    """Appends to one audit file; several processes and threads may do so at once.

    Args:
        path: the file; its folder must exist.
        clock: the current time, given by tests.
    """

    def __init__(self, path: Path, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._path = path
        self._clock = clock

    def append(self, event: str, **fields: Scalar) -> None:
        """Write one entry and flush it to the disk.

        Raises:
            AuditError: the event is not listed in `EVENTS`, a value is not a token or a finite number, the
                end of the file does not verify, or it could not be written (then nothing was).
        """
        _check_content(event, fields)
        try:
            is_new = not self._path.exists()
            with _locked(self._path, fcntl.LOCK_EX) as file:
                last, torn_bytes = _tail(file, self._path)
                if torn_bytes:
                    last = self._write(file, last, "audit_repaired", {"num_bytes": torn_bytes})
                self._write(file, last, event, fields)
            if is_new:
                flush_directory(self._path.parent)
        except OSError as error:
            raise AuditError(
                f"audit log {self._path} could not be written: {error.strerror}",
                remedy="Free disk space or correct the file's owner. Nothing is sent without an audit entry.",
            ) from error

    def entries(self) -> Iterator[AuditEntry]:
        """Read all entries written so far, each checked against the one before.

        Raises:
            AuditError: at the first line that does not follow from the one before.
        """
        return _read(self._path)

    def _write(
        self, file: FileIO, last: AuditEntry | None, event: str, fields: dict[str, Scalar]
    ) -> AuditEntry:
        sequence = 1 if last is None else last.sequence + 1
        previous = _GENESIS if last is None else last.digest
        time = self._clock().astimezone(UTC).isoformat(timespec="milliseconds")
        digest = _digest(sequence, time, event, fields, previous)
        entry = AuditEntry(sequence, time, event, dict(fields), previous, digest)
        line = _canonical(vars(entry)) + b"\n"
        if len(line) > _MAX_LINE:
            raise AuditError(f"audit entry {event} has {len(line)} bytes", remedy="Report this as a fault.")
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise
        return entry


def verify(path: Path) -> int:
    """Check a whole audit file and return its number of entries.

    Raises:
        AuditError: names the first line that was changed, removed, inserted or moved; or there is no file.
    """
    if not path.exists():
        raise AuditError(f"{path}: no such audit log", remedy="Find out who removed it, or correct the path.")
    return sum(1 for _ in _read(path))


def _locked(path: Path, kind: int) -> FileIO:
    """Open unbuffered with an advisory lock, which closing gives back."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, kind)
    except OSError:
        os.close(descriptor)
        raise
    return FileIO(descriptor, "r+")


def _tail(file: FileIO, path: Path) -> tuple[AuditEntry | None, int]:
    """Cut off an unfinished last line; return the last entry, and how many bytes were cut off."""
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - 2 * _MAX_LINE)
    file.seek(start)
    block = file.read(size - start)
    whole = block.rfind(b"\n") + 1
    torn_bytes = len(block) - whole
    lines = block[:whole].splitlines()
    if torn_bytes > _MAX_LINE or (not lines and start > 0):
        raise _broken(path, "last", "is longer than an entry")
    last = _parse(lines[-1], path, "last") if lines else None
    if torn_bytes:
        os.ftruncate(file.fileno(), start + whole)
    return last, torn_bytes


def _read(path: Path) -> Iterator[AuditEntry]:
    """Yield checked entries, up to the size the file has now: a line being written is not a broken line."""
    if not path.exists():
        return
    with path.open("rb") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_SH)
        remaining = os.fstat(file.fileno()).st_size
        fcntl.flock(file.fileno(), fcntl.LOCK_UN)
        sequence, previous = 0, _GENESIS
        while remaining > 0:
            sequence += 1
            line = file.readline(min(remaining, _MAX_LINE + 1))
            remaining -= len(line)
            if not line.endswith(b"\n"):
                raise _broken(path, sequence, "is not complete")
            entry = _parse(line.rstrip(b"\n"), path, sequence)
            if entry.sequence != sequence or entry.previous != previous:
                raise _broken(path, sequence, "does not follow from the line before")
            previous = entry.digest
            yield entry


def _parse(line: bytes, path: Path, number: int | str) -> AuditEntry:
    """Read one line and check its own digest and form."""
    try:
        entry = AuditEntry(**json.loads(line))
        unchanged = (
            _digest(entry.sequence, entry.time, entry.event, entry.fields, entry.previous) == entry.digest
            and _canonical(vars(entry)) == line
        )
    except (ValueError, TypeError, RecursionError):
        unchanged = False
    if not unchanged:
        raise _broken(path, number, "was changed")
    return entry


def _check_content(event: str, fields: dict[str, Scalar]) -> None:
    faults = [] if event in EVENTS else ["event"]
    for name, value in fields.items():
        if not _is_fit(value) or _FIELD.fullmatch(name) is None:
            faults.append(name)
    if faults:
        kind = event if event in EVENTS else "of unknown kind"
        raise AuditError(
            f"audit entry {kind}: not permitted: {', '.join(faults)}",
            remedy="Only listed events, single words and finite numbers may enter. Report this as a fault.",
        )


def _is_fit(value: object) -> bool:
    if isinstance(value, str):
        return is_token(value)
    if isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)


def _digest(sequence: int, time: str, event: str, fields: dict[str, Scalar], previous: str) -> str:
    return hashlib.sha256(_canonical([sequence, time, event, fields, previous])).hexdigest()


def _canonical(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _broken(path: Path, line: int | str, what: str) -> AuditError:
    return AuditError(
        f"{path}: line {line} {what}",
        remedy="Keep a copy of the file, find out who changed it, and tell your security officer.",
    )
