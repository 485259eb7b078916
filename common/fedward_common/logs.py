"""Logs as events: a fixed name and listed fields, one JSON object a line.

    log = logging.getLogger(__name__)
    log.info("round_started", extra={"run_id": run_id, "round": 3})

What is not listed does not get in: unknown fields are dropped, texts that are more than one word are
withheld, exceptions keep their class and the places in our own code but lose their message, and what
other libraries log keeps only the library's name. A DICOM parser's message can quote a patient's name;
it is removed when the record is made, so that no handler, whoever installed it, ever sees it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import threading
import traceback
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, TextIO

from fedward_common.audit import is_token

FIELDS = frozenset(
    {
        *("action", "address", "attempt", "auroc", "case", "code", "count", "delay_s", "device"),
        *("digest", "epoch", "exit_code", "expires", "federation", "host", "kind", "loss", "mean_loss"),
        *("method", "model", "node_id", "num_bytes", "num_cases", "num_images", "num_instances"),
        *("num_patients", "num_positives", "num_quarantined", "num_sites", "num_slices", "num_steps"),
        *("num_test", "num_train", "num_validation", "payload_bytes", "peer", "pid", "plan", "port"),
        *("process_name", "quorum", "reason", "remedy", "role", "round", "rounds", "rss_mb", "run_id"),
        *("seconds", "signal", "signer", "site", "split", "state", "status", "strategy", "task"),
        *("threads", "timeout_s", "trainer", "version", "where"),
    }
)

_OURS = ("fedward", "fedward_common", "fedward_client", "fedward_server")
_EVENT = re.compile(r"[a-z][a-z0-9_]{0,63}")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_log = logging.getLogger(__name__)


def configure(
    destination: Path | TextIO | None = None, *, level: int = logging.INFO, **context: str | int
) -> None:
    """Send every log record of this process to one place, as JSON lines.

    Handlers that libraries installed are removed. Python's warnings and uncaught exceptions become
    events too, because their texts could quote data. Give each process a file of its own.

    Args:
        destination: a file (created 0600, rotated at 20 MB, five kept), an open stream, or None for
            standard error.
        level: least severity of our own records; libraries are heard from WARNING.
        context: fields that every line carries, for example `site="north"`; they must be in `FIELDS`.
    """
    handler = (
        _PrivateFile(destination) if isinstance(destination, Path) else logging.StreamHandler(destination)
    )
    handler.setFormatter(JsonLines(context))
    # Not by level alone: a library that gave its logger a level of its own (Flower) passes the root's.
    handler.addFilter(lambda record: _is_ours(record.name) or record.levelno >= logging.WARNING)
    for name in ("", *logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        for installed in [one for one in logger.handlers if not isinstance(one, logging.NullHandler)]:
            logger.removeHandler(installed)
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    logging.setLogRecordFactory(_scrubbed_record)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


class JsonLines(logging.Formatter):
    """Format a record as one JSON object that holds listed fields only.

    Args:
        context: fields of every line.
    """

    def __init__(self, context: dict[str, str | int] | None = None) -> None:
        super().__init__()
        self._context = {name: _scalar(value) for name, value in (context or {}).items() if name in FIELDS}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; this never raises, because the report of that would hold the record."""
        message = record.msg if isinstance(record.msg, str) else ""
        is_event = _is_ours(record.name) and not record.args and _EVENT.fullmatch(message) is not None
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name if is_token(record.name) else "withheld",
            "event": message if is_event else "message_withheld",
            **self._context,
        }
        extras = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        line |= {name: _scalar(value) for name, value in extras.items() if name in FIELDS}
        num_dropped = sum(name not in FIELDS for name in extras)
        if num_dropped:
            line["num_dropped"] = num_dropped
        if isinstance(record.exc_info, tuple) and record.exc_info[1] is not None:
            line["exception"] = describe(record.exc_info[1])
        return json.dumps(line)


def describe(error: BaseException) -> list[str]:
    """Return an exception's class and the places it went through in our own code, innermost last.

    The message is left out: it may quote data. So are causes' messages; their classes are kept.

    >>> describe(ValueError("DOE^JOHN"))
    ['ValueError']
    """
    lines: list[str] = []
    current: BaseException | None = error
    while current is not None and len(lines) < 50:
        lines.append(type(current).__name__)
        lines.extend(
            f"{module}:{number}"
            for frame, number in traceback.walk_tb(current.__traceback__)
            if _is_ours(module := _module_of(frame))
        )
        current = current.__cause__
    return lines[:50]


class _PrivateFile(RotatingFileHandler):
    """A rotating log file that only its owner can read, from its first moment."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=20_000_000, backupCount=5, encoding="utf-8")

    def _open(self) -> IO[str]:  # type: ignore[override]
        return open(
            self.baseFilename, "a", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)
        )


def _scrubbed_record(
    name: str | None,
    level: int,
    path: str,
    line: int,
    message: object,
    args: object,
    exc_info: object,
    function: str | None = None,
    stack: str | None = None,
) -> logging.LogRecord:
    """Make a record; one that is not ours loses its text, its arguments and its exception at once."""
    name = str(name)
    if not _is_ours(name):
        message, args, exc_info, stack = "message_withheld", (), None, None
    return logging.LogRecord(name, level, path, line, message, args, exc_info, function, stack)  # type: ignore[arg-type]


def _scalar(value: object) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, str) and is_token(value) else "withheld"


def _is_ours(name: str) -> bool:
    return name.split(".")[0] in _OURS


def _module_of(frame: FrameType) -> str:
    """Name of a frame's module; one run with `python -m` is called by its real name, not `__main__`."""
    name = getattr(frame.f_globals.get("__spec__"), "name", None)
    return str(name or frame.f_globals.get("__name__", ""))


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    _log.critical("uncaught_exception", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(details: threading.ExceptHookArgs) -> None:
    if details.exc_value is not None and details.exc_type is not SystemExit:
        _log.critical(
            "uncaught_exception", exc_info=(details.exc_type, details.exc_value, details.exc_traceback)
        )
